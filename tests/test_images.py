import argparse
import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from libs import UserError, autoencoder
from libs.data import StepBatches, make_loader
from libs.images import ImageDataset, ImageTree, UnreadableImage, center_crop, image_size, read_image, to_rgb


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
    save_tree(tmp_path, {"a/1.png": 8})
    os.rename(tmp_path / "a" / "1.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    assert read_image(ImageTree(tmp_path).path(0), 8).shape == (3, 8, 8)


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
