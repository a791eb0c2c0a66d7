"""Guidance: what is asked of the network at which noise level, and that nothing in sampling waits for the device."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sde
import utils
from libs.randomness import SampleNoise
from libs.solvers import SAMPLERS, Solver

B = 3


class Counting(torch.nn.Module):
    """A network that notes how many images it is given, and the labels."""

    def __init__(self, nnet):
        super().__init__()
        self.nnet, self.calls = nnet, []

    def forward(self, x, t, y):
        self.calls.append(len(x))
        return self.nnet(x, t, y)


def by_label(factor):
    """eps = factor * label, everywhere."""
    return Counting(lambda x, t, y: (torch.zeros_like(x), factor * y.view(-1, 1, 1, 1) * torch.ones_like(x)))


def level(schedule, t):
    """sigma / alpha, from alpha_bar."""
    alpha_bar = schedule.alpha_bar(torch.tensor(t, dtype=torch.float64)).item()
    return math.sqrt((1 - alpha_bar) / alpha_bar)


@pytest.mark.parametrize("schedule", [sde.DiscreteSchedule(), sde.VPSDE(), sde.CosineSDE()])
def test_interval_is_of_the_noise_level_and_saves_evaluations(schedule):
    nnet, labels = by_label(1.0), torch.tensor([1, 2, 3])
    times = torch.linspace(0.99, 0.01, 50).tolist()
    levels = [level(schedule, t) for t in times]
    low, high = levels[30], levels[10]  # levels fall: 30 is outside, 10 inside
    noise_model = sde.guided_noise_model(nnet, schedule, labels, 9, scale=1.5, interval=(low * 1.001, high * 1.001))
    for i, t in enumerate(times):
        eps = noise_model(torch.zeros(B, 1, 2, 2), t)[:, 0, 0, 0].tolist()
        inside = 10 <= i < 30
        assert eps == pytest.approx([9 + 1.5 * (y - 9) for y in (1, 2, 3)] if inside else [1, 2, 3])
    assert nnet.calls == [B] * 10 + [2 * B] * 20 + [B] * 20


def test_interval_and_power_schedule_together():
    schedule, t = sde.VPSDE(), 0.5
    nnet, labels = by_label(1.0), torch.tensor([1, 2, 3])
    noise_model = sde.guided_noise_model(nnet, schedule, labels, 9, 3.0, 2.0, (0.0, level(schedule, t) * 1.01))
    weight = 1 + 2 * (1 - math.cos(math.pi * 0.25)) / 2
    assert noise_model(torch.zeros(B, 1, 1, 1), t).flatten().tolist() == pytest.approx(
        [9 + weight * (y - 9) for y in (1, 2, 3)], abs=1e-5
    )


def test_a_weaker_network_guides_with_the_same_labels():
    nnet, weaker, labels = by_label(1.0), by_label(0.5), torch.tensor([1, 2, 3])
    noise_model = sde.guided_noise_model(nnet, sde.VPSDE(), labels, 9, scale=2.0, weaker=weaker)
    eps = noise_model(torch.zeros(B, 1, 1, 1), 0.5).flatten().tolist()
    assert eps == pytest.approx([0.5 * y + 2.0 * (y - 0.5 * y) for y in (1, 2, 3)])
    assert nnet.calls == weaker.calls == [B]
    sde.guided_noise_model(nnet, sde.VPSDE(), labels, 9, scale=1.0, weaker=weaker)(torch.zeros(B, 1, 1, 1), 0.5)
    assert nnet.calls == [B, B] and weaker.calls == [B]


@pytest.mark.parametrize("scale", [0.4, float("nan"), float("inf")])
def test_no_scale(scale):
    with pytest.raises(ValueError, match="the guidance scale must be at least 1"):
        sde.check_guidance(scale, None)


@pytest.mark.parametrize("interval", [(1.0,), (2.0, 1.0), (-1.0, 1.0), (1.0, 1.0), ("a", "b"), (float("nan"), 1.0)])
def test_no_interval(interval):
    with pytest.raises(
        ValueError, match=r"two noise levels sigma / alpha, \(low, high\) .* set config.sample.interval"
    ):
        sde.check_guidance(1.5, None, interval)


class NoWaiting(TorchDispatchMode):
    """Fails on anything that reads a value of a device tensor on the host, or copies between them and waits.

    The device is "meta", whose tensors have no values: reading one fails by itself. Counts the copies.
    """

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if function is torch.ops.aten._local_scalar_dense.default:
            assert not tensors[0].is_meta, "a value of a device tensor is read"
        if function is torch.ops.aten._to_copy.default and str(kwargs.get("device", tensors[0].device)) != str(
            tensors[0].device
        ):
            assert kwargs.get("non_blocking"), "a copy that waits"
            self.copies += 1
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            assert kwargs.get("non_blocking") or args[2:] == (True,), "a copy that waits"
            self.copies += 1
        return function(*args, **kwargs)


@pytest.fixture
def on_meta(tiny_config):
    """sample(...) of the tiny model with all tensors on the meta device, and its counting network."""

    def make(weaker=None, schedule="sd", **settings):
        tiny_config.schedule = schedule
        tiny_config.sample.update(**settings)
        utils.check_sampling(tiny_config)
        device = torch.device("meta")
        accelerator = SimpleNamespace(device=device, autocast=contextlib.nullcontext)
        autoencoder = utils.open_autoencoder(tiny_config, torch.device("cpu")).to(device)
        nnet = Counting(utils.build_network_on_meta(tiny_config))
        schedule = sde.get_schedule(tiny_config.schedule)
        return nnet, utils.make_sampler(tiny_config, nnet, 3, schedule, autoencoder, accelerator, 12, weaker)

    return make


@pytest.mark.parametrize("algorithm", SAMPLERS)
def test_sampling_never_waits_and_calls_the_network_once_per_step(on_meta, algorithm, monkeypatch):
    """Guided, to uint8 images: one call on 2 B images per evaluation; only noise and labels are copied."""
    schedule = "vpsde" if algorithm.startswith("euler") else "sd"
    nnet, sample = on_meta(algorithm=algorithm, scale=2.0, schedule=schedule)
    draw, draws = SampleNoise.draw, []
    monkeypatch.setattr(SampleNoise, "draw", lambda noise: draws.append(draw(noise)) or draws[-1])
    with NoWaiting() as mode:
        images, finite = sample(range(5), [0, 0, 1, 2, 3])
    assert finite.is_meta and finite.shape == (5,)
    assert images.is_meta and images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert nnet.calls == [10] * 12
    assert mode.copies == len(draws) + 1  # noise for each draw, and the labels
    assert (len(draws) > 1) == SAMPLERS[algorithm].draws


def test_interval_and_weaker_network_do_not_wait_either(on_meta):
    schedule = sde.DiscreteSchedule()
    interval = (level(schedule, 0.3), level(schedule, 0.7))
    nnet, sample = on_meta(algorithm="ddim", scale=2.0, interval=interval)
    with NoWaiting():
        sample(range(5), [0] * 5)
    assert sorted(set(nnet.calls)) == [5, 10] and len(nnet.calls) == 12
    weaker = Counting(nnet.nnet)
    nnet, sample = on_meta(weaker, algorithm="ddim", scale=2.0, interval=interval)
    with NoWaiting() as mode:
        sample(range(5), [0] * 5)
    assert nnet.calls == [5] * 12 and 0 < len(weaker.calls) < 12
    assert mode.copies == 2


def test_a_step_that_reads_a_value_is_found():
    x = torch.zeros(2, device="meta")
    with NoWaiting(), pytest.raises(AssertionError, match="is read"):
        x.sum().item()
    with NoWaiting(), pytest.raises(AssertionError, match="copy that waits"):
        torch.zeros(2).to("meta")


def test_settings_that_cannot_work(tiny_config, tmp_path, monkeypatch):
    def refuses(message, **settings):
        before = dict(tiny_config.sample)
        tiny_config.sample.update(settings)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            utils.check_sampling(tiny_config)
            utils.open_weaker_network(tiny_config, torch.device("cpu"))
        tiny_config.sample.update(before)

    refuses("config.sample.output must be one of png, npz, both; found 'jpg'", output="jpg")
    refuses("autoguidance_config is set without config.sample.autoguidance_path", autoguidance_config="x.py")
    (tmp_path / "bad.py").write_text("def get_config():\n    return 1 / 0\n")
    found = r"bad\.py, line 2: expected a config with get_config\(\); found ZeroDivisionError"
    refuses(found, autoguidance_path="a", autoguidance_config=str(tmp_path / "bad.py"))
    refuses("no config at config.sample.autoguidance_config=x.py", autoguidance_path="a", autoguidance_config="x.py")
    refuses(r"no checkpoint at nowhere", autoguidance_path="nowhere")
    monkeypatch.setitem(SAMPLERS, "slow", Solver(None, least_steps=7))
    refuses("config.sample.sample_steps must be at least 7 for slow; found 6", algorithm="slow", sample_steps=6)
    refuses("config.sample.algorithm must be one of dpm_solver, .*, slow; found 'fast'", algorithm="fast")
    refuses(
        r"the guiding network's z_shape must be that of the guided one, \(4, 8, 8\); found \(4, 32, 32\)",
        autoguidance_path="a",
        autoguidance_config="configs/DiMR-XL-2R_imagenet256.py",
    )
    tiny_config.dataset.n_classes = 0
    refuses("can only be guided by a weaker one", scale=1.5)
    tiny_config.sample.update(autoguidance_path="a", scale=1.5)
    utils.check_sampling(tiny_config)
