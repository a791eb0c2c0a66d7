import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from img2npz import img2npz

ROOT = Path(__file__).resolve().parent.parent


def write_images(folder, n=7, size=(12, 8), seed=0):
    """n random images of size (width, height), as (n, H, W, 3); n > 10 makes name order differ from index order."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, size[1], size[0], 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return images


def no_output(folder):
    return sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_holds_the_images_in_index_order(tmp_path):
    images = write_images(tmp_path / "images", n=300)
    out, shape = img2npz(tmp_path / "images")
    assert out == tmp_path / "images.npz" and shape == images.shape
    with np.load(out) as npz:
        assert npz.files == ["arr_0"]
        assert npz["arr_0"].dtype == np.uint8 and np.array_equal(npz["arr_0"], images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.npz"]


def test_same_images_give_the_same_bytes(tmp_path):
    write_images(tmp_path / "images")
    first, _ = img2npz(tmp_path / "images", tmp_path / "a.npz")
    second, _ = img2npz(tmp_path / "images", tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()


def test_command_without_arguments(tmp_path):
    images = write_images(tmp_path / "saved_images")
    (tmp_path / "saved_images/class_lab.txt").write_text("0\n" * len(images))
    (tmp_path / "saved_images/sampling.json").write_text("{}")
    command = [sys.executable, ROOT / "img2npz.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "saved_images.npz") as npz:
        assert np.array_equal(npz["arr_0"], images)
    (tmp_path / "saved_images/3.png").unlink()
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and "1 missing (3.png)" in refused.stderr and "Traceback" not in refused.stderr


def test_a_file_of_other_images_is_written_again(tmp_path):
    """The one that is there is newer than the images and of their shape, but of another folder that was moved away."""
    first = write_images(tmp_path / "first")
    second = write_images(tmp_path / "second", seed=1)
    for name, images in (("first", first), ("second", second)):
        (tmp_path / name).rename(tmp_path / "images")
        out, shape = img2npz(tmp_path / "images")
        with np.load(out) as npz:
            assert shape == images.shape and np.array_equal(npz["arr_0"], images)
        shutil.rmtree(tmp_path / "images")


def test_where_images_are_refused_the_file_that_is_there_stays(tmp_path):
    images = write_images(tmp_path / "images")
    out, _ = img2npz(tmp_path / "images")
    (tmp_path / "images/4.png").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as PNG"):
        img2npz(tmp_path / "images")
    with np.load(out) as npz:
        assert np.array_equal(npz["arr_0"], images)


def damage(folder, case):
    if case == "missing":
        (folder / "2.png").unlink()
        (folder / "5.png").unlink()
    elif case == "extra":
        (folder / "notes.txt").write_text("")
    elif case == "padded name":
        (folder / "2.png").rename(folder / "02.png")
    elif case == "wrong size":
        Image.new("RGB", (8, 12)).save(folder / "4.png")
    elif case == "grey":
        Image.new("L", (12, 8)).save(folder / "4.png")
    elif case == "truncated":
        path = folder / "4.png"
        path.write_bytes(path.read_bytes()[:-60])
    elif case == "not an image":
        (folder / "0.png").write_text("hello")
    elif case == "empty":
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "case, message",
    [
        ("missing", r"2 missing \(2.png, 5.png\)"),
        ("extra", r"1 extra \(notes.txt\)"),
        ("padded name", r"1 missing \(2.png\) and 1 extra \(02.png\)"),
        ("wrong size", r"1 of 7 images refused \(4.png is 8x12, expected 12x8"),
        ("grey", r"4.png is of mode L, expected RGB"),
        ("truncated", r"4.png cannot be read as PNG"),
        ("not an image", r"0.png cannot be read as PNG"),
        ("empty", r"expected 0.png to 6.png by the labels in .*, found 7 missing"),
    ],
)
def test_refuses_by_name_and_writes_nothing(tmp_path, case, message):
    folder = tmp_path / "images"
    write_images(folder)
    damage(folder, case)
    (folder / "class_lab.txt").write_text("0\n" * 7)
    with pytest.raises(ValueError, match=message):
        img2npz(folder)
    assert no_output(folder)


def test_number_of_samples(tmp_path):
    folder = tmp_path / "images"
    write_images(folder)
    with pytest.raises(ValueError, match=r"by --n_samples, found 3 missing \(7.png, 8.png, 9.png\)"):
        img2npz(folder, n_samples=10)
    with pytest.raises(ValueError, match=r"by --n_samples, found 2 extra \(5.png, 6.png\)"):
        img2npz(folder, n_samples=5)
    with pytest.raises(ValueError, match="no folder"):
        img2npz(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"--out must be a file, and .* is a folder"):
        img2npz(folder, tmp_path)
    with pytest.raises(ValueError, match="outside"):
        img2npz(folder, folder / "out.npz")
    assert no_output(folder)
