"""What the environment of a process may hold, and what is made of it."""

import os
import shutil
import subprocess
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import ROOT, overrides, run
from test_train import losses

import eval as evaluation
import train as training
import utils
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


# --- Before and after the work ----------------------------------------------------------------------------------------


def fails(*args, **kwargs):
    raise RuntimeError("no connection")


def test_what_comes_after_training_does_not_fail_it(tiny_config, tmp_path, monkeypatch, caplog):
    def asked(self):
        (tmp_path / "requeue").mkdir(exist_ok=True)  # so that the file cannot be written
        return True

    monkeypatch.setattr(accelerate.Accelerator, "end_training", fails)
    monkeypatch.setattr(training.StopRequest, "agreed", asked)
    assert training.train(tiny_config, tmp_path) == launch.REQUEUE_STATUS
    assert (tmp_path / "ckpts" / "1.ckpt").is_dir()
    assert "a logger could not be closed: no connection" in caplog.text
    assert "no file asks for a requeue" in caplog.text


def test_labels_that_cannot_be_copied_do_not_fail_an_evaluation(tiny_config, tmp_path, monkeypatch, caplog):
    names = ("cfg", "cfg_scale_pow", "metrics", "indices", "nnet_path")
    values = SimpleNamespace(config=tiny_config, IMGsave_path=str(tmp_path), **dict.fromkeys(names))
    monkeypatch.setattr(evaluation.flags, "FLAGS", values)
    monkeypatch.setattr(launch, "config_name", lambda: "tiny")
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: None)
    monkeypatch.setattr(shutil, "copyfile", fails)
    evaluation.main([])
    assert f"the labels are in {tmp_path} alone: no connection" in caplog.text


def test_a_logger_that_cannot_start_is_named_before_training(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", fails)
    with pytest.raises(UserError, match=r"a logger cannot start .no connection.: set config.wandb.mode offline"):
        training.train(tiny_config, tmp_path)


@pytest.mark.slow
def test_what_the_compiler_lacks_is_said_in_one_line(tiny_config, tmp_path):
    flags = [*overrides(tiny_config), f"--workdir={tmp_path / 'run'}", "--config.train.compile=blocks"]
    env = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run("train.py", *flags, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: torch.compile failed (InvalidCxxCompiler: No working C++ compiler found" in done.stderr


# --- Other systems ----------------------------------------------------------------------------------------------------


def test_windows_is_refused_in_one_line():
    done = run("-c", "import sys; sys.platform = 'win32'; import libs")
    assert (done.returncode, done.stderr) == (1, "error: these programs need Linux or macOS; on Windows use WSL\n")


def test_macos_counts_its_cpus_and_is_told_of_its_gpu(monkeypatch, caplog):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert launch.cpu_count() == os.cpu_count()
    launch.check_environment()
    assert "Apple's GPU (MPS) is not used: noise schedules are float64" in caplog.text


@pytest.mark.parametrize(("uv", "said"), [(True, "uv pip install --quiet -r wanted.txt"), (False, "has no pip")])
def test_set_up_in_an_environment_without_pip(tmp_path, uv, said):
    """As uv makes them. A stand-in for Python without pip."""
    (tmp_path / "wanted.txt").write_text("numpy\n")
    programs = {"python": f'[ "$1" = -c ] && echo {tmp_path}'} | ({"uv": 'echo uv "$@"'} if uv else {})
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = f"source {ROOT / 'scripts/setup.sh'}; setup_environment wanted.txt"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if uv else 1) and said in done.stdout + done.stderr


# --- Paths ------------------------------------------------------------------------------------------------------------


def test_home_is_expanded_in_flags_and_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = launch.Parser("")
    for flag in ("--out", "--images"):
        parser.add_argument(flag)
    parser.add_argument("files", nargs="*")
    monkeypatch.setattr("sys.argv", ["program", "--out=~/a b", "--images", "~/c", "~", "d~/e", "./~/f"])
    args = parser.parse_args()
    assert (args.out, args.images) == (f"{tmp_path}/a b", f"{tmp_path}/c")
    assert args.files == [str(tmp_path), "d~/e", "./~/f"] and parser.parse_args(["~/x"]).files == [f"{tmp_path}/x"]
    assert launch.expand_home("--config.init.path=~/x") == f"--config.init.path={tmp_path}/x"
    text = (ROOT / "configs/digits_released.py").read_text().replace("workdir/quickstart/latents", "~/latents")
    (tmp_path / "home.py").write_text(text)
    assert utils.load_config(tmp_path / "home.py").dataset.path == f"{tmp_path}/latents"
    done = run("scripts/describe_model.py", f"--config={tmp_path / 'home.py'}", env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_every_program_with_flags_of_its_own_expands_home():
    programs = [ROOT / "img2npz.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert not [path.name for path in programs if "ArgumentParser(" in path.read_text()]
