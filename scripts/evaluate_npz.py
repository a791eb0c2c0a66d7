"""Score a set of images as the ADM evaluation suite does: FID, sFID, Inception Score, precision, recall.

    python scripts/evaluate_npz.py VIRTUAL_imagenet256_labeled.npz saved_images.npz --out metrics.json
    torchrun --nproc_per_node 8 scripts/evaluate_npz.py REF SAMPLES        # the same numbers from 8 GPUs

SAMPLES is an .npz with images as uint8 `arr_0` (N, H, W, 3), as img2npz.py writes it. REF is ADM's reference .npz
(images and/or mu, sigma, mu_s, sigma_s) or U-ViT's (mu, sigma); what it does not allow is left out and said. Images are
streamed; what is kept of 50,000 of them, and the distances between them, need about 3 GB. Runs on GPUs or the CPU.
"""

import argparse
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import accelerate
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.adm_suite import NpzImages, SetFeatures, array_names, extract_features, read_statistics, score
from libs.checkpoint import file_digest
from libs.inception import find_inception, load_adm_inception
from libs.latents import replacing

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PUBLISHED = 50_000  # images behind published scores
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("reference", metavar="REF", help=".npz with arr_0 and/or mu, sigma, mu_s, sigma_s")
    parser.add_argument("samples", metavar="SAMPLES", help=".npz with arr_0")
    parser.add_argument("--out", help=".json to write: the scores and all that decides them")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time per process")
    return parser.parse_args(argv)


def open_sets(args) -> tuple[NpzImages, dict, NpzImages | None]:
    """The samples, the reference's statistics and its images, checked against each other."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1; found {args.batch_size}")
    samples, statistics = NpzImages(args.samples), read_statistics(args.reference)
    reference = NpzImages(args.reference) if "arr_0" in array_names(args.reference) else None
    fewest = 4 if reference else 2  # for the neighbours of precision and recall; for a covariance
    for images in filter(None, (samples, reference)):
        if images.count < fewest:
            raise ValueError(f"{images.path}: expected at least {fewest} images; found {images.count}")
    if reference and reference.size != samples.size:
        (h, w), (h0, w0) = samples.size, reference.size
        raise ValueError(
            f"{args.samples} is {w}x{h} but the images of {args.reference} are {w0}x{h0}: give the reference of this "
            "resolution, or sample at that one"
        )
    return samples, statistics, reference


def features_of(images: NpzImages, network, batch_size: int, state: accelerate.PartialState) -> SetFeatures:
    """Features of all images, each process making those of an equal run of them."""
    bounds = [images.count * i // state.num_processes for i in range(state.num_processes + 1)]
    start, stop = bounds[state.process_index : state.process_index + 2]
    batches = tqdm(
        images.batches(batch_size, start, stop),
        total=-(-(stop - start) // batch_size),
        desc=images.path.name,
        unit="batch",
        disable=not state.is_main_process,
    )
    part = extract_features(network, batches, str(images.path)) if stop > start else None
    if state.num_processes == 1:
        return part
    return SetFeatures.joined([part for part in gather_object([part]) if part])


def evaluate(args) -> None:
    """Print the scores of `args.samples` and write them to `args.out`. Raises ValueError, OSError."""
    samples, statistics, reference = open_sets(args)
    weights = find_inception(ASSETS)
    if args.out and not Path(args.out).parent.is_dir():
        raise ValueError(f"no folder {Path(args.out).parent} for --out: make it first")
    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    network = load_adm_inception(weights, state.device)
    reference_features = features_of(reference, network, args.batch_size, state) if reference else None
    sample_features = features_of(samples, network, args.batch_size, state)
    if state.is_main_process:
        scores, reasons = score(sample_features, statistics, reference_features)
        warnings = []
        if samples.count < PUBLISHED:
            warnings.append(f"{samples.count} images: published scores are of {PUBLISHED}, and FID falls with more")
        for name, title in NAMES.items():
            print(f"{title}: {f'{scores[name]:.4f}' if name in scores and name not in reasons else reasons[name]}")
        for warning in warnings:
            print(f"warning: {warning}")
        if args.out:
            report = {
                **scores,
                "not_computed": reasons,
                "warnings": warnings,
                "samples": {**described(samples.path), "images": samples.count, "size": samples.size},
                "reference": {
                    **described(args.reference),
                    "images": reference.count if reference else 0,
                    "statistics": sorted(statistics),
                },
                "inception": described(weights),
                "device": state.device.type,
                "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-fid", "numpy")},
            }
            with replacing(args.out) as file:
                file.write(json.dumps(report, indent=1).encode())
    del network
    state.wait_for_everyone()
    state.destroy_process_group()


def described(path: str | Path) -> dict:
    return {"file": str(path), "sha256": file_digest(Path(path))}


def main(argv=None):
    logging.basicConfig(level=logging.WARNING)
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_npz.py: {error}")


if __name__ == "__main__":
    main()
