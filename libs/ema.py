"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """ema <- rate · ema + (1 - rate) · weights after every update, starting from the initial weights.

    One fused multi-tensor operation per update; `model` is the averaged network, ready to sample with.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = [list(self.model.parameters()), list(model.parameters())]

    @torch.no_grad()
    def update(self) -> None:
        averaged, current = self.pairs
        torch._foreach_lerp_(averaged, current, 1 - self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()
