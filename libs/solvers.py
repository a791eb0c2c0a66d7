"""Samplers as pure functions of a noise model: DPM-Solver++ singlestep and multistep, DDIM, DDPM, Heun.

Lu et al., DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095). Notation as there: lambda is half the
log-SNR, h a step in lambda, r1 and r2 the places of inner nodes as shares of h, D the data prediction.

All coefficients are made on the host in float64 before the first evaluation, so that nothing in a loop waits for the
device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sde import NoiseModel, Schedule, euler_maruyama

Draw = Callable[[], Tensor]  # standard normal noise of the shape of x


class SolverSchedule(Protocol):
    """What a solver asks of a noise schedule (see sde.Schedule); all take and return float64 tensors."""

    t_start: float
    t_end: float

    def log_alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def lambda_(self, t: Tensor) -> Tensor: ...

    def inverse_lambda(self, lam: Tensor) -> Tensor: ...


class Nodes(NamedTuple):
    """Times and what the schedule says of them, as lists of floats."""

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    lam: list[float]


def at_nodes(schedule: SolverSchedule, times: Tensor) -> Nodes:
    """The nodes of a solver at falling times, float64 (N + 1,)."""
    values = times, schedule.log_alpha(times).exp(), schedule.sigma(times), schedule.lambda_(times)
    return Nodes(*(value.tolist() for value in values))


def uniform_times(schedule: SolverSchedule, n: int) -> Tensor:
    """n intervals of equal length in t, from schedule.t_end to schedule.t_start: float64 (n + 1,)."""
    return torch.linspace(schedule.t_end, schedule.t_start, n + 1, dtype=torch.float64)


def lambda_times(schedule: SolverSchedule, n: int) -> Tensor:
    """n intervals of equal length in lambda between the same ends: float64 (n + 1,)."""
    ends = torch.tensor([schedule.t_end, schedule.t_start], dtype=torch.float64)
    times = schedule.inverse_lambda(torch.linspace(*schedule.lambda_(ends).tolist(), n + 1, dtype=torch.float64))
    times[0], times[-1] = ends  # not a rounding error outside them
    return times


def karras_times(schedule: SolverSchedule, n: int, rho: float = 7.0) -> Tensor:
    """n intervals between the same ends, equal in (sigma / alpha)^(1 / rho) (EDM, arXiv 2206.00364, equation 5)."""
    ends = torch.tensor([schedule.t_end, schedule.t_start], dtype=torch.float64)
    first, last = (-schedule.lambda_(ends) / rho).exp().tolist()
    times = schedule.inverse_lambda(-rho * torch.linspace(first, last, n + 1, dtype=torch.float64).log())
    times[0], times[-1] = ends  # not a rounding error outside them
    return times


# --- DPM-Solver++ singlestep ------------------------------------------------------------------------------------------


def fast_orders(steps: int, order: int) -> list[int]:
    """Orders of the singlestep solver's steps so that they need exactly `steps` network evaluations in all.

    As many steps of the full order as fit, then lower ones to use up the rest (DPM-Solver, section 3.4 and appendix B).

    Raises:
        ValueError: an order other than 1, 2, 3, or fewer steps than the order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"the solver's order must be 1, 2 or 3; found {order}")
    if steps < order:
        raise ValueError(
            f"a solver of order {order} needs at least {order} steps; found {steps}: raise config.sample.sample_steps"
        )
    if order == 1:
        return [1] * steps
    if order == 2:
        return [2] * (steps // 2) + [1] * (steps % 2)
    whole = steps // 3
    return {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[steps % 3]


def dpm_solver_fast(noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, steps: int, order: int = 3) -> Tensor:
    """Sample from noise with DPM-Solver++ singlestep; the released models' sampler (order 3).

    The times are uniform in t from schedule.t_end to schedule.t_start.

    Args:
        noise_model: eps(x, t), called exactly `steps` times.
        x: noise at t_end (B, C, H, W), float32.
        steps: network evaluations, at least `order`.

    Returns:
        The sample at t_start, of the shape of x.

    Raises:
        ValueError: see `fast_orders`.
    """
    return dpm_solver_singlestep(noise_model, schedule, x, uniform_times(schedule, steps), fast_orders(steps, order))


@torch.no_grad()
def dpm_solver_singlestep(
    noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, times: Tensor, orders: list[int]
) -> Tensor:
    """DPM-Solver++ singlestep on given times: a step of order k takes k intervals, its inner nodes the times between.

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
            """The order-1 step from node s to node i."""
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
    """Weights w of x_t = sigma_t / sigma_s x_s + alpha_t (w[0] D_0 + w[1] D_1 + ...), the newest D first.

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
def dpm_solver_multistep(
    noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, times: Tensor, order: int
) -> Tensor:
    """DPM-Solver++ multistep: each step reuses the data predictions of the order - 1 before it.

    It starts with one singlestep step of one order less over as many intervals, which keeps the order of the whole (for
    order 2 that is the published start).

    Args:
        times: float64 (N + 1,), falling, N at least the order; noise_model is called once at each but the last.
        order: 2 or 3.

    Raises:
        ValueError: another order, or fewer steps than it.
    """
    if order not in (2, 3):
        raise ValueError(f"the multistep solver's order must be 2 or 3; found {order}")
    t, alpha, sigma, lam = at_nodes(schedule, times)
    n = len(t) - 1
    if n < order:
        raise ValueError(
            f"a solver of order {order} needs at least {order} steps; found {n}: raise config.sample.sample_steps"
        )
    weights = [multistep_weights(lam[i - order + 1 : i + 2]) for i in range(order - 1, n)]
    predictions = []  # of the data, newest first

    def remembering(x: Tensor, time: float) -> Tensor:
        eps, i = noise_model(x, time), len(predictions)
        predictions.insert(0, (x - sigma[i] * eps) / alpha[i])
        return eps

    x = dpm_solver_singlestep(remembering, schedule, x, times[:order], [order - 1])
    for i in range(order - 1, n):
        newest = (x - sigma[i] * noise_model(x, t[i])) / alpha[i]
        predictions = [newest, *predictions[: order - 1]]
        x = (sigma[i + 1] / sigma[i]) * x
        for weight, prediction in zip(weights[i - order + 1], predictions, strict=True):
            x = x + (alpha[i + 1] * weight) * prediction
    return x


# --- DDIM and DDPM ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def ddim(
    noise_model: NoiseModel,
    schedule: SolverSchedule,
    x: Tensor,
    times: Tensor,
    eta: float = 0.0,
    draw: Draw | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12); with eta = 1, ancestral sampling of DDPM with the smaller variance.

    Args:
        times: float64 (N + 1,), falling; noise_model is called once at each but the last.
        eta: share of the posterior's standard deviation that is drawn afresh at each move; the last draws none.
        draw: gives standard normal noise of the shape of x; from the global generator when None.
    """
    t, alpha, sigma, _ = at_nodes(schedule, times)
    last = len(t) - 2
    for i in range(last + 1):
        # The deviation of x_(i+1) given x_i and x_0 (Ho et al., arXiv 2006.11239, equation 7).
        posterior = sigma[i + 1] / sigma[i] * math.sqrt(1 - (alpha[i] / alpha[i + 1]) ** 2)
        fresh = eta * posterior
        eps = noise_model(x, t[i])
        x = (alpha[i + 1] / alpha[i]) * (x - sigma[i] * eps) + math.sqrt(sigma[i + 1] ** 2 - fresh**2) * eps
        if fresh and i < last:
            x = x + fresh * (draw() if draw else torch.randn_like(x))
    return x


# --- Heun -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heun(
    noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, times: Tensor, euler_last: bool = False
) -> Tensor:
    """Heun's method on d(x / alpha) / d(sigma / alpha) = eps (EDM, arXiv 2206.00364, algorithm 1 without churn).

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
    """An entry of `SOLVERS`, called as solver(noise_model, schedule, x, steps, draw).

    From noise x (B, C, H, W) at schedule.t_end to a sample at schedule.t_start, in exactly `steps` evaluations of the
    noise model.
    """

    solve: Callable[[NoiseModel, SolverSchedule, Tensor, int, Draw | None], Tensor]
    least_steps: int = 1
    draws: bool = False  # does it call draw?

    def __call__(
        self, noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, steps: int, draw: Draw | None
    ) -> Tensor:
        return self.solve(noise_model, schedule, x, steps, draw)


# Grids: uniform in t where the released sampler or the paper has it; in lambda for the multistep solvers, which are far
# more exact there (benchmarks/results/solvers.md); EDM's for heun.
SOLVERS: dict[str, Solver] = {
    "dpm_solver": Solver(lambda eps, schedule, x, steps, draw: dpm_solver_fast(eps, schedule, x, steps), least_steps=3),
    "dpm_solver_2m": Solver(
        lambda eps, schedule, x, steps, draw: dpm_solver_multistep(eps, schedule, x, lambda_times(schedule, steps), 2),
        least_steps=2,
    ),
    "dpm_solver_3m": Solver(
        lambda eps, schedule, x, steps, draw: dpm_solver_multistep(eps, schedule, x, lambda_times(schedule, steps), 3),
        least_steps=3,
    ),
    "ddim": Solver(lambda eps, schedule, x, steps, draw: ddim(eps, schedule, x, uniform_times(schedule, steps))),
    "ddpm": Solver(
        lambda eps, schedule, x, steps, draw: ddim(eps, schedule, x, uniform_times(schedule, steps), 1.0, draw),
        draws=True,
    ),
    "heun": Solver(
        lambda eps, schedule, x, steps, draw: heun(
            eps, schedule, x, karras_times(schedule, (steps + 1) // 2), euler_last=steps % 2 == 1
        )
    ),
}

SAMPLERS: dict[str, Solver] = {
    **SOLVERS,
    "euler_maruyama_sde": Solver(
        lambda eps, schedule, x, steps, draw: euler_maruyama(eps, schedule, x, steps, draw=draw), draws=True
    ),
    "euler_maruyama_ode": Solver(
        lambda eps, schedule, x, steps, draw: euler_maruyama(eps, schedule, x, steps, ode=True)
    ),
}


def solve(
    noise_model: NoiseModel,
    schedule: Schedule,
    x: Tensor,
    algorithm: str,
    steps: int,
    order: int = 3,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """From noise x (B, C, H, W) to a sample of its shape, in `steps` evaluations of eps(x, t).

    Args:
        algorithm: a key of `SAMPLERS`.
        order: of the algorithm dpm_solver.
        draw: gives standard normal noise of the shape of x, where the algorithm draws any.
    """
    if algorithm == "dpm_solver":
        return dpm_solver_fast(noise_model, schedule, x, steps, order)
    return SAMPLERS[algorithm](noise_model, schedule, x, steps, draw)
