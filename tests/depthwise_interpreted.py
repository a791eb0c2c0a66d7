"""The Triton kernels in Triton's interpreter, on a CPU, against F.conv2d. Run by test_depthwise.py in a process of its
own, as the interpreter is chosen when the kernels are imported (TRITON_INTERPRET=1)."""

import pytest
import torch
from test_network import inputs, small_model

from benchmarks import kernels as benchmark
from libs import depthwise
from libs.compilation import TRITON_FORMS, checkpoint_activations, use_forms

# One unit in the last place of a result; the interpreter truncates to bfloat16, where a GPU rounds.
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def results(kernel, x, grad, weight, bias, residual):
    """The convolution and its gradients, by the name of what they are of."""
    leaves = {"x": x, "weight": weight, "bias": bias}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items() if value is not None}
    if kernel == "triton":
        y = depthwise.triton_depthwise_conv(leaves["x"], leaves["weight"], leaves.get("bias"), residual)
    else:
        y = depthwise.as_image_convolution(leaves["x"], leaves["weight"]) + leaves.get("bias", 0)
        y = leaves["x"] + y if residual else y
    y.backward(grad)
    return {"result": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("shape", "k", "dtype", "residual"),
    [
        ((1, 3, 35, 33), 3, torch.float32, True),  # more than one strip of columns and block of channels
        ((2, 3, 9, 20), 3, torch.bfloat16, True),
        ((2, 4, 9, 7), 3, torch.float16, False),
        ((5, 2, 4, 8), 5, torch.float32, True),
        ((1, 9, 10, 3), 7, torch.bfloat16, False),
        ((1, 2, 3, 4), 7, torch.float32, False),  # a grid smaller than the kernel
        ((1, 1, 1, 40), 7, torch.float16, True),
        ((2, 3, 3, 5), 1, torch.float32, True),
    ],
)
def test_results_and_gradients(shape, k, dtype, residual):
    """Against float32 arithmetic on the same 16-bit numbers."""
    x, grad, weight, bias = benchmark.make_inputs(shape, "cpu", dtype, 0, k)
    found = results("triton", x, grad, weight, bias, residual)
    expected = results("torch", x.float(), grad.float(), weight, bias, residual)
    for name, value in expected.items():
        of = dtype if name in ("result", "x") else torch.float32
        assert found[name].dtype == of and found[name].shape == value.shape
        difference = (found[name].float() - value).abs()
        print(f"{shape} k={k} {dtype} {name}: {(difference.max() / value.abs().max()).item():.1e}")
        assert (difference <= ULP[of] * (value.abs() + value.abs().mean())).all(), name


def test_no_bias_and_other_layouts():
    x, grad, weight, _ = benchmark.make_inputs((2, 4, 5, 6), "cpu", torch.float32, 0, 3)
    x, grad = (a.transpose(1, 2).contiguous().transpose(1, 2) for a in (x, grad))
    expected, found = (results(kernel, x, grad, weight, None, True) for kernel in ("torch", "triton"))
    torch.testing.assert_close(found, expected)


def test_registration():
    """Shapes, strides and gradients as autograd and a compiler are told they are."""
    x, grad, weight, bias = benchmark.make_inputs((1, 2, 3, 4), "cpu", torch.float32, 0, 3)
    taps = weight.flatten(1).t().contiguous().requires_grad_()
    for transposed in (False, True):
        arguments = (x.requires_grad_(), taps, bias.requires_grad_(), True, transposed)
        torch.library.opcheck(depthwise.convolve, arguments)
        double = tuple(a.detach().requires_grad_() for a in arguments[:3])
        numeric(lambda *a, t=transposed: depthwise.convolve(*a, True, t), double)
    torch.library.opcheck(depthwise.weight_gradient, (x.detach(), grad, 3))


def numeric(function, arguments):
    """A convolution is linear in each argument: its gradients by differences of size one."""
    out = function(*arguments)
    along = torch.randn_like(out)
    gradients = torch.autograd.grad(out, arguments, along)
    for i, gradient in enumerate(gradients):
        step = torch.randn_like(arguments[i])
        moved = [a + step if i == j else a for j, a in enumerate(arguments)]
        change = ((function(*moved) - out) * along).sum()
        torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-4, atol=1e-4)


def test_a_network_computes_the_same():
    """In training with selective checkpointing, which keeps the convolutions' results."""
    arguments, found = inputs(batch=1), []
    for forms in ({}, TRITON_FORMS):
        model = small_model().train()
        use_forms(model, forms)
        checkpoint_activations(model, "selective")
        outputs = model(*arguments)
        sum(output.square().mean() for output in outputs).backward()
        found.append([*(o.detach() for o in outputs), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_block_compiles_as_one_graph():
    block, x = small_model().stages[1].blocks[0], torch.randn(1, 2, 3, 8, requires_grad=True)
    use_forms(block, TRITON_FORMS)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, torch.zeros(1))
        results.append([y, *torch.autograd.grad(y.sum(), [x, *block.parameters()])])
    torch.testing.assert_close(*results)


def test_the_benchmark_times_one_thing():
    arguments = benchmark.make_inputs((2, 4, 5, 6), "cpu", torch.float32, 0, 3)
    ways = [(way, benchmark.passes(way, *arguments)) for way in benchmark.WAYS]
    for name in ("forward", "input gradient", "weight gradient"):
        first, *others = (benchmark.alike(way, name, functions[name]()) for way, functions in ways)
        for other in others:
            torch.testing.assert_close(other, first)
