"""The digits of the quickstart: their images, their autoencoder, and their score."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_digits

from scripts import make_digits, score_digits, train_autoencoder

AUTOENCODER = ROOT / "assets/digits_autoencoder"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder that make_digits.py writes."""
    out = tmp_path_factory.mktemp("digits") / "digits"
    assert make_digits.make_digits(out) == {"train": 1297, "held_out": 500}
    return out


@pytest.fixture(scope="module")
def real(digits):
    return score_digits.read_real(digits / "train")


@pytest.fixture(scope="module")
def held_out(digits):
    return score_digits.read_real(digits / "held_out")


@pytest.fixture(scope="module")
def autoencoder():
    return AutoencoderKL.from_pretrained(AUTOENCODER).eval()


def as_pixels(images):
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def reconstructed(autoencoder, held_out):
    """Held-out digits through sampled latents: (N, 32, 32, 3) uint8."""
    with torch.no_grad():
        latents = autoencoder.encode(as_pixels(held_out[0])).latent_dist.sample(torch.Generator().manual_seed(0))
        pixels = autoencoder.decode(latents).sample
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_generated(folder, images, labels):
    """What eval.py leaves behind."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "class_lab.txt").write_text("".join(f"{label}\n" for label in labels))


def test_every_digit_is_in_one_split_under_its_class(digits):
    target = load_digits().target
    held_out_per_class = [len(list((digits / "held_out" / str(c)).iterdir())) for c in range(10)]
    assert min(held_out_per_class) >= 48 and max(held_out_per_class) <= 52
    found = {int(path.stem): int(path.parent.name) for path in digits.glob("*/*/*.png")}
    assert len(list(digits.glob("*/*/*.png"))) == len(found) == 1797
    assert all(target[i] == label for i, label in found.items())


def test_images_keep_the_digit(digits):
    """Means over 4x4 pixels of the enlarged digit follow the 8x8 digit it came from."""
    path = sorted(digits.glob("train/*/*.png"))[100]
    image = np.asarray(Image.open(path))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    means = image.mean(2).reshape(8, 4, 8, 4).mean((1, 3))
    digit = load_digits().images[int(path.stem)]
    assert np.corrcoef(means.ravel(), digit.ravel())[0, 1] > 0.95


def test_digits_are_written_once_and_never_over_others(digits, tmp_path):
    assert make_digits.make_digits(digits) is None
    assert [path.name for path in digits.parent.iterdir()] == ["digits"]
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="does not hold the digits"):
        make_digits.make_digits(tmp_path)


def test_training_of_the_autoencoder_refuses_before_it_begins(tmp_path, monkeypatch):
    for out, message in ((tmp_path, "exists: remove it"), ("/proc/x", "Cannot write /proc/x: .*, or set --out")):
        monkeypatch.setattr("sys.argv", ["train_autoencoder.py", "--out", str(out)])
        with pytest.raises(SystemExit, match=message):
            train_autoencoder.main()


def test_autoencoder_reconstructs_unseen_digits(held_out, reconstructed):
    error = np.mean((held_out[0].astype(float) - reconstructed) ** 2)
    assert 10 * np.log10(255**2 / error) > 34


def test_latents_have_the_expected_shape_and_unit_variance(autoencoder, real):
    with torch.no_grad():
        posterior = autoencoder.encode(as_pixels(real[0][::3])).latent_dist
    latents = autoencoder.config.scaling_factor * posterior.sample(torch.Generator().manual_seed(1))
    assert latents.shape[1:] == (4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module")
def score(real, held_out):
    """Scores of generated images and labels, by a judge that is fitted once."""
    judge = score_digits.Judge(*real)
    return lambda images, labels: score_digits.score(images, labels, real, held_out, judge)


def test_real_digits_and_their_reconstructions_are_near_the_floor(score, held_out, reconstructed):
    half = slice(0, None, 2)
    for images, labels in ((held_out[0][half], held_out[1][half]), (reconstructed, held_out[1])):
        report = score(images, labels)
        assert report["class_accuracy"] > 0.95 and report["real_class_accuracy"] > 0.95
        assert report["frechet_distance"] < 1.5 * report["frechet_floor"]
        assert report["frechet_noise"] > 100 * report["frechet_floor"]
        assert report["n_images"] == len(images)


def test_score_sees_wrong_labels_faint_strokes_and_missing_variety(score, held_out):
    images, labels = held_out
    shuffled = np.random.default_rng(0).permutation(labels)
    assert score(images, shuffled)["class_accuracy"] < 0.2
    faint = (images * 0.8).astype(np.uint8)
    repeated = images[np.searchsorted(labels, labels)]  # one digit per class, again and again
    for worse in (faint, repeated):
        report = score(worse, labels)
        assert report["frechet_distance"] > 3 * report["frechet_floor"]


def arguments(tmp_path, digits, **changes):
    defaults = {
        "images": str(tmp_path / "images"),
        "digits": str(digits),
        "train_dir": str(tmp_path / "train"),
        "out": str(tmp_path / "report.json"),
        "seconds": 100.0,
    }
    return argparse.Namespace(**(defaults | changes))


def test_report_and_its_pictures(tmp_path, digits, held_out):
    images, labels = held_out
    write_generated(tmp_path / "images", images, labels)
    (tmp_path / "train").mkdir()
    log = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(10, 500, 10)]
    (tmp_path / "train/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    report = score_digits.make_report(arguments(tmp_path, digits))
    assert report == json.loads((tmp_path / "report.json").read_text()) and report["seconds"] > 100
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    first_seven = images[labels == 7][0].repeat(2, axis=0).repeat(2, axis=1)
    top = 2 + 7 * 66
    assert grid.shape == (662, 662, 3) and np.array_equal(grid[top : top + 64, 2:66], first_seven)
    assert Image.open(tmp_path / "loss.png").size[0] > 500
    files = {"images", "loss.png", "report.json", "samples.png", "train"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_later_losses_of_a_step_count(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "fid": 9}\n{"step": 1, "loss": 1}\n')
    steps, losses = score_digits.read_losses(log)
    assert steps.tolist() == [1, 2] and losses.tolist() == [1, 2]


@pytest.mark.parametrize(
    "labels, size, message",
    [
        ([0, 1, 2], 32, "1 extra"),
        ([0, 1, 2, 10], 32, r"expected images of 32x32 with labels 0..9 in class_lab.txt"),
        ([0, 1, 2, 3], 16, r"expected images of 32x32 with labels 0..9 in class_lab.txt"),
        (None, 32, r"expected images of 32x32 with labels 0..9 in class_lab.txt"),
    ],
)
def test_refuses_what_eval_does_not_write(tmp_path, digits, labels, size, message):
    write_generated(tmp_path / "images", np.zeros((4, size, size, 3), np.uint8), labels or [])
    if labels is None:
        (tmp_path / "images/class_lab.txt").unlink()
    with pytest.raises(ValueError, match=message):
        score_digits.make_report(arguments(tmp_path, digits, train_dir=None))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_refuses_missing_inputs(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        score_digits.make_report(arguments(tmp_path, digits))
    with pytest.raises(FileNotFoundError, match=r"images"):
        score_digits.make_report(arguments(tmp_path, digits, train_dir=None))
    with pytest.raises(ValueError, match=r"--out must be a file; found the folder "):
        score_digits.make_report(arguments(tmp_path, digits, out=str(tmp_path)))
