"""The cost model against closed forms and the published counts."""

import re

import pytest
import torch
from conftest import load_config
from forked import run_forked
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from libs import cost
from libs.model import build_network, build_network_on_meta
from scripts import describe_model


@pytest.mark.parametrize(("precision", "width"), [("no", 4), ("bf16", 2)])
def test_kept_bytes_of_a_perceptron(precision, width):
    with FakeTensorMode():
        module = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 4, bias=False))
        kept = [cost.kept_bytes(module, (torch.zeros(batch, 8),), precision) for batch in (2, 4)]
    # the input of each matmul and of the activation, and the 16-bit copy of the weights that a gradient goes through
    assert kept[1] - kept[0] == 2 * (8 + 32 + 32) * width
    assert 2 * kept[0] - kept[1] == (0 if precision == "no" else 32 * 4 * 2)


def test_branches_add_up_to_the_published_model():
    config = load_config("DiMR-XL-2R_imagenet256")
    branches = cost.branch_costs(build_network_on_meta(config), tuple(config.z_shape))
    assert sum(branch.parameters for branch in branches) == 505_046_408
    assert sum(branch.multiply_adds for branch in branches) / 1e9 == pytest.approx(160.18, abs=0.01)


@pytest.mark.slow
def test_memory_of_activation_checkpointing(tiny_config):
    """Recomputing everything keeps little more than the input of each block."""
    off, selective, every = (
        cost.training_memory(lambda: build_network(tiny_config), tuple(tiny_config.z_shape), "no", recompute)
        for recompute in ("off", "selective", "all")
    )
    assert every.per_image < selective.per_image < off.per_image
    n_weights = sum(p.numel() for p in build_network(tiny_config).parameters())
    assert every.state == 20 * n_weights  # weights, gradients, two moments, EMA weights
    assert every.largest_batch(1e9) > off.largest_batch(1e9) > 0 == off.largest_batch(0)


@pytest.mark.slow
def test_memory_of_the_shallow_network_that_a_gpu_ran():
    """An H100 took 4.83 GB at its peak with 16 images in fp16 (benchmarks/results/gpu.md)."""
    config = load_config("DiMR-XL-2R_imagenet256")
    config.nnet.stages[0].depth, config.nnet.stages[1].depth = 9, 5
    memory = cost.training_memory(lambda: build_network(config), tuple(config.z_shape), "fp16")
    assert (memory.state + 16 * memory.per_image) / 1e9 == pytest.approx(4.83, rel=0.03)


@pytest.mark.slow
def test_describe_model_prints_a_report():
    done = run_forked("scripts/describe_model.py", "--config=configs/digits.py", "--gpus=2")
    assert done.returncode == 0, done.stderr
    n_weights = sum(p.numel() for p in build_network_on_meta(load_config("digits")).parameters())
    assert f"{n_weights:,}" in done.stdout and "largest batch per GPU" in done.stdout and "on 2 GPUs" in done.stdout
    assert "Warning" not in done.stderr and not re.search(r"\d,\d{3}\.\d", done.stdout), done.stderr
    found = [describe_model.rounded(n) for n in (3549216.6, 123.4, 12.04, 0.01234, 1e-5)]
    assert found == ["3,550,000", "123", "12", "0.0123", "< 0.01"]
    for flag, message in (
        ("--gpus=0", "--gpus"),
        ("--config.ema.rate=2.0", "config.ema.rate must be at least 0 and below 1; found 2.0"),
        ("--config.sample.sample_steps=0", "config.sample.sample_steps must be at least"),
    ):
        bad = run_forked("scripts/describe_model.py", "--config=configs/digits.py", flag)
        assert bad.returncode == 1 and "error: " in bad.stderr and message in bad.stderr, bad.stderr
        assert "Traceback" not in bad.stderr
