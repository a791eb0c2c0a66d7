"""The released code's way of computing a DiMR, as a baseline: the same numbers by its recipe, in own words.

Every block is computed again in the backward pass; norms make a float32 round trip and are left to automatic
differentiation, as convolutions are; the time-dependent vectors are computed for all modules by a Python loop before
the network runs, and kept on the modules; queries, keys and values are cast to float32; guidance takes two passes; the
host waits every step.
"""

import copy
import types

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from libs.depthwise import as_image_convolution
from libs.dimr import Attention, ConvNeXtBlock, DiMR, GatedMLP
from libs.norms import LAYER_NORM_EPS, RMS_EPS, TDLayerNorm, TDRMSNorm, TimeDependentVector, per_sample


def hidden_vector(self, t):
    return self.current


def rms_norm(self, x, t):
    y = x.float()
    y = y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + RMS_EPS)
    return (y * per_sample(self.scale(t), x)).to(x.dtype)


def layer_norm(self, x, t):
    y = F.layer_norm(x.float(), x.shape[-1:], eps=LAYER_NORM_EPS)
    return (y * per_sample(self.weight(t), x) + per_sample(self.bias(t), x)).to(x.dtype)


def attention(self, x, t):
    qkv = rearrange(self.qkv(self.norm(x, t)), "B N (k heads d) -> k B heads N d", k=3, heads=self.num_heads)
    q, k, v = (part.float() for part in qkv)
    with torch.autocast(x.device.type, enabled=False):
        z = F.scaled_dot_product_attention(q, k, v)
    return self.out(rearrange(z, "B heads N d -> B N (heads d)"))


def gated_mlp(self, x, t):
    z = self.norm(x, t)
    return self.w2(F.gelu(self.w0(z)) * self.w1(z))


def convnext_block(self, x, t):
    x = x + as_image_convolution(x, self.depthwise.weight, self.depthwise.bias)
    return x + self.mlp(x, t)


WAYS = {
    TDRMSNorm: rms_norm,
    TDLayerNorm: layer_norm,
    Attention: attention,
    GatedMLP: gated_mlp,
    ConvNeXtBlock: convnext_block,
}


class ReleasedRecipe(nn.Module):
    """A network with the weights of `nnet`, called alike: (x, t, y) -> predictions, computed by the released recipe."""

    def __init__(self, nnet: DiMR):
        super().__init__()
        self.nnet = copy.deepcopy(nnet)
        self.null_label = nnet.null_label
        self.nnet.recompute(1)
        self.vectors = [m for m in self.nnet.modules() if isinstance(m, TimeDependentVector)]
        for module in self.nnet.modules():
            if type(module) in WAYS:
                module.forward = types.MethodType(WAYS[type(module)], module)
        for vector in self.vectors:
            vector.forward = types.MethodType(hidden_vector, vector)

    def forward(self, x, t, y):
        for vector in self.vectors:
            vector.current = TimeDependentVector.forward(vector, t)
        return self.nnet(x, t, y)


def two_pass_noise_model(nnet, schedule, labels, null_label, scale):
    """eps(x, t) with constant guidance: two passes, and a value read back from the device at each step."""
    nothing = torch.full_like(labels, null_label)

    def noise_model(x, t):
        time = schedule.network_time(torch.tensor([t], dtype=torch.float64)).float().to(x.device).expand(len(x))
        conditional, unconditional = (nnet(x, time, y)[-1].float() for y in (labels, nothing))
        eps = unconditional + scale * (conditional - unconditional)
        if not torch.isfinite(eps.flatten()[0]).item():
            raise FloatingPointError("noise prediction is not finite")
        return eps

    return noise_model
