"""Weights in every form: the same tensors to the bit after every way round, and one clear line where there is none."""

import argparse
import json
import os

import pytest
import torch
from conftest import ROOT, RunsCode, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import utils
from libs import UserError, checkpoint
from libs.checkpoint import find_weights, read_state_dict, released_name, save_checkpoint
from libs.files import file_digest
from libs.model import build_network, config_from_json, config_json, read_network
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_round_is_exact(state, config_file, tiny_config, tmp_path, dtype):
    """Released .pth -> safetensors -> pipeline -> released .pth, and from the pipeline to safetensors."""
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
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


def test_a_training_checkpoint_brings_its_config_step_and_a_card(state, tiny_config, tmp_path, capsys):
    saved = {"step": 7, "config": config_json(tiny_config), "class_names": ["ant", "bee", "cat"]}
    saved["autoencoder"] = {"scale": [0.5]}
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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("blocks.", "blocks._orig_mod."): tensor for name, tensor in state.items()},
        lambda state: {f"net.inner.{name}": tensor for name, tensor in state.items()},
        lambda state: {"ema": state, "model": {}, "opt": {"step": 3}, "args": argparse.Namespace(lr=1e-4)},
        lambda state: {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {"ema": state}},
    ],
    ids=["DDP", "compiled", "compiled blocks", "a prefix", "DiT's", "Lightning's", "nested twice"],
)
def test_weights_as_other_programs_keep_them(state, config_file, tmp_path, wrap):
    for names, source in ((str, "own"), (released_name, "released")):
        torch.save(wrap({names(name): tensor for name, tensor in state.items()}), tmp_path / f"{source}.pth")
        _, found, _, _ = read_network(tmp_path / f"{source}.pth", utils.load_config(config_file))
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of git-lfs"),
        (b'{"error": "not found"}', "is a JSON file"),
        (b"", "is not a whole safetensors file|could not be read as a plain state dict: EOFError"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, ending, content, message):
    (tmp_path / f"w.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / f"w.{ending}")


def test_safetensors_under_another_name(state, tmp_path):
    save_file(state, tmp_path / "weights.pth")
    assert read_state_dict(tmp_path / "weights.pth").keys() == state.keys()


def test_weights_of_another_program_are_counted_and_named(state, config_file, tmp_path):
    torch.save({"generator": state, "steps": 3}, tmp_path / "gan.pth")
    with pytest.raises(UserError, match=r"holds something else \(the keys \['generator', 'steps'\]\)"):
        read_state_dict(tmp_path / "gan.pth")
    more = {f"other.{i}": torch.zeros(1) for i in range(500)}
    torch.save({**state, **more}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=rf"of {len(state)} tensors 0 are missing and 0 .*; 500 are left over"):
        read_network(tmp_path / "more.pth", utils.load_config(config_file))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(state, config_file, tmp_path, umask, mode):
    torch.save(state, tmp_path / "released.pth")
    former = os.umask(umask)
    try:
        for out in ("a.safetensors", "pipeline"):
            converting.convert(str(tmp_path / "released.pth"), tmp_path / out, str(config_file))
        save_checkpoint(tmp_path / "1.ckpt", {"nnet.safetensors": state}, {"step": 1})
    finally:
        os.umask(former)
    files = [file for file in tmp_path.rglob("*.safetensors") if file.parts[-2] != "autoencoder"]
    assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_errors_leave_nothing(state, config_file, tiny_config, tmp_path):
    torch.save({released_name(name): tensor for name, tensor in state.items()}, tmp_path / "released.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": RunsCode(open, tmp_path / "own", "w")}, tmp_path / "harm.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
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
        ("harm.pth", "own/a.safetensors", config_file, "could not be read as a plain state dict"),
        ("list.pth", "own/a.safetensors", config_file, "expected a plain state dict of tensors"),
        ("cut.safetensors", "own/a.safetensors", config_file, "not a whole safetensors file"),
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
    with pytest.raises(ValueError, match=r"without nnet_ema.safetensors or nnet_ema.pth"):
        find_weights(tmp_path)
    (tmp_path / "pth" / "nnet_ema.pth").touch()
    assert find_weights(tmp_path / "pth") == tmp_path / "pth" / "nnet_ema.pth" and not caplog.text


def test_hub_weights_are_found_by_their_address(tmp_path, monkeypatch):
    """A cached file needs no network."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", pytest.fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: str(tmp_path.joinpath(*names)))
    assert str(find_weights("hf://QHL067/DiMR/folder/a.pth")) == f"{tmp_path}/QHL067/DiMR/folder/a.pth"


def test_hub_without_network_is_one_line(tmp_path):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("scripts/convert_checkpoint.py", checkpoint.RELEASED, tmp_path / "a.pth", env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "hf download QHL067/DiMR DiMR-XL_2R_800epochs.pth --local-dir assets" in done.stderr
    assert "offline mode is enabled" in done.stderr and not (tmp_path / "a.pth").exists()
    for address in ("hf://QHL067/DiMR", "hf://a.pth", "hf://"):
        with pytest.raises(ValueError, match="expected hf://OWNER/REPOSITORY/FILE"):
            find_weights(address)
