"""The solvers beside the released one: orders of convergence, diffusers' schedulers, exact Gaussians."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from test_diffusion import exact_gaussian_sample, gaussian_noise_model, mixture_noise_model

import sde
from libs.solvers import (
    SOLVERS,
    ddim,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    heun,
    karras_times,
    lambda_times,
    uniform_times,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DISCRETE = sde.DiscreteSchedule()


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("order", "evaluations_per_interval", "solve"),
    [
        (1, 1, ddim),
        (2, 1, lambda *args: dpm_solver_multistep(*args, 2)),
        (3, 1, lambda *args: dpm_solver_multistep(*args, 3)),
        (2, 2, heun),
    ],
    ids=["ddim", "2m", "3m", "heun"],
)
@pytest.mark.parametrize("name", ["vpsde", "vpsde_cosine"])
def test_order_of_convergence(name, order, evaluations_per_interval, solve):
    """On an exact mixture of Gaussians, against the released solver at 20 times as many evaluations."""
    schedule, x = sde.get_schedule(name), noise(64, 1, 1, 1)
    model = mixture_noise_model(schedule)

    def times(n):
        return torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)

    exact = dpm_solver_singlestep(model, schedule, x, times(4800), [3] * 1600)
    evaluations = np.array([60, 120, 240])
    errors = [
        (solve(model, schedule, x, times(n // evaluations_per_interval)) - exact).square().mean().sqrt().item()
        for n in evaluations
    ]
    slope = -np.polyfit(np.log(evaluations), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.3), errors


def watched(model):
    """The model, and the list of what it will be given."""
    seen = []

    def watching(x, t):
        seen.append((x, t))
        return model(x, t)

    return watching, seen


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ddim", "ddpm"])
def test_against_diffusers(eta):
    """The same inputs at every evaluation, with the same noise; its table of alphas is in float32."""
    if eta:
        scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    else:
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    model, x = gaussian_noise_model(DISCRETE), noise(16, 1, 2, 2)
    expected, generator, z = [], torch.Generator().manual_seed(1), x
    for k in scheduler.timesteps:
        expected.append(z)
        extra = {"generator": generator} if eta else {}
        z = scheduler.step(model(z, (k.item() + 1) / 1000), k, z, **extra).prev_sample
    watching, seen = watched(model)
    generator.manual_seed(1)
    times = (scheduler.timesteps.double() + 1) / 1000
    final = ddim(watching, DISCRETE, x, times, eta, lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator))
    found = [x for x, _ in seen]
    assert len(found) == 49 and (found[-1] - x).abs().max() > 1
    if not eta:  # the ancestral sampler's last move is without noise here
        found = [*found, final]
    for ours, theirs in zip(found, expected, strict=not eta):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_2m_against_diffusers():
    """On diffusers' grid."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, solver_order=2, final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(30)
    model, x = gaussian_noise_model(DISCRETE), noise(16, 1, 2, 2)
    z = x
    for k in scheduler.timesteps:
        z = scheduler.step(model(z, (k.item() + 1) / 1000), k, z).prev_sample
    times = torch.cat([scheduler.timesteps.double() + 1, torch.ones(1, dtype=torch.float64)]) / 1000
    torch.testing.assert_close(dpm_solver_multistep(model, DISCRETE, x, times, 2), z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 300])
def test_ddpm_mean_and_variance_on_gaussian_data(steps):
    """Sampling is linear here, so its mean and variance follow exactly from its response to each draw by itself.

    Expected: the recursion of Ho et al. (arXiv 2006.11239, equations 6, 7), x_0 replaced by its posterior mean.
    """
    mean, std = 0.7, 0.3
    times = uniform_times(DISCRETE, steps)
    alpha_bar = DISCRETE.alpha_bar(times).tolist()
    m, v = 0.0, 1.0  # of x_T
    for i in range(steps):
        now, then = alpha_bar[i], alpha_bar[i + 1]
        beta = 1 - now / then
        of_x0, of_x = math.sqrt(then) * beta / (1 - now), math.sqrt(now / then) * (1 - then) / (1 - now)
        gain = math.sqrt(now) * std**2 / (now * std**2 + 1 - now)  # E[x_0 | x] = mean + gain (x - sqrt(now) mean)
        m = of_x0 * (mean + gain * (m - math.sqrt(now) * mean)) + of_x * m
        v = (of_x0 * gain + of_x) ** 2 * v + (beta * (1 - then) / (1 - now) if i < steps - 1 else 0)
    # Image 0 gets no noise at all, image 1 the first, image j + 1 only draw j.
    unit = torch.eye(steps + 1, dtype=torch.float64)[..., None, None]  # row j: 1 for image j
    draws = iter(unit[2:].unsqueeze(2))
    x = unit[1].unsqueeze(1)
    found = SOLVERS["ddpm"](
        gaussian_noise_model(DISCRETE, mean, std), DISCRETE, x, steps, lambda: next(draws)
    ).flatten()
    assert next(draws, None) is None
    assert found[0].item() == pytest.approx(m, rel=1e-9)
    assert (found[1:] - found[0]).square().sum().item() == pytest.approx(v, rel=1e-9)
    if steps == 300:
        assert m == pytest.approx(mean, abs=0.02) and math.sqrt(v) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", sde.SCHEDULES)
def test_every_solver_makes_samples_in_as_many_evaluations(name, schedule):
    schedule = sde.get_schedule(schedule)
    model, x = gaussian_noise_model(schedule), noise(4000, 1, 1, 1).float()
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(x.shape, generator=generator)

    least = SOLVERS[name].least_steps
    for steps in (least, least + 1, least + 2, 16):
        watching, seen = watched(model)
        found = SOLVERS[name](watching, schedule, x, steps, draw)
        assert len(seen) == steps and found.shape == x.shape and found.dtype == torch.float32
        assert all(schedule.t_start <= t <= schedule.t_end for _, t in seen) and seen[0][1] == schedule.t_end
    found = SOLVERS[name](model, schedule, x, 100, draw)
    if SOLVERS[name].draws:
        assert found.mean().item() == pytest.approx(0.7, abs=0.02)
        assert found.std().item() == pytest.approx(0.3, abs=0.03)
    else:
        assert (found - exact_gaussian_sample(schedule, x)).abs().mean() < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_waits_for_the_device(name):
    """Tensors without values: whatever wanted to read one would raise."""
    x = torch.empty(2, 4, 8, 8, device="meta")
    found = SOLVERS[name](lambda x, t: x * 0.5, DISCRETE, x, 20, lambda: torch.empty_like(x))
    assert found.shape == x.shape and found.device.type == "meta"


def test_karras_times_are_edms():
    for name in sde.SCHEDULES:
        schedule = sde.get_schedule(name)
        times = karras_times(schedule, 18)
        ratio = (schedule.sigma(times) / schedule.log_alpha(times).exp()).numpy()
        assert times[0] == schedule.t_end and times[-1] == schedule.t_start and (times.diff() < 0).all()
        i = np.arange(19)
        expected = (ratio[0] ** (1 / 7) + i / 18 * (ratio[-1] ** (1 / 7) - ratio[0] ** (1 / 7))) ** 7
        np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_lambda_times_are_equal_steps():
    for name in sde.SCHEDULES:
        schedule = sde.get_schedule(name)
        times = lambda_times(schedule, 18)
        assert times[0] == schedule.t_end and times[-1] == schedule.t_start
        steps = schedule.lambda_(times).diff()
        torch.testing.assert_close(steps, steps.mean().expand(18), rtol=1e-6, atol=0)


def test_orders_that_cannot_be():
    x = noise(1, 1, 1, 1)
    with pytest.raises(ValueError, match="order must be 2 or 3; found 4"):
        dpm_solver_multistep(None, DISCRETE, x, uniform_times(DISCRETE, 5), 4)
    with pytest.raises(ValueError, match=r"order 3 needs at least 3 steps; found 2: raise config.sample.sample_steps"):
        SOLVERS["dpm_solver_3m"](None, DISCRETE, x, 2, None)
    with pytest.raises(ValueError, match=r"order 3 needs at least 3 steps; found 2: raise config.sample.sample_steps"):
        SOLVERS["dpm_solver"](None, DISCRETE, x, 2, None)
