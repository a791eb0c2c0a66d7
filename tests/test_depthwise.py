"""The depthwise convolution's own backward pass, and the Triton kernels as far as a CPU can show."""

import pytest
import torch
from conftest import load_config, run

from libs import cost, depthwise
from libs.compilation import TRITON_FORMS, use_forms
from libs.model import build_network_on_meta


@pytest.mark.parametrize("size", [(2, 5, 9, 6, 7), (3, 4, 4, 5, 1), (1, 2, 3, 4, 5)])
def test_as_one_operation_it_has_pytorchs_gradients(size):
    torch.manual_seed(0)
    *shape, k = size
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], 1, k, k, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, weight)]
    expected, found = depthwise.as_image_convolution(*leaves), depthwise.depthwise_conv(*leaves)
    assert torch.equal(found, expected)
    along = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, leaves, along)
    for ours, pytorchs in zip(gradients, torch.autograd.grad(expected, leaves, along), strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-12, atol=1e-12)
    for i, leaf in enumerate(leaves):  # with the other frozen
        alone = depthwise.depthwise_conv(*(other if other is leaf else other.detach() for other in leaves))
        gradient = torch.autograd.grad(alone, leaf, along)[0]
        assert torch.equal(gradient, gradients[i]) and gradient.stride() == leaf.stride()


def test_in_bfloat16_the_gradient_of_the_weights_is_summed_in_float32():
    torch.manual_seed(0)
    x, weight, along = torch.randn(8, 16, 16, 6), torch.randn(6, 1, 7, 7), torch.randn(8, 16, 16, 6)
    found, exact = (
        depthwise.depthwise_gradients(*(a.bfloat16().to(dtype) for a in (along, x, weight)), True, True)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_as_one_operation_it_is_registered_well():
    x, weight = torch.randn(2, 3, 4, 6), torch.randn(6, 1, 3, 3)
    torch.library.opcheck(depthwise.depthwise_conv, (x.requires_grad_(), weight.requires_grad_()))
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(depthwise.depthwise_gradients, (x.detach(), x.detach(), weight.detach(), *needed))


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = run("-m", "pytest", "-q", "tests/depthwise_interpreted.py", env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(kind):
    """The interpreter accepts more than the compiler. For compute capability 9.0; k = 3, as 7 takes ten seconds."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    sizes = {"WIDTH": 9, "DIM": 33, "K": 3, "GROUPS": 2, "COLUMNS": depthwise.COLUMNS, "CHANNELS": depthwise.CHANNELS}
    forward = {"HAS_BIAS": True, "RESIDUAL": True, "TRANSPOSED": False}
    backward = {"HAS_BIAS": False, "RESIDUAL": True, "TRANSPOSED": True}
    types = dict.fromkeys(("x", "out", "grad"), f"*{kind}") | dict.fromkeys(("taps", "bias", "sums"), "*fp32")
    for kernel, flags in (
        (depthwise.kernels.convolve, forward),
        (depthwise.kernels.convolve, backward),
        (depthwise.kernels.weight_gradient, {}),
    ):
        constants = sizes | flags
        signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})
        assert "fma.rn.f32" in made.asm["ptx"]
        assert "atom." not in made.asm["ptx"] and "red.global" not in made.asm["ptx"]


def test_without_triton():
    code = "import sys; sys.modules['triton'] = None; from libs import depthwise; assert depthwise.kernels is None"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_operations_count_as_before():
    config = load_config("DiMR-XL-2R_imagenet256")
    nnet = build_network_on_meta(config)
    use_forms(nnet, TRITON_FORMS)
    branches = cost.branch_costs(nnet, tuple(config.z_shape))
    assert sum(branch.multiply_adds for branch in branches) / 1e9 == pytest.approx(160.18, abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_benchmark_needs_a_gpu():
    done = run("benchmarks/kernels.py")
    assert done.returncode == 1 and done.stderr == "error: times kernels on a GPU; found no CUDA device, or no triton\n"
