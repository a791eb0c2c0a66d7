"""A sampled set on disk: written by threads, put together from parts, and one clear error for each wrong one."""

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from img2npz import img2npz
from libs import sample_set
from libs.checkpoint import differences, flatten_dict
from libs.sample_set import SampleSet, SetWriter, batches_of, intersect, missing_files

N, CLASSES, BATCH = 12, 3, 5
LABELS = [0] * 4 + [1] * 4 + [2] * 4


def write_part(folder, indices=range(N), size=(6, 4), **changes):
    """A folder as eval.py leaves it: image i is all i, (W, H) = size."""
    folder.mkdir(parents=True)
    settings = {"n_samples": N, "dataset.n_classes": CLASSES, "mini_batch_size": BATCH, "scale": 2.0}
    settings |= {"indices": [indices.start, indices.stop], **changes}
    (folder / "sampling.json").write_text(json.dumps(settings))
    (folder / "class_lab.txt").write_text("".join(f"{LABELS[i]}\n" for i in indices))
    with SetWriter(folder) as writer:
        for batch in batches_of(indices, N, BATCH):
            own = intersect(batch, indices)
            writer.put(batch, lambda batch=batch: all_images(size)[batch], missing_files(folder, own))
    return folder


def all_images(size=(6, 4)):
    return np.stack([np.full((size[1], size[0], 3), i, np.uint8) for i in range(N)])


def refuses(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        img2npz(folders, tmp_path / "out.npz")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_batches_are_those_of_the_whole_set():
    whole = batches_of(range(N), N, BATCH)
    assert whole == [range(0, 5), range(5, 10), range(10, 12)]
    for first in range(N):
        for end in range(first + 1, N + 1):
            expected = [batch for batch in whole if set(batch) & set(range(first, end))]
            assert batches_of(range(first, end), N, BATCH) == expected


def test_settings_are_compared_by_name():
    nested = {"a": {"b": [{"c": 1}, 2], "d": {}}, "e": None}
    assert flatten_dict(nested) == {"a.b[0].c": 1, "a.b[1]": 2, "a.d": {}, "e": None}
    found, expected = {"scale": 1.4, "seed": 0}, {"scale": 2.0, "seed": 0, "new": [1]}
    assert differences(found, expected) == {"new": "new: None there, [1] now", "scale": "scale: 1.4 there, 2.0 now"}


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_writing_goes_on_beside_and_waits_when_too_much_is_in_hand(tmp_path, monkeypatch):
    go_on, write_png = threading.Event(), sample_set.write_png

    def slow(image, path):
        assert go_on.wait(30)
        write_png(image, path)

    monkeypatch.setattr(sample_set, "write_png", slow)
    image = np.zeros((1, 4, 4, 3), np.uint8)
    with SetWriter(tmp_path, depth=3) as writer:
        for i in range(3):
            writer.put(range(i, i + 1), lambda: image, [i])
        assert not list(tmp_path.iterdir())  # three batches in hand, none on the disk, and we were not held up
        fourth = threading.Thread(target=writer.put, args=(range(3, 4), lambda: image, [3]))
        fourth.start()
        time.sleep(0.1)
        assert fourth.is_alive() and len(writer.pending) == 2  # waiting for the oldest
        go_on.set()
        fourth.join(30)
    assert {path.name for path in tmp_path.iterdir()} == {f"{i}.png" for i in range(4)}


def test_a_full_disk_does_not_pass_unseen(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"Cannot write .*\.png: No space left on device\. Free space"):
        write_part(tmp_path / "set")


# --- Reading and merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[0, 12], [0, 3, 7, 12]])  # within batches
def test_parts_make_the_whole_in_index_order(tmp_path, ends):
    folders = [write_part(tmp_path / f"z{9 - k}", range(*ends[k : k + 2])) for k in range(len(ends) - 1)]
    (folders[0] / ".0.png.99.tmp").write_bytes(b"half")  # is no image
    out, shape = img2npz(folders[::-1], tmp_path / "out.npz")
    with np.load(out) as npz:
        assert npz.files == ["arr_0"] and shape == (12, 4, 6, 3)
        assert np.array_equal(npz["arr_0"], all_images())
    if len(folders) > 1:
        assert [int(line) for line in (tmp_path / "out_class_lab.txt").read_text().split()] == LABELS


def test_images_of_any_part(tmp_path, monkeypatch):
    """Files are decoded a few at a time, not all before the first is used."""
    images = SampleSet(write_part(tmp_path / "a", range(7)), write_part(tmp_path / "b", range(7, 12)))
    assert (images.count, images.size, images.labels) == (12, (4, 6), LABELS)
    for indices in (None, range(12), range(3, 11), range(6, 8), [0, 4, 9]):
        assert np.array_equal(list(images.images(indices)), all_images()[indices or range(12)])
    monkeypatch.setattr(sample_set, "READ_AHEAD", 4)
    read, original = [], images._read
    monkeypatch.setattr(images, "_read", lambda path: read.append(path) or original(path))
    reading = images.images()
    next(reading)
    time.sleep(0.1)
    assert 1 <= len(read) <= 4


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"0\n0\n0\n0\n1\n1\n", "class_lab.txt does not hold the labels of images 0 to 6"),
        (b"0\n0\n0\n1\n0\n1\n1\n", "class_lab.txt does not hold the labels of images 0 to 6"),
        (b"cat\n" * 7, r"sampling.json or class_lab.txt is damaged \(invalid literal"),
        (b"\xff\n" * 7, r"sampling.json or class_lab.txt is damaged \('utf-8' codec"),
    ],
)
def test_refuses_labels_that_are_not_the_images(tmp_path, text, message):
    folder = write_part(tmp_path / "set", range(0, 7))
    (folder / "class_lab.txt").write_bytes(text)
    refuses([folder, write_part(tmp_path / "b", range(7, 12))], message, tmp_path)


def test_refuses_overlaps_and_gaps(tmp_path):
    ranges = {"a": range(7), "b": range(5, 12), "c": range(9, 12)}
    a, b, c = (write_part(tmp_path / name, indices) for name, indices in ranges.items())
    refuses([a, b], r"a, .*b: images 5 to 6 are in two folders", tmp_path)
    refuses([a, a], r"images 0 to 6 are in two folders", tmp_path)
    refuses([a, c], r"images 7 to 8 are missing: make them with eval.py --indices=7:9", tmp_path)
    refuses([b], r"images 0 to 4 are missing: make them with eval.py --indices=0:5", tmp_path)
    refuses([a], r"images 7 to 11 are missing: make them with eval.py --indices=7:12", tmp_path)
    with pytest.raises(ValueError, match="--out, which must be given"):
        img2npz([a, b])


def test_refuses_a_part_with_other_settings(tmp_path):
    a = write_part(tmp_path / "a", range(5))
    b = write_part(tmp_path / "b", range(5, 12), scale=3.0, interval=[0.1, 2.0])
    refuses([a, b], r"of two sets \(interval, scale differ\)", tmp_path)
    for text, message in (
        ("{not json", "sampling.json is damaged"),
        ("[1]", "sampling.json is damaged"),
        ("{}", r"expected 0.png to 6.png by class_lab.txt"),
        ('{"indices": [5], "n_samples": "x"}', "sampling.json or class_lab.txt is damaged"),
        ('{"indices": [5, 12], "n_samples": "x", "dataset.n_classes": 3}', "is damaged"),
    ):
        (b / "sampling.json").write_text(text)
        refuses([a, b], message, tmp_path)


@pytest.mark.parametrize("text", ["3", "5:5", "-1:4", "0:13", "a:b", "7:3"])
def test_refuses_what_is_no_range(text):
    with pytest.raises(ValueError, match=r"--indices must be FIRST:END with 0 <= FIRST < END <= 12; found '"):
        evaluation.chosen_indices(text, 12)
    assert evaluation.chosen_indices("4:12", 12) == range(4, 12) and evaluation.chosen_indices(None, 12) == range(12)
