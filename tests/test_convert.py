"""Weights in every form: the same tensors to the bit after every way round, and one clear line where there is none."""

import csv
import json

import pytest
import torch
from conftest import ROOT, load_config, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libs import checkpoint
from libs.checkpoint import find_weights, read_state_dict, released_name
from libs.files import file_digest
from libs.model import build_network, build_network_on_meta, config_from_json, config_json
from scripts import convert_checkpoint as converting


@pytest.fixture
def state(tiny_config):
    """Weights of the tiny network whose every value is drawn, also those that start as constants."""
    torch.manual_seed(3)
    return {name: torch.randn(t.shape) for name, t in build_network(tiny_config).state_dict().items()}


def config_text(config):
    """A config as the text of a file for --config."""
    values = json.dumps(config_json(config))
    head = "import json\nfrom libs.model import config_from_json\n"
    return f"{head}def get_config():\n    return config_from_json(json.loads({values!r}))\n"


@pytest.fixture
def config_file(tiny_config, tmp_path):
    (tmp_path / "tiny.py").write_text(config_text(tiny_config))
    return tmp_path / "tiny.py"


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
    with safe_open(tmp_path / "own" / "a.safetensors", "pt") as file:
        inside = config_from_json(json.loads(file.metadata()["config"]))
    assert config_json(inside) == config_json(tiny_config)
    converting.convert(str(tmp_path / "own" / "a.safetensors"), tmp_path / "pipeline")
    converting.convert(str(tmp_path / "pipeline"), tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), released)
    converting.convert(str(tmp_path / "pipeline"), tmp_path / "own" / "a.safetensors")
    assert same(load_file(tmp_path / "own" / "a.safetensors"), state)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not any(str(tmp_path) in card.read_text() for card in tmp_path.rglob("README.md"))


@pytest.mark.parametrize("name", ["DiMR-XL-2R", "DiMR-G-2R"])
def test_names_and_shapes_of_the_released_files(name, tmp_path):
    """Tensors without memory, named and shaped as in the released files, fit the config in both directions."""
    with open(ROOT / "tests" / "golden" / f"{name}_state_dict.tsv") as file:
        rows = [(row["name"], row["shape"]) for row in csv.DictReader(file, delimiter="\t")]
    with torch.device("meta"):
        released = {name: torch.empty([int(n) for n in shape.split("x")]) for name, shape in rows}
    network = build_network_on_meta(load_config(f"{name}_imagenet256"))
    own = checkpoint.fitting_weights(network, released, name)
    assert {released_name(key): tensor.shape for key, tensor in own.items()} == {
        k: t.shape for k, t in released.items()
    }


def test_half_precision_stays(state, config_file, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save({released_name(name): tensor for name, tensor in half.items()}, tmp_path / "half.pth")
    converting.convert(str(tmp_path / "half.pth"), tmp_path / "own" / "half.safetensors", str(config_file))
    assert same(load_file(tmp_path / "own" / "half.safetensors"), half)


def test_a_training_checkpoint_brings_its_config_step_and_a_card(state, tiny_config, tmp_path, capsys):
    saved = {"step": 7, "config": config_json(tiny_config), "class_names": ["ant", "bee", "cat"]}
    folder = tmp_path / "7.ckpt"
    folder.mkdir()
    save_file({name: -tensor for name, tensor in state.items()}, folder / "nnet.safetensors")
    save_file(state, folder / "nnet_ema.safetensors")
    (folder / "state.json").write_text(json.dumps(saved))
    out = tmp_path / "own" / "a.safetensors"
    converting.convert(str(folder), out)
    assert same(load_file(out), state) and checkpoint.saved_settings(out) == saved
    card = out.parent / "README.md"
    n = sum(tensor.numel() for tensor in state.values())
    assert f"{n:,} parameters, step 7" in card.read_text() and len(card.read_text().splitlines()) <= 10
    assert file_digest(folder / "nnet_ema.safetensors") in card.read_text()
    card.write_text("Trained on digits.")  # somebody has filled it in
    converting.convert(str(out), out.with_name("b.safetensors"))
    assert card.read_text() == "Trained on digits." and f"{card} is kept as it is" in capsys.readouterr().out


def test_errors_leave_nothing(state, config_file, tiny_config, tmp_path):
    torch.save({released_name(name): tensor for name, tensor in state.items()}, tmp_path / "released.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pth").touch()
    digits = ROOT / "configs" / "digits.py"
    tiny_config.autoencoder.pretrained_path = "assets/no_autoencoder"
    (tmp_path / "no_autoencoder.py").write_text(config_text(tiny_config))
    for weights, out, config, message in (
        ("released.pth", "own/a.safetensors", None, r"no config is saved with .*released.pth: give .* as --config"),
        ("released.pth", "own/a.safetensors", "none.py", "No such file or directory: .*none.py"),
        ("released.pth", "folder", config_file, "folder must be NAME.safetensors, NAME.pth or a new folder"),
        ("released.pth", "own/a.safetensors", digits, "does not fit this model"),
        ("none.pth", "own/a.safetensors", config_file, "no checkpoint at"),
        ("released.pth", "own/a.bin", config_file, "a.bin must be NAME.safetensors, NAME.pth or a new folder"),
        ("released.pth", "/proc/a.pth", config_file, "Cannot write /proc/a.pth: .*, or set OUT"),
        ("empty.pth", "own/a.safetensors", config_file, "empty.pth could not be read as a plain state dict: EOFError"),
        ("released.pth", "own", "no_autoencoder.py", "no_autoencoder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            converting.convert(str(tmp_path / weights), tmp_path / out, config and str(tmp_path / config))
    assert not (tmp_path / "own").exists() and not list((tmp_path / "folder").iterdir())


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
