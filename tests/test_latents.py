import errno
import json
import os
import timeit
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

import libs.latents
from libs import UserError
from libs.files import WriteError, file_digest, json_digest, read_npy_header, replacing, replacing_folder
from libs.latents import LatentStore, StoreWriter

SHAPE = (8, 4, 4)
CHANNELS = {"mean": [0.5, -1.0, 2.0, 0.0], "std": [1.0, 2.0, 0.5, 1.0]}
IDENTITY = {"encoder": CHANNELS, "decoder": CHANNELS, "shift": [0.0], "scale": [0.18215]}


def settings(n_images=25, **changes):
    base = {
        "record_shape": SHAPE,
        "dtype": "float16",
        "resolution": 32,
        "flips": True,
        "crop": "adm-centre",
        "autoencoder": IDENTITY,
        "class_names": ["ant", "bee", "cat"],
        "images_per_shard": 10,
        "source": {"kind": "test", "n_images": n_images},
    }
    return {**base, **changes}


def moments(n_records, seed=0):
    return np.random.default_rng(seed).standard_normal((n_records, *SHAPE)).astype(np.float16)


def write_store(path, skipped=(), **changes):
    """A store of 25 images, written out of order. Returns (records, labels) that it should hold."""
    writer = StoreWriter(path, settings(**changes))
    writer.begin()
    views = 2 if writer.settings["flips"] else 1
    records, labels = moments(25 * views), np.arange(25) % 3
    kept = [i for i in range(25) if i not in skipped]
    rows = [i * views + view for i in kept for view in range(views)]
    for shard in reversed(range(writer.n_shards)):
        first, last = writer.image_range(shard)
        inside = [row for row in rows if first * views <= row < last * views]
        writer.write_shard(shard, records[inside], [i for i in skipped if first <= i < last])
    writer.finish(labels, names=lambda i: f"image {i}")
    return records[rows], np.repeat(labels[kept], views)


def rewrite_index(path, change):
    """Apply `change` to index.json and give it a fitting checksum again."""
    index = json.loads((path / "index.json").read_text())
    change(index)
    index["sha256"] = json_digest({key: value for key, value in index.items() if key != "sha256"})
    (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("changes", [{}, {"flips": False}, {"dtype": "float32"}, {"images_per_shard": 25}])
def test_reads_back_what_was_written_in_any_order(tmp_path, changes):
    records, labels = write_store(tmp_path / "store", **changes)
    store = LatentStore(tmp_path / "store")
    assert len(store) == len(records) and store.record_shape == SHAPE and store.n_classes == 3
    assert store.class_names == ["ant", "bee", "cat"] and store.autoencoder == IDENTITY
    order = np.random.default_rng(1).permutation(len(records))
    read, read_labels = store.read(order)
    assert read.dtype == store.meta["dtype"] and read_labels.dtype == np.int64
    assert np.array_equal(read, records[order]) and np.array_equal(read_labels, labels[order])
    assert store.read([])[0].shape == (0, *SHAPE)
    assert np.array_equal(store.read([7, 7])[0], records[[7, 7]])
    store.verify()


def test_index_describes_the_store_and_numpy_alone_opens_it(tmp_path):
    records, labels = write_store(tmp_path / "store")
    meta = LatentStore(tmp_path / "store").meta
    assert (meta["version"], meta["n_images"], meta["n_records"]) == (2, 25, 50)
    assert meta["images_per_class"] == np.bincount(labels[::2]).tolist()
    assert (meta["resolution"], meta["flips"], meta["crop"], meta["dtype"]) == (32, True, "adm-centre", "float16")
    assert all(entry["sha256"] == file_digest(tmp_path / "store" / entry["file"]) for entry in meta["shards"])
    shards = [f"latents-0000{k}.npy" for k in range(3)]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["index.json", "labels.npy", *shards]
    arrays = [np.load(tmp_path / "store" / name, mmap_mode="r") for name in shards]
    assert np.array_equal(np.concatenate(arrays), records)
    assert np.array_equal(np.load(tmp_path / "store" / "labels.npy"), labels)


def test_skipped_images_leave_no_gap(tmp_path):
    records, labels = write_store(tmp_path / "store", skipped=[0, 3, *range(10, 20)])  # the whole second shard
    store = LatentStore(tmp_path / "store")
    assert len(store) == 26 and store.meta["skipped"][:2] == ["image 0", "image 3"]
    read, read_labels = store.read(range(26))
    assert np.array_equal(read, records) and np.array_equal(read_labels, labels)


def test_threads_share_a_store_of_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(libs.latents, "MAX_OPEN_FILES", 2)
    records, labels = write_store(tmp_path / "store", images_per_shard=3)
    store = LatentStore(tmp_path / "store")
    orders = [np.random.default_rng(seed).permutation(50) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for order, (read, read_labels) in zip(orders, pool.map(store.read, orders), strict=True):
            assert np.array_equal(read, records[order]) and np.array_equal(read_labels, labels[order])
    assert store._shard_file.cache_info().currsize == 2


@pytest.mark.parametrize("system", ["nothing cached", "no advice", "short reads"])
def test_records_are_read_whatever_the_system_does(tmp_path, monkeypatch, system):
    records, _ = write_store(tmp_path / "store")
    preadv = os.preadv

    def never_cached(fd, buffers, offset, flags=0):
        if flags:
            raise BlockingIOError(errno.EAGAIN, "would block")
        return preadv(fd, buffers, offset)

    if system == "no advice":
        monkeypatch.delattr(os, "posix_fadvise")
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    elif system == "nothing cached":
        monkeypatch.setattr(os, "preadv", never_cached)
    else:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, *where: preadv(fd, [buffers[0][:100]], *where))
    assert np.array_equal(LatentStore(tmp_path / "store").read([3, 30])[0], records[[3, 30]])


def test_indices_out_of_range(tmp_path):
    write_store(tmp_path / "store")
    store = LatentStore(tmp_path / "store")
    for indices in ([50], [-1], [0, 2**40]):
        with pytest.raises((IndexError, OSError)):
            store.read(indices)


def test_an_unfinished_store_is_not_taken_for_whole_and_is_continued(tmp_path):
    records = moments(50)
    writer = StoreWriter(tmp_path / "store", settings())
    writer.begin()
    writer.write_shard(1, records[20:40])
    with pytest.raises(UserError, match=r"Unfinished latents at .*: run scripts/extract"):
        LatentStore(tmp_path / "store")
    with pytest.raises(UserError, match=r"shards \[0, 2\] of 3 are not written"):
        writer.finish(np.zeros(25, int))
    (tmp_path / "store" / ".latents-00002.npy.0123abcd.tmp").write_bytes(b"half a shard")  # what a killed run leaves
    (tmp_path / "store" / "latents-00000.npy").write_bytes(b"renamed, but killed before its entry was written")

    again = StoreWriter(tmp_path / "store", settings())
    assert again.begin() == [0, 2] and not again.is_complete()
    again.write_shard(0, records[:20])
    again.write_shard(2, records[40:])
    again.finish(np.zeros(25, int))
    assert again.is_complete()
    assert np.array_equal(LatentStore(tmp_path / "store").read(range(50))[0], records)
    assert not list((tmp_path / "store").glob(".*"))


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_an_error_naming_both(tmp_path, finished):
    if finished:
        write_store(tmp_path / "store")
    else:
        for flips in (False, True):  # nothing is done yet that other settings would spoil
            writer = StoreWriter(tmp_path / "store", settings(flips=flips))
            writer.begin()
        writer.write_shard(0, moments(20))
        StoreWriter(tmp_path / "store", settings(class_names=["ant"])).begin()
        with pytest.raises(UserError, match=r"other settings \(class_names"):  # begun anew meanwhile
            writer.write_shard(1, moments(20))
    StoreWriter(tmp_path / "store", settings()).begin()
    with pytest.raises(UserError, match=r"\(dtype: there 'float16', now 'float32'; flips: there True, now False\)"):
        StoreWriter(tmp_path / "store", settings(dtype="float32", flips=False)).begin()


def test_a_folder_of_other_things_is_not_written_into(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        StoreWriter(tmp_path, settings()).begin()
    with pytest.raises(WriteError, match=r"Cannot write .*thesis\.txt"):
        StoreWriter(tmp_path / "thesis.txt", settings()).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "store", settings())
    writer.begin()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"Cannot write .*latents-00000\.npy: No space left on device\. Free space"):
        writer.write_shard(0, moments(20))
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["unfinished.json"]


@pytest.mark.parametrize("folder", [False, True])
def test_files_and_folders_are_replaced_whole_or_not_at_all(tmp_path, folder):
    def write(text):
        with replacing_folder(tmp_path / "x") if folder else replacing(tmp_path / "x/file") as place:
            if folder:
                (place / "file").write_bytes(text)
            else:
                place.write(text)
            assert text

    if not folder:
        (tmp_path / "x").mkdir()
        write(b"old")
    with pytest.raises(AssertionError):
        write(b"")
    assert [path.name for path in tmp_path.rglob("*")] == ([] if folder else ["x", "file"])
    write(b"new")
    assert (tmp_path / "x/file").read_bytes() == b"new" and len(list(tmp_path.rglob("*"))) == 2


def test_values_that_do_not_fit_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "store", settings())
    writer.begin()
    for value in (np.float32(7e4), np.float16("nan"), np.float32("inf")):
        with pytest.raises(UserError, match=r"not finite in float16: set --dtype float32 .* or check --autoencoder"):
            writer.write_shard(0, np.full((20, *SHAPE), value))
    assert writer.begin() == [0, 1, 2]


def test_truncated_missing_and_altered_files_are_named(tmp_path):
    write_store(tmp_path / "store")
    shard = tmp_path / "store" / "latents-00001.npy"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"latents-00001\.npy is missing or truncated: expected 5248 bytes, found 5247"):
        LatentStore(tmp_path / "store")
    shard.unlink()
    with pytest.raises(UserError, match=r"latents-00001\.npy is missing .*, found None"):
        LatentStore(tmp_path / "store")

    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"the contents of latents-00001\.npy are not"):
        LatentStore(tmp_path / "store").verify()

    shard.write_bytes(whole.replace(b"'<f2'", b"'<i2'"))
    with pytest.raises(UserError, match=r"latents-00001\.npy was altered: expected float16 .*, found int16"):
        LatentStore(tmp_path / "store").read([25])

    shard.write_bytes(whole)
    labels = tmp_path / "store" / "labels.npy"
    labels.write_bytes(labels.read_bytes()[:-4] + b"\0\0\0\1")
    opened = LatentStore(tmp_path / "store")
    opened.read([30])
    with pytest.raises(UserError, match=r"labels\.npy was altered: a label lies outside 0\.\.2"):
        opened.read([49])
    os.truncate(shard, 1000)  # while training runs
    with pytest.raises(UserError, match=r"latents-00001\.npy was truncated"):
        opened.read([31])


def test_not_a_store(tmp_path):
    with pytest.raises(UserError, match=r"no index\.json.*extract_imagenet_feature"):
        LatentStore(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match=r"not of format \('dimr-latents', 2\), found \('other', None\)"):
        LatentStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(dtype="object"),
        lambda index: index.update(record_shape=[8, -4, 4]),
        lambda index: index.update(record_shape=[8, 2**30, 2**30]),
        lambda index: index.update(class_names=[]),
        lambda index: index.update(n_records=51),
        lambda index: index.update(shards=[]),
        lambda index: index["shards"][0].update(file="../latents-00000.npy"),
        lambda index: index["shards"][0].update(records=True),
        lambda index: index["labels"].update(file="/etc/passwd"),
        lambda index: index.pop("autoencoder"),
        None,
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, change):
    write_store(tmp_path / "store")
    if change is not None:
        rewrite_index(tmp_path / "store", change)
    else:  # edited, with the old checksum
        file = tmp_path / "store" / "index.json"
        file.write_text(file.read_text().replace('"bee"', '"fee"'))
    with pytest.raises(UserError, match=r"index\.json was altered, contradicts itself or"):
        LatentStore(tmp_path / "store")


def test_an_older_store_says_what_to_do(tmp_path):
    write_store(tmp_path / "store")
    rewrite_index(tmp_path / "store", lambda index: index.update(version=1, autoencoder={"sha256": "ab" * 32}))
    with pytest.raises(UserError, match=r"store is of version 1 of the format, this is 2: remove it and extract again"):
        LatentStore(tmp_path / "store")


def test_an_interrupted_store_goes_on_with_the_same_encoder(tmp_path):
    """Its numbers differ in the last digits from machine to machine; another encoder is refused."""

    def begin(mean, scale=0.18215):
        encoder = {**CHANNELS, "mean": [mean, *CHANNELS["mean"][1:]]}
        writer = StoreWriter(
            tmp_path / "store", settings(autoencoder={**IDENTITY, "encoder": encoder, "scale": [scale]})
        )
        return writer, writer.begin()

    writer, _ = begin(0.5)
    writer.write_shard(0, moments(20))
    writer, todo = begin(0.501)
    assert todo == [1, 2]
    writer.write_shard(1, moments(20))
    for other in ((0.6,), (0.5, 0.13025)):
        with pytest.raises(UserError, match="made with other settings"):
            begin(*other)
    writer.write_shard(2, moments(10))
    writer.finish(np.arange(25) % 3)
    assert LatentStore(tmp_path / "store").autoencoder == IDENTITY


def test_check_against_names_both_sides(tmp_path):
    write_store(tmp_path / "store")
    store = LatentStore(tmp_path / "store")
    store.check_against(record_shape=SHAPE, n_classes=3)
    store.check_against()
    with pytest.raises(UserError, match=r"record_shape of the store is \(8, 4, 4\), of the config \(8, 64, 64\)"):
        store.check_against(record_shape=(8, 64, 64))
    with pytest.raises(UserError, match="n_classes of the store is 3, of the config 1000"):
        store.check_against(n_classes=1000)


def test_ten_million_records_open_at_once(tmp_path):
    """A sparse store of records of (8, 32, 32) float16: under 50 ms and 50 MB."""
    n_shards, per_shard, shape = 200, 50_000, (8, 32, 32)
    n_records = n_shards * per_shard

    def sparse(name, shape, dtype):
        np.lib.format.open_memmap(tmp_path / name, "w+", dtype, shape)
        return {"file": name, "bytes": (tmp_path / name).stat().st_size, "sha256": ""}

    files = [sparse(f"latents-{k:05d}.npy", (per_shard, *shape), np.float16) for k in range(n_shards)]
    shards = [{**file, "records": per_shard, "skipped": []} for file in files]
    labels = sparse("labels.npy", (n_records,), np.int32)
    index = {**StoreWriter(tmp_path, settings(record_shape=shape)).settings, "shards": shards, "labels": labels}
    (tmp_path / "index.json").write_text(json.dumps({**index, "n_records": n_records}))
    rewrite_index(tmp_path, lambda index: None)

    last = np.lib.format.open_memmap(tmp_path / files[-1]["file"], "r+")
    last[-1] = 3
    last.flush()
    assert min(timeit.repeat(lambda: LatentStore(tmp_path), number=1, repeat=5)) < 0.05
    tracemalloc.start()
    store = LatentStore(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    records, _ = store.read([n_records - 1, 0])
    assert (records[0] == 3).all() and (records[1] == 0).all()


def test_npy_headers_that_are_not_plain(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.asfortranarray(np.zeros((2, 3))))
    with open(file, "rb") as opened, pytest.raises(UserError, match="or not a plain array in C order"):
        read_npy_header(opened, file)
    save_file({"x": np.zeros(3)}, file)
    with open(file, "rb") as opened, pytest.raises(UserError, match=r"x\.npy is not a readable \.npy file"):
        read_npy_header(opened, file)


def damage(data, rng):
    """`data` cut off, with bytes changed, taken out, put in or repeated, at random."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        kind = rng.integers(5)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and at < len(data):
            data[at] = rng.integers(256)
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            data[at:at] = data[at // 2 : at]
    return bytes(data)


def same_length(data, rng):
    """`data` with a few bytes changed, which its size does not tell."""
    data = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 6)):
        data[at] = rng.integers(256)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "head", "harm", "n"),
    [
        ("index.json", None, damage, 800),
        ("latents-00001.npy", 140, damage, 800),
        ("labels.npy", None, damage, 400),
        ("latents-00000.npy", None, damage, 400),
        ("latents-00001.npy", 128, same_length, 400),
        ("labels.npy", 128, same_length, 400),
    ],
)
def test_damaged_stores_are_refused_or_read_right(tmp_path, name, head, harm, n):
    """Damaged files, or their first `head` bytes: a clear error or the right values.

    Where the length is kept nothing is verified, as in training, and the header is what is tested.
    """
    records, labels = write_store(tmp_path / "store")
    file = tmp_path / "store" / name
    whole, rng, n_refused = file.read_bytes(), np.random.default_rng(0), 0
    head = head or len(whole)
    for _ in range(n):
        file.write_bytes(harm(whole[:head], rng) + whole[head:])
        try:
            store = LatentStore(tmp_path / "store")
            if harm is damage:
                store.verify()
            read, read_labels = store.read(range(len(store)))
        except UserError as error:
            assert ("store" if harm is damage else name) in str(error) and len(str(error)) < 1000
            n_refused += 1
        else:
            assert np.array_equal(read, records) and np.array_equal(read_labels, labels)
    assert n_refused > 0.8 * n
