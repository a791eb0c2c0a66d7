"""What the network predicts, on which path, at which times: conversions, targets, losses and samplers."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_weights
from test_solvers import mixture_noise_model, noise
from test_train import losses

import eval as evaluation
import sde
import train as training
from libs import UserError
from libs.model import Model
from libs.pipeline import DiMRPipeline
from libs.randomness import SampleNoise
from libs.scheduler import SolverScheduler
from libs.solvers import SOLVERS, euler
from scripts import convert_checkpoint as converting
from scripts import sample

OBJECTIVES = list(itertools.product(sde.SCHEDULES, sde.PREDICTIONS))


def as_prediction(noise_model, schedule, prediction):
    """The same model as one that predicts something else."""

    def predict(x, t):
        return sde.convert(schedule, x, noise_model(x, t), t, "eps", prediction)

    return sde.DiffusionModel(predict, schedule, prediction)


# --- Conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prediction"), OBJECTIVES)
def test_samples_are_the_same_through_any_prediction(name, prediction):
    schedule, x = sde.get_schedule(name), noise(64, 1, 1, 1)
    model = mixture_noise_model(schedule)
    for solver in ("dpm_solver", "dpm_solver_3m", "heun", "ddim", "euler_maruyama_ode"):
        found = SOLVERS[solver](as_prediction(model, schedule, prediction), schedule, x, 30)
        torch.testing.assert_close(found, SOLVERS[solver](model, schedule, x, 30), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sde.SCHEDULES)
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_conversions_are_of_the_same_x0_and_eps(name, ratio):
    schedule, t = sde.get_schedule(name), 0.3
    x0, eps, time = noise(2, 3, 8, 8), noise(2, 3, 8, 8).flip(0), torch.full((2,), t, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, time)
    outputs = {p: sde.prediction_target(schedule, p, x0, eps, time) for p in sde.PREDICTIONS}
    outputs = {p: F.avg_pool2d(o, ratio) * (1 if p == "x" else ratio) for p, o in outputs.items()}
    for source, wanted in itertools.product(sde.PREDICTIONS, repeat=2):
        found = sde.convert(schedule, x, outputs[source], t, source, wanted)
        torch.testing.assert_close(found, outputs[wanted], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sde.SCHEDULES)
def test_velocity_coefficients(name):
    schedule, t = sde.get_schedule(name), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    a, b = schedule.velocity_coefficients(t)
    torch.testing.assert_close(schedule.alpha(t) * b - schedule.sigma(t) * a, torch.ones_like(t), rtol=0, atol=1e-12)
    if name != "linear":
        torch.testing.assert_close(a**2 + b**2, torch.ones_like(t), rtol=0, atol=1e-12)  # unit variance


@pytest.mark.parametrize("name", ["sd", "vpsde", "vpsde_cosine"])
def test_beta_is_the_slope_of_log_alpha_bar(name):
    schedule, t = sde.get_schedule(name), torch.linspace(0.0105, 0.9905, 99, dtype=torch.float64)
    slope = (schedule.log_alpha_bar(t - 1e-4) - schedule.log_alpha_bar(t + 1e-4)) / 2e-4
    torch.testing.assert_close(schedule.beta(t), slope, rtol=1e-3, atol=0)


# --- Targets and losses -----------------------------------------------------------------------------------------------


def test_the_velocity_loss_is_the_published_one():
    """FreqFlow's and CrossFlow's: velocities summed over k x k cells and divided by k, weights 1/4 and 1."""
    x0, eps, t = noise(3, 2, 8, 8), noise(3, 2, 8, 8).flip(0), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    outputs = [noise(3, 2, 4, 4), noise(3, 2, 8, 8) * 0.5]
    seen = []

    def nnet(x, condition, y):
        seen.extend([x, condition])
        return outputs

    losses = sde.training_losses(nnet, sde.get_schedule("linear"), x0, eps, t, torch.zeros(3), "v")
    found = sde.weighted_sum(losses, sde.default_loss_weights(2))
    v = eps - x0
    low = v.reshape(3, 2, 4, 2, 4, 2).sum((3, 5)) / 2
    expected = ((outputs[0] - low) ** 2).mean((1, 2, 3)) / 4 + ((outputs[1] - v) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    time = t[:, None, None, None]
    torch.testing.assert_close(seen[0], (1 - time) * x0 + time * eps)
    torch.testing.assert_close(seen[1], (2 * t - 1).float())


@pytest.mark.parametrize(("name", "prediction"), OBJECTIVES)
def test_variance_of_targets_and_the_loss_at_the_optimum(name, prediction):
    """For data N(0, s²) everything is linear: the best prediction and its error have closed forms."""
    schedule, s, n = sde.get_schedule(name), 0.5, 200_000
    t = torch.full((n,), 0.35, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = s * x0
    alpha, sigma = schedule.alpha(t)[0].item(), schedule.sigma(t)[0].item()
    a, b = (c[0].item() for c in schedule.velocity_coefficients(t))
    of_x0, of_eps = {"eps": (0, 1), "v": (a, b), "x": (1, 0)}[prediction]
    variance = of_x0**2 * s**2 + of_eps**2
    gain = (alpha * of_x0 * s**2 + sigma * of_eps) / (alpha**2 * s**2 + sigma**2)
    error = variance - gain**2 * (alpha**2 * s**2 + sigma**2)
    target = sde.prediction_target(schedule, prediction, x0, eps, t)
    assert target.var().item() == pytest.approx(variance, rel=0.02)

    def best(x, condition, y):
        low = F.avg_pool2d(gain * x, 2) * (1 if prediction == "x" else 2)
        return [low, gain * x]

    losses = sde.training_losses(best, schedule, x0, eps, t, None, prediction).mean(1)
    scale = 0.25 if prediction == "x" else 1  # means of four
    assert losses.tolist() == [pytest.approx(error * scale, rel=0.02), pytest.approx(error, rel=0.02)]
    weights = sde.default_loss_weights(2, prediction)
    assert (losses[0] * weights[0] / (losses[1] * weights[1])).item() == pytest.approx(0.25, rel=0.03)  # of any kind


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_velocity_of_the_linear_path_has_the_variance_that_is_said(ratio):
    """1 + k² Var(D_k x_0), of smooth data."""
    x0 = noise(5000, 1, 2, 2).mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)  # cells alike
    eps, t = noise(5000, 1, 8, 8), torch.full((5000,), 0.5)
    v = sde.multi_scale_target(sde.prediction_target(sde.get_schedule("linear"), "v", x0, eps, t), ratio)
    assert v.var().item() == pytest.approx(1 + ratio**2 * x0.var().item(), rel=0.03)


@pytest.mark.parametrize(("name", "prediction"), OBJECTIVES)
def test_min_snr_weights(name, prediction):
    """min(SNR, 5) for the error of x_0; of other errors times what makes them that one. Finite at both ends."""
    schedule = sde.get_schedule(name)
    t = torch.tensor([0.0, 0.2, 0.6, 1.0 if name == "linear" else schedule.t_end], dtype=torch.float64)
    found = sde.min_snr_weight(schedule, prediction, t)
    assert torch.isfinite(found).all()
    alpha, sigma = schedule.alpha(t)[1:3], schedule.sigma(t)[1:3]
    of_x0 = {"x": torch.ones(2), "eps": sigma**2 / alpha**2, "v": sigma**2}[prediction]  # error of x_0 / of the output
    torch.testing.assert_close(found[1:3].double(), of_x0 * (alpha**2 / sigma**2).clamp(max=5), rtol=1e-6, atol=0)
    x0, losses = noise(4, 1, 4, 4), []
    for weighting in sde.WEIGHTINGS:
        losses.append(
            sde.training_losses(lambda x, t, y: [x], schedule, x0, noise(4, 1, 4, 4), t, None, prediction, weighting)
        )
    torch.testing.assert_close(losses[1], losses[0] * found)


# --- Times that are trained -------------------------------------------------------------------------------------------


def test_logit_normal_times():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = sde.training_times(sde.get_schedule("linear"), u, "logit_normal", 0.8, 0.6, 2.0)
    assert torch.logit(t).mean().item() == pytest.approx(0.8 + math.log(2), abs=1e-4)  # a shift adds ln s to the logit
    assert torch.logit(t).std().item() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("name", sde.SCHEDULES)
@pytest.mark.parametrize("law", sde.TIME_LAWS)
@pytest.mark.parametrize("shift", [1.0, 0.1, 7.0])
def test_the_ends_of_the_draws_are_times_too(name, law, shift):
    schedule, ends = sde.get_schedule(name), torch.tensor([0.0, 1 - 2**-24])
    t = sde.training_times(schedule, ends, law, 0.0, 3.0, shift)
    assert torch.isfinite(t).all() and (t >= 0).all() and (t <= 1).all()
    if name == "sd":
        assert t.min() >= 1 / 1000 and torch.isfinite(schedule.sigma(t)).all()


def test_shift_times():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert sde.shift_times(t, 3.0).tolist() == [0, 0.75, 1]
    torch.testing.assert_close(sde.shift_times(1 - sde.shift_times(t, 1 / 0.3), 1 / 0.3), 1 - t)  # data time: 1/s
    for name in sde.SCHEDULES:
        schedule = sde.get_schedule(name)
        grid = schedule.grid(10, 0.3)
        assert grid[0] == schedule.t_end and grid[-1] == schedule.t_start and (grid.diff() < 0).all()


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_euler_from_noise_to_data_is_the_published_loop(prediction):
    """20 steps from t = 1 to 0, times shifted by 0.3, guidance 2 at t <= 0.7."""

    def velocity(x, t, y):
        return torch.tanh(x * (1 + t)) + 0.3 * y.double()[:, None, None, None]

    def nnet(x, condition, y):
        t = (condition.double() + 1) / 2
        v = velocity(x, t[:, None, None, None], y)
        return [v if prediction == "v" else x - t[:, None, None, None] * v]

    class Exact(sde.LinearSchedule):  # conditions in float64
        def network_time(self, t):
            return 2 * t - 1

    y, x = torch.tensor([0, 1, 2]), noise(3, 1, 2, 2)
    interval = (0.0, 0.7 / 0.3)
    model = sde.guided_noise_model(nnet, Exact(), y, 3, 2.0, None, interval, prediction=prediction)
    found = euler(model, Exact(), x, 20, 0.3)

    z, times = x.clone(), [1 - i / 20 for i in range(21)]
    times = [0.3 * t / (1 - 0.7 * t) for t in times]
    for t, following in itertools.pairwise(times):
        v = velocity(z, t, y)
        if t <= 0.7:
            v = 2 * v - velocity(z, t, torch.full_like(y, 3))
        z = z + (following - t) * v
    torch.testing.assert_close(found, z, rtol=0, atol=1e-6)


def test_a_ddim_step_on_the_linear_path_is_an_euler_step():
    schedule, x = sde.get_schedule("linear"), noise(64, 1, 1, 1)
    model = mixture_noise_model(schedule)
    torch.testing.assert_close(SOLVERS["ddim"](model, schedule, x, 20), SOLVERS["euler"](model, schedule, x, 20))


def test_a_guide_may_predict_something_else():
    schedule, x, y = sde.get_schedule("linear"), noise(4, 1, 4, 4).float(), torch.zeros(4, dtype=torch.long)

    def network(prediction, factor):
        def nnet(x, condition, y):
            t, eps = (condition[0].item() + 1) / 2, torch.sin(factor * x)
            outputs = [sde.multi_scale_target(eps, 2), eps]
            return [sde.convert(schedule, x, output, t, "eps", prediction) for output in outputs]

        return nnet

    expected = sde.guided_predictions(network("eps", 2.0), schedule, y, 1, 1.7, guide=network("eps", 1.0))(x, 0.6)
    for own, other in itertools.product(sde.PREDICTIONS, repeat=2):
        guided = {"guide": network(other, 1.0), "prediction": own, "guide_prediction": other}
        found = sde.guided_predictions(network(own, 2.0), schedule, y, 1, 1.7, **guided)(x, 0.6)
        for output, eps in zip(found, expected, strict=True):
            torch.testing.assert_close(sde.convert(schedule, x, output, 0.6, own, "eps"), eps, rtol=0, atol=1e-5)


# --- The programs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(tiny_config):
    tiny_config.update(schedule="linear", prediction="v", time_sampling="logit_normal", time_shift=1.4)
    tiny_config.sample.update(algorithm="euler", time_shift=0.3)
    return tiny_config


def test_flow_matching_trains_resumes_samples_and_is_not_taken_for_another(flow, tmp_path):
    training.train(flow, tmp_path / "straight")
    flow.train.n_steps = 3
    training.train(flow, tmp_path / "resumed")
    flow.train.n_steps = 6
    training.train(flow, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    weights = tmp_path / "straight" / "ckpts" / "6.ckpt"
    evaluation.evaluate(flow, str(weights), tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 12
    model = Model.open(weights)
    times, _, _ = sample.trajectory(model, [0, 1], [0, 1])
    assert times[0] == 1.0
    for name, other in (("prediction", "eps"), ("schedule", "sd")):
        with flow.unlocked():
            changed = flow.copy_and_resolve_references()
        changed[name] = other
        with pytest.raises(UserError, match=f"another config .{name}: {flow[name]} there, {other} now"):
            Model.open(weights, changed)


def test_the_pipeline_samples_what_was_trained(flow, tmp_path):
    """By our solver as eval.py does; by diffusers' flow matching as Euler's method on its own times."""
    flow.sample.update(scale=2.0, sample_steps=5)
    training.train(flow, tmp_path / "run")
    weights = tmp_path / "run" / "ckpts" / "6.ckpt"
    converting.convert(str(weights), tmp_path / "pipeline")
    pipe = DiMRPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    model = Model.open(weights)
    expected = model.sampler()([0, 1], [1, 2])[0]
    found = torch.from_numpy(np.stack(pipe([1, 2], seed=flow.seed).images)).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)

    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    latents = pipe([1, 2], seed=flow.seed, output_type="latent", guidance_scale=1.0).images
    x = SampleNoise([0, 1], flow.seed, tuple(flow.z_shape), torch.device("cpu")).draw()
    sigmas = pipe.scheduler.sigmas.tolist()
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == 6
    with torch.no_grad():
        for t, following in itertools.pairwise(sigmas):
            v = model.nnet(x, torch.tensor([2 * t - 1]), torch.tensor([1, 2]))[-1]
            x = x + (following - t) * v
    torch.testing.assert_close(latents, x, rtol=0, atol=1e-4)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler: the network predicts v on the linear path"):
        pipe([1])


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_scheduler_of_diffusers_may_want_another_prediction(tiny_config, tmp_path, prediction):
    save_weights(tiny_config, tmp_path / "a.safetensors")
    converting.convert(str(tmp_path / "a.safetensors"), tmp_path / "pipeline")
    pipe, results = DiMRPipeline.from_pretrained(tmp_path / "pipeline"), []
    pipe.set_progress_bar_config(disable=True)
    for kind in ("epsilon", prediction):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(SolverScheduler().config, prediction_type=kind)
        results.append(pipe([1, 2], output_type="latent", num_inference_steps=8).images)
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("schedule", "prediction"), OBJECTIVES)
def test_every_objective_trains_finitely(tiny_config, tmp_path, schedule, prediction):
    tiny_config.update(schedule=schedule, prediction=prediction, loss_weighting="min_snr")
    tiny_config.train.update(n_steps=2, eval_interval=2, save_interval=0)
    assert training.train(tiny_config, tmp_path) == 0
    assert all(map(math.isfinite, losses(tmp_path)))
