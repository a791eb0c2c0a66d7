"""Score generated digits against the real ones, without any download.

    python scripts/score_digits.py --images workdir/quickstart/images --digits workdir/quickstart/digits \\
        --train_dir workdir/quickstart/train --out workdir/quickstart/report.json

A small classifier is fitted to the real training digits (a few seconds). It judges

- class accuracy: the share of generated digits it takes for the class they were asked to be (`class_lab.txt`), beside
  its accuracy on real held-out digits;
- Fréchet distance, in the 64 features of its hidden layer, from the real training digits to the generated ones, to
  the held-out real ones (the floor: what a perfect model gets) and to noise images (the ceiling), all three sets of
  the same size, as the distance shrinks with more images.

The classifier sees 8x8 means, the resolution at which the digits were scanned: the scores say whether the digits are
right and as varied as real ones, not how crisp their edges are. Beside the report it writes `samples.png`, ten digits
of each class, and `loss.png`, the training loss. A report of the same folders that is newer than its images and log is
kept.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import images as real_images
from libs.files import check_writable
from libs.launch import errors_in_one_line
from libs.metrics import frechet_distance, gaussian_statistics
from libs.sample_set import SampleSet

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Images = tuple[np.ndarray, np.ndarray]  # (N, 32, 32, 3) uint8 and labels (N,)
IMAGE_SIZE = 32
N_CLASSES = 10
N_FEATURES = 64
GRID_SCALE, GRID_GAP = 2, 4  # samples.png: enlargement, and pixels between the digits


class Judge:
    """A classifier of digits and its features.

    Images are (N, 32, 32, 3) uint8, labels (N,) ints 0..9. The same digits give the same judge on one machine.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.classifier = MLPClassifier((N_FEATURES,), max_iter=300, random_state=0)
        with warnings.catch_warnings():
            # 300 passes end short of the tolerance; more do not classify held-out digits better.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.classifier.fit(self._inputs(images), labels)

    @staticmethod
    def _inputs(images):
        """(N, 32, 32, 3) uint8 -> (N, 64): means over 4x4 pixels and the channels, in [0, 1]."""
        return images.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4, 5)).reshape(-1, 64) / 255

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images (N, 32, 32, 3) classified as their label."""
        return float(self.classifier.score(self._inputs(images), labels))

    def statistics(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (64,) and covariance (64, 64) of the hidden layer's activations, after ReLU."""
        hidden = self._inputs(images) @ self.classifier.coefs_[0] + self.classifier.intercepts_[0]
        return gaussian_statistics(np.maximum(hidden, 0))


def read_real(root: str | Path) -> Images:
    """A class-per-folder tree -> images (N, 32, 32, 3) uint8 and labels (N,)."""
    tree = real_images.ImageTree(root)
    if len(tree.class_names) != N_CLASSES:
        raise ValueError(f"{root}: expected {N_CLASSES} classes, found {len(tree.class_names)}: run make_digits.py")
    pixels = [real_images.read_image(tree.path(i), IMAGE_SIZE) for i in range(len(tree))]
    return np.stack(pixels).transpose(0, 2, 3, 1), tree.labels


def read_generated(folder: str | Path) -> Images:
    """The folder that eval.py writes -> images (N, 32, 32, 3) uint8 and labels (N,) of class_lab.txt."""
    images = SampleSet(folder)
    label_file = Path(folder) / "class_lab.txt"
    if max(images.labels) >= N_CLASSES:
        raise ValueError(
            f"{label_file}: expected one label 0..{N_CLASSES - 1} per line: sample the digits with eval.py"
        )
    if images.size != (IMAGE_SIZE, IMAGE_SIZE):
        found = "x".join(map(str, images.size[::-1]))
        raise ValueError(f"{images.paths[0]} is {found}: expected an RGB image of {IMAGE_SIZE}x{IMAGE_SIZE}")
    return np.concatenate(list(images.batches(256))), np.array(images.labels)


def evenly(items: np.ndarray, n: int) -> np.ndarray:
    """n of the items, spread evenly in their order: sets sorted by class stay balanced."""
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]


def score(images: np.ndarray, labels: np.ndarray, real: Images, held_out: Images, judge: Judge | None = None) -> dict:
    """The report's scores, without times.

    Args:
        images, labels: generated, (N, 32, 32, 3) uint8 and (N,).
        real, held_out: the same pair of training digits and of digits held out from all training.
        judge: fitted to `real`; None: to be fitted.
    """
    judge = judge or Judge(*real)
    n = min(len(images), len(held_out[0]))
    noise = np.random.default_rng(0).integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    statistics = judge.statistics(real[0])

    def distance(others):
        return frechet_distance(*statistics, *judge.statistics(evenly(others, n)))

    return {
        "class_accuracy": judge.accuracy(images, labels),
        "real_class_accuracy": judge.accuracy(*held_out),
        "frechet_distance": distance(images),
        "frechet_floor": distance(held_out[0]),
        "frechet_noise": distance(noise),
        "n_images": len(images),
    }


def sample_grid(images: np.ndarray, labels: np.ndarray, n_columns: int = 10) -> np.ndarray:
    """One row per class of its first images -> uint8 (H, W, 3); too few leave black."""
    cell = IMAGE_SIZE * GRID_SCALE + GRID_GAP
    grid = np.zeros((N_CLASSES * cell + GRID_GAP, n_columns * cell + GRID_GAP, 3), np.uint8)
    for label in range(N_CLASSES):
        for column, image in enumerate(images[labels == label][:n_columns]):
            top, left = GRID_GAP + label * cell, GRID_GAP + column * cell
            big = image.repeat(GRID_SCALE, axis=0).repeat(GRID_SCALE, axis=1)
            grid[top : top + len(big), left : left + len(big)] = big
    return grid


def read_losses(log: Path) -> Iterator[tuple]:
    """`metrics.jsonl` of a training run -> (steps, losses); of a step logged again after a resume the later value."""
    try:
        records = [json.loads(line) for line in log.read_text().splitlines()]
        losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log}: expected one JSON object with step and loss per line ({error!r})") from None
    if not losses:
        raise ValueError(f"{log} holds no losses: expected the log of a training run, set --train_dir")
    return zip(*sorted(losses.items()), strict=True)


def draw_loss(log: Path, path: Path) -> None:
    """Plot the losses of a training log, and their running mean over a twentieth of the run, to a PNG."""
    steps, losses = map(np.array, read_losses(log))
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


def write(path: Path, save: Callable) -> None:
    """`save(temporary)`, then rename to `path`: the file is complete whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_current(outputs: Sequence[Path], inputs: Sequence[Path]) -> bool:
    """Whether all outputs exist and are newer than all inputs."""
    return all(path.exists() for path in outputs) and (
        min(path.stat().st_mtime for path in outputs) > max(path.stat().st_mtime for path in inputs)
    )


def kept_report(path: Path, n_images: int, made_from: dict) -> dict | None:
    """The report at `path`; None where it is damaged, or of another number of images or other folders."""
    try:
        report = json.loads(path.read_text())
        table(report)
        return report if (report["n_images"], report["made_from"]) == (n_images, made_from) else None
    except (ValueError, KeyError, TypeError):
        return None


def table(report: dict) -> str:
    """The report as a few aligned lines."""
    rows = [
        ("class accuracy", "generated", "class_accuracy", "{:.3f}"),
        ("", "real, held out", "real_class_accuracy", "{:.3f}"),
        ("Fréchet distance", "generated", "frechet_distance", "{:.3f}"),
        ("", "real, held out (floor)", "frechet_floor", "{:.3f}"),
        ("", "noise (ceiling)", "frechet_noise", "{:.1f}"),
    ]
    return "\n".join(f"{name:<18}{of:<24}{form.format(report[key]):>8}" for name, of, key, form in rows)


def make_report(args: argparse.Namespace) -> tuple[dict, bool]:
    """Score and write the report and its two pictures, unless they are current. Returns (report, made now?)."""
    started = time.perf_counter()
    out = Path(args.out)
    check_writable(out)
    grid, curve = out.with_name("samples.png"), out.with_name("loss.png")
    log = Path(args.train_dir) / "metrics.jsonl" if args.train_dir else None
    generated = SampleSet(args.images)
    folders = {"images": args.images, "digits": args.digits, "train_dir": args.train_dir}
    made_from = {name: str(Path(folder).resolve()) for name, folder in folders.items() if folder}
    outputs, inputs = [out, grid], [*generated.paths, Path(args.images) / "class_lab.txt"]
    if not inputs[-1].exists():
        raise ValueError(f"no {inputs[-1]}: expected the labels the images were asked to be; eval.py writes them")
    if log:
        if not log.exists():
            raise ValueError(f"no training log {log}: set --train_dir to the folder that train.py wrote")
        outputs, inputs = [*outputs, curve], [*inputs, log]
    if is_current(outputs, inputs) and (kept := kept_report(out, generated.count, made_from)):
        return kept, False
    images, labels = read_generated(args.images)
    report = score(images, labels, read_real(f"{args.digits}/train"), read_real(f"{args.digits}/held_out"))
    picture = Image.fromarray(sample_grid(images, labels))
    write(grid, lambda temporary: picture.save(temporary, format="PNG"))
    if log:
        draw_loss(log, curve)
    report["made_from"] = made_from
    report["seconds"] = round(args.seconds + time.perf_counter() - started, 1)
    write(out, lambda temporary: temporary.write_text(json.dumps(report, indent=2) + "\n"))
    return report, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="workdir/quickstart/images", help="folder that eval.py wrote")
    parser.add_argument("--digits", default="workdir/quickstart/digits", help="folder that make_digits.py wrote")
    parser.add_argument("--train_dir", help="folder that train.py wrote, for the loss curve")
    parser.add_argument("--out", default="workdir/quickstart/report.json", help="the report; pictures go beside it")
    parser.add_argument(
        "--seconds", type=float, default=0, help="time that the run took until here, to add to this program's"
    )
    args = parser.parse_args()
    with errors_in_one_line():
        report, made = make_report(args)
    print(table(report))
    print(f"{report['n_images']} images, {args.out}" + ("" if made else " is current: nothing to do"))


if __name__ == "__main__":
    main()
