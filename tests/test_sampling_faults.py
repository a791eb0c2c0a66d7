"""One set sampled by any number of processes, under SIGKILL and in parts: the same bytes."""

import random
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config, overrides
from safetensors.torch import save_file
from test_sharding import join, start_ranks

from img2npz import img2npz
from libs.model import build_network

pytestmark = pytest.mark.slow
N_SAMPLES, KILLS = 150, 5


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_autoencoder, tiny_latents) -> list[str]:
    """eval.py on random weights: 150 images in batches of 3."""
    config = make_tiny_config(tiny_autoencoder, tiny_latents)
    config.sample.update(n_samples=N_SAMPLES, mini_batch_size=3, sample_steps=20)
    weights = tmp_path_factory.mktemp("weights") / "nnet.safetensors"
    torch.manual_seed(0)
    save_file(build_network(config).state_dict(), weights)
    return ["eval.py", *overrides(config), f"--nnet_path={weights}"]


def start(command: list[str], folder: Path, processes: int, *flags: str) -> list:
    return start_ranks(*command, f"--IMGsave_path={folder}", *flags, processes=processes)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """The set as one process makes it."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    join(start(command, folder, 1))
    assert len(contents(folder)) == N_SAMPLES + 2  # the labels and the settings too
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def n_files(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in folder.iterdir()) if folder.is_dir() else 0


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_files(command, whole, tmp_path, processes):
    join(start(command, tmp_path / "images", processes))
    assert contents(tmp_path / "images") == contents(whole)


def test_killed_at_random_moments_and_run_again_the_files_are_the_same(command, whole, tmp_path):
    """A third of the kills while the processes start, the others once some more files are there."""
    rng, folder, found = random.Random(0), tmp_path / "images", []
    for kill in range(KILLS):
        goal = max(n_files(folder), 2) + rng.randint(1, N_SAMPLES // (KILLS + 1))
        begun, seconds = time.monotonic(), 120 if kill % 3 else rng.random()
        ranks = start(command, folder, 3)
        while n_files(folder) < goal and time.monotonic() < begun + seconds:
            time.sleep(0.001)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        found.append(n_files(folder))
    assert found == sorted(found) and 2 < found[1] < found[-1] < N_SAMPLES, found
    join(start(command, folder, 3))
    assert contents(folder) == contents(whole)


def test_two_parts_cut_within_a_batch_make_the_same_npz(command, whole, tmp_path):
    middle, parts = N_SAMPLES // 2 + 2, [tmp_path / "part0", tmp_path / "part1"]
    join(start(command, parts[0], 2, f"--indices=0:{middle}"))
    join(start(command, parts[1], 1, f"--indices={middle}:{N_SAMPLES}"))
    img2npz([whole], tmp_path / "whole.npz")
    img2npz(parts, tmp_path / "merged.npz")
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
