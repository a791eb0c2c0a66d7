"""How fast latents are read and written, beside the released code's way: one pickled .npy per image.

    OMP_NUM_THREADS=1 python benchmarks/latents.py --workdir /tmp/latents_benchmark --out benchmarks/results/latents.md

Needs 10 GB of disk in the working folder (reused if it is there) and about five minutes. Cold numbers need the right
to drop the page cache (root); without it they are left out and the table says so.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs.data import StepBatches, make_loader, read_ahead
from libs.files import json_digest
from libs.images import ImageTree, read_image
from libs.latents import LatentStore, StoreWriter
from scripts import extract_imagenet_feature

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (8, 32, 32)
N_RECORDS, BATCH, WORKERS = 20_000, 256, 2
BIG_RECORDS = 61 * 8192  # 8.19 GB at float16
REPEATS = 3
ENCODER_IMAGES, ENCODER_BATCH, ENCODER_SECONDS = 1280, 64, 0.8


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


def settings(n_records):
    return {
        "record_shape": SHAPE,
        "dtype": "float16",
        "resolution": 256,
        "flips": False,
        "crop": "adm-centre",
        "autoencoder": {"sha256": "0" * 64, "scaling_factor": 0.18215},
        "class_names": [str(label) for label in range(1000)],
        "images_per_shard": 8192,
        "source": {"kind": "benchmark", "n_images": n_records},
    }


def write_store(path, n_records, rng):
    """A store of random numbers, if it is not there already."""
    writer = StoreWriter(path, settings(n_records))
    writer.begin()
    if not writer.is_complete():
        records = rng.standard_normal((8192, *SHAPE), dtype=np.float32).astype(np.float16)
        for shard in range(writer.n_shards):
            first, last = writer.image_range(shard)
            writer.write_shard(shard, records[: last - first])
        writer.finish(np.arange(n_records) % 1000)
    return LatentStore.open(path)


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


def by_processes(store, seed):
    return make_loader(store, SomeBatches(len(store), BATCH, seed), WORKERS, pin_memory=False)


def by_threads(store, seed):
    return read_ahead(store, SomeBatches(len(store), BATCH, seed), WORKERS)


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


def cold_available():
    try:
        drop_cache()
    except OSError:
        return False
    return True


def bytes_read():
    """Bytes this process and its finished children have read from storage."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def opening_a_large_store(workdir):
    """(milliseconds, MB of memory) to open a sparse store of ten million records, in a process of its own."""
    path = Path(tempfile.mkdtemp(dir=workdir))
    n_records = 10_000_000
    shards, per_shard = [], 65_536
    for k in range(-(-n_records // per_shard)):
        n = min(per_shard, n_records - k * per_shard)
        name = f"latents-{k:05d}.npy"
        np.lib.format.open_memmap(path / name, "w+", np.float16, (n, *SHAPE))
        shards.append({"file": name, "bytes": (path / name).stat().st_size, "sha256": "", "records": n, "skipped": []})
    np.lib.format.open_memmap(path / "labels.npy", "w+", np.int32, (n_records,))
    labels = {"file": "labels.npy", "bytes": (path / "labels.npy").stat().st_size, "sha256": ""}
    index = {
        **StoreWriter(path, settings(n_records)).settings,
        "shards": shards,
        "labels": labels,
        "n_records": n_records,
    }
    (path / "index.json").write_text(json.dumps({**index, "sha256": json_digest(index)}))
    program = (
        "import resource, time\n"
        "from libs.latents import LatentStore\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        f"store = LatentStore.open({str(path)!r})\n"
        "seconds = time.perf_counter() - start\n"
        "store.read([0, 9_999_999, 5_000_000])\n"
        "print(1e3 * seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    return tuple(float(number) for number in printed.stdout.split())


def encoder_busy(workdir):
    """(share of the time in which a stand-in encoder is busy, images/s that one core decodes and crops)."""
    images = workdir / "photos"
    if not images.exists():
        rng = np.random.default_rng(0)
        photos = load_sample_images().images
        for k in range(ENCODER_IMAGES):
            folder = images / f"{k % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            photo = photos[k % 2]
            top, left = rng.integers(0, photo.shape[0] - 375), rng.integers(0, photo.shape[1] - 500)
            Image.fromarray(photo[top : top + 375, left : left + 500]).save(folder / f"{k}.jpg", quality=92)
    tree = ImageTree(images)
    start = time.perf_counter()
    for i in range(100):
        read_image(tree.path(i), 256)
    decoded = 100 / (time.perf_counter() - start)

    busy = 0.0

    def encode_batch(encode, images, flip):  # from uint8 images on, as all that is the accelerator's work
        nonlocal busy
        time.sleep(ENCODER_SECONDS)
        busy += ENCODER_SECONDS
        return np.zeros((2 * len(images), *SHAPE), np.float32)

    extract_imagenet_feature.encode_batch = encode_batch
    with tempfile.TemporaryDirectory(dir=workdir) as out:
        args = SimpleNamespace(
            flip=True, batch_size=ENCODER_BATCH, resolution=256, workers=WORKERS, dtype="float16", skip_unreadable=False
        )
        writer = StoreWriter(
            out, {**settings(len(tree)), "flips": True, "images_per_shard": 256, "class_names": tree.class_names}
        )
        writer.begin()
        start = time.perf_counter()
        shards, device = list(range(writer.n_shards)), torch.device("cpu")
        extract_imagenet_feature.encode_shards(writer, shards, tree, None, device, args, show_progress=False)
        return busy / (time.perf_counter() - start), decoded


def machine():
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return (
        f"{cpu.split(':')[1].strip()}, {os.cpu_count()} cores, {int(memory.split()[1]) / 1e6:.0f} GB memory, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, Pillow {PIL.__version__}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", default="/tmp/latents_benchmark")
    parser.add_argument("--out", default="benchmarks/results/latents.md")
    args = parser.parse_args()
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    store = write_store(workdir / "store", N_RECORDS, rng)
    write_pickled_files(workdir / "pickled", rng)

    ways = {
        "pickled": lambda store, seed: pickled_loader(workdir / "pickled"),
        "processes": by_processes,
        "threads": by_threads,
    }
    # The first pass fills the cache and is not counted.
    warm = {
        name: [records_per_second(way(store, seed)) for seed in range(1 + REPEATS)][1:] for name, way in ways.items()
    }
    rows = {"warm": warm}
    if cold_available():
        big = write_store(workdir / "big", BIG_RECORDS, rng)
        cold = {name: [] for name in ways}
        for seed in range(REPEATS):
            for name, way in ways.items():
                drop_cache()
                cold[name].append(records_per_second(way(big, seed)))
        rows["cold, store of 8.2 GB"] = cold
        drop_cache()
        before, n = bytes_read(), 1000
        big.read(np.random.default_rng(1).permutation(len(big))[:n])
        read_amplification = (bytes_read() - before) / (n * big.meta["shards"][0]["bytes"] / 8192)
    milliseconds, megabytes = opening_a_large_store(workdir)
    busy, decoded = encoder_busy(workdir)
    shard = store.meta["shards"][0]
    pickled_bytes = (workdir / "pickled" / "0.npy").stat().st_size

    lines = [
        "# Latents: reading and extraction",
        "",
        f"    OMP_NUM_THREADS=1 python benchmarks/latents.py --out {args.out}",
        "",
        machine(),
        "",
        f"{N_RECORDS:,} records of {SHAPE}, shuffled, batch {BATCH}: records per second, median of {REPEATS} passes.",
        f"Pickled: one npy per image, read as by the released code with {WORKERS} worker processes. The store: with",
        f"{WORKERS} worker processes and with {WORKERS} threads (`libs/data.py`).",
        "",
        "| | pickled npy | store, processes | ratio | store, threads | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in rows.items():
        pickled, processes, threads = (float(np.median(results[way])) for way in ways)
        lines.append(
            f"| {name} | {pickled:,.0f} | {processes:,.0f} | {processes / pickled:.1f} | {threads:,.0f} "
            f"| {threads / pickled:.1f} |"
        )
    if len(rows) == 1:
        cold_line = "Cold: not measured, the page cache could not be dropped here."
    else:
        cold_line = f"Cold random records: {read_amplification:.2f} bytes read from the disk per byte asked for."
    lines += [
        "",
        f"- {cold_line}",
        f"- Per 256-pixel view: {shard['bytes'] / shard['records'] / 1024:.2f} KB in the store, "
        f"{pickled_bytes / 1024:.2f} KB in a pickled npy.",
        f"- Opening a store of ten million records (sparse) and reading three: {milliseconds:.1f} ms to open, "
        f"{megabytes:.1f} MB above the",
        "  process's peak of memory before.",
        f"- Extraction with a stand-in encoder of {ENCODER_SECONDS} s per {ENCODER_BATCH} images and {WORKERS} workers "
        f"on JPEGs of 500 x 375",
        f"  (one core decodes and crops {decoded:.0f} a second): the encoder is busy {100 * busy:.1f} % of the time.",
        "  The conversion from uint8 to float counts as the encoder's work: on a GPU it runs there.",
    ]
    print(*lines, sep="\n")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
