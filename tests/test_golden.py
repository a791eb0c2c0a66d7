"""The released code's numbers: golden tensors, parameter and multiply-add counts, checkpoint names and shapes."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_config
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from libs import optim
from libs.checkpoint import fitting_weights, released_name
from libs.model import build_network

sys.path.insert(0, str(ROOT / "scripts"))
import check_golden

GOLDEN = Path(__file__).parent / "golden"


def fails(errors: dict[str, float]) -> bool:
    return any(error > check_golden.PLAIN.tolerance(group) for group, error in errors.items())


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_golden(path):
    errors = check_golden.check_file(path)
    assert not fails(errors), errors


def test_every_group_is_checked():
    groups = set().union(*(check_golden.check_file(path) for path in GOLDEN.glob("*.safetensors")))
    expected = "outputs,smaller input,loss,gradients,fit,EMA,guided samples,solver,schedule,SDE,Euler-Maruyama"
    assert groups == {*expected.split(","), "guidance", "targets"}


@pytest.mark.parametrize(
    "name", ["stages.0.blocks.1.block1.query_key_value.weight", "stages.1.upsample.1.kernel.weight"]
)
def test_a_weight_off_by_one_percent_fails(name, tmp_path):
    with safe_open(GOLDEN / "tiny_2r.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors[f"state/{name}"] *= 1.01
    save_file(tensors, tmp_path / "off.safetensors", metadata)
    assert fails(check_golden.check_file(tmp_path / "off.safetensors"))


def test_tanh_gelu_fails(monkeypatch):
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))
    assert fails(check_golden.check_file(GOLDEN / "tiny_2r.safetensors"))


def test_decaying_the_time_weights_fails(monkeypatch):
    monkeypatch.setattr(optim, "NO_DECAY", ())
    monkeypatch.setattr(optim.split_decay, "__defaults__", None)
    errors = check_golden.check_file(GOLDEN / "tiny_2r.safetensors")
    assert errors["fit"] > check_golden.TOLERANCE


MODELS = {  # parameters and multiply-adds per image as published or counted from the released code
    "DiMR-XL-2R_imagenet256": (505_046_408, 160.18e9),
    "DiMR-G-2R_imagenet256": (1_056_352_904, 331.10e9),
    "DiMR-XL-3R_imagenet512": (525.03e6, 206.07e9),
    "DiMR-M-3R_imagenet64": (132.83e6, None),
    "DiMR-L-3R_imagenet64": (284.14e6, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_size_of_published_models(name):
    parameters, multiply_adds = MODELS[name]
    config = load_config(name)
    with torch.device("meta"):
        nnet = build_network(config)
        inputs = torch.randn(1, *config.z_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    count = sum(p.numel() for p in nnet.parameters())
    if isinstance(parameters, int):
        assert count == parameters
    else:
        assert count == pytest.approx(parameters, abs=5e3)
    if multiply_adds:
        with FlopCounterMode(display=False) as counter:
            nnet(*inputs)
        assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, abs=5e6)


@pytest.mark.parametrize("model", ["DiMR-XL-2R", "DiMR-G-2R"])
def test_released_checkpoint_names_load(model):
    """A state dict with exactly the released names and shapes: nothing missing, nothing left over."""
    with open(GOLDEN / f"{model}_state_dict.tsv") as file:
        shapes = {row["name"]: tuple(map(int, row["shape"].split("x"))) for row in csv.DictReader(file, delimiter="\t")}
    with torch.device("meta"):
        nnet = build_network(load_config(f"{model}_imagenet256"))
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    fitting_weights(nnet, state, "released")
    assert {released_name(name) for name in nnet.state_dict()} == set(shapes)
    state.pop("stages.0.class_embeds.weight")
    with pytest.raises(ValueError, match=r"stages.0.class_embed.weight: missing"):
        fitting_weights(nnet, state, "released")
