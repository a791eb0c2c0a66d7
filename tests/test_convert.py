"""Weights in every form: the same tensors to the bit after every way round, and one clear line where there is none."""

import csv
import json

import pytest
import torch
from conftest import ROOT, load_config, run
from safetensors import safe_open
from safetensors.torch import load_file

import utils
from libs import checkpoint
from libs.checkpoint import find_weights, read_state_dict, released_name
from libs.files import file_digest
from libs.train_state import save_checkpoint
from scripts import convert_checkpoint as converting


@pytest.fixture
def state(tiny_config):
    """Weights of the tiny network whose every value is drawn, also those that start as constants."""
    torch.manual_seed(3)
    return {name: torch.randn(t.shape) for name, t in utils.build_network(tiny_config).state_dict().items()}


@pytest.fixture
def config_file(tiny_config, tmp_path):
    """The tiny config as a file for --config."""
    path = tmp_path / "tiny.py"
    values = json.dumps(utils.config_json(tiny_config))
    path.write_text(
        f"import json, utils\ndef get_config():\n    return utils.config_from_json(json.loads({values!r}))\n"
    )
    return path


def same(a, b):
    return list(sorted(a)) == list(sorted(b)) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_every_way_round_is_exact(state, config_file, tiny_config, tmp_path):
    """Released .pth -> safetensors -> pipeline -> released .pth, and from the pipeline to safetensors."""
    released = {released_name(name): tensor for name, tensor in state.items()}
    torch.save(released, tmp_path / "released.pth")
    converting.convert(str(tmp_path / "released.pth"), tmp_path / "own" / "a.safetensors", str(config_file))
    assert same(load_file(tmp_path / "own" / "a.safetensors"), state)
    converting.convert(str(tmp_path / "own" / "a.safetensors"), tmp_path / "pipeline")
    converting.convert(str(tmp_path / "pipeline"), tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), released)
    converting.convert(str(tmp_path / "pipeline"), tmp_path / "own" / "a.safetensors")
    assert same(load_file(tmp_path / "own" / "a.safetensors"), state)
    with safe_open(tmp_path / "own" / "a.safetensors", "pt") as file:
        inside = utils.config_from_json(json.loads(file.metadata()["config"]))
    assert utils.config_json(inside) == utils.config_json(tiny_config)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["DiMR-XL-2R", "DiMR-G-2R"])
def test_names_and_shapes_of_the_released_files(name, tmp_path):
    """Tensors without memory, named and shaped as in the released files, fit the config in both directions."""
    with open(ROOT / "tests" / "golden" / f"{name}_state_dict.tsv") as file:
        rows = [(row["name"], row["shape"]) for row in csv.DictReader(file, delimiter="\t")]
    with torch.device("meta"):
        released = {name: torch.empty([int(n) for n in shape.split("x")]) for name, shape in rows}
    network = utils.build_network_on_meta(load_config(f"{name}_imagenet256"))
    own = checkpoint.fitting_weights(network, released, name)
    assert {released_name(key): tensor.shape for key, tensor in own.items()} == {
        k: t.shape for k, t in released.items()
    }


def test_half_precision_stays(state, config_file, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save({released_name(name): tensor for name, tensor in half.items()}, tmp_path / "half.pth")
    converting.convert(str(tmp_path / "half.pth"), tmp_path / "own" / "half.safetensors", str(config_file))
    assert same(load_file(tmp_path / "own" / "half.safetensors"), half)


def test_a_training_checkpoint_brings_its_config_and_step(state, tiny_config, tmp_path):
    saved = {"step": 7, "config": utils.config_json(tiny_config), "class_names": ["ant", "bee", "cat"]}
    other = {name: -tensor for name, tensor in state.items()}
    save_checkpoint(tmp_path / "7.ckpt", {"nnet.safetensors": other, "nnet_ema.safetensors": state}, saved)
    converting.convert(str(tmp_path / "7.ckpt"), tmp_path / "own" / "a.safetensors")
    assert same(load_file(tmp_path / "own" / "a.safetensors"), state)
    assert checkpoint.saved_settings(tmp_path / "own" / "a.safetensors") == saved
    card = (tmp_path / "own" / "README.md").read_text()
    n = sum(tensor.numel() for tensor in state.values())
    assert f"| parameters | {n:,} |" in card and "| training step | 7 |" in card
    for file in (tmp_path / "own" / "a.safetensors", tmp_path / "7.ckpt" / "nnet_ema.safetensors"):
        assert file_digest(file) in card
    config = json.loads(card.split("```json")[1].split("```")[0])
    assert config == saved["config"]


def test_a_card_that_is_there_is_kept(state, config_file, tmp_path, capsys):
    """Somebody may have filled it in."""
    torch.save(state, tmp_path / "a.pth")
    out = tmp_path / "own" / "a.safetensors"
    converting.convert(str(tmp_path / "a.pth"), out, str(config_file))
    card = out.parent / "README.md"
    assert f"--nnet_path {out} --grid" in card.read_text() and "class-conditional" in card.read_text()
    card.write_text(card.read_text() + "Trained on digits.")
    converting.convert(str(out), out.with_name("b.safetensors"))
    assert "Trained on digits." in card.read_text() and f"{card} is kept as it is" in capsys.readouterr().out


def test_errors_leave_nothing(state, config_file, tiny_config, tmp_path):
    torch.save({released_name(name): tensor for name, tensor in state.items()}, tmp_path / "released.pth")
    (tmp_path / "with_readme").mkdir()
    (tmp_path / "with_readme" / "README.md").write_bytes(b"# Something else, not UTF-8: \xe9")
    (tmp_path / "empty.pth").touch()
    cases = [
        (("released.pth", "own/a.safetensors", None), r"no config is saved with .*released.pth: give .* as --config"),
        (("released.pth", "with_readme/a.safetensors", config_file), "README.md is there and no model card"),
        (("released.pth", "own/a.safetensors", "none.py"), "no config at --config none.py"),
        (("released.pth", "with_readme", config_file), "with_readme exists: give a new folder"),
        (("released.pth", "own/a.safetensors", ROOT / "configs" / "digits.py"), "does not fit this model"),
        (("none.pth", "own/a.safetensors", config_file), "no checkpoint at"),
        (("released.pth", "own/a.bin", config_file), "a.bin: expected NAME.safetensors, NAME.pth or a new folder"),
        (("released.pth", "own/a.safetensor", config_file), "a.safetensor: expected NAME.safetensors, NAME.pth or"),
        (("released.pth", "/proc/a.pth", config_file), r"Cannot write /proc/a.pth: .*, or set OUT"),
        (("released.pth", "/proc/a.safetensors", config_file), r"Cannot write /proc/a.safetensors: .*, or set OUT"),
        (
            ("empty.pth", "own/a.safetensors", config_file),
            "empty.pth could not be read as a plain state dict: EOFError",
        ),
    ]
    for (weights, out, config), message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            converting.convert(str(tmp_path / weights), tmp_path / out, config and str(config))
    assert not (tmp_path / "own").exists() and len(list((tmp_path / "with_readme").iterdir())) == 1
    tiny_config.autoencoder.pretrained_path = str(tmp_path / "no_autoencoder")
    model = converting.read_model(str(tmp_path / "released.pth"), str(config_file))
    model.config = tiny_config
    with pytest.raises(ValueError, match="No autoencoder at"):
        converting.write_pipeline(model, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_a_folder_without_averages_is_taken_with_a_warning(state, tmp_path, caplog):
    for name in ("nnet.pth", "nnet.safetensors"):
        folder = tmp_path / name.partition(".")[2]
        folder.mkdir()
        (folder / name).touch()
        caplog.clear()
        assert find_weights(folder) == folder / name
        assert f"{folder} has no EMA weights; taking {name}" in caplog.text
    caplog.clear()
    (tmp_path / "pth" / "nnet_ema.pth").touch()
    assert find_weights(tmp_path / "pth") == tmp_path / "pth" / "nnet_ema.pth" and not caplog.text


def hub_cache(folder, file):
    """A hub cache as huggingface_hub lays it out, holding one file of QHL067/DiMR."""
    repository = folder / "hub" / "models--QHL067--DiMR"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / file.name).write_bytes(file.read_bytes())


HUB_READER = "import sys; from libs.checkpoint import *; print(len(read_state_dict(find_weights(sys.argv[1]))))"


def test_hub_weights_come_from_the_cache_offline(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    hub_cache(tmp_path, tmp_path / "a.pth")
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("-c", HUB_READER, "hf://QHL067/DiMR/a.pth", env=env)
    assert done.stdout.split() == [str(len(state))], done.stderr


def test_hub_without_network_is_one_line(tmp_path):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("scripts/convert_checkpoint.py", checkpoint.RELEASED, tmp_path / "a.pth", env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "hf download QHL067/DiMR DiMR-XL_2R_800epochs.pth --local-dir assets" in done.stderr
    assert "offline mode is enabled" in done.stderr and not (tmp_path / "a.pth").exists()
    for address in ("hf://QHL067/DiMR", "hf://a.pth", "hf://"):
        with pytest.raises(ValueError, match="expected hf://OWNER/REPOSITORY/FILE"):
            find_weights(address)


def test_an_interrupted_or_unreachable_hub_is_told(tmp_path, monkeypatch):
    def unreachable(repository, file, local_files_only=False):
        raise OSError("connection lost")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"folder/a.pth of .* owner/name .*\(connection lost\)"):
        find_weights("hf://owner/name/folder/a.pth")
    assert read_state_dict  # local files need no hub
