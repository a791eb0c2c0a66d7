"""Samplers as pure functions of a noise model: DPM-Solver++ singlestep, "fast" (orders 1 to 3).

Lu et al., DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095). Notation as there: lambda is half the
log-SNR, h a step in lambda, r1 and r2 the places of inner nodes as shares of h, D the data prediction.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

NoiseModel = Callable[[Tensor, float], Tensor]  # eps(x, t): x (B, C, H, W), one time t for the batch


class SolverSchedule(Protocol):
    """What a solver asks of a noise schedule (see sde.Schedule); all take and return float64 tensors."""

    t_start: float
    t_end: float

    def log_alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def lambda_(self, t: Tensor) -> Tensor: ...


def fast_orders(steps: int, order: int) -> list[int]:
    """Orders of the singlestep solver's steps so that they need exactly `steps` network evaluations in all.

    As many steps of the full order as fit, then lower ones to use up the rest (DPM-Solver, section 3.4 and appendix B).

    Raises:
        ValueError: an order other than 1, 2, 3, or fewer steps than the order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"the solver's order must be 1, 2 or 3; found {order}")
    if steps < order:
        raise ValueError(f"a solver of order {order} needs at least {order} steps; found {steps}: raise sample.steps")
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
    times = torch.linspace(schedule.t_end, schedule.t_start, steps + 1, dtype=torch.float64)
    return dpm_solver_singlestep(noise_model, schedule, x, times, fast_orders(steps, order))


@torch.no_grad()
def dpm_solver_singlestep(
    noise_model: NoiseModel, schedule: SolverSchedule, x: Tensor, times: Tensor, orders: list[int]
) -> Tensor:
    """DPM-Solver++ singlestep on given times: a step of order k takes k intervals, its inner nodes the times between.

    All coefficients are made on the host in float64 before the first evaluation, so nothing in the loop waits for the
    device.

    Args:
        times: float64 (N + 1,), falling; noise_model is called once at each but the last.
        orders: the order (1, 2 or 3) of each step; they add up to N.
    """
    t, alpha, sigma, lam = (
        values.tolist()
        for values in (times, schedule.log_alpha(times).exp(), schedule.sigma(times), schedule.lambda_(times))
    )

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
