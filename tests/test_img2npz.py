import io
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from img2npz import img2npz


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
    """Also over a file of other images that is there; where images are refused, it stays."""
    write_images(tmp_path / "images", n=300, seed=1)
    out, _ = img2npz([tmp_path / "images"])
    images = write_images(tmp_path / "images", n=300)
    assert img2npz([tmp_path / "images"]) == (tmp_path / "images.npz", images.shape) == (out, images.shape)
    (tmp_path / "images/4.png").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as PNG"):
        img2npz([tmp_path / "images"])
    with np.load(out) as npz:
        assert npz.files == ["arr_0"]
        assert npz["arr_0"].dtype == np.uint8 and np.array_equal(npz["arr_0"], images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.npz"]


def test_command_without_arguments(tmp_path):
    def run():
        return subprocess.run([sys.executable, ROOT / "img2npz.py"], cwd=tmp_path, capture_output=True, text=True)

    images = write_images(tmp_path / "saved_images")
    (tmp_path / "saved_images/class_lab.txt").write_text("0\n" * len(images))
    (tmp_path / "saved_images/sampling.json").write_text("{}")
    done = run()
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "saved_images.npz") as npz:
        assert np.array_equal(npz["arr_0"], images)
    (tmp_path / "saved_images/3.png").unlink()
    refused = run()
    assert refused.returncode == 1 and "1 missing (3.png)" in refused.stderr and "Traceback" not in refused.stderr


def png(mode, width, height):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"2.png": None, "5.png": None}, r"2 missing \(2.png, 5.png\)"),
        ({"notes.txt": b""}, r"1 extra \(notes.txt\)"),
        ({"2.png": None, "02.png": png("RGB", 12, 8)}, r"1 missing \(2.png\) and 1 extra \(02.png\)"),
        ({"4.png": png("RGB", 8, 12)}, r"1 of 7 images refused \(.*4.png is 8x12, expected 12x8"),
        ({"4.png": png("L", 12, 8)}, r"4.png is of mode L, expected RGB"),
        (
            {"4.png": png("RGB", 12, 8)[:45], "5.png": b"hello"},
            r"2 of 7 images refused \(.*4.png cannot be read as PNG .*, .*5.png cannot be read",
        ),
        ({f"{i}.png": None for i in range(7)}, r"expected 0.png to 6.png by class_lab.txt, found 7 missing"),
    ],
    ids=["missing", "extra", "padded name", "wrong size", "gray", "truncated", "empty"],
)
def test_refuses_by_name_and_writes_nothing(tmp_path, changes, message):
    folder = tmp_path / "images"
    write_images(folder)
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    (folder / "class_lab.txt").write_text("0\n" * 7)
    with pytest.raises(ValueError, match=message):
        img2npz([folder])
    assert no_output(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 10}, r"by --n_samples, found 3 missing \(7.png, 8.png, 9.png\)"),
        ({"n_samples": 5}, r"by --n_samples, found 2 extra \(5.png, 6.png\)"),
        ({"folders": ["elsewhere"]}, "No such file or directory: 'elsewhere'"),
        ({"out": "."}, r"--out must be a file; found the folder "),
        ({"out": "images/out.npz"}, "among the images: give another --out"),
    ],
)
def test_refuses_arguments_that_do_not_fit(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    with pytest.raises((ValueError, OSError), match=message):
        img2npz(**{"folders": ["images"], **arguments})
    assert no_output(tmp_path / "images")


@pytest.mark.parametrize("digits", [6, 2])
def test_other_programs_names_are_taken(tmp_path, digits):
    """000000.png on, with what systems put beside; not with a gap, from 1 on, or of several lengths."""
    folder = tmp_path / "images"
    images = write_images(folder)
    for i in range(7):
        (folder / f"{i}.png").rename(folder / f"{i:0{digits}}.png")
    for name in (".DS_Store", "Thumbs.db", "._0.png", "desktop.ini"):
        (folder / name).write_bytes(b"")
    (folder / "@eaDir").mkdir()
    out, _ = img2npz([folder])
    assert np.array_equal(np.load(out)["arr_0"], images)
    advice = "name images of other programs 0.png, 1.png, ... or all with as many digits, from 000000.png on"
    (folder / f"{3:0{digits}}.png").rename(folder / f"{7:0{digits}}.png")
    with pytest.raises(ValueError, match=rf"1 missing \(0*3.png\) and 1 extra \(0*7.png\).*{advice}"):
        img2npz([folder])
    (folder / f"{0:0{digits}}.png").rename(folder / f"{3:0{digits}}.png")
    with pytest.raises(ValueError, match=advice):
        img2npz([folder])
    for extra in ("000001.jpg", "000/000000.png"):
        other = tmp_path / extra / "x"
        (other / extra).parent.mkdir(parents=True)
        (other / extra).write_bytes(b"")
        with pytest.raises(ValueError, match=advice):
            img2npz([other])
