"""Sample a set of images from a trained DiMR, and score it.

    accelerate launch [--multi_gpu --num_processes N] [--mixed_precision fp16|bf16] eval.py \
        --config=configs/NAME.py --nnet_path=WEIGHTS --IMGsave_path=saved_images [--cfg=SCALE [--cfg_scale_pow=POWER]]

WEIGHTS is a released .pth, a .safetensors, or a checkpoint folder <workdir>/ckpts/<step>.ckpt (its EMA weights).
Image i is IMGsave_path/<i>.png; its noise and label are functions of i alone and batches are fixed by index, so any
number of processes makes the same bytes. Images that are there and complete are not made again; a folder made with
other settings is refused. class_lab.txt (one label per line, in index order) is written into the folder and, as the
released code does, into the current directory.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_collections
import numpy as np
import torch
from absl import flags, logging
from PIL import Image
from tqdm import tqdm

import sde
import utils
from libs.adm_suite import PngImages, Scores, score_sets
from libs.checkpoint import file_digest
from libs.report import NAMES, write_report

SETTINGS_FILE = "sampling.json"
LABELS_FILE = "class_lab.txt"
PNG_END = bytes.fromhex("49454e44ae426082")  # the IEND chunk: a PNG without it is cut short


def is_complete(path: Path) -> bool:
    """Is there a whole PNG at `path`? Reads its last bytes only."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image (H, W, 3) so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    Image.fromarray(image).save(temporary, format="png", compress_level=1)
    os.replace(temporary, path)


def own_batches(n_samples: int, batch_size: int, n_processes: int, process: int) -> Iterator[range]:
    """The batches (ranges of sample indices) that a process makes: every n_processes-th, fixed by index alone."""
    for start in range(process * batch_size, n_samples, n_processes * batch_size):
        yield range(start, min(start + batch_size, n_samples))


def sampling_settings(config: ml_collections.ConfigDict, weights: Path, autoencoder, precision: str) -> dict:
    """Everything that decides the images of a set, as JSON."""
    settings = utils.config_json(config.sample)
    del settings["grid_steps"]
    return {
        "weights_sha256": file_digest(weights),
        "seed": config.seed,
        "schedule": config.schedule,
        "z_shape": list(config.z_shape),
        "n_classes": config.dataset.n_classes,
        "autoencoder": autoencoder.identity["sha256"] if autoencoder else None,
        "mixed_precision": precision,
        **settings,
    }


def check_same_settings(folder: Path, settings: dict) -> None:
    """Raises ValueError when `folder` holds images made with other settings; the message lists the differences."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files but no {SETTINGS_FILE}: give an empty or new --IMGsave_path")
        return
    found = json.loads(file.read_text())
    different = [f"{k}: {found.get(k)} there, {v} now" for k, v in settings.items() if found.get(k) != v]
    if different:
        raise ValueError(
            f"{folder} holds images made with other settings ({'; '.join(different)}): give another --IMGsave_path or "
            "remove the folder"
        )


def sample_set(sample, config: ml_collections.ConfigDict, folder: Path, accelerator) -> int:
    """Make the images that `folder` lacks, this process's share of them; returns how many it made.

    A batch with a missing image is made whole, so that its arithmetic is the same, and only the missing are written.
    Writing overlaps the sampling of the next batch.
    """
    settings = config.sample
    batches = list(
        own_batches(settings.n_samples, settings.mini_batch_size, accelerator.num_processes, accelerator.process_index)
    )
    progress = tqdm(
        total=sum(map(len, batches)), unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True
    )
    made, writes = 0, []
    with ThreadPoolExecutor(max_workers=4) as pool:
        for indices in batches:
            missing = [i for i in indices if not is_complete(folder / f"{i}.png")]
            if missing:
                labels = [utils.balanced_label(i, settings.n_samples, config.dataset.n_classes) for i in indices]
                images = sample(indices, labels).permute(0, 2, 3, 1).cpu().numpy()
                wait_for(writes)
                writes = [pool.submit(write_png, images[i - indices.start], folder / f"{i}.png") for i in missing]
                made += len(missing)
            progress.update(len(indices))
        wait_for(writes)
    progress.close()
    return made


def wait_for(writes: list[Future]) -> None:
    for write in writes:
        write.result()  # raises what the writing raised: a full disk must not pass unseen


def sample_and_score(
    config: ml_collections.ConfigDict, folder: Path, nnet, autoencoder, accelerator, scoring=None
) -> Scores | None:
    """Make the images and labels of a set in `folder`, and score them, on all processes.

    Args:
        scoring: the reference and the Inception weights (see `utils.open_scoring`); None: no scores.

    Returns:
        The scores on the main process; None on others, and where nothing was to be scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n_samples, n_classes = config.sample.n_samples, config.dataset.n_classes
    schedule = sde.get_schedule(config.schedule)
    sample = utils.make_sampler(
        config, nnet, nnet.null_label, schedule, autoencoder, accelerator, config.sample.sample_steps
    )
    made = sample_set(sample, config, folder, accelerator)
    made = accelerator.reduce(torch.tensor(made, device=accelerator.device)).item()
    if accelerator.is_main_process:
        labels = [utils.balanced_label(i, n_samples, n_classes) for i in range(n_samples)]
        (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels))
        logging.info("%d images made, %d were there; labels in %s", made, n_samples - made, folder / LABELS_FILE)
    return score_sets(set_images(config, folder), *scoring, accelerator) if scoring else None


def set_images(config: ml_collections.ConfigDict, folder: Path) -> list[PngImages]:
    """The images of a whole set, to be scored."""
    return [PngImages([folder / f"{i}.png" for i in range(config.sample.n_samples)], str(folder))]


def report(config: ml_collections.ConfigDict, folder: Path, scores: Scores, reference, sampling: dict, device) -> None:
    """Write the report of a scored set into `<folder>_report` and log the scores."""
    labels = [int(label) for label in (folder / LABELS_FILE).read_text().split()]
    out = folder.with_name(f"{folder.resolve().name}_report")
    found = write_report(out, scores, set_images(config, folder), reference, sampling, labels, device.type)
    for name, title in NAMES.items():
        logging.info("%s: %s", title, scores.reasons.get(name) or f"{scores.values[name]:.4f}")
    for warning in found["warnings"]:
        logging.warning("%s", warning)
    logging.info("report in %s", out)


def checkpoint_step(weights: Path) -> int | None:
    """The step of weights in a folder <step>.ckpt, None for others."""
    folder = weights.resolve().parent
    return int(folder.stem) if folder.suffix == ".ckpt" and folder.stem.isdigit() else None


def evaluate(
    config: ml_collections.ConfigDict,
    nnet_path: str,
    folder: str | Path,
    metrics: str | None = None,
    config_name: str = "",
) -> None:
    """Sample config.sample.n_samples images into `folder` with the weights at `nnet_path`, and score them.

    Args:
        metrics: reference to score against; None: config.fid_stat, if it and the Inception weights are there.
        config_name: name of the config's file, for the report.

    Raises:
        ValueError, FileNotFoundError: settings or files that do not fit, before anything is made.
    """
    folder = Path(folder)
    utils.check_sampling(config)
    accelerator = utils.make_accelerator()
    main = accelerator.is_main_process
    if not main:
        logging.set_verbosity(logging.ERROR)
    nnet = utils.build_network(config).to(accelerator.device).eval()
    weights = utils.load_network_weights(nnet, nnet_path)
    autoencoder = utils.open_autoencoder(config, accelerator.device)

    scoring = utils.open_scoring(metrics or config.fid_stat, required=metrics is not None)
    settings = sampling_settings(config, weights, autoencoder, accelerator.mixed_precision)
    check_same_settings(folder, settings)
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1))
    logging.info("%s: %d samples, guidance scale %g", weights, config.sample.n_samples, config.sample.scale)
    scores = sample_and_score(config, folder, nnet, autoencoder, accelerator, scoring)
    if scores:
        sampling = {**settings, "config": config_name, "weights": str(weights), "step": checkpoint_step(weights)}
        sampling |= {"labels": "balanced: index * n_classes // n_samples"}
        report(config, folder, scores, scoring[0], sampling, accelerator.device)
    utils.finish(accelerator)


def main(argv: list[str]) -> None:
    utils.no_arguments(argv)
    values = flags.FLAGS
    config = values.config
    if not values.nnet_path:
        raise ValueError(
            "--nnet_path is not set: expected a .pth or .safetensors file or a checkpoint folder, such as "
            "workdir/<name>/ckpts/<step>.ckpt"
        )
    if values.cfg is not None:
        config.sample.scale = values.cfg
    if values.cfg_scale_pow is not None:
        config.sample.scale_pow = values.cfg_scale_pow
    evaluate(config, values.nnet_path, values.IMGsave_path, values.metrics, utils.config_name())
    folder = Path(values.IMGsave_path)
    if os.environ.get("RANK", "0") == "0" and folder.resolve() != Path.cwd():
        shutil.copyfile(folder / LABELS_FILE, LABELS_FILE)


if __name__ == "__main__":
    utils.define_config_flag("What to sample from: the config that the weights were trained with.")
    flags.DEFINE_string("nnet_path", None, "Weights: .pth, .safetensors or a checkpoint folder.")
    flags.DEFINE_string("IMGsave_path", "saved_images", "Folder for the images.")
    flags.DEFINE_string(
        "metrics",
        None,
        "Reference .npz to score the images against, as ADM's suite; the report goes to <IMGsave_path>_report. "
        "config.fid_stat unless given, if it is there.",
    )
    flags.DEFINE_float("cfg", None, "Guidance scale, 1: none; config.sample.scale unless given.")
    flags.DEFINE_float(
        "cfg_scale_pow",
        None,
        "Power of the power-cosine schedule; config.sample.scale_pow unless given (None: constant).",
    )
    utils.run(main)
