"""Score generated digits against the real ones, without any download.

    python scripts/score_digits.py --images workdir/quickstart/images --digits workdir/quickstart/digits \\
        --train_dir workdir/quickstart/train --out workdir/quickstart/report.json

A small classifier is fitted to the real training digits, at 8x8, the resolution at which they were scanned. Scores:

- class accuracy: of generated digits (the class is that of `class_lab.txt`), and of real held-out digits;
- Fréchet distance, in the 64 features of its hidden layer, from the real training digits to the generated ones, to
  the held-out real ones (the floor) and to noise (the ceiling). The three sets have the same size, as the distance
  shrinks with more images.

Writes `samples.png`, ten digits of each class, and `loss.png`, the training loss, beside the report.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.files import check_writable, replacing
from libs.images import ImageTree, read_image, save_grid
from libs.launch import Parser, errors_in_one_line
from libs.metrics import frechet_distance, gaussian_statistics
from libs.sample_set import SampleSet

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Images = tuple[np.ndarray, np.ndarray]  # (N, 32, 32, 3) uint8 and labels (N,)
IMAGE_SIZE = 32
N_CLASSES = 10
N_FEATURES = 64
N_COLUMNS, ENLARGEMENT = 10, 2  # of samples.png


class Judge:
    """Classify digits, and give features of them. Images are (N, 32, 32, 3) uint8, labels (N,) ints 0..9."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.classifier = MLPClassifier((N_FEATURES,), max_iter=300, random_state=0)
        with warnings.catch_warnings():
            # 300 epochs end short of the tolerance; more do not classify held-out digits better.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.classifier.fit(self._inputs(images), labels)

    @staticmethod
    def _inputs(images):
        """Average (N, 32, 32, 3) uint8 over 4x4 pixels and the channels: (N, 64) in [0, 1]."""
        return images.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4, 5)).reshape(-1, 64) / 255

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Compute the share of images that are classified as their label."""
        return float(self.classifier.score(self._inputs(images), labels))

    def statistics(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean (64,) and covariance (64, 64) of the hidden layer's activations, after ReLU."""
        hidden = self._inputs(images) @ self.classifier.coefs_[0] + self.classifier.intercepts_[0]
        return gaussian_statistics(np.maximum(hidden, 0))


def read_real(root: str | Path) -> Images:
    """Read a class-per-folder tree: images (N, 32, 32, 3) uint8 and labels (N,)."""
    tree = ImageTree(root)
    pixels = [read_image(tree.path(i), IMAGE_SIZE) for i in range(len(tree))]
    return np.stack(pixels).transpose(0, 2, 3, 1), tree.labels


def read_generated(folder: str | Path) -> Images:
    """Read the folder that eval.py writes: images (N, 32, 32, 3) uint8 and labels (N,) of class_lab.txt."""
    images = SampleSet(folder)
    if images.labels is None or max(images.labels) >= N_CLASSES or images.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(
            f"{folder}: expected images of {IMAGE_SIZE}x{IMAGE_SIZE} with labels 0..{N_CLASSES - 1} in class_lab.txt: "
            "sample the digits with eval.py"
        )
    return np.stack(list(images.images())), np.array(images.labels)


def score(images: np.ndarray, labels: np.ndarray, real: Images, held_out: Images, judge: Judge) -> dict:
    """Compute the report's scores of generated images by a judge that is fitted to the real ones."""
    n = min(len(images), len(held_out[0]))
    noise = np.random.default_rng(0).integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    statistics = judge.statistics(real[0])

    def distance(others: np.ndarray) -> float:
        chosen = np.linspace(0, len(others) - 1, n).round().astype(int)  # evenly: sets sorted by class stay balanced
        return frechet_distance(*statistics, *judge.statistics(others[chosen]))

    return {
        "class_accuracy": judge.accuracy(images, labels),
        "real_class_accuracy": judge.accuracy(*held_out),
        "frechet_distance": distance(images),
        "frechet_floor": distance(held_out[0]),
        "frechet_noise": distance(noise),
        "n_images": len(images),
    }


def draw_samples(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Draw one row per class of its first images, as a PNG; too few leave black."""
    rows = np.zeros((N_CLASSES, N_COLUMNS, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for label in range(N_CLASSES):
        first = images[labels == label][:N_COLUMNS]
        rows[label, : len(first)] = first.transpose(0, 3, 1, 2)
    rows = rows.repeat(ENLARGEMENT, axis=3).repeat(ENLARGEMENT, axis=4)
    save_grid(torch.from_numpy(rows).flatten(0, 1), path, N_COLUMNS)


def read_losses(log: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read steps and losses of a run's metrics.jsonl; of a step logged again after a resume the later value counts."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record.get("loss") is not None}
    return tuple(np.array(sorted(losses.items())).T)


def draw_loss(steps: np.ndarray, losses: np.ndarray, path: Path) -> None:
    """Plot losses, and their running mean over a twentieth of the run, to a PNG."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def table(report: dict) -> str:
    """Format the report as a few aligned lines."""
    rows = [
        ("class accuracy", "generated", "class_accuracy", "{:.3f}"),
        ("", "real, held out", "real_class_accuracy", "{:.3f}"),
        ("Fréchet distance", "generated", "frechet_distance", "{:.3f}"),
        ("", "real, held out (floor)", "frechet_floor", "{:.3f}"),
        ("", "noise (ceiling)", "frechet_noise", "{:.1f}"),
    ]
    return "\n".join(f"{name:<18}{of:<24}{form.format(report[key]):>8}" for name, of, key, form in rows)


def make_report(args: argparse.Namespace) -> dict:
    """Score, and write the report and its pictures. Raises UserError, OSError."""
    started, out = time.perf_counter(), Path(args.out)
    check_writable(out)
    losses = read_losses(Path(args.train_dir) / "metrics.jsonl") if args.train_dir else None
    images, labels = read_generated(args.images)
    real = read_real(f"{args.digits}/train")
    report = score(images, labels, real, read_real(f"{args.digits}/held_out"), Judge(*real))
    draw_samples(images, labels, out.with_name("samples.png"))
    if losses:
        draw_loss(*losses, out.with_name("loss.png"))
    report["seconds"] = round(args.seconds + time.perf_counter() - started, 1)
    with replacing(out) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    return report


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--images", default="workdir/quickstart/images", help="folder that eval.py wrote")
    parser.add_argument("--digits", default="workdir/quickstart/digits", help="folder that make_digits.py wrote")
    parser.add_argument("--train_dir", help="folder that train.py wrote, for the loss curve")
    parser.add_argument("--out", default="workdir/quickstart/report.json", help="the report; pictures go beside it")
    parser.add_argument("--seconds", type=float, default=0, help="time of the run until here, added to this program's")
    args = parser.parse_args()
    with errors_in_one_line():
        report = make_report(args)
    print(table(report))
    print(f"{report['n_images']} images, {args.out}")


if __name__ == "__main__":
    main()
