"""Sample a set of images from a trained DiMR, and score it.

    accelerate launch [--multi_gpu --num_processes N] [--mixed_precision fp16|bf16] eval.py \
        --config=configs/NAME.py --nnet_path=WEIGHTS --IMGsave_path=saved_images [--cfg=SCALE [--cfg_scale_pow=POWER]]

WEIGHTS is a released .pth, a .safetensors, or a checkpoint folder <workdir>/ckpts/<step>.ckpt (its EMA weights).
Image i is IMGsave_path/<i>.png. Its noise and label depend on i alone, and batches are fixed by index, so any number of
processes makes the same bytes. Re-run the command to make what is missing; a folder made with other settings is
refused. --indices makes a part of the set, and img2npz.py joins parts. class_lab.txt (one label per line, in index
order) is written into the folder and, as the released code does, into the current directory. See docs/sampling.md.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import ml_collections
import numpy as np
import torch
from absl import flags, logging
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

import sde
import utils
from configs.common import check_fields
from libs import UserError, launch
from libs.autoencoder import Autoencoder
from libs.checkpoint import ema_profile, find_weights, load_weights, read_state_dict
from libs.compilation import choose_compile, compile_network, round_weights
from libs.files import advise_on_write_error, file_digest, replacing
from libs.launch import raise_on_all_ranks
from libs.metrics import PlannedImages, Reference, Scores, score_sets
from libs.pictures import check_finite
from libs.report import NAMES, write_report
from libs.sample_set import (
    LABELS_FILE,
    RANGE,
    SETTINGS_FILE,
    TEMPORARY_NAME,
    SampleSet,
    SetWriter,
    balanced_label,
    batches_of,
    differences,
    intersect,
    missing_files,
    read_settings,
    remove_temporaries,
    span,
    to_host,
)


def chosen_indices(text: str | None, n_samples: int) -> range:
    """Return the images to make: FIRST:END of --indices (END not included), or all."""
    if not text:
        return range(n_samples)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 <= int(match[1]) < int(match[2]) <= n_samples:
        raise UserError(f"--indices must be FIRST:END with 0 <= FIRST < END <= {n_samples}; found {text!r}")
    return range(int(match[1]), int(match[2]))


def sampling_settings(
    config: ml_collections.ConfigDict,
    weights: Path,
    weaker_weights: Path | None,
    autoencoder: Autoencoder | None,
    precision: str,
) -> dict:
    """Everything that decides the images of a set, as JSON. What is off (None, "") is left out."""
    settings = utils.config_json(config.sample)
    for name in ("grid_steps", "autoguidance_path", "autoguidance_config"):
        del settings[name]
    settings = {
        "weights_sha256": file_digest(weights),
        "autoguidance_sha256": file_digest(weaker_weights) if weaker_weights else None,
        "seed": config.seed,
        **utils.network_settings(config),
        **guiding_settings(config),
        "autoencoder": autoencoder.identity["sha256"] if autoencoder else None,
        "mixed_precision": precision,
        **settings,
        "scale_pow": settings["scale_pow"] or None,
        "compile": settings["compile"].removeprefix("off"),
    }
    return {name: value for name, value in settings.items() if value not in (None, "")}


def guiding_settings(config: ml_collections.ConfigDict) -> dict:
    """What the guiding network is, where its config is another one."""
    if not config.sample.autoguidance_config:
        return {}
    other = utils.network_settings(utils.load_config(config.sample.autoguidance_config))
    return {f"autoguidance.{name}": value for name, value in other.items()}


def check_same_settings(folder: Path, settings: dict) -> None:
    """Raises ValueError when `folder` holds images made with other settings; the message lists the differences."""
    found = read_settings(folder)
    if not found:
        if folder.is_dir() and not all(TEMPORARY_NAME.fullmatch(path.name) for path in folder.iterdir()):
            raise ValueError(f"{folder} holds files but no {SETTINGS_FILE}: give an empty or new --IMGsave_path")
        return
    if different := differences(found, settings):
        raise ValueError(
            f"{folder} holds images made with other settings ({'; '.join(different)}): give another --IMGsave_path or "
            "remove the folder"
        )


def begin_set(folder: Path, indices: range, labels: Sequence[int], settings: dict | None) -> None:
    """Make the folder, with its settings (None: a set that is not kept) and labels; remove half-written files."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    texts = {LABELS_FILE: "".join(f"{labels[i]}\n" for i in indices)}
    if settings is not None:
        texts = {SETTINGS_FILE: json.dumps(settings, indent=1), **texts}
    for name, text in texts.items():
        with replacing(folder / name, "give another folder") as file:
            file.write(text.encode())


def batches_to_make(
    folder: Path, indices: range, settings: ml_collections.ConfigDict, accelerator: accelerate.Accelerator
) -> list[range]:
    """The batches of which `folder` lacks a file. The main process looks and tells the others, so that all agree."""
    unfinished = None
    if accelerator.is_main_process:
        batches = batches_of(indices, settings.n_samples, settings.mini_batch_size)
        with ThreadPoolExecutor(16) as pool:
            missing = pool.map(lambda batch: missing_files(folder, intersect(batch, indices)), batches)
            unfinished = [batch for batch, files in zip(batches, missing, strict=True) if files]
    return broadcast_object_list([unfinished])[0]


def sample_set(
    sample: Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]],
    config: ml_collections.ConfigDict,
    folder: Path,
    indices: range,
    labels: Sequence[int],
    accelerator: accelerate.Accelerator,
) -> None:
    """Make those of the images `indices` that `folder` lacks, this process's share of them, and wait for the others'.

    A batch with a missing image is made whole, so that its arithmetic is the same, and only what is missing is written.
    The last one is filled up, so that all have one size and nothing is compiled for another.
    The next batch is begun before the last one has left the device; reading it back, encoding and writing are done by
    threads (see SetWriter).

    Args:
        sample: what `utils.make_sampler` gives.
        labels: of all images of the set.

    Raises:
        ValueError: images that are not finite; none of their batch is written.
    """
    batches = batches_to_make(folder, indices, config.sample, accelerator)
    n_processes, process = accelerator.num_processes, accelerator.process_index
    size = min(config.sample.mini_batch_size, len(labels))
    progress = tqdm(
        total=len(indices),
        initial=len(indices) - sum(len(intersect(batch, indices)) for batch in batches),
        unit="image",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        smoothing=0.05,
    )
    with raise_on_all_ranks(accelerator), SetWriter(folder) as writer:
        for start in range(0, len(batches), n_processes):
            together = batches[start : start + n_processes]  # one for each process
            if process < len(together):
                batch = together[process]
                own = intersect(batch, indices)
                filled = range(batch.start, batch.start + size)
                images, finite = sample(filled, [labels[min(i, len(labels) - 1)] for i in filled])
                images, finite = to_host(images.permute(0, 2, 3, 1).contiguous()), to_host(finite)
                rows = slice(own.start - batch.start, own.stop - batch.start)

                def pictures(images=images, finite=finite, rows=rows) -> np.ndarray:
                    check_finite(finite()[rows])
                    return images().numpy()[rows]

                writer.put(own, pictures, missing_files(folder, own))
            progress.update(sum(len(intersect(batch, indices)) for batch in together))  # the others are about as far
    progress.close()


def sample_and_score(
    config: ml_collections.ConfigDict,
    folder: Path,
    nnet: nn.Module,
    autoencoder: Autoencoder | None,
    accelerator: accelerate.Accelerator,
    scoring: tuple[Reference, Path] | None = None,
    weaker: nn.Module | None = None,
    indices: range | None = None,
    settings: dict | None = None,
) -> Scores | None:
    """Make the images and labels of a set in `folder`, and score them, on all processes.

    Args:
        scoring: the reference and the Inception weights (see `utils.open_scoring`); None: no scores.
        weaker: network that guides (see `utils.open_weaker_network`).
        indices: the images to make; None: all. A part of a set is not scored.
        settings: what decides the images, to be kept beside them.

    Returns:
        The scores on the main process; None on others, and where nothing was to be scored.
    """
    n_samples, n_classes = config.sample.n_samples, config.dataset.n_classes
    indices = range(n_samples) if indices is None else indices
    labels = [balanced_label(i, n_samples, n_classes) for i in range(n_samples)]
    with raise_on_all_ranks(accelerator):  # no process writes before the folder is ready
        if accelerator.is_main_process:
            begin_set(folder, indices, labels, settings)
    sample = utils.make_sampler(
        config,
        nnet,
        nnet.null_label,
        sde.get_schedule(config.schedule),
        autoencoder,
        accelerator,
        config.sample.sample_steps,
        weaker,
    )
    started = time.perf_counter()
    sample_set(sample, config, folder, indices, labels, accelerator)
    logging.info(
        "%s and their labels are in %s, after %.0f seconds", span(indices), folder, time.perf_counter() - started
    )
    if len(indices) < n_samples:
        logging.info("a part of %d images: img2npz.py puts parts together, evaluate_npz.py scores the whole", n_samples)
        return None
    return score_sets(SampleSet(folder), *scoring, accelerator) if scoring else None


def report(
    folder: Path,
    scores: Scores,
    reference: Reference,
    sampling: dict,
    device: torch.device,
) -> None:
    """Write the report of a scored set into `<folder>_report` and log the scores."""
    images, out = SampleSet(folder), folder.with_name(f"{folder.resolve().name}_report")
    found = write_report(out, scores, images, reference, sampling, device.type)
    for name, title in NAMES.items():
        logging.info("%s: %s", title, scores.reasons.get(name) or f"{scores.values[name]:.4f}")
    for warning in found["warnings"]:
        logging.warning("%s", warning)
    logging.info("report in %s", out)


def checkpoint_step(weights: Path) -> int | None:
    """The step of weights in a folder <step>.ckpt, None for others."""
    folder = weights.resolve().parent
    return int(folder.stem) if folder.suffix == ".ckpt" and folder.stem.isdigit() else None


def open_networks(
    config: ml_collections.ConfigDict, nnet_path: str, accelerator: accelerate.Accelerator
) -> tuple[dict, dict]:
    """What sampling computes with, ready on the device, None where there is none, and the files that were read.

    ({"nnet", "weaker", "autoencoder"}, {"nnet", "weaker"}). What config.sample.compile=auto stands for is put in its
    place: it decides the images' last bits.

    Raises:
        ValueError, OSError: settings or files that do not fit.
    """
    device = accelerator.device
    weights = find_weights(nnet_path)
    state = read_state_dict(weights)
    utils.check_trained_as(config, weights)
    nnet = utils.build_empty_network(config, device).eval()
    load_weights(nnet, state, str(weights))
    weaker, weaker_weights = utils.open_weaker_network(config, device)
    config.sample.compile = choose_compile(config.sample.compile, device)
    for network in [nnet, weaker] if weaker else [nnet]:
        round_weights(network, accelerator.mixed_precision)
        compile_network(network, config.sample.compile, final_weights=True)
    autoencoder = utils.open_autoencoder(config, device)
    return {"nnet": nnet, "weaker": weaker, "autoencoder": autoencoder}, {"nnet": weights, "weaker": weaker_weights}


def evaluate(
    config: ml_collections.ConfigDict,
    nnet_path: str,
    folder: str | Path,
    metrics: str | None = None,
    config_name: str = "",
    indices: str | None = None,
) -> None:
    """Sample config.sample.n_samples images into `folder` with the weights at `nnet_path`, and score them.

    Args:
        indices: FIRST:END, make that part of the set only.
        metrics: reference to score against; None: config.fid_stat, if it and the Inception weights are there.
        config_name: name of the config's file, for the report.

    Raises:
        ValueError, FileNotFoundError: settings or files that do not fit, before anything is made.
    """
    folder = Path(folder)
    utils.check_sampling(config)
    chosen = chosen_indices(indices, config.sample.n_samples)
    accelerator = launch.make_accelerator()
    if not accelerator.is_main_process:
        logging.set_verbosity(logging.ERROR)
    networks, files = open_networks(config, nnet_path, accelerator)
    nnet, weaker, autoencoder = networks["nnet"], networks["weaker"], networks["autoencoder"]
    weights = files["nnet"]

    size = utils.image_size(config, autoencoder)
    planned = PlannedImages(config.sample.n_samples, size, "config.sample.n_samples")
    scoring = utils.open_scoring(metrics or config.fid_stat, metrics is not None, planned)
    settings = sampling_settings(config, weights, files["weaker"], autoencoder, accelerator.mixed_precision)
    settings[RANGE] = [chosen.start, chosen.stop]
    with advise_on_write_error(folder, "set --IMGsave_path"):
        check_same_settings(folder, settings)
        accelerator.wait_for_everyone()  # every process has looked before one writes
        folder.mkdir(parents=True, exist_ok=True)
    logging.info("%s: %s, guidance scale %g", weights, span(chosen), config.sample.scale)
    scores = sample_and_score(config, folder, nnet, autoencoder, accelerator, scoring, weaker, chosen, settings)
    if scores:
        sampling = {**settings, "config": config_name, "weights": str(weights), "step": checkpoint_step(weights)}
        sampling["ema_profile"] = ema_profile(weights)
        sampling |= {"labels": "balanced: index * n_classes // n_samples"}
        report(folder, scores, scoring[0], sampling, accelerator.device)
    launch.finish(accelerator)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    config = values.config
    if not values.nnet_path:
        raise ValueError(
            "--nnet_path is not set: expected a .pth or .safetensors file, a checkpoint or pipeline folder, or "
            "hf://OWNER/REPOSITORY/FILE, such as workdir/<name>/ckpts/<step>.ckpt"
        )
    if values.cfg is not None:
        config.sample.scale = values.cfg
    if values.cfg_scale_pow is not None:
        config.sample.scale_pow = values.cfg_scale_pow
    evaluate(
        config,
        values.nnet_path,
        values.IMGsave_path,
        values.metrics,
        launch.config_name(),
        values.indices,
    )
    folder = Path(values.IMGsave_path)
    if os.environ.get("RANK", "0") == "0" and folder.resolve() != Path.cwd():
        shutil.copyfile(folder / LABELS_FILE, LABELS_FILE)


if __name__ == "__main__":
    launch.define_config_flag("What to sample from: the config that the weights were trained with.")
    flags.DEFINE_string("nnet_path", None, "Weights: .pth, .safetensors, a checkpoint or pipeline folder, or hf://...")
    flags.DEFINE_string("IMGsave_path", "saved_images", "Folder for the images.")
    flags.DEFINE_string(
        "metrics",
        None,
        "Reference .npz to score the images against, as ADM's suite; the report goes to <IMGsave_path>_report. "
        "config.fid_stat unless given, if it is there.",
    )
    flags.DEFINE_string("indices", None, "FIRST:END, make only these images of the set, END not included.")
    flags.DEFINE_float("cfg", None, "Guidance scale, 1: none; config.sample.scale unless given.")
    flags.DEFINE_float(
        "cfg_scale_pow",
        None,
        "Power of the power-cosine schedule, 0: constant scale; config.sample.scale_pow unless given.",
    )
    launch.run(main, check_fields)
