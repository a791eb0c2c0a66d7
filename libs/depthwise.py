"""Depthwise convolution of channels-last features with a backward pass of our own, and by Triton kernels for GPUs.

Both are forms of `libs.dimr.DepthwiseConv`, swapped in by libs/compilation.py. The kernels are in
libs/depthwise_kernels.py.

Axes: B batch, h w grid, D channels (adjacent in memory), k taps along a side of the kernel (odd).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from libs.norms import at_least_float32

try:
    from libs import depthwise_kernels as kernels
except ImportError:  # no triton, which does not exist for every platform
    kernels = None

CHANNELS = 32  # of a program: a warp
COLUMNS = 8  # of a thread
MOST_GROUPS = 4  # of columns in a program, one warp each


# --- PyTorch's convolution as one operation, whose backward pass is chosen here ---------------------------------------


def as_image_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a grid with zeros around it: (B, h, w, D), weight (D, 1, k, k) -> (B, h, w, D).

    Seen as an image, channels-last features are in the layout that F.conv2d wants already.
    """
    dim, _, k, _ = weight.shape
    y = F.conv2d(rearrange(x, "B h w D -> B D h w"), weight, padding=k // 2, groups=dim)
    return rearrange(y, "B D h w -> B h w D")


@torch.library.custom_op("dimr::depthwise", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """`as_image_convolution`, which torch.compile does not look into: it would copy features to other layouts."""
    return as_image_convolution(x.contiguous(), weight).contiguous()


@torch.library.custom_op("dimr::depthwise_gradients", mutates_args=())
def depthwise_gradients(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    """Compute the gradients of x and the weights; an empty tensor for one that is not asked for."""
    grad, x, nothing = grad.contiguous(), x.contiguous(), x.new_empty(0)
    if x.device.type == "cpu":
        return [
            as_image_convolution(grad, weight.flip(2, 3)).contiguous() if of_x else nothing,
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
    """Compute the weight gradient as a convolution of x by grad, a kernel as large as the grid for each channel.

    On a CPU oneDNN's own takes several times as long, most of all in bfloat16.
    """
    dim, _, k, _ = weight.shape
    images = rearrange(at_least_float32(x), "B h w D -> 1 (B D) h w")
    kernels = rearrange(at_least_float32(grad), "B h w D -> (B D) 1 h w")
    taps = F.conv2d(images, kernels, padding=k // 2, groups=len(kernels))
    return rearrange(taps, "1 (B D) ky kx -> B D 1 ky kx", D=dim).sum(0).to(weight.dtype)


@depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@depthwise_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    return [x.new_empty(x.shape if of_x else 0), x.new_empty(weight.shape if of_weight else 0)]


def keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def depthwise_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = depthwise_gradients(grad, *ctx.saved_tensors, *needed)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


depthwise_conv.register_autograd(depthwise_backward, setup_context=keep_inputs)


# --- The Triton kernels -----------------------------------------------------------------------------------------------


def triton_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool = False) -> Tensor:
    """Convolve (B, h, w, D) by weight (D, 1, k, k) and bias (D,), and add x if `residual`. CUDA; sums are float32.

    The result has the precision of x: float32, bfloat16 or float16.
    """
    # Neighboring channels side by side, for the kernels' loads: a copy of k k D numbers.
    return convolve(x, weight.flatten(1).t().contiguous(), bias, residual, False)


@torch.library.custom_op("dimr::triton_depthwise", mutates_args=())
def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, residual: bool, transposed: bool) -> Tensor:
    """Convolve with taps (k k, D), in their opposite order if `transposed`."""
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


@torch.library.custom_op("dimr::triton_weight_gradient", mutates_args=())
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


@register_flop_formula(torch.ops.dimr.triton_depthwise)
def _(x_shape: torch.Size, taps_shape: torch.Size, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * taps_shape[0]


@register_flop_formula(torch.ops.dimr.triton_weight_gradient)
def _(x_shape: torch.Size, grad_shape: torch.Size, k: int, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * k * k
