"""FSDP: the losses of DDP, the files of one process, and nobody left waiting.

As a program under a launcher (`tests/test_sharding.py WHAT ...`) this file is what each process of a test does.
"""

import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import free_port, make_tiny_config, overrides
from forked import Forked
from test_train import assert_same_checkpoint, assert_same_tensors, log_lines, losses, wait_for_step

import train as training
from libs import checkpoint, sharding
from libs.model import build_network
from libs.optim import EMA, make_adamw
from libs.train_state import TrainState, read_checkpoint

SHARDED = "--config.train.sharded=True"


def start_ranks(*command, processes=2, own=None, **env) -> list[Forked]:
    """Start the processes of a run without a launcher: a test can stop one of them. `own`: further words for each."""
    own = own or [[]] * processes
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = range(processes)
    return [Forked(*command, *own[k], env={**env, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in ranks]


def join(ranks, expected=0) -> list[str]:
    """Wait for the processes of a run to end, all with one status; returns what each said."""
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [expected] * len(ranks), said
    return said


def run_ranks(*command, **kwargs) -> str:
    """A program in several processes to its good end; returns what the main one said."""
    return join(start_ranks(*command, **kwargs))[0]


def resume_point(workdir, other, step):
    """A work folder as it was after `step` updates."""
    other.mkdir()
    shutil.copytree(workdir / "ckpts" / f"{step}.ckpt", other / "ckpts" / f"{step}.ckpt")
    shutil.copy(workdir / "metrics.jsonl", other)
    return other


@pytest.fixture
def config(tiny_config):
    """12 updates of 2 micro-batches, clipped (so that a norm of only one's own piece would show), saved half-way."""
    tiny_config.train.update(n_steps=12, save_interval=6, eval_interval=8, accumulation=2, grad_clip=0.05)
    return tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work folders of the straight runs, made by the first test."""
    return tmp_path_factory.mktemp("ddp"), tmp_path_factory.mktemp("sharded")


@pytest.mark.slow
def test_losses_are_ddps(config, runs):
    said = []
    for workdir, flags in zip(runs, ([], [SHARDED, "--config.train.recompute=all"]), strict=True):
        errors = run_ranks("train.py", *overrides(config), *flags, f"--workdir={workdir}")
        said.append(next(line for line in errors.splitlines() if "MB of weights" in line))
        assert (workdir / "samples" / "8.png").exists()
    ddp, sharded = runs
    np.testing.assert_allclose(losses(sharded), losses(ddp), rtol=2e-5)
    norms = [[line["grad_norm"] for line in log_lines(workdir)] for workdir in runs]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    assert min(norms[0]) > config.train.grad_clip  # clipping was at work
    whole, half = (float(line.split(" MB")[0].split()[-1]) for line in said)
    assert half == pytest.approx(whole / 2, rel=0.02)
    assert said[0].endswith("whole") and said[1].endswith("FSDP")


@pytest.mark.slow
def test_files_are_those_of_one_process(config, runs, tmp_path):
    (_, one), (saved, other) = (read_checkpoint(workdir / "ckpts" / "12.ckpt") for workdir in runs)
    assert one.keys() == other.keys()
    for file, named in one.items():
        shapes = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (named, other[file])]
        assert shapes[0] == shapes[1]
    # Into the objects of a single process and out again, nothing changes.
    process = SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=None)
    state = training.make_state(config, tmp_path, process)
    state.resume(runs[1] / "ckpts", {name: saved[name] for name in ("config", "mixed_precision", "data")})
    assert state.step == 12
    assert_same_tensors(state.tensors(), other)


@pytest.mark.slow
def test_one_process_resumes_from_an_fsdp_checkpoint(config, runs, tmp_path):
    workdir = resume_point(runs[1], tmp_path / "plain", 6)
    training.train(config, workdir)
    np.testing.assert_allclose(losses(workdir), losses(runs[1]), rtol=2e-5)


@pytest.mark.slow
def test_killed_it_resumes_exactly(config, runs, tmp_path):
    config.train.save_interval = 1
    ranks = start_ranks("train.py", *overrides(config), SHARDED, f"--workdir={tmp_path}")
    wait_for_step(tmp_path, 5)
    for rank in ranks:
        rank.kill()
    join(ranks, expected=-signal.SIGKILL)
    assert len(losses(tmp_path)) < 12, "it ended before it was killed"
    assert "resuming from" in run_ranks("train.py", *overrides(config), SHARDED, f"--workdir={tmp_path}")
    assert losses(tmp_path) == losses(runs[1])
    assert_same_checkpoint(tmp_path / "ckpts" / "12.ckpt", runs[1] / "ckpts" / "12.ckpt")


@pytest.mark.slow
def test_fsdp_resumes_from_a_ddp_checkpoint_whatever_comes(config, runs, tmp_path):
    """The losses of the run that wrote it; then a checkpoint cannot be written, and another process than the main one
    is asked to stop: nobody is left waiting."""
    workdir = resume_point(runs[0], tmp_path / "run", 6)
    config.train.update(n_steps=5000, save_interval=4, eval_interval=10_000)
    ranks = start_ranks(__file__, "full_disk", *overrides(config), SHARDED, f"--workdir={workdir}")
    wait_for_step(workdir, 13)
    ranks[1].send_signal(signal.SIGTERM)
    errors = join(ranks, expected=75)
    np.testing.assert_allclose(losses(workdir)[:12], losses(runs[0]), rtol=2e-5)
    assert "8.ckpt is lost, training goes on" in errors[0]
    step = int((workdir / "requeue").read_text())
    folders = checkpoint.checkpoint_folders(workdir / "ckpts")
    assert folders[0].name == f"{step}.ckpt" and "8.ckpt" not in [folder.name for folder in folders]
    read_checkpoint(folders[0])


def test_processes_started_differently_are_told(config, tmp_path):
    flags = [*overrides(config), f"--workdir={tmp_path / 'w'}"]
    ranks = start_ranks("train.py", *flags, own=[["--config.optimizer.lr=0.1"], ["--config.optimizer.lr=0.2"]])
    for said in join(ranks, expected=1):
        assert "error: processes 0 and 1 were started differently (config.optimizer.lr: 0.1 on 0, 0.2 on 1)" in said
        assert "Traceback" not in said
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_pieces(runs):
    """What `pieces` below asserts in each of three processes, where most tensors do not divide."""
    run_ranks(__file__, "pieces", runs[0] / "ckpts" / "12.ckpt", processes=3)


@pytest.mark.slow
def test_bf16_is_autocasts(config, runs, tmp_path):
    config.train.n_steps = 3
    said = run_ranks(
        "train.py", *overrides(config), SHARDED, f"--workdir={tmp_path}", ACCELERATE_MIXED_PRECISION="bf16"
    )
    assert "bf16 precision" in said
    off = np.abs(np.array(losses(tmp_path)) / losses(runs[1])[:3] - 1).max()
    assert 1e-6 < off < 1e-2  # not float32 arithmetic, and close to it
    _, tensors = read_checkpoint(tmp_path / "ckpts" / "3.ckpt")
    assert {tensor.dtype for named in tensors.values() for tensor in named.values()} == {torch.float32}


def test_settings_that_cannot_work(config, tmp_path, monkeypatch):
    config.train.sharded = True
    with pytest.raises(ValueError, match=r"train.sharded needs several processes, found 1"):
        training.train(config, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_FSDP=true is not supported: .*config.train.sharded is FSDP"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_losses_are_ddps_on_gpus_in_bf16(config, tmp_path):
    for name, flags in (("ddp", []), ("sharded", [SHARDED])):
        command = ["train.py", *overrides(config), *flags, f"--workdir={tmp_path / name}"]
        run_ranks(*command, ACCELERATE_MIXED_PRECISION="bf16")
    np.testing.assert_allclose(losses(tmp_path / "sharded"), losses(tmp_path / "ddp"), rtol=1e-3)
    training.train(config, resume_point(tmp_path / "sharded", tmp_path / "plain", 6))
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "ddp"), rtol=1e-2)


# --- What the processes do --------------------------------------------------------------------------------------------


def full_disk():
    save_file, calls = checkpoint.save_file, []

    def full_at_first(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, metadata)

    checkpoint.save_file = full_at_first
    runpy.run_path("train.py", run_name="__main__")


def pieces(folder):
    """Against the same network whole: weights read and written, gradients, their norm, updates, averages, fp16."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = make_tiny_config("", "")
    _, tensors = read_checkpoint(training.Path(folder))

    def build(sharded):
        torch.manual_seed(0)
        nnet = build_network(config)
        ema = EMA(nnet, 0.5)
        if sharded:
            sharding.shard(nnet, [ema.model], torch.device("cpu"))
        state = TrainState(nnet, {checkpoint.EMA_FILE: ema}, make_adamw(nnet, 1e-3, (0.9, 0.99), 0.03))
        checkpoint.load_weights(nnet, tensors[checkpoint.WEIGHTS_FILE], "")
        checkpoint.load_weights(ema.model, tensors[checkpoint.EMA_FILE], "")
        state.load_optimizer(tensors[checkpoint.OPTIMIZER_FILE])
        return state

    plain, state = build(False), build(True)
    nnet, ema, plain_ema = state.nnet, *(s.emas[checkpoint.EMA_FILE].model for s in (state, plain))

    # Shards of weights, EMA weights and moments; an axis that does not divide leaves the last processes less.
    total = sum(p.numel() for p in plain.nnet.parameters())
    moments = [s["exp_avg"] for s in state.optimizer.state.values()]
    for part in (nnet.parameters(), ema.parameters(), moments):
        assert sum(sharding.local(p).numel() for p in part) == pytest.approx(total / size, rel=0.3)

    # To the bit what was read, and on the main process only.
    gathered = state.tensors()
    if rank == 0:
        assert_same_tensors(gathered, tensors)
    assert rank == 0 or gathered == {file: {} for file in tensors}

    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(6, 4, 8, 8, generator=generator), torch.rand(6, generator=generator) * 1000
    y, own = torch.arange(6) % 4, slice(rank * 6 // size, (rank + 1) * 6 // size)

    # Whole for as long as it is needed, and only then; processes need not keep step within.
    with sharding.whole(ema), torch.no_grad():
        for _ in range(rank):
            assert torch.equal(ema(x, t, y)[-1], plain_ema(x, t, y)[-1])
    assert all(isinstance(p, sharding.DTensor) for p in ema.parameters())

    # Updates as of the whole batch in one process, in float32 and bf16, clipped.
    for bf16 in (False, False, True):
        for each, rows in ((plain, slice(None)), (state, own)):
            each.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = each.nnet(x[rows], t[rows], y[rows])
            sum(output.float().square().mean() for output in outputs).backward()
        norms = [each.update(0.01) for each in (plain, state)]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-2 if bf16 else 2e-5, atol=0)
        if not bf16:
            for one, other in ((nnet, plain.nnet), (ema, plain_ema)):
                for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
                    torch.testing.assert_close(sharding.full(p.detach()), q.detach(), rtol=1e-4, atol=1e-5, msg=name)

    # A gradient that overflows in one process only is nobody's update, and the loss scale falls everywhere.
    before = [sharding.local(p.detach()).clone() for p in nnet.parameters()]
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflow in (True, False):
        state.optimizer.zero_grad()
        loss = sum(output.square().mean() for output in nnet(x[own], t[own], y[own]))
        state.scaler.scale(loss * (float("inf") if overflow and rank == 1 else 1.0)).backward()
        state.update(0.0)
        same = all(torch.equal(sharding.local(p.detach()), q) for p, q in zip(nnet.parameters(), before, strict=True))
        assert same == overflow and state.scaler.get_scale() == 512.0
    assert state.skipped.tolist() == [0.0, 1.0]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    what = {"full_disk": full_disk, "pieces": pieces}[sys.argv.pop(1)]
    what(*(sys.argv[1:] if what is pieces else ()))
