"""Training under faults: killed, asked to stop, out of disk, fed with NaN or damaged files, resumed with changes."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, RunsCode, overrides, run
from forked import Forked, run_forked
from PIL import Image
from test_sharding import join
from test_train import assert_same_checkpoint, log_lines, losses, wait_for_step

import train as training
from libs import UserError, checkpoint, images, train_state
from libs.files import file_digest
from libs.latents import LatentStore
from libs.logger import Logger, drop_later_lines
from libs.model import Model, build_network, config_json
from libs.optim import EMA, PowerEMA, gamma_of, posthoc_coefficients
from libs.train_state import read_checkpoint
from scripts import posthoc_ema


def start(config, workdir, program="train.py", env=None) -> Forked:
    return Forked(program, *overrides(config), f"--workdir={workdir}", env=env)


def resume_until(config, n_steps, workdir) -> int:
    config.train.n_steps = n_steps
    return training.train(config, workdir)


@pytest.fixture
def workdir(trained_run, tmp_path):
    """A work folder of 6 steps with checkpoints 3 and 6, of this test alone."""
    return shutil.copytree(trained_run, tmp_path / "run")


# --- Killed and asked to stop -----------------------------------------------------------------------------------------

# accelerate leaves fp16's autocast and loss scaler out on a CPU; PyTorch has both. The scale grows every third update,
# so that it overflows, falls and has something to remember.
FP16_ON_CPU = """
import runpy, sys, torch
from libs import launch
make = launch.make_accelerator
def with_fp16(**kwargs):
    accelerator = make(**kwargs)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", growth_interval=3)
    return accelerator
launch.make_accelerator = with_fp16
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_killed_at_any_moment_it_resumes_exactly(tiny_config, tmp_path, precision):
    """12 times: in starting, in training and in writing checkpoints."""
    tiny_config.train.update(n_steps=120, save_interval=2, eval_interval=0, keep_last=100)
    (tmp_path / "fp16.py").write_text(FP16_ON_CPU)
    program = tmp_path / "fp16.py" if precision == "fp16" else "train.py"
    env = {"ACCELERATE_MIXED_PRECISION": "no" if precision == "fp16" else precision}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    join([start(tiny_config, straight, program, env)])
    rng, hit = random.Random(0), 0
    for kind in rng.sample(["start"] * 2 + ["training"] * 5 + ["writing"] * 5, 12):
        done, began = len(losses(killed)) if killed.exists() else 0, time.time_ns()
        process = start(tiny_config, killed, program, env)

        def half_written(began=began):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(killed / "ckpts"):
                    if entry.name.endswith(".tmp") and entry.stat().st_mtime_ns > began:
                        return len(os.listdir(entry))
            return -1

        if kind == "start":
            time.sleep(rng.random())
        else:
            wait_for_step(killed, done + 1)
        begun = rng.randrange(5)  # of its files
        while kind == "writing" and half_written() < begun and process.poll() is None:
            pass
        time.sleep(rng.random() * 0.03 if kind == "training" else 0)
        process.kill()
        join([process], expected=-signal.SIGKILL)
        hit += half_written() >= 0
    assert hit >= 3
    join([start(tiny_config, killed, program, env)])
    assert losses(killed) == losses(straight)
    assert_same_checkpoint(killed / "ckpts" / "120.ckpt", straight / "ckpts" / "120.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_ask_for_a_requeue(tiny_config, tmp_path, number):
    tiny_config.train.update(n_steps=5000, save_interval=0, eval_interval=0)
    process = start(tiny_config, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    join([process], expected=75)
    step = int((tmp_path / "run" / "requeue").read_text())
    assert [p.name for p in (tmp_path / "run" / "ckpts").iterdir()] == [f"{step}.ckpt"]
    for workdir in ("run", "straight"):
        assert resume_until(tiny_config, step + 2, tmp_path / workdir) == 0
    assert not (tmp_path / "run" / "requeue").exists() and losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_checkpoint(*(tmp_path / name / "ckpts" / f"{step + 2}.ckpt" for name in ("run", "straight")))


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_too(tiny_config, tmp_path):
    """accelerate's launcher dies of it without passing it on."""
    tiny_config.train.update(n_steps=5000, save_interval=0, eval_interval=0)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "train.py"]
    command += [*overrides(tiny_config), f"--workdir={tmp_path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path, 3)
    launcher.terminate()
    launcher.wait(60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "requeue").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    step = int((tmp_path / "requeue").read_text())
    assert [p.name for p in (tmp_path / "ckpts").iterdir()] == [f"{step}.ckpt"]


@pytest.mark.slow
def test_control_c_under_a_launcher_saves_on_all_processes(tiny_config, tmp_path):
    """The terminal sends it to the launcher and to the processes, and torchrun sends it to them again."""
    tiny_config.train.update(n_steps=5000, save_interval=0, eval_interval=0, batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    command += [*overrides(tiny_config), f"--workdir={tmp_path}"]
    env, heed = {**os.environ, "OMP_NUM_THREADS": "1"}, lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=heed
    )
    wait_for_step(tmp_path, 3)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(60)
    step = int((tmp_path / "requeue").read_text())
    assert [p.name for p in (tmp_path / "ckpts").iterdir()] == [f"{step}.ckpt"]


def test_a_second_control_c_ends_at_once_and_nohup_is_heeded():
    code = """if True:
        import os, signal
        from libs.launch import StopRequest
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup's
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed()
            print("saving", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("not reached")
    """
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "saving\n", "")


def test_a_signal_at_the_last_step_asks_for_nothing_more(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(training.StopRequest, "agreed", lambda self: True)
    assert resume_until(tiny_config, 1, tmp_path) == 0
    assert not (tmp_path / "requeue").exists()


@pytest.mark.slow
def test_a_work_folder_has_one_writer(tiny_config, tmp_path):
    tiny_config.train.update(n_steps=5000, save_interval=0, eval_interval=0)
    process = start(tiny_config, tmp_path)
    wait_for_step(tmp_path, 1)
    with pytest.raises(ValueError, match=f"another training writes into {tmp_path}"):
        training.train(tiny_config, tmp_path)
    process.kill()
    process.communicate()
    assert resume_until(tiny_config, 2, tmp_path) == 0
    tiny_config.train.n_steps = 3
    join([start(tiny_config, tmp_path)])  # this process lives on, its run has ended


def test_processes_that_see_different_checkpoints_do_not_train(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(train_state, "gather_object", lambda found: [*found, 12] if found == [0] else found)
    with pytest.raises(ValueError, match=r"processes found different checkpoints in .*, steps \[0, 12\]"):
        training.train(tiny_config, tmp_path)
    assert not tmp_path.joinpath("metrics.jsonl").exists()


# --- Full disks, and folders that cannot be written -------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_full_for_some_steps(tiny_config, tmp_path):
    """Everything of a run is on a small tmpfs that another program fills up, and empties later."""
    (disk := tmp_path / "disk").mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    tiny_config.train.update(n_steps=60, save_interval=2, eval_interval=4, keep_last=2)
    training.train(tiny_config, tmp_path / "straight")
    try:
        process = start(tiny_config, disk / "run")
        wait_for_step(disk / "run", 9)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass
        full = len(losses(disk / "run"))
        deadline = time.monotonic() + 60
        while "metrics of step" not in Path(process.said[1].name).read_text() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left = checkpoint.checkpoint_folders(disk / "run" / "ckpts")
        assert left and all(read_checkpoint(folder)[0]["step"] <= full + 1 for folder in left[:1])
        (disk / "filler").unlink()
        assert "training goes on" in join([process])[0]
        assert_same_checkpoint(disk / "run" / "ckpts" / "60.ckpt", tmp_path / "straight" / "ckpts" / "60.ckpt")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_loses_one_checkpoint_only(tiny_config, tmp_path, monkeypatch):
    """No file may grow past 1000 bytes while the second checkpoint is written: safetensors' own error, half a file."""
    save_file, calls = checkpoint.save_file, []

    def refused_once(tensors, path, metadata):
        calls.append(path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == 5:  # in the middle of the second checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_file(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "save_file", refused_once)
    tiny_config.train.save_interval = 2
    training.train(tiny_config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == ["2.ckpt", "6.ckpt"]


def test_full_disk_loses_log_lines_only(tmp_path, caplog):
    """/dev/full refuses every byte, as a full disk does; half a line left by a power cut is dropped on resuming."""

    def full(metrics, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    def keep(metrics, step):
        kept.append(step)

    kept = []
    trackers = [SimpleNamespace(name=function.__name__, log=function) for function in (full, keep)]
    accelerator = SimpleNamespace(trackers=trackers, is_main_process=True, device=torch.device("cpu"))
    log = Logger(tmp_path, accelerator, 0, 10, 2, 1, 1.0)
    log.log(1, {"loss": 2.0})
    path, log.path = log.path, Path("/dev/full")
    log.log(2, {"loss": 1.5})
    assert "metrics of step 2 are lost, training goes on: [Errno 28] No space left on device" in caplog.text
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo\xff')
    drop_later_lines(path, 5)
    log.path = path
    log.log(6, {"loss": 1.0})
    assert losses(tmp_path) == [2.0, 1.0]
    assert kept == [1, 2, 6] and caplog.text.count("full is given up, training goes on") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("place", "processes"), [("file", 1), ("/proc/nope/x", 1), ("file/x", 2)])
def test_a_work_folder_that_cannot_be_written_ends_all_processes_in_one_line(tiny_config, tmp_path, place, processes):
    (tmp_path / "file").write_text("")
    place = tmp_path / place
    flags = [*overrides(tiny_config), f"--workdir={place}"]
    done = run("train.py", *flags, processes=processes) if processes > 1 else run_forked("train.py", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: Cannot write {place}: ") and errors[0].endswith("or set --workdir")
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


def test_pictures_are_whole_or_not_there(tmp_path, monkeypatch):
    def half(image, file, **kwargs):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "save_image", half)
    with pytest.raises(OSError, match="No space left"):
        images.save_grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), tmp_path / "5.png", columns=2)
    assert not list(tmp_path.iterdir())


# --- Pruning, NaN and damaged files -----------------------------------------------------------------------------------


def test_old_checkpoints_are_pruned(tiny_config, tmp_path):
    tiny_config.train.update(save_interval=1, keep_last=2, keep_interval=3)
    (tmp_path / "ckpts" / ".7.ckpt.tmp").mkdir(parents=True)  # left by a kill while it was written
    training.train(tiny_config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == ["3.ckpt", "5.ckpt", "6.ckpt"]


def test_pruning_never_trades_a_whole_checkpoint_for_a_damaged_one(tmp_path):
    for step in (80, 90, 100):
        (tmp_path / f"{step}.ckpt").mkdir()
    checkpoint.prune_checkpoints(tmp_path, step=90, keep_last=1, keep_interval=0)  # 100 was passed over
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["100.ckpt", "90.ckpt"]


def test_a_checkpoint_that_cannot_be_removed_is_kept(tiny_config, tmp_path, monkeypatch, caplog):
    """As on NFS, while another program reads it; the others go, and training goes on."""
    remove = shutil.rmtree

    def refused(path, ignore_errors=False, **kwargs):
        if Path(path).name == "1.ckpt" and not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path, ignore_errors, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refused)
    tiny_config.train.update(n_steps=3, save_interval=1, keep_last=1)
    training.train(tiny_config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == ["1.ckpt", "3.ckpt"]
    assert "1.ckpt could not be removed, training goes on: [Errno 16] Device or resource busy" in caplog.text


def test_a_divergence_spoils_no_more_than_it_must(tiny_config, tmp_path, monkeypatch):
    """From step 5 on the learning rate is huge, from step 9 on gradients are not finite."""
    tiny_config.train.update(n_steps=30, save_interval=2, keep_last=2, keep_interval=0)
    update, emas = train_state.TrainState.update, []

    def diverge(self, max_norm):
        if self.step >= 8:
            next(self.nnet.parameters()).grad.fill_(torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = 1.0 if self.step >= 4 else group["lr"]
        norm = update(self, max_norm)
        emas.append(torch.cat([p.flatten().clone() for p in next(iter(self.emas.values())).model.parameters()]))
        return norm

    monkeypatch.setattr(train_state.TrainState, "update", diverge)
    monkeypatch.setattr(training, "MAX_SKIPPED", 20)
    with pytest.raises(UserError, match=r"20 updates in a row up to step 28 .* \(last checkpoint before: step 8\)"):
        training.train(tiny_config, tmp_path)
    assert torch.equal(emas[7], emas[-1]) and not torch.equal(emas[6], emas[7])
    kept = sorted(int(folder.stem) for folder in (tmp_path / "ckpts").iterdir())
    assert kept[-1] == 8 and kept[0] <= 4  # those of exploded losses have pushed out no good one
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[-1]["grad_norm"] is None


def test_a_save_on_a_skipped_update_waits_for_a_good_one(tiny_config, tmp_path, monkeypatch):
    tiny_config.train.update(n_steps=6, save_interval=2)
    update = train_state.TrainState.update

    def skip(self, max_norm):
        if self.step in (1, 2):
            next(self.nnet.parameters()).grad.fill_(torch.inf)
        return update(self, max_norm)

    monkeypatch.setattr(train_state.TrainState, "update", skip)
    assert training.train(tiny_config, tmp_path) == 0
    assert sorted(folder.name for folder in (tmp_path / "ckpts").iterdir()) == ["4.ckpt", "6.ckpt"]


def test_a_run_whose_updates_are_all_skipped_is_not_trained(tiny_config, tmp_path, monkeypatch):
    read = LatentStore.read
    monkeypatch.setattr(
        LatentStore, "read", lambda self, indices: (read(self, indices)[0] * np.nan, read(self, indices)[1])
    )
    with pytest.raises(UserError, match="6 updates in a row up to step 6 were not finite"):
        training.train(tiny_config, tmp_path)
    assert not (tmp_path / "ckpts").exists()


def test_not_finite_updates_are_skipped_and_counted(tiny_config, tmp_path, monkeypatch):
    read, calls = LatentStore.read, []

    def poisoned(self, indices):
        records, labels = read(self, indices)
        calls.append(1)
        if len(calls) in (3, 4):  # the first call is of the statistics before training
            records = np.full_like(records, np.nan)
        return records, labels

    monkeypatch.setattr(LatentStore, "read", poisoned)
    training.train(tiny_config, tmp_path / "run")
    lines = log_lines(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert np.isfinite([line["loss"] for line in lines[3:]]).all()

    calls.clear()
    tiny_config.train.save_interval = 1
    monkeypatch.setattr(training, "MAX_SKIPPED", 2)
    with pytest.raises(UserError, match=r"2 updates in a row up to step 3 .* \(last checkpoint before: step 1\)"):
        training.train(tiny_config, tmp_path / "stopped")
    _, tensors = read_checkpoint(tmp_path / "stopped" / "ckpts" / "1.ckpt")
    assert all(torch.isfinite(t).all() for t in tensors["nnet.safetensors"].values())


@pytest.mark.parametrize("file", ["nnet.safetensors", "nnet_ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "pickle"])
def test_damaged_files_are_named(workdir, damage, file):
    """A pickle comes with its checksum made to fit, and its code is not run."""
    folder = workdir / "ckpts" / "6.ckpt"
    content = bytearray((folder / file).read_bytes())
    if damage == "remove":
        (folder / file).unlink()
    elif damage == "pickle":
        (folder / file).write_bytes(pickle.dumps({"weight": RunsCode(open, workdir / "code-has-run", "w")}))
        if file != "state.json":
            state = json.loads((folder / "state.json").read_text())
            digests = {**state.pop("sha256"), file: file_digest(folder / file)}
            (folder / "state.json").write_text(json.dumps({**state, "sha256": digests}))
    else:
        content[-100] ^= 1
        (folder / file).write_bytes(content[:-10] if damage == "truncate" else content)
    with pytest.raises(UserError, match=r"6\.ckpt is not a whole checkpoint: "):
        read_checkpoint(folder)
    assert not (workdir / "code-has-run").exists()


def test_damaged_checkpoints_are_passed_over(tiny_config, workdir, caplog):
    state_file = workdir / "ckpts" / "6.ckpt" / "state.json"
    state_file.write_text(state_file.read_text().replace('"step": 6', '"step": 4'))
    before = losses(workdir)
    training.train(tiny_config, workdir)
    assert f"passed over: {state_file.parent} is not a whole checkpoint" in caplog.text and losses(workdir) == before
    read_checkpoint(state_file.parent)  # written again, whole
    for folder in (workdir / "ckpts").iterdir():
        (folder / "nnet.safetensors").unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .*ckpts is whole: set another --workdir"):
        training.train(tiny_config, workdir)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_now_is_not_replaced(tiny_config, workdir, monkeypatch, number):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}

    def refused(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "file_digest", refused)
    tiny_config.train.n_steps = 8
    with pytest.raises(UserError, match=rf"6\.ckpt cannot be read now, .*{os.strerror(number)}"):
        training.train(tiny_config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_checkpoints_of_another_program_are_not_touched(tiny_config, tmp_path):
    theirs = tmp_path / "ckpts" / "50000.ckpt" / "nnet.pth"
    theirs.parent.mkdir(parents=True)
    torch.save({}, theirs)
    with pytest.raises(UserError, match=r"50000\.ckpt is of another program: .* config.init.path to it"):
        training.train(tiny_config, tmp_path)
    assert list(tmp_path.rglob("*.*")) == [theirs.parent, theirs]


def test_a_pickle_to_start_from_is_refused_in_one_line(tiny_config, tmp_path):
    evil = tmp_path / "evil.pth"
    torch.save({"weight": RunsCode(open, tmp_path / "code-has-run", "w")}, evil)
    done = run_forked("train.py", *overrides(tiny_config), f"--config.init.path={evil}", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    problem = "could not be read as a plain state dict: it is damaged, or holds more than tensors, that is, code"
    assert done.stderr.splitlines()[-1] == f"error: {evil} {problem}"
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


# --- Other settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config.nnet.norm_type", "RMSN", "config.nnet.norm_type: TDRMSN there, RMSN now"),
        ("config.schedule", "vpsde", "config.schedule: sd there, vpsde now"),
        ("config.prediction", "v", "config.prediction: eps there, v now"),
        ("config.seed", 1, "config.seed: 1234 there, 1 now"),
        ("config.ema.extra_rates", [0.5], r"config.ema.extra_rates\[0\]: None there, 0.5 now"),
        ("mixed_precision", "bf16", "mixed_precision: no there, bf16 now"),
        ("data.sha256", "another", "data.sha256: [0-9a-f]+ there, another now"),
        ("autoencoder.scale", [1.0], r"normalization: .*scale \[0.5\] there, .*scale \[1.0\] here"),
    ],
)
def test_what_a_resumed_run_may_not_change(workdir, field, value, message):
    saved, _ = read_checkpoint(workdir / "ckpts" / "6.ckpt")
    now = json.loads(json.dumps(saved))
    *parents, last = field.split(".")
    place = now
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(UserError, match=message):
        train_state.check_same_run(now, saved, workdir)


def test_other_settings_may_change_with_a_warning(tiny_config, workdir, caplog):
    """The new ones hold; grids of another size begin a strip of their own."""
    tiny_config.optimizer.lr = 5e-4
    tiny_config.train.update(n_steps=12, grid=(3, 2))
    (workdir / "samples" / "1.png").write_bytes(b"damaged")
    training.train(tiny_config, workdir)
    assert "config.optimizer.lr: 0.003 there, 0.0005 now" in caplog.text
    assert log_lines(workdir)[-1]["lr"] == 5e-4
    # columns of 16x16 samples, of steps 8 and 12, with 2 pixels of padding; the grid of step 4 has two rows
    assert Image.open(workdir / "samples" / "12.png").size == (2 * 18 + 2, 3 * 18 + 2)
    assert Image.open(workdir / "samples" / "strip.png").size == (2 * 18, 3 * 18 + 2)


def test_starting_from_weights_of_another_size(tiny_config, trained_run):
    source = Model.open(trained_run / "ckpts" / "3.ckpt", tiny_config).nnet
    tiny_config.z_shape = (4, 16, 8)
    tiny_config.dataset.n_classes = 7
    tiny_config.init.update(path=str(trained_run / "ckpts" / "3.ckpt"), freeze=(r"^stages\.0\.blocks",))
    nnet = build_network(tiny_config)
    fresh = nnet.stages[0].class_embed.weight.clone()
    training.start_from(nnet, tiny_config)
    assert torch.equal(nnet.stages[0].class_embed.weight, fresh)
    old, new = (model.stages[1].pos_embed.weight for model in (source, nnet))
    assert new.shape == (128, 16) and new.mean().item() == pytest.approx(old.mean().item(), abs=1e-3)
    assert torch.equal(nnet.stages[1].blocks[0].mlp.w0.weight, source.stages[1].blocks[0].mlp.w0.weight)
    assert not nnet.stages[0].blocks[0].mlp.w0.weight.requires_grad and nnet.stages[1].skips[0].weight.requires_grad


@pytest.mark.parametrize(
    ("old", "new"),
    [((8, 8), (4, 16)), ((4, 16), (16, 16)), ((4, 8), (4, 16)), ((8, 8), (8, 8))],
    ids=["as many cells", "square count, not square", "neither square nor alike", "the same"],
)
def test_position_tables_are_read_as_the_grid_saved_with_them(tiny_config, tmp_path, old, new):
    """A table whose cells hold their row and column, which interpolation keeps but for the ends of the grid."""
    tiny_config.z_shape = (4, *old)
    source = build_network(tiny_config)
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in old), indexing="ij")
    table = source.stages[1].pos_embed.weight.data
    table[:, :2] = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    metadata = {checkpoint.CONFIG_KEY: json.dumps(config_json(tiny_config))}
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors", metadata)
    tiny_config.z_shape = (4, *new)
    tiny_config.init.path = str(tmp_path / "weights.safetensors")
    nnet = build_network(tiny_config)
    training.start_from(nnet, tiny_config)
    found = nnet.stages[1].pos_embed.weight.data[:, :2].unflatten(0, new)
    expected = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in new), indexing="ij"), dim=-1)
    assert (found - expected).abs().max() < 0.15
    assert torch.equal(nnet.stages[1].pos_embed.weight, table) == (old == new)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_what_is_frozen_may_change_within_a_run(tiny_config, tmp_path, frozen_first):
    """Frozen parts stay as they are, and their moments are left out; what is trained from now on begins with none."""
    pattern, name = (r"^stages\.0",), "stages.0.skips.0.weight"
    torch.manual_seed(tiny_config.seed)
    initial = build_network(tiny_config).state_dict()
    for n_steps, frozen in ((3, frozen_first), (6, not frozen_first)):
        tiny_config.init.freeze = pattern if frozen else ()
        resume_until(tiny_config, n_steps, tmp_path)
    (_, first), (_, last) = (read_checkpoint(tmp_path / "ckpts" / f"{step}.ckpt") for step in (3, 6))
    pairs = (initial, first, frozen_first), (first["nnet.safetensors"], last, not frozen_first)
    for before, tensors, frozen in pairs:
        assert torch.equal(before[name], tensors["nnet.safetensors"][name]) == frozen
        assert (f"exp_avg/{name}" in tensors["optimizer.safetensors"]) == (not frozen)
    counts = [last["optimizer.safetensors"].get(f"step/{n}") for n in (name, "stages.1.skips.0.weight")]
    assert counts == ([3, 6] if frozen_first else [None, 6])


# --- EMA weights ------------------------------------------------------------------------------------------------------


def test_ema_is_one_operation_whatever_the_model():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(10)))
    ema = EMA(model, 0.9)
    with torch.profiler.profile() as profile:
        ema.update(1)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::_fused_sgd_") == 1


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_function_ema_has_its_profile(sigma_rel):
    """Averaging the step number itself gives the profile's mean; its exponent gives back its standard deviation."""
    gamma = gamma_of(sigma_rel)  # of the density (gamma + 1) x^gamma, a beta distribution's: EDM2, equation 3
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel)
    model = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEMA(model, sigma_rel)
    for step in range(1, 2001):
        torch.nn.init.constant_(model.weight, step)
        ema.update(step)
    assert ema.model.weight.item() / 2000 == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)


def test_posthoc_reconstruction_is_close_to_the_ema_itself():
    track = np.cumsum(np.random.default_rng(0).standard_normal(2000)) / 40  # weights on a random walk
    model = torch.nn.Linear(1, 1, bias=False).double()
    emas = {sigma_rel: PowerEMA(model, sigma_rel) for sigma_rel in (0.05, 0.1, 0.07)}
    stored, values = [], []
    for step in range(1, 2001):
        torch.nn.init.constant_(model.weight, track[step - 1])
        for sigma_rel, ema in emas.items():
            ema.update(step)
            if step % 200 == 0 and sigma_rel != 0.07:
                stored.append((step, sigma_rel))
                values.append(ema.model.weight.item())
    rebuilt = posthoc_coefficients(stored, 2000, 0.07) @ values
    wanted, nearest = emas[0.07].model.weight.item(), emas[0.05].model.weight.item()
    assert abs(rebuilt - wanted) < 0.05 * abs(nearest - wanted)


def test_posthoc_script_on_a_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.ema.update(power_widths=(0.05, 0.1), extra_rates=(0.5,))
    tiny_config.train.update(save_interval=2, keep_last=10)
    training.train(tiny_config, tmp_path)
    last, out = tmp_path / "ckpts" / "6.ckpt", tmp_path / "ema.safetensors"
    done = run("scripts/posthoc_ema.py", "--ckpts", tmp_path / "ckpts", "--width", "0.1", "--out", out)
    assert done.returncode == 0, done.stderr
    rebuilt, kept = (checkpoint.read_state_dict(p) for p in (out, last / "nnet_ema_width_0.1.safetensors"))
    assert all(torch.allclose(rebuilt[name], kept[name], atol=1e-5) for name in kept)
    assert checkpoint.ema_profile(out) == "width 0.1, reconstructed"
    saved = {"config": config_json(tiny_config), "step": 6, "class_names": ["class0", "class1", "class2"]}
    saved["autoencoder"] = checkpoint.saved_settings(last / "nnet_ema.safetensors")["autoencoder"]
    assert checkpoint.saved_settings(out) == saved
    assert {file.name: checkpoint.ema_profile(file) for file in last.glob("nnet*")} == {
        "nnet.safetensors": "",
        "nnet_ema.safetensors": "rate 0.998",
        "nnet_ema_rate_0.5.safetensors": "rate 0.5",
        "nnet_ema_width_0.05.safetensors": "width 0.05",
        "nnet_ema_width_0.1.safetensors": "width 0.1",
    }
    (last / "nnet_ema_width_copy.safetensors").touch()
    deeper = tmp_path / "deeper" / "ema.safetensors"

    def rebuild(*flags):
        words = ["posthoc_ema.py", "--ckpts", tmp_path, "--width", "0.1", "--out", deeper, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        posthoc_ema.main()

    rebuild("--step", "4")
    assert checkpoint.saved_settings(deeper)["step"] == 4
    for flags, message in (
        (("--step", "7"), "error: --step must be from 2 to 6, .*; found 7$"),
        (("--out", tmp_path), "error: --out must be a .safetensors file; found "),
        (("--out", "/proc/x.safetensors"), "error: Cannot write /proc/x.safetensors: .*, or set --out$"),
        (("--ckpts", tmp_path / "alone"), "error: no power-function EMAs in "),
    ):
        with pytest.raises(SystemExit, match=message):
            rebuild(*flags)
