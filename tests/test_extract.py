import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from libs import UserError
from libs.autoencoder import load_autoencoder
from libs.images import center_crop
from libs.latents import LatentStore
from scripts import extract_imagenet_feature

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "extract_imagenet_feature.py"
CLASSES = {"ants": 11, "bees": 9, "cats": 10}


@pytest.fixture
def autoencoder(tiny_autoencoder):
    return tiny_autoencoder


@pytest.fixture
def images(tmp_path):
    """Thirty pictures of random sizes in three classes."""
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (rng.integers(10, 60), rng.integers(10, 60), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k:02d}.png")
    return tmp_path / "images"


def arguments(images, out, autoencoder, *more):
    flags = {"images": images, "out": out, "autoencoder": autoencoder, "resolution": 16, "batch_size": 4, "workers": 0}
    flags["shard_size"] = 7
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))] + list(more)


def run(*args, **kwargs):
    extract_imagenet_feature.main(arguments(*args, **kwargs))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_store_holds_the_moments_of_crops_and_their_mirror_images(images, tmp_path, autoencoder):
    run(images, tmp_path / "out", autoencoder, "--dtype", "float32")
    store = LatentStore.open(tmp_path / "out")
    store.verify()
    assert len(store) == 60 and store.record_shape == (8, 8, 8) and store.class_names == list(CLASSES)
    assert store.meta["images_per_class"] == list(CLASSES.values())
    loaded = load_autoencoder(autoencoder)
    store.check_against(autoencoder=loaded.identity)
    for i, file in enumerate(sorted(images.glob("*/*.png"))):
        crop = torch.from_numpy(center_crop(Image.open(file), 16).copy()).permute(2, 0, 1)[None]
        views = torch.cat([crop, crop.flip(-1)]).float() / 255 * 2 - 1
        records, labels = store.read([2 * i, 2 * i + 1])
        torch.testing.assert_close(torch.from_numpy(records), loaded.encode_moments(views), atol=1e-4, rtol=1e-4)
        assert labels.tolist() == [list(CLASSES).index(file.parent.name)] * 2


def test_half_precision_without_flips_is_the_rounded_store(images, tmp_path, autoencoder):
    run(images, tmp_path / "full", autoencoder, "--dtype", "float32", "--no-flip")
    run(images, tmp_path / "half", autoencoder, "--no-flip")
    full = LatentStore.open(tmp_path / "full").read(range(30))[0]
    half = LatentStore.open(tmp_path / "half").read(range(30))[0]
    assert half.dtype == np.float16 and np.array_equal(half, full.astype(np.float16))


def test_training_starts_alike_on_either_precision(tiny_images, tiny_config, tmp_path):
    tiny_config.train.update(n_steps=1, log_interval=1)
    tiny_config.dataset.num_workers = 0
    losses = []
    for dtype in ("float16", "float32"):
        run(tiny_images, tmp_path / dtype, tiny_config.autoencoder.pretrained_path, "--dtype", dtype)
        tiny_config.dataset.path = str(tmp_path / dtype)
        train.train(tiny_config, tmp_path / f"run_{dtype}")
        losses.append(json.loads((tmp_path / f"run_{dtype}" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_workers_do_not_change_a_byte(images, tmp_path, autoencoder):
    run(images, tmp_path / "a", autoencoder)
    run(images, tmp_path / "b", autoencoder, "--workers", "2")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_flat_folder(images, tmp_path, autoencoder):
    run(images / "bees", tmp_path / "out", autoencoder)
    store = LatentStore.open(tmp_path / "out")
    assert store.n_classes == 1 and len(store) == 18 and set(store.read(range(18))[1]) == {0}


def test_running_again_does_nothing_and_other_settings_are_refused(images, tmp_path, autoencoder, capsys):
    run(images, tmp_path / "out", autoencoder)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run(images, tmp_path / "out", autoencoder)
    assert "is complete with these settings (60 records): nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="dtype: there 'float16', now 'float32'"):
        run(images, tmp_path / "out", autoencoder, "--dtype", "float32")
    image = images / "ants" / "00.png"
    content = image.read_bytes()
    image.write_bytes(content + b"0")
    with pytest.raises(SystemExit, match=r"1 shards \(latents-00000\.npy\) were made from another source"):
        run(images, tmp_path / "out", autoencoder)
    image.write_bytes(content)
    Image.new("RGB", (8, 8)).save(images / "ants" / "another.png")
    with pytest.raises(SystemExit, match=r"source: there .*'n_images': 30.*, now .*'n_images': 31"):
        run(images, tmp_path / "out", autoencoder)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()} == before


def test_unreadable_images_are_listed_and_skipped_only_on_request(images, tmp_path, autoencoder, capsys):
    jpeg = images / "bees" / "03.png"
    jpeg.write_bytes(jpeg.read_bytes()[:200])
    (images / "cats" / "09.png").unlink()
    (images / "cats" / "09.png").symlink_to("nowhere.png")
    with pytest.raises(
        SystemExit, match=r"2 images \(listed above\) cannot be read: replace them, or give --skip_unreadable"
    ):
        run(images, tmp_path / "out", autoencoder)
    printed = capsys.readouterr().out
    assert "2 images cannot be read:" in printed and "bees/03.png" in printed and "cats/09.png" in printed
    with pytest.raises(UserError, match="unfinished"):
        LatentStore.open(tmp_path / "out")

    run(images, tmp_path / "out", autoencoder, "--skip_unreadable")
    store = LatentStore.open(tmp_path / "out")
    store.verify()
    assert store.meta["skipped"] == ["bees/03.png", "cats/09.png"]
    assert len(store) == 56 and store.meta["images_per_class"] == [11, 8, 9]
    assert np.bincount(store.read(range(56))[1]).tolist() == [22, 16, 18]


def test_every_image_unreadable(images, tmp_path, autoencoder):
    for file in images.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match="no image is left to store"):
        run(images, tmp_path / "out", autoencoder, "--skip_unreadable")


def test_bad_input_ends_with_one_line(images, tmp_path, autoencoder):
    with pytest.raises(SystemExit, match=r"No folder of images at .*absent"):
        run(tmp_path / "absent", tmp_path / "out", autoencoder)
    with pytest.raises(SystemExit, match=r"No autoencoder at .*absent\.pth"):
        run(images, tmp_path / "out", tmp_path / "absent.pth")
    with pytest.raises(SystemExit, match="--resolution 15 is not a multiple of 2"):
        run(images, tmp_path / "out", autoencoder, "--resolution", "15")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match=r"Cannot write .*/out: "):
        run(images, tmp_path / "out", autoencoder)


def test_a_disk_too_small_is_noticed_before_encoding(images, tmp_path, autoencoder, monkeypatch):
    one_byte_short = SimpleNamespace(free=60 * 8 * 8 * 8 * 2 - 1)
    monkeypatch.setattr(extract_imagenet_feature.shutil, "disk_usage", lambda path: one_byte_short)
    with pytest.raises(SystemExit, match="MB free: free space, set another --out"):
        run(images, tmp_path / "out", autoencoder)


@pytest.mark.slow
def test_a_file_size_limit_stops_cleanly_and_is_resumed(images, tmp_path, autoencoder):
    """The disk really refuses a write (a limit on the size of files stands in for a full one)."""
    command = [sys.executable, str(SCRIPT), *arguments(images, tmp_path / "out", autoencoder)]
    limited = subprocess.run(["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *command], capture_output=True, text=True)
    assert limited.returncode == 1
    assert limited.stderr.strip().splitlines()[-1].startswith("error: Cannot write ")
    assert "Traceback" not in limited.stderr
    assert sorted(contents(tmp_path / "out")) == ["unfinished.json"]
    run(images, tmp_path / "out", autoencoder)
    run(images, tmp_path / "whole", autoencoder)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def start_two_processes(*args):
    """Two processes of one extraction, each the leader of its own group, so that a signal to it reaches its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments(*args)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_the_same_bytes(images, tmp_path, autoencoder):
    small_shards = ("--shard_size", "1", "--workers", "1")
    run(images, tmp_path / "one", autoencoder, *small_shards)
    processes = start_two_processes(images, tmp_path / "two", autoencoder, *small_shards)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list((tmp_path / "two").glob("latents-*.json")):
        time.sleep(0.001)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    n_written = len(list((tmp_path / "two").glob("latents-*.npy")))
    assert 0 < n_written <= 30 and not (tmp_path / "two" / "index.json").exists()
    processes = start_two_processes(images, tmp_path / "two", autoencoder, *small_shards)
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
