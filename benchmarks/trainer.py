"""What a training step costs beyond forward, backward and optimiser, at the size of the digits run.

    OMP_NUM_THREADS=1 nice -n -15 python benchmarks/trainer.py --out benchmarks/results/trainer.md

train.train as it is against a bare loop of forward, backward and optimiser step over batches made beforehand, turn by
turn; then the parts of the difference, each timed by itself within train.train. Checkpoints and grids, which come every
few hundred steps, are left out. Takes about five minutes on one CPU core. On a machine with other work it needs that
core for itself: where the kernel groups processes by session, nice counts for nothing beyond the session, and
`echo -15 > /proc/self/autogroup` beforehand does it.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sde
import train as training
import utils
from libs import logger
from libs.autoencoder import load_autoencoder
from libs.data import StepBatches
from libs.latents import StoreWriter
from libs.launch import StopRequest
from libs.model import build_network, loss_weights, open_autoencoder
from libs.optim import EMA, make_adamw
from libs.randomness import step_draws

ROOT = Path(__file__).resolve().parents[1]
WINDOW, WARM_UP = 10, 1  # steps per reading of the clock (the log interval); readings left out at the start of a turn


def digits_config(workdir):
    """configs/digits.py without checkpoints and grids; on random latents if the digits' are not there."""
    config = utils.load_config(ROOT / "configs/digits.py")
    config.autoencoder.pretrained_path = str(ROOT / config.autoencoder.pretrained_path)
    config.train.update(save_interval=10**6, eval_interval=10**6, log_interval=WINDOW)
    store = ROOT / config.dataset.path
    if not (store / "index.json").exists():
        store = write_store(workdir / "store", load_autoencoder(config.autoencoder.pretrained_path).identity)
    config.dataset.path = str(store)
    return config


def write_store(path, autoencoder, n_records=1797):
    writer = StoreWriter(
        path,
        {
            "record_shape": (8, 8, 8),
            "dtype": "float16",
            "resolution": 32,
            "flips": False,
            "crop": "none",
            "autoencoder": autoencoder,
            "class_names": [str(label) for label in range(10)],
            "images_per_shard": n_records,
            "source": {"kind": "benchmark", "n_images": n_records},
        },
    )
    writer.begin()
    writer.write_shard(0, np.random.default_rng(0).standard_normal((n_records, 8, 8, 8), dtype=np.float32))
    writer.finish(np.arange(n_records) % 10)
    return path


def real_turn(config, workdir):
    """Seconds per step of train.train, one value per window."""
    shutil.rmtree(workdir, ignore_errors=True)
    training.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds_per_step/all"] for line in lines][WARM_UP:]


def bare_turn(config):
    """The same of forward, backward and optimiser step alone, on the same batches."""
    torch.manual_seed(config.seed)
    nnet, schedule = build_network(config).train(), sde.get_schedule(config.schedule)
    optimizer = make_adamw(nnet, config.optimizer.lr, tuple(config.optimizer.betas), config.optimizer.weight_decay)
    autoencoder = open_autoencoder(config, torch.device("cpu"))
    dataset = utils.open_dataset(config, autoencoder)
    weights = torch.tensor(loss_weights(config))
    inputs, batches = [], StepBatches(len(dataset), config.train.batch_size, config.seed)
    for step, indices in enumerate(islice(batches, config.train.n_steps)):
        records, labels = map(torch.from_numpy, dataset.read(indices))
        draws = step_draws(config.seed, step, config.train.batch_size, tuple(config.z_shape), "cpu")
        x0, t = training.to_network_input(records, draws, autoencoder), schedule.times(draws.uniform_time)
        labels = torch.where(draws.uniform_drop < config.dataset.p_uncond, nnet.null_label, labels)
        inputs.append((schedule.add_noise(x0, draws.eps, t), schedule.network_time(t), labels, draws.eps))
    times = [time.perf_counter()]
    for step, (xt, t, labels, eps) in enumerate(inputs, start=1):
        optimizer.zero_grad()
        sde.multi_resolution_loss(nnet(xt, t, labels), eps, weights).mean().backward()
        optimizer.step()
        if step % WINDOW == 0:
            times.append(time.perf_counter())
    return (np.diff(times) / WINDOW)[WARM_UP:].tolist()


# Everything of the loop but forward, backward and optimiser step, as (part, where it is looked up, name).
PARTS = (
    ("draws", training, "step_draws"),
    ("latents from moments", training, "to_network_input"),
    ("noising", sde.DiscreteSchedule, "times"),
    ("noising", sde.DiscreteSchedule, "add_noise"),
    ("noising", sde.DiscreteSchedule, "network_time"),
    ("EMA", EMA, "update"),
    ("gradient norm, check for NaN", training, "clip_or_skip"),
    ("learning rate", training, "set_lr"),
    ("agreement on signals", StopRequest, "agreed"),
    ("sums of losses", logger.LossMeter, "add"),
    ("clock", logger.StepTimer, "mark"),
    ("log every 10 steps", logger.LossMeter, "read"),
    ("log every 10 steps", logger.StepTimer, "read"),
    ("log every 10 steps", utils, "throughput"),
    ("log every 10 steps", logger, "log_to_trackers"),
    ("log every 10 steps", logger.MetricsLog, "write"),
)


@contextmanager
def parts_timed():
    """{part: [seconds]} of every call of `PARTS` while it is open, and of waiting for data."""
    seconds, originals = {}, [(owner, name, getattr(owner, name)) for _, owner, name in PARTS]

    def timed(part, function):
        spent = seconds.setdefault(part, [])

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    make_loader = training.make_loader

    def timed_loader(*args, **kwargs):
        batches = make_loader(*args, **kwargs)
        following = timed("data", batches.__next__)
        return iter(following, None)

    training.make_loader = timed_loader
    for (part, owner, name), (_, _, original) in zip(PARTS, originals, strict=True):
        setattr(owner, name, timed(part, original))
    try:
        yield seconds
    finally:
        training.make_loader = make_loader
        for owner, name, original in originals:
            setattr(owner, name, original)


def machine():
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return (
        f"{cpu.split(':')[1].strip()}, one of {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def quartiles(values, unit=1e3):
    low, middle, high = (unit * np.percentile(values, q) for q in (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=12, help="of either loop")
    parser.add_argument("--steps", type=int, default=50, help="per turn")
    parser.add_argument("--out", type=Path, help="where to write the table; printed in any case")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = digits_config(folder)
        config.train.n_steps = args.steps
        real, bare = [], []
        for turn in range(args.turns):
            order = (0, 1) if turn % 2 else (1, 0)
            for which in order:
                if which:
                    real.append(real_turn(config, folder / "run"))
                else:
                    bare.append(bare_turn(config))
            print(
                f"turn {turn}: {1e3 * np.median(real[-1]):.2f} ms, bare {1e3 * np.median(bare[-1]):.2f} ms", flush=True
            )
            loads.append(os.getloadavg()[0])
        with parts_timed() as seconds:
            real_turn(config, folder / "run")
    shares = [1 - np.median(b) / np.median(r) for r, b in zip(real, bare, strict=True)]
    share = np.median(shares)
    per_step = {part: sum(spent) / config.train.n_steps for part, spent in seconds.items()}
    lines = [
        "# The trainer's own work per step",
        "",
        f"    OMP_NUM_THREADS=1 nice -n -15 python benchmarks/trainer.py --out {args.out}",
        "",
        f"{machine()}; load average {min(loads):.1f} to {max(loads):.1f} on the way.",
        "",
        f"`configs/digits.py` (batch {config.train.batch_size}, float32), milliseconds per step: median and quartiles "
        f"of windows of {WINDOW} steps,",
        f"{args.turns} turns of {args.steps} steps each way in alternation, the first {WARM_UP * WINDOW} steps of each "
        "left out.",
        "",
        "| | ms per step |",
        "|---|---|",
        f"| `train.train` | {quartiles(np.ravel(real))} |",
        f"| forward, backward and optimiser step alone | {quartiles(np.ravel(bare))} |",
        f"| **the trainer's own share of a step** (of either turn's medians) | **{100 * share:.1f} %** "
        f"({100 * np.percentile(shares, 25):.1f} to {100 * np.percentile(shares, 75):.1f} %) |",
        "",
        "What it consists of, each part timed by itself in one more turn:",
        "",
        "| part | ms per step | share |",
        "|---|---|---|",
    ]
    total = float(np.median(real))
    lines += [
        f"| {part} | {1e3 * spent:.3f} | {100 * spent / total:.2f} % |"
        for part, spent in sorted(per_step.items(), key=lambda item: -item[1])
    ]
    in_all = sum(per_step.values())
    lines.append(f"| in all | {1e3 * in_all:.3f} | {100 * in_all / total:.2f} % |")
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
