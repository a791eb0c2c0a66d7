"""Normalisation layers, time-dependent (the paper's section 3.3) and plain. Every one is called as norm(x, t).

Axes: B batch, D channels (always last), ... tokens or grid cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def rms_normalise(x: Tensor) -> Tensor:
    """x / (||x|| / sqrt(D) + 1e-8) over the last axis, in float32: eps is added to the RMS, not under the root."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / (norm * x.shape[-1] ** -0.5 + 1e-8)


class TDLayerNorm(nn.Module):
    """Layer norm whose gain and shift depend on time. x (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = TimeDependentVector(dim, 1.0)
        self.bias = TimeDependentVector(dim, 0.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = F.layer_norm(x, x.shape[-1:], eps=1e-5)
        return torch.addcmul(per_sample(self.bias(t), x), z, per_sample(self.weight(t), x))


class TDRMSNorm(nn.Module):
    """RMS norm whose gain depends on time; the norm of the released models. x (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = TimeDependentVector(dim, 1.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return rms_normalise(x) * per_sample(self.scale(t), x)


class RMSNorm(nn.Module):
    """RMS norm with one learned gain, the same at all times (ablation). x (B, ..., D) -> (B, ..., D); t is not used."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return rms_normalise(x) * self.scale


NORMS = {"TDRMSN": TDRMSNorm, "LN": TDLayerNorm, "RMSN": RMSNorm}
