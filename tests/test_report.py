"""The report of a scored set, from the command that samples."""

import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import load_config, overrides, quick_distance, run
from PIL import Image
from test_train import log_lines

import eval as evaluation
import train as training
import utils
from img2npz import img2npz
from libs import metrics
from libs.files import file_digest
from libs.inception import WEIGHTS, find_inception
from libs.metrics import NpzImages, Reference, Scores, open_reference
from libs.report import PUBLISHED, nearest_published, usual_mistakes, write_report
from scripts import evaluate_npz, sweep_guidance


@pytest.fixture
def reference(tmp_path):
    """A reference under ADM's name that says it has statistics; its images 256x256 in name only."""
    return Reference(tmp_path / "VIRTUAL_imagenet256_labeled.npz", {"fid": None, "sfid": None}, None)


def good_sampling(**changes):
    settings = {"config": "DiMR-XL-2R_imagenet256", "weights": "a/500000.ckpt/nnet_ema.safetensors", "scale": 1.4}
    return {**settings, "n_samples": 50_000, "dataset.n_classes": 1000, **changes}


def test_a_set_as_published_has_no_warnings(reference):
    labels = [i // 50 for i in range(50_000)]
    assert usual_mistakes(50_000, (256, 256), reference, good_sampling(), labels) == []
    released = good_sampling(weights="DiMR-XL_2R_800epochs.pth")
    assert usual_mistakes(50_000, (256, 256), reference, released, None) == []


@pytest.mark.parametrize(
    ("n_images", "size", "changes", "labels", "name", "message"),
    [
        (9_999, 256, {"n_samples": 9_999}, None, None, "9999 images: published scores are of 50000"),
        (50_000, 256, {"n_samples": 60_000}, None, None, "50000 images of a set of 60000"),
        (50_000, 256, {"weights": "a/5.ckpt/nnet.safetensors"}, None, None, "not EMA weights"),
        (50_000, 256, {"weights": "nnet.pth"}, None, None, "not EMA weights"),
        (50_000, 256, {}, [0] * 50_000, None, "unbalanced labels, 0 to 50000 images per class"),
        (50_000, 256, {}, [*(i // 50 for i in range(49_998)), 0, 0], None, "unbalanced labels, 48 to 52 images"),
        (50_000, 256, {"scale": 1.0}, None, None, "no guidance"),
        (50_000, 256, {}, None, "mine.npz", "another reference, mine.npz: .* VIRTUAL_imagenet256_labeled.npz"),
        (50_000, 512, {}, None, None, "another reference, .*: .* VIRTUAL_imagenet512.npz"),
        (50_000, 32, {}, None, None, r"another reference, .*: .* VIRTUAL_imagenet\*, of other"),
    ],
)
def test_each_usual_mistake_is_warned_of(reference, n_images, size, changes, labels, name, message):
    path = reference.path.with_name(name) if name else reference.path
    reference = Reference(path, reference.statistics, None)
    found = usual_mistakes(n_images, (size, size), reference, good_sampling(**changes), labels)
    assert len(found) == 1
    assert re.search(message, found[0])


def test_statistics_of_few_images_are_warned_of(tmp_path, reference):
    np.savez(tmp_path / "few.npz", np.zeros((9, 256, 256, 3), np.uint8))
    reference = Reference(reference.path, {}, NpzImages(tmp_path / "few.npz"))
    (found,) = usual_mistakes(50_000, (256, 256), reference, good_sampling(), None)
    assert "statistics are of 9 images only" in found


def test_published_results_are_those_of_the_readme():
    """Table of the README: config, FID, guided FID and IS."""
    by_config = {}
    for result in PUBLISHED:
        by_config.setdefault(result.config, []).append((result.fid, result.inception_score))
    rows = [line.split("|") for line in (utils.ROOT / "README.md").read_text().splitlines() if line.startswith("| [")]
    n_results = 0
    for _, link, *_, fid, guided, score, _ in rows:
        known = by_config[link.split("]")[0].strip(" [")]
        fids, guideds, scores = (re.findall(r"[\d.]+", cell) for cell in (fid, guided, score))
        unguided = [(float(value), None) for value in fids] if guideds else [(float(fids[0]), float(scores[0]))]
        results = unguided + [(float(value), float(s)) for value, s in zip(guideds, scores, strict=bool(guideds))]
        assert set(results) <= set(known), link
        n_results += len(results)
    assert n_results == 10
    for name in filter(None, by_config):
        load_config(name)  # there is such a config


def test_nearest_published_are_of_the_same_size():
    assert [result.fid for result in nearest_published(2.5, (512, 512))] == [2.89, 7.93]
    assert [result.fid for result in nearest_published(1.72, (256, 256), n=2)] == [1.70, 1.77]
    assert nearest_published(2.0, (32, 32)) == nearest_published(None, (256, 256)) == []


def test_report_holds_what_decides_the_numbers(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (100, 256, 256, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    samples, reference = NpzImages(tmp_path / "samples.npz"), open_reference(tmp_path / "reference.npz")
    values = {"fid": 1.5, "sfid": None, "inception_score": 250.0, "precision": None, "recall": None}
    scores = Scores(values, {"sfid": "no | statistics"}, "f" * 64)
    samples.labels = list(range(100))
    sampling, out = good_sampling(step=7, seed=1234), tmp_path / "new" / "report"
    write_report(out, scores, samples, reference, sampling)
    report = json.loads((out / "metrics.json").read_text())
    assert {name: report[name] for name in values} == values
    assert report["sampling"] == sampling
    assert report["samples"]["files"][0]["sha256"] == file_digest(tmp_path / "samples.npz")
    assert report["samples"]["labels"] == {"classes": 100, "fewest": 1, "most": 1}
    assert report["reference"]["sha256"] == file_digest(tmp_path / "reference.npz")
    assert report["suite"]["inception_sha256"] == "f" * 64
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [row["fid"] for row in report["published_for_config"]] == [4.87, 1.77, 4.50, 1.70]
    assert len(report["warnings"]) == 3
    page = (out / "report.md").read_text()
    assert "| **these images** | 1.5000 | – | 250.0000 | – | – |" in page and "![samples](samples.png)" in page
    assert "DiMR-G/2R, 1M iterations, guided" in page and "sFID was not computed: no | statistics." in page
    assert all(warning in page for warning in report["warnings"])
    grid = np.asarray(Image.open(out / "samples.png"))
    for i in range(40):
        top, left = 2 + i // 8 * 258, 2 + i % 8 * 258
        assert np.array_equal(grid[top : top + 256, left : left + 256], images[i * 100 // 40])


# --- From the commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(trained_run):
    return trained_run / "ckpts" / "6.ckpt"


@pytest.fixture
def inception(inception_assets, monkeypatch):
    """Random weights for the suite, of which this is the assets folder, and a distance that takes no time."""
    monkeypatch.setattr(metrics, "frechet_distance", quick_distance)
    monkeypatch.setattr(utils, "find_inception", lambda assets: find_inception(inception_assets))
    monkeypatch.setattr(evaluate_npz, "ASSETS", inception_assets)
    return inception_assets


@pytest.mark.slow
def test_sampling_and_scoring_in_one_command_and_in_two(tiny_config, weights, inception, tmp_path):
    """eval.py --metrics and evaluate_npz.py on the same images, as PNGs or as one .npz: the same numbers."""
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    tiny_config.sample.n_samples = 6
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "images", str(reference), "digits")
    first = json.loads((tmp_path / "images_report" / "metrics.json").read_text())
    assert first["sampling"]["step"] == 6 and first["sampling"]["config"] == "digits"
    assert first["sampling"]["weights"].endswith("6.ckpt/nnet_ema.safetensors")
    assert first["sampling"]["weights_sha256"] == file_digest(weights / "nnet_ema.safetensors")
    assert first["samples"]["labels"] == {"classes": 3, "fewest": 2, "most": 2}
    assert first["not_computed"] == {} and first["fid"] > 0
    written = {path.name for path in (tmp_path / "images_report").iterdir()}
    assert written == {"metrics.json", "report.md", "samples.png"}

    img2npz([tmp_path / "images"], tmp_path / "images.npz")
    for samples in ("images.npz", "images"):
        evaluate_npz.main([str(reference), str(tmp_path / samples), "--out", str(tmp_path / "report")])
        report = json.loads((tmp_path / "report" / "metrics.json").read_text())
        assert all(report[name] == first[name] for name in evaluate_npz.NAMES)
        assert (report["sampling"] == "unknown") == (samples == "images.npz")


QUICK_SCORES = """
import functools, runpy, sys
sys.path[:0] = [".", "tests"]
from conftest import quick_distance
import utils
from libs import metrics

metrics.frechet_distance = quick_distance
utils.score_sets = functools.partial(utils.score_sets, batch_size=6)
runpy.run_path("eval.py", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_sample_and_score_as_the_sweep_does_alone(tiny_config, weights, inception, tmp_path, monkeypatch):
    """eval.py --metrics shared by two, and the guidance sweep by ADM's suite on one process: the same five scores."""
    (tmp_path / "quick_scores.py").write_text(QUICK_SCORES)
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    tiny_config.sample.update(n_samples=10, mini_batch_size=5)  # two batches of images and two of features
    out = tmp_path / "images"
    flags = [*overrides(tiny_config), f"--nnet_path={weights}", f"--IMGsave_path={out}", f"--metrics={reference}"]
    done = run(tmp_path / "quick_scores.py", *flags, processes=2, env={"TORCH_HOME": str(inception)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "images_report" / "metrics.json").read_text())

    monkeypatch.setattr(utils, "score_sets", functools.partial(utils.score_sets, batch_size=6))
    sample = tiny_config.sample
    setting = sweep_guidance.Setting(sample.scale, sample.scale_pow, None, sample.sample_steps)
    scorer = sweep_guidance.open_scorer(str(reference), "", tiny_config)
    ((_, scores),) = sweep_guidance.sweep(tiny_config, str(weights), tmp_path / "sweep", [setting], scorer)
    assert set(scores) == set(evaluate_npz.NAMES)
    assert scores == pytest.approx({name: report[name] for name in scores}, rel=1e-6)
    assert scores["fid"] > 0 and scores["inception_score"] > 1
    assert "| FID |" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_scores_while_training(tiny_config, inception, tmp_path):
    """FID of the EMA weights goes into the log; its images are removed. Another size is refused at the start."""
    tiny_config.fid_stat = str(tmp_path / "reference.npz")
    np.savez(tiny_config.fid_stat, mu=np.zeros(2048), sigma=np.eye(2048))
    tiny_config.train.update(n_steps=2, fid_interval=2, fid_samples=3)
    training.train(tiny_config, tmp_path / "run")
    lines = log_lines(tmp_path / "run")
    assert [(line["step"], line["fid"] > 0) for line in lines if "fid" in line] == [(2, True)]
    assert not list((tmp_path / "run" / "fid").iterdir())
    np.savez(tiny_config.fid_stat, np.zeros((4, 8, 8, 3), np.uint8))
    tiny_config.train.fid_samples = 4
    with pytest.raises(ValueError, match=r"fid_samples is 16x16 but the images of .*reference.npz are 8x8"):
        training.train(tiny_config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failed_fid_does_not_end_the_training(tiny_config, inception, tmp_path, monkeypatch, caplog):
    tiny_config.fid_stat = str(tmp_path / "reference.npz")
    np.savez(tiny_config.fid_stat, mu=np.zeros(2048), sigma=np.eye(2048))
    tiny_config.train.update(n_steps=2, fid_interval=1, fid_samples=3)

    def damaged(*args):
        raise ValueError("the weights are damaged by now")

    monkeypatch.setattr(utils, "score_sets", damaged)
    assert training.train(tiny_config, tmp_path / "run") == 0
    assert caplog.text.count("no FID at this step, training goes on: the weights are damaged by now") == 2
    assert not list((tmp_path / "run" / "fid").iterdir())


FULL_ON_ONE = """
import os, runpy, sys
sys.path.insert(0, ".")
from libs.sample_set import SetWriter

def full(*args):
    raise OSError(28, "No space left on device", "0.png")

if os.environ["RANK"] == "1":
    SetWriter.put = full
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_fid_that_failed_on_one_of_two_processes_is_left_out_by_both(tiny_config, inception_assets, tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "full.py").write_text(FULL_ON_ONE)
    tiny_config.train.update(n_steps=2, fid_interval=1, fid_samples=12, eval_interval=10)
    flags = [*overrides(tiny_config), f"--config.fid_stat={tmp_path / 'reference.npz'}", f"--workdir={tmp_path / 'w'}"]
    done = run(tmp_path / "full.py", *flags, processes=2, env={"TORCH_HOME": str(inception_assets)})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no FID at this step, training goes on: [Errno 28] No space left on device") == 4
    assert (tmp_path / "w" / "ckpts" / "2.ckpt").is_dir() and not list((tmp_path / "w" / "fid").iterdir())


def test_what_scoring_lacks_is_said_before_sampling(tiny_config, weights, inception_assets, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reference = tmp_path / "reference.npz"
    with pytest.raises(FileNotFoundError, match=r"no reference statistics .*reference.npz"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images", str(reference))
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images", str(reference))
    cut = tmp_path / "assets" / "inception" / WEIGHTS
    cut.parent.mkdir(parents=True)
    cut.write_bytes((inception_assets / "inception" / WEIGHTS).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged or not pytorch-fid's Inception"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images", str(reference))
    cut.unlink()
    assert not (tmp_path / "images").exists()
    tiny_config.fid_stat = str(reference)
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")  # not asked for: said and left out
    assert len(list((tmp_path / "images").glob("*.png"))) == 12


def test_too_few_images_to_score_are_said_before_sampling(tiny_config, weights, inception, tmp_path, caplog):
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.zeros((4, 16, 16, 3), np.uint8))
    tiny_config.sample.n_samples = 3
    with pytest.raises(ValueError, match=r"config\.sample\.n_samples: expected at least 4 images; found 3"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images", str(reference))
    assert not (tmp_path / "images").exists()
    tiny_config.fid_stat = str(reference)
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")  # not asked for: said and left out
    assert "no scores: config.sample.n_samples is 3, less than 4" in caplog.text
    tiny_config.train.update(n_steps=1, fid_interval=1, fid_samples=3)
    training.train(tiny_config, tmp_path / "run")
    assert "no scores: config.train.fid_samples is 3, less than 4" in caplog.text
