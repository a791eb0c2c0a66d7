"""Noise schedules, the multi-resolution loss, guidance and Euler-Maruyama sampling.

Time t runs from 0 (clean) to 1 (noise), and x_t = alpha(t) x_0 + sigma(t) eps. Schedules compute in float64 on the
device of t.

Sources: DiMR (arXiv 2406.09416), score SDEs (Song et al., arXiv 2011.13456), the cosine schedule (Nichol and
Dhariwal, arXiv 2102.09672), classifier-free guidance (Ho and Salimans, arXiv 2207.12598), its interval
(Kynkäänniemi et al., arXiv 2404.07724) and autoguidance (Karras et al., arXiv 2406.02507).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]  # (x, t, y) -> R predictions, coarsest first
NoiseModel = Callable[[Tensor, float], Tensor]  # eps(x, t): x (B, C, H, W), one time t for the batch
PREDICTIONS = ("eps", "v", "x")  # noise, velocity and data
TIME_LAWS = ("uniform", "logit_normal")  # of the times that are trained
WEIGHTINGS = ("unit", "min_snr")  # of the loss over times

# --- Schedules --------------------------------------------------------------------------------------------------------


class Schedule(ABC):
    """alpha(t) and sigma(t), and the time condition of the network. Methods keep the shape of t and return float64."""

    t_start = 1e-3  # where the solvers stop
    t_end = 1.0  # where sampling starts

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """Compute log alpha(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Compute sigma(t)."""

    @abstractmethod
    def lambda_(self, t: Tensor) -> Tensor:
        """Compute half the log-SNR, log alpha(t) - log sigma(t)."""

    @abstractmethod
    def inverse_lambda(self, lam: Tensor) -> Tensor:
        """Find the t at which lambda(t) = lam."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Compute what the network is conditioned on at time t, float32."""

    @abstractmethod
    def times(self, uniform: Tensor) -> Tensor:
        """Map draws uniform in [0, 1) to training times."""

    @abstractmethod
    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (a, b) of the velocity v = a x_0 + b eps, with alpha b - sigma a = 1."""

    @abstractmethod
    def noise_rate(self, t: Tensor) -> Tensor:
        """Compute w(t), the variance per unit of time that the reverse SDE adds."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def grid(self, n: int, shift: float = 1.0, first: float | None = None, last: float | None = None) -> Tensor:
        """Divide the time from `first` (t_end) to `last` (t_start) into n equal intervals, then shift: (n + 1,)."""
        first, last = self.t_end if first is None else first, self.t_start if last is None else last
        if shift == 1:
            return torch.linspace(first, last, n + 1, dtype=torch.float64)
        times = last + (first - last) * shift_times(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)
        times[0], times[-1] = first, last  # rounding must not leave the schedule
        return times

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Compute x_t for a batch: x0 and eps (B, C, H, W), t (B,)."""
        alpha, sigma = (value.view(-1, *[1] * (x0.ndim - 1)) for value in (self.alpha(t), self.sigma(t)))
        return (alpha * x0 + sigma * eps).to(x0.dtype)


class VariancePreserving(Schedule):
    """alpha² = alpha_bar and sigma² = 1 - alpha_bar: the SDE dx = -beta(t) / 2 x dt + sqrt(beta(t)) dw."""

    @abstractmethod
    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """Compute log alpha_bar(t)."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Compute beta(t) = -d log alpha_bar / dt."""

    def drift(self, t: Tensor) -> Tensor:
        """Compute the coefficient of x."""
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def noise_rate(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As Salimans and Ho (arXiv 2202.00512), and as v_prediction in diffusers: v has unit variance."""
        return -self.sigma(t), self.alpha(t)

    def alpha_bar(self, t: Tensor) -> Tensor:
        return self.log_alpha_bar(t).exp()

    def log_alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha_bar(t) / 2

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self.log_alpha_bar(t))).clamp_min(0).sqrt()  # at t = 0 rounding can be on the other side

    def lambda_(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))) / 2


class DiscreteSchedule(VariancePreserving):
    """Stable Diffusion's schedule: N steps with sqrt(beta) linear, alpha_bar known at t = n / N, n = 1..N.

    log alpha is interpolated linearly between those points and extrapolated outside, as in DPM-Solver's discrete
    schedule. The network is conditioned on 2 t - 1.
    """

    n_timesteps = 1000
    beta_start, beta_end = 0.00085, 0.0120
    t_start = 1 / n_timesteps

    def __init__(self):
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.n_timesteps, dtype=torch.float64)
        self.table = torch.log1p(-(roots**2)).cumsum(0)  # log alpha_bar at t = (1..N) / N
        self.tables = {}

    def table_on(self, device: torch.device) -> Tensor:
        # One copy per device, made once: a copy in each training step would make the host wait.
        if device not in self.tables:
            self.tables[device] = self.table.to(device)
        return self.tables[device]

    def interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find log alpha_bar at the known points around t, and where between them t lies."""
        table = self.table_on(t.device)
        position = t.double() * self.n_timesteps - 1
        left = position.floor().clamp(0, self.n_timesteps - 2).long()
        return table[left], table[left + 1], position - left

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return torch.lerp(*self.interval(t))

    def beta(self, t: Tensor) -> Tensor:
        left, right, _ = self.interval(t)
        return (left - right) * self.n_timesteps

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        log_alpha_bar = log_alpha_bar_of(lam)
        table = self.table_on(lam.device)
        # The table falls with n; searchsorted needs it rising.
        left = (self.n_timesteps - 1 - torch.searchsorted(table.flip(0), log_alpha_bar)).clamp(0, self.n_timesteps - 2)
        position = left + (log_alpha_bar - table[left]) / (table[left + 1] - table[left])
        return (position + 1) / self.n_timesteps

    def network_time(self, t: Tensor) -> Tensor:
        return (2 * t - 1).float()

    def times(self, uniform: Tensor) -> Tensor:
        return ((uniform.double() * self.n_timesteps).floor() + 1) / self.n_timesteps


class ContinuousSchedule(VariancePreserving):
    """A schedule in continuous time. The network is conditioned on log SNR(t) / 4."""

    def nsr(self, t: Tensor) -> Tensor:
        """Compute the noise-to-signal ratio sigma² / alpha², clamped to [1e-12, 1e6]."""
        return torch.expm1(-self.log_alpha_bar(t)).clamp(1e-12, 1e6)

    def snr(self, t: Tensor) -> Tensor:
        return (1 / self.nsr(t)).clamp(1e-12, 1e6)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.snr(t).log()

    def network_time(self, t: Tensor) -> Tensor:
        return (self.log_snr(t) / 4).float()

    def times(self, uniform: Tensor) -> Tensor:
        return uniform.double()


class VPSDE(ContinuousSchedule):
    """beta(t) linear from beta_min to beta_max (Song et al.)."""

    beta_min, beta_max = 0.1, 20.0

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        t = t.double()
        return -(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2)

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        # The positive root of the quadratic in t, in the form without cancellation.
        slope, integral = self.beta_max - self.beta_min, -log_alpha_bar_of(lam)
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


class CosineSDE(ContinuousSchedule):
    """alpha_bar = f(t) / f(0), f(t) = cos²((t + s) / (1 + s) · pi / 2). beta is infinite at t = 1."""

    t_end = 0.9946  # as in DPM-Solver: lambda stays finite
    s = 0.008

    def angle(self, t: Tensor) -> Tensor:
        return (t.double() + self.s) / (1 + self.s) * (math.pi / 2)

    def log_cos_0(self) -> float:
        return math.log(math.cos(self.s / (1 + self.s) * (math.pi / 2)))

    def beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.s) * self.angle(t).tan()

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return 2 * (self.angle(t).cos().log() - self.log_cos_0())

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        log_cos = log_alpha_bar_of(lam) / 2 + self.log_cos_0()
        return log_cos.exp().acos() * 2 * (1 + self.s) / math.pi - self.s


class LinearSchedule(Schedule):
    """The path of flow matching, x_t = (1 - t) x_0 + t eps (Lipman et al., arXiv 2210.02747; Liu et al., 2209.03003).

    The velocity is dx/dt = eps - x_0. The network is conditioned on 2 t - 1, as by `DiscreteSchedule`. At t = 1 only a
    velocity says anything of x_0, and sigma is 0 at t = 0: solvers that divide by either stay within [t_start, t_end].
    """

    t_end = 1 - 1e-3

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t.double())

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def lambda_(self, t: Tensor) -> Tensor:
        return torch.log1p(-t.double()) - t.double().log()

    def inverse_lambda(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam.double())

    def network_time(self, t: Tensor) -> Tensor:
        return (2 * t - 1).float()

    def times(self, uniform: Tensor) -> Tensor:
        return uniform.double()

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t.double()), torch.ones_like(t.double())

    def noise_rate(self, t: Tensor) -> Tensor:
        return 2 * self.sigma(t)  # as SiT (arXiv 2401.08740)


SCHEDULES = {"sd": DiscreteSchedule, "vpsde": VPSDE, "vpsde_cosine": CosineSDE, "linear": LinearSchedule}


def get_schedule(name: str) -> Schedule:
    """Make the schedule of a name in SCHEDULES."""
    return SCHEDULES[name]()


def log_alpha_bar_of(lam: Tensor) -> Tensor:
    """Compute log alpha_bar = log sigmoid(2 lambda) of a variance-preserving process."""
    return -F.softplus(-2 * lam.double())


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times t in [0, 1] toward noise (shift > 1) or data (< 1): s t / (1 + (s - 1) t) (arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(
    schedule: Schedule, uniform: Tensor, law: str = "uniform", mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Map draws uniform in [0, 1) to training times of a law: float64 (B,).

    Args:
        law: uniform, or logit_normal: the logit of t is normal with `mean` and `std` (arXiv 2403.03206).
        shift: of `shift_times`.
    """
    if law == "uniform" and shift == 1:
        return schedule.times(uniform)
    t = uniform.double()
    if law == "logit_normal":
        t = torch.sigmoid(mean + std * torch.special.ndtri(t))
    return schedule.times(shift_times(t, shift).clamp(1e-6, 1 - 1e-6))


# --- What the network predicts ----------------------------------------------------------------------------------------


def prediction_target(schedule: Schedule, prediction: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Compute what a network is to predict at full resolution, one of PREDICTIONS: x0 and eps (B, C, H, W), t (B,)."""
    if prediction == "v":
        a, b = (value.view(-1, *[1] * (x0.ndim - 1)) for value in schedule.velocity_coefficients(t))
        return (a * x0 + b * eps).to(x0.dtype)
    return eps if prediction == "eps" else x0


def convert(schedule: Schedule, x: Tensor, output: Tensor, t: float, source: str, wanted: str) -> Tensor:
    """Convert a branch's output from one of PREDICTIONS to another.

    With v = a x_0 + b eps and alpha b - sigma a = 1: x_0 = b x_t - sigma v, eps = alpha v - a x_t.

    Args:
        x: x_t (B, C, H, W). output: (B, C, H / k, W / k), of the branch at ratio k; x is downsampled alike.
        t: time of the whole batch.
    """
    if source == wanted:
        return output
    host_t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(host_t).item(), schedule.sigma(host_t).item()
    a, b = (value.item() for value in schedule.velocity_coefficients(host_t))
    if source == "eps":  # wanted = of_x x_t + of_output output
        of_x, of_output = (1 / alpha, -sigma / alpha) if wanted == "x" else (a / alpha, 1 / alpha)
    elif source == "v":
        of_x, of_output = (b, -sigma) if wanted == "x" else (-a, alpha)
    else:
        of_x, of_output = (1 / sigma, -alpha / sigma) if wanted == "eps" else (b / sigma, -1 / sigma)
    ratio = x.shape[-1] // output.shape[-1]
    # Branches predict data as means, and the other two as means times the ratio.
    to_sums, to_means = ratio if source == "x" else 1, ratio if wanted == "x" else 1
    return (of_x * multi_scale_target(x, ratio) + of_output * to_sums * output) / to_means


# --- Loss -------------------------------------------------------------------------------------------------------------


def multi_scale_target(eps: Tensor, ratio: int) -> Tensor:
    """Downsample the noise for the branch at 1 / ratio of the resolution.

    Average ratio x ratio cells and multiply by ratio, so that white noise keeps unit variance. The released code does
    this; the paper's text only averages. Odd sizes, with H - 1 divisible by ratio: sum windows of (ratio + 1)² centered
    on every ratio-th cell, zeros outside, and divide by ratio + 1.

    The velocity of the linear path is downsampled by the same rule, as published (FreqFlow, CrossFlow): its variance is
    1 + ratio² Var(mean of x_0 over the cells).

    Args:
        eps: (B, C, H, W).

    Returns:
        (B, C, H / ratio, W / ratio), or ((H - 1) / ratio + 1, ...) for odd sizes.
    """
    if ratio == 1:
        return eps
    if eps.shape[-2] % ratio == 0 and eps.shape[-1] % ratio == 0:
        return F.avg_pool2d(eps, ratio) * ratio
    return F.avg_pool2d(eps, ratio + 1, stride=ratio, padding=ratio // 2) * (ratio + 1)


def default_loss_weights(n_stages: int, prediction: str = "eps") -> tuple[float, ...]:
    """Compute the released weights a_r = 1 / (2^(R-1-r))²: 1/4, 1 for R = 2 and 1/16, 1/4, 1 for R = 3.

    Means of the data are predicted where noise is predicted as means times 2^(R-1-r): ones weigh the same errors alike.
    """
    return tuple(1.0 if prediction == "x" else 0.25 ** (n_stages - 1 - r) for r in range(n_stages))


def resolution_losses(predictions: Sequence[Tensor], target: Tensor, prediction: str = "eps") -> Tensor:
    """Compute the mean squared error of each output against the target at its resolution: (R, B), coarsest first."""
    losses = []
    for output in predictions:
        ratio = target.shape[-1] // output.shape[-1]
        wanted = F.avg_pool2d(target, ratio) if prediction == "x" else multi_scale_target(target, ratio)
        losses.append((output.float() - wanted).square().flatten(1).mean(1))
    return torch.stack(losses)


def min_snr_weight(schedule: Schedule, prediction: str, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Compute the weight of Min-SNR-gamma (arXiv 2303.09556) at times t (B,): float32 (B,).

    It is min(SNR, gamma) times what turns the squared error of the output into that of x_0.
    """
    alpha, sigma = schedule.alpha(t).square(), schedule.sigma(t).square()
    if prediction == "eps":
        weight = (gamma * sigma / alpha).clamp(max=1)
    elif prediction == "x":
        weight = (alpha / sigma).clamp(max=gamma)
    else:
        weight = torch.minimum(alpha, gamma * sigma)
    return weight.float()


def training_losses(
    nnet: Network,
    schedule: Schedule,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    labels: Tensor,
    prediction: str = "eps",
    weighting: str = "unit",
) -> Tensor:
    """Noise a batch, predict, and compute weighted `resolution_losses`: (R, B), coarsest first.

    Args:
        x0, eps: (B, C, H, W). t, labels: (B,).
        prediction: one of PREDICTIONS.
        weighting: over time: unit, or min_snr.
    """
    predictions = nnet(schedule.add_noise(x0, eps, t), schedule.network_time(t), labels)
    losses = resolution_losses(predictions, prediction_target(schedule, prediction, x0, eps, t), prediction)
    return losses * min_snr_weight(schedule, prediction, t) if weighting == "min_snr" else losses


def weighted_sum(losses: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Sum losses over resolutions with weights a_r: (R, B) -> (B,)."""
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def multi_resolution_loss(predictions: Sequence[Tensor], eps: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute sum_r a_r mean((pred_r - target_r)²) for each image: (B,)."""
    return weighted_sum(resolution_losses(predictions, eps), weights)


# --- Guidance ---------------------------------------------------------------------------------------------------------


def guidance_weight(t: float, scale: float, power: float | None = None) -> float:
    """Compute the weight w of eps = uncond + w (cond - uncond) at time t; w = 1 is no guidance.

    power None or 0: w = scale. Otherwise the power-cosine schedule
    w = 1 + (scale - 1) (1 - cos(pi (1 - t)^power)) / 2, from 1 at t = 1 to scale at t = 0.
    """
    if not power:
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - t) ** power)) / 2


def guided_predictions(
    nnet: Network,
    schedule: Schedule,
    labels: Tensor,
    null_label: int,
    scale: float = 1.0,
    power: float | None = None,
    interval: tuple[float, float] | None = None,
    guide: Network | None = None,
    prediction: str = "eps",
    guide_prediction: str = "eps",
) -> Callable[[Tensor, float], Sequence[Tensor]]:
    """Wrap a network as predict(x, t) with guidance, for x (B, C, H, W) and one time t of the whole batch.

    The conditional and unconditional halves are one batch of 2B. At scale 1 and outside the interval only the
    conditional half is computed. No call waits for the device.

    Args:
        nnet: called as nnet(x, t, y) with t (1,) and y (B,) or (2B,).
        labels: (B,) class labels.
        scale, power: of `guidance_weight`.
        interval: (low, high); guide only where low < sigma / alpha <= high (arXiv 2404.07724). None: everywhere.
        guide: guiding network for autoguidance; conditioned on the same labels, it replaces the unconditional half
            (arXiv 2406.02507).
        prediction, guide_prediction: what the two networks predict. Guidance mixes outputs: conversions add the same
            multiple of x to both halves, so that mixing before or after is the same.

    Returns:
        predict(x, t) -> float32 outputs, coarsest first and the finest last.
    """
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def predict(x: Tensor, t: float) -> Sequence[Tensor]:
        # Scalars are computed on the host and filled in on the device: no copy, so no wait.
        host_t = torch.tensor(t, dtype=torch.float64)
        time = torch.full((1,), schedule.network_time(host_t).item(), device=x.device)
        if scale == 1 or (interval and not interval[0] < math.exp(-schedule.lambda_(host_t).item()) <= interval[1]):
            return [prediction.float() for prediction in nnet(x, time, labels)]
        if guide is None:
            pairs = [prediction.chunk(2) for prediction in nnet(torch.cat([x, x]), time, both)]
        else:
            cond, other = nnet(x, time, labels), guide(x, time, labels)
            other = [convert(schedule, x, output.float(), t, guide_prediction, prediction) for output in other]
            shared = min(len(cond), len(other))  # resolutions of both networks, from the finest
            pairs = zip(cond[-shared:], other[-shared:], strict=True)
        weight = guidance_weight(t, scale, power)
        return [torch.lerp(other.float(), cond.float(), weight) for cond, other in pairs]

    return predict


class DiffusionModel:
    """What solvers are handed: eps(x, t) of a network that predicts one of PREDICTIONS, and the slope of the ODE.

    Args:
        predict: predict(x, t) gives the network's output at full resolution (B, C, H, W).
    """

    def __init__(self, predict: NoiseModel, schedule: Schedule, prediction: str = "eps"):
        self.predict, self.schedule, self.prediction = predict, schedule, prediction

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.output(x, t, "eps")

    def output(self, x: Tensor, t: float, wanted: str) -> Tensor:
        """Evaluate the network, and convert to one of PREDICTIONS."""
        return convert(self.schedule, x, self.predict(x, t), t, self.prediction, wanted)

    def slope(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Compute dx/dt of the probability-flow ODE, and eps, by one evaluation."""
        output = self.predict(x, t)
        eps = convert(self.schedule, x, output, t, self.prediction, "eps")
        if isinstance(self.schedule, LinearSchedule):
            return convert(self.schedule, x, output, t, self.prediction, "v"), eps
        host_t = torch.tensor(t, dtype=torch.float64)
        beta, sigma = self.schedule.beta(host_t).item(), self.schedule.sigma(host_t).item()
        return -beta / 2 * x + beta / (2 * sigma) * eps, eps


def guided_noise_model(nnet: Network, schedule: Schedule, *args, prediction: str = "eps", **kwargs) -> DiffusionModel:
    """Wrap a network for solvers: the finest of `guided_predictions`, which see for the arguments."""
    predict = guided_predictions(nnet, schedule, *args, prediction=prediction, **kwargs)
    return DiffusionModel(lambda x, t: predict(x, t)[-1], schedule, prediction)


# --- Euler-Maruyama ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def euler_maruyama(
    noise_model: NoiseModel,
    schedule: Schedule,
    x: Tensor,
    steps: int,
    ode: bool = False,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Integrate the reverse SDE, or its probability-flow ODE, from noise x (B, C, H, W) at t_end to t = 0.

    Times are 0 and `steps` points from 1e-3 to t_end. Coefficients are those at the start of each step. The last step
    adds no noise (Song et al., arXiv 2011.13456, equation 6 and section 4.3). The SDE adds w eps / (2 sigma) to the
    slope of the ODE and noise of variance w per unit of time, w being `Schedule.noise_rate`.

    Args:
        steps: NFE, at least 2.
        draw: gives standard normal noise of the shape of x; None: from the global generator.
    """
    model = noise_model if hasattr(noise_model, "slope") else DiffusionModel(noise_model, schedule)
    times = F.pad(torch.linspace(1e-3, schedule.t_end, steps, dtype=torch.float64), (1, 0))  # 0 first
    rate, sigma, t = schedule.noise_rate(times).tolist(), schedule.sigma(times).tolist(), times.tolist()
    for i in range(steps, 0, -1):
        step = t[i] - t[i - 1]
        slope, eps = model.slope(x, t[i])
        x = x - step * (slope if ode else slope + rate[i] / (2 * sigma[i]) * eps)
        if not ode and i > 1:
            x = x + (draw() if draw else torch.randn_like(x)) * (rate[i] * step) ** 0.5
    return x
