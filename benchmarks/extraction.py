"""Does extraction give the same bytes whatever happens? 300 photos, Stable Diffusion's architecture, ten kills.

    python benchmarks/extraction.py --workdir /tmp/extraction --out benchmarks/results/extraction.md

Makes 300 crops of scikit-learn's and scikit-image's photographs in three classes and a randomly initialised autoencoder
of Stable Diffusion's exact architecture, and extracts them at 256 pixels on one process, on two, and on two that are
killed (SIGKILL, both) at ten random moments and started again. The three stores must be the same bytes. About an hour
on two CPU cores: an image takes some five seconds of one. `--narrow` takes an eighth of the autoencoder's width.
"""

import argparse
import hashlib
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_sample_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs.autoencoder import SD_CONFIG
from libs.latents import LatentStore

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "extract_imagenet_feature.py"
SKIMAGE = Path(skimage.data.__file__).parent
PHOTOS = {
    "living": ("chelsea.png", "flower.jpg", "astronaut.png", "grass.png"),
    "sky": ("hubble_deep_field.jpg", "moon.png", "rocket.jpg"),
    "things": ("coffee.png", "motorcycle_left.png", "coins.png", "china.jpg"),
}
N_IMAGES, RESOLUTION, KILLS = 300, 256, 10


def make_photos(folder, seed=0):
    """300 crops of 260 to 300 pixels, a third in each class, as JPEG files."""
    rng = np.random.default_rng(seed)
    for name, files in PHOTOS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(N_IMAGES // len(PHOTOS)):
            file = files[i % len(files)]
            bundled = file in ("flower.jpg", "china.jpg")
            photo = Image.fromarray(load_sample_image(file)) if bundled else Image.open(SKIMAGE / file)
            size = min(int(rng.integers(260, 301)), *photo.size)
            left, top = (int(rng.integers(0, side - size + 1)) for side in photo.size)
            photo.crop((left, top, left + size, top + size)).convert("RGB").save(folder / name / f"{i:03d}.jpg")


def start(n_processes, args, out):
    """The extraction on n processes, started without a launcher so that a kill reaches each; a list of Popen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"images": args.workdir / "photos", "out": out, "autoencoder": args.workdir / "autoencoder"}
    flags |= {"resolution": RESOLUTION, "batch_size": 4, "shard_size": 4, "workers": 1}
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items()), "--no-flip"]
    common = {"WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(n_processes):
        env = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        log = open(out.with_suffix(f".{rank}.log"), "a")  # noqa: SIM115 (the process writes to it)
        processes.append(
            subprocess.Popen(command, env={**os.environ, **env}, start_new_session=True, stdout=log, stderr=log)
        )
    return processes


def finish(processes):
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"the extraction failed with {statuses}: see the logs in the working folder")


def digest(folder):
    """One SHA-256 over names and contents of a folder's files."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def timed(args, out, n_processes):
    begun = time.perf_counter()
    finish(start(n_processes, args, out))
    return time.perf_counter() - begun


def killed(args, out, rng):
    """Two processes, killed ten times; returns (seconds, shards there at each kill)."""
    begun, shards = time.perf_counter(), []
    for kill in range(KILLS):
        processes, seen = start(2, args, out), len(list(out.glob("latents-*.json")))
        # At random: from before the first image to in the middle of any shard after it has got going.
        goal = min(seen + rng.randint(1, 7), N_IMAGES // 4 - 1) if kill % 3 else -1
        while goal >= 0 and len(list(out.glob("latents-*.json"))) < goal and processes[0].poll() is None:
            time.sleep(0.2)
        time.sleep(rng.uniform(0.0, 25.0))
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shards.append(len(list(out.glob("latents-*.json"))))
        if (out / "index.json").exists():
            raise SystemExit("finished before the tenth kill: use more images")
    finish(start(2, args, out))
    return time.perf_counter() - begun, shards


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--narrow", action="store_true", help="an autoencoder of an eighth of the width: minutes")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    make_photos(args.workdir / "photos")
    torch.manual_seed(0)
    widths = tuple(w // 8 if args.narrow else w for w in SD_CONFIG["block_out_channels"])
    groups = 8 if args.narrow else SD_CONFIG["norm_num_groups"]
    vae = AutoencoderKL(**{**SD_CONFIG, "block_out_channels": widths, "norm_num_groups": groups})
    vae.save_pretrained(args.workdir / "autoencoder")
    n_parameters = sum(p.numel() for p in vae.parameters())

    one, two, ten = (args.workdir / name for name in ("one", "two", "killed"))
    rows = [("1 process", timed(args, one, 1), digest(one), "")]
    print(rows[-1], flush=True)
    rows.append(("2 processes", timed(args, two, 2), digest(two), ""))
    print(rows[-1], flush=True)
    seconds, shards = killed(args, ten, random.Random(0))
    note = f"shards of {N_IMAGES // 4} there at each kill: {', '.join(map(str, shards))}"
    rows.append((f"2 processes, SIGKILL {KILLS} times", seconds, digest(ten), note))
    print(rows[-1], flush=True)
    if len({row[2] for row in rows}) != 1:
        raise SystemExit("the stores differ")
    store = LatentStore.open(one)
    store.verify()
    machine = f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch "
    args.out.write_text(
        "# Extraction: the same bytes whatever happens\n\n"
        f"    python benchmarks/extraction.py --workdir /tmp/extraction --out {args.out}"
        f"{' --narrow' if args.narrow else ''}\n\n"
        f"{machine}{torch.__version__}. {len(store)} photos' crops in {store.n_classes} classes at {RESOLUTION} "
        f"pixels, records {tuple(store.record_shape)} {store.dtype};\nrandomly initialised autoencoder of Stable "
        f"Diffusion's architecture, {n_parameters:,} parameters. Seconds include "
        "starting and depend\non what else the machine does.\n\n"
        "| run | seconds | SHA-256 over the store's files | |\n|---|---|---|---|\n"
        + "".join(f"| {name} | {s:.0f} | {d[:16]} | {more} |\n" for name, s, d, more in rows)
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
