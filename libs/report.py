"""The report of a scored set of images: metrics.json with all that decides the numbers, report.md, samples.png.

FID depends on much that is not the model: the report names it all, sets the scores beside the published ones, and warns
of what makes them incomparable (docs/evaluation.md).
"""

import json
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from libs.files import file_digest, replacing
from libs.images import save_grid
from libs.metrics import ImageSet, NpzImages, Reference, Scores, stack_batches

PUBLISHED_IMAGES = 50_000  # behind published scores
NAMES = dict(fid="FID", sfid="sFID", inception_score="Inception Score", precision="precision", recall="recall")
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pytorch-fid", "accelerate", "diffusers")
N_PICTURES, COLUMNS = 40, 8  # of samples.png

# File names of ADM's references, and of U-ViT's statistics made from them, by the images' side.
ADM_REFERENCES = {
    64: ("VIRTUAL_imagenet64_labeled.npz", "fid_stats_imagenet64_guided_diffusion.npz"),
    256: ("VIRTUAL_imagenet256_labeled.npz", "fid_stats_imagenet256_guided_diffusion.npz"),
    512: ("VIRTUAL_imagenet512.npz", "fid_stats_imagenet512_guided_diffusion.npz"),
}


@dataclass(frozen=True)
class Published:
    """A published result on ImageNet by ADM's suite: 50,000 images, against ADM's reference of that size."""

    model: str
    size: int  # pixels
    guided: bool
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    config: str = ""  # of this project
    source: str = "DiMR, arXiv 2406.09416"


_XL, _G, _XL512 = "DiMR-XL-2R_imagenet256", "DiMR-G-2R_imagenet256", "DiMR-XL-3R_imagenet512"
PUBLISHED = (
    Published("DiMR-XL/2R, 500K iterations", 256, False, 4.87, config=_XL),
    Published("DiMR-XL/2R, 500K iterations", 256, True, 1.77, None, 285.7, 0.79, 0.62, config=_XL),
    Published("DiMR-XL/2R, 1M iterations", 256, False, 4.50, config=_XL),
    Published("DiMR-XL/2R, 1M iterations", 256, True, 1.70, None, 289.0, 0.79, 0.63, config=_XL),
    Published("DiMR-G/2R, 1M iterations", 256, False, 3.56, config=_G),
    Published("DiMR-G/2R, 1M iterations", 256, True, 1.63, None, 292.5, 0.79, 0.63, config=_G),
    Published("DiMR-XL/3R, 1M iterations", 512, False, 7.93, config=_XL512),
    Published("DiMR-XL/3R, 1M iterations", 512, True, 2.89, None, 289.8, config=_XL512),
    Published("DiMR-M/3R, 300K iterations", 64, False, 3.65, None, 42.41, config="DiMR-M-3R_imagenet64"),
    Published("DiMR-L/3R, 300K iterations", 64, False, 2.21, None, 55.73, config="DiMR-L-3R_imagenet64"),
    # The scores that ADM's suite prints for ADM's own sample file: a check of a suite.
    Published(
        "ADM-G-U", 256, True, 3.943, 6.140, 215.84, 0.8265, 0.5309, source="openai/guided-diffusion, evaluations"
    ),
)


def nearest_published(fid: float | None, size: tuple[int, int], n: int = 3) -> list[Published]:
    """Return the n published results of this image size (H, W) with the nearest FIDs, by ratio."""
    same_size = [result for result in PUBLISHED if fid is not None and size == (result.size, result.size)]
    return sorted(same_size, key=lambda result: abs(math.log(result.fid / max(fid, 1e-9))))[:n]


def usual_mistakes(
    n_images: int, size: tuple[int, int], reference: Reference, sampling: dict, labels: Sequence[int] | None
) -> list[str]:
    """List what stands between a score and the published ones, a sentence each.

    Args:
        sampling: see `write_report`. labels: the classes asked for, one per image; None: unknown.
    """
    found = []
    if n_images < PUBLISHED_IMAGES:
        found.append(f"{n_images} images: published scores are of {PUBLISHED_IMAGES}, and FID falls with more")
    if sampling.get("n_samples", n_images) != n_images:
        found.append(f"{n_images} images of a set of {sampling['n_samples']}: score the whole set")
    if Path(sampling.get("weights", "")).stem == "nnet":
        found.append("the weights are not EMA weights: published scores are of nnet_ema")
    n_classes = sampling.get("dataset.n_classes")
    if labels is not None and n_classes:
        counts = Counter(labels)
        fewest, most = min(counts.get(label, 0) for label in range(n_classes)), max(counts.values())
        if most - fewest > 1:
            found.append(f"unbalanced labels, {fewest} to {most} images per class: published sets are balanced")
    if sampling.get("scale") == 1:
        found.append("no guidance (scale 1): compare with unguided results")
    side, name = size[0], reference.path.name
    if name not in ADM_REFERENCES.get(side, ()):
        expected = ADM_REFERENCES[side][0] if side in ADM_REFERENCES else "VIRTUAL_imagenet*, of other image sizes"
        found.append(f"another reference, {name}: published scores are against ADM's {expected}")
    if "fid" not in reference.statistics and reference.images and reference.images.count < PUBLISHED_IMAGES:
        found.append(f"the reference's statistics are of {reference.images.count} images only, which raises FID")
    return found


def write_report(folder: str | Path, scores: Scores, samples: ImageSet, reference: Reference, sampling: dict) -> dict:
    """Write metrics.json, report.md and samples.png into `folder`, made if need be.

    Args:
        sampling: how the images were made: the settings that eval.py keeps in sampling.json and, where known, "config"
            (its name), "weights" (the file) and "step". JSON values; empty: unknown.

    Returns what metrics.json holds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = [result for result in PUBLISHED if result.config and result.config == sampling.get("config")]
    of_npz = isinstance(samples, NpzImages)
    files = [{"file": str(p), "sha256": file_digest(p)} for p in samples.paths] if of_npz else [{"file": samples.name}]
    counts = Counter(samples.labels or ())
    per_class = counts and {"classes": len(counts), "fewest": min(counts.values()), "most": max(counts.values())}
    report = {
        **scores.values,
        "not_computed": scores.reasons,
        "warnings": usual_mistakes(samples.count, samples.size, reference, sampling, samples.labels),
        "published_for_config": [asdict(result) for result in own],
        "nearest_published": [asdict(result) for result in nearest_published(scores.values["fid"], samples.size)],
        "samples": {"files": files, "images": samples.count, "size": samples.size, "labels": per_class or "unknown"},
        "sampling": sampling or "unknown",
        "reference": {
            "file": str(reference.path),
            "sha256": file_digest(reference.path),
            "images": reference.images.count if reference.images else 0,
            "statistics": sorted(reference.statistics),
        },
        "suite": {
            "inception_sha256": scores.weights,
            "resize": "TensorFlow 1 bilinear to 299x299, as ADM",
            "precision": "float32 features, float64 scores",
            "device": scores.device,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "code": scores.code,
    }
    with replacing(folder / "metrics.json", "give another folder") as file:
        file.write(json.dumps(report, indent=1).encode())
    chosen = sorted({i * samples.count // N_PICTURES for i in range(N_PICTURES)})
    save_grid(next(stack_batches(samples.images(chosen), N_PICTURES)), folder / "samples.png", COLUMNS)
    with replacing(folder / "report.md", "give another folder") as file:
        file.write(as_markdown(report).encode())
    return report


def as_markdown(report: dict) -> str:
    """Write report.md from what metrics.json holds."""
    samples, (height, width) = report["samples"], report["samples"]["size"]
    lines = [f"# Scores of {samples['images']:,} images of {width}x{height}", ""]
    lines += [f"| | {' | '.join(NAMES.values())} |", "|---" * (len(NAMES) + 1) + "|"]

    def add_row(title: str, scores: dict, form: str) -> None:
        cells = ("–" if scores[name] is None else format(scores[name], form) for name in NAMES)
        lines.append(f"| {title} | {' | '.join(cells)} |")

    add_row("**these images**", report, ".4f")
    own = report["published_for_config"]
    rows = own + [row for row in report["nearest_published"] if row not in own]
    for row in rows:
        add_row(f"{row['model']}{', guided' if row['guided'] else ''} ({row['source']})", row, "g")
    below = "Below the first row: what is published for this config, then the nearest by FID; all of 50,000 images."
    lines += ["", below if rows else "Nothing is published for images of this size by these scores."]
    lines += [f"\n{NAMES[name]} was not computed: {reason}." for name, reason in report["not_computed"].items()]
    if report["warnings"]:
        lines += ["", "## Before comparing", "", *(f"- {warning}" for warning in report["warnings"])]
    lines += ["", "## Samples", "", f"{N_PICTURES} at most, spread evenly over the set.", "", "![samples](samples.png)"]
    lines += ["", "## What decides these numbers", "", "| | |", "|---|---|"]
    for section in ("samples", "sampling", "reference", "suite", "versions", "code"):
        values = report[section] if isinstance(report[section], dict) else {"": report[section]}
        for key, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"| {section} {key}".rstrip() + " | " + text.replace("|", "\\|") + " |")
    return "\n".join(lines) + "\n"
