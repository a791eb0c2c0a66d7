"""What only a GPU can show. Skipped without one."""

import pytest
import torch
from test_network import inputs, small_model

import sde
from libs.ema import EMA
from libs.optim import clip_or_skip, make_adamw
from libs.randomness import step_draws

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_outputs_are_the_cpus():
    model = small_model()
    expected = model(*inputs())
    outputs = model.cuda()(*(tensor.cuda() for tensor in inputs()))
    for ours, cpu in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-4, atol=1e-4)


def test_a_training_step_never_waits_for_the_device():
    model, schedule = small_model().cuda(), sde.DiscreteSchedule()
    optimizer, ema = make_adamw(model, 1e-3, (0.9, 0.99), 0.03), EMA(model, 0.99)
    skipped, y = torch.zeros(2, device="cuda"), torch.arange(3, device="cuda")

    def step(k):
        draws = step_draws(0, k, 3, (4, 8, 8), "cuda")
        t = schedule.times(draws.uniform_time)
        with torch.autocast("cuda", torch.bfloat16):
            predictions = model(schedule.add_noise(draws.latent_noise, draws.eps, t), schedule.network_time(t), y)
        sde.multi_resolution_loss(predictions, draws.eps, (0.25, 1.0)).mean().backward()
        clip_or_skip(optimizer, 1.0, skipped)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(k + 1)

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(model.stages[0].skips[0].weight).all()
