"""A sampled set on disk: shards and PNGs, parts put together, and one clear error for each way they can be wrong."""

import json
import threading
import time

import numpy as np
import pytest
from conftest import run
from PIL import Image

import eval as evaluation
from img2npz import img2npz
from libs import sample_set
from libs.sample_set import SampleSet, SetWriter, balanced_label, batches_of, common, indices_of_classes, missing_files

N, CLASSES, BATCH = 12, 3, 5
LABELS = [0] * 4 + [1] * 4 + [2] * 4


def write_part(folder, indices=range(N), output="npz", size=(6, 4), **changes):
    """A folder as eval.py leaves it: image i is all i, (W, H) = size."""
    folder.mkdir(parents=True)
    settings = {"n_samples": N, "dataset.n_classes": CLASSES, "mini_batch_size": BATCH, "output": output, "scale": 2.0}
    settings |= {"indices": [indices.start, indices.stop], **changes}
    (folder / "sampling.json").write_text(json.dumps(settings))
    (folder / "class_lab.txt").write_text("".join(f"{LABELS[i]}\n" for i in indices))
    with SetWriter(folder) as writer:
        for batch in batches_of(indices, N, BATCH):
            own = common(batch, indices)
            images = np.stack([np.full((size[1], size[0], 3), i, np.uint8) for i in own])
            files = missing_files(folder, own, output)
            writer.put(own, lambda images=images: images, [LABELS[i] for i in own], files)
    return folder


def all_images(size=(6, 4)):
    return np.stack([np.full((size[1], size[0], 3), i, np.uint8) for i in range(N)])


def refuses(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        img2npz(folders, tmp_path / "out.npz")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


# --- Indices ----------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_whole_set():
    whole = batches_of(range(N), N, BATCH)
    assert whole == [range(0, 5), range(5, 10), range(10, 12)]
    for first in range(N):
        for end in range(first + 1, N + 1):
            expected = [batch for batch in whole if set(batch) & set(range(first, end))]
            assert batches_of(range(first, end), N, BATCH) == expected


@pytest.mark.parametrize(("n_samples", "n_classes"), [(12, 3), (50, 7), (3, 5), (60, 60)])
def test_indices_of_classes(n_samples, n_classes):
    labels = [balanced_label(i, n_samples, n_classes) for i in range(n_samples)]
    for first in range(n_classes):
        for end in range(first + 1, n_classes + 1):
            expected = [i for i, label in enumerate(labels) if first <= label < end]
            assert list(indices_of_classes(range(first, end), n_samples, n_classes)) == expected


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
            writer.put(range(i, i + 1), lambda: image, [0], [tmp_path / f"{i}.png"])
        assert not list(tmp_path.iterdir())  # three batches in hand, none on the disk, and we were not held up
        fourth = threading.Thread(target=writer.put, args=(range(3, 4), lambda: image, [0], [tmp_path / "3.png"]))
        fourth.start()
        time.sleep(0.1)
        assert fourth.is_alive() and len(writer.pending) == 2  # waiting for the oldest
        go_on.set()
        fourth.join(30)
    assert {path.name for path in tmp_path.iterdir()} == {f"{i}.png" for i in range(4)}


def test_a_full_disk_does_not_pass_unseen(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_set, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        write_part(tmp_path / "set")


def test_a_shard_cut_short_is_missing(tmp_path):
    folder = write_part(tmp_path / "set", output="both")
    assert missing_files(folder, range(5), "both") == []
    shard = folder / "0000000-0000004.npz"
    shard.write_bytes(shard.read_bytes()[:-30])
    (folder / "3.png").unlink()
    assert missing_files(folder, range(5), "both") == [folder / "3.png", shard]
    assert missing_files(folder, range(5), "png") == [folder / "3.png"]


# --- Reading and merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [("npz",), ("png",), ("both",), ("npz", "png", "both")])
def test_parts_make_the_whole_in_index_order(tmp_path, outputs):
    ends = [0, 12] if len(outputs) == 1 else [0, 3, 7, 12]  # within batches
    folders = [
        write_part(tmp_path / f"z{9 - k}", range(ends[k], ends[k + 1]), output) for k, output in enumerate(outputs)
    ]
    out, shape = img2npz(folders[::-1], tmp_path / "out.npz")
    with np.load(out) as npz:
        assert npz.files == ["arr_0"] and shape == (12, 4, 6, 3)
        assert np.array_equal(npz["arr_0"], all_images())
    if len(folders) > 1:
        assert [int(line) for line in (tmp_path / "out_class_lab.txt").read_text().split()] == LABELS


def test_batches_of_any_size_and_part(tmp_path):
    images = SampleSet(write_part(tmp_path / "a", range(7)), write_part(tmp_path / "b", range(7, 12), "png"))
    assert (images.count, images.size, images.labels) == (12, (4, 6), LABELS)
    for start, stop, size in ((0, None, 5), (0, 12, 12), (3, 11, 4), (6, 8, 100), (11, 12, 1), (4, 5, 3)):
        batches = list(images.batches(size, start, stop))
        assert np.array_equal(np.concatenate(batches), all_images()[start:stop])
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1) and len(batches[-1]) <= size


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Files are decoded a few at a time, not all before the first is used."""
    write_part(tmp_path / "set", output="png")
    monkeypatch.setattr(sample_set, "READ_AHEAD", 4)
    images, read = SampleSet(tmp_path / "set"), []
    original = sample_set.read_image
    monkeypatch.setattr(sample_set, "read_image", lambda path: read.append(path) or original(path))
    next(images.files())
    assert len(read) == 4


def test_merging_at_the_command_line(tmp_path):
    write_part(tmp_path / "a", range(5)), write_part(tmp_path / "b", range(5, 12))
    done = run("img2npz.py", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out.npz")
    assert done.returncode == 0 and "arr_0 of shape (12, 4, 6, 3)" in done.stdout, done.stderr
    done = run("img2npz.py", tmp_path / "a", "--out", tmp_path / "out.npz")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "images 5 to 11 are missing: make them with eval.py --indices=5:12" in done.stderr


def test_half_written_files_are_not_images(tmp_path):
    folder = write_part(tmp_path / "set")
    (folder / ".0000000-0000004.npz.1a2b3c4d.tmp").write_bytes(b"half")
    assert SampleSet(folder).count == 12
    sample_set.remove_temporaries(folder)
    assert sorted(path.name for path in folder.iterdir())[0] == "0000000-0000004.npz"


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_refuses_a_truncated_shard(tmp_path):
    folder = write_part(tmp_path / "set")
    shard = folder / "0000005-0000009.npz"
    shard.write_bytes(shard.read_bytes()[:-30])
    refuses(folder, r"1 of 3 shards refused \(0000005-0000009.npz is damaged or cut short", tmp_path)
    shard.unlink()
    refuses(folder, r"found 1 missing \(0000005-0000009.npz\)", tmp_path)


def test_refuses_a_damaged_shard(tmp_path):
    """A bit turned in the middle: the archive's checksum knows."""
    folder = write_part(tmp_path / "set")
    shard = folder / "0000005-0000009.npz"
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    refuses(folder, r"0000005-0000009.npz is damaged or cut short \(Bad CRC-32", tmp_path)


def test_refuses_labels_that_are_not_the_images(tmp_path):
    folder = write_part(tmp_path / "set", range(0, 7))
    sample_set.write_shard(np.zeros((2, 4, 6, 3), np.uint8), [1, 0], folder / "0000005-0000006.npz")
    other = write_part(tmp_path / "b", range(7, 12))
    message = r"0000005-0000006.npz says labels 1, 0, class_lab.txt says 1, 1"
    refuses([folder, other], message, tmp_path)
    (folder / "class_lab.txt").write_text("0\n0\n0\n0\n1\n1\n")
    refuses([folder, other], r"class_lab.txt: expected 7 labels, one per image, found 6", tmp_path)
    (folder / "class_lab.txt").write_text("0\n0\n0\n1\n0\n1\n1\n")
    refuses([folder, other], r"class_lab.txt: expected label 0 for image 3 by sampling.json, found 1", tmp_path)
    for text in (b"cat\n" * 7, b"\xff\n" * 7):
        (folder / "class_lab.txt").write_bytes(text)
        refuses([folder, other], r"class_lab.txt: expected one label per line, a whole number", tmp_path)


def test_refuses_overlaps_and_gaps(tmp_path):
    a, b, c = (
        write_part(tmp_path / name, r) for name, r in zip("abc", (range(7), range(5, 12), range(9, 12)), strict=True)
    )
    refuses([a, b], r"a holds images 0 to 6 and .*b images 5 to 11: each image must be in one folder only", tmp_path)
    refuses([a, a], r"a holds images 0 to 6 and .*a images 0 to 6", tmp_path)
    refuses([a, c], r"images 7 to 8 are missing: make them with eval.py --indices=7:9", tmp_path)
    refuses([b], r"images 0 to 4 are missing: make them with eval.py --indices=0:5", tmp_path)


def test_refuses_a_part_with_other_settings(tmp_path):
    a = write_part(tmp_path / "a", range(5))
    b = write_part(tmp_path / "b", range(5, 12), scale=3.0, interval=[0.1, 2.0])
    refuses([a, b], r"b is no part of one set with .*a \(scale: 3.0 there, 2.0 now; interval: \[0.1, 2.0\]", tmp_path)
    for text, message in (
        ("{not json", "sampling.json is damaged"),
        ("[1]", r"sampling.json is damaged \(expected an object of settings, found a list"),
        ("[]", "sampling.json is damaged"),
        ('{"output": "npz", "mini_batch_size": 5}', "sampling.json: expected whole numbers .* found n_samples None:"),
        ('{"indices": [5], "n_samples": "x"}', r"found n_samples x, indices \[5\]"),
    ):
        (b / "sampling.json").write_text(text)
        refuses([a, b], message, tmp_path)
    with pytest.raises(ValueError, match="--out, which must be given"):
        img2npz([a, b])


def test_refuses_images_of_two_sizes(tmp_path):
    a, b = write_part(tmp_path / "a", range(5)), write_part(tmp_path / "b", range(5, 12), size=(4, 4))
    refuses([a, b], r"2 of 3 shards refused \(0000005-0000009.npz is 4x4, expected 6x4 like 0000000", tmp_path)
    c = write_part(tmp_path / "c", output="png")
    Image.new("RGB", (4, 4)).save(c / "7.png")
    refuses(c, r"7.png is 4x4, expected 6x4 like 0.png", tmp_path)


def test_refuses_a_shard_of_other_arrays(tmp_path):
    folder = write_part(tmp_path / "set")
    np.savez(folder / "0000005-0000009.npz", arr_0=np.zeros((5, 4, 6, 3), np.float32), labels=LABELS[5:10])
    refuses(folder, r"holds float32 \(5, 4, 6, 3\), expected uint8 \(5, H, W, 3\)", tmp_path)
    np.savez(folder / "0000005-0000009.npz", arr_0=np.zeros((4, 4, 6, 3), np.uint8), labels=LABELS[5:9])
    refuses(folder, r"holds uint8 \(4, 4, 6, 3\), expected uint8 \(5, H, W, 3\)", tmp_path)


# --- Ranges at the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3", "5:5", "-1:4", "0:13", "a:b", "7:3"])
def test_refuses_what_is_no_range(tiny_config, text):
    with pytest.raises(ValueError, match=r"--indices must be FIRST:END with 0 <= FIRST < END <= 12 .* found '"):
        evaluation.chosen_indices(tiny_config, text, None)
    with pytest.raises(ValueError, match=r"give one of them"):
        evaluation.chosen_indices(tiny_config, "0:3", "0:1")


def test_classes_choose_their_images(tiny_config):
    assert evaluation.chosen_indices(tiny_config, None, "1:3") == range(4, 12)
    assert evaluation.chosen_indices(tiny_config, None, None) == range(12)
    tiny_config.dataset.n_classes = 100
    with pytest.raises(ValueError, match="--classes=1:3 has no images among 12"):
        evaluation.chosen_indices(tiny_config, None, "1:3")
