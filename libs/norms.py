"""Normalisation layers, time-dependent (the paper's section 3.3) and plain. Every one is called as norm(x, t).

Their backward passes are written out: they keep the input alone, which the network keeps anyway, where automatic
differentiation would keep the normalised features beside it. torch.compile is given the plain formulas: it chooses by
itself what to keep, and PyTorch 2.11 compiles a written-out backward pass to wrong gradients. Under autocast the result
comes in the precision of the matrix products that it feeds, rounded once for all of them; all arithmetic here is
float32.

Axes: B batch, D channels (always last), ... tokens or grid cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

RMS_EPS = 1e-8  # added to the root mean square, not under the root
LAYER_NORM_EPS = 1e-5  # added to the variance


class TimeDependentVector(nn.Module):
    """A vector that moves between two learned ends with time: lerp(param1, param0, sigmoid(t (w + 1) + b)).

    t (B,) -> (B, D). Starts at `value` whatever the time. `time_weight` (w) and `time_bias` (b) take no weight decay.
    """

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), value))
        self.param1 = nn.Parameter(torch.full((dim,), value))
        self.time_weight = nn.Parameter(torch.zeros(dim))
        self.time_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, t: Tensor) -> Tensor:
        gate = torch.sigmoid(t[:, None] * (self.time_weight + 1) + self.time_bias)
        return torch.lerp(self.param1, self.param0, gate)


def per_sample(vector: Tensor, x: Tensor) -> Tensor:
    """(B, D) -> (B, 1, ..., 1, D), to be broadcast over the tokens or cells of x (B, ..., D)."""
    return vector.view(vector.shape[0], *[1] * (x.ndim - 2), vector.shape[1])


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision in which a matrix product would take x: autocast's, or its own."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # autocast does not know meta, and raises
    return torch.get_autocast_dtype(kind) if on else x.dtype


def at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scaled_rms(x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """x / (||x|| / sqrt(D) + eps) * gain, over the last axis, as `dtype`. x (B, ..., D), gain (B or 1, 1, ..., D)."""
    if not torch.compiler.is_compiling():
        return ScaledRMS.apply(x, gain, dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x))
    return (x / (norm * x.shape[-1] ** -0.5 + RMS_EPS) * gain).to(dtype)


def scaled_layer_norm(x: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gain + shift, over the last axis, as `dtype`. Shapes as in scaled_rms."""
    if not torch.compiler.is_compiling():
        return ScaledLayerNorm.apply(x, gain, shift, dtype)
    normalised = F.layer_norm(x.to(at_least_float32(x)), x.shape[-1:], eps=LAYER_NORM_EPS)
    return (normalised * gain + shift).to(dtype)


def scaled_layer_norm_of_parts(parts: list[Tensor], gain: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled_layer_norm` of parts (B, ..., D / n) side by side, without a copy of them side by side.

    For torch.compile: sums and sums of squares are taken where a part is made, and the backward pass needs no more than
    the parts. Variance is mean square less squared mean, which loses digits where a mean is far larger than the spread.
    """
    wide = [part.to(at_least_float32(part)) for part in parts]
    mean, square = (sum(x.pow(power).mean(dim=-1, keepdim=True) for x in wide) / len(wide) for power in (1, 2))
    inverse = torch.rsqrt((square - mean.square()).clamp_min(0) + LAYER_NORM_EPS)
    gains, shifts = gain.chunk(len(parts), dim=-1), shift.chunk(len(parts), dim=-1)

    def normalised(mean: Tensor, inverse: Tensor) -> list[Tensor]:
        return [((x - mean) * inverse * g + s).to(dtype) for x, g, s in zip(wide, gains, shifts, strict=True)]

    # Or float32 copies of the parts less their mean would be kept for the backward pass, which can compute them again.
    made = checkpoint(normalised, mean, inverse, use_reentrant=False, preserve_rng_state=False)
    return torch.cat(made, dim=-1)


class ScaledRMS(torch.autograd.Function):
    """`scaled_rms` with its backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x))
        ctx.save_for_backward(x, norm, gain)
        return (x / (norm * x.shape[-1] ** -0.5 + RMS_EPS)).mul_(gain).to(dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, gain = ctx.saved_tensors
        kept, x, grad = x.dtype, x.to(norm.dtype), grad.to(norm.dtype)
        root = x.shape[-1] ** -0.5
        inverse = 1 / (norm * root + RMS_EPS)  # of the denominator
        slope = (grad * x).mul_(inverse)  # of the gain, before it is summed
        grad_gain = slope.sum_to_size(gain.shape)
        # d inverse / dx = -inverse² root x / norm; at x = 0, where the norm has no slope, 0 is taken
        along = slope.mul_(gain).sum(-1, keepdim=True).mul_(inverse * root / norm.clamp_min(1e-30))
        return (grad * gain).mul_(inverse).addcmul_(x, along, value=-1).to(kept), grad_gain, None


class ScaledLayerNorm(torch.autograd.Function):
    """`scaled_layer_norm` with its backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        x32, shape = x.to(at_least_float32(x)), x.shape[-1:]
        if len(gain) == 1:  # one time for the batch: the kernel scales and shifts as it goes
            affine = gain.to(x32.dtype).view(shape), shift.to(x32.dtype).view(shape)
            result, mean, inverse = torch.native_layer_norm(x32, shape, *affine, LAYER_NORM_EPS)
        else:
            result, mean, inverse = torch.native_layer_norm(x32, shape, None, None, LAYER_NORM_EPS)
            result = result.mul_(gain).add_(shift)
        ctx.save_for_backward(x, mean, inverse, gain)
        return result.to(dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, gain = ctx.saved_tensors
        x32, grad = x.to(mean.dtype), grad.to(mean.dtype)
        grad_shift = grad.sum_to_size(gain.shape)
        grad_gain = ((x32 - mean).mul_(inverse).mul_(grad)).sum_to_size(gain.shape)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * gain, x32, x.shape[-1:], mean, inverse, None, None, [True, False, False]
        )
        return grad_x.to(x.dtype), grad_gain, grad_shift, None


class TDLayerNorm(nn.Module):
    """Layer norm whose gain and shift depend on time. x (B, ..., D), t (B,) -> (B, ..., D).

    Args:
        exact: keep float32 under autocast, for a result that is added and not multiplied.
    """

    def __init__(self, dim: int, exact: bool = False):
        super().__init__()
        self.weight = TimeDependentVector(dim, 1.0)
        self.bias = TimeDependentVector(dim, 0.0)
        self.exact = exact

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        dtype = at_least_float32(x) if self.exact else product_dtype(x)
        return scaled_layer_norm(x, per_sample(self.weight(t), x), per_sample(self.bias(t), x), dtype)

    def joined(self, parts: list[Tensor], t: Tensor) -> Tensor:
        """The norm of parts side by side: n parts (B, ..., D / n), t (B,) -> (B, ..., D)."""
        x = parts[0]
        if not torch.compiler.is_compiling():
            return self(torch.cat(parts, dim=-1), t)
        gain, shift = per_sample(self.weight(t), x), per_sample(self.bias(t), x)
        return scaled_layer_norm_of_parts(parts, gain, shift, product_dtype(x))


class TDRMSNorm(nn.Module):
    """RMS norm whose gain depends on time; the norm of the released models. x (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = TimeDependentVector(dim, 1.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return scaled_rms(x, per_sample(self.scale(t), x), product_dtype(x))


class RMSNorm(nn.Module):
    """RMS norm with one learned gain, the same at all times (ablation). x (B, ..., D) -> (B, ..., D); t is not used."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return scaled_rms(x, per_sample(self.scale[None], x), product_dtype(x))


NORMS = {"TDRMSN": TDRMSNorm, "LN": TDLayerNorm, "RMSN": RMSNorm}
