"""Sampling a set: the same bytes from any number of processes, nothing made twice, one clear error each."""

import json

import pytest
import torch
from conftest import contents, overrides
from forked import run_forked
from safetensors.torch import save_file

import eval as evaluation
from img2npz import img2npz
from libs.checkpoint import read_state_dict
from libs.model import Model, config_json
from libs.sample_set import balanced_label
from scripts import convert_checkpoint as converting


@pytest.fixture
def weights(trained_run):
    return trained_run / "ckpts" / "6.ckpt"


def command(config, weights, folder, *flags):
    return "eval.py", *overrides(config), f"--nnet_path={weights}", f"--IMGsave_path={folder}", *flags


def test_parts_make_the_set(tiny_config, weights, tmp_path):
    """Two parts cut within a batch are the whole set's images. A part's folder is no other part's."""
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "whole")
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "a", indices="0:8")
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "b", indices="8:12")
    assert (tmp_path / "b" / "class_lab.txt").read_text().split() == ["2"] * 4
    img2npz([tmp_path / "whole"], tmp_path / "whole.npz")
    img2npz([tmp_path / "a", tmp_path / "b"], tmp_path / "parts.npz")
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(indices: \[0, 8\] there, \[4, 12\] now\)"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "a", indices="4:12")


def test_guided_by_itself_is_unguided(tiny_config, weights, tmp_path):
    tiny_config.sample.update(scale=1.0, n_samples=5)
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "none")
    tiny_config.sample.update(scale=3.0, scale_pow=None, autoguidance_path=str(weights))
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "itself")
    none, itself = contents(tmp_path / "none"), contents(tmp_path / "itself")
    assert '"autoguidance_sha256"' in itself.pop("sampling.json").decode()
    assert none.pop("sampling.json") and itself == none
    tiny_config.sample.autoguidance_path = ""
    with pytest.raises(ValueError, match=r"other settings \(.*autoguidance_sha256: .* there, None now"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "itself")


def test_only_missing_and_damaged_images_are_made_again(tiny_config, weights, tmp_path):
    folder = tmp_path / "images"
    evaluation.evaluate(tiny_config, str(weights), folder)
    before = contents(folder)
    assert set(before) == {*(f"{i}.png" for i in range(12)), "class_lab.txt", "sampling.json"}
    assert before["class_lab.txt"].split() == [b"0"] * 4 + [b"1"] * 4 + [b"2"] * 4
    assert len(set(before.values())) == 14  # no two images alike
    (folder / "3.png").unlink()
    (folder / "7.png").write_bytes(before["7.png"][:-5])
    (folder / ".3.png.99.tmp").write_bytes(b"half")
    kept = (folder / "4.png").stat().st_mtime_ns
    evaluation.evaluate(tiny_config, str(weights), folder)
    assert contents(folder) == before
    assert (folder / "4.png").stat().st_mtime_ns == kept


@pytest.fixture
def bare(weights, tmp_path):
    """Weights that know nothing of their config."""
    torch.save(read_state_dict(weights / "nnet_ema.safetensors"), tmp_path / "bare.pth")
    return str(tmp_path / "bare.pth")


def test_other_settings_are_refused_also_of_a_network_without_a_config(tiny_config, bare, tmp_path):
    """Heads leave tensors as they are; a folder half made with other ones must not be filled up."""
    evaluation.evaluate(tiny_config, bare, tmp_path / "images")
    tiny_config.nnet.stages[0].num_heads = 8
    tiny_config.sample.scale = 2.0
    found = r"other settings \(nnet.stages\[0\].num_heads: 4 there, 8 now; scale: 3.5 there, 2.0 now\)"
    with pytest.raises(ValueError, match=found):
        evaluation.evaluate(tiny_config, bare, tmp_path / "images")


def test_a_guiding_network_is_held_to_its_config(tiny_config, weights, bare, tmp_path):
    tiny_config.nnet.stages[0].num_heads = 8
    tiny_config.sample.update(scale=2.0, autoguidance_path=str(weights))
    with pytest.raises(ValueError, match=r"another config \(nnet.stages\[0\].num_heads: 4 there, 8 now\)"):
        evaluation.evaluate(tiny_config, bare, tmp_path / "images")


def test_a_power_of_0_is_a_constant_scale(tiny_config, weights, tmp_path):
    """The one way to have it from the command line where the config has a power."""
    tiny_config.sample.update(n_samples=5, scale=2.0, scale_pow=None)
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "none")
    tiny_config.sample.scale_pow = 0.0
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "zero")
    assert contents(tmp_path / "zero") == contents(tmp_path / "none")


def test_noise_is_a_function_of_the_index(tiny_config, weights):
    """Also what a solver draws on its way."""
    tiny_config.sample.algorithm = "ddpm"
    model = Model.open(weights, tiny_config)
    sample = model.sampler(steps=4)
    together, alone = sample([5, 6], [1, 2])[0], sample([6], [2])[0]
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"labels must be in 0..3 \(3: no class\); found \[4\]"):
        sample([0], [4])


def test_guidance_flags(tiny_config, weights, tmp_path):
    done = run_forked(*command(tiny_config, weights, tmp_path / "a", "--cfg=2.5", "--cfg_scale_pow=1.5"))
    assert done.returncode == 0, done.stderr
    assert '"scale": 2.5' in (tmp_path / "a" / "sampling.json").read_text()
    assert "no scores: no reference statistics" in done.stderr


def test_labels_are_balanced():
    assert [balanced_label(i, 50_000, 1000) for i in (0, 49, 50, 49_999)] == [0, 0, 1, 999]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"sample_steps": 2}, None, "sample_steps must be at least 3 for dpm_solver; found 2"),
        ({"scale_pow": -1.0}, None, r"must be at least 0 \(0: constant scale\); found -1"),
        ({}, "none.pth", "no checkpoint at none.pth"),
    ],
)
def test_bad_input_is_clear_and_early(tiny_config, weights, tmp_path, changes, path, message):
    tiny_config.sample.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluation.evaluate(tiny_config, path or str(weights), tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_another_shape_names_the_first_tensors(tiny_config, bare, tmp_path):
    tiny_config.nnet.stages[0].dim = 32
    with pytest.raises(ValueError, match=r"patch_embed.weight: expected shape \(32, 4, 2, 2\), found \(16, 4, 2, 2\)"):
        evaluation.evaluate(tiny_config, bare, tmp_path / "images")


def test_a_config_that_the_weights_were_not_trained_with_is_refused(tiny_config, weights, tmp_path):
    """From every form that has its config with it; most of these leave names and shapes of all tensors equal."""
    converting.convert(str(weights), tmp_path / "own" / "a.safetensors")
    converting.convert(str(weights), tmp_path / "pipeline")
    for name, value, message in (
        ("nnet.norm_type", "LN", "nnet.norm_type: TDRMSN there, LN now"),
        ("schedule", "vpsde", "schedule: sd there, vpsde now"),
        ("z_shape", (4, 16, 8), r"z_shape: \[4, 8, 8\] there, \[4, 16, 8\] now"),
        ("dataset.n_classes", 2, "dataset.n_classes: 3 there, 2 now"),
    ):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict({name: value})
        for path in (weights, tmp_path / "own" / "a.safetensors", tmp_path / "pipeline"):
            with pytest.raises(ValueError, match=rf"was trained with another config \({message}\): give that config"):
                Model.open(path, config)


def test_command_line_errors(tiny_config, weights, tmp_path):
    for flags, message in (
        (["--cfg=0.4"], "error: the guidance scale"),
        (["extra"], "error: expected only flags"),
        (["--config.autoencoder.pretrained_path="], "pixels have 3 channels, config.z_shape has 4"),
        ([f"--IMGsave_path={weights / 'state.json'}"], "Not a directory"),
        (["--IMGsave_path=/proc/nope/x"], "/proc/nope"),
    ):
        done = run_forked(*command(tiny_config, weights, tmp_path / "images", *flags))
        assert done.returncode != 0 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "images").exists()


DAMAGED = {
    "stages": lambda values: values["nnet"].update(stages=3),
    "a field of a stage": lambda values: values["nnet"]["stages"][0].update(dim="x"),
    "no schedule": lambda values: values.pop("schedule"),
    "z_shape": lambda values: values.update(z_shape=None),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_saved_config_is_one_error(tiny_config, weights, tmp_path, damage):
    values = config_json(tiny_config)
    DAMAGED[damage](values)
    state = read_state_dict(weights / "nnet_ema.safetensors")
    save_file(state, tmp_path / "a.safetensors", {"config": json.dumps(values)})
    with pytest.raises(ValueError, match=r"^the config saved with .*a.safetensors is damaged: "):
        Model.open(tmp_path / "a.safetensors")
