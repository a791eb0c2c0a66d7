"""Noise schedules, the multi-resolution loss, guidance and Euler-Maruyama sampling.

One time axis for everything: t in [0, 1], 0 clean, 1 noise. x_t = alpha(t) x_0 + sigma(t) eps with
alpha² = alpha_bar and sigma² = 1 - alpha_bar. Schedules compute in float64 on the device of t.

Sources: DiMR (arXiv 2406.09416), score SDEs (Song et al., arXiv 2011.13456), the cosine schedule (Nichol and
Dhariwal, arXiv 2102.09672), classifier-free guidance (Ho and Salimans, arXiv 2207.12598), its interval
(Kynkäänniemi et al., arXiv 2404.07724) and autoguidance (Karras et al., arXiv 2406.02507).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NoiseModel = Callable[[Tensor, float], Tensor]  # eps(x, t): x (B, C, H, W), one time t for the batch

# --- Schedules --------------------------------------------------------------------------------------------------------


class Schedule:
    """A variance-preserving process. Subclasses define `log_alpha_bar` and what the network is told of the time."""

    t_end = 1.0  # where sampling starts
    t_start = 1e-3  # where the solvers stop

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha_bar(t), float64, of the shape of t."""
        raise NotImplementedError

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        """t at which lambda(t) = lam."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """The time condition that the network is trained with, float32, of the shape of t."""
        raise NotImplementedError

    def times(self, uniform: Tensor) -> Tensor:
        """Training times, float64, from draws uniform in [0, 1)."""
        raise NotImplementedError

    def log_alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha_bar(t) / 2

    def alpha_bar(self, t: Tensor) -> Tensor:
        return self.log_alpha_bar(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self.log_alpha_bar(t))).sqrt()

    def lambda_(self, t: Tensor) -> Tensor:
        """Half the log-SNR, log alpha - log sigma."""
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))) / 2

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for a batch: x0, eps (B, C, H, W), t (B,)."""
        alpha, sigma = self.log_alpha(t).exp(), self.sigma(t)
        return (per_image(alpha, x0) * x0 + per_image(sigma, x0) * eps).to(x0.dtype)


class DiscreteSchedule(Schedule):
    """Stable Diffusion's schedule: N steps with sqrt(beta) linear, alpha_bar known at t = n / N, n = 1..N.

    Between those points log alpha is linear in t; outside them the outermost segments go on (as DPM-Solver's discrete
    schedule). The network is told 2 t - 1.
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.0120, n_timesteps: int = 1000):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, n_timesteps, dtype=torch.float64) ** 2
        self.n_timesteps = n_timesteps
        self.t_start = 1 / n_timesteps
        self.table = torch.log1p(-betas).cumsum(0)  # log alpha_bar at t = (1..N) / N
        self.tables = {}

    def table_on(self, device: torch.device) -> Tensor:
        # Kept per device: copying it at every use would make the host wait in a training step.
        if device not in self.tables:
            self.tables[device] = self.table.to(device)
        return self.tables[device]

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        table = self.table_on(t.device)
        position = t.double() * self.n_timesteps - 1
        left = position.floor().clamp(0, self.n_timesteps - 2).long()
        return torch.lerp(table[left], table[left + 1], position - left)

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        log_alpha_bar = -F.softplus(-2 * lam.double())  # log alpha_bar = log sigmoid(2 lambda)
        table = self.table_on(lam.device)
        # The table falls with n; searchsorted wants it rising.
        left = (self.n_timesteps - 1 - torch.searchsorted(table.flip(0), log_alpha_bar)).clamp(0, self.n_timesteps - 2)
        position = left + (log_alpha_bar - table[left]) / (table[left + 1] - table[left])
        return (position + 1) / self.n_timesteps

    def network_time(self, t: Tensor) -> Tensor:
        return (2 * t - 1).float()

    def times(self, uniform: Tensor) -> Tensor:
        return ((uniform.double() * self.n_timesteps).floor() + 1) / self.n_timesteps


class ContinuousSchedule(Schedule):
    """A VP-SDE dx = -beta(t)/2 x dt + sqrt(beta(t)) dw. The network is told log_snr(t) / 4."""

    def beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def drift(self, t: Tensor) -> Tensor:
        """The coefficient of x."""
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma² / alpha², clamped to [1e-12, 1e6]."""
        return torch.expm1(-self.log_alpha_bar(t)).clamp(1e-12, 1e6)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha² / sigma², clamped to [1e-12, 1e6]."""
        return (1 / self.nsr(t)).clamp(1e-12, 1e6)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.snr(t).log()

    def network_time(self, t: Tensor) -> Tensor:
        return (self.log_snr(t) / 4).float()

    def times(self, uniform: Tensor) -> Tensor:
        return uniform.double()


class VPSDE(ContinuousSchedule):
    """beta(t) linear from beta_min to beta_max (Song et al.)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        t = t.double()
        return -(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2)

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        # The positive root of the quadratic in t, in the form without cancellation.
        slope = self.beta_max - self.beta_min
        integral = F.softplus(-2 * lam.double())  # -log alpha_bar
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


class CosineSDE(ContinuousSchedule):
    """alpha_bar = f(t) / f(0), f(t) = cos²((t + s) / (1 + s) · pi/2): beta is infinite at t = 1, so stay below."""

    t_end = 0.9946  # DPM-Solver's end for the cosine schedule: lambda stays finite

    def __init__(self, s: float = 0.008):
        self.s = s

    def angle(self, t: Tensor) -> Tensor:
        return (t.double() + self.s) / (1 + self.s) * (math.pi / 2)

    def beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.s) * self.angle(t).tan()

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        angle_0 = self.s / (1 + self.s) * (math.pi / 2)
        return 2 * (self.angle(t).cos().log() - math.log(math.cos(angle_0)))

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        angle_0 = self.s / (1 + self.s) * (math.pi / 2)
        log_cos = -F.softplus(-2 * lam.double()) / 2 + math.log(math.cos(angle_0))
        return log_cos.exp().acos() * 2 * (1 + self.s) / math.pi - self.s


SCHEDULES = {"sd": DiscreteSchedule, "vpsde": VPSDE, "vpsde_cosine": CosineSDE}


def get_schedule(name: str) -> Schedule:
    """The schedule called `name`. Raises ValueError for an unknown one."""
    if name not in SCHEDULES:
        raise ValueError(f"config.schedule must be one of {', '.join(SCHEDULES)}; found {name!r}")
    return SCHEDULES[name]()


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to be broadcast over images (B, C, H, W)."""
    return values.view(-1, *[1] * (images.ndim - 1))


# --- Loss -------------------------------------------------------------------------------------------------------------


def multi_scale_target(eps: Tensor, ratio: int) -> Tensor:
    """The noise at 1 / ratio of the resolution, scaled to keep unit variance (code ≠ paper, which only averages).

    Even sizes: mean over ratio x ratio cells, times ratio. Odd sizes (H - 1 divisible by ratio): sum over windows of
    (ratio + 1)² centred on every ratio-th cell, zeros outside, divided by ratio + 1.

    Args:
        eps: noise (B, C, H, W).

    Returns:
        (B, C, H / ratio, W / ratio), or ((H - 1) / ratio + 1, ...) for odd sizes.

    Raises:
        ValueError: a size that ratio does not divide.
    """
    if ratio == 1:
        return eps
    height, width = eps.shape[-2:]
    if height % ratio == 0 and width % ratio == 0:
        return F.avg_pool2d(eps, ratio) * ratio
    if (height - 1) % ratio or (width - 1) % ratio:
        raise ValueError(f"multi-scale targets need sizes (or sizes - 1) divisible by {ratio}; found {height}x{width}")
    window = ratio + 1
    return F.avg_pool2d(eps, window, stride=ratio, padding=ratio // 2, count_include_pad=True) * window


def default_loss_weights(n_stages: int) -> tuple[float, ...]:
    """a_r = 1 / (2^(R-1-r))²: 1/4, 1 for two resolutions, 1/16, 1/4, 1 for three (the released values)."""
    return tuple(0.25 ** (n_stages - 1 - r) for r in range(n_stages))


def resolution_losses(predictions: tuple[Tensor, ...], eps: Tensor) -> Tensor:
    """Mean squared error of each prediction against the noise at its resolution: (R, B), coarsest first."""
    losses = []
    for prediction in predictions:
        target = multi_scale_target(eps, eps.shape[-1] // prediction.shape[-1])
        losses.append((prediction.float() - target).square().flatten(1).mean(1))
    return torch.stack(losses)


def multi_resolution_loss(predictions: tuple[Tensor, ...], eps: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Per-image loss sum_r a_r mean((pred_r - target_r)²): (B,)."""
    losses = resolution_losses(predictions, eps)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


# --- Guidance ---------------------------------------------------------------------------------------------------------


def guidance_weight(t: float, scale: float, power: float | None = None) -> float:
    """The weight w of eps = uncond + w (cond - uncond) at time t; 1 is no guidance.

    power None or 0: constant, w = scale. Otherwise the power-cosine schedule
    w = 1 + (scale - 1) (1 - cos(pi (1 - t)^power)) / 2, from 1 at t = 1 to scale at t = 0.
    """
    if not power:
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - t) ** power)) / 2


def check_guidance(scale: float, power: float | None, interval: tuple[float, float] | None = None) -> None:
    """Raises ValueError for a scale below 1, a negative power, or an interval that is none."""
    if not 1 <= scale < math.inf:  # nor NaN
        raise ValueError(
            f"the guidance scale must be at least 1 (1 = none, eps = uncond + scale (cond - uncond)); found {scale:g}. "
            f"The released code's constant convention writes it one lower: its {scale:g} is --cfg={scale + 1:g} here"
        )
    if power is not None and not 0 <= power < math.inf:
        raise ValueError(f"the power of the guidance schedule must be at least 0 (0: constant scale); found {power:g}")
    if interval is not None:
        numbers = [value for value in interval if isinstance(value, int | float)]
        if len(interval) != 2 or len(numbers) != 2 or not 0 <= interval[0] < interval[1]:
            raise ValueError(
                "the guidance interval must be two noise levels sigma / alpha, (low, high) with 0 <= low < high; found "
                f"{tuple(interval)}: set config.sample.interval, or leave it out to guide always"
            )


def guided_noise_model(
    nnet: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    schedule: Schedule,
    labels: Tensor,
    null_label: int,
    scale: float = 1.0,
    power: float | None = None,
    interval: tuple[float, float] | None = None,
    weaker: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> NoiseModel:
    """The network as a noise model eps(x, t) of a batch x (B, C, H, W) and one time t, with guidance.

    The conditional and unconditional halves go through the network as one batch of 2B; at scale 1 and outside the
    interval there is no second half. Nothing in a call waits for the device.

    Args:
        nnet: network, called as nnet(x, t, y) with t of shape (1,).
        labels: (B,) class labels.
        scale, power: of `guidance_weight`.
        interval: (low, high]; guided only at noise levels sigma / alpha (EDM's sigma) in it, only conditional outside
            (Kynkäänniemi et al., arXiv 2404.07724). None: always guided.
        weaker: autoguidance: a smaller or less trained network, told the same labels, takes the place of the
            unconditional half (Karras et al., arXiv 2406.02507).

    Raises:
        ValueError: see `check_guidance`.
    """
    check_guidance(scale, power, interval)
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def noise_model(x: Tensor, t: float) -> Tensor:
        time = network_time(t, x.device)
        if scale == 1 or not is_guided(t):
            return nnet(x, time, labels)[-1].float()
        if weaker is None:
            eps, eps_guide = nnet(torch.cat([x, x]), time, both)[-1].float().chunk(2)
        else:
            eps, eps_guide = nnet(x, time, labels)[-1].float(), weaker(x, time, labels)[-1].float()
        return torch.lerp(eps_guide, eps, guidance_weight(t, scale, power))

    def is_guided(t: float) -> bool:
        if interval is None:
            return True
        level = math.exp(-schedule.lambda_(torch.tensor(t, dtype=torch.float64)).item())
        return interval[0] < level <= interval[1]

    def network_time(t: float, device: torch.device) -> Tensor:
        # Computed on the host in float64; filled in on the device, which copies nothing and so waits for nothing.
        value = schedule.network_time(torch.tensor(t, dtype=torch.float64)).item()
        return torch.full((1,), value, device=device)

    return noise_model


# --- Euler-Maruyama ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def euler_maruyama(
    noise_model: NoiseModel,
    schedule: ContinuousSchedule,
    x: Tensor,
    steps: int,
    ode: bool = False,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Integrate the reverse SDE (or its probability-flow ODE) from noise x (B, C, H, W) at t = 1 to t = 0.

    Times: 0, then `steps` points from 1e-3 to 1; coefficients at the start of each move; the last move adds no noise
    (Song et al., arXiv 2011.13456, equation 6 and section 4.3).

    Args:
        noise_model: eps(x, t).
        schedule: a continuous schedule (it needs drift and diffusion).
        steps: number of moves and of network evaluations.
        draw: gives standard normal noise of the shape of x; from the global generator when None.
    """
    if not isinstance(schedule, ContinuousSchedule):
        raise ValueError("Euler-Maruyama needs a continuous schedule: set config.schedule to vpsde or vpsde_cosine")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; found {steps}")
    times = torch.from_numpy(np.append(0.0, np.linspace(1e-3, schedule.t_end, steps)))
    drift, diffusion, sigma = schedule.drift(times), schedule.diffusion(times), schedule.sigma(times)
    for i in range(steps, 0, -1):
        move = (times[i] - times[i - 1]).item()
        score_weight = (diffusion[i] ** 2 / sigma[i]).item() * (0.5 if ode else 1.0)
        eps = noise_model(x, times[i].item())
        # dx = (f x - g² score) dt backwards in time, with score = -eps / sigma
        x = x * (1 - drift[i].item() * move) - eps * (score_weight * move)
        if not ode and i > 1:
            x = x + (draw() if draw else torch.randn_like(x)) * (diffusion[i].item() * move**0.5)
    return x
