from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from libs import UserError
from libs.autoencoder import load_autoencoder
from libs.images import center_crop
from libs.latents import LatentStore
from scripts import extract_imagenet_feature

CLASSES = {"ants": 11, "bees": 9, "cats": 10}


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


def run(images, out, autoencoder, *more):
    flags = {"images": images, "out": out, "autoencoder": autoencoder, "resolution": 16, "batch_size": 4, "workers": 0}
    words = [f"--{name}={value}" for name, value in flags.items()]
    extract_imagenet_feature.main([*words, "--shard_size=7", *more])


def test_store_holds_the_moments_of_crops_and_their_mirror_images(images, tmp_path, tiny_autoencoder):
    run(images, tmp_path / "out", tiny_autoencoder, "--dtype", "float32")
    store = LatentStore(tmp_path / "out")
    store.verify()
    assert len(store) == 60 and store.record_shape == (8, 8, 8) and store.class_names == list(CLASSES)
    assert store.meta["images_per_class"] == list(CLASSES.values())
    loaded = load_autoencoder(tiny_autoencoder)
    assert store.autoencoder == loaded.identity
    for i, file in enumerate(sorted(images.glob("*/*.png"))):
        crop = torch.from_numpy(center_crop(Image.open(file), 16).copy()).permute(2, 0, 1)[None]
        views = torch.cat([crop, crop.flip(-1)]).float() / 255 * 2 - 1
        records, labels = store.read([2 * i, 2 * i + 1])
        torch.testing.assert_close(torch.from_numpy(records), loaded.encode_moments(views), atol=1e-4, rtol=1e-4)
        assert labels.tolist() == [list(CLASSES).index(file.parent.name)] * 2


def test_half_precision_without_flips_is_the_rounded_store(images, tmp_path, tiny_autoencoder):
    """Whether the images are read by this process or by workers."""
    run(images, tmp_path / "full", tiny_autoencoder, "--dtype", "float32", "--no-flip")
    run(images, tmp_path / "half", tiny_autoencoder, "--no-flip", "--workers", "2")
    full = LatentStore(tmp_path / "full").read(range(30))[0]
    half = LatentStore(tmp_path / "half").read(range(30))[0]
    assert half.dtype == np.float16 and np.array_equal(half, full.astype(np.float16))


def test_running_again_does_nothing_and_other_settings_are_refused(images, tmp_path, tiny_autoencoder, capsys):
    run(images, tmp_path / "out", tiny_autoencoder)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run(images, tmp_path / "out", tiny_autoencoder)
    assert "is complete with these settings (60 records): nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="dtype: there 'float16', now 'float32'"):
        run(images, tmp_path / "out", tiny_autoencoder, "--dtype", "float32")
    image = images / "ants" / "00.png"
    content = image.read_bytes()
    image.write_bytes(content + b"0")
    with pytest.raises(SystemExit, match=r"1 shards \(latents-00000\.npy\) were made from another source"):
        run(images, tmp_path / "out", tiny_autoencoder)
    image.write_bytes(content)
    Image.new("RGB", (8, 8)).save(images / "ants" / "another.png")
    with pytest.raises(SystemExit, match=r"source: there .*'n_images': 30.*, now .*'n_images': 31"):
        run(images, tmp_path / "out", tiny_autoencoder)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()} == before


def test_unreadable_images_are_listed_and_skipped_only_on_request(images, tmp_path, tiny_autoencoder, capsys):
    jpeg = images / "bees" / "03.png"
    jpeg.write_bytes(jpeg.read_bytes()[:200])
    (images / "cats" / "09.png").unlink()
    (images / "cats" / "09.png").symlink_to("nowhere.png")
    with pytest.raises(
        SystemExit, match=r"2 images \(listed above\) cannot be read: replace them, or give --skip_unreadable"
    ):
        run(images, tmp_path / "out", tiny_autoencoder)
    printed = capsys.readouterr().out
    assert "2 images cannot be read:" in printed and "bees/03.png" in printed and "cats/09.png" in printed
    with pytest.raises(UserError, match="Unfinished"):
        LatentStore(tmp_path / "out")

    run(images, tmp_path / "out", tiny_autoencoder, "--skip_unreadable")
    store = LatentStore(tmp_path / "out")
    store.verify()
    assert store.meta["skipped"] == ["bees/03.png", "cats/09.png"]
    assert len(store) == 56 and store.meta["images_per_class"] == [11, 8, 9]
    assert np.bincount(store.read(range(56))[1]).tolist() == [22, 16, 18]

    for file in images.glob("bees/*.png"):
        file.write_bytes(b"")
    run(images, tmp_path / "two", tiny_autoencoder, "--skip_unreadable")
    assert "warning: no image is left of 1 classes, which cannot be learned: bees" in capsys.readouterr().out

    for file in images.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match="no image is left to store"):
        run(images, tmp_path / "none", tiny_autoencoder, "--skip_unreadable")


def test_bad_input_ends_with_one_line(images, tmp_path, tiny_autoencoder):
    with pytest.raises(SystemExit, match=r"No such file or directory: .*absent"):
        run(tmp_path / "absent", tmp_path / "out", tiny_autoencoder)
    with pytest.raises(SystemExit, match=r"No autoencoder at .*absent\.pth"):
        run(images, tmp_path / "out", tmp_path / "absent.pth")
    with pytest.raises(SystemExit, match="--resolution 15x15 is not a multiple of 2"):
        run(images, tmp_path / "out", tiny_autoencoder, "--resolution", "15")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match=r"Cannot write .*/out: "):
        run(images, tmp_path / "out", tiny_autoencoder)


def test_a_disk_too_small_is_noticed_before_encoding(images, tmp_path, tiny_autoencoder, monkeypatch):
    one_byte_short = SimpleNamespace(free=60 * 8 * 8 * 8 * 2 - 1)
    monkeypatch.setattr(extract_imagenet_feature.shutil, "disk_usage", lambda path: one_byte_short)
    with pytest.raises(SystemExit, match="MB free: free space, set another --out"):
        run(images, tmp_path / "out", tiny_autoencoder)
