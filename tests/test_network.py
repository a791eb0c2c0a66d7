"""The network's parts against independent formulas, its errors, and what a compiler and a GPU need of it."""

import dataclasses

import pytest
import torch
from test_guidance import NoWaiting
from torch import nn

from libs.compilation import round_weights
from libs.dimr import DiMR, StageSpec
from libs.norms import NORMS, TDLayerNorm, TDRMSNorm, TimeDependentVector

COARSE = StageSpec("TransformerBlock", 16, 3, 32, patch_size=2, max_height=4, max_width=4, num_heads=2)
FINE = StageSpec("ConvNeXtBlock", 8, 3, 16, patch_size=1, max_height=8, max_width=8, kernel_size=3)


def small_model(**kwargs) -> DiMR:
    torch.manual_seed(0)
    return DiMR([COARSE, FINE], channels=4, n_classes=5, **kwargs)


def inputs(batch: int = 3):
    torch.manual_seed(1)
    return torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.arange(batch)


def test_time_dependent_vector_moves_between_its_ends():
    vector = TimeDependentVector(4, 1.0)
    with torch.no_grad():
        vector.param0.fill_(5.0)
        vector.param1.fill_(-3.0)
    t = torch.tensor([-2.0, 0.0, 7.0])
    share = 1 / (1 + torch.exp(-t))
    torch.testing.assert_close(vector(t)[:, 0], -3 + 8 * share)


def test_norms_start_as_plain_norms():
    x, t = torch.randn(2, 5, 16), torch.rand(2)
    torch.testing.assert_close(TDLayerNorm(16)(x, t), nn.LayerNorm(16)(x))
    for name in ("TDRMSN", "RMSN"):
        torch.testing.assert_close(NORMS[name](16)(x, t), nn.RMSNorm(16, eps=0.0)(x))


def test_rms_eps_is_added_to_the_rms():
    x = torch.full((1, 1, 4), 1e-8)
    torch.testing.assert_close(TDRMSNorm(4)(x, torch.zeros(1)), torch.full((1, 1, 4), 0.5))


def test_a_norm_of_nothing_is_nothing():
    x = torch.zeros(2, 3, 8, requires_grad=True)
    for norm in (TDRMSNorm(8), TDLayerNorm(8)):
        (result,) = torch.autograd.grad(norm(x, torch.zeros(2)).sum(), x)
        assert torch.isfinite(result).all()
    assert (TDRMSNorm(8)(x, torch.zeros(2)) == 0).all()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_weights_rounded_once_give_the_same_numbers(precision, dtype):
    model = small_model().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        expected = model(*inputs())
        round_weights(model, precision)
        found = model(*inputs())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (dtype if isinstance(module, nn.Linear) else torch.float32)


def test_classes_need_a_branch_that_sees_them():
    stage = StageSpec("ConvNeXtBlock", 8, 1, 16, 1, 8, 8)
    with pytest.raises(ValueError, match="5 classes need a TransformerBlock stage; found none"):
        DiMR([stage], n_classes=5)
    DiMR([stage], n_classes=0)


@pytest.mark.parametrize("norm_type", NORMS)
def test_output_shapes_and_gradients(norm_type):
    model = small_model(norm_type=norm_type)
    outputs = model(*inputs())
    assert [tuple(o.shape) for o in outputs] == [(3, 4, 4, 4), (3, 4, 8, 8)]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_time_for_the_batch_is_the_same_as_one_each():
    model, (x, _, y) = small_model(), inputs()
    for one, each in zip(model(x, torch.tensor([0.3]), y), model(x, torch.full((3,), 0.3), y), strict=True):
        torch.testing.assert_close(one, each)


def test_gradients_stop_at_the_coarse_branch_when_asked():
    for stop in (False, True):
        model = small_model(block_grad_to_lowres=stop)
        model(*inputs())[-1].sum().backward()
        assert (model.stages[0].blocks[0].mlp.w0.weight.grad is None) == stop


def test_any_number_of_resolutions():
    stages = [
        dataclasses.replace(COARSE if r == 0 else FINE, patch_size=2 ** (3 - r), max_height=2**r, max_width=2**r)
        for r in range(4)
    ]
    outputs = DiMR(stages, channels=4, n_classes=5)(*inputs())
    assert [o.shape[-1] for o in outputs] == [1, 2, 4, 8]


def test_initialisation():
    model = small_model()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = torch.cat([m.weight.flatten() for m in linears])
    assert weights.std().item() == pytest.approx(0.02, rel=0.03)
    assert all((m.bias == 0).all() for m in linears if m.bias is not None)
    assert model.stages[0].head.conv.bias.abs().max() > 0  # convolutions keep PyTorch's default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, "depth of a stage must be odd"),
        ({"num_heads": 3}, "num_heads must divide dim"),
        ({"block_type": "Mamba"}, "block_type must be one of TransformerBlock, ConvNeXtBlock; found 'Mamba'"),
        ({"head_kernel_size": 2}, "kernel sizes must be odd"),
    ],
)
def test_bad_stage(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(COARSE, **change)


def test_bad_model_and_input():
    with pytest.raises(ValueError, match="norm_type must be one of TDRMSN, LN, RMSN; found 'BN'"):
        small_model(norm_type="BN")
    with pytest.raises(ValueError, match="patch sizes must each be a multiple of the next and end in 1"):
        DiMR([COARSE])
    model, t, y = small_model(), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="divisible by the coarsest patch 2; found"):
        model(torch.zeros(1, 4, 7, 8), t, y)
    with pytest.raises(ValueError, match="a grid of 4x5 exceeds the position table 4x4: set z_shape"):
        model(torch.zeros(1, 4, 8, 10), t, y)


def test_no_host_synchronisation():
    with torch.device("meta"), NoWaiting():
        sum(o.square().mean() for o in small_model()(*inputs())).backward()
