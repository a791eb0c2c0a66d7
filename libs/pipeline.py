"""A trained model in the form of Hugging Face diffusers: one folder, loaded and called as its other pipelines are.

    from libs.pipeline import DiMRPipeline

    pipe = DiMRPipeline.from_pretrained("digits")  # a folder of scripts/convert_checkpoint.py
    images = pipe(class_labels=[3, "7"], seed=1234).images

The noise schedule, the guidance and the solver come in as the pipeline's scheduler, `SolverScheduler`.
"""

import inspect
import json
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from libs.autoencoder import Autoencoder
from libs.checkpoint import PIPELINE_FILE, STATE_FILE
from libs.class_names import class_label
from libs.dimr import DiMR, StageSpec
from libs.pictures import check_finite, finite, to_uint8
from libs.randomness import SampleNoise
from libs.solvers import solve
from sde import get_schedule, guided_noise_model

Generators = torch.Generator | list[torch.Generator] | None

# alpha_bar of the discrete schedule sd at its 1000 times, as diffusers' schedulers have it.
SD_ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)

SAVED = "saved"  # in place of a value: the one saved with the pipeline


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
        super().__init__(
            [StageSpec(**branch) for branch in branches], channels, n_classes, norm_type, block_grad_to_lowres
        )

    @classmethod
    def of(cls, nnet: DiMR, norm_type: str) -> "DiMRNetwork":
        """A network with the weights (the same tensors) of another, in eval mode."""
        with torch.device("meta"):
            network = cls(
                [asdict(stage.spec) for stage in nnet.stages],
                nnet.channels,
                nnet.n_classes,
                norm_type,
                nnet.block_grad_to_lowres,
            )
        network.load_state_dict(nnet.state_dict(), assign=True)
        return network.eval().requires_grad_(False)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what it was trained on: latents, or pixels."""
        finest = self.stages[-1].spec
        return self.channels, finest.max_height, finest.max_width


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A schedule and a solver in the form in which diffusers saves and loads a pipeline's scheduler.

    A solver here calls the noise model itself, so there is `sample` in place of diffusers' step by step interface.

    Args:
        schedule: a key of `sde.SCHEDULES`.
        algorithm, order: of `solve`.
        num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type, clip_sample: the schedule sd as
            diffusers' own schedulers have it, which are made by SomeScheduler.from_config(pipe.scheduler.config).
    """

    @register_to_config
    def __init__(
        self,
        schedule: str = "sd",
        algorithm: str = "dpm_solver",
        order: int = 3,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
    ):
        self.schedule = get_schedule(schedule)
        self.register_to_config(_use_default_values=[])  # or another scheduler's from_config takes its own defaults

    def sample(
        self,
        nnet: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        labels: Tensor,
        null_label: int,
        x: Tensor,
        steps: int,
        scale: float = 1.0,
        power: float | None = None,
        interval: tuple[float, float] | None = None,
        draw: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """A guided sample (B, C, H, W) from noise x; arguments as of `guided_noise_model` and `solve`."""
        noise_model = guided_noise_model(nnet, self.schedule, labels, null_label, scale, power, interval)
        return solve(noise_model, self.schedule, x, self.config.algorithm, steps, self.config.order, draw)


class DiMRPipeline(DiffusionPipeline):
    """From class labels to pictures.

    Args:
        network: the noise predictor.
        scheduler: SolverScheduler, or a scheduler of diffusers for the same noise schedule (see `check_scheduler`).
        vae: autoencoder of a latent model; None: the network works on pixels.
        schedule: the noise schedule that the network was trained with; None: the scheduler's.
        id2label: {label: name}, so that classes can be called by their names; their number where there is none.
        defaults: guidance_scale, guidance_power, guidance_interval and num_inference_steps of a call that gives none.
        trained: {"config": of the run, as JSON values, "step"}, kept with the weights where the pipeline is saved.
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
        self.defaults = {"guidance_scale": 1.0, "guidance_power": None, "guidance_interval": None}
        self.defaults |= {"num_inference_steps": 50, **(defaults or {})}
        self.autoencoder = None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """See diffusers. The weights are in one file, and what is known of them is beside it, as in a checkpoint."""
        super().save_pretrained(save_directory, **{"max_shard_size": "1TB", **kwargs})
        if self.config.trained:
            state = Path(save_directory, PIPELINE_FILE).with_name(STATE_FILE)
            state.write_text(json.dumps({**self.config.trained, "class_names": self.names}, indent=1))

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) of samples, by the `vae` that is set now."""
        if self.vae is None:
            return x
        if self.autoencoder is None or self.autoencoder.vae is not self.vae:
            self.autoencoder = Autoencoder(self.vae, device=self.vae.device)  # has latents' scale and range
        with torch.autocast(x.device.type, enabled=False):
            return self.autoencoder.decode(x.float())

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        guidance_power: float | str | None = SAVED,
        guidance_interval: tuple[float, float] | str | None = SAVED,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one picture per label.

        Picture i is that of eval.py with config.seed = `seed` for the index indices[i] and the same label, to the bit
        where the batch is the same too and nothing is compiled. `--mixed_precision` there is torch.autocast around a
        call here.

        Args:
            class_labels: numbers or names; the number of classes itself is no class, so that [0] * n are n pictures of
                a model without classes (None: one).
            guidance_scale: eps = uncond + scale (cond - uncond); 1 is none.
            num_inference_steps: network evaluations (of diffusers' schedulers: its steps).
            generator: where noise is drawn from, as in diffusers; in place of `seed` and `indices`. Without either,
                two calls give the same pictures: those of seed 0.
            indices: of the pictures in a set; None: 0, 1, ...
            guidance_power, guidance_interval: power of the power-cosine schedule, and the noise levels (sigma / alpha)
                at which there is guidance; None: none. For SolverScheduler only.
            output_type: pil, np (float32, B H W 3, in [0, 1]), pt (the same, B 3 H W) or latent (B C h w, not decoded).

        Raises:
            ValueError: labels, settings or a scheduler that cannot be used.
        """
        if class_labels is None:
            if self.network.n_classes:
                raise ValueError(f"class_labels is not set: this model has {self.network.n_classes} classes")
            class_labels = 0
        if isinstance(class_labels, numbers.Integral | str):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("class_labels must hold a label for each picture; found none")
        labels = [class_label(word, self.names) for word in class_labels]
        indices = range(len(labels)) if indices is None else indices
        if len(indices) != len(labels):
            raise ValueError(f"indices must be one per label; found {len(indices)} for {len(labels)} labels")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent; found {output_type!r}")
        if self.network.dtype != torch.float32:
            raise ValueError(
                f"the network must be in float32 (torch.autocast around the call computes in less); found "
                f"{self.network.dtype}: leave out torch_dtype"
            )
        device = self._execution_device
        if generator is None:
            draw = SampleNoise(indices, seed, self.network.sample_shape, device).draw
        else:
            shape = (len(labels), *self.network.sample_shape)

            def draw() -> Tensor:
                return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        saved = self.defaults
        scale = saved["guidance_scale"] if guidance_scale is None else guidance_scale
        steps = saved["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        power = saved["guidance_power"] if guidance_power == SAVED else guidance_power
        interval = saved["guidance_interval"] if guidance_interval == SAVED else guidance_interval
        y, null = torch.tensor(labels, device=device), self.network.null_label
        if callable(getattr(self.scheduler, "sample", None)):  # of diffusers' schedulers some have it, and it is None
            with self.progress_bar(total=steps) as progress:

                def network(*inputs: Tensor) -> tuple[Tensor, ...]:
                    progress.update()
                    return self.network(*inputs)

                x = self.scheduler.sample(network, y, null, draw(), steps, scale, power, interval, draw)
        else:
            if scale != 1 and (power is not None or interval is not None):
                raise ValueError(
                    f"{type(self.scheduler).__name__} guides at a constant scale only: set guidance_power=None and "
                    "guidance_interval=None, or take SolverScheduler"
                )
            own = generator if generator is not None else torch.Generator(device).manual_seed(seed)
            x = self.step_by_step(draw(), y, steps, scale, own)
        images = x if output_type == "latent" else self.as_output(self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def step_by_step(self, x: Tensor, y: Tensor, steps: int, scale: float, generator: Generators) -> Tensor:
        """Sample with a scheduler of diffusers, from noise x (B, C, H, W); guidance at a constant scale.

        Its index k is this project's time (k + 1) / N, of which the network is told 2 t - 1 (sde.DiscreteSchedule).
        """
        check_scheduler(self.scheduler, self.config.schedule)
        n = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(steps, device=x.device)
        if self.scheduler.timesteps[0] < self.scheduler.timesteps[-1]:
            raise ValueError(f"{type(self.scheduler).__name__} goes from images to noise: take another scheduler")
        more = {"generator": generator} if takes(self.scheduler.step, "generator") else {}
        both = torch.cat([y, torch.full_like(y, self.network.null_label)])
        x = x * self.scheduler.init_noise_sigma
        for k in self.progress_bar(self.scheduler.timesteps):
            time = (2 * (k.double() + 1) / n - 1).float().view(1)
            scaled = self.scheduler.scale_model_input(x, k)
            if scale == 1:
                eps = self.network(scaled, time, y)[-1].float()
            else:
                eps, uncond = self.network(torch.cat([scaled, scaled]), time, both)[-1].float().chunk(2)
                eps = torch.lerp(uncond, eps, scale)
            x = self.scheduler.step(eps, k, x, **more).prev_sample
        return x

    def as_output(self, images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        """Images (B, 3, H, W) in [-1, 1] in the form asked for. Raises ValueError for NaN and infinity."""
        check_finite(finite(images))
        images = to_uint8(images)
        if output_type == "pt":
            return images / 255
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in images] if output_type == "pil" else images / np.float32(255)


def check_scheduler(scheduler: SchedulerMixin, schedule: str) -> None:
    """Raises ValueError unless a scheduler of diffusers has the network's noise schedule, and that is sd."""
    name = type(scheduler).__name__
    if schedule != "sd":
        raise ValueError(f"{name} has discrete times, but this network's schedule is {schedule}: use SolverScheduler")
    table, config = getattr(scheduler, "alphas_cumprod", None), scheduler.config
    problem = None
    if table is None:
        problem = "it has no discrete noise schedule (alphas_cumprod)"
    elif len(table) != len(SD_ALPHAS_CUMPROD) or not torch.allclose(table.double().cpu(), SD_ALPHAS_CUMPROD, rtol=1e-4):
        problem = "it has another noise schedule"
    elif config.get("prediction_type") != "epsilon":
        problem = f"prediction_type is {config.get('prediction_type')}, not epsilon"
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting):
            problem = f"{setting} is on, which is for pixels in [-1, 1]"
    if problem:
        way_out = f"try {name}.from_config(pipe.scheduler.config)" if table is not None else "take another"
        raise ValueError(f"{name} does not fit this network: {problem}; {way_out}")


def takes(function: Callable, name: str) -> bool:
    """Has the function a parameter of that name?"""
    return name in inspect.signature(function).parameters
