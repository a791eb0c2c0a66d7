"""A noise schedule and one of our solvers as a scheduler of Hugging Face diffusers."""

import contextlib
from collections.abc import Callable
from typing import ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from libs import UserError
from libs.solvers import SOLVERS, check_steps
from sde import DiscreteSchedule, NoiseModel, get_schedule


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule and a solver, saved and loaded as a pipeline's scheduler.

    A timestep k, maybe a fraction, stands for the time (k + 1) / num_train_timesteps.

    Args:
        schedule: a key of `sde.SCHEDULES`.
        algorithm: a key of `SOLVERS`.
        time_shift: of `sde.shift_times`.
        num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type, clip_sample: the schedule sd in
            diffusers' terms, for SomeScheduler.from_config(pipe.scheduler.config).
    """

    _compatibles: ClassVar[list[str]] = [s.name for s in KarrasDiffusionSchedulers if s.name != "EDMEulerScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        schedule: str = "sd",
        algorithm: str = "dpm_solver",
        time_shift: float = 1.0,
        num_train_timesteps: int = DiscreteSchedule.n_timesteps,
        beta_start: float = DiscreteSchedule.beta_start,
        beta_end: float = DiscreteSchedule.beta_end,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
    ):
        if defaults := self.config.get("_use_default_values"):  # another's from_config takes its own for what is listed
            own = [name for name in ("schedule", "algorithm", "time_shift") if name in defaults]
            self.register_to_config(_use_default_values=own)

    def solve(self, noise_model: NoiseModel, x: Tensor, steps: int, draw: Callable[[], Tensor]) -> Tensor:
        """Sample from noise x (B, C, H, W) with an NFE of `steps`."""
        check_steps(self.config.algorithm, steps, "num_inference_steps")
        schedule, solver = get_schedule(self.config.schedule), SOLVERS[self.config.algorithm]
        return solver(noise_model, schedule, x, steps, draw, self.config.time_shift)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begin a sample: list in `timesteps` where the solver evaluates the network."""
        times, nothing = [], torch.zeros(1)
        self.solve(lambda x, t: times.append(t) or nothing, nothing, num_inference_steps, lambda: nothing)
        self.timesteps = torch.tensor([t * self.config.num_train_timesteps - 1 for t in times], device=device)
        self.outputs, self.draws = [], []

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from `sample` to where the solver evaluates the network next, after the last timestep to the result.

        Solvers call the noise model themselves, so each step runs the solver anew on the outputs until now: the same
        numbers as `solve`, in time quadratic in the number of steps, which next to a network is little. Raises
        UserError where `sample` is not what the step before returned: a solver's inner steps cannot be altered.
        """
        if len(self.outputs) in (0, len(self.timesteps)):
            self.outputs, self.draws, self.start = [], [], sample
        elif not torch.equal(sample, self.previous):
            raise UserError("SolverScheduler cannot go on from an altered sample: use a scheduler of `compatibles`")
        self.outputs.append(model_output)
        if SOLVERS[self.config.algorithm].draws:
            self.draws.append(randn_tensor(sample.shape, generator, sample.device, sample.dtype))
        outputs, draws = iter(self.outputs), iter(self.draws)

        def noise_model(x: Tensor, t: float) -> Tensor:
            self.previous = x
            return next(outputs)

        with contextlib.suppress(StopIteration):  # where the solver asks for an output that is not there yet
            self.previous = self.solve(noise_model, self.start, len(self.timesteps), lambda: next(draws))
        return SchedulerOutput(prev_sample=self.previous) if return_dict else (self.previous,)
