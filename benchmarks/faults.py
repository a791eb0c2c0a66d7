"""Every fault that training is meant to survive, injected into real runs of train.py, and what came of it.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --workdir /tmp/faults --out docs/faults.md

A tiny model on random latents in the digits' shape; every run is a process of its own. Takes about 15 minutes on two
CPU cores; --only picks faults by name. The full disk is a small tmpfs, which only root can mount: without, it is
skipped and the table says so. Ends with status 1 if anything went otherwise than it should.
"""

import argparse
import contextlib
import json
import os
import pickle
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs import checkpoint
from libs.autoencoder import load_autoencoder
from libs.files import file_digest
from libs.latents import StoreWriter

ROOT = Path(__file__).resolve().parents[1]
N_STEPS, SAVE_INTERVAL, KILLS, KILLS_IN_WRITING, KILLS_IN_START = 40, 2, 20, 8, 3
N_RECORDS, BATCH = 256, 32

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
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


class Surprise(Exception):
    """Something went otherwise than it should."""


def expect(condition, what):
    if not condition:
        raise Surprise(what)


# --- A run and its processes ------------------------------------------------------------------------------------------


def write_store(path, broken=()):
    """A latent store of random moments; those of the records in `broken` are NaN, as after damage on the disk."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(
        path,
        {
            "record_shape": (8, 8, 8),
            "dtype": "float32",
            "resolution": 32,
            "flips": False,
            "crop": "none",
            "autoencoder": load_autoencoder(ROOT / "assets/digits_autoencoder", device="cpu").identity,
            "class_names": [str(label) for label in range(10)],
            "images_per_shard": N_RECORDS,
            "source": {"kind": "benchmark", "n_images": N_RECORDS},
        },
    )
    writer.begin()
    moments = rng.standard_normal((N_RECORDS, 8, 8, 8), dtype=np.float32)
    moments[:, 4:] -= 2  # the log-variances
    writer.write_shard(0, moments)
    writer.finish(np.arange(N_RECORDS) % 10)
    if len(broken):
        np.load(path / "latents-00000.npy", mmap_mode="r+")[broken] = np.nan
    return path


class Run:
    """A work folder and the command that trains in it, alone or as two ranks."""

    def __init__(self, workdir, store, precision="no", **settings):
        self.workdir, self.precision = Path(workdir), precision
        self.log = self.workdir.with_name(f"{self.workdir.name}.log")
        train = {
            "n_steps": N_STEPS,
            "batch_size": BATCH,
            "log_interval": 1,
            "eval_interval": 10_000,
            "save_interval": SAVE_INTERVAL,
            "keep_last": 100,
        }
        self.flags = ["--config=configs/digits.py", f"--config.dataset.path={store}", f"--workdir={self.workdir}"]
        self.flags += ["--config.nnet.stages[0].dim=32", "--config.nnet.stages[1].dim=16"]
        self.flags += [f"--config.train.{name}={value}" for name, value in (train | settings).items()]

    def start(self, *flags, rank=None, port=None):
        """The process of one rank. Without a launcher, so that a signal reaches just it."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": self.precision}
        if rank is not None:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        program = ["-c", FP16_ON_CPU] if self.precision == "fp16" else ["train.py"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started_ns, self.started = time.time_ns(), time.monotonic()
        if not rank:
            self.log.write_text("")
        with open(self.log, "a") as log:
            return subprocess.Popen([sys.executable, *program, *self.flags, *flags], cwd=ROOT, env=env, stderr=log)

    def start_pair(self, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self.start(*flags, rank=rank, port=port) for rank in (0, 1)]

    def finish(self, *flags, status=0):
        """Run to the end; (seconds until the first new step, seconds in all)."""
        process = self.start(*flags)
        first = self.wait_for(0, process)
        expect(process.wait(600) == status, f"status {process.returncode}, not {status}:\n{self.log.read_text()}")
        return first, time.monotonic() - self.started

    def wait_for(self, step, process, seconds=300):
        """Until a step of at least `step` is logged by the process that was started last, or that has ended."""
        while time.monotonic() < self.started + seconds:
            if self.last_step() >= max(step, 1) or process.poll() is not None:
                return time.monotonic() - self.started
            time.sleep(0.001)
        raise Surprise(f"no step {step} within {seconds} s:\n{self.log.read_text()}")

    def last_step(self):
        """The newest step logged since the last start; 0 before."""
        file = self.workdir / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime_ns > self.started_ns:
                lines = file.read_text().splitlines()
                # what a resumed run takes over does not count: it writes this at its start
                new = [line for line in lines[self.resumed() :] if line.endswith("}")]
                return json.loads(new[-1])["step"] if new else 0
        return 0

    def resumed(self):
        """The step that the newest start went on from, as its log says."""
        lines = [line for line in self.log.read_text().splitlines() if "going on from" in line]
        return int(Path(lines[-1].split()[-1]).stem) if lines else 0

    def losses(self):
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}

    def folder(self, step=N_STEPS):
        return self.workdir / "ckpts" / f"{step}.ckpt"

    def whole_checkpoints(self):
        """Steps of the checkpoints that can be read, oldest first."""
        steps = []
        for folder in checkpoint.checkpoint_folders(self.workdir / "ckpts"):
            with contextlib.suppress(ValueError):
                checkpoint.read_checkpoint(folder)
                steps.append(int(folder.stem))
        return steps[::-1]

    def unfinished(self):
        """{file: bytes} of the checkpoint that the newest start was writing or is; None if none."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.workdir / "ckpts"):
                if entry.name.endswith(".tmp") and entry.stat().st_mtime_ns > self.started_ns:
                    return {file.name: file.stat().st_size for file in os.scandir(entry)}
        return None


def expect_same(run, straight, step=N_STEPS, curve=True):
    """Bit for bit: every tensor and the rest of the state of a checkpoint, and the losses logged on the way."""
    state, tensors = checkpoint.read_checkpoint(run.folder(step))
    other_state, other_tensors = checkpoint.read_checkpoint(straight.folder(step))
    expect(state["step"] == other_state["step"] == step, "the steps differ")
    expect(state["scaler"] == other_state["scaler"], f"scaler {state['scaler']}, not {other_state['scaler']}")
    expect(tensors.keys() == other_tensors.keys(), "the files differ")
    for file, named in tensors.items():
        expect(named.keys() == other_tensors[file].keys(), f"the tensors of {file} differ")
        for name, tensor in named.items():
            expect(torch.equal(tensor, other_tensors[file][name]), f"{file}: {name} differs")
    if curve:
        expected = {step_: loss for step_, loss in straight.losses().items() if step_ <= step}
        same = run.losses().items() <= expected.items() and max(run.losses()) == step
        expect(same, "the losses differ")


def seconds(values):
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


# --- The faults: each yields rows (fault, what happened, what was left, seconds) --------------------------------------


class Faults:
    def __init__(self, workdir, seed):
        self.workdir, self.rng = workdir, random.Random(seed)
        self.store = write_store(workdir / "store")
        self.straights = {}
        self.starts = []  # seconds from the command to the first step

    def run(self, name, store=None, **settings):
        return Run(self.workdir / name, store or self.store, **settings)

    def straight(self, precision="no"):
        """The run that nothing happens to."""
        if precision not in self.straights:
            run = self.straights[precision] = self.run(f"straight-{precision}", precision=precision)
            self.starts.append(run.finish()[0])
        return self.straights[precision]

    def copy(self, name, until, **settings):
        """A run of `until` steps in a work folder of its own, whose next start goes on from there."""
        source = self.straight()
        run = self.run(name, **settings)
        shutil.copytree(source.workdir, run.workdir, ignore=shutil.ignore_patterns("tensorboard"))
        for folder in checkpoint.checkpoint_folders(run.workdir / "ckpts"):
            if int(folder.stem) > until:
                shutil.rmtree(folder)
        return run

    def killed(self, precision):
        """40 steps with 20 kills: in starting, in training and in writing checkpoints, at random moments."""
        straight = self.straight(precision)
        run = self.run(f"killed-{precision}", precision=precision)
        kinds = ["start"] * KILLS_IN_START + ["writing"] * KILLS_IN_WRITING
        kinds += ["training"] * (KILLS - len(kinds))
        self.rng.shuffle(kinds)
        targets = sorted(self.rng.sample(range(1, N_STEPS - 12), KILLS))  # with room for steps made meanwhile
        counts, files, again = dict.fromkeys(("start", "training", "writing"), 0), set(), []
        for target, kind in zip(targets, kinds, strict=True):
            process = run.start()
            if kind == "start":
                time.sleep(self.rng.random() * self.starts[0])
            else:
                again.append(run.wait_for(0, process))
                run.wait_for(target, process)
            if kind == "writing":  # with some number of its four files begun
                begun = self.rng.randrange(5)
                while (left := run.unfinished()) is None or len(left) < begun:
                    if process.poll() is not None:
                        break
            if kind == "training":
                time.sleep(self.rng.random() * 0.03)
            process.kill()
            expect(process.wait() == -signal.SIGKILL, f"the run ended before kill {sum(counts.values()) + 1}")
            left = run.unfinished()
            counts["writing" if left is not None else kind if kind != "writing" else "training"] += 1
            if left is not None:
                files.add(len(left))
            print(f"  {precision}: killed in {kind} at step {run.last_step()}, half-written: {left}", flush=True)
        expect(counts["writing"] >= 5, f"only {counts['writing']} kills hit the writing of a checkpoint")
        again.append(run.finish()[0])
        expect_same(run, straight)
        scaler = checkpoint.read_checkpoint(run.folder())[0]["scaler"]
        name = {"no": "float32", "bf16": "bf16 autocast", "fp16": "fp16 autocast, loss scaler"}[precision]
        scale = f", the loss scaler ({scaler['scale']:g})" if scaler else ""
        yield (
            f"SIGKILL, {KILLS} times in {N_STEPS} steps ({name})",
            f"{counts['start']} in starting, {counts['training']} in training, {counts['writing']} in writing a "
            f"checkpoint ({min(files)} to {max(files)} of its files begun); gone on from the newest whole one",
            f"weights, EMA, optimiser{scale} and losses identical bit for bit to an uninterrupted run's",
            f"{seconds(again)} to the next step",
        )

    def killed_float32(self):
        return self.killed("no")

    def killed_bf16(self):
        return self.killed("bf16")

    def killed_fp16(self):
        return self.killed("fp16")

    def damaged(self):
        """Each file of the newest checkpoint cut short, or with one bit of it flipped."""
        straight, until = self.straight(), 20
        for damage in ("cut short", "one bit flipped"):
            again, names = [], sorted(path.name for path in straight.folder(until).iterdir())
            for name in names:
                run = self.copy(f"damaged-{damage[:3]}-{name}", until, n_steps=until + 2)
                file = run.folder(until) / name
                content = bytearray(file.read_bytes())
                at = self.rng.randrange(len(content))
                if damage == "cut short":
                    content = content[:at]
                else:
                    content[at] ^= 1 << self.rng.randrange(8)
                file.write_bytes(content)
                again.append(run.finish()[0])
                log = run.log.read_text()
                expect(f"passed over: {run.folder(until)}" in log and run.resumed() == until - 2, log)
                expect_same(run, straight, until + 2)
                expect_same(run, straight, until, curve=False)
            yield (
                f"newest checkpoint: {damage} ({', '.join(names)}, each in turn)",
                "named in the log and passed over, gone on from the one before",
                f"the damaged one is written anew; step {until + 2} identical to an uninterrupted run's",
                f"{seconds(again)} to the next step",
            )

    def full_disk(self):
        """The whole work folder on a small file system that another program fills up, and empties later."""
        name, straight = "full disk for some steps (everything of the run on it)", self.straight()
        mount = self.workdir / "disk"
        mount.mkdir()
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", mount]).returncode:
            yield name, "skipped: needs root, to mount a small tmpfs", "", ""
            return
        try:
            run = Run(mount / "run", self.store, eval_interval=4, grid_classes=1, grid_per_class=2, keep_last=2)
            run.log = self.workdir / "disk.log"
            process = run.start("--config.sample.grid_steps=3")
            run.wait_for(9, process)
            room = shutil.disk_usage(mount).free
            with contextlib.suppress(OSError), open(mount / "filler", "wb", buffering=0) as filler:
                while filler.write(bytes(1 << 16)) == 1 << 16:
                    pass
                filler.write(bytes(1 << 16))
            full = run.last_step()
            while "metrics of step 2" not in run.log.read_text() and process.poll() is None:
                time.sleep(0.01)
            left = run.whole_checkpoints()
            (mount / "filler").unlink()
            expect(process.wait(300) == 0, run.log.read_text())
            log = run.log.read_text()
            lost, lines = log.count(".ckpt is lost"), log.count("metrics of step")
            expect(lost and lines and left and max(left) <= full + 1, f"{lost}, {lines}, {left}\n{log}")
            expect_same(run, straight)
            grids = log.count("the grid of step")
            board = "TensorBoard given up" if "tensorboard is given up" in log else "TensorBoard not hit"
            yield (
                name,
                f"full from step {full} ({room / 1e6:.0f} MB taken) to past step 20: {lost} checkpoints, {lines} lines "
                f"of metrics and {grids} grids lost and named in the log, {board}; training went on",
                f"meanwhile checkpoints {left}, whole; afterwards step {N_STEPS} identical to an uninterrupted run's",
                "0 (no stop)",
            )
        finally:
            subprocess.run(["umount", "--lazy", mount], check=True)

    def nan_in_a_batch(self):
        """One record of the data set is not a number: a batch with it comes once in an epoch."""
        store = write_store(self.workdir / "store-one-nan", broken=[100])
        run = self.run("one-nan", store)
        run.finish()
        lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
        skipped, epochs = lines[-1]["skipped_updates"], N_STEPS * BATCH // N_RECORDS
        expect(skipped == epochs, f"{skipped} updates skipped, not {epochs}")
        expect(all_finite(run.folder()), "the weights are not finite")
        yield (
            f"NaN in one of {N_RECORDS} records",
            f"{skipped:.0f} of {N_STEPS} updates skipped and counted (`skipped_updates`): its batch, once an epoch",
            "weights, EMA and optimiser finite",
            "0 (no stop)",
        )

    def nan_for_good(self):
        """From step 20 on all data are NaN."""
        store = write_store(self.workdir / "store-all-nan", broken=range(N_RECORDS))
        run = self.copy("all-nan", 20, store=store, max_skipped=5)
        process = run.start()
        began = run.wait_for(0, process)
        process.wait(300)
        log = run.log.read_text()
        message = next((line for line in log.splitlines() if line.startswith("error: ")), "no error")
        expect(process.returncode == 1 and "5 updates in a row up to step 25" in message, log)
        expect("Traceback" not in log, log)
        newest = run.whole_checkpoints()[-1]
        expect(f"the last checkpoint is of step {newest}" in message, message)
        good, last = (checkpoint.read_checkpoint(run.folder(step))[1]["nnet.safetensors"] for step in (20, newest))
        expect(all(torch.equal(good[name], last[name]) for name in good), "skipped updates changed weights")
        yield (
            "NaN in every batch from step 20 on (`max_skipped` 5)",
            f"status 1 after 5 skipped updates: “{message.split('. ')[0]} …”",
            f"checkpoint of step {newest}, whole, with the weights of step 20",
            f"{time.monotonic() - run.started - began:.1f} from the first bad step to the end",
        )

    def signals(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            run, ended, steps = self.run(f"signal-{number}"), [], []
            for target in sorted(self.rng.sample(range(3, N_STEPS - 6), 2)):
                process = run.start(f"--config.train.save_interval={10 * N_STEPS}")
                run.wait_for(target, process)
                time.sleep(self.rng.random() * 0.02)
                sent = time.monotonic()
                process.send_signal(number)
                expect(process.wait(60) == 75, f"status {process.returncode}:\n{run.log.read_text()}")
                ended.append(time.monotonic() - sent)
                steps.append(int((run.workdir / "requeue").read_text()))
                expect(run.whole_checkpoints()[-1] == steps[-1], f"{run.whole_checkpoints()}, not {steps}")
            run.finish()
            expect_same(run, self.straight())
            yield (
                f"{signal.Signals(number).name}, twice (at steps {steps[0]} and {steps[1]})",
                "a checkpoint at that step, the file `requeue`, status 75",
                f"resumed each time, step {N_STEPS} identical to an uninterrupted run's",
                f"{seconds(ended)} from the signal to the end",
            )

    def straight_pair(self):
        if "pair" not in self.straights:
            run = self.straights["pair"] = self.run("straight-pair")
            expect([process.wait(300) for process in run.start_pair()] == [0, 0], run.log.read_text())
        return self.straights["pair"]

    def finish_pair(self, run):
        expect([process.wait(300) for process in run.start_pair()] == [0, 0], run.log.read_text())
        expect_same(run, self.straight_pair())

    def signal_to_one_of_two(self):
        run = self.run("signal-pair")
        processes = run.start_pair()
        run.wait_for(self.rng.randrange(5, N_STEPS - 8), processes[0])
        sent = time.monotonic()
        processes[1].send_signal(signal.SIGTERM)
        statuses = [process.wait(60) for process in processes]
        ended = time.monotonic() - sent
        expect(statuses == [75, 75], f"{statuses}\n{run.log.read_text()}")
        step = int((run.workdir / "requeue").read_text())
        self.finish_pair(run)
        yield (
            "SIGTERM to one of two processes",
            f"both stop at step {step} with status 75",
            f"resumed, step {N_STEPS} identical to an uninterrupted run's of two processes",
            f"{ended:.1f} from the signal to the end of both",
        )

    def rank_killed(self):
        """SIGKILL to one of two processes; the other must say so and end."""
        for lost in (1, 0):
            run, ended = self.run(f"rank-{lost}"), []
            for target in sorted(self.rng.sample(range(3, N_STEPS - 6), 2)):
                processes = run.start_pair()
                run.wait_for(target, processes[0])
                time.sleep(self.rng.random() * 0.03)
                killed = time.monotonic()
                processes[lost].kill()
                status = processes[1 - lost].wait(120)
                ended.append(time.monotonic() - killed)
                processes[lost].wait()
                log = run.log.read_text()
                expect(status == 1, f"status {status}\n{log}")
                said = re.findall("error: .*", log)  # it may stand behind the progress bar of the one that is gone
                expect(len(said) == 1 and "another process of this run is gone" in said[0], log)
                expect("Traceback" not in log, log)
            left = run.whole_checkpoints()[-1]
            self.finish_pair(run)
            yield (
                f"process {lost} of two killed, twice",
                "the other ends with status 1 and one line: “error: another process of this run is gone; run the "
                "command again to go on …”",
                f"the newest checkpoint before (the last time: {left}); resumed each time, step {N_STEPS} identical to "
                "an uninterrupted run's of two processes",
                f"{seconds(ended)} until the other had ended" + ("" if lost else " (3 of them left to a launcher)"),
            )

    def pickles(self):
        """A pickle that would leave a file when it is read: as weights to start from, and within a checkpoint."""
        marker = self.workdir / "code-has-run"
        evil = self.workdir / "evil.pth"
        torch.save({"weight": Harmful(marker)}, evil)
        run = self.run("pickle")
        process = run.start(f"--config.init.path={evil}")
        expect(process.wait(120) == 1, run.log.read_text())
        took = time.monotonic() - run.started
        lines = [line for line in run.log.read_text().splitlines() if line.startswith("error: ")]
        expect(len(lines) == 1 and "Traceback" not in run.log.read_text(), run.log.read_text())
        expect(not marker.exists() and not run.workdir.exists(), "the pickle was run, or a work folder made")
        yield (
            "weights to start from that are a pickle with code (`.pth`)",
            f"status 1: “{lines[0].replace(str(evil), 'evil.pth')}”",
            "no code run, nothing written",
            f"{took:.1f} from the command to the end",
        )
        run = self.copy("pickle-inside", 20, n_steps=22)
        (run.folder(20) / "nnet.safetensors").write_bytes(pickle.dumps({"weight": Harmful(marker)}))
        state = json.loads((run.folder(20) / "state.json").read_text())
        state["sha256"]["nnet.safetensors"] = file_digest(run.folder(20) / "nnet.safetensors")
        (run.folder(20) / "state.json").write_text(json.dumps(state))
        first, _ = run.finish()
        expect(f"passed over: {run.folder(20)}" in run.log.read_text() and not marker.exists(), run.log.read_text())
        expect_same(run, self.straight(), 22)
        yield (
            "a pickle with code as a file of the newest checkpoint, its checksum made to fit",
            "named and passed over as not being safetensors, gone on from the one before",
            "no code run; step 22 identical to an uninterrupted run's",
            f"{first:.1f} to the next step",
        )


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def all_finite(folder):
    _, tensors = checkpoint.read_checkpoint(folder)
    return all(torch.isfinite(tensor).all() for named in tensors.values() for tensor in named.values())


FAULTS = (
    "killed_float32",
    "killed_bf16",
    "killed_fp16",
    "damaged",
    "full_disk",
    "nan_in_a_batch",
    "nan_for_good",
    "signals",
    "signal_to_one_of_two",
    "rank_killed",
    "pickles",
)


def machine():
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return (
        f"{cpu.split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("/tmp/faults"), help="keeps the rows of the table")
    parser.add_argument("--out", type=Path, help="where to write the table; printed in any case")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, help="do these anew, keep other rows")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    runs, known = args.workdir / "runs", args.workdir / "rows.json"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    table = json.loads(known.read_text()) if known.exists() else {}
    load, faults, failed = os.getloadavg()[0], Faults(runs, args.seed), []
    faults.straight()
    for name in args.only:
        print(f"{name} ...", flush=True)
        try:
            table[name] = list(getattr(faults, name)())
            print(*(" | ".join(row) for row in table[name]), sep="\n", flush=True)
        except Exception as error:  # of whatever kind: the other faults still have their turn
            traceback.print_exc()
            failed.append(name)
            table[name] = [(name, f"**otherwise than it should**: {str(error).splitlines()[0]}", "", "")]
        known.write_text(json.dumps(table))
    lines = [
        "# Faults, injected",
        "",
        f"    OMP_NUM_THREADS=1 python benchmarks/faults.py --out {args.out}",
        "",
        f"{machine()}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after the newest",
        "of the goes (`--only`) in which the rows were measured.",
        "",
        f"A tiny model, {N_STEPS} steps of batch {BATCH}, a checkpoint every {SAVE_INTERVAL} steps; each run a process "
        "of its own. Most of the",
        f"seconds to the next step are Python importing PyTorch: an undisturbed run's first step comes after "
        f"{faults.starts[0]:.1f} s. accelerate",
        "leaves fp16 out on a CPU; that run has PyTorch's own autocast and loss scaler put in, growing every third "
        "update.",
        "",
        "| fault | what happened | what was left | seconds |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for name in FAULTS for row in table.get(name, [])),
    ]
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
