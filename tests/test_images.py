import argparse
import errno
import io
import os
import pickle
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libs import UserError, autoencoder
from libs.data import StepBatches, make_loader
from libs.images import ImageDataset, ImageTree, UnreadableImage, center_crop, image_size, read_image, to_rgb
from libs.launch import Parser
from libs.logger import lock_workdir


def random_pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_tree(root, files):
    """{relative path: side of the image} -> PNG files of random pixels."""
    for seed, (name, side) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(side, side, seed=seed)).save(root / name)


@pytest.mark.parametrize(
    ("height", "width", "size", "rows", "columns"),
    [
        (32, 51, 32, slice(None), slice(9, 41)),
        (45, 32, 32, slice(6, 38), slice(None)),
        (40, 64, (32, 64), slice(4, 36), slice(None)),
        (40, 64, (40, 16), slice(None), slice(24, 40)),
    ],
)
def test_crop_without_resizing_is_the_center(height, width, size, rows, columns):
    pixels = random_pixels(height, width)
    assert np.array_equal(center_crop(Image.fromarray(pixels), size), pixels[rows, columns])


def test_crop_halves_by_box_while_the_short_side_is_twice_the_target():
    pixels = random_pixels(128, 128)
    halved = pixels.reshape(64, 2, 64, 2, 3).astype(float).mean((1, 3))
    quartered = halved.reshape(32, 2, 32, 2, 3).mean((1, 3))
    cropped = center_crop(Image.fromarray(pixels), 32).astype(float)
    assert np.abs(cropped - quartered).max() <= 2  # four roundings to 8 bits: Pillow rounds after each axis


def test_crop_resizes_the_rest_bicubically_also_upwards():
    image = Image.fromarray(random_pixels(48, 60))
    expected = np.asarray(image.resize((40, 32), Image.Resampling.BICUBIC))[:, 4:36]
    assert np.array_equal(center_crop(image, 32), expected)
    image = Image.fromarray(random_pixels(130, 100))  # one halving to 65 x 50, then bicubic to 42 (41.6) x 32
    expected = np.asarray(image.resize((50, 65), Image.Resampling.BOX).resize((32, 42), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(image, 32), expected[5:37])
    image = Image.fromarray(random_pixels(10, 15))
    expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40]
    assert np.array_equal(center_crop(image, 32), expected)
    assert center_crop(Image.new("RGB", (1, 1), (7, 8, 9)), 8).tolist() == [[[7, 8, 9]] * 8] * 8


def test_crop_of_any_proportions():
    """Halved while both sides allow it, enlarged where one is too short."""
    pixels = random_pixels(40, 64)
    means = pixels.reshape(20, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(pixels), (20, 30)) - means[:, 1:31]).max() <= 1
    assert center_crop(Image.fromarray(pixels), (32, 96)).shape == (32, 96, 3)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 30_000)])
def test_of_a_line_of_pixels_the_center_is_taken_in_little_memory(size):
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None] if size[1] > size[0] else ramp, size[::-1])
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = center_crop(image, 256)
    assert crop.shape == (256, 256, 3) and (np.abs(crop.astype(int) - 127) <= 1).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_pixels_become_floats_and_come_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = autoencoder.uint8_to_float(pixels)
    torch.testing.assert_close(floats, torch.linspace(-1, 1, 256))
    assert torch.equal(autoencoder.float_to_uint8(floats), pixels)
    assert autoencoder.float_to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_sizes_on_the_command_line(capsys):
    assert [image_size(text) for text in ("256", "32x64", "64x64")] == [256, (32, 64), 64]
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=image_size)
    for text in ("0", "32x", "-1", "32x0", "a"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--size={text}"])
    assert f"invalid image_size value: '{text}'" in capsys.readouterr().err


def test_gray_and_bilevel():
    gray = random_pixels(8, 8, 1)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(gray))), np.repeat(gray[:, :, None], 3, 2))
    bits = Image.fromarray(gray).convert("1")
    assert set(np.asarray(to_rgb(bits)).ravel().tolist()) == {0, 255}


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    pixels = read_image(tmp_path / "red.jpg", 8)
    assert (pixels[0] > 250).all() and (pixels[1:] < 5).all()


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 0, 0, 255)  # the right half is transparent black
    rgba[0] = (0, 0, 0, 127)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = read_image(tmp_path / "rgba.png", 8)
    assert (pixels[:, 1:, :4] == np.array([200, 0, 0])[:, None, None]).all() and (pixels[:, 1:, 4:] == 255).all()
    assert (np.abs(pixels[:, 0].astype(int) - 128) <= 1).all()

    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (0, 0, 8, 4))
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=0)
    assert read_image(tmp_path / "opaque.png", 8)[:, 7, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "clear.png", 8)[:, 7, 0].tolist() == [255, 255, 255]
    assert read_image(tmp_path / "clear.png", 8)[:, 0, 0].tolist() == [200, 100, 50]

    Image.fromarray(np.dstack([np.full((8, 8), 9, np.uint8), np.zeros((8, 8), np.uint8)])).save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png", 8) == 255).all()


def png(depth: int, color: int, row: bytes, transparent: tuple[int, ...]) -> bytes:
    """A PNG of two rows of 8 pixels with a transparent value; Pillow writes none of these depths."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, values = (
        struct.pack(">IIBBBBB", 8, 2, depth, color, 0, 0, 0),
        struct.pack(f">{len(transparent)}H", *transparent),
    )
    chunks = {b"IHDR": header, b"tRNS": values, b"IDAT": zlib.compress(2 * (b"\0" + row)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks.items())


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "right"),
    [
        (16, struct.pack(">8H", *[1000] * 4, *[25700] * 4), (1000,), [100] * 3),
        (8, bytes([10] * 4 + [100] * 4), (10,), [100] * 3),
        (4, bytes([0x33, 0x33, 0xAA, 0xAA]), (3,), [170] * 3),
        (2, bytes([0b01010101, 0b10101010]), (1,), [170] * 3),
        (1, bytes([0b11110000]), (1,), [0] * 3),
        (8, bytes([10, 20, 30] * 4 + [200, 100, 50] * 4), (10, 20, 30), [200, 100, 50]),
        (
            16,
            struct.pack(">24H", *[1000, 2000, 3000] * 4, *[51400, 25700, 12850] * 4),
            (1000, 2000, 3000),
            [200, 100, 50],
        ),
    ],
)
def test_a_transparent_value_of_any_depth_is_white(tmp_path, depth, row, transparent, right):
    (tmp_path / "left.png").write_bytes(png(depth, 2 if len(transparent) > 1 else 0, row, transparent))
    pixels = read_image(tmp_path / "left.png", (2, 8))
    assert (pixels[:, :, :4] == 255).all() and (pixels[:, :, 4:] == np.array(right)[:, None, None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_scale_to_eight(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535], [128, 129, 65406, 65407]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    with Image.open(tmp_path / f"deep.{suffix}") as image:
        assert image.mode.startswith("I")
        rgb = np.asarray(to_rgb(image))
    assert rgb[:, :, 0].tolist() == np.round(values / 257).astype(int).tolist()
    assert (rgb == rgb[:, :, :1]).all()


def test_values_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match=r"float\.tif.*range of its values .* is not known"):
        read_image(tmp_path / "float.tif", 8)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
def test_a_thousand_damaged_pictures_are_read_or_named(tmp_path):
    rng = np.random.default_rng(0)
    originals = []
    for file_format in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(random_pixels(24, 24)).save(buffer, file_format)
        originals.append(bytearray(buffer.getvalue()))
    file, outcomes = tmp_path / "damaged.img", {"read": 0, "named": 0}
    for k in range(1000):
        data = bytearray(originals[k % len(originals)])
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data))] = rng.integers(256)
        file.write_bytes(data[: rng.integers(1, len(data) + 1)] if k % 2 else data)
        try:
            assert read_image(file, 16).shape == (3, 16, 16)
            outcomes["read"] += 1
        except UnreadableImage as error:
            assert str(file) in str(error)
            outcomes["named"] += 1
    assert min(outcomes.values()) > 100


def test_tree_of_classes(tmp_path):
    save_tree(tmp_path, {"b/2.png": 8, "b/10.PNG": 8, "a/x.png": 8, "a/deeper/y.png": 8, "c/z.png": 8})
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / ".hidden.png").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    tree = ImageTree(tmp_path)
    assert tree.class_names == ["a", "b", "c"]
    assert [tree.name(i) for i in range(len(tree))] == ["a/deeper/y.png", "a/x.png", "b/10.PNG", "b/2.png", "c/z.png"]
    assert tree.labels.tolist() == [0, 0, 1, 1, 2]
    assert tree.path(3) == str(tmp_path / "b" / "2.png")
    copy = pickle.loads(pickle.dumps(tree))
    assert copy.name(4) == "c/z.png" and copy.digest == tree.digest
    save_tree(tmp_path, {"c/zz.png": 8})
    assert ImageTree(tmp_path).digest != tree.digest


def test_flat_folder_is_one_class(tmp_path):
    save_tree(tmp_path, {"b.png": 8, "a.png": 8})
    tree = ImageTree(tmp_path)
    assert tree.class_names == ["images"] and tree.labels.tolist() == [0, 0]
    assert [tree.name(0), tree.name(1)] == ["a.png", "b.png"]


def test_names_that_are_not_utf8(tmp_path):
    save_tree(tmp_path, {"a/1.png": 8, "b/2.png": 8})
    os.rename(tmp_path / "a" / "1.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/th\xe9")
    tree = ImageTree(tmp_path)
    assert read_image(tree.path(1), 8).shape == (3, 8, 8)
    assert tree.class_names == ["b", "th\\xe9"] and os.fsencode(tree.name(1)) == b"th\xe9/caf\xe9.png"
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        Parser("")
        print(tree.name(1))
    assert out.buffer.getvalue() == b"th\\udce9/caf\\udce9.png\n"
    with pytest.raises(UserError, match="is not UTF-8, as TensorBoard and safetensors need: set another --workdir"):
        lock_workdir(Path(os.fsdecode(os.fsencode(tmp_path) + b"/th\xe9")))


def names(tree):
    return [tree.name(i) for i in range(len(tree))]


def test_linked_folders_are_followed(tmp_path):
    """Links to a folder above, and two that lead in a circle, are not."""
    save_tree(tmp_path / "root", {"a/1.png": 8, "b/deeper/2.png": 8})
    save_tree(tmp_path / "elsewhere", {"3.png": 8, "deeper/4.png": 8})
    root = tmp_path / "root"
    for link, target in {"a/more": "elsewhere", "b/more": "elsewhere", "c": "elsewhere", "a/up": "root"}.items():
        (root / link).symlink_to(tmp_path / target)
    (root / "a" / "self").symlink_to(root / "a")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "b")
    found = names(ImageTree(root))
    assert found[:4] == ["a/1.png", "a/more/3.png", "a/more/back/deeper/2.png", "a/more/deeper/4.png"]
    assert found[4:7] == ["b/deeper/2.png", "b/more/3.png", "b/more/deeper/4.png"]
    assert found[7:] == ["c/3.png", "c/back/deeper/2.png", "c/deeper/4.png"]


@pytest.mark.parametrize("link", ["b", "a/more", "a/x.txt"])
def test_links_to_nothing_are_errors(tmp_path, link):
    """Of a class above all: the labels would shift. A picture's is named when it is read."""
    save_tree(tmp_path, {"a/1.png": 8, "c/2.png": 8})
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    assert names(ImageTree(tmp_path)) == ["a/1.png", "a/gone.png", "c/2.png"]
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path / link} links to nothing"):
        ImageTree(tmp_path)
    (tmp_path / link).unlink()
    (tmp_path / link).symlink_to(tmp_path / link)
    with pytest.raises(OSError, match=f"symbolic links: '{tmp_path / link}'"):
        ImageTree(tmp_path)


@pytest.mark.parametrize("folder", ["a", "a/deeper"])
def test_folders_that_cannot_be_read_are_errors(tmp_path, monkeypatch, folder):
    save_tree(tmp_path, {"a/deeper/1.png": 8, "b/2.png": 8})

    def scandir(path):
        if str(path) == str(tmp_path / folder):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=f"denied: '{tmp_path / folder}'"):
        ImageTree(tmp_path)


def test_every_ending_that_pillow_reads_is_a_picture(tmp_path):
    """But none that it only recognizes, or has Ghostscript read."""
    (tmp_path / "a").mkdir()
    image = Image.fromarray(random_pixels(16, 16))
    for ending in (".jpe", ".jfif", ".avif", ".jp2", ".tga", ".pbm", ".JPG"):
        image.save(tmp_path / "a" / f"x{ending}")
    for ending in (".eps", ".h5", ".mpg", ".txt"):
        (tmp_path / "a" / f"y{ending}").write_bytes(b"no picture")
    (tmp_path / "labels.csv").write_bytes(b"")
    tree = ImageTree(tmp_path)
    assert names(tree) == [f"a/x{e}" for e in sorted((".jpe", ".jfif", ".avif", ".jp2", ".tga", ".pbm", ".JPG"))]
    assert all(read_image(tree.path(i), 8).shape == (3, 8, 8) for i in range(7))
    assert tree.left_out == "5 files are no pictures by their ending (labels.csv, a/y.eps, a/y.h5, ...)"
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic" / "1.heic").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"are empty \(heic, \.\.\.\); 6 files are no pictures by their ending"):
        ImageTree(tmp_path)


def test_what_systems_put_beside_pictures_is_no_data(tmp_path):
    save_tree(tmp_path, {"a/1.png": 8, "b/2.png": 8})
    expected = ImageTree(tmp_path).digest
    others = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".snapshot", "System Volume Information", "#recycle")
    for name in (*others, "a/@eaDir", "b/__MACOSX"):
        save_tree(tmp_path, {f"{name}/3.png": 8})
    for name in ("a/Thumbs.db", "b/._2.png", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_bytes(b"")
    tree = ImageTree(tmp_path)
    assert tree.digest == expected and tree.class_names == ["a", "b"] and tree.left_out == ""


def test_trees_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        ImageTree(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no images"):
        ImageTree(tmp_path)
    save_tree(tmp_path, {"a/1.png": 8})
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"1 of the 2 class folders .* are empty \(b, \.\.\.\)"):
        ImageTree(tmp_path)
    save_tree(tmp_path, {"b/1.png": 8, "loose.png": 8})
    with pytest.raises(UserError, match=r"both class folders \(a, \.\.\.\) and images \(loose\.png"):
        ImageTree(tmp_path)


def test_dataset_of_pixels(tmp_path):
    save_tree(tmp_path, {"a/1.png": 8, "a/2.png": 8, "b/3.png": 8})
    dataset = pickle.loads(pickle.dumps(ImageDataset(tmp_path, 8)))
    assert len(dataset) == 3 and dataset.record_shape == (3, 8, 8) and dataset.n_classes == 2
    records, labels = dataset.read([2, 0])
    assert records.dtype == np.uint8 and labels.dtype == np.int64 and labels.tolist() == [1, 0]
    assert np.array_equal(records[0], random_pixels(8, 8, seed=2).transpose(2, 0, 1))
    with pytest.raises(IndexError):
        dataset.read([3])


def test_flips_are_the_odd_records(tmp_path):
    save_tree(tmp_path, {"a/1.png": 8, "b/2.png": 8})
    plain, doubled = ImageDataset(tmp_path, 8), ImageDataset(tmp_path, 8, flip=True)
    assert len(doubled) == 4
    records, labels = doubled.read(range(4))
    assert labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(records[::2], plain.read([0, 1])[0])
    assert np.array_equal(records[1::2], plain.read([0, 1])[0][:, :, :, ::-1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_in_training_too(tmp_path, num_workers):
    for i in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    loader = make_loader(ImageDataset(tmp_path, 8), StepBatches(4, 2, seed=0, start_step=0), num_workers, False)
    with pytest.raises(UnreadableImage) as caught:
        for _ in range(2):
            next(loader)
    assert "2.png" in str(caught.value) and "Traceback" not in str(caught.value)
