"""Normalization layers, time-dependent (the paper's section 3.3) and plain. Each is called as norm(x, t).

Arithmetic is float32 whatever comes in; the result has the precision of x.

Axes: B batch, D channels (always last), ... tokens or grid cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-8  # added to the root mean square, not under the root
LAYER_NORM_EPS = 1e-5  # added to the variance


class TimeDependentVector(nn.Module):
    """Interpolate between two learned vectors: lerp(param1, param0, sigmoid(t (w + 1) + b)). t (B,) -> (B, D).

    Starts at `value` at all times. `time_weight` (w) and `time_bias` (b) take no weight decay.
    """

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), value))
        self.param1 = nn.Parameter(torch.full((dim,), value))
        self.time_weight = nn.Parameter(torch.zeros(dim))
        self.time_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, t: Tensor) -> Tensor:
        gate = torch.sigmoid(t[:, None] * (at_least_float32(self.time_weight) + 1) + at_least_float32(self.time_bias))
        return torch.lerp(at_least_float32(self.param1), at_least_float32(self.param0), gate)


def per_sample(vector: Tensor, x: Tensor) -> Tensor:
    """Reshape (B, D) to (B, 1, ..., 1, D), to broadcast over the tokens or cells of x (B, ..., D)."""
    return vector.view(vector.shape[0], *[1] * (x.ndim - 2), vector.shape[1])


def at_least_float32(x: Tensor) -> Tensor:
    """Convert 16-bit floats to float32, and leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Compute x / (||x|| / sqrt(D) + eps) * gain over the last axis. x (B, ..., D), gain (B or 1, 1, ..., D)."""
    z = at_least_float32(x)
    rms = torch.linalg.vector_norm(z, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return (z / (rms + RMS_EPS) * gain).to(x.dtype)


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Compute (x - mean) / sqrt(variance + eps) * gain + shift over the last axis; shapes as in `rms_norm`."""
    z = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=LAYER_NORM_EPS)
    return (z * gain + shift).to(x.dtype)


class TDLayerNorm(nn.Module):
    """Apply a layer norm whose gain and shift depend on time. x (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = TimeDependentVector(dim, 1.0)
        self.bias = TimeDependentVector(dim, 0.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return layer_norm(x, per_sample(self.weight(t), x), per_sample(self.bias(t), x))


class TDRMSNorm(nn.Module):
    """Apply an RMS norm whose gain depends on time, as in the released models. x (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = TimeDependentVector(dim, 1.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return rms_norm(x, per_sample(self.scale(t), x))


class RMSNorm(nn.Module):
    """Apply an RMS norm with one learned gain at all times (ablation). x (B, ..., D) -> (B, ..., D); t is not used."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return rms_norm(x, per_sample(self.scale[None], x))


NORMS = {"TDRMSN": TDRMSNorm, "LN": TDLayerNorm, "RMSN": RMSNorm}
