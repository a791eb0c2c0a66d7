"""The released code's way of computing a DiMR, as a baseline: the same numbers by its recipe, in own words.

Activation checkpointing of every block; norms that make a float32 round trip; time-dependent vectors computed for all
modules by a Python loop and kept on them; queries, keys and values in float32; guidance in two passes; the host waits
at every step.
"""

import copy
import types

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from libs.compilation import checkpoint_activations, use_forms
from libs.dimr import Attention, DiMR
from libs.norms import TimeDependentVector


def hidden_vector(self, t):
    return self.current


def attention(self, x, t):
    qkv = rearrange(self.qkv(self.norm(x, t)), "B N (k heads d) -> k B heads N d", k=3, heads=self.num_heads)
    q, k, v = (part.float() for part in qkv)
    with torch.autocast(x.device.type, enabled=False):
        z = F.scaled_dot_product_attention(q, k, v)
    return self.out(rearrange(z, "B heads N d -> B N (heads d)"))


class ReleasedRecipe(nn.Module):
    """A network with the weights of `nnet`, called alike: (x, t, y) -> predictions, computed by the released recipe."""

    def __init__(self, nnet: DiMR):
        super().__init__()
        self.nnet = copy.deepcopy(nnet)
        self.null_label = nnet.null_label
        checkpoint_activations(self.nnet, "all")
        self.vectors = [m for m in self.nnet.modules() if isinstance(m, TimeDependentVector)]
        use_forms(self.nnet, {Attention: attention})
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
