"""Shared pieces: configs by name, a tiny autoencoder, store, network and run, real processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train as training
import utils
from libs.inception import WEIGHTS
from libs.model import build_network, config_json
from scripts import extract_imagenet_feature

ROOT = Path(__file__).resolve().parents[1]


def load_config(name: str):
    """get_config() of configs/<name>.py."""
    return utils.load_config(ROOT / "configs" / f"{name}.py")


def run(*command: str, processes: int = 1, env: dict | None = None, timeout: int = 300):
    """A program of the project in real processes, one thread each; returns the finished process."""
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        head += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [*head, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class RunsCode:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory) -> Path:
    """A randomly initialized AutoencoderKL, 16x16 -> 4x8x8, as a diffusers folder."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """60 random 16x16 pictures in 3 classes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / f"class{i % 3}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 3}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_latents(tmp_path_factory, tiny_autoencoder, tiny_images) -> Path:
    """The latent store of `tiny_images`, made by the project's own extraction."""
    folder = tmp_path_factory.mktemp("store") / "latents"
    places = ("--images", tiny_images, "--out", folder, "--autoencoder", tiny_autoencoder)
    flags = ("--resolution", "16", "--no-flip", "--workers", "0")
    extract_imagenet_feature.main([*map(str, places), *flags])
    return folder


@pytest.fixture
def tiny_config(tiny_autoencoder, tiny_latents):
    return make_tiny_config(tiny_autoencoder, tiny_latents)


def make_tiny_config(tiny_autoencoder: Path, tiny_latents: Path):
    """The digits config on the tiny store, a few steps long."""
    config = load_config("digits_released")
    config.dataset.path = str(tiny_latents)
    config.dataset.n_classes = 3
    config.autoencoder.pretrained_path = str(tiny_autoencoder)
    for stage in config.nnet.stages:
        stage.dim, stage.depth = 16, 3
    config.train.update(n_steps=6, batch_size=12, log_interval=1, eval_interval=4, save_interval=3, grid=(2, 5))
    config.lr_scheduler.warmup_steps = 2
    config.sample.update(sample_steps=4, grid_steps=3, n_samples=12, mini_batch_size=5)
    return config


def overrides(config) -> list[str]:
    """The command-line flags that turn configs/digits_released.py into `tiny_config`."""
    flags = ["--config=configs/digits_released.py"]
    flags += [f"--config.dataset.path={config.dataset.path}", f"--config.dataset.n_classes={config.dataset.n_classes}"]
    flags += [f"--config.autoencoder.pretrained_path={config.autoencoder.pretrained_path}"]
    for i, stage in enumerate(config.nnet.stages):
        flags += [f"--config.nnet.stages[{i}].dim={stage.dim}", f"--config.nnet.stages[{i}].depth={stage.depth}"]
    for section in ("train", "sample"):
        flags += [f"--config.{section}.{name}={value}" for name, value in config[section].items() if value is not None]
    return [*flags, f"--config.lr_scheduler.warmup_steps={config.lr_scheduler.warmup_steps}"]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_autoencoder, tiny_latents) -> Path:
    """The work folder of a run of `tiny_config`: checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("trained")
    training.train(make_tiny_config(tiny_autoencoder, tiny_latents), workdir)
    return workdir


def save_weights(config, path):
    """Random weights with their config, large enough that the class shows in the pictures."""
    state = {name: t + 0.2 * torch.randn(t.shape) for name, t in build_network(config).state_dict().items()}
    save_file(state, path, {"config": json.dumps(config_json(config))})


@pytest.fixture
def weights(tiny_config, tmp_path) -> Path:
    """A random tiny model; its batches do not divide the set."""
    torch.manual_seed(5)
    tiny_config.sample.update(n_samples=9, mini_batch_size=4)
    save_weights(tiny_config, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def quick_distance(mu1, sigma1, mu2, sigma2):
    """In the place of the Fréchet distance, which takes seconds, where only what goes into it is in question."""
    return float(np.abs(mu1 - mu2).sum() + np.abs(sigma1 - sigma2).sum())


@pytest.fixture(scope="session")
def inception_assets(tmp_path_factory) -> Path:
    """An assets folder with pytorch-fid's Inception file, its weights random; as TORCH_HOME it has the file, too.

    They are Kaiming's, as default ones make all features alike; with a bias that would show.
    """
    import pytorch_fid.inception
    import torchvision

    with (
        patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: {}),
        patch.object(torchvision.models.Inception3, "load_state_dict", lambda network, state: None),
    ):
        network = pytorch_fid.inception.fid_inception_v3()
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    torch.nn.init.normal_(network.fc.weight, std=0.2)
    torch.nn.init.normal_(network.fc.bias)
    folder = tmp_path_factory.mktemp("assets")
    (folder / "inception").mkdir()
    torch.save(network.state_dict(), folder / "inception" / WEIGHTS)
    (folder / "hub").mkdir()
    (folder / "hub" / "checkpoints").symlink_to(folder / "inception")
    return folder
