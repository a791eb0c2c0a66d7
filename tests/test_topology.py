"""The same run on any number of processes, micro-batches and machines, and what happens when one is lost."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, free_port, make_tiny_config, overrides, run
from test_sharding import join, start_ranks
from test_train import assert_same_checkpoint, log_lines, losses, wait_for_step

import train as training

pytestmark = pytest.mark.slow
STEPS, HALF = 50, 25
ROUND_OFF = (2e-5, 1e-3)  # relative, of losses and gradient norms: sums of float32 in another order


def curves(workdir) -> np.ndarray:
    """Losses and gradient norms by step, (2, steps). The norms show a wrong scale, which Adam would undo."""
    return np.array([[line[name] for line in log_lines(workdir)] for name in ("loss", "grad_norm")])


def assert_same_curves(workdir, expected):
    for found, wanted, tolerance in zip(curves(workdir), expected, ROUND_OFF, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance)


def make_config(tiny_autoencoder, tiny_latents, n_steps=STEPS):
    """50 steps of batch 32, a checkpoint half way."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.train.update(n_steps=n_steps, batch_size=32, save_interval=HALF, eval_interval=1000)
    return config


@pytest.fixture
def config(tiny_autoencoder, tiny_latents):
    return make_config(tiny_autoencoder, tiny_latents)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_autoencoder, tiny_latents):
    """The curves of one process with whole batches."""
    workdir = tmp_path_factory.mktemp("straight")
    training.train(make_config(tiny_autoencoder, tiny_latents), workdir)
    assert losses(workdir)[-1] < 0.9 * losses(workdir)[0]  # a curve, not a line
    return curves(workdir)


@pytest.fixture(scope="module")
def half_of_two(tmp_path_factory, tiny_autoencoder, tiny_latents):
    """The work folder of two machines of one process each, stopped half way."""
    workdir = tmp_path_factory.mktemp("two")
    two_machines(make_config(tiny_autoencoder, tiny_latents, HALF), workdir)
    return workdir


def two_machines(config, workdir):
    """accelerate's launcher on either of two "machines", talking over the loopback interface."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = ["train.py", *overrides(config), f"--workdir={workdir}"]
    commands = [[sys.executable, *launch, "--machine_rank", str(rank), *program] for rank in range(2)]
    machines = [subprocess.Popen(each, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for each in commands]
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


def test_moved_from_two_processes_to_one_to_four(config, straight, half_of_two, tmp_path):
    shutil.copytree(half_of_two, tmp_path / "run")
    config.train.n_steps = HALF + 12
    training.train(config, tmp_path / "run")
    config.train.n_steps = STEPS
    done = run("train.py", *overrides(config), f"--workdir={tmp_path / 'run'}", processes=4)
    assert done.returncode == 0, done.stderr
    assert_same_curves(tmp_path / "run", straight)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_process_ends_the_others_with_one_line(config, tmp_path, lost):
    """Ranks started without a launcher, which would end the other one itself; re-run, they resume exactly."""
    config.train.update(n_steps=60, save_interval=10, eval_interval=0)
    command = ["train.py", *overrides(config)]
    join(start_ranks(*command, f"--workdir={tmp_path / 'straight'}"))
    ranks = start_ranks(*command, f"--workdir={tmp_path / 'lost'}")
    wait_for_step(tmp_path / "lost", 12)
    ranks[lost].kill()
    _, errors = ranks[1 - lost].communicate(timeout=60)
    ranks[lost].communicate()
    assert (ranks[lost].returncode, ranks[1 - lost].returncode) == (-signal.SIGKILL, 1), errors
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run is gone; re-run the command to resume" in said[0], errors
    assert "Traceback" not in errors
    join(start_ranks(*command, f"--workdir={tmp_path / 'lost'}"))
    assert_same_checkpoint(*(tmp_path / name / "ckpts" / "60.ckpt" for name in ("lost", "straight")))
