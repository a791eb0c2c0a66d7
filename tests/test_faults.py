"""Training under faults: killed, told to stop, out of disk, fed with NaN, resumed with other settings."""

import errno
import json
import os
import random
import re
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
from conftest import ROOT, overrides, run
from forked import Forked, run_forked
from PIL import Image
from test_train import assert_same_checkpoint, losses

import train as training
from libs import checkpoint, pictures
from libs.files import json_digest
from libs.latents import LatentStore
from libs.logger import MetricsLog, log_to_trackers
from libs.model import Model, build_network, config_json, network_differences
from libs.optim import EMA, PowerEMA, gamma_of_width, posthoc_weights


def start(config, workdir, *flags) -> Forked:
    return Forked("train.py", *overrides(config), f"--workdir={workdir}", *flags)


def wait_for_step(workdir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists() and len(losses(workdir)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("training did not get going")


def test_killed_at_any_moment_it_goes_on_exactly(tiny_config, tmp_path):
    tiny_config.train.update(n_steps=36, save_interval=1, eval_interval=1000)
    training.train(tiny_config, tmp_path / "straight")
    rng = random.Random(0)
    for kill in range(2):
        process = start(tiny_config, tmp_path / "killed")
        wait_for_step(tmp_path / "killed", 9 * (kill + 1))
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and len(losses(tmp_path / "killed")) < 36
    training.train(tiny_config, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "killed" / "ckpts" / "36.ckpt", tmp_path / "straight" / "ckpts" / "36.ckpt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_ask_for_a_requeue(tiny_config, tmp_path, number):
    tiny_config.train.update(n_steps=5000, save_interval=10_000, eval_interval=10_000)
    process = start(tiny_config, tmp_path)
    wait_for_step(tmp_path, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    step = int((tmp_path / "requeue").read_text())
    assert [p.name for p in (tmp_path / "ckpts").iterdir()] == [f"{step}.ckpt"]
    tiny_config.train.n_steps = step + 2
    assert training.train(tiny_config, tmp_path) == 0
    assert not (tmp_path / "requeue").exists() and len(losses(tmp_path)) == step + 2


def test_a_signal_to_the_launcher_saves_too(tiny_config, tmp_path):
    """accelerate's launcher dies of it without passing it on."""
    tiny_config.train.update(n_steps=5000, save_interval=10_000, eval_interval=10_000)
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


def test_a_work_folder_has_one_writer(tiny_config, tmp_path):
    tiny_config.train.update(n_steps=5000, save_interval=10_000, eval_interval=10_000)
    process = start(tiny_config, tmp_path)
    wait_for_step(tmp_path, 1)
    with pytest.raises(ValueError, match=f"another training writes into {tmp_path}"):
        training.train(tiny_config, tmp_path)
    process.kill()
    process.communicate()
    tiny_config.train.n_steps = 2
    assert training.train(tiny_config, tmp_path) == 0
    tiny_config.train.n_steps = 3
    done = run_forked(
        "train.py", *overrides(tiny_config), f"--workdir={tmp_path}"
    )  # this process lives on, its run has ended
    assert done.returncode == 0, done.stderr


def test_full_disk_loses_one_checkpoint_only(tiny_config, tmp_path, monkeypatch):
    """No file may grow past 1000 bytes while the second checkpoint is written: safetensors' own error, half a file."""
    save_file, calls = checkpoint.save_file, []

    def refused_once(tensors, path):
        calls.append(path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == 5:  # in the middle of the second checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_file(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "save_file", refused_once)
    tiny_config.train.save_interval = 2
    training.train(tiny_config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == ["2.ckpt", "6.ckpt"]


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


def test_not_finite_updates_are_skipped_and_counted(tiny_config, tmp_path, monkeypatch):
    read, calls = LatentStore.read, []

    def poisoned(self, indices):
        records, labels = read(self, indices)
        calls.append(1)
        if len(calls) in (2, 3):
            records = np.full_like(records, np.nan)
        return records, labels

    monkeypatch.setattr(LatentStore, "read", poisoned)
    training.train(tiny_config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert np.isfinite([line["loss"] for line in lines[3:]]).all()

    calls.clear()
    tiny_config.train.update(max_skipped=2, save_interval=1)
    with pytest.raises(FloatingPointError, match=r"2 updates in a row up to step 3 .* last checkpoint is of step 2"):
        training.train(tiny_config, tmp_path / "stopped")
    _, tensors = checkpoint.read_checkpoint(tmp_path / "stopped" / "ckpts" / "2.ckpt")
    assert all(torch.isfinite(t).all() for t in tensors["nnet.safetensors"].values())


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "step"])
def test_damaged_files_are_named_and_passed_over(tiny_config, tmp_path, damage):
    tiny_config.train.n_steps = 6
    training.train(tiny_config, tmp_path)
    folder = tmp_path / "ckpts" / "6.ckpt"
    file = folder / ("state.json" if damage == "step" else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        content[-100] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content.replace(b'"step": 6', b'"step": 4'))
    with pytest.raises(ValueError, match=file.name):
        checkpoint.read_checkpoint(folder)
    before = losses(tmp_path)
    training.train(tiny_config, tmp_path)
    assert losses(tmp_path) == before
    checkpoint.read_checkpoint(folder)  # written again, whole


def test_full_disk_loses_log_lines_only(tmp_path, caplog):
    """/dev/full refuses every byte, as a full disk does; half a line left by a power cut is dropped on resuming."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(1, {"loss": 2.0})
    log.path = Path("/dev/full")
    log.write(2, {"loss": 1.5})
    assert "metrics of step 2 are lost, training goes on: [Errno 28] No space left on device" in caplog.text
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo\xff')
    MetricsLog(tmp_path / "metrics.jsonl", 5).write(6, {"loss": 1.0})
    assert losses(tmp_path) == [2.0, 1.0]

    def full(metrics, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = []
    trackers = [
        SimpleNamespace(name="full", log=full),
        SimpleNamespace(name="kept", log=lambda *a, **k: kept.append(a)),
    ]
    accelerator = SimpleNamespace(trackers=trackers)
    for step in (1, 2):
        log_to_trackers(accelerator, {"loss": 1.0}, step)
    assert len(kept) == 2 and caplog.text.count("full is given up, training goes on") == 1


def test_pictures_are_whole_or_not_there(tmp_path, monkeypatch):
    def half(image, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "save_image", half)
    with pytest.raises(OSError, match="No space left"):
        pictures.save_grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), tmp_path / "5.png", columns=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grid_classes", "grid_per_class"])
def test_the_grid_may_change_within_a_run(tiny_config, tmp_path, name):
    """Its film strip goes on with the grids of the new size."""
    tiny_config.train.update(n_steps=2, eval_interval=2, save_interval=2, grid_classes=2, grid_per_class=2)
    training.train(tiny_config, tmp_path)
    (tmp_path / "samples" / "1.png").write_bytes(b"damaged")
    tiny_config.train.update({"n_steps": 6, name: 3})
    training.train(tiny_config, tmp_path)
    width, height = Image.open(tmp_path / "samples" / "strip.png").size
    # columns of 16x16 samples, of steps 4 and 6, with 2 pixels of padding
    assert (width, height) == (2 * 18, 18 * tiny_config.train.grid_classes + 2)


def test_pickle_to_start_from_is_refused_in_one_line(tiny_config, tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "code-has-run"), "w")

    torch.save({"weight": Harmful()}, tmp_path / "evil.pth")
    evil = tmp_path / "evil.pth"
    done = run_forked("train.py", *overrides(tiny_config), f"--config.init.path={evil}", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: {evil} could not be read as a plain state dict: it holds something else than tensors, "
        "which is refused because it could run code (or it is damaged)"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


def test_other_settings_are_refused_unless_allowed(tiny_config, tmp_path):
    tiny_config.train.n_steps = 3
    training.train(tiny_config, tmp_path)
    tiny_config.train.n_steps = 4
    tiny_config.optimizer.lr = 5e-4
    tiny_config.init.freeze = ("head",)
    with pytest.raises(ValueError, match=r"config.optimizer.lr: 0.003 there, 0.0005 now") as refused:
        training.train(tiny_config, tmp_path)
    tiny_config.init.freeze = ()
    names = ("init.freeze", "init.freeze[0]", "optimizer.lr")
    assert str(refused.value).endswith(f'allow the change by --config.resume_changes="{names}"')
    tiny_config.resume_changes = ("optimizer.lr",)
    training.train(tiny_config, tmp_path)
    assert len(losses(tmp_path)) == 4


def test_a_setting_added_since_the_checkpoint_has_its_default_there(tiny_config, tmp_path):
    """The settings of a checkpoint as of before they were there: in a section, of every stage, and a whole section."""
    tiny_config.train.n_steps = 3
    training.train(tiny_config, tmp_path)
    state_file = tmp_path / "ckpts" / "3.ckpt" / "state.json"
    state = json.loads(state_file.read_text())
    del state["config"]["nnet"]["norm_type"], state["config"]["init"]
    for stage in state["config"]["nnet"]["stages"]:
        del stage["mlp_ratio"]
    digests = state.pop("sha256")
    digests["state.json"] = json_digest(state)
    state_file.write_text(json.dumps({**state, "sha256": digests}))
    tiny_config.train.n_steps = 4
    training.train(tiny_config, tmp_path)
    assert len(losses(tmp_path)) == 4
    assert not network_differences(tiny_config, tmp_path / "ckpts" / "3.ckpt" / "nnet_ema.safetensors")
    tiny_config.train.n_steps = 5
    tiny_config.nnet.norm_type = "RMSN"
    with pytest.raises(ValueError, match=r"config.nnet.norm_type: TDRMSN there, RMSN now"):
        training.train(tiny_config, tmp_path)


def test_old_checkpoints_are_pruned(tiny_config, tmp_path):
    tiny_config.train.update(save_interval=1, keep_last=2, keep_interval=3)
    (tmp_path / "ckpts" / ".7.ckpt.tmp").mkdir(parents=True)  # left by a kill while it was written
    training.train(tiny_config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == ["3.ckpt", "5.ckpt", "6.ckpt"]


def test_starting_from_weights_of_another_size(tiny_config, tmp_path, tiny_autoencoder):
    tiny_config.train.n_steps = 3
    training.train(tiny_config, tmp_path / "first")
    source = Model.open(tmp_path / "first" / "ckpts" / "3.ckpt", tiny_config).nnet
    tiny_config.z_shape = (4, 16, 8)
    tiny_config.dataset.n_classes = 7
    tiny_config.init.update(path=str(tmp_path / "first" / "ckpts" / "3.ckpt"), freeze=(r"^stages\.0\.blocks",))
    nnet = build_network(tiny_config)
    fresh = nnet.stages[0].class_embed.weight.clone()
    training.start_from(nnet, tiny_config)
    assert torch.equal(nnet.stages[0].class_embed.weight, fresh)
    old, new = (model.stages[1].pos_embed.weight for model in (source, nnet))
    assert new.shape == (128, 16) and new.mean().item() == pytest.approx(old.mean().item(), abs=1e-3)
    assert torch.equal(nnet.stages[1].blocks[0].mlp.w0.weight, source.stages[1].blocks[0].mlp.w0.weight)
    assert not nnet.stages[0].blocks[0].mlp.w0.weight.requires_grad and nnet.stages[1].skips[0].weight.requires_grad
    tiny_config.init.freeze = ("nothing",)
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        training.start_from(nnet, tiny_config)


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


def test_frozen_parts_stay_as_they_are(tiny_config, tmp_path):
    tiny_config.init.freeze = (r"^stages\.0",)
    tiny_config.train.n_steps = 3
    torch.manual_seed(tiny_config.seed)
    initial = build_network(tiny_config).state_dict()
    training.train(tiny_config, tmp_path)
    _, tensors = checkpoint.read_checkpoint(tmp_path / "ckpts" / "3.ckpt")
    for name, tensor in tensors["nnet.safetensors"].items():
        if name.startswith("stages.0"):
            assert torch.equal(tensor, initial[name]), name
    assert not torch.equal(tensors["nnet.safetensors"]["stages.1.skips.0.weight"], initial["stages.1.skips.0.weight"])


@pytest.mark.parametrize("frozen_first", [True, False])
def test_what_is_frozen_may_change_within_a_run(tiny_config, tmp_path, frozen_first):
    """Moments of what is trained no more are left out; what is trained from now on begins with none."""
    pattern, frozen, tiny_config.train.save_interval = (r"^stages\.0",), "exp_avg/stages.0.skips.0.weight", 3
    tiny_config.init.freeze = pattern if frozen_first else ()
    tiny_config.train.n_steps = 3
    training.train(tiny_config, tmp_path)
    tiny_config.init.freeze = () if frozen_first else pattern
    tiny_config.train.n_steps, tiny_config.resume_changes = 6, ("init.freeze",)
    training.train(tiny_config, tmp_path)
    (_, first), (_, last) = (checkpoint.read_checkpoint(tmp_path / "ckpts" / f"{step}.ckpt") for step in (3, 6))
    assert (frozen in first["optimizer.safetensors"]) == (not frozen_first)
    assert (frozen in last["optimizer.safetensors"]) == frozen_first
    name = "stages.0.skips.0.weight"
    assert torch.equal(first["nnet.safetensors"][name], last["nnet.safetensors"][name]) == (not frozen_first)
    counts = [last["optimizer.safetensors"].get(f"step/{n}") for n in (name, "stages.1.skips.0.weight")]
    assert counts == ([3, 6] if frozen_first else [None, 6])


def test_power_function_average_has_its_profile():
    """Averaging the step number itself gives the profile's mean; its exponent gives back its width."""
    for width in (0.05, 0.1, 0.2):
        gamma = gamma_of_width(width)  # of the density (gamma + 1) x^gamma, a beta distribution's: EDM2, equation 3
        assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(width)
        model = torch.nn.Linear(1, 1, bias=False)
        average = PowerEMA(model, width)
        for step in range(1, 2001):
            torch.nn.init.constant_(model.weight, step)
            average.update(step)
        gamma = gamma_of_width(width)
        assert average.model.weight.item() / 2000 == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    with pytest.raises(ValueError, match=r"must be in \(0, 0.28\); found 0.3"):
        gamma_of_width(0.3)


def test_posthoc_reconstruction_is_close_to_the_average_itself():
    rng = np.random.default_rng(0)
    track = np.cumsum(rng.standard_normal(2000)) / 40  # weights on a random walk
    model = torch.nn.Linear(1, 1, bias=False).double()
    averages = {width: PowerEMA(model, width) for width in (0.05, 0.1, 0.07)}
    stored, values = [], []
    for step in range(1, 2001):
        torch.nn.init.constant_(model.weight, track[step - 1])
        for width, average in averages.items():
            average.update(step)
            if step % 200 == 0 and width != 0.07:
                stored.append((step, width))
                values.append(average.model.weight.item())
    rebuilt = posthoc_weights(stored, 2000, 0.07) @ values
    wanted, nearest = averages[0.07].model.weight.item(), averages[0.05].model.weight.item()
    assert abs(rebuilt - wanted) < 0.05 * abs(nearest - wanted)


def test_posthoc_script_on_a_run(tiny_config, tmp_path):
    tiny_config.ema.update(power_widths=(0.05, 0.1), extra_rates=(0.5,))
    tiny_config.train.update(save_interval=2, keep_last=10)
    training.train(tiny_config, tmp_path)
    out = tmp_path / "ema.safetensors"
    done = run("scripts/posthoc_ema.py", "--ckpts", tmp_path / "ckpts", "--width", "0.1", "--out", out)
    assert done.returncode == 0, done.stderr
    rebuilt, kept = (
        checkpoint.read_state_dict(p) for p in (out, tmp_path / "ckpts" / "6.ckpt" / "nnet_ema_width_0.1.safetensors")
    )
    assert all(torch.allclose(rebuilt[name], kept[name], atol=1e-5) for name in kept)
    assert checkpoint.ema_profile(out) == "width 0.1, reconstructed"
    assert checkpoint.saved_settings(out) == {
        "config": config_json(tiny_config),
        "step": 6,
        "class_names": ["class0", "class1", "class2"],
    }
    profiles = {file.name: checkpoint.ema_profile(file) for file in (tmp_path / "ckpts" / "6.ckpt").glob("nnet*")}
    assert profiles == {
        "nnet.safetensors": "",
        "nnet_ema.safetensors": "rate 0.998",
        "nnet_ema_rate_0.5.safetensors": "rate 0.5",
        "nnet_ema_width_0.05.safetensors": "width 0.05",
        "nnet_ema_width_0.1.safetensors": "width 0.1",
    }
    assert (tmp_path / "ckpts" / "6.ckpt" / "nnet_ema_rate_0.5.safetensors").exists()
    (tmp_path / "ckpts" / "6.ckpt" / "nnet_ema_width_copy.safetensors").touch()
    deeper, alone = tmp_path / "deeper" / "ema.safetensors", tmp_path / "alone"

    def rebuild(*flags):
        done = run_forked("scripts/posthoc_ema.py", "--ckpts", tmp_path, "--width", "0.1", "--out", deeper, *flags)
        return done.stderr

    assert not rebuild("--step", "4") and checkpoint.saved_settings(deeper)["step"] == 4
    for flags, message in (
        (("--step", "7"), "error: --step must be from 2 to 6, .*; found 7\n"),
        (("--out", tmp_path), "error: --out must end in .safetensors; found .*\n"),
        (("--out", "/proc/x.safetensors"), "error: Cannot write /proc/x.safetensors: .*, or set --out\n"),
        (("--ckpts", alone), "error: no power-function averages in .*\n"),
    ):
        assert re.fullmatch(message, rebuild(*flags))
    checkpoint.save_file({"other": torch.ones(1)}, tmp_path / "ckpts" / "2.ckpt" / "nnet_ema_width_0.05.safetensors")
    assert re.fullmatch("error: .* are of different networks: expected one run's checkpoints in --ckpts\n", rebuild())


def test_ema_is_one_operation_whatever_the_model():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(10)))
    ema = EMA(model, 0.9)
    with torch.profiler.profile() as profile:
        ema.update(1)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::_foreach_lerp_") == 1


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


def test_where_no_checkpoint_is_whole_nothing_is_begun(tiny_config, tmp_path):
    training.train(tiny_config, tmp_path)
    for folder in (tmp_path / "ckpts").iterdir():
        (folder / "nnet.safetensors").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .*ckpts is whole: remove them"):
        training.train(tiny_config, tmp_path)


def test_other_data_precision_and_frozen_parts_are_refused(tiny_config, tmp_path):
    training.train(tiny_config, tmp_path)
    state_file = tmp_path / "ckpts" / "6.ckpt" / "state.json"
    saved = json.loads(state_file.read_text())
    assert saved["accelerate"] == {"mixed_precision": "no"} and saved["data"]["n_records"] == 60
    tiny_config.train.n_steps = 8
    tiny_config.init.freeze = ("head",)
    with pytest.raises(ValueError, match=r"config.init.freeze\[0\]: None there, head now"):
        training.train(tiny_config, tmp_path)
    tiny_config.init.freeze = ()
    flags = [*overrides(tiny_config), f"--workdir={tmp_path}"]
    done = run_forked("train.py", *flags, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert done.returncode == 1 and "accelerate.mixed_precision: no there, bf16 now" in done.stderr
    records = LatentStore.digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentStore, "digest", "another")
        with pytest.raises(ValueError, match=r"data.sha256: [0-9a-f]+ there, another now"):
            training.train(tiny_config, tmp_path)
        tiny_config.resume_changes = ("data",)
        assert training.train(tiny_config, tmp_path) == 0
    assert LatentStore.digest is records


def test_processes_that_see_different_checkpoints_do_not_train(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "gather_object", lambda steps: [*steps, 12])
    with pytest.raises(ValueError, match=r"found checkpoints of different steps \(0, 12\) in .* file system that all"):
        training.train(tiny_config, tmp_path)
    assert not tmp_path.joinpath("metrics.jsonl").exists()


def test_a_signal_at_the_last_step_asks_for_nothing_more(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(training.StopRequest, "agreed", lambda self: True)
    tiny_config.train.n_steps = 1
    assert training.train(tiny_config, tmp_path) == 0
    assert not (tmp_path / "requeue").exists()
