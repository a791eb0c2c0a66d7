"""The cost model against closed forms and the published counts."""

import re

import pytest
import torch
from conftest import load_config
from forked import run_forked
from torch import nn

from libs import cost
from libs.model import build_network, build_network_on_meta
from scripts import describe_model


@pytest.mark.parametrize(("precision", "width"), [("no", 4), ("bf16", 2)])
def test_kept_bytes_of_a_perceptron(precision, width):
    with cost.fake_model():
        module = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 4, bias=False))
        fixed, per_image = cost.kept_bytes(module, lambda batch: (torch.zeros(batch, 8),), precision)
    # the input of each product and of the activation, and the 16-bit copy of the weights that a gradient goes through
    assert per_image == (8 + 32 + 32) * width
    assert fixed == (0 if precision == "no" else 32 * 4 * 2)


def test_branches_add_up_to_the_published_model():
    config = load_config("DiMR-XL-2R_imagenet256")
    branches = cost.branch_costs(build_network_on_meta(config), tuple(config.z_shape))
    assert sum(branch.parameters for branch in branches) == 505_046_408
    assert sum(branch.multiply_adds for branch in branches) / 1e9 == pytest.approx(160.18, abs=0.01)


def test_memory_of_recomputation_by_hand():
    """Recomputing everything keeps little more than the input of each block."""
    config = load_config("digits")
    with cost.fake_model():
        nnet = build_network(config).train()
        none = cost.training_memory(nnet, tuple(config.z_shape), "no", averages=1)
        nnet.recompute(1)
        every = cost.training_memory(nnet, tuple(config.z_shape), "no", averages=1)
        nnet.recompute(1, keep_products=True)
        products = cost.training_memory(nnet, tuple(config.z_shape), "no", averages=1)
    n_weights = sum(p.numel() for p in nnet.parameters())
    assert none.state == every.state == 20 * n_weights  # weights, gradients, two moments, one average
    streams = 4 * ((5 + 1) * 17 * 128 + (3 + 1) * 64 * 32)  # float32 inputs of blocks and heads
    assert streams <= every.per_image < 1.5 * streams
    assert every.per_image < products.per_image < none.per_image
    assert none.block == 0 and every.largest_batch(1e9) > none.largest_batch(1e9) > 0
    assert none.total(none.largest_batch(1e9)) <= 1e9 < none.total(none.largest_batch(1e9) + 1)
    assert none.largest_batch(0) == 0


def test_activations_of_the_published_model_on_a_gpu():
    """Attention keeps 16-bit inputs there, which on a CPU it computes with in float32."""
    config = load_config("DiMR-XL-2R_imagenet256")
    with cost.fake_model():
        memory = cost.training_memory(build_network(config).train(), tuple(config.z_shape), "bf16", averages=1)
    assert memory.per_image == pytest.approx(589.1e6, rel=1e-3)


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
