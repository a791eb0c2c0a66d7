"""Training: the same whatever the division of the batch, resumed to the bit, and clear about what does not fit."""

import ctypes
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from conftest import load_config, overrides, run
from forked import run_forked
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager

import train as training
from libs import launch
from libs.data import StepBatches
from libs.model import Model, build_network
from libs.optim import make_adamw, split_decay, warmup_lr
from libs.randomness import step_draws
from libs.train_state import read_checkpoint


def log_lines(workdir) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # another process may be writing


def losses(workdir) -> list[float]:
    return [line["loss"] for line in log_lines(workdir)]


def wait_for_step(workdir, step):
    """Wait until `step` lines are logged."""
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < step:
        assert time.monotonic() < deadline, "training did not get going"
        time.sleep(0.005)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for file, named in one.items():
        assert named.keys() == other[file].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, other[file][name]), (file, name)


def assert_same_checkpoint(one, other):
    (state, tensors), (other_state, other_tensors) = read_checkpoint(one), read_checkpoint(other)
    assert (state["step"], state["scaler"]) == (other_state["step"], other_state["scaler"])
    assert_same_tensors(tensors, other_tensors)


def test_training_writes_what_it_says(trained_run):
    assert len(losses(trained_run)) == 6 and all(np.isfinite(losses(trained_run)))
    assert {p.name for p in (trained_run / "ckpts").iterdir()} == {"3.ckpt", "6.ckpt"}
    # 2 classes x 5 samples of 16x16 in a grid with 2 pixels of padding
    assert Image.open(trained_run / "samples" / "4.png").size == (5 * 18 + 2, 2 * 18 + 2)
    assert list((trained_run / "tensorboard").iterdir())
    assert json.loads((trained_run / "config.json").read_text())["train"]["batch_size"] == 12


def test_resume_is_exact(tiny_config, trained_run, tmp_path):
    """Interval 0 saves at the end alone."""
    tiny_config.train.update(n_steps=3, save_interval=0)
    training.train(tiny_config, tmp_path)
    tiny_config.train.n_steps = 6
    training.train(tiny_config, tmp_path)
    assert losses(tmp_path) == losses(trained_run)
    assert_same_checkpoint(tmp_path / "ckpts" / "6.ckpt", trained_run / "ckpts" / "6.ckpt")


@pytest.mark.slow
def test_mixed_precision_and_wandb_offline(tiny_config, tmp_path):
    flags = [*overrides(tiny_config), "--config.wandb.mode=offline", "--config.train.n_steps=3"]
    done = run("train.py", *flags, f"--workdir={tmp_path}", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert done.returncode == 0, done.stderr
    assert "bf16 precision" in done.stderr and len(losses(tmp_path)) == 3
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs compute in fp16")
def test_fp16_is_refused_on_a_cpu_where_it_would_be_float32(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="must be one of no, bf16 on a CPU; found fp16"):
        training.train(tiny_config, tmp_path / "w")


def test_pixel_training(tiny_images, tmp_path):
    """Its classes are called as their folders."""
    config = load_config("DiMR-M-3R_imagenet64")
    config.z_shape = (3, 16, 16)
    for stage in config.nnet.stages:
        stage.dim, stage.depth, stage.num_heads = 8, 3, 2
    config.dataset.update(path=str(tiny_images), n_classes=3, num_workers=2)
    config.train.update(n_steps=3, batch_size=8, log_interval=1, eval_interval=2, grid=(2, 5))
    config.sample.grid_steps = 3
    training.train(config, tmp_path)
    assert all(np.isfinite(losses(tmp_path))) and (tmp_path / "samples" / "2.png").exists()
    state, _ = read_checkpoint(tmp_path / "ckpts" / "3.ckpt")
    assert state["class_names"] == ["class0", "class1", "class2"]


def test_unconditional_training_does_not_read_the_labels(tiny_config, tmp_path):
    """On a store of three classes; without care its labels would be beyond the one class embedding."""
    tiny_config.dataset.n_classes = 0
    tiny_config.sample.scale = 1.0
    tiny_config.train.n_steps = 3
    training.train(tiny_config, tmp_path)
    state, tensors = read_checkpoint(tmp_path / "ckpts" / "3.ckpt")
    assert state["class_names"] == Model.open(tmp_path / "ckpts" / "3.ckpt").class_names == []
    assert tensors["nnet.safetensors"]["stages.0.class_embed.weight"].shape == (1, 16)
    assert all(np.isfinite(losses(tmp_path)))


def test_data_order_is_a_function_of_seed_and_step():
    def first(n, **kwargs):
        iterator = iter(StepBatches(50, 12, seed=3, **kwargs))
        return [next(iterator).tolist() for _ in range(n)]

    whole = first(9)  # 4 steps an epoch: two epochs and one step
    assert first(3, start_step=6) == whole[6:]
    for epoch in (whole[:4], whole[4:8]):
        assert len({i for batch in epoch for i in batch}) == 48
    assert whole[:4] != whole[4:8]
    parts = [first(4, n_processes=2, process=p, accumulation=3) for p in range(2)]
    assert parts[0][0] + parts[0][1] + parts[0][2] + parts[1][0] + parts[1][1] + parts[1][2] == whole[0]


def test_draws_of_a_step():
    a, b = (step_draws(1, step, 64, (4, 8, 8), "cpu") for step in (5, 6))
    assert torch.equal(a.eps, step_draws(1, 5, 64, (4, 8, 8), "cpu").eps)
    for name in ("uniform_time", "uniform_drop", "eps", "latent_noise"):
        assert not torch.equal(getattr(a, name), getattr(b, name))
    assert a.eps.std().item() == pytest.approx(1, abs=0.02) and 0 <= a.uniform_time.min() < a.uniform_time.max() < 1
    assert not torch.equal(a.eps, a.latent_noise)


def test_labels_are_dropped_at_the_published_rate(tiny_config):
    draws = step_draws(0, 0, 5000, (1, 2, 2), "cpu")
    records, labels = torch.zeros(5000, 1, 2, 2, dtype=torch.uint8), torch.zeros(5000, dtype=torch.long)
    x0, seen = training.prepare_batch(records, labels, draws, tiny_config.dataset, None, null_label=7)
    assert (seen == 7).float().mean().item() == pytest.approx(0.1, abs=0.02) and (x0 == -1).all()


def test_decay_rule_and_warmup(tiny_config):
    nnet = build_network(tiny_config)
    decayed, spared = split_decay(nnet)
    names = {id(p): name for name, p in nnet.named_parameters()}
    assert all(re.search(r"time_(weight|bias)$", names[id(p)]) for p in spared)
    assert not any("time_" in names[id(p)] for p in decayed)
    groups = make_adamw(nnet, 2e-4, (0.99, 0.99), 0.03).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(len(decayed), 0.03), (len(spared), 0.0)]
    assert [warmup_lr(2e-4, k, 5000) for k in (0, 2500, 5000, 9999)] == [0, 1e-4, 2e-4, 2e-4]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("z_shape", (4, 7, 8), "config.z_shape must be divisible by"),
        ("z_shape", (4, 16, 16), "record_shape of the store"),
        ("loss_coeffs", (1.0,), "config.loss_coeffs must be 2 numbers of at least 0"),
        ("train.accumulation", 5, "config.train.batch_size must be divisible by processes x accumulation"),
        ("train.batch_size", 600, "found 600 with 1 x 1 and 60 records"),
        ("dataset.path", "nowhere", "nowhere"),
        ("autoencoder.pretrained_path", "", "set config.autoencoder.pretrained_path"),
        ("dataset.n_classes", 4, "n_classes of the store is 3"),
        ("autoencoder.pretrained_path", "assets/none.pth", "No autoencoder at assets/none.pth"),
        ("sample.scale", 0.4, "its 0.4 is --cfg=1.4 here"),
        ("dataset.p_uncond", 1.5, "config.dataset.p_uncond must be at least 0 and at most 1; found 1.5"),
        ("seed", -1, "config.seed must be at least 0"),
        ("z_shape", (4, 8), r"config.z_shape must be \(channels, height, width\); found \(4, 8\)"),
        ("loss_coeffs", (1, "a"), r"config.loss_coeffs must be 2 numbers of at least 0; found \(1, 'a'\)"),
        ("train.keep_last", 0, "config.train.keep_last must be at least 1; found 0"),
        ("train.grid", (0, 5), r"config.train.grid must be \(rows, columns\), at least 1; found \(0, 5\)"),
        ("train.grad_clip", -1.0, "config.train.grad_clip must be at least 0; found -1"),
        ("lr_scheduler.warmup_steps", -5, "config.lr_scheduler.warmup_steps must be at least 0; found -5"),
        ("ema.extra_rates", (0.5, 2), r"config.ema.extra_rates must be at least 0 and below 1; found \(0.5, 2\)"),
        ("ema.power_widths", (0.3,), r"sigma_rel of a power-function EMA must be in \(0, 0.28\); found 0.3"),
        ("init.freeze", ("nothing",), "'nothing' matches no parameter"),
        ("train.compile", "fast", "config.train.compile must be one of auto, whole, blocks, off; found 'fast'"),
        ("schedule", "edm", "config.schedule must be one of sd, vpsde, vpsde_cosine, linear; found 'edm'"),
        ("prediction", "noise", "config.prediction must be one of eps, v, x; found 'noise'"),
        ("time_sampling", "beta", "config.time_sampling must be one of uniform, logit_normal; found 'beta'"),
        ("loss_weighting", "p2", "config.loss_weighting must be one of unit, min_snr; found 'p2'"),
        ("time_std", 0.0, "config.time_std must be at least 0.001; found 0"),
        ("time_shift", -1.0, "config.time_shift must be at least 0.001; found -1"),
        ("sample.time_shift", 0.0, "config.sample.time_shift must be at least 0.001; found 0"),
    ],
)
def test_bad_settings_are_clear_and_early(tiny_config, tmp_path, field, value, message):
    place = tiny_config
    *parents, last = field.replace("[", ".").replace("]", "").split(".")
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training.train(tiny_config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/digits.py", "--config.train.batchsize=3"], 'Did you mean "batch_size"'),
        (["--config=configs/digits.py", "--config.nnet.stages[0].depth=4"], "error: depth of a stage must be odd"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=BAD/misspelt.py"], 'Did you mean "grad_clip"'),
        (["--config=BAD/empty.py"], "has no attribute 'get_config'"),
        (["--config=BAD/other.py"], "other.py lacks autoencoder.decode_dtype, "),
        (["--config=configs/digits.py", "--config.dataset.path=~/none"], f"No latents at {Path.home() / 'none'}"),
        (["--config=configs/digits.py", "--config.nnet.stages[x].depth=4"], "override of its fields: tuple indices"),
        (["--config=configs/digits.py", "train"], "expected only flags of the form --name=value; found train"),
    ],
)
def test_errors_on_the_command_line_are_one_message(tmp_path, flags, message):
    misspelt = "from configs.common import base\ndef get_config(): base().train.grad_clipp = 1.0\n"
    (tmp_path / "misspelt.py").write_text(misspelt)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "other.py").write_text("import ml_collections\ndef get_config(): return ml_collections.ConfigDict()\n")
    flags = [flag.replace("BAD", str(tmp_path)) for flag in flags]
    done = run_forked("train.py", *flags, f"--workdir={tmp_path / 'w'}")
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compiled_training_is_the_same_training(tiny_config, tmp_path, monkeypatch, how):
    """One graph for all steps and grids, without breaks; the code generator itself is left out, for speed."""
    training.train(tiny_config, tmp_path / "plain")
    graphs = []

    def count_and_run(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiler(f, backend=count_and_run, **kwargs))
    tiny_config.train.update(compile=how, recompute="2" if how == "whole" else "off")
    training.train(tiny_config, tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    # blocks: those of a branch share a graph (its first may have its input in another layout), as do long skips; a head
    # for each of the two branches, and what joins them
    assert len(graphs) == 1 if how == "whole" else 7 <= len(graphs) <= 8


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_on_a_cpu():
    """Its pages would have to be cleared again for the next tensor."""
    code = """
import resource, sys, torch
from libs.launch import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(20)][-1])
"""
    kept, usual = (int(run("-c", code, how).stdout) for how in ("keep", "usual"))
    assert 4 * kept < usual


@pytest.mark.parametrize(("precision", "warned"), [("no", True), ("bf16", False)])
def test_float32_on_a_gpu_is_warned_of(monkeypatch, caplog, precision, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **kwargs: SimpleNamespace(is_main_process=True))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    launch.make_accelerator()
    assert ("float32 on a GPU takes about ten times as long as bf16" in caplog.text) == warned
