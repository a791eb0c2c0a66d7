"""Records per second of the latent store, beside the released code's one pickled .npy per image.

    OMP_NUM_THREADS=1 python benchmarks/latents.py --workdir /tmp/latents_benchmark --out benchmarks/results/latents.md

Needs 10 GB of disk in the working folder (reused if it is there), about five minutes, and for its cold numbers the
right to drop the page cache (root).
"""

import os
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_run
from benchmarks.random_latents import write_store
from libs.data import StepBatches, make_loader
from libs.launch import Parser

SHAPE = (8, 32, 32)
N_RECORDS, BATCH, WORKERS = 20_000, 256, 2
BIG_RECORDS = 61 * 8192  # 8.19 GB at float16
REPEATS = 3


class PickledFiles(Dataset):
    """U-ViT's and DiMR's data set: `np.load` of a pickled pair per item."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return N_RECORDS

    def __getitem__(self, i):
        return np.load(self.folder / f"{i}.npy", allow_pickle=True)


def collate_pairs(items):
    moments, labels = zip(*items, strict=True)
    return torch.from_numpy(np.stack(moments)), torch.tensor([int(label) for label in labels])


def write_pickled_files(folder, rng):
    if (folder / f"{N_RECORDS - 1}.npy").exists():
        return
    folder.mkdir(exist_ok=True)
    for i in range(N_RECORDS):
        pair = np.empty(2, dtype=object)
        pair[0], pair[1] = rng.standard_normal(SHAPE, dtype=np.float32), np.int64(i % 1000)
        np.save(folder / f"{i}.npy", pair, allow_pickle=True)


def pickled_loader(folder):
    return DataLoader(
        PickledFiles(folder), BATCH, shuffle=True, num_workers=WORKERS, collate_fn=collate_pairs, prefetch_factor=4
    )


class SomeBatches(StepBatches):
    """As many of the training order's batches as there are in the set of pickled files."""

    def __iter__(self):
        return islice(super().__iter__(), N_RECORDS // BATCH)


def records_per_second(loader):
    """Time of one pass, without the start of the workers: from the first batch on."""
    batches = iter(loader)
    next(batches)
    start, n = time.perf_counter(), 0
    for records, _ in batches:
        n += len(records)
    return n / (time.perf_counter() - start)


def drop_cache():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def bytes_read():
    """Bytes this process and its finished children have read from storage."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def main():
    parser = Parser(__doc__)
    parser.add_argument("--workdir", default="/tmp/latents_benchmark")
    parser.add_argument("--out", default="benchmarks/results/latents.md")
    args = parser.parse_args()
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((8192, *SHAPE), dtype=np.float32).astype(np.float16)
    numbers = {"mean": [0.0] * 4, "std": [1.0] * 4}
    autoencoder = {"encoder": numbers, "decoder": numbers, "shift": [0.0], "scale": [0.18215]}
    store = write_store(workdir / "store", N_RECORDS, moments, autoencoder)
    big = write_store(workdir / "big", BIG_RECORDS, moments, autoencoder)
    write_pickled_files(workdir / "pickled", rng)

    ways = [  # pickled files, and the store as training reads it
        lambda store, seed: pickled_loader(workdir / "pickled"),
        lambda store, seed: make_loader(store, SomeBatches(len(store), BATCH, seed), WORKERS, pin_memory=False),
    ]
    # The first pass fills the cache and is not counted.
    warm = [[records_per_second(way(store, seed)) for seed in range(1 + REPEATS)][1:] for way in ways]
    cold = [[] for _ in ways]
    for seed in range(REPEATS):
        for found, way in zip(cold, ways, strict=True):
            drop_cache()
            found.append(records_per_second(way(big, seed)))
    drop_cache()
    before, n = bytes_read(), 1000
    big.read(np.random.default_rng(1).permutation(len(big))[:n])
    amplification = (bytes_read() - before) / (n * moments[0].nbytes)

    text = f"""# Latents: reading

{describe_run()}

{N_RECORDS:,} records of {SHAPE}, shuffled, batch {BATCH}: records per second, median of {REPEATS} passes.
Pickled: one npy per image, read as by the released code with {WORKERS} worker processes. The store: by
{WORKERS} threads, as training reads it (`libs/data.py`).

| | pickled npy | store | ratio |
|---|---|---|---|
"""
    for name, results in (("warm", warm), ("cold, store of 8.2 GB", cold)):
        pickled, of_store = map(np.median, results)
        text += f"| {name} | {pickled:,.0f} | {of_store:,.0f} | {of_store / pickled:.1f} |\n"
    text += f"\nCold random records: {amplification:.2f} bytes read from the disk per byte asked for.\n"
    print(text)
    Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
