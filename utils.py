"""Configs: loaded from files, checked, and opened as data and references."""

import errno
import math
import operator
import os
import runpy
from collections.abc import Collection, Iterator
from pathlib import Path

import ml_collections
import torch
from absl import logging
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

import sde
from configs import common
from libs import UserError
from libs.autoencoder import DTYPES, Autoencoder
from libs.compilation import COMPILE
from libs.files import file_digest
from libs.images import ImageDataset
from libs.inception import find_inception, load_adm_inception
from libs.latents import LatentStore
from libs.launch import expand_homes, raise_on_all_ranks
from libs.logger import code_version
from libs.metrics import (
    ImageSet,
    PlannedImages,
    Reference,
    Scores,
    SetFeatures,
    check_sets,
    extract_features,
    fewest_images,
    open_reference,
    score,
)
from libs.normalization import check_same_autoencoder, describe_latents
from libs.solvers import SOLVERS, check_guidance, check_steps

ROOT = Path(__file__).resolve().parent
N_MEASURED = 256  # records of which mean and deviation are logged


def load_config(path: str | Path) -> ml_collections.ConfigDict:
    """Run a config file and return what its get_config() returns, checked for missing fields."""
    config = runpy.run_path(str(path))["get_config"]()
    expand_homes(config)
    common.check_fields(config, path)
    return config


# --- Settings that would fail late or silently ------------------------------------------------------------------------

LEAST = 1e-3  # of what must be above 0

# Numbers, and those of tuples: the least allowed, and the largest.
SAMPLING_RANGES = {
    "seed": (0, 2**63 - 1),
    **{f"sample.{name}": (1, math.inf) for name in ("n_samples", "mini_batch_size")},
    "sample.time_shift": (LEAST, math.inf),
}
TRAINING_RANGES = {  # what would otherwise be silently wrong
    "train.keep_last": (1, math.inf),
    **{name: (0, math.inf) for name in ("train.grad_clip", "lr_scheduler.warmup_steps")},
    **{name: (0, math.nextafter(1, 0)) for name in ("ema.rate", "ema.extra_rates")},
    **{name: (LEAST, math.inf) for name in ("time_std", "time_shift")},
    "time_mean": (-100, 100),
    "dataset.p_uncond": (0, 1),
}


def out_of_range(config: ml_collections.ConfigDict, ranges: dict[str, tuple[float, float]]) -> Iterator[str]:
    """Describe the settings that are no number from the least to the largest of `ranges`."""
    for name, (least, largest) in ranges.items():
        value = operator.attrgetter(name)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or not least <= number <= largest or number == math.inf:  # nor NaN
                below = "" if largest == math.inf else " and below 1" if 0 < largest < 1 else f" and at most {largest}"
                yield f"config.{name} must be at least {least}{below}; found {value}"


def not_allowed(config: ml_collections.ConfigDict, allowed: dict[str, Collection[str]]) -> Iterator[str]:
    """Describe the settings that are none of the words allowed."""
    for name, words in allowed.items():
        if (value := operator.attrgetter(name)(config)) not in words:
            yield f"config.{name} must be one of {', '.join(words)}; found {value!r}"


def sampling_mistakes(config: ml_collections.ConfigDict) -> Iterator[str]:
    """Describe the sampling settings that cannot work."""
    sample = config.sample
    yield from out_of_range(config, SAMPLING_RANGES)
    words = {"schedule": sde.SCHEDULES, "prediction": sde.PREDICTIONS, "sample.algorithm": SOLVERS}
    yield from not_allowed(config, words | {"sample.compile": COMPILE, "autoencoder.decode_dtype": DTYPES})
    for name in ("sample_steps", "grid_steps"):
        check_steps(sample.algorithm, sample[name], f"config.sample.{name}")
    check_guidance(sample.scale, sample.scale_pow, sample.interval)
    if sample.scale > 1 and config.dataset.n_classes == 0 and not sample.autoguidance_path:
        yield "without classes, config.sample.scale must be 1 or config.sample.autoguidance_path must be set"
    if sample.autoguidance_config and not sample.autoguidance_path:
        yield "config.sample.autoguidance_config is set without config.sample.autoguidance_path, the weights that guide"


def training_mistakes(config: ml_collections.ConfigDict) -> Iterator[str]:
    """Describe the training settings that cannot work."""
    train = config.train
    yield from out_of_range(config, TRAINING_RANGES)
    laws = {"time_sampling": sde.TIME_LAWS, "loss_weighting": sde.WEIGHTINGS}
    yield from not_allowed(config, laws | {"train.compile": COMPILE})
    if len(train.grid) != 2 or min(train.grid) < 1:
        yield f"config.train.grid must be (rows, columns), at least 1; found {tuple(train.grid)}"
    if train.compile == "whole" and train.sharded:
        yield "config.train.compile is whole, which a sharded network cannot be: set it to blocks or off"
    if train.recompute not in ("off", "all", "selective") and not (train.recompute.isdigit() and int(train.recompute)):
        yield f"config.train.recompute must be off, all, selective or a number k; found {train.recompute!r}"


def raise_first(mistakes: Iterator[str]) -> None:
    """Raise UserError for the first of some mistakes."""
    for mistake in mistakes:
        raise UserError(mistake)


def check_sampling(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for sampling settings that cannot work, before anything is loaded."""
    raise_first(sampling_mistakes(config))


def check_training(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for training settings that cannot work, before anything is loaded."""
    raise_first(training_mistakes(config))


# --- Data and references ----------------------------------------------------------------------------------------------


def open_dataset(config: ml_collections.ConfigDict, autoencoder: Autoencoder | None) -> LatentStore | ImageDataset:
    """Open the training data, latents or (without an autoencoder) pixels, and check it against the config.

    Raises:
        UserError, FileNotFoundError: no data there, or of another shape, class count or autoencoder.
    """
    (channels, height, width), n_classes, path = config.z_shape, config.dataset.n_classes, config.dataset.path
    if autoencoder is not None:
        dataset = LatentStore(path)
        dataset.check_against(
            record_shape=(2 * channels, height, width),
            n_classes=n_classes or None,  # a model without classes takes data of any
        )
        recorded = dataset.autoencoder
        if config.autoencoder.latent_stats:  # stands in for the recorded normalization, which the moments do not have
            recorded = {**recorded, **{name: autoencoder.identity[name] for name in ("shift", "scale")}}
        check_same_autoencoder(autoencoder.identity, recorded, path)
        line, warning = describe_latents(
            torch.from_numpy(dataset.read_spread(N_MEASURED)[0]), autoencoder.normalization
        )
        logging.info("%s: %s", path, line)
        if warning:
            logging.warning("%s: %s", path, warning)
        return dataset
    if (Path(path) / "index.json").exists():
        raise UserError(f"{path} holds latents: set config.autoencoder.pretrained_path, or a folder of images")
    listed = Path(config.dataset.leave_out).read_bytes().split(b"\n") if config.dataset.leave_out else []
    leave_out = [os.fsdecode(name) for name in listed if name]
    dataset = ImageDataset(path, (height, width), config.dataset.flip, leave_out)
    if dataset.tree.left_out:
        logging.warning("%s: %s", path, dataset.tree.left_out)
    if n_classes not in (0, dataset.n_classes):
        raise UserError(f"config.dataset.n_classes is {n_classes}, but {path} has {dataset.n_classes} folders")
    return dataset


def open_scoring(reference: str, required: bool, planned: PlannedImages) -> tuple[Reference, Path] | None:
    """Open the reference .npz and find the Inception weights, before hours of sampling.

    Args:
        planned: the images to be scored.

    Returns:
        None, and a log line that says why, where one of them is missing or the images are too few and `required` is
        False.

    Raises:
        UserError, FileNotFoundError: one of them is missing and `required`, or cannot be used for these images.
    """
    try:
        if not Path(reference).is_file():
            raise FileNotFoundError(errno.ENOENT, "no reference statistics (config.fid_stat or --metrics)", reference)
        weights, opened = find_inception(ROOT / "assets"), open_reference(reference)
    except FileNotFoundError as error:
        if required:
            raise
        logging.info("no scores: %s: %s", error.strerror, error.filename)
        return None
    if not required and planned.count < fewest_images(opened):
        logging.warning("no scores: %s is %d, less than %d", planned.name, planned.count, fewest_images(opened))
        return None
    check_sets(planned, opened)
    load_adm_inception(weights, "cpu")  # raises for a damaged file
    return opened, weights


def score_sets(
    samples: ImageSet, reference: Reference, weights: Path, state: Accelerator | PartialState, batch_size: int = 64
) -> Scores | None:
    """Score a set of images against a reference: all processes extract features, the main one scores.

    Args:
        weights: pytorch-fid's Inception weights. batch_size: images per process.

    Returns:
        The scores on the main process, None on others.

    Raises:
        UserError, OSError: sets or weights that cannot be used, NaN in features.
    """
    with raise_on_all_ranks(state):
        check_sets(samples, reference)
        network = load_adm_inception(weights, state.device)
        sets = [images for images in (samples, reference.images) if images]
        shares = [extract_features(network, s, batch_size, state.num_processes, state.process_index) for s in sets]
    gathered = gather_object([shares])
    if not state.is_main_process:
        return None
    features, *of_reference = (SetFeatures.joined(parts) for parts in zip(*gathered, strict=True))
    values, reasons = score(features, reference.statistics, next(iter(of_reference), None), state.device)
    return Scores(values, reasons, file_digest(weights), state.device.type, code_version())
