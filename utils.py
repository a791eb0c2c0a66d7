"""From a config to the things it describes, and from a network to images."""

import json
import math
import operator
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import accelerate
import ml_collections
import torch
from absl import logging
from torch import Tensor, nn

import sde
from configs import common
from libs import UserError
from libs.autoencoder import Autoencoder, load_autoencoder
from libs.checkpoint import find_weights, load_weights, read_state_dict, saved_settings
from libs.class_names import are_imagenets_folders, imagenet_names
from libs.compilation import COMPILE
from libs.dimr import DiMR, StageSpec
from libs.images import ImageDataset
from libs.inception import find_inception, load_adm_inception
from libs.latents import LatentStore
from libs.metrics import PlannedImages, Reference, check_sets, fewest_images, open_reference
from libs.pictures import finite, to_uint8
from libs.randomness import SampleNoise, to_device
from libs.sample_set import differences, flatten_dict
from libs.solvers import SOLVERS, check_guidance, check_steps

ROOT = Path(__file__).resolve().parent

# --- Objects from a config --------------------------------------------------------------------------------------------


def load_config(path: str | Path) -> ml_collections.ConfigDict:
    """get_config() of a config file. Raises ValueError for a file that has or gives none of this project."""
    try:  # a config is a program, which may raise anything
        config = runpy.run_path(str(path))["get_config"]()
    except FileNotFoundError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(
            f"{where}: expected a config with get_config(); found {type(error).__name__}: {error}"
        ) from error
    common.check_fields(config, path)
    return config


def config_json(config: ml_collections.ConfigDict) -> dict:
    """A config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def config_from_json(values: dict) -> ml_collections.ConfigDict:
    """The config that `config_json` was given; fields that it did not have, also of stages, get their value of
    configs/common.py: they were added later.

    Raises:
        ValueError: values that are no config of this project.
    """
    config, values = common.base(), json.loads(json.dumps(values), object_hook=_tuples)
    try:
        values["nnet"]["stages"] = tuple(common.stage(**fields) for fields in values["nnet"]["stages"])
        config.update(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the settings saved with the weights are no config of this project: {error}") from error
    return config


def _tuples(values: dict) -> dict:
    """JSON's lists as the tuples that configs have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def config_of(weights: Path, config_path: str | None) -> tuple[ml_collections.ConfigDict, int | None]:
    """The config and the training step (None: unknown) of a weights file; `config_path` in place of the saved config.

    Raises:
        ValueError, OSError: there is no config, a damaged one, or one of another network than the saved one.
    """
    saved = saved_settings(weights)
    if config_path is not None:
        if not Path(config_path).is_file():
            raise FileNotFoundError(f"no config at --config {config_path}")
        config = load_config(config_path)
        check_trained_as(config, weights)
    elif saved is not None:
        config = config_from_json(saved["config"])
    else:
        raise ValueError(f"no config is saved with {weights}: give the one it was trained with as --config")
    return config, saved and saved["step"]


def class_names(config: ml_collections.ConfigDict, weights: Path) -> list[str]:
    """What the classes of a model are called, in the order of their labels: as saved with its weights.

    ImageNet's folders have their English names instead. So have the 1000 classes of weights with no names of their own
    (the released ones, those from before names were saved, features that were imported) where config.dataset.path has
    "imagenet" in it. Other classes without names are called by their numbers.

    Raises:
        ValueError: names of another number of classes than config.dataset.n_classes.
    """
    n = config.dataset.n_classes
    numbers, saved = [str(label) for label in range(n)], saved_settings(weights)
    names = (saved and saved["class_names"]) or numbers
    if len(names) != n:
        raise ValueError(
            f"{weights} has the names of {len(names)} classes saved with it, expected config.dataset.n_classes, {n}: "
            "give the config that it was trained with"
        )
    nameless = names == numbers and n == 1000 and "imagenet" in config.dataset.path.lower()
    return imagenet_names() if nameless or are_imagenets_folders(names) else names


def check_trained_as(config: ml_collections.ConfigDict, weights: Path) -> None:
    """Is it the network that the weights were trained in? Many a setting leaves tensors' names and shapes as they are.

    Weights without a saved config pass.

    Raises:
        ValueError: `config` differs in `network_settings` from the one saved with the weights; both values are named.
    """
    if different := differences_of_networks(config, weights):
        raise ValueError(
            f"{weights} was trained with another config ({'; '.join(different)}): give the config that it was trained "
            "with, or set these as they are there"
        )


def differences_of_networks(config: ml_collections.ConfigDict, weights: Path, but: Sequence[str] = ()) -> list[str]:
    """How the `network_settings` saved with the weights differ from those of `config`; none where none are saved."""
    saved = saved_settings(weights)
    if saved is None:
        return []
    return differences(network_settings(config_from_json(saved["config"])), network_settings(config), but)


def network_settings(config: ml_collections.ConfigDict) -> dict:
    """Which network, and what its inputs and noise predictions mean: {name in the config: JSON value}."""
    values = config_json(config)
    return {
        **flatten_dict(values["nnet"], "nnet"),
        "schedule": values["schedule"],
        "z_shape": values["z_shape"],
        "dataset.n_classes": values["dataset"]["n_classes"],
    }


def build_stages(config: ml_collections.ConfigDict) -> list[StageSpec]:
    """The branches, with the sizes that follow from z_shape and the number of stages.

    Raises:
        ValueError: values that make no branch; the message names the stage.
    """
    shape = config.z_shape
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"config.z_shape must be (channels, height, width), three whole numbers; found {shape}")
    _, height, width = shape
    stages = config.nnet.stages
    if not isinstance(stages, tuple) or not all(isinstance(stage, ml_collections.ConfigDict) for stage in stages):
        raise ValueError(f"config.nnet.stages must be stages, as configs/common.py makes them; found {stages}")
    specs = []
    for r, stage in enumerate(config.nnet.stages):
        patch = 2 ** (len(config.nnet.stages) - 1 - r)
        if height % patch or width % patch:
            raise ValueError(
                f"config.z_shape must be divisible by the coarsest patch, 2^(stages - 1) = {patch}; "
                f"found {height}x{width} with {len(config.nnet.stages)} stages"
            )
        try:
            spec = StageSpec(
                block_type=stage.block_type,
                dim=stage.dim,
                depth=stage.depth,
                hidden_dim=round(stage.dim * stage.mlp_ratio),
                patch_size=patch,
                max_height=height // patch,
                max_width=width // patch,
                num_heads=stage.num_heads,
                kernel_size=stage.kernel_size,
            )
        except ValueError as error:
            raise ValueError(f"config.nnet.stages[{r}]: {error}") from error
        specs.append(spec)
    return specs


def build_network(config: ml_collections.ConfigDict) -> DiMR:
    """The network of a config, freshly initialised from the global generator."""
    return DiMR(
        build_stages(config),
        channels=config.z_shape[0],
        n_classes=config.dataset.n_classes,
        norm_type=config.nnet.norm_type,
        block_grad_to_lowres=config.nnet.block_grad_to_lowres,
    )


def build_network_on_meta(config: ml_collections.ConfigDict) -> DiMR:
    """The network without memory for its weights: for counting."""
    with torch.device("meta"):
        return build_network(config)


def build_empty_network(config: ml_collections.ConfigDict, device: torch.device) -> DiMR:
    """The network with memory for its weights but no values, for weights that are loaded at once."""
    return build_network_on_meta(config).to_empty(device=device)


def loss_weights(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """config.loss_coeffs, or the published weights when it is None. Raises ValueError for a wrong number of them."""
    n_stages = len(config.nnet.stages)
    if not config.loss_coeffs:
        return sde.default_loss_weights(n_stages)
    if len(config.loss_coeffs) != n_stages:
        raise ValueError(
            f"config.loss_coeffs needs one weight per stage, coarsest first; found {len(config.loss_coeffs)} for "
            f"{n_stages} stages (leave it out for the published weights)"
        )
    if not all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in config.loss_coeffs):
        raise ValueError(f"config.loss_coeffs must be numbers of at least 0; found {tuple(config.loss_coeffs)}")
    return tuple(map(float, config.loss_coeffs))


def open_autoencoder(config: ml_collections.ConfigDict, device: torch.device) -> Autoencoder | None:
    """The autoencoder of a latent model, None for a pixel model.

    Raises:
        FileNotFoundError, ValueError: see `load_autoencoder`; also one that does not fit config.z_shape.
    """
    path = config.autoencoder.pretrained_path
    if not path:
        return None
    if not Path(path).exists() and (ROOT / path).exists():
        path = ROOT / path  # configs give paths from the repository's root, where they need not be used
    autoencoder = load_autoencoder(path, device=device)
    if autoencoder.latent_channels != config.z_shape[0]:
        raise ValueError(
            f"config.z_shape has {config.z_shape[0]} channels but the autoencoder "
            f"{config.autoencoder.pretrained_path} makes {autoencoder.latent_channels}"
        )
    return autoencoder


def open_dataset(config: ml_collections.ConfigDict, autoencoder: Autoencoder | None) -> LatentStore | ImageDataset:
    """The training data, checked against the config (and the autoencoder).

    Raises:
        FileNotFoundError: nothing at config.dataset.path; the message says how to make it.
        ValueError: data of another shape, class count or autoencoder; the message names both.
    """
    kind, path = config.dataset.kind, config.dataset.path
    if kind == "latents":
        if autoencoder is None:
            raise ValueError(
                "config.dataset.kind is latents, which needs config.autoencoder.pretrained_path; found none"
            )
        channels, height, width = config.z_shape
        dataset = LatentStore.open(path)
        dataset.check_against(
            record_shape=(2 * channels, height, width),
            n_classes=config.dataset.n_classes or None,  # an unconditional model does not care
            autoencoder=autoencoder.identity,
        )
        return dataset
    if kind == "images":
        channels, height, width = config.z_shape
        if channels != 3:
            raise ValueError(f"pixel models need config.z_shape (3, height, width); found {tuple(config.z_shape)}")
        dataset = ImageDataset(path, (height, width), flip=config.dataset.flip)
        if config.dataset.n_classes not in (0, dataset.n_classes):
            raise ValueError(
                f"config.dataset.n_classes is {config.dataset.n_classes}, but {path} has {dataset.n_classes} folders"
            )
        return dataset
    raise ValueError(f"config.dataset.kind must be latents or images; found {kind!r}")


def load_network_weights(nnet: nn.Module, path: str | Path) -> Path:
    """Load weights from a file or a checkpoint folder (its EMA weights); returns the file that was read."""
    file = find_weights(path)
    load_weights(nnet, read_state_dict(file), source=str(file))
    return file


def open_weaker_network(
    config: ml_collections.ConfigDict, device: torch.device
) -> tuple[DiMR, Path] | tuple[None, None]:
    """The network of config.sample.autoguidance_path and the file it was read from; (None, None) where that is not set.

    Raises:
        ValueError, OSError: see `load_network_weights`; also a config that cannot be read, or one whose noise
            prediction means another thing.
    """
    settings = config.sample
    if not settings.autoguidance_path:
        return None, None
    other = config
    if settings.autoguidance_config:
        if not Path(settings.autoguidance_config).is_file():
            raise FileNotFoundError(f"no config at config.sample.autoguidance_config={settings.autoguidance_config}")
        other = load_config(settings.autoguidance_config)
        for name, found, expected in (
            ("schedule", other.schedule, config.schedule),
            ("z_shape", tuple(other.z_shape), tuple(config.z_shape)),
            ("dataset.n_classes", other.dataset.n_classes, config.dataset.n_classes),
        ):
            if found != expected:
                raise ValueError(
                    f"the guiding network's {name} must be that of the guided one, {expected}; found {found} in "
                    f"{settings.autoguidance_config}: set another config.sample.autoguidance_config"
                )
    file = find_weights(settings.autoguidance_path)
    check_trained_as(other, file)
    nnet = build_empty_network(other, device).eval().requires_grad_(False)
    return nnet, load_network_weights(nnet, file)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError for a setting that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; found {value!r}")


# Numbers, and those of tuples: the least allowed, and the largest.
SAMPLING_RANGES = {"seed": (0, 2**63 - 1), "sample.n_samples": (1, math.inf), "sample.mini_batch_size": (1, math.inf)}
TRAINING_RANGES = {  # what would otherwise be silently wrong
    "train.keep_last": (1, math.inf),
    **{name: (0, math.inf) for name in ("train.grad_clip", "lr_scheduler.warmup_steps")},
    **{name: (0, math.nextafter(1, 0)) for name in ("ema.rate", "ema.extra_rates")},
    "dataset.p_uncond": (0, 1),
}


def check_ranges(config: ml_collections.ConfigDict, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError for a setting that is no number from the least to the largest of `ranges`."""
    for name, (least, largest) in ranges.items():
        value = operator.attrgetter(name)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or not least <= number <= largest or number == math.inf:  # nor NaN
                below = "" if largest == math.inf else " and below 1" if 0 < largest < 1 else f" and at most {largest}"
                raise ValueError(f"config.{name} must be at least {least}{below}; found {value}")


def check_sampling(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for sampling settings that cannot work, before anything is loaded."""
    sample = config.sample
    check_ranges(config, SAMPLING_RANGES)
    check_choice("config.schedule", config.schedule, sde.SCHEDULES)
    for name, allowed in (("algorithm", SOLVERS), ("compile", COMPILE)):
        check_choice(f"config.sample.{name}", sample[name], allowed)
    is_continuous = issubclass(sde.SCHEDULES[config.schedule], sde.ContinuousSchedule)
    if SOLVERS[sample.algorithm].continuous and not is_continuous:
        raise UserError(f"{sample.algorithm} needs config.schedule vpsde or vpsde_cosine; found {config.schedule}")
    for name in ("sample_steps", "grid_steps"):
        check_steps(sample.algorithm, sample[name], f"config.sample.{name}")
    check_guidance(sample.scale, sample.scale_pow, sample.interval)
    if sample.scale > 1 and config.dataset.n_classes == 0 and not sample.autoguidance_path:
        raise ValueError(
            "an unconditional model (config.dataset.n_classes 0) can only be guided by a weaker one: set "
            "config.sample.scale=1 or config.sample.autoguidance_path"
        )
    if sample.autoguidance_config and not sample.autoguidance_path:
        raise ValueError(
            "config.sample.autoguidance_config is set without config.sample.autoguidance_path, the weights that guide"
        )


def check_training(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for training settings that would fail late, or do silently what is not meant."""
    check_ranges(config, TRAINING_RANGES)
    if len(config.train.grid) != 2 or min(config.train.grid) < 1:
        raise UserError(f"config.train.grid must be (rows, columns), at least 1; found {tuple(config.train.grid)}")
    check_choice("config.train.compile", config.train.compile, COMPILE)
    if config.train.compile == "whole" and config.train.sharded:
        raise ValueError(
            "config.train.compile is whole, which a sharded network cannot be: set config.train.compile=blocks or off, "
            "or config.train.sharded=False"
        )
    recompute = config.train.recompute
    if recompute not in ("off", "all", "selective") and not (recompute.isdigit() and int(recompute)):
        raise UserError(f"config.train.recompute must be off, all, selective or a number k; found {recompute!r}")


def make_sampler(
    config: ml_collections.ConfigDict,
    nnet: nn.Module,
    null_label: int,
    schedule: sde.Schedule,
    autoencoder: Autoencoder | None,
    accelerator: accelerate.Accelerator,
    steps: int,
    weaker: nn.Module | None = None,
) -> Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]:
    """The one way from a network to images: sample(indices, labels) -> uint8 images (B, 3, H, W), and which of them
    were finite (B,), to be given to `libs.pictures.check_finite`; both on the device.

    Image i depends on (config.seed, i, its label) and, through the arithmetic, on the batch it is made in. A call does
    not wait for the device. `weaker` guides in place of the unconditional half (see `open_weaker_network`).
    """
    device, settings = accelerator.device, config.sample

    @torch.no_grad()
    def sample(indices: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        bad = [label for label in labels if not 0 <= label <= null_label]
        if bad:
            raise ValueError(f"labels must be in 0..{null_label} ({null_label}: no class); found {bad[0]}")
        noise = SampleNoise(indices, config.seed, tuple(config.z_shape), device)
        x = noise.draw()
        y = to_device(torch.tensor(labels), device)
        noise_model = sde.guided_noise_model(
            nnet, schedule, y, null_label, settings.scale, settings.scale_pow, settings.interval, weaker
        )
        with accelerator.autocast():
            x = SOLVERS[settings.algorithm](noise_model, schedule, x, steps, noise.draw)
        if autoencoder is not None:
            x = autoencoder.decode(x)
        return to_uint8(x), finite(x)

    return sample


def image_size(config: ml_collections.ConfigDict, autoencoder: Autoencoder | None) -> tuple[int, int]:
    """(H, W) in pixels of what is sampled. Raises ValueError for what is no picture."""
    if autoencoder is None and config.z_shape[0] != 3:
        raise ValueError(
            f"without an autoencoder, pixels are sampled, of 3 channels; found {config.z_shape[0]} in config.z_shape: "
            "set config.autoencoder.pretrained_path to the autoencoder of the latents"
        )
    factor = autoencoder.downsample if autoencoder is not None else 1
    return config.z_shape[1] * factor, config.z_shape[2] * factor


def open_scoring(reference: str, required: bool, planned: PlannedImages) -> tuple[Reference, Path] | None:
    """What scoring needs: the opened reference .npz and the path of the Inception weights.

    Args:
        planned: the images to be scored.

    Returns:
        None, after a line that says why, where one of them is missing or the images are too few and `required` is
        False.

    Raises:
        FileNotFoundError: one of them is missing and `required`.
        ValueError: the reference or the weights cannot be used, its images are of another size, or too few.
    """
    try:
        if not Path(reference).is_file():
            raise FileNotFoundError(f"no reference statistics at {reference!r} (set config.fid_stat, or --metrics)")
        weights, opened = find_inception(ROOT / "assets"), open_reference(reference)
    except FileNotFoundError as error:
        if required:
            raise
        logging.info("no scores: %s", error)
        return None
    if not required and planned.count < fewest_images(opened):
        logging.warning("no scores: %s is %d, less than %d", planned.name, planned.count, fewest_images(opened))
        return None
    check_sets(planned, opened)
    load_adm_inception(weights, "cpu")  # whole?
    return opened, weights
