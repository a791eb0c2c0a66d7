"""The published optimiser: AdamW with its decay rule, and the learning-rate warm-up."""

import torch
from torch import Tensor, nn

from libs import sharding

NO_DECAY = (".time_weight", ".time_bias")  # w and b of the time-dependent vectors; gains and biases do decay


def split_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed) trainable parameters: only the time-dependent vectors' w and b are spared."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(NO_DECAY) else decayed).append(parameter)
    return decayed, spared


def make_adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (eps 1e-8) over a model's trainable parameters with the decay rule of `split_decay`."""
    decayed, spared = split_decay(model)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def warmup_lr(lr: float, step: int, warmup_steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then constant; the first update has rate 0."""
    return lr * min(step / warmup_steps, 1.0) if warmup_steps else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_or_skip(optimizer: torch.optim.Optimizer, max_norm: float, skipped: Tensor) -> Tensor:
    """Clip gradients to `max_norm` (0: leave them) and have the next step skipped if their norm is not finite.

    Nothing waits for the device: the fused AdamW itself leaves weights and moments alone when `found_inf` is set, as
    the gradient scaler of fp16 does. Of a sharded model the norm is that of the whole gradient, the same everywhere.

    Args:
        skipped: float tensor (2,), skipped updates in a row and in all; brought up to date.

    Returns:
        The norm before clipping, a scalar tensor.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = sharding.full(torch.nn.utils.get_total_norm(gradients, foreach=True))
    bad = (~torch.isfinite(norm)).float()
    skipped.copy_(torch.stack([(skipped[0] + 1) * bad, skipped[1] + bad]))
    optimizer.found_inf, optimizer.grad_scale = bad, None
    if max_norm:
        torch._foreach_mul_([sharding.local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
