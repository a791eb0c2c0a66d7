"""The published optimiser: AdamW with its decay rule, and the learning-rate warm-up."""

import torch
from torch import nn

NO_DECAY = (".time_weight", ".time_bias")  # w and b of the time-dependent vectors; gains and biases do decay


def split_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed) trainable parameters: only the time-dependent vectors' w and b are spared."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(NO_DECAY) else decayed).append(parameter)
    return decayed, spared


def make_adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (eps 1e-8) over a model's trainable parameters with the decay rule of `split_decay`."""
    decayed, spared = split_decay(model)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    fused = all(parameter.is_cuda for parameter in decayed)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=fused or None)


def warmup_lr(lr: float, step: int, warmup_steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then constant; the first update has rate 0."""
    return lr * min(step / warmup_steps, 1.0) if warmup_steps else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
