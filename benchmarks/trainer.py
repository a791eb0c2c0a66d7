"""Measure what a training step costs beyond forward, backward and optimizer step, at the size of the digits run.

    OMP_NUM_THREADS=1 python benchmarks/trainer.py

train.train against a bare loop of forward, backward and optimizer step over batches made beforehand, turn by turn.
Checkpoints and grids, which come every few hundred steps, are left out. Needs the digits' latents, which
scripts/quickstart.sh makes, and about five minutes on one idle CPU core.
"""

import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sde
import train as training
import utils
from libs.data import StepBatches
from libs.model import build_network, loss_weights, open_autoencoder
from libs.optim import make_adamw
from libs.randomness import step_draws

ROOT = Path(__file__).resolve().parents[1]
WINDOW, WARM_UP = 10, 1  # steps per reading of the clock (the log interval); readings left out at the start of a turn
TURNS, STEPS = 12, 50  # of either loop; per turn


def real_turn(config, workdir):
    """Return seconds per step of train.train, one value per window."""
    training.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds_per_step/all"] for line in lines][WARM_UP:]


def bare_turn(config):
    """Return the same of forward, backward and optimizer step alone, on the same batches."""
    torch.manual_seed(config.seed)
    nnet, schedule = build_network(config).train(), sde.get_schedule(config.schedule)
    optimizer = make_adamw(nnet, config.optimizer.lr, tuple(config.optimizer.betas), config.optimizer.weight_decay)
    autoencoder = open_autoencoder(config, torch.device("cpu"))
    dataset, weights = utils.open_dataset(config, autoencoder), loss_weights(config)
    inputs, batches = [], StepBatches(len(dataset), config.train.batch_size, config.seed)
    for step, indices in enumerate(islice(batches, config.train.n_steps)):
        records, labels = map(torch.from_numpy, dataset.read(indices))
        draws = step_draws(config.seed, step, config.train.batch_size, tuple(config.z_shape), "cpu")
        x0, y = training.prepare_batch(records, labels, draws, config.dataset, autoencoder, nnet.null_label)
        t = schedule.times(draws.uniform_time)
        inputs.append((schedule.add_noise(x0, draws.eps, t), schedule.network_time(t), y, draws.eps))
    times = [time.perf_counter()]
    for step, (xt, t, y, eps) in enumerate(inputs, start=1):
        optimizer.zero_grad()
        sde.multi_resolution_loss(nnet(xt, t, y), eps, weights).mean().backward()
        optimizer.step()
        if step % WINDOW == 0:
            times.append(time.perf_counter())
    return (np.diff(times) / WINDOW)[WARM_UP:].tolist()


def main():
    logging.set_verbosity(logging.ERROR)
    config = utils.load_config(ROOT / "configs/digits_released.py")
    config.dataset.path = str(ROOT / "workdir/quickstart/latents")
    config.train.update(n_steps=STEPS, save_interval=0, eval_interval=0, log_interval=WINDOW)
    real, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            real.append(real_turn(config, Path(folder) / f"run-{turn}"))
            bare.append(bare_turn(config))
            print(
                f"turn {turn}: {1e3 * np.median(real[-1]):.2f} ms, bare {1e3 * np.median(bare[-1]):.2f} ms", flush=True
            )
    shares = [100 * (1 - np.median(b) / np.median(r)) for r, b in zip(real, bare, strict=True)]
    print(
        f"train.train {1e3 * np.median(real):.2f} ms per step, bare {1e3 * np.median(bare):.2f} ms; the trainer's own "
        f"share {np.median(shares):.1f} % (quartiles {np.percentile(shares, 25):.1f}, {np.percentile(shares, 75):.1f})"
    )


if __name__ == "__main__":
    main()
