"""A set sampled, and a latent store extracted, by any number of processes and under SIGKILL: the same bytes."""

import random
import time
from pathlib import Path

import pytest
import torch
from conftest import contents, make_tiny_config, overrides, save_weights
from test_sharding import join, start_ranks

from libs.latents import LatentStore

pytestmark = pytest.mark.slow
N_SAMPLES = 150


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_autoencoder, tiny_latents) -> list[str]:
    """eval.py on random weights: 150 images in batches of 3."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.sample.update(n_samples=N_SAMPLES, mini_batch_size=3, sample_steps=20)
    weights = tmp_path_factory.mktemp("weights") / "nnet.safetensors"
    torch.manual_seed(0)
    save_weights(config, weights)
    return ["eval.py", *overrides(config), f"--nnet_path={weights}"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """The set as one process makes it."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    join(start_ranks(*command, f"--IMGsave_path={folder}", processes=1))
    assert len(contents(folder)) == N_SAMPLES + 2  # the labels and the settings too
    return folder


def kill_at_random_moments(command, processes, kills, folder, pattern, most) -> list[int]:
    """Run a command again and again; returns the number of files of `pattern` after each kill.

    A third of the kills come while the processes start, the others once 1 to `most` more files are there.
    """

    def n_files():
        return len(list(folder.glob(pattern)))

    rng, found = random.Random(0), []
    for kill in range(kills):
        goal = n_files() + rng.randint(1, most)
        begun, seconds = time.monotonic(), 120 if kill % 3 else rng.random()
        ranks = start_ranks(*command, processes=processes)
        while n_files() < goal and time.monotonic() < begun + seconds:
            time.sleep(0.001)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        found.append(n_files())
    assert found == sorted(found) and 0 < found[1] < found[-1], found
    return found


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_files(command, whole, tmp_path, processes):
    join(start_ranks(*command, f"--IMGsave_path={tmp_path / 'images'}", processes=processes))
    assert contents(tmp_path / "images") == contents(whole)


def test_killed_and_run_again_the_set_is_the_same(command, whole, tmp_path):
    command = [*command, f"--IMGsave_path={tmp_path / 'images'}"]
    found = kill_at_random_moments(command, 3, 5, tmp_path / "images", "[0-9]*.png", most=N_SAMPLES // 6)
    assert found[-1] < N_SAMPLES
    join(start_ranks(*command, processes=3))
    assert contents(tmp_path / "images") == contents(whole)


def test_killed_and_run_again_the_store_is_the_same(tiny_images, tiny_autoencoder, tmp_path):
    """60 shards of two records."""
    flags = {"images": tiny_images, "autoencoder": tiny_autoencoder, "resolution": 16, "shard_size": 1, "workers": 0}
    command = ["scripts/extract_imagenet_feature.py", *(f"--{name}={value}" for name, value in flags.items())]
    join(start_ranks(*command, f"--out={tmp_path / 'whole'}", processes=1))
    command.append(f"--out={tmp_path / 'killed'}")
    kill_at_random_moments(command, 2, 6, tmp_path / "killed", "latents-*.json", most=8)
    assert not (tmp_path / "killed" / "index.json").exists()
    join(start_ranks(*command, processes=2))
    LatentStore(tmp_path / "killed").verify()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
