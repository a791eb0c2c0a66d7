"""What the environment of a process may hold, and what is made of it."""

import os

import pytest
from test_train import losses

import train as training
from libs import UserError, launch


def test_variables_of_accelerate_do_not_change_a_run(tiny_config, tmp_path, monkeypatch, caplog):
    """Gradients would be divided by 4, the network compiled anew."""
    tiny_config.train.n_steps = 2
    training.train(tiny_config, tmp_path / "plain")
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "EAGER"), ("TORCH_DEVICE", "meta")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    training.train(tiny_config, tmp_path / "more")
    assert losses(tmp_path / "more") == losses(tmp_path / "plain")
    for line in ("GRADIENT_ACCUMULATION_STEPS=4", "DYNAMO_BACKEND=EAGER", "TORCH_DEVICE=meta"):
        assert f"ACCELERATE_{line} is ignored" in caplog.text


def test_what_accelerate_launch_sets_itself_is_no_news(monkeypatch, caplog):
    """Those of its simple and its multi-process launcher, with the flags of the README."""
    names = {"MIXED_PRECISION": "bf16", "USE_CPU": "True", "CPU_AFFINITY": "1", "DEBUG_MODE": "true"}
    names |= {"DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "DYNAMO_USE_FULLGRAPH": "False"}
    for name, value in names.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    before = dict(os.environ)
    assert launch.check_environment()
    assert os.environ == before and "ignored" not in caplog.text


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_ways_to_train_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"ACCELERATE_USE_{name}=true is not supported"):
        launch.make_accelerator()


@pytest.mark.parametrize("make", [launch.make_accelerator, lambda: launch.make_state(launch.TIMEOUT)])
def test_a_leftover_world_size_is_named(monkeypatch, make):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="WORLD_SIZE is set without MASTER_ADDR: unset it"):
        make()
