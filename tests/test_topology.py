"""The same run on any number of processes, passes and machines, and what happens when one of them is lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, make_tiny_config, overrides, run
from forked import Forked
from test_train import losses

import train as training

STEPS, HALF = 50, 25
ROUND_OFF = (2e-5, 1e-3)  # relative, of losses and gradient norms: sums of float32 in another order


def curves(workdir) -> np.ndarray:
    """Losses and gradient norms by step, (2, steps). The norms show a wrong scale, which Adam would undo."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["loss"] for line in lines], [line["grad_norm"] for line in lines]])


def assert_same_curves(workdir, expected):
    for found, wanted, tolerance in zip(curves(workdir), expected, ROUND_OFF, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance)


@pytest.fixture
def config(tiny_autoencoder, tiny_latents):
    """50 steps of batch 32, a checkpoint half way."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.train.update(n_steps=STEPS, batch_size=32, save_interval=HALF, eval_interval=1000)
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_autoencoder, tiny_latents):
    """The curves of one process with whole batches."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.train.update(n_steps=STEPS, batch_size=32, save_interval=1000, eval_interval=1000)
    workdir = tmp_path_factory.mktemp("straight")
    training.train(config, workdir)
    assert losses(workdir)[-1] < 0.9 * losses(workdir)[0]  # a curve, not a line
    return curves(workdir)


@pytest.fixture(scope="module")
def half_of_two(tmp_path_factory, tiny_autoencoder, tiny_latents):
    """The work folder of two machines of one process each, stopped half way."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.train.update(n_steps=HALF, batch_size=32, save_interval=HALF, eval_interval=1000)
    workdir = tmp_path_factory.mktemp("two")
    two_machines(config, workdir)
    return workdir


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_machines(config, workdir):
    """accelerate's launcher on either of two "machines", talking over the loopback interface."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    machines = [
        subprocess.Popen(
            [
                sys.executable,
                *launch,
                "--machine_rank",
                str(rank),
                "train.py",
                *overrides(config),
                f"--workdir={workdir}",
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert "2 processes x" in errors[0]


def test_two_machines_train_save_once_and_resume(config, straight, half_of_two, tmp_path):
    assert [p.name for p in (half_of_two / "ckpts").iterdir()] == [f"{HALF}.ckpt"]
    shutil.copytree(half_of_two, tmp_path / "run")
    config.train.accumulation = 2
    two_machines(config, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run" / "ckpts").iterdir()} == {f"{HALF}.ckpt", f"{STEPS}.ckpt"}
    assert_same_curves(tmp_path / "run", straight)


def test_four_processes(config, straight, tmp_path):
    done = run("train.py", *overrides(config), f"--workdir={tmp_path}", processes=4)
    assert done.returncode == 0, done.stderr
    assert_same_curves(tmp_path, straight)


def test_four_passes(config, straight, tmp_path):
    config.train.accumulation = 4
    training.train(config, tmp_path)
    assert_same_curves(tmp_path, straight)


def test_moved_from_two_processes_to_one_to_four(config, straight, half_of_two, tmp_path):
    shutil.copytree(half_of_two, tmp_path / "run")
    config.train.n_steps = HALF + 12
    training.train(config, tmp_path / "run")
    config.train.n_steps = STEPS
    done = run("train.py", *overrides(config), f"--workdir={tmp_path / 'run'}", processes=4)
    assert done.returncode == 0, done.stderr
    assert_same_curves(tmp_path / "run", straight)


def test_a_lost_process_ends_the_others_with_one_line(config, tmp_path):
    """Ranks started without a launcher, which would end the other one itself."""
    config.train.update(n_steps=100_000, save_interval=100_000)
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["train.py", *overrides(config), f"--workdir={tmp_path}"]
    ranks = [Forked(*command, env={**env, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 3:
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.05)
        ranks[1].kill()
        _, errors = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run is gone; re-run the command to resume" in said[0], errors
    assert "Traceback" not in errors
