"""Sampling a set by any number of processes, under kills and in parts; and how long the device waits for writing.

    OMP_NUM_THREADS=1 python benchmarks/sampling_faults.py --out benchmarks/results/sampling.md

The digits model with freshly initialised weights unless --nnet_path is given (any weights do: bytes are compared, not
pictures). The processes are forked from this one, with the environment a launcher would give them, so that SIGKILL
reaches each of them and a start takes no second import of everything.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as evaluation
import utils
from img2npz import img2npz
from libs.randomness import SampleNoise
from libs.sample_set import LABELS_FILE, SETTINGS_FILE, SampleSet, SetWriter, balanced_label
from libs.solvers import dpm_solver_fast

ROOT = Path(__file__).resolve().parents[1]

# --- The same bytes, however made -------------------------------------------------------------------------------------


def start(processes, *arguments):
    """The processes of a run of eval.evaluate(*arguments)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_main(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if processes > 1:
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in of_rank.items()})
        evaluation.evaluate(*arguments)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks):
    """Wait for all; raises RuntimeError if one failed (its error is on stderr)."""
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"a process failed: {[process.exitcode for process in ranks]}")


def kill(ranks):
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()


def n_files(folder):
    return sum(not path.name.startswith(".") for path in folder.iterdir()) if folder.is_dir() else 0


def killed_run(processes, folder, arguments, kills, total, rng):
    """Run, kill all processes at random moments, run again until done; returns the files there at each kill.

    Moments: when some number of new files is there, so that the kills spread over the set, or, a third of them, within
    the first second, while the processes start.
    """
    found = []
    while len(found) < kills and n_files(folder) < total:
        before, ranks = n_files(folder), start(processes, *arguments)
        if rng.random() < 2 / 3:
            enough = max(before, 2) + rng.randint(1, total // (kills + 1))
            while n_files(folder) < enough and all(process.is_alive() for process in ranks):
                time.sleep(0.001)
            time.sleep(rng.random() / 10)
        else:
            time.sleep(rng.random())
        kill(ranks)
        found.append(n_files(folder))
    finish(start(processes, *arguments))
    return found


def contents(folder):
    """name -> SHA-256 of a folder's files, without the settings (which hold the range)."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != SETTINGS_FILE
    }


def same_bytes(workdir, config, weights, processes, kills, seed):
    """Rows (what, files there when killed, images, digest of the npz, seconds).

    Raises AssertionError where two ways of making the set give other files.
    """
    n_samples, n_classes = config.sample.n_samples, config.dataset.n_classes
    labels = [balanced_label(i, n_samples, n_classes) for i in range(n_samples)]
    rows, digests = [], set()

    def row(what, folders, seconds, note=""):
        out = workdir / f"{folders[0].name}.npz"
        img2npz(folders, out)
        digest = hashlib.sha256(out.read_bytes()).hexdigest()
        digests.add(digest)
        images = SampleSet(*folders)
        assert images.count == n_samples and images.labels == labels, what
        rows.append((what, note, images.count, digest[:16], seconds))
        print(*rows[-1], flush=True)

    reference = None
    for number in processes:
        folder, started = workdir / f"by{number}", time.perf_counter()
        finish(start(number, config, weights, folder))
        row(f"{number} process{'es' * (number > 1)}", [folder], time.perf_counter() - started)
        reference = reference or contents(folder)
        assert contents(folder) == reference, f"{number} processes made other files"

    folder, started = workdir / "killed", time.perf_counter()
    total = len(reference) + 1
    found = killed_run(3, folder, (config, weights, folder), kills, total, random.Random(seed))
    note = f"files there at each kill: {', '.join(map(str, found))} of {total}"
    row(f"3 processes, killed {len(found)} times", [folder], time.perf_counter() - started, note)
    assert contents(folder) == reference, "killed and resumed: other files"
    assert len(found) == kills, f"done after {len(found)} kills of {kills}: give a larger --n_samples"

    started, middle = time.perf_counter(), n_samples // 2 + 3  # within a batch
    parts = [workdir / "part0", workdir / "part1"]
    for folder, number, indices in zip(parts, (2, 1), (f"0:{middle}", f"{middle}:{n_samples}"), strict=True):
        finish(start(number, config, weights, folder, None, "", indices))
    row(f"images 0:{middle} by 2, {middle}:{n_samples} by 1, merged", parts, time.perf_counter() - started)
    assert len(digests) == 1, digests
    return rows


# --- The device's idle time -------------------------------------------------------------------------------------------


class StandIn:
    """A device: calls take a fixed time in which the processor is free."""

    def __init__(self):
        self.busy, self.first, self.last = 0.0, None, None

    def work(self, seconds):
        self.first = self.first or time.perf_counter()
        time.sleep(seconds)
        self.last = time.perf_counter()
        self.busy += seconds  # what waking up took longer, the device would have idled

    def idle_share(self):
        return 1 - self.busy / (self.last - self.first)


class WaitingWriter(SetWriter):
    """For comparison: each batch is on the disk before the next is begun."""

    def put(self, *args):
        super().put(*args)
        while self.pending:
            self._finish_oldest()


class NoWriter(SetWriter):
    """For comparison: nothing is written."""

    def put(self, *args):
        pass


def idle_share(workdir, output, writer, n_samples, seconds_per_call, seconds_to_decode):
    """Idle share of a stand-in device while a set of 256x256 photographs' crops is sampled and written."""
    config = utils.load_config(ROOT / "configs" / "DiMR-XL-2R_imagenet256.py")
    config.sample.update(n_samples=n_samples, sample_steps=50, output=output)
    device, schedule = StandIn(), evaluation.sde.get_schedule(config.schedule)
    photo = torch.from_numpy(np.concatenate(load_sample_images().images)[: 2 * 256, : 2 * 256].copy())
    tiles = photo.view(2, 256, 2, 256, 3).permute(0, 2, 4, 1, 3).reshape(4, 3, 256, 256)
    pixels = tiles.repeat(config.sample.mini_batch_size // 4 + 1, 1, 1, 1)

    def nnet(x, t, y):
        device.work(seconds_per_call)
        return (x * 0.1,)

    def sample(indices, labels):
        noise_model = evaluation.sde.guided_noise_model(nnet, schedule, torch.tensor(labels), 1000, scale=1.4)
        x = SampleNoise(indices, config.seed, config.z_shape).draw()
        dpm_solver_fast(noise_model, schedule, x, config.sample.sample_steps)
        device.work(seconds_to_decode)  # and to make pixels
        return pixels[: len(indices)]

    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)
    folder = workdir / "idle"
    evaluation.SetWriter, own = writer, evaluation.SetWriter
    try:
        labels = [balanced_label(i, n_samples, 1000) for i in range(n_samples)]
        evaluation.begin_set(folder, range(n_samples), labels, None)
        evaluation.sample_set(sample, config, folder, range(n_samples), labels, accelerator)
    finally:
        evaluation.SetWriter = own
    written = sum(path.stat().st_size for path in folder.iterdir() if path.name != LABELS_FILE)
    shutil.rmtree(folder)
    return device.idle_share(), written / 1e6, n_samples / (device.last - device.first)


COST = 0.1, 0.25  # seconds per call and to decode a batch
IDLE_CASES = [
    ("png", NoWriter),
    ("png", WaitingWriter),
    *((output, SetWriter) for output in ("png", "npz", "both")),
]
WHEN = {NoWriter: "not at all", WaitingWriter: "before the next batch", SetWriter: "while sampling goes on"}

# --- The page ---------------------------------------------------------------------------------------------------------


def random_weights(path, config):
    """The config's network, initialised from its seed, with a head that does something."""
    torch.manual_seed(config.seed)
    save_file(utils.build_network(config).state_dict(), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nnet_path", help="weights of configs/digits.py (default: freshly initialised)")
    parser.add_argument("--n_samples", type=int, default=300)
    parser.add_argument("--mini_batch_size", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--idle_samples", type=int, default=200, help="images of the idle measurement; 0: none")
    parser.add_argument("--note", default="", help="what else the machine did, for the page")
    parser.add_argument("--out", help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    config = utils.load_config(ROOT / "configs" / "digits.py")
    with tempfile.TemporaryDirectory() as workdir:
        workdir = Path(workdir)
        weights = args.nnet_path or workdir / "nnet.safetensors"
        if not args.nnet_path:
            random_weights(weights, config)
        config.sample.update(n_samples=args.n_samples, mini_batch_size=args.mini_batch_size, output="both")
        rows = same_bytes(workdir, config, str(weights), args.processes, args.kills, args.seed)
        idle = []
        if args.idle_samples:
            for output, writer in IDLE_CASES:
                idle.append((output, writer, *idle_share(workdir, output, writer, args.idle_samples, *COST)))
                print(output, writer.__name__, *idle[-1][2:], flush=True)
    if args.out:
        Path(args.out).write_text(page(args, rows, idle))


def page(args, rows, idle):
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    machine = f"{len(os.sched_getaffinity(0))} cores of {model.split(': ')[1]}, no GPU used"
    weights = "trained" if args.nnet_path else "freshly initialised"
    sets = "".join(
        f"| {what} | {count} | `{digest}` | {seconds:.0f} | {note} |\n" for what, note, count, digest, seconds in rows
    )
    idles = "".join(
        f"| {output} | {WHEN[writer]} | {share:.1%} | {megabytes:.0f} | {rate:.1f} |\n"
        for output, writer, share, megabytes, rate in idle
    )
    return f"""# Sampling: the same bytes, and no waiting

    OMP_NUM_THREADS=1 python benchmarks/sampling_faults.py {" ".join(sys.argv[1:])}

{machine}; PyTorch {torch.__version__}, Python {platform.python_version()}. Seconds include starting the programs and
depend on what else the machine does{", here: " + args.note if args.note else ""}.

## One set, however it is made

{args.n_samples} digits in batches of {args.mini_batch_size}, PNGs and shards, {weights} weights.
Asserted on the way: every file of a row has the bytes of the first row's, the images of all rows make the same `.npz`
(SHA-256 below), each index is there once, and the labels are in order. Kills are SIGKILL of all processes at random
moments, a third of them while they start.

| made by | images | npz | seconds | |
|---|---|---|---|---|
{sets}
## Idle time of the device

A stand-in for a GPU: {COST[0] * 1000:.0f} ms per network call, {COST[1] * 1000:.0f} ms to decode a batch of 50, the
processor free meanwhile (a guided call of DiMR-XL on a batch of 50 is 32 TFLOP); {args.idle_samples} images of 256x256
(crops of photographs), 50 calls per batch, really written. Idle: the share of the time from the first call to the last
in which the device had no work.

| output | written | device idle | MB | images per second |
|---|---|---|---|---|
{idles}"""


if __name__ == "__main__":
    main()
