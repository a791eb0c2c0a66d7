"""The sampling front: eval.py's pixels in a grid, what the branches show, errors in one line."""

import json
import re

import numpy as np
import pytest
from conftest import load_config, run, save_weights
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import pipeline_of
from tqdm import tqdm

import eval as evaluation
from libs.model import Model, config_json, open_autoencoder
from scripts import convert_checkpoint as converting
from scripts import sample


@pytest.fixture
def model(weights):
    return sample.open_model(str(weights))


def test_the_pixels_are_those_of_eval_and_of_the_pipeline(tiny_config, weights, model, tmp_path):
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")
    expected = np.stack([np.asarray(Image.open(tmp_path / "images" / f"{i}.png")) for i in range(9)])
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(sample.draw_samples(model, labels), expected)
    piped = pipeline_of(weights)(labels[4:8], seed=tiny_config.seed, indices=range(4, 8)).images
    assert np.array_equal(np.stack(piped), expected[4:8])
    for form, config in (("released.pth", tiny_config), ("pipeline", None)):
        converting.convert(str(weights), tmp_path / form)
        assert np.array_equal(sample.draw_samples(Model.open(tmp_path / form, config), labels), expected)


def test_the_program_draws_the_grid_and_the_trajectory(weights, model, tmp_path):
    """Cells are the pictures enlarged by a whole factor, where their captions say."""
    grid = tmp_path / "out" / "grid.png"
    flags = ("--classes", "2,0", "--per_class", 2, "--seed", 0, "--cfg", "1,3", "--steps", "3,5", "--trajectory")
    done = run("scripts/sample.py", *flags, "--nnet_path", weights, "--grid", grid)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(grid))
    settings = [(scale, steps) for scale in (1.0, 3.0) for steps in (3, 5)]
    made = [sample.draw_samples(sample.with_settings(model, 0, *setting), [2, 2, 0, 0]) for setting in settings]
    left, top = pixels.shape[1] - 4 * 100, pixels.shape[0] - 4 * 100
    for r, row in enumerate(made):
        for c, expected in enumerate(row):
            cell = pixels[top + r * 100 : top + r * 100 + 96, left + c * 100 : left + c * 100 + 96]
            assert np.array_equal(cell[::6, ::6], expected)
    trajectory = np.asarray(Image.open(tmp_path / "out" / "grid_trajectory.png"))
    assert trajectory.shape[0] - 4 * 100 in range(10, 60)  # two classes, two branches
    shown = trajectory[-2 * 100 - 4 - 96 : -2 * 100 - 4 : 6]  # (the first class's finest row, at its last column)
    assert np.array_equal(shown[:, -100:-4:6], made[0][0])


def test_without_classes_it_takes_the_first_ten(weights, tmp_path):
    """Of three; drawn as when they are named."""
    for name, flags in (("a.png", ()), ("b.png", ("--classes", "0,1,2"))):
        done = run_forked("scripts/sample.py", "--nnet_path", weights, *flags, "--steps", 3, "--grid", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_autoencoder_is_found_from_any_folder(tiny_config, tiny_autoencoder, weights, tmp_path, monkeypatch):
    """A saved relative path is the repository's; a pipeline has its own; one that is given goes before both."""
    monkeypatch.chdir(tmp_path)
    config = load_config("digits")
    assert open_autoencoder(config, "cpu").latent_channels == 4
    (tmp_path / "assets" / "digits_autoencoder").mkdir(parents=True)
    with pytest.raises((ValueError, OSError), match=r"assets/digits_autoencoder"):
        open_autoencoder(config, "cpu")

    converting.convert(str(weights), tmp_path / "pipeline")
    assert Model.open(tmp_path / "pipeline").config.autoencoder.pretrained_path == str(tmp_path / "pipeline" / "vae")
    tiny_config.autoencoder.pretrained_path = "assets/none.pth"
    save_weights(tiny_config, tmp_path / "without.safetensors")
    for path, given in ((tmp_path / "without.safetensors", None), (tmp_path / "pipeline", tiny_config)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"assets/none\.pth"):
            Model.open(path, given)
        assert Model.open(path, given, autoencoder=str(tiny_autoencoder)).autoencoder


def test_a_bar_counts_the_evaluations(model, monkeypatch):
    bars = []

    def shown(**settings):
        bars.append(tqdm(**settings | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(sample, "tqdm", shown)
    model = sample.with_settings(model, 0, 2.0, 5)
    sample.draw_samples(model, [0, 1, 2, 0, 1, 2])  # batches of 4
    sample.trajectory(model, [0, 3], [0, 1])
    assert [(bar.total, bar.n) for bar in bars] == [(10, 10), (5, 5)]


def test_images_that_are_not_finite_are_an_error_and_not_written(tiny_config, weights, tmp_path):
    state = load_file(weights)
    state["stages.1.head.conv.bias"][0] = float("nan")
    save_file(state, weights, {"config": json.dumps(config_json(tiny_config))})
    model = sample.open_model(str(weights))
    with pytest.raises(ValueError, match="5 of 5 images came out with NaN or infinity"):
        sample.draw_samples(model, [0] * 5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample.trajectory(model, [0], [0])
    pipe = pipeline_of(weights)
    with pytest.raises(ValueError, match="2 of 2 images"):
        pipe([0, 1])
    assert pipe([0, 1], output_type="latent").images.isnan().any()
    with pytest.raises(ValueError, match="4 of 4 images"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")
    assert not list((tmp_path / "images").glob("*.png"))


def test_the_trajectory_ends_in_the_sample(model):
    model = sample.with_settings(model, 3, 2.5, 9)
    times, pictures, samples = sample.trajectory(model, [0, 2], [1, 2])
    assert len(times) == 8 and times[0] == 1 and times == sorted(set(times), reverse=True)
    assert [picture.shape for picture in pictures[0]] == [(2, 8, 8, 3), (2, 16, 16, 3)]
    assert np.array_equal(samples, sample.as_arrays(model.sampler()([0, 2], [1, 2])[0]))


def test_errors_are_one_line_and_write_nothing(weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    grid = tmp_path / "grid.png"
    for flags, path, message in (
        (("--classes", "dog"), grid, "error: no class is called 'dog'"),
        (("--classes", "1", "--cfg", "0.5"), grid, "error: the guidance scale must be at least 1"),
        (("--classes", "1", "--nnet_path", "none.safetensors"), grid, "error: no checkpoint at none.safetensors"),
        (("--seed", "99999999999999999999"), grid, "error: config.seed must be at least 0 and at most 9"),
        (("--steps", "1"), grid, "error: config.sample.sample_steps must be at least 3 for dpm_solver; found 1"),
        (("--classes", "1", "--autoencoder", "none.pth"), grid, "none.pth"),
        (("--classes", "1", "--config", "configs/digits.py"), grid, "trained with another config (dataset.n_classes"),
        (("--steps", "3"), tmp_path / "o.jpg", "error: --grid must be a .png"),
        (("--steps", "3"), tmp_path / "file" / "o.png", "set --grid"),
    ):
        words = ["sample.py", "--nnet_path", weights, *flags, "--grid", path]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        with pytest.raises(SystemExit, match=re.escape(message)) as end:
            sample.main()
        assert str(end.value).startswith("error: ") and len(str(end.value).splitlines()) == 1
        assert not path.is_file()
