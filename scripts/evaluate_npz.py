"""Score a set of images as the ADM evaluation suite does: FID, sFID, Inception Score, precision, recall.

    python scripts/evaluate_npz.py VIRTUAL_imagenet256_labeled.npz saved_images.npz
    python scripts/evaluate_npz.py VIRTUAL_imagenet256_labeled.npz saved_images --out saved_images_report
    torchrun --nproc_per_node 8 scripts/evaluate_npz.py REF SAMPLES        # the same numbers from 8 GPUs

SAMPLES is an .npz with images as uint8 `arr_0` (N, H, W, 3), as img2npz.py writes it, or the folder that eval.py wrote;
several are parts of one set, in order. REF is ADM's reference .npz (images and/or mu, sigma, mu_s, sigma_s) or U-ViT's
(mu, sigma); scores that it does not allow are left out, with the reason. 50,000 images need about 3 GB of memory.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from libs import UserError
from libs.files import check_writable
from libs.inception import find_inception
from libs.launch import TIMEOUT, Parser, errors_in_one_line, make_state
from libs.metrics import NpzImages, open_reference
from libs.report import NAMES, usual_mistakes, write_report
from libs.sample_set import SampleSet

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def evaluate(args: argparse.Namespace) -> None:
    """Print the scores of `args.samples` and write the report asked for. Raises UserError, OSError."""
    if args.out:
        check_writable(args.out, folder=True)
    folders = [Path(path).is_dir() for path in args.samples]
    if any(folders) != all(folders):
        raise UserError(f"SAMPLES must be folders or files, not both; found {', '.join(args.samples)}")
    samples = SampleSet(*args.samples) if folders[0] else NpzImages(*args.samples)
    reference = open_reference(args.reference)
    weights = find_inception(ASSETS)
    state = make_state(TIMEOUT)
    scores = utils.score_sets(samples, reference, weights, state, args.batch_size)
    if state.is_main_process:
        for name, title in NAMES.items():
            print(f"{title}: {scores.reasons.get(name) or f'{scores.values[name]:.4f}'}")
        for warning in usual_mistakes(samples.count, samples.size, reference, samples.settings, samples.labels):
            print(f"warning: {warning}")
        if args.out:
            write_report(args.out, scores, samples, reference, samples.settings)
    state.wait_for_everyone()
    state.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING)
    parser = Parser(__doc__)
    parser.add_argument("reference", metavar="REF", help=".npz with images or statistics")
    parser.add_argument("samples", metavar="SAMPLES", nargs="+", help=".npz with images, or folder of eval.py")
    parser.add_argument("--out", help="folder for the report: metrics.json, report.md, samples.png")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time per process")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        evaluate(args)


if __name__ == "__main__":
    main()
