"""The solvers: orders of convergence, diffusers' schedulers, exact Gaussians, NFE."""

from functools import cache, partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler

import sde
from libs.solvers import (
    SOLVERS,
    ddim,
    dpm_solver_fast,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    heun,
    karras_times,
    lambda_times,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DISCRETE = sde.DiscreteSchedule()
MEAN, STD = 0.7, 0.3


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gaussian_noise_model(schedule):
    """The exact noise prediction for data N(MEAN, STD²): sampling from it has a closed form."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return noise_model


def exact_gaussian_sample(schedule, x):
    """Where the probability-flow ODE takes x from t_end to t_start: it keeps (x - alpha mean) / its deviation."""
    ends = torch.tensor([schedule.t_end, schedule.t_start], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    deviation = (alpha**2 * STD**2 + sigma**2).sqrt()
    return alpha[1] * MEAN + (x - alpha[0] * MEAN) / deviation[0] * deviation[1]


def mixture_noise_model(schedule):
    """The exact noise prediction for data at -1 or 1, give or take 0.3: curved, unlike a single Gaussian's."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * 0.3**2 + sigma**2
        return sigma * (x - alpha * torch.tanh(alpha * x / variance)) / variance

    return noise_model


def singlestep(noise_model, schedule, x, times, order):
    """All steps of the full order."""
    return dpm_solver_singlestep(noise_model, schedule, x, times, [order] * ((len(times) - 1) // order))


def times(n):
    return torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)


@cache
def exact_mixture_sample(name):
    """By the solver of order 3 with 20 times as many evaluations as the solvers in question."""
    schedule = sde.get_schedule(name)
    return singlestep(mixture_noise_model(schedule), schedule, noise(64, 1, 1, 1), times(4800), 3)


@pytest.mark.parametrize(
    ("order", "evaluations_per_interval", "solve"),
    [
        *((order, 1, partial(singlestep, order=order)) for order in (1, 2, 3)),
        *((order, 1, partial(dpm_solver_multistep, order=order)) for order in (2, 3)),
        (1, 1, ddim),
        (2, 2, heun),
    ],
    ids=["1", "2", "3", "2m", "3m", "ddim", "heun"],
)
@pytest.mark.parametrize("name", ["vpsde", "vpsde_cosine", "linear"])
def test_order_of_convergence(name, order, evaluations_per_interval, solve):
    schedule, evaluations, errors = sde.get_schedule(name), np.array([60, 120, 240]), []
    for n in evaluations // evaluations_per_interval:
        found = solve(mixture_noise_model(schedule), schedule, noise(64, 1, 1, 1), times(n))
        errors.append((found - exact_mixture_sample(name)).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(evaluations), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.3), errors


def recorded(model):
    """The model, and the list of what it will be given."""
    seen = []

    def recording(x, t):
        seen.append((x, t))
        return model(x, t)

    return recording, seen


def run_scheduler(scheduler, steps, model, x, **extra):
    """Sample with a scheduler of diffusers; returns its inputs at every evaluation, and the sample."""
    scheduler.set_timesteps(steps)
    inputs = [x]
    for k in scheduler.timesteps:
        inputs.append(scheduler.step(model(inputs[-1], (k.item() + 1) / 1000), k, inputs[-1], **extra).prev_sample)
    return inputs


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ddim", "ddpm"])
def test_ddim_and_ddpm_against_diffusers(eta):
    """The same inputs at every evaluation, with the same noise; its table of alphas is in float32."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    if eta:
        scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    model, x, generator = gaussian_noise_model(DISCRETE), noise(16, 1, 2, 2), torch.Generator().manual_seed(1)
    expected = run_scheduler(scheduler, 50, model, x, **({"generator": generator} if eta else {}))
    recording, seen = recorded(model)
    generator.manual_seed(1)
    times = (scheduler.timesteps.double() + 1) / 1000
    draw = Mock(side_effect=lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator))
    final = ddim(recording, DISCRETE, x, times, eta, draw)
    assert draw.call_count == (48 if eta else 0)  # none in the last step
    found = [x for x, _ in seen] + ([] if eta else [final])  # the last step of DDPM adds no noise here
    assert len(seen) == 49 and (found[-1] - x).abs().max() > 1
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_dpm_solvers_against_diffusers():
    """2M on diffusers' own times; the singlestep solver is close only, as diffusers rounds its times to integers."""
    settings = {**BETAS, "algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"}
    model, x = gaussian_noise_model(DISCRETE), noise(16, 1, 2, 2)
    scheduler = DPMSolverMultistepScheduler(**settings, solver_order=2, lower_order_final=False)
    expected = run_scheduler(scheduler, 30, model, x)[-1]
    times = torch.cat([scheduler.timesteps.double() + 1, torch.ones(1, dtype=torch.float64)]) / 1000
    torch.testing.assert_close(dpm_solver_multistep(model, DISCRETE, x, times, 2), expected, rtol=0, atol=1e-4)
    scheduler = DPMSolverSinglestepScheduler(**settings, solver_order=3, lower_order_final=True)
    expected = run_scheduler(scheduler, 50, model, x)[-1]
    assert (dpm_solver_fast(model, DISCRETE, x, 50) - expected).abs().mean() < 2e-3


@pytest.mark.parametrize("schedule", sde.SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_samples_with_exactly_its_nfe(name, schedule):
    schedule, solver = sde.get_schedule(schedule), SOLVERS[name]
    model, x = gaussian_noise_model(schedule), noise(20_000 if solver.draws else 4000, 1, 1, 1).float()
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(x.shape, generator=generator)

    for steps in (solver.least_steps, solver.least_steps + 1, solver.least_steps + 2, 16):
        recording, seen = recorded(model)
        found = solver(recording, schedule, x, steps, draw)
        assert len(seen) == steps and found.shape == x.shape and found.dtype == torch.float32
        assert all(schedule.t_start <= t <= schedule.t_end for _, t in seen) and seen[0][1] == schedule.t_end
    found = solver(model, schedule, x, 500 if name.startswith("euler") else 100, draw)
    if solver.draws:
        assert found.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert found.std().item() == pytest.approx(STD, abs=0.03)
    else:
        assert (found - exact_gaussian_sample(schedule, x)).abs().mean() < 0.02


@pytest.mark.parametrize("name", sde.SCHEDULES)
def test_times_are_equal_steps_of_their_kind(name):
    schedule = sde.get_schedule(name)
    equal, karras = lambda_times(schedule, 18), karras_times(schedule, 18)
    for found in (equal, karras):
        assert found[0] == schedule.t_end and found[-1] == schedule.t_start and (found.diff() < 0).all()
    steps = schedule.lambda_(equal).diff()
    torch.testing.assert_close(steps, steps.mean().expand(18), rtol=1e-6, atol=0)
    ratio = (schedule.sigma(karras) / schedule.alpha(karras)).numpy()
    i = np.arange(19)
    expected = (ratio[0] ** (1 / 7) + i / 18 * (ratio[-1] ** (1 / 7) - ratio[0] ** (1 / 7))) ** 7
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
