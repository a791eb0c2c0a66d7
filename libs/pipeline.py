"""A trained model as a pipeline of Hugging Face diffusers: one folder, loaded and called as its other pipelines are.

    pipe = DiMRPipeline.from_pretrained("digits")  # a folder of scripts/convert_checkpoint.py
    images = pipe(class_labels=[3, "7"], seed=1234).images

The folder holds the code too: without this repository, DiffusionPipeline.from_pretrained("digits",
trust_remote_code=True) loads it.
"""

import functools
import importlib
import inspect
import json
import math
import numbers
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from libs import UserError
from libs.class_names import class_label
from libs.randomness import SampleNoise
from sde import DiffusionModel, DiscreteSchedule, get_schedule, guided_predictions

OUTPUTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}  # diffusers' prediction_type: one of sde.PREDICTIONS

Generators = torch.Generator | list[torch.Generator] | None


class DiMRPipeline(DiffusionPipeline):
    """Sample pictures of classes.

    Args:
        transformer: the noise predictor, a `libs.network.DiMRNetwork`.
        scheduler: `libs.scheduler.SolverScheduler`, or a scheduler of diffusers for the same noise schedule (see
            `check_scheduler`).
        vae: autoencoder of a latent model; None: the network works on pixels.
        schedule: noise schedule that the network was trained with; None: the scheduler's.
        id2label: {label: name}, so that classes can be called by names; their numbers where there is none.
        defaults: guidance_scale, guidance_power, guidance_interval and num_inference_steps of a call that gives none.
        trained: {"config": of the run, as JSON values, "step"}, which `libs.checkpoint.saved_settings` reads again.
        prediction: what the network predicts, one of `sde.PREDICTIONS`.

    Attributes:
        labels: {name: label}, sorted by name.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        schedule: str | None = None,
        id2label: dict | None = None,
        defaults: dict | None = None,
        trained: dict | None = None,
        prediction: str = "eps",
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        schedule = schedule or scheduler.config.get("schedule", "sd")
        self.register_to_config(schedule=schedule, prediction=prediction)
        self.register_to_config(id2label=id2label, defaults=defaults, trained=trained)
        names = {int(label): name for label, name in (id2label or {}).items()}
        self.names = [names.get(label, str(label)) for label in range(transformer.n_classes)]
        self.labels = dict(sorted((name, label) for label, name in names.items()))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the labels of classes given by their names or numbers. Raises UserError for one that is none."""
        return [class_label(word, self.names) for word in flatten(label)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | int | str | None = None,
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
            UserError: labels, settings or components that cannot be used, before anything is computed.
        """
        if class_labels is None:
            if self.transformer.n_classes:
                raise UserError(f"class_labels is not set: this model has {self.transformer.n_classes} classes")
            class_labels = 0
        labels, device = self.get_label_ids(class_labels), self._execution_device
        saved = {"guidance_scale": 1.0, "num_inference_steps": 50, **(self.config.defaults or {})}
        scale = saved["guidance_scale"] if guidance_scale is None else guidance_scale
        power = saved.get("guidance_power") if guidance_power is None else guidance_power
        interval = saved.get("guidance_interval") if guidance_interval is None else guidance_interval
        steps = saved["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        indices = list(range(len(labels))) if indices is None else flatten(indices)
        check_guidance(scale, power, interval)
        check_draws(len(labels), steps, generator, seed, indices)
        check_scheduler(self.scheduler, self.config.schedule, self.config.prediction)
        check_output(output_type, self.vae, self.transformer.channels)

        if generator is None:
            draw = SampleNoise(indices, seed, self.transformer.sample_shape, device).draw
            generator = torch.Generator(device).manual_seed(seed)  # of a scheduler of diffusers
        else:
            shape, noises = (len(labels), *self.transformer.sample_shape), generator

            def draw() -> Tensor:
                return randn_tensor(shape, generator=noises, device=device, dtype=torch.float32)

        network = functools.partial(self.transformer, return_dict=False)
        y, schedule = torch.tensor(labels, device=device), get_schedule(self.config.schedule)
        guidance, prediction = (self.transformer.null_label, scale, power, interval), self.config.prediction
        guided = guided_predictions(network, schedule, y, *guidance, prediction=prediction)
        with self.progress_bar(total=steps) as progress:

            def finest(x: Tensor, t: float) -> Tensor:
                progress.update()
                return guided(x, t)[-1]

            model = DiffusionModel(finest, schedule, prediction)
            if hasattr(self.scheduler, "solve"):
                x = self.scheduler.solve(model, draw(), steps, draw)
            else:
                x = self.step_by_step(model, draw(), steps, generator)
        images = x if output_type == "latent" else as_output(self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def step_by_step(self, model: DiffusionModel, x: Tensor, steps: int, generator: Generators) -> Tensor:
        """Sample from noise x (B, C, H, W) with a scheduler of diffusers.

        Its timestep k is time (k + 1) / N here, and k / N on the linear path, where it takes the velocity.
        """
        scheduler, linear = self.scheduler, self.config.schedule == "linear"
        wanted = "v" if linear else OUTPUTS[scheduler.config.prediction_type]
        scheduler.set_timesteps(steps, device=x.device)
        first = 0 if linear else 1
        times = ((scheduler.timesteps.cpu().double() + first) / scheduler.config.num_train_timesteps).tolist()
        if times[0] < times[-1]:
            raise UserError(f"{type(scheduler).__name__} goes from images to noise: take another scheduler")
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = x if linear else x * scheduler.init_noise_sigma
        for k, t in zip(scheduler.timesteps, times, strict=True):
            output = model.output(x if linear else scheduler.scale_model_input(x, k), t, wanted)
            x = scheduler.step(output, k, x, **extra).prev_sample
        return x

    def decode(self, x: Tensor) -> Tensor:
        """Decode samples to images (B, 3, H, W) float32 with the `vae` that is set now, in its precision.

        Offloaded weights come to the device that their hooks name; others are computed with where they are.
        """
        vae = self.vae
        if vae is None:
            return x
        device = self._execution_device if hasattr(vae, "_hf_hook") else vae.device
        latents = x.to(device, vae.dtype) / vae.config.scaling_factor
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([vae.decode(part).sample.clamp(-1, 1).float() for part in latents.split(16)])

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Write model_index.json, and beside it and in the folders of components one file each with their code.

        Places on this machine are left out: absolute paths of the run's config become names.
        """
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["trained"] = without_places(index["trained"])
        for name, part in [("_class_name", self), *self.components.items()]:
            module, place = type(part).__module__, folder if part is self else folder / name
            if module.split(".")[0] in ("libs", "diffusers_modules"):  # at home, or loaded from a folder
                index[name] = [PREFIX + module.rpartition(".")[2].removeprefix(PREFIX), type(part).__name__]
                place.mkdir(exist_ok=True)
                (place / f"{index[name][0]}.py").write_text(code_of(module, set()))
        (folder / self.config_name).write_text(json.dumps(index))
        for file in [folder / self.config_name, *folder.glob("*/*config.json")]:
            values = json.loads(file.read_text())
            values.pop("_name_or_path", None)
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """Read model_index.json. A class that is called by itself takes its own code, not what is in the folder."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        package, _, own = __name__.rpartition(".")
        for name, value in index.items():
            if isinstance(value, list) and str(value[0]).startswith(PREFIX):
                module = f"{package}.{own.replace('pipeline', value[0].removeprefix(PREFIX))}"
                importlib.import_module(module)
                index[name] = cls.__name__ if name == "_class_name" else [module, value[1]]
        return loaded


def flatten(values: object) -> list:
    """Return what is in nested sequences, tensors and arrays as a flat list; a list of one for anything else."""
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(values, (list, tuple, range)):
        return [values]
    return [each for value in values for each in flatten(value)]


def as_output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Convert images (B, 3, H, W) in [-1, 1]; raise UserError for NaN and infinity."""
    if bad := int((~images.isfinite()).flatten(1).any(dim=1).sum()):
        raise UserError(
            f"{bad} of {len(images)} images came out with NaN or infinity: the weights are damaged or diverged, or "
            "float16 overflows (load in torch.bfloat16 or torch.float32)"
        )
    images = (images.clamp(-1, 1) + 1) / 2
    if output_type == "pt":
        return images
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(images) if output_type == "pil" else images


# --- What cannot work -------------------------------------------------------------------------------------------------


def expect(name: str, found: object, fits: bool, expected: str) -> None:
    """Raise UserError unless an argument `fits`."""
    if not fits:
        raise UserError(f"{name} must be {expected}; found {found!r}")


def is_number(value: object, least: float, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and least <= value < 2**63  # neither NaN nor infinity


def check_guidance(scale: float, power: float | None, interval: Sequence[float] | None) -> None:
    """Raise UserError for guidance that is none."""
    expect("guidance_scale", scale, is_number(scale, 1), "a number of at least 1 (1: none)")
    expect("guidance_power", power, power is None or is_number(power, 0), "a number of at least 0 (0: constant)")
    low, high, *more = *flatten((0, math.inf) if interval is None else interval), None, None
    fits = len(more) == 2 and is_number(low, 0) and isinstance(high, numbers.Real) and low < high
    expect("guidance_interval", interval, fits, "(low, high) with 0 <= low < high")


def check_draws(n: int, steps: int, generator: Generators, seed: int, indices: Sequence[int]) -> None:
    """Raise UserError unless n samples can be drawn so."""
    several, whole = flatten(generator), numbers.Integral
    expect("the number of class_labels", n, n > 0, "at least 1")
    expect("num_inference_steps", steps, is_number(steps, 1, whole), "a whole number of at least 1")
    expect("seed", seed, is_number(seed, 0, whole), "a whole number in 0..2^63 - 1")
    fits = len(indices) == n and all(is_number(index, 0, whole) for index in indices)
    expect("indices", indices, fits, f"one whole number of at least 0 per label ({n})")
    fits = len(several) in (1, n) and all(isinstance(each, torch.Generator) for each in several)
    expect("generator", generator, generator is None or fits, f"a torch.Generator or a list of one per label ({n})")


def check_output(output_type: str, vae: ModelMixin | None, channels: int) -> None:
    """Raise UserError unless samples of so many channels can become such an output."""
    expect("output_type", output_type, output_type in ("pil", "np", "pt", "latent"), "pil, np, pt or latent")
    if output_type == "latent" or (vae is None and channels == 3):
        return
    config, shifts = getattr(vae, "config", {}), ("shift_factor", "latents_mean", "latents_std")
    found = "none" if vae is None else f"{type(vae).__name__} of {config.get('latent_channels')} channels"
    if not (hasattr(vae, "decode") and config.get("latent_channels") == channels):
        raise UserError(f"vae must decode {channels} channels; found {found}: set one, or output_type='latent'")
    scaled = is_number(config.get("scaling_factor"), 0) and config["scaling_factor"]
    if not scaled or any(config.get(name) for name in shifts):
        raise UserError(f"vae must normalize by one scaling_factor above 0; {found} does not")


def check_scheduler(scheduler: SchedulerMixin, schedule: str, prediction: str = "eps") -> None:
    """Raise UserError unless a scheduler has the network's path: of diffusers', sd, or linear for v and x."""
    config, table = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    expected = DiscreteSchedule().table.exp()
    problem = None
    if hasattr(scheduler, "solve"):
        problem = f"the network's schedule is {schedule}" if config.schedule != schedule else None
    elif schedule == "linear":
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and prediction != "eps"
        problem = None if flow else f"the network predicts {prediction} on the linear path"
    elif schedule != "sd":
        problem = f"the network's schedule is {schedule}, of continuous times"
    elif table is None:
        problem = "it has no discrete noise schedule (alphas_cumprod)"
    elif len(table) != len(expected) or not torch.allclose(table.double().cpu(), expected, rtol=1e-4):
        problem = "it has another noise schedule"
    elif config.get("prediction_type") not in OUTPUTS:
        problem = f"prediction_type is {config.get('prediction_type')}, none of {', '.join(OUTPUTS)}"
    elif config.get("clip_sample") or config.get("thresholding"):
        problem = "it clips samples (clip_sample, thresholding)"
    if problem:
        name = type(scheduler).__name__
        raise UserError(f"{name}: {problem}; use SolverScheduler, or {name}.from_config(SolverScheduler().config)")


# --- Code in the folder -----------------------------------------------------------------------------------------------

PREFIX = "dimr_"  # of the files: diffusers imports all folders' code from one place
IMPORT = re.compile(r"^from (libs\b[\w.]*|sde) import (?:\([^)]*\)|.*)\n", re.MULTILINE)


def code_of(module: str, written: set[str]) -> str:
    """Return a module's text with that of this project's modules in the place of their imports, each once.

    One file, because of a component's folder on the hub diffusers downloads no more.
    """

    def imported(found: re.Match) -> str:
        name = found[1]
        if name in written:
            return ""
        written.add(name)
        return f"\n# --- {name} ---\n\n{code_of(name, written)}\n"

    return IMPORT.sub(imported, inspect.getsource(sys.modules[module]))


def without_places(value: object) -> object:
    """Return JSON values with absolute paths reduced to names."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
