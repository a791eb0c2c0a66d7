"""Score a set of images as the ADM evaluation suite does: FID, sFID, Inception Score, precision, recall.

    python scripts/evaluate_npz.py VIRTUAL_imagenet256_labeled.npz saved_images.npz
    python scripts/evaluate_npz.py VIRTUAL_imagenet256_labeled.npz saved_images --out saved_images_report
    torchrun --nproc_per_node 8 scripts/evaluate_npz.py REF SAMPLES        # the same numbers from 8 GPUs

SAMPLES is an .npz with images as uint8 `arr_0` (N, H, W, 3), as img2npz.py writes it, or several that are parts of one
set, in order; or the folder that eval.py wrote (several: parts of one set), of which the report also says how its
images were made. REF is ADM's reference .npz (images and/or mu, sigma, mu_s, sigma_s) or U-ViT's (mu, sigma); what it
does not allow is left out and said. --keep writes the samples' features (12 KB per image), which then stand for the
images, as SAMPLES, as a part of them or as REF: parts scored on different machines are merged without their images.

Images are streamed; what is kept of 50,000 of them, and the distances between them, need about 3 GB. Runs on GPUs or
the CPU.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import accelerate
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.files import check_writable
from libs.inception import find_inception
from libs.launch import errors_in_one_line
from libs.metrics import ImageSet, SampledImages, check_sets, keep_features, open_reference, open_set, score_sets
from libs.report import NAMES, usual_mistakes, write_report

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", help=".npz with images, statistics or kept features")
    parser.add_argument(
        "samples", metavar="SAMPLES", nargs="+", help=".npz with images or kept features; folder of eval.py"
    )
    parser.add_argument("--out", help="folder for the report: metrics.json, report.md, samples.png")
    parser.add_argument("--keep", help=".npz to write: the samples' features")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time per process")
    return parser.parse_args(argv)


def open_samples(paths: list[str]) -> list[ImageSet]:
    """The parts of the set in these files, or the one set in these folders."""
    folders = [path for path in paths if Path(path).is_dir()]
    if folders and len(folders) < len(paths):
        raise ValueError(f"SAMPLES are folders ({folders[0]}, ...) and files: give either")
    return [SampledImages(*folders)] if folders else [open_set(path) for path in paths]


def evaluate(args: argparse.Namespace) -> None:
    """Print the scores of `args.samples` and write what was asked for. Raises ValueError, OSError."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1; found {args.batch_size}")
    if args.out:
        check_writable(args.out, folder=True)
    if args.keep:
        check_writable(args.keep, "--keep")
    samples, reference = open_samples(args.samples), open_reference(args.reference)
    check_sets(samples, reference)
    n_images = sum(part.count for part in samples)
    made = samples[0] if isinstance(samples[0], SampledImages) else None
    sampling, labels = (made.settings, made.labels) if made else ({}, None)
    weights = find_inception(ASSETS)
    if args.keep and not Path(args.keep).resolve().parent.is_dir():
        raise ValueError(f"no folder {Path(args.keep).parent} for --keep: make it first")
    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    scores = score_sets(samples, reference, weights, state, args.batch_size)
    if state.is_main_process:
        for name, title in NAMES.items():
            print(f"{title}: {scores.reasons.get(name) or f'{scores.values[name]:.4f}'}")
        for warning in usual_mistakes(n_images, samples[0].size, reference, sampling, labels):
            print(f"warning: {warning}")
        if args.keep:
            keep_features(args.keep, scores.features, samples[0].size, scores.weights)
        if args.out:
            write_report(args.out, scores, samples, reference, sampling, labels, state.device.type)
    state.wait_for_everyone()
    state.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING)
    args = parse_args(argv)
    with errors_in_one_line():
        evaluate(args)


if __name__ == "__main__":
    main()
