"""Guidance: what is asked of the network at which noise level, and that nothing in sampling waits for the device."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sde
import utils
from libs import UserError
from libs.model import Model, build_network_on_meta, open_autoencoder, open_guide
from libs.randomness import SampleNoise
from libs.solvers import SOLVERS, Solver, check_guidance

B = 3
LABELS = torch.tensor([1, 2, 3])


class Counting(torch.nn.Module):
    """A network that notes how many images it is given."""

    def __init__(self, nnet):
        super().__init__()
        self.nnet, self.calls, self.null_label = nnet, [], getattr(nnet, "null_label", 3)

    def forward(self, x, t, y):
        self.calls.append(len(x))
        return self.nnet(x, t, y)


def by_label(factor):
    """eps = factor * label at the fine resolution, 10 times as much at the coarse one."""
    return Counting(lambda x, t, y: tuple(f * y.view(-1, 1, 1, 1) * torch.ones_like(x) for f in (10 * factor, factor)))


def level(schedule, t):
    """sigma / alpha, from alpha_bar."""
    alpha_bar = schedule.alpha_bar(torch.tensor(t, dtype=torch.float64)).item()
    return math.sqrt((1 - alpha_bar) / alpha_bar)


@pytest.mark.parametrize("schedule", [sde.DiscreteSchedule(), sde.VPSDE(), sde.CosineSDE()])
def test_interval_is_of_the_noise_level_and_saves_evaluations(schedule):
    """One call on 2 B images where there is guidance, on B where there is none; the same at every resolution."""
    nnet = by_label(1.0)
    times = torch.linspace(0.99, 0.01, 50).tolist()
    levels = [level(schedule, t) for t in times]
    low, high = levels[30], levels[10]  # levels fall: 30 is outside, 10 inside
    predict = sde.guided_predictions(nnet, schedule, LABELS, 9, scale=1.5, interval=(low * 1.001, high * 1.001))
    for i, t in enumerate(times):
        coarse, fine = (eps[:, 0, 0, 0].tolist() for eps in predict(torch.zeros(B, 1, 2, 2), t))
        inside = 10 <= i < 30
        assert fine == pytest.approx([9 + 1.5 * (y - 9) for y in (1, 2, 3)] if inside else [1, 2, 3])
        assert coarse == pytest.approx([10 * eps for eps in fine])
    assert nnet.calls == [B] * 10 + [2 * B] * 20 + [B] * 20
    sde.guided_noise_model(nnet, schedule, LABELS, 9)(torch.zeros(B, 1, 2, 2), 0.5)
    assert nnet.calls[50:] == [B]  # at scale 1


def test_interval_and_power_schedule_together():
    schedule, t = sde.VPSDE(), 0.5
    interval = (0.0, level(schedule, t) * 1.01)
    noise_model = sde.guided_noise_model(by_label(1.0), schedule, LABELS, 9, 3.0, 2.0, interval)
    weight = 1 + 2 * (1 - math.cos(math.pi * 0.25)) / 2
    assert noise_model(torch.zeros(B, 1, 1, 1), t).flatten().tolist() == pytest.approx(
        [9 + weight * (y - 9) for y in (1, 2, 3)], abs=1e-5
    )


def test_a_guiding_network_is_conditioned_on_the_same_labels():
    nnet, guide, x = by_label(1.0), by_label(0.5), torch.zeros(B, 1, 1, 1)
    eps = sde.guided_noise_model(nnet, sde.VPSDE(), LABELS, 9, scale=2.0, guide=guide)(x, 0.5).flatten().tolist()
    assert eps == pytest.approx([0.5 * y + 2.0 * (y - 0.5 * y) for y in (1, 2, 3)])
    assert nnet.calls == guide.calls == [B]
    sde.guided_noise_model(nnet, sde.VPSDE(), LABELS, 9, scale=1.0, guide=guide)(x, 0.5)
    assert nnet.calls == [B, B] and guide.calls == [B]
    # A guide of other resolutions: those of both networks, from the finest.
    predict = sde.guided_predictions(nnet, sde.VPSDE(), LABELS, 9, scale=2.0, guide=lambda *inputs: guide(*inputs)[1:])
    assert [found.flatten().tolist() for found in predict(x, 0.5)] == [pytest.approx(eps)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(((scale, None), "guidance scale must be at least 1") for scale in (float("nan"), float("inf"), 0.0)),
        ((0.4, None), r"at least 1 .* its 0.4 is --cfg=1.4 here"),
        ((1.4, -1.0), r"at least 0 \(0: constant scale\); found -1"),
        *(
            ((1.5, None, interval), r"the guidance interval must be \(low, high\) in sigma / alpha")
            for interval in [(1.0,), (2.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (float("nan"), 1.0)]
        ),
    ],
)
def test_guidance_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        check_guidance(*settings)


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

    def make(guide=None, schedule="sd", **settings):
        tiny_config.schedule = schedule
        tiny_config.sample.update(**settings)
        utils.check_sampling(tiny_config)
        device = torch.device("meta")
        autoencoder = open_autoencoder(tiny_config, torch.device("cpu")).to(device)
        nnet = Counting(build_network_on_meta(tiny_config))
        guide = guide and Model(tiny_config, guide, device)
        return nnet, Model(tiny_config, nnet, device, guide=guide, autoencoder=autoencoder).sampler(steps=12)

    return make


@pytest.mark.parametrize("algorithm", SOLVERS)
def test_sampling_never_waits_and_calls_the_network_once_per_step(on_meta, algorithm, monkeypatch):
    """Guided, to uint8 images: one call on 2 B images per evaluation; only noise and labels are copied."""
    schedule = "vpsde" if algorithm.startswith("euler_m") else "sd"
    nnet, sample = on_meta(algorithm=algorithm, scale=2.0, schedule=schedule)
    draw, draws = SampleNoise.draw, []
    monkeypatch.setattr(SampleNoise, "draw", lambda noise: draws.append(draw(noise)) or draws[-1])
    with NoWaiting() as mode:
        images, finite = sample(range(5), [0, 0, 1, 2, 3])
    assert finite.is_meta and finite.shape == (5,)
    assert images.is_meta and images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert nnet.calls == [10] * 12
    assert mode.copies == len(draws) + 1  # noise for each draw, and the labels
    assert (len(draws) > 1) == SOLVERS[algorithm].draws


def test_interval_and_guiding_network_do_not_wait_either(on_meta):
    schedule = sde.DiscreteSchedule()
    interval = (level(schedule, 0.3), level(schedule, 0.7))
    nnet, sample = on_meta(algorithm="ddim", scale=2.0, interval=interval)
    with NoWaiting():
        sample(range(5), [0] * 5)
    assert sorted(set(nnet.calls)) == [5, 10] and len(nnet.calls) == 12
    guide = Counting(nnet.nnet)
    nnet, sample = on_meta(guide, algorithm="ddim", scale=2.0, interval=interval)
    with NoWaiting() as mode:
        sample(range(5), [0] * 5)
    assert nnet.calls == [5] * 12 and 0 < len(guide.calls) < 12
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
            open_guide(tiny_config, torch.device("cpu"))
        tiny_config.sample.update(before)

    refuses("autoguidance_config is set without config.sample.autoguidance_path", autoguidance_config="x.py")
    refuses("No such file or directory: .*x.py", autoguidance_path="a", autoguidance_config="x.py")
    refuses(r"no checkpoint at nowhere", autoguidance_path="nowhere")
    monkeypatch.setitem(SOLVERS, "slow", Solver(None, least_steps=7))
    refuses("config.sample.sample_steps must be at least 7 for slow; found 6", algorithm="slow", sample_steps=6)
    refuses("config.sample.algorithm must be one of dpm_solver, .*, slow; found 'fast'", algorithm="fast")
    refuses(
        r"the guiding network's z_shape must be \[4, 8, 8\]; found \[4, 32, 32\]",
        autoguidance_path="a",
        autoguidance_config="configs/DiMR-XL-2R_imagenet256.py",
    )
    tiny_config.dataset.n_classes = 0
    refuses("without classes, config.sample.scale must be 1", scale=1.5)
    tiny_config.sample.update(autoguidance_path="a", scale=1.5)
    utils.check_sampling(tiny_config)
