"""Sampling a set: the same bytes from any number of processes, nothing made twice, one clear error each."""

import shutil

import pytest
import torch
from conftest import overrides, run

import eval as evaluation
import train as training
import utils
from libs.checkpoint import load_weights, read_state_dict, released_name
from libs.sample_set import balanced_label


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def weights(tiny_config, trained):
    if not (trained / "ckpts").exists():
        training.train(tiny_config, trained)
    return trained / "ckpts" / "6.ckpt"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def evaluate(config, weights, folder, *flags, processes=1):
    done = run(
        "eval.py", *overrides(config), f"--nnet_path={weights}", f"--IMGsave_path={folder}", *flags, processes=processes
    )
    return done


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(tiny_config, weights, tmp_path, processes):
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "one")
    done = evaluate(tiny_config, weights, tmp_path / "several", processes=processes)
    assert done.returncode == 0, done.stderr
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "several") == one
    assert set(one) == {*(f"{i}.png" for i in range(12)), "class_lab.txt", "sampling.json"}
    assert one["class_lab.txt"].split() == [b"0"] * 4 + [b"1"] * 4 + [b"2"] * 4
    assert len(set(one.values())) == 14  # no two images alike


def test_only_missing_and_damaged_images_are_made_again(tiny_config, weights, tmp_path):
    folder = tmp_path / "images"
    evaluation.evaluate(tiny_config, str(weights), folder)
    before = contents(folder)
    (folder / "3.png").unlink()
    (folder / "7.png").write_bytes(before["7.png"][:-5])
    kept = (folder / "4.png").stat().st_mtime_ns
    evaluation.evaluate(tiny_config, str(weights), folder)
    assert contents(folder) == before
    assert (folder / "4.png").stat().st_mtime_ns == kept


def test_other_settings_are_refused(tiny_config, weights, tmp_path):
    evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")
    tiny_config.sample.scale = 2.0
    with pytest.raises(ValueError, match=r"made with other settings \(scale: 4.0 there, 2.0 now\)"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")


def test_released_names_give_the_same_images(tiny_config, weights, tmp_path):
    """A .pth in the released code's names, the project's safetensors and the checkpoint folder are one model."""
    state = read_state_dict(weights / "nnet_ema.safetensors")
    torch.save({released_name(name): tensor for name, tensor in state.items()}, tmp_path / "released.pth")
    for source in (weights, weights / "nnet_ema.safetensors", tmp_path / "released.pth"):
        nnet = utils.build_network(tiny_config)
        utils.load_network_weights(nnet, source)
        assert all(torch.equal(tensor, state[name]) for name, tensor in nnet.state_dict().items())


def test_euler_maruyama_noise_is_a_function_of_the_index(tiny_config, weights):
    tiny_config.schedule = "vpsde"
    tiny_config.sample.algorithm = "euler_maruyama_sde"
    accelerator = utils.make_accelerator()
    nnet = utils.build_network(tiny_config).eval()
    utils.load_network_weights(nnet, weights)
    schedule = training.sde.get_schedule("vpsde")
    sample = utils.make_sampler(tiny_config, nnet, nnet.null_label, schedule, None, accelerator, 4)
    together, alone = sample([5, 6], [1, 2]), sample([6], [2])
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"labels must be in 0..3 \(3: no class\); found 4"):
        sample([0], [4])


def test_guidance_flags(tiny_config, weights, tmp_path):
    done = evaluate(tiny_config, weights, tmp_path / "a", "--cfg=2.5", "--cfg_scale_pow=1.5")
    assert done.returncode == 0, done.stderr
    assert '"scale": 2.5' in (tmp_path / "a" / "sampling.json").read_text()
    assert "no scores: no reference statistics" in done.stderr


@pytest.mark.parametrize("algorithm", ["dpm_solver_2m", "dpm_solver_3m", "ddim", "ddpm", "heun"])
def test_other_samplers_run(tiny_config, weights, tmp_path, algorithm):
    tiny_config.sample.update(algorithm=algorithm, n_samples=3)
    evaluation.evaluate(tiny_config, str(weights), tmp_path)
    assert len(set(contents(tmp_path).values())) == 5


def test_labels_are_balanced():
    assert [balanced_label(i, 50_000, 1000) for i in (0, 49, 50, 49_999)] == [0, 0, 1, 999]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"sample_steps": 2}, None, "at least the solver's order, 3; found 2"),
        ({"order": 4, "sample_steps": 9}, None, "config.sample.order must be 1, 2 or 3; found 4"),
        ({"scale_pow": -1.0}, None, "must be above 0; found -1"),
        ({"algorithm": "euler_maruyama_sde"}, None, "needs config.schedule vpsde or vpsde_cosine; found sd"),
        ({}, "none.pth", "no checkpoint at none.pth"),
    ],
)
def test_bad_input_is_clear_and_early(tiny_config, weights, tmp_path, changes, path, message):
    tiny_config.sample.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluation.evaluate(tiny_config, path or str(weights), tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_another_shape_names_the_first_tensors(tiny_config, weights, tmp_path):
    tiny_config.nnet.stages[0].dim = 32
    with pytest.raises(ValueError, match=r"patch_embed.weight: expected shape \(32, 4, 2, 2\), found \(16, 4, 2, 2\)"):
        evaluation.evaluate(tiny_config, str(weights), tmp_path / "images")


def test_command_line_errors(tiny_config, weights, tmp_path):
    for flags, message in ((["--cfg=0.4"], "error: the guidance scale"), (["extra"], "error: expected only flags")):
        done = evaluate(tiny_config, weights, tmp_path / "images", *flags)
        assert done.returncode != 0 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "images").exists()


class Harmful:
    def __reduce__(self):
        return (open, ("/nonexistent-harm", "w"))


def test_pickles_are_not_run(tiny_config, tmp_path):
    torch.save({"weight": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(ValueError, match="could not be read as a plain state dict"):
        read_state_dict(tmp_path / "harm.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a plain state dict of tensors"):
        read_state_dict(tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_state_dict(tmp_path / "cut.safetensors")
    nnet = utils.build_network(tiny_config)
    with pytest.raises(ValueError, match=r"missing in the file\n  .*\n  .*\n  .*\n  .*\n  ... and \d+ more"):
        load_weights(nnet, {}, "empty")


def test_u_vit_style_folder(tiny_config, weights, tmp_path):
    state = read_state_dict(weights / "nnet_ema.safetensors")
    folder = tmp_path / "6.ckpt"
    folder.mkdir()
    torch.save({released_name(name): tensor for name, tensor in state.items()}, folder / "nnet_ema.pth")
    nnet = utils.build_network(tiny_config)
    assert utils.load_network_weights(nnet, folder) == folder / "nnet_ema.pth"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder without nnet_ema.safetensors or nnet_ema.pth"):
        utils.load_network_weights(nnet, folder)
