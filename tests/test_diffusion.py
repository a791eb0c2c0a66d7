"""Schedules, loss, guidance and samplers against diffusers, closed forms and exact solutions."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverSinglestepScheduler

import sde
from libs.solvers import dpm_solver_fast, dpm_solver_singlestep, fast_orders

DISCRETE = sde.DiscreteSchedule()


def gaussian_noise_model(schedule, mean=0.7, std=0.3):
    """The exact noise prediction for data N(mean, std²): sampling from it has a closed form."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.log_alpha(t).exp(), schedule.sigma(t)
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return noise_model


def exact_gaussian_sample(schedule, x, mean=0.7, std=0.3):
    """Where the probability-flow ODE takes x from t_end to t_start: it keeps (x - alpha mean) / its deviation."""
    ends = torch.tensor([schedule.t_end, schedule.t_start], dtype=torch.float64)
    alpha, sigma = schedule.log_alpha(ends).exp(), schedule.sigma(ends)
    deviation = (alpha**2 * std**2 + sigma**2).sqrt()
    return alpha[1] * mean + (x - alpha[0] * mean) / deviation[0] * deviation[1]


def test_discrete_schedule_is_stable_diffusions():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    n = torch.arange(1, 1001, dtype=torch.float64)
    torch.testing.assert_close(DISCRETE.alpha_bar(n / 1000), reference.alphas_cumprod.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sde.SCHEDULES)
def test_schedule_identities(name):
    schedule = sde.get_schedule(name)
    t = torch.linspace(0.01, 0.98, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha_bar(t) + schedule.sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(schedule.lambda_(t), schedule.log_alpha(t) - schedule.sigma(t).log())
    torch.testing.assert_close(schedule.inverse_lambda(schedule.lambda_(t)), t, rtol=0, atol=1e-9)
    draws = schedule.times(torch.linspace(0, 1 - 1e-7, 1001))
    assert draws.min() >= 0 and draws.max() <= 1


@pytest.mark.parametrize("name", ["vpsde", "vpsde_cosine"])
def test_drift_is_the_derivative_of_log_alpha(name):
    schedule = sde.get_schedule(name)
    t, h = torch.linspace(0.05, 0.95, 10, dtype=torch.float64), 1e-6
    slope = (schedule.log_alpha(t + h) - schedule.log_alpha(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.drift(t), slope, rtol=1e-5, atol=1e-6)


def test_every_discrete_time_is_drawn_alike():
    draws = DISCRETE.times((torch.arange(100_000) + 0.5) / 100_000)
    n, counts = torch.unique((draws * 1000).round(), return_counts=True)
    assert (n == torch.arange(1, 1001)).all() and (counts == 100).all()


def test_targets_keep_unit_variance():
    eps = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for ratio in (2, 4):
        assert sde.multi_scale_target(eps, ratio).std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="divisible by 4; found 6x6"):
        sde.multi_scale_target(torch.zeros(1, 3, 6, 6), 4)


def test_loss_by_hand():
    eps = torch.ones(1, 1, 2, 2)
    predictions = (torch.zeros(1, 1, 1, 1), torch.full((1, 1, 2, 2), 3.0))
    # coarse target: mean 1 times 2, squared error 4, weight 1/4; fine: squared error 4, weight 1
    assert sde.multi_resolution_loss(predictions, eps, sde.default_loss_weights(2)).item() == pytest.approx(5.0)
    assert sde.default_loss_weights(3) == (1 / 16, 1 / 4, 1)


def test_guidance_weight():
    assert sde.guidance_weight(0.3, 1.4) == 1.4
    assert sde.guidance_weight(1.0, 3.0, 2.0) == 1.0
    assert sde.guidance_weight(0.0, 3.0, 2.0) == pytest.approx(3.0)
    assert sde.guidance_weight(0.5, 3.0, 1.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"at least 1 .* its 0.4 is --cfg=1.4 here"):
        sde.check_guidance(0.4, None)
    with pytest.raises(ValueError, match=r"at least 0 \(0: constant scale\); found -1"):
        sde.check_guidance(1.4, -1.0)


def test_guidance_is_one_pass_and_none_at_scale_1():
    seen = []

    def nnet(x, t, y):
        seen.append((len(x), y.tolist()))
        return (x * y.view(-1, 1, 1, 1),)

    x, labels = torch.ones(2, 1, 1, 1), torch.tensor([1, 2])
    guided = sde.guided_noise_model(nnet, DISCRETE, labels, null_label=9, scale=1.5)(x, 0.5)
    torch.testing.assert_close(guided.flatten(), torch.tensor([9 + 1.5 * (1 - 9), 9 + 1.5 * (2 - 9)]))
    sde.guided_noise_model(nnet, DISCRETE, labels, null_label=9)(x, 0.5)
    assert seen == [(4, [1, 2, 9, 9]), (2, [1, 2])]


def test_fast_orders_use_every_step():
    for steps in range(3, 60):
        for order in (1, 2, 3):
            assert sum(fast_orders(steps, order)) == steps
    assert fast_orders(6, 3) == [3, 2, 1] and fast_orders(7, 3) == [3, 3, 1] and fast_orders(8, 3) == [3, 3, 2]
    with pytest.raises(ValueError, match="at least 3 steps; found 2"):
        fast_orders(2, 3)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3; found 4"):
        fast_orders(10, 4)


def mixture_noise_model(schedule):
    """The exact noise prediction for data at -1 or 1, give or take 0.3: curved, unlike a single Gaussian's."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.log_alpha(t).exp(), schedule.sigma(t)
        variance = alpha**2 * 0.3**2 + sigma**2
        return sigma * (x - alpha * torch.tanh(alpha * x / variance)) / variance

    return noise_model


@pytest.mark.parametrize("order", [1, 2, 3])
def test_solver_converges_at_its_order(order):
    """With steps of the full order only, against the same solver with 20 times as many evaluations."""
    schedule = sde.VPSDE()
    x = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def solve(n, order):
        times = torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)
        return dpm_solver_singlestep(mixture_noise_model(schedule), schedule, x, times, [order] * (n // order))

    exact, evaluations = solve(4800, 3), np.array([60, 120, 240])
    errors = [(solve(n, order) - exact).square().mean().sqrt().item() for n in evaluations]
    slope = -np.polyfit(np.log(evaluations), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.3), errors


def test_solver_against_diffusers():
    """Close, not exact: diffusers' singlestep solver rounds its times to integers."""
    reference = DPMSolverSinglestepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        solver_order=3,
        algorithm_type="dpmsolver++",
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    model = gaussian_noise_model(DISCRETE)
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    reference.set_timesteps(50)
    z = x.clone()
    for k in reference.timesteps:
        z = reference.step(model(z, (k.item() + 1) / 1000), k, z).prev_sample
    assert (dpm_solver_fast(model, DISCRETE, x, 50) - z).abs().mean() < 2e-3


def test_euler_maruyama_reaches_the_data():
    """From noise, the ODE lands on the exact solution and the SDE on the data's mean and deviation."""
    schedule = sde.VPSDE()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    model = gaussian_noise_model(schedule)
    ode = sde.euler_maruyama(model, schedule, x, 500, ode=True)
    torch.testing.assert_close(ode, exact_gaussian_sample(schedule, x), rtol=0, atol=0.03)

    def draw():
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    samples = sde.euler_maruyama(model, schedule, x, 500, draw=draw)
    assert samples.mean().item() == pytest.approx(0.7, abs=0.01)
    assert samples.std().item() == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="needs a continuous schedule"):
        sde.euler_maruyama(model, DISCRETE, x, 5)


def test_network_time():
    t = torch.tensor([1.0, 0.5, 0.001], dtype=torch.float64)
    torch.testing.assert_close(DISCRETE.network_time(t), torch.tensor([1.0, 0.0, -0.998]))
    integral = 0.1 * 0.5 + 19.9 * 0.5**2 / 2
    expected = math.log(math.exp(-integral) / (1 - math.exp(-integral))) / 4
    assert sde.VPSDE().network_time(t)[1].item() == pytest.approx(expected, rel=1e-6)
