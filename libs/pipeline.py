"""A trained model as a pipeline of Hugging Face diffusers: one folder, loaded and called as its other pipelines are.

    from libs.pipeline import DiMRPipeline

    pipe = DiMRPipeline.from_pretrained("digits")  # a folder of scripts/convert_checkpoint.py
    images = pipe(class_labels=[3, "7"], seed=1234).images

The pipeline's scheduler, `SolverScheduler`, holds the noise schedule and the solver.
"""

import inspect
import numbers
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from libs import UserError
from libs.autoencoder import Autoencoder, check_finite, finite, float_to_uint8
from libs.dimr import DiMR, StageSpec
from libs.model import class_label
from libs.randomness import SampleNoise
from libs.solvers import SOLVERS, check_guidance, check_steps
from sde import DiscreteSchedule, NoiseModel, get_schedule, guided_noise_model

Generators = torch.Generator | list[torch.Generator] | None


class DiMRNetwork(DiMR, ModelMixin, ConfigMixin):
    """`DiMR`, saved and loaded by diffusers: config.json and diffusion_pytorch_model.safetensors, in our names.

    Args:
        branches: the fields of each `StageSpec`, coarsest first; the others are as of `DiMR`.
    """

    @register_to_config
    def __init__(
        self,
        branches: Sequence[dict],  # not `stages`: to diffusers an argument and a submodule of one name are the same
        channels: int = 4,
        n_classes: int = 1000,
        norm_type: str = "TDRMSN",
        block_grad_to_lowres: bool = False,
    ):
        specs = [StageSpec(**branch) for branch in branches]
        super().__init__(specs, channels, n_classes, norm_type, block_grad_to_lowres)

    @classmethod
    def of(cls, nnet: DiMR, norm_type: str) -> "DiMRNetwork":
        """Wrap a network: the same tensors, in eval mode."""
        branches = [asdict(stage.spec) for stage in nnet.stages]
        with torch.device("meta"):
            network = cls(branches, nnet.channels, nnet.n_classes, norm_type, nnet.block_grad_to_lowres)
        network.load_state_dict(nnet.state_dict(), assign=True)
        return network.eval().requires_grad_(False)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the training data: latents, or pixels."""
        finest = self.stages[-1].spec
        return self.channels, finest.max_height, finest.max_width


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule and a solver, saved and loaded as a pipeline's scheduler.

    Solvers call the noise model themselves, so there is no step().

    Args:
        schedule: a key of `sde.SCHEDULES`.
        algorithm: a key of `SOLVERS`.
        num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type, clip_sample: the schedule sd in
            diffusers' terms, for SomeScheduler.from_config(pipe.scheduler.config).
    """

    @register_to_config
    def __init__(
        self,
        schedule: str = "sd",
        algorithm: str = "dpm_solver",
        num_train_timesteps: int = DiscreteSchedule.n_timesteps,
        beta_start: float = DiscreteSchedule.beta_start,
        beta_end: float = DiscreteSchedule.beta_end,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
    ):
        self.register_to_config(_use_default_values=[])  # or another scheduler's from_config takes its own defaults


class DiMRPipeline(DiffusionPipeline):
    """Sample pictures of classes.

    Args:
        network: the noise predictor.
        scheduler: SolverScheduler, or a scheduler of diffusers for the same noise schedule (see `check_scheduler`).
        vae: autoencoder of a latent model; None: the network works on pixels.
        schedule: noise schedule that the network was trained with; None: the scheduler's.
        id2label: {label: name}, so that classes can be called by names; their numbers where there is none.
        defaults: guidance_scale, guidance_power, guidance_interval and num_inference_steps of a call that gives none.
        trained: {"config": of the run, as JSON values, "step"}, which `libs.checkpoint.saved_settings` reads again.
    """

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        network: DiMRNetwork,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        schedule: str | None = None,
        id2label: dict | None = None,
        defaults: dict | None = None,
        trained: dict | None = None,
    ):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        schedule = schedule or scheduler.config.get("schedule", "sd")
        self.register_to_config(schedule=schedule, id2label=id2label, defaults=defaults, trained=trained)
        names = {int(label): name for label, name in (id2label or {}).items()}
        self.names = [names.get(label, str(label)) for label in range(network.n_classes)]
        self.autoencoder = None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one picture per label.

        Picture i is that of eval.py with config.seed = `seed` for the index indices[i] and the same label, to the bit
        where the batch is the same too and nothing is compiled. Put torch.autocast around a call for --mixed_precision.
        Guidance and steps that are None are the pipeline's `defaults`.

        Args:
            class_labels: numbers or names. The number of classes itself is no class, so [0] * n gives n pictures of a
                model without classes; None gives one.
            guidance_scale: w of eps = uncond + w (cond - uncond); 1: none.
            num_inference_steps: NFE; of a scheduler of diffusers, its steps.
            generator: draws the noise, as in diffusers, in place of `seed` and `indices`.
            indices: of the pictures in a set; None: 0, 1, ...
            guidance_power: of the power-cosine schedule; 0: constant.
            guidance_interval: (low, high) in sigma / alpha where guidance applies; (0, inf): everywhere.
            output_type: pil, np (float32, B H W 3, in [0, 1]), pt (the same, B 3 H W) or latent (B C h w, not decoded).

        Raises:
            UserError: labels, settings or a scheduler that cannot be used.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type must be pil, np, pt or latent; found {output_type!r}")
        if class_labels is None:
            if self.network.n_classes:
                raise UserError(f"class_labels is not set: this model has {self.network.n_classes} classes")
            class_labels = 0
        if isinstance(class_labels, numbers.Integral | str):
            class_labels = [class_labels]
        labels, device = [class_label(word, self.names) for word in class_labels], self._execution_device
        saved = {"guidance_scale": 1.0, "num_inference_steps": 50, **(self.config.defaults or {})}
        scale = saved["guidance_scale"] if guidance_scale is None else guidance_scale
        power = saved.get("guidance_power") if guidance_power is None else guidance_power
        interval = saved.get("guidance_interval") if guidance_interval is None else guidance_interval
        steps = saved["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        check_guidance(scale, power, interval)
        if generator is None:
            indices = range(len(labels)) if indices is None else indices
            if len(indices) != len(labels):
                raise UserError(f"indices must be one per label; found {len(indices)} for {len(labels)} labels")
            draw = SampleNoise(indices, seed, self.network.sample_shape, device).draw
            generator = torch.Generator(device).manual_seed(seed)  # of a scheduler of diffusers
        else:
            shape, noises = (len(labels), *self.network.sample_shape), generator

            def draw() -> Tensor:
                return randn_tensor(shape, generator=noises, device=device, dtype=torch.float32)

        y, schedule = torch.tensor(labels, device=device), get_schedule(self.config.schedule)
        guided = guided_noise_model(self.network, schedule, y, self.network.null_label, scale, power, interval)
        with self.progress_bar(total=steps) as progress:

            def noise_model(x: Tensor, t: float) -> Tensor:
                progress.update()
                return guided(x, t)

            if isinstance(self.scheduler, SolverScheduler):
                check_steps(self.scheduler.config.algorithm, steps, "num_inference_steps")
                x = SOLVERS[self.scheduler.config.algorithm](noise_model, schedule, draw(), steps, draw)
            else:
                x = self.step_by_step(noise_model, draw(), steps, generator)
        images = x if output_type == "latent" else self.as_output(self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def step_by_step(self, noise_model: NoiseModel, x: Tensor, steps: int, generator: Generators) -> Tensor:
        """Sample from noise x (B, C, H, W) with a scheduler of diffusers, whose index k is time (k + 1) / N here."""
        scheduler = self.scheduler
        check_scheduler(scheduler, self.config.schedule)
        scheduler.set_timesteps(steps, device=x.device)
        times = ((scheduler.timesteps.cpu().double() + 1) / scheduler.config.num_train_timesteps).tolist()
        if times[0] < times[-1]:
            raise UserError(f"{type(scheduler).__name__} goes from images to noise: take another scheduler")
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = x * scheduler.init_noise_sigma
        for k, t in zip(scheduler.timesteps, times, strict=True):
            eps = noise_model(scheduler.scale_model_input(x, k), t)
            x = scheduler.step(eps, k, x, **extra).prev_sample
        return x

    def decode(self, x: Tensor) -> Tensor:
        """Decode samples to images (B, 3, H, W) with the `vae` that is set now."""
        if self.vae is None:
            return x
        if self.autoencoder is None or self.autoencoder.vae is not self.vae:
            self.autoencoder = Autoencoder(self.vae, device=self.vae.device)
        with torch.autocast(x.device.type, enabled=False):
            return self.autoencoder.decode(x.float())

    def as_output(self, images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        """Convert images (B, 3, H, W) in [-1, 1]; raise an error for NaN and infinity."""
        check_finite(finite(images))
        images = float_to_uint8(images)
        if output_type == "pt":
            return images / 255
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in images] if output_type == "pil" else images / np.float32(255)


def check_scheduler(scheduler: SchedulerMixin, schedule: str) -> None:
    """Raise UserError unless a scheduler of diffusers has the network's noise schedule, and that is sd."""
    config, table = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    expected = DiscreteSchedule().table.exp()
    problem = None
    if schedule != "sd":
        problem = f"the network's schedule is {schedule}, of continuous times"
    elif table is None:
        problem = "it has no discrete noise schedule (alphas_cumprod)"
    elif len(table) != len(expected) or not torch.allclose(table.double().cpu(), expected, rtol=1e-4):
        problem = "it has another noise schedule"
    elif config.get("prediction_type") != "epsilon":
        problem = f"prediction_type is {config.get('prediction_type')}, not epsilon"
    elif config.get("clip_sample") or config.get("thresholding"):
        problem = "it clips samples (clip_sample, thresholding)"
    if problem:
        name = type(scheduler).__name__
        raise UserError(f"{name}: {problem}; use SolverScheduler, or {name}.from_config(SolverScheduler().config)")
