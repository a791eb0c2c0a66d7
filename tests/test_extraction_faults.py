"""A store extracted by two processes, killed again and again: the same bytes."""

import random
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_sharding import join, start_ranks

from libs.latents import LatentStore

KILLS = 6


def start(images: Path, out: Path, autoencoder: Path, processes: int) -> list:
    """The extraction in 60 shards of two records."""
    flags = {"images": images, "out": out, "autoencoder": autoencoder, "resolution": 16, "shard_size": 1, "workers": 0}
    command = [str(ROOT / "scripts" / "extract_imagenet_feature.py"), *(f"--{k}={v}" for k, v in flags.items())]
    return start_ranks(*command, processes=processes)


def n_shards(store: Path) -> int:
    return len(list(store.glob("latents-*.json")))


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_the_store_is_the_same(tiny_images, tiny_autoencoder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    join(start(tiny_images, whole, tiny_autoencoder, 1))
    rng, found = random.Random(0), []
    for kill in range(KILLS):  # a third of them while the processes start
        goal = n_shards(killed) + rng.randint(1, 8)
        begun, seconds = time.monotonic(), 120 if kill % 3 else rng.random()
        ranks = start(tiny_images, killed, tiny_autoencoder, 2)
        while n_shards(killed) < goal and time.monotonic() < begun + seconds:
            time.sleep(0.001)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        found.append(n_shards(killed))
    assert 0 < found[1] < found[-1] and not (killed / "index.json").exists(), found
    join(start(tiny_images, killed, tiny_autoencoder, 2))
    LatentStore(killed).verify()
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, killed)]
    assert contents[0] == contents[1]
