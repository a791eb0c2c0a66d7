"""Schedules, targets and loss against diffusers, closed forms and numbers by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

import sde

DISCRETE = sde.DiscreteSchedule()


def test_discrete_schedule_is_stable_diffusions():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    n = torch.arange(1, 1001, dtype=torch.float64)
    torch.testing.assert_close(DISCRETE.alpha_bar(n / 1000), reference.alphas_cumprod.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sde.SCHEDULES)
def test_schedule_identities(name):
    schedule = sde.get_schedule(name)
    t = torch.linspace(0.01, 0.98, 50, dtype=torch.float64)
    power = 1 if name == "linear" else 2
    torch.testing.assert_close(schedule.alpha(t) ** power + schedule.sigma(t) ** power, torch.ones_like(t))
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


def test_every_discrete_time_is_drawn_equally_often():
    draws = DISCRETE.times((torch.arange(100_000) + 0.5) / 100_000)
    n, counts = torch.unique((draws * 1000).round(), return_counts=True)
    assert (n == torch.arange(1, 1001)).all() and (counts == 100).all()


def test_network_time():
    t = torch.tensor([1.0, 0.5, 0.001], dtype=torch.float64)
    torch.testing.assert_close(DISCRETE.network_time(t), torch.tensor([1.0, 0.0, -0.998]))
    integral = 0.1 * 0.5 + 19.9 * 0.5**2 / 2
    expected = math.log(math.exp(-integral) / (1 - math.exp(-integral))) / 4
    assert sde.VPSDE().network_time(t)[1].item() == pytest.approx(expected, rel=1e-6)


def test_loss_by_hand():
    eps = torch.ones(1, 1, 2, 2)
    predictions = (torch.zeros(1, 1, 1, 1), torch.full((1, 1, 2, 2), 3.0))
    # coarse target: mean 1 times 2, squared error 4, weight 1/4; fine: squared error 4, weight 1
    assert sde.multi_resolution_loss(predictions, eps, sde.default_loss_weights(2)).item() == pytest.approx(5.0)
    assert sde.default_loss_weights(3) == (1 / 16, 1 / 4, 1)
    given = []

    def nnet(*inputs):
        given.extend(inputs)
        return predictions

    x0, t, labels = torch.full((1, 1, 2, 2), 5.0), torch.tensor([0.3], dtype=torch.float64), torch.tensor([7])
    assert sde.training_losses(nnet, DISCRETE, x0, eps, t, labels).tolist() == [[4.0], [4.0]]
    alpha_bar = DISCRETE.alpha_bar(t).item()
    expected = torch.full((1, 1, 2, 2), math.sqrt(alpha_bar) * 5 + math.sqrt(1 - alpha_bar))
    torch.testing.assert_close(given, [expected, torch.tensor([-0.4]), labels])
