"""Depthwise convolution of channels-last features, by PyTorch or by Triton kernels for NVIDIA GPUs.

Axes: B batch, h w grid, D channels (adjacent in memory), k taps along a side of the kernel (odd), p = k // 2 zeros
around the grid.

The kernels themselves, and how they were reasoned, are in libs/depthwise_kernels.py.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from libs.norms import at_least_float32, product_dtype

try:
    from libs import depthwise_kernels as kernels
except ImportError:  # no triton, which does not exist for every platform; PyTorch's convolution does without
    kernels = None

KERNELS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of features in the Triton kernels; sums are float32
CHANNELS = 32  # of a program: a warp
COLUMNS = 8  # of a thread
MOST_GROUPS = 4  # of columns in a program, one warp each


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool = False, kernel: str = "torch"
) -> Tensor:
    """Depthwise convolution of a grid with zeros around it: (B, h, w, D) -> (B, h, w, D).

    Args:
        weight: (D, 1, k, k), k odd, as nn.Conv2d keeps it.
        bias: (D,) or None.
        residual: add x to the result.
        kernel: "torch": F.conv2d, anywhere, in autocast's precision. "triton": the kernels of
            libs/depthwise_kernels.py, for float32, bfloat16 and float16; products and sums are float32 and
            the result has the precision of x.

    Raises:
        ValueError: an even k, another `kernel`, or features that the Triton kernels do not take.
    """
    k = weight.shape[-1]
    if kernel not in KERNELS or k % 2 == 0:
        raise ValueError(f"expected an odd kernel and one of {', '.join(KERNELS)}; found {k} and {kernel!r}")
    if kernel == "torch":
        if as_one_operation(x):
            dtype = product_dtype(x)
            y = image_convolution(x.to(dtype), weight.to(dtype))
            y = y if bias is None else y + bias.to(dtype)  # where the compiler adds it to what it adds anyway
        else:
            y = as_image_convolution(x, weight, bias)
        return x + y if residual else y
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton convolution takes float32, bfloat16 and float16; found {x.dtype}")
    # Neighbouring channels side by side, for the kernels' loads: a copy of k k D numbers.
    return convolve(x, rearrange(weight, "D 1 ky kx -> (ky kx) D").contiguous(), bias, residual, False)


def check_triton(setting: str, device: torch.device) -> None:
    """Raises ValueError, naming the setting that asks for them, where the Triton kernels cannot run."""
    if device.type != "cuda" or kernels is None:
        found = f"device {device.type}" if device.type != "cuda" else "no package of that name"
        raise ValueError(f"{setting} is triton, which needs a CUDA device and triton; found {found}: set it to torch")


def as_image_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d: seen as an image, channels-last features are in the layout that it wants already, so that none is
    copied. (B, h, w, D) -> (B, h, w, D)."""
    dim, _, k, _ = weight.shape
    y = F.conv2d(rearrange(x, "B h w D -> B D h w"), weight, bias, padding=k // 2, groups=dim)
    return rearrange(y, "B D h w -> B h w D")


# --- PyTorch's convolution as one operation ---------------------------------------------------------------------------
# So that its backward pass can be chosen. torch.compile does not look into it either: where it did, the compiler of
# PyTorch 2.14 copied what the backward pass of a depthwise convolution reads to a layout that is neither channels-last
# nor contiguous, for PyTorch to copy it back, and fused less of what is around the convolution (counted by
# benchmarks/passes.py).


def as_one_operation(x: Tensor) -> bool:
    """On CPUs, where there are gradients: without, the compiler gains more by seeing the convolution, whose weights it
    can lay out once. Elsewhere, when compiling."""
    return torch.is_grad_enabled() if x.device.type == "cpu" else torch.compiler.is_compiling()


@torch.library.custom_op("dimr::image_convolution", mutates_args=())
def image_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """`as_image_convolution` without a bias."""
    return as_image_convolution(x.contiguous(), weight, None).contiguous()


@torch.library.custom_op("dimr::image_convolution_gradients", mutates_args=())
def image_convolution_gradients(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    """Gradients of x and the weights; an empty tensor for one that is not asked for."""
    grad, x, nothing = grad.contiguous(), x.contiguous(), x.new_empty(0)
    if x.device.type == "cpu":
        return [
            as_image_convolution(grad, weight.flip(2, 3), None).contiguous() if of_x else nothing,
            by_large_kernels(grad, x, weight) if of_weight else nothing,
        ]
    dim, _, k, _ = weight.shape
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(rearrange(a, "B h w D -> B D h w") for a in (grad, x)),
        *(weight, None, [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], dim, [of_x, of_weight, False]),
    )
    return [
        rearrange(grad_x, "B D h w -> B h w D").contiguous() if of_x else nothing,
        grad_weight.flatten().view(weight.shape) if of_weight else nothing,  # with the strides of the weights
    ]


def by_large_kernels(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weights as a convolution of x by grad, a kernel as large as the grid for each channel of each
    sample. oneDNN's own takes several times as long, most of all in bfloat16."""
    dtype, (dim, _, k, _) = at_least_float32(x), weight.shape
    images = rearrange(x.to(dtype), "B h w D -> 1 (B D) h w")
    kernels = rearrange(grad.to(dtype), "B h w D -> (B D) 1 h w")
    taps = F.conv2d(images, kernels, padding=k // 2, groups=len(kernels))
    return rearrange(taps, "1 (B D) ky kx -> B D 1 ky kx", D=dim).sum(0).to(weight.dtype)


@image_convolution.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@image_convolution_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    return [x.new_empty(x.shape if of_x else 0), x.new_empty(weight.shape if of_weight else 0)]


def keep_image(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def image_gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = image_convolution_gradients(grad, *ctx.saved_tensors, *needed)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


image_convolution.register_autograd(image_gradient, setup_context=keep_image)


# --- The Triton kernels as operations, as autograd, torch.compile and the counting of operations see them -------------


@torch.library.custom_op("dimr::depthwise", mutates_args=())
def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, residual: bool, transposed: bool) -> Tensor:
    """The convolution with taps (k k, D), in their opposite order if `transposed`; other arguments as above."""
    x, taps = x.contiguous(), taps.contiguous()
    out = torch.empty_like(x)
    batch, height, width, dim = x.shape
    grid, groups = strips(batch, width, dim)
    with torch.cuda.device_of(x):  # where Triton launches
        kernels.convolve[grid](
            *(x, taps, taps if bias is None else bias, out, height, width, dim),
            **{"K": math.isqrt(len(taps)), "GROUPS": groups, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS},
            **{"HAS_BIAS": bias is not None, "RESIDUAL": residual, "TRANSPOSED": transposed, "num_warps": groups},
        )
    return out


@torch.library.custom_op("dimr::depthwise_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Gradients of the taps and, in the last row, of the bias: (k k + 1, D), float32."""
    x, grad = x.contiguous(), grad.contiguous()
    batch, height, width, dim = x.shape
    grid, groups = strips(batch, width, dim)
    sums = x.new_empty(batch * grid[0], k * k + 1, dim, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.weight_gradient[grid](
            *(x, grad, sums, height, width, dim),
            **{"K": k, "GROUPS": groups, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "num_warps": groups},
        )
    return sums.sum(0)


def strips(batch: int, width: int, dim: int) -> tuple[tuple[int, int, int], int]:
    """The programs of a launch (strips of columns, blocks of channels, images), and the groups in a strip."""
    groups = min(MOST_GROUPS, 1 << (math.ceil(width / COLUMNS) - 1).bit_length())
    return (math.ceil(width / (groups * COLUMNS)), math.ceil(dim / CHANNELS), batch), groups


@convolve.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor | None, residual: bool, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


@weight_gradient.register_fake
def _(x: Tensor, grad: Tensor, k: int) -> Tensor:
    return x.new_empty(k * k + 1, x.shape[-1], dtype=torch.float32)


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, taps, _, ctx.residual, ctx.transposed = inputs
    ctx.save_for_backward(x, taps)


def gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, taps = ctx.saved_tensors
    for_x, for_taps, for_bias = ctx.needs_input_grad[:3]
    grad_x = convolve(grad, taps, None, ctx.residual, not ctx.transposed) if for_x else None
    grad_taps = grad_bias = None
    if for_taps or for_bias:
        sums = weight_gradient(x, grad, math.isqrt(len(taps)))
        grad_taps = (sums[:-1].flip(0) if ctx.transposed else sums[:-1]).to(taps.dtype)
        grad_bias = sums[-1].to(taps.dtype) if for_bias else None
    return grad_x, grad_taps, grad_bias, None, None


convolve.register_autograd(gradient, setup_context=keep_for_gradient)


@register_flop_formula(torch.ops.dimr.depthwise)
def _(x_shape: torch.Size, taps_shape: torch.Size, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * taps_shape[0]


@register_flop_formula(torch.ops.dimr.depthwise_weight_gradient)
def _(x_shape: torch.Size, grad_shape: torch.Size, k: int, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * k * k
