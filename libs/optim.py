"""The published optimizer, AdamW with its decay rule, learning-rate warm-up, clipping, and EMA weights.

EMA weights: constant rates, and EDM2's power functions, from which any other can be reconstructed after training
("post-hoc EMA": Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696,
section 3 and appendix C). A power function of exponent gamma weighs the weights of step tau by tau^gamma up to the
present; EDM2 names it by sigma_rel, its standard deviation relative to the length of training.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from libs import UserError, sharding

NO_DECAY = (".time_weight", ".time_bias")  # w and b of the time-dependent vectors; gains and biases do decay


def split_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (decayed, not decayed) trainable parameters: only the time-dependent vectors' w and b are spared."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(NO_DECAY) else decayed).append(parameter)
    return decayed, spared


def make_adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW (eps 1e-8) over a model's trainable parameters with the decay rule of `split_decay`.

    Fused: `clip_or_skip` relies on an optimizer that heeds `found_inf`, as fused ones do.
    """
    decayed, spared = split_decay(model)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def warmup_lr(lr: float, step: int, warmup_steps: int) -> float:
    """Compute the learning rate of update `step` (from 0): linear warm-up from 0, then constant."""
    return lr * min(step / warmup_steps, 1.0) if warmup_steps else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_or_skip(optimizer: torch.optim.Optimizer, max_norm: float, skipped: Tensor) -> Tensor:
    """Clip gradients to `max_norm` (0: no clipping), and skip the next step if their norm is not finite.

    The host does not wait for the device: the fused AdamW itself leaves weights and moments alone when `found_inf` is
    set, as the gradient scaler of fp16 does. Under FSDP the norm is that of the whole gradient on every process.

    Args:
        skipped: float tensor (2,), skipped updates in a row and in all; updated in place.

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


# --- EMA weights ------------------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a network's weights: ema <- rate · ema + (1 - rate) · weights after every update.

    Starts from the initial weights; `model` holds the EMA weights, ready to sample with. An update is one fused
    multi-tensor operation. Both networks may be sharded by FSDP, alike, before the first update.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.source = model
        self.pairs = None  # collected at the first update: FSDP replaces the networks' tensors

    def rate_at(self, step: int) -> float:
        """Return the rate of update `step`, counted from 1."""
        return self.rate

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Average in the weights after update `step`, from 1, unless `skipped`, a scalar on the device, is 1."""
        if self.pairs is None:
            self.pairs = [[sharding.local(p) for p in network.parameters()] for network in (self.model, self.source)]
        averaged, current = self.pairs
        # SGD on |ema - weights|² / 2: a step of it is fused, and the device itself can skip it.
        options = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        rate = 1 - self.rate_at(step)
        torch._fused_sgd_(
            *(averaged, current, []), lr=rate, weight_decay=1.0, maximize=True, found_inf=skipped, **options
        )


class PowerEMA(EMA):
    """EDM2's power-function EMA: at step t (from 1) the rate is (1 - 1/t)^(gamma + 1).

    Args:
        sigma_rel: standard deviation of the profile relative to the length of training, in (0, 0.28).
    """

    def __init__(self, model: nn.Module, sigma_rel: float):
        self.gamma = gamma_of(sigma_rel)
        super().__init__(model, rate=0.0)

    def rate_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile with this sigma_rel (EDM2, equation 3). Raises UserError outside (0, 0.28)."""
    if not 0 < sigma_rel < 0.28:
        raise UserError(f"sigma_rel of a power-function EMA must be in (0, 0.28); found {sigma_rel:g}")
    # sigma_rel² (g + 2)² (g + 3) = g + 1, a cubic with one positive root
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def profile_product(step_a: float, gamma_a: float, step_b: float, gamma_b: float) -> float:
    """Integrate the product of two profiles, each (gamma + 1) tau^gamma / step^(gamma + 1) on [0, step]."""
    if step_a > step_b:
        step_a, gamma_a, step_b, gamma_b = step_b, gamma_b, step_a, gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (step_a / step_b) ** gamma_b / step_b


def posthoc_coefficients(stored: list[tuple[int, float]], step: int, sigma_rel: float) -> np.ndarray:
    """Solve for the linear combination of stored EMA weights that is closest to another profile (EDM2, section 3.2).

    Least squares between profiles, whose products have a closed form.

    Args:
        stored: (step, sigma_rel) of each stored EMA.
        step, sigma_rel: of the wanted EMA.

    Returns:
        One coefficient per stored EMA; they add up to about 1.
    """
    profiles = [(t, gamma_of(s)) for t, s in stored]
    wanted = (step, gamma_of(sigma_rel))
    products = np.array([[profile_product(*a, *b) for b in profiles] for a in profiles])
    target = np.array([profile_product(*a, *wanted) for a in profiles])
    return np.linalg.lstsq(products, target, rcond=None)[0]
