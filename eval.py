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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import ml_collections
import numpy as np
from absl import flags, logging
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import utils
from configs.common import check_fields
from libs import UserError, launch
from libs.autoencoder import check_finite
from libs.checkpoint import differences, ema_profile
from libs.files import file_digest, replacing
from libs.images import is_data
from libs.launch import raise_on_all_ranks
from libs.metrics import PlannedImages, Reference, Scores
from libs.model import Model, Sampler, config_json, image_size, network_settings
from libs.report import NAMES, write_report
from libs.sample_set import (
    LABELS_FILE,
    RANGE,
    SETTINGS_FILE,
    SampleSet,
    SetWriter,
    balanced_label,
    batches_of,
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


def sampling_settings(model: Model) -> dict:
    """Return everything that decides the images of a set, as JSON. What is off (None, "") is left out."""
    config, guide = model.config, model.guide
    settings = config_json(config.sample)
    for name in ("grid_steps", "autoguidance_path", "autoguidance_config"):
        del settings[name]
    guiding = {"autoguidance_sha256": file_digest(guide.weights)} if guide else {}
    if config.sample.autoguidance_config:  # another network
        guiding |= {f"autoguidance.{name}": value for name, value in network_settings(guide.config).items()}
    stats = model.autoencoder and config.autoencoder.latent_stats
    settings = {
        "weights_sha256": file_digest(model.weights),
        **guiding,
        "seed": config.seed,
        **network_settings(config),
        "autoencoder": model.autoencoder.weights_digest if model.autoencoder else None,
        "latent_stats": model.autoencoder.normalization.to_json() if stats else None,
        "mixed_precision": model.precision,
        **settings,
        "scale_pow": settings["scale_pow"] or None,
        "compile": settings["compile"].removeprefix("off"),
    }
    return {name: value for name, value in settings.items() if value not in (None, "")}


def begin_set(folder: Path, indices: range, labels: Sequence[int], settings: dict | None) -> None:
    """Make the folder, with its settings and labels, and remove half-written files.

    Args:
        labels: of all images of the set.
        settings: what decides the images. A folder made with others is refused. None: the set is not kept.
    """
    if settings is not None:
        found = read_settings(folder)
        if not found and folder.is_dir() and any(is_data(path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} holds files but no {SETTINGS_FILE}: give an empty or new --IMGsave_path")
        if found and (different := differences(found, settings)):
            raise UserError(
                f"{folder} holds images made with other settings ({'; '.join(different.values())}): set another"
            )
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
    """Return the batches of which `folder` lacks an image, found by the main process, so that all agree."""
    unfinished = None
    if accelerator.is_main_process:
        batches = batches_of(indices, settings.n_samples, settings.mini_batch_size)
        with ThreadPoolExecutor(16) as pool:
            missing = pool.map(lambda batch: missing_files(folder, intersect(batch, indices)), batches)
            unfinished = [batch for batch, files in zip(batches, missing, strict=True) if files]
    return broadcast_object_list([unfinished])[0]


def sample_set(
    sample: Sampler,
    config: ml_collections.ConfigDict,
    folder: Path,
    indices: range,
    labels: Sequence[int],
    accelerator: accelerate.Accelerator,
) -> None:
    """Make this process's share of the images that `folder` lacks, and wait for the other processes.

    A batch with a missing image is made whole, and the last one is filled up, so that the arithmetic is the same and
    nothing is compiled for another size. The next batch begins before the last one has left the device: threads read it
    back, encode and write it. Of a batch with an image that is not finite none is written.

    Args:
        sample: of `Model.sampler`.
        labels: of all images of the set.
    """
    batches = batches_to_make(folder, indices, config.sample, accelerator)
    n_processes, process = accelerator.num_processes, accelerator.process_index
    size = min(config.sample.mini_batch_size, len(labels))
    done, hidden = (
        len(indices) - sum(len(intersect(batch, indices)) for batch in batches),
        not accelerator.is_main_process,
    )
    progress = tqdm(total=len(indices), initial=done, unit="image", disable=hidden, dynamic_ncols=True, smoothing=0.05)
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
    model: Model,
    folder: Path,
    accelerator: accelerate.Accelerator,
    scoring: tuple[Reference, Path] | None = None,
    indices: range | None = None,
    settings: dict | None = None,
) -> Scores | None:
    """Sample the set that model.config.sample describes into `folder`, and score it, on all processes.

    Args:
        scoring: the reference and the Inception weights (see `utils.open_scoring`); None: no scores.
        indices: the images to make; None: all. A part of a set is not scored.
        settings: see `begin_set`.

    Returns:
        The scores on the main process; None on others, and where nothing was to be scored.
    """
    config = model.config
    n_samples, n_classes = config.sample.n_samples, config.dataset.n_classes
    indices = range(n_samples) if indices is None else indices
    labels = [balanced_label(i, n_samples, n_classes) for i in range(n_samples)]
    with raise_on_all_ranks(accelerator):  # no process writes before the folder is ready
        if accelerator.is_main_process:
            begin_set(folder, indices, labels, settings)
    started = time.perf_counter()
    sample_set(model.sampler(), config, folder, indices, labels, accelerator)
    logging.info("%s and labels in %s, after %.0f seconds", span(indices), folder, time.perf_counter() - started)
    if len(indices) < n_samples:
        logging.info("a part of %d images: img2npz.py joins parts, evaluate_npz.py scores the whole", n_samples)
        return None
    return utils.score_sets(SampleSet(folder), *scoring, accelerator) if scoring else None


def report(folder: Path, scores: Scores, reference: Reference, sampling: dict) -> None:
    """Write the report of a scored set into `<folder>_report` and log the scores."""
    images, out = SampleSet(folder), folder.with_name(f"{folder.resolve().name}_report")
    for name, title in NAMES.items():
        logging.info("%s: %s", title, scores.reasons.get(name) or f"{scores.values[name]:.4f}")
    with launch.after_work("no report"):
        for warning in write_report(out, scores, images, reference, sampling)["warnings"]:
            logging.warning("%s", warning)
        logging.info("report in %s", out)


def checkpoint_step(weights: Path) -> int | None:
    """Return the step of weights in a folder <step>.ckpt, None for others."""
    folder = weights.resolve().parent
    return int(folder.stem) if folder.suffix == ".ckpt" and folder.stem.isdigit() else None


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
        metrics: reference to score against; None: config.fid_stat, if it and the Inception weights are there.
        config_name: name of the config's file, for the report.
        indices: FIRST:END, make that part of the set only.
    """
    folder = Path(folder)
    utils.check_sampling(config)
    chosen = chosen_indices(indices, config.sample.n_samples)
    accelerator = launch.make_accelerator()
    if not accelerator.is_main_process:
        logging.set_verbosity(logging.ERROR)
    model = open_model(nnet_path, config, accelerator)
    planned = PlannedImages(config.sample.n_samples, image_size(config, model.autoencoder), "config.sample.n_samples")
    scoring = utils.open_scoring(metrics or config.fid_stat, metrics is not None, planned)
    settings = {**sampling_settings(model), RANGE: [chosen.start, chosen.stop]}
    logging.info("%s: %s, guidance scale %g", model.weights, span(chosen), config.sample.scale)
    scores = sample_and_score(model, folder, accelerator, scoring, chosen, settings)
    if scores:
        sampling = {
            **settings,
            "config": config_name,
            "weights": str(model.weights),
            "step": checkpoint_step(model.weights),
            "ema_profile": ema_profile(model.weights),
            "labels": "balanced: index * n_classes // n_samples",
        }
        report(folder, scores, scoring[0], sampling)
    launch.finish(accelerator)


def open_model(nnet_path: str, config: ml_collections.ConfigDict, accelerator: accelerate.Accelerator) -> Model:
    """Open a model on this process's device, compiled as config.sample.compile says."""
    return Model.open(nnet_path, config, accelerator.device, accelerator.mixed_precision, config.sample.compile)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    config = values.config
    if values.cfg is not None:
        config.sample.scale = values.cfg
    if values.cfg_scale_pow is not None:
        config.sample.scale_pow = values.cfg_scale_pow
    folder = Path(values.IMGsave_path)
    evaluate(config, values.nnet_path, folder, values.metrics, launch.config_name(), values.indices)
    with launch.after_work(f"the labels are in {folder} alone"):
        if os.environ.get("RANK", "0") == "0" and folder.resolve() != Path.cwd():
            shutil.copyfile(folder / LABELS_FILE, LABELS_FILE)


if __name__ == "__main__":
    launch.define_config_flag("What to sample from: the config that the weights were trained with.")
    flags.DEFINE_string("nnet_path", None, "Weights: .pth, .safetensors, a checkpoint or pipeline folder, or hf://...")
    flags.DEFINE_string("IMGsave_path", "saved_images", "Folder for the images.")
    flags.DEFINE_string("metrics", None, "Reference .npz for ADM's suite, as config.fid_stat, which it stands in for.")
    flags.DEFINE_string("indices", None, "FIRST:END, make only these images of the set, END not included.")
    flags.DEFINE_float("cfg", None, "Guidance scale, 1: none; config.sample.scale unless given.")
    flags.DEFINE_float("cfg_scale_pow", None, "Power of the power-cosine schedule, 0: constant; as config.sample's.")
    flags.mark_flag_as_required("nnet_path")
    launch.run(main, check_fields)
