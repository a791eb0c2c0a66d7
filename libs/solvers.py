"""Samplers as functions of a noise model: DPM-Solver++ singlestep and multistep, DDIM, DDPM, Heun, Euler.

Lu et al., DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095). Notation as there: lambda is half the
log-SNR, h a step in lambda, r1 and r2 the inner nodes as fractions of h, D the data prediction.

All coefficients are computed on the host in float64 before the first evaluation, so that no loop waits for the device.
In every function noise_model is eps(x, t) and x is noise (B, C, H, W) at the first time.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from libs import UserError
from sde import DiffusionModel, LinearSchedule, NoiseModel, Schedule, euler_maruyama

Draw = Callable[[], Tensor]  # standard normal noise of the shape of x

# --- Times ------------------------------------------------------------------------------------------------------------


def lambda_times(schedule: Schedule, n: int) -> Tensor:
    """Divide the time from t_end to t_start into n intervals of equal length in lambda: float64 (n + 1,)."""
    first, last = schedule.lambda_(ends(schedule)).tolist()
    return times_at(schedule, torch.linspace(first, last, n + 1, dtype=torch.float64))


def karras_times(schedule: Schedule, n: int, rho: float = 7.0) -> Tensor:
    """Divide it into n intervals of equal length in (sigma / alpha)^(1 / rho) (EDM, arXiv 2206.00364, equation 5)."""
    first, last = (-schedule.lambda_(ends(schedule)) / rho).exp().tolist()
    return times_at(schedule, -rho * torch.linspace(first, last, n + 1, dtype=torch.float64).log())


def ends(schedule: Schedule) -> Tensor:
    return torch.tensor([schedule.t_end, schedule.t_start], dtype=torch.float64)


def times_at(schedule: Schedule, lam: Tensor) -> Tensor:
    times = schedule.inverse_lambda(lam)
    times[0], times[-1] = ends(schedule)  # rounding must not leave the schedule
    return times


def at_nodes(schedule: Schedule, times: Tensor) -> tuple[list[float], list[float], list[float], list[float]]:
    """Evaluate t, alpha, sigma and lambda at falling times, float64 (N + 1,), as lists of floats."""
    values = times, schedule.alpha(times), schedule.sigma(times), schedule.lambda_(times)
    return tuple(value.tolist() for value in values)


# --- DPM-Solver++ singlestep ------------------------------------------------------------------------------------------


def fast_orders(steps: int, order: int) -> list[int]:
    """Choose the order of each singlestep step so that the NFE is exactly `steps`.

    As many steps of the full order as fit, then lower ones for the rest (DPM-Solver, section 3.4 and appendix B).
    """
    whole, rest = divmod(steps, order)
    if order == 3 and rest == 0:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + [rest] * (rest > 0)


def dpm_solver_fast(
    noise_model: NoiseModel, schedule: Schedule, x: Tensor, steps: int, order: int = 3, shift: float = 1.0
) -> Tensor:
    """Sample with DPM-Solver++ singlestep on times uniform in t; with order 3 the released models' sampler."""
    times = schedule.grid(steps, shift)
    return dpm_solver_singlestep(noise_model, schedule, x, times, fast_orders(steps, order))


@torch.no_grad()
def dpm_solver_singlestep(
    noise_model: NoiseModel, schedule: Schedule, x: Tensor, times: Tensor, orders: list[int]
) -> Tensor:
    """Sample with DPM-Solver++ singlestep: a step of order k takes k intervals, its inner nodes the times between.

    Args:
        times: float64 (N + 1,), falling; noise_model is called once at each but the last.
        orders: the order (1, 2 or 3) of each step; they add up to N.
    """
    t, alpha, sigma, lam = at_nodes(schedule, times)

    def data_prediction(x: Tensor, i: int) -> Tensor:
        return (x - sigma[i] * noise_model(x, t[i])) / alpha[i]

    s = 0
    for k in orders:
        end = s + k
        h = lam[end] - lam[s]
        d0 = data_prediction(x, s)

        def first_order(i: int, s: int = s, x: Tensor = x, d0: Tensor = d0) -> Tensor:
            """Take the step of order 1 from node s to node i."""
            return (sigma[i] / sigma[s]) * x - alpha[i] * math.expm1(lam[s] - lam[i]) * d0

        if k == 1:
            x = first_order(end)
        elif k == 2:
            r1 = (lam[s + 1] - lam[s]) / h
            d1 = data_prediction(first_order(s + 1), s + 1)
            x = first_order(end) - alpha[end] * math.expm1(-h) / (2 * r1) * (d1 - d0)
        else:
            r1, r2 = (lam[s + 1] - lam[s]) / h, (lam[s + 2] - lam[s]) / h
            d1 = data_prediction(first_order(s + 1), s + 1)
            inner = math.expm1(-r2 * h) / (r2 * h) + 1
            d2 = data_prediction(first_order(s + 2) + r2 / r1 * alpha[s + 2] * inner * (d1 - d0), s + 2)
            x = first_order(end) + alpha[end] / r2 * (math.expm1(-h) / h + 1) * (d2 - d0)
        s = end
    return x


# --- DPM-Solver++ multistep -------------------------------------------------------------------------------------------


def multistep_weights(lam: list[float]) -> list[float]:
    """Compute the weights w of x_t = sigma_t / sigma_s x_s + alpha_t (w[0] D_0 + w[1] D_1 + ...), the newest D first.

    They integrate e^(lambda - lambda_t) D(lambda) from lambda_s to lambda_t, D being the polynomial through the last k
    data predictions, k 2 or 3; for 2 with the paper's approximation (arXiv 2211.01095, algorithm 2).

    Args:
        lam: lambda at the k nodes of the data predictions, oldest first, and at the end of the step.
    """
    *past, start, end = lam
    h = end - start
    i0 = -math.expm1(-h)  # the integrals of e^(u - h) u^m over 0..h, m = 0, 1, 2
    h0 = start - past[-1]
    if len(past) == 1:
        slope = i0 * h / (2 * h0)
        return [i0 + slope, -slope]
    # Newton's form D_0 + u D[0, 1] + u (u + h0) D[0, 1, 2]. Published code (3M) takes half of the second difference's
    # weight, which makes it a method of order 2.
    i1 = h - i0
    i2 = h**2 - 2 * i1
    h1 = past[-1] - past[-2]
    first, second = i1 / h0, (i2 + h0 * i1) / (h0 + h1)
    return [i0 + first + second / h0, -first - second / h0 - second / h1, second / h1]


@torch.no_grad()
def dpm_solver_multistep(noise_model: NoiseModel, schedule: Schedule, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Sample with DPM-Solver++ multistep: each step reuses the data predictions of the order - 1 before it.

    The first step is a singlestep one of one order less over as many intervals, which keeps the order of the whole; for
    order 2 that is the published start.

    Args:
        times: float64 (N + 1,), falling, N at least the order; noise_model is called once at each but the last.
        order: 2 or 3.
    """
    t, alpha, sigma, lam = at_nodes(schedule, times)
    weights = [multistep_weights(lam[i - order + 1 : i + 2]) for i in range(order - 1, len(t) - 1)]
    predictions = []  # of the data, newest first

    def recording(x: Tensor, time: float) -> Tensor:
        eps, i = noise_model(x, time), len(predictions)
        predictions.insert(0, (x - sigma[i] * eps) / alpha[i])
        return eps

    x = dpm_solver_singlestep(recording, schedule, x, times[:order], [order - 1])
    for i, step_weights in enumerate(weights, start=order - 1):
        newest = (x - sigma[i] * noise_model(x, t[i])) / alpha[i]
        predictions = [newest, *predictions[: order - 1]]
        x = (sigma[i + 1] / sigma[i]) * x
        for weight, prediction in zip(step_weights, predictions, strict=True):
            x = x + (alpha[i + 1] * weight) * prediction
    return x


# --- Euler, DDIM, DDPM, Heun ------------------------------------------------------------------------------------------


@torch.no_grad()
def euler(model: NoiseModel, schedule: Schedule, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Integrate the probability-flow ODE by Euler's method in steps of equal length in t.

    On the linear path from noise at t = 1 to data at t = 0, where the network predicts v or x; otherwise from t_end to
    t_start, as noise says nothing of x_0 at t = 1.

    Args:
        steps: NFE.
        shift: of `shift_times`.
    """
    if not hasattr(model, "slope"):
        model = DiffusionModel(model, schedule)
    whole = isinstance(schedule, LinearSchedule) and model.prediction != "eps"
    times = schedule.grid(steps, shift, 1.0, 0.0) if whole else schedule.grid(steps, shift)
    times = times.tolist()
    for t, following in itertools.pairwise(times):
        x = x + (following - t) * model.slope(x, t)[0]
    return x


@torch.no_grad()
def ddim(
    noise_model: NoiseModel, schedule: Schedule, x: Tensor, times: Tensor, eta: float = 0.0, draw: Draw | None = None
) -> Tensor:
    """Sample with DDIM (arXiv 2010.02502, equation 12); with eta = 1, with DDPM's smaller variance.

    Args:
        times: float64 (N + 1,), falling; noise_model is called once at each but the last.
        eta: fraction of the posterior's standard deviation that is fresh noise in each step; none in the last.
        draw: gives standard normal noise of the shape of x; None: from the global generator.
    """
    t, alpha, sigma, lam = at_nodes(schedule, times)
    last = len(t) - 2
    for i in range(last + 1):
        # The deviation of x_(i+1) given x_i and x_0 (Ho et al., arXiv 2006.11239, equation 7), for any alpha and sigma.
        posterior = sigma[i + 1] * math.sqrt(-math.expm1(2 * (lam[i] - lam[i + 1])))
        fresh = eta * posterior
        eps = noise_model(x, t[i])
        x = (alpha[i + 1] / alpha[i]) * (x - sigma[i] * eps) + math.sqrt(sigma[i + 1] ** 2 - fresh**2) * eps
        if fresh and i < last:
            x = x + fresh * (draw() if draw else torch.randn_like(x))
    return x


@torch.no_grad()
def heun(noise_model: NoiseModel, schedule: Schedule, x: Tensor, times: Tensor, euler_last: bool = False) -> Tensor:
    """Sample with Heun's method on d(x / alpha) / d(sigma / alpha) = eps (arXiv 2206.00364, algorithm 1, no churn).

    Args:
        times: float64 (N + 1,), falling; two evaluations per interval.
        euler_last: one evaluation for the last interval.
    """
    t, alpha, sigma, _ = at_nodes(schedule, times)
    ratio = [s / a for s, a in zip(sigma, alpha, strict=True)]
    last = len(t) - 2
    for i in range(last + 1):
        step = ratio[i + 1] - ratio[i]
        scaled = x / alpha[i]
        eps = noise_model(x, t[i])
        x = alpha[i + 1] * (scaled + step * eps)
        if i < last or not euler_last:
            eps = (eps + noise_model(x, t[i + 1])) / 2
            x = alpha[i + 1] * (scaled + step * eps)
    return x


# --- By name ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """An entry of `SOLVERS`: solver(noise_model, schedule, x, steps, draw, shift) has an NFE of exactly `steps`.

    Those on times uniform in t heed `shift` (`sde.shift_times`).
    """

    solve: Callable[[NoiseModel, Schedule, Tensor, int, Draw | None, float], Tensor]
    least_steps: int = 1
    draws: bool = False  # does it call draw?

    def __call__(
        self,
        noise_model: NoiseModel,
        schedule: Schedule,
        x: Tensor,
        steps: int,
        draw: Draw | None = None,
        shift: float = 1.0,
    ) -> Tensor:
        return self.solve(noise_model, schedule, x, steps, draw, shift)


# Times are uniform in t where the released sampler or the paper has it, uniform in lambda for the multistep solvers,
# which are far more exact there (benchmarks/results/solvers.md), and EDM's for heun.
SOLVERS: dict[str, Solver] = {
    "dpm_solver": Solver(lambda f, s, x, n, _, shift: dpm_solver_fast(f, s, x, n, 3, shift), least_steps=3),  # released
    "dpm_solver_1": Solver(lambda f, s, x, n, _, shift: dpm_solver_fast(f, s, x, n, 1, shift)),
    "dpm_solver_2": Solver(lambda f, s, x, n, _, shift: dpm_solver_fast(f, s, x, n, 2, shift), least_steps=2),
    "dpm_solver_2m": Solver(lambda f, s, x, n, *_: dpm_solver_multistep(f, s, x, lambda_times(s, n), 2), least_steps=2),
    "dpm_solver_3m": Solver(lambda f, s, x, n, *_: dpm_solver_multistep(f, s, x, lambda_times(s, n), 3), least_steps=3),
    "ddim": Solver(lambda f, s, x, n, _, shift: ddim(f, s, x, s.grid(n, shift))),
    "ddpm": Solver(lambda f, s, x, n, draw, shift: ddim(f, s, x, s.grid(n, shift), 1.0, draw), draws=True),
    "heun": Solver(lambda f, s, x, n, *_: heun(f, s, x, karras_times(s, (n + 1) // 2), euler_last=n % 2 == 1)),
    "euler": Solver(lambda f, s, x, n, _, shift: euler(f, s, x, n, shift)),
    "euler_maruyama_sde": Solver(
        lambda f, s, x, n, draw, _: euler_maruyama(f, s, x, n, draw=draw), least_steps=2, draws=True
    ),
    "euler_maruyama_ode": Solver(lambda f, s, x, n, *_: euler_maruyama(f, s, x, n, ode=True), least_steps=2),
}


def check_steps(algorithm: str, steps: int, setting: str) -> None:
    """Raise UserError where a solver cannot sample in so few steps; `setting` is what holds them."""
    least = SOLVERS[algorithm].least_steps
    if not least <= steps:
        raise UserError(f"{setting} must be at least {least} for {algorithm}; found {steps}")


def check_guidance(scale: float, power: float | None, interval: tuple[float, float] | None = None) -> None:
    """Raise UserError for a scale below 1, a negative power, or an interval that is none."""
    if not 1 <= scale < math.inf:  # nor NaN
        raise UserError(
            f"the guidance scale must be at least 1 (1: none); found {scale:g} "
            f"(a constant in the released code is one lower: its {scale:g} is --cfg={scale + 1:g} here)"
        )
    if not 0 <= (power or 0) < math.inf:
        raise UserError(f"the power of the guidance schedule must be at least 0 (0: constant scale); found {power:g}")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise UserError(
            f"the guidance interval must be (low, high) in sigma / alpha with 0 <= low < high; found {tuple(interval)}"
        )
