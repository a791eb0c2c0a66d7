"""The latent store: moments of a whole data set in a few large files that training reads at random.

A store is a folder:

    index.json           what it holds; written last, so a folder with it is complete
    labels.npy           int32 (n_records,)
    latents-00000.npy    float16 or float32 (records, 2C, h, w): C means, then C log-variances; and so on

Every .npy opens with `numpy.load` alone. A record is one view of one image. With flips, image i is record 2i and its
mirror image record 2i + 1. Shard k is made from images k * images_per_shard and following, by whichever process, so
neither the number of processes nor an interruption changes a byte. While a store is being written, `unfinished.json`
holds its settings and `latents-*.json` the entries of the shards that are done.

What training needs of a data set, this or `libs.images.ImageDataset`: `len(ds)`, `ds.record_shape`, `ds.n_classes`,
`ds.class_names`, `ds.read(indices)`.
"""

import hashlib
import io
import json
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from libs.files import file_digest, json_digest, naming_the_way_out, read_npy_header, replacing

FORMAT = "dimr-latents"
VERSION = 1
DTYPES = ("float16", "float32")
MAX_OPEN_FILES = 256  # below the usual limit of 1024 per process, whatever the number of shards


class LatentStore:
    """A complete store, opened for reading. Threads may share it; worker processes get a copy and open the files anew.

    Attributes:
        meta: index.json as a dict (keys: see `docs/latents.md`).
        record_shape: (2C, h, w). n_classes, class_names: the classes.
        autoencoder: identity of the autoencoder it was made with, {"sha256", "scaling_factor"}.
    """

    def __init__(self, path: str | Path, meta: dict):
        """`LatentStore.open` is the way in: it reads and checks `meta`."""
        self.path, self.meta = Path(path), meta
        self.dtype = np.dtype(meta["dtype"])
        self.record_shape = tuple(meta["record_shape"])
        self.class_names = meta["class_names"]
        self.n_classes = len(self.class_names)
        self.autoencoder = meta["autoencoder"]
        self._record_bytes = math.prod(self.record_shape) * self.dtype.itemsize
        self._starts = np.cumsum([0] + [shard["records"] for shard in meta["shards"]])
        self._files, self._labels, self._lock = {}, None, threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> "LatentStore":
        """Opens the store in folder `path`. Takes the same time whatever the number of records.

        Raises FileNotFoundError if there is no store or a file of it is missing, ValueError if the index is not one
        this version reads, was altered, or a file has not the size it states. Contents are checked by `verify`.
        """
        store = cls(path, read_index(path))
        for name, n_bytes in [
            (shard["file"], shard["bytes"]) for shard in [*store.meta["shards"], store.meta["labels"]]
        ]:
            file = store.path / name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing from the store: copy it again, or extract again")
            if file.stat().st_size != n_bytes:
                raise ValueError(
                    f"{file} was truncated or altered: expected {n_bytes} bytes, found {file.stat().st_size}. "
                    f"Copy it again, or delete it and run the extraction again, which makes this file anew"
                )
        return store

    @property
    def digest(self) -> str:
        """SHA-256 of the index, which holds the checksums of all files: the same for the same records."""
        return self.meta["sha256"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self):  # open files stay behind
        return LatentStore, (self.path, self.meta)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Records and labels, in the order of `indices`.

        Args:
            indices: sequence of B integers in 0..len - 1, in any order.

        Returns:
            (array (B, *record_shape) of the store's dtype, int64 array (B,)).

        Raises:
            IndexError: an index out of range. ValueError: a file is not what the index says, naming it.
        """
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"Records {indices.min()}..{indices.max()} asked of a store of {len(self)} ({self.path})")
        records = np.empty((len(indices), *self.record_shape), self.dtype)
        rows = memoryview(records.reshape(-1)).cast("B")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = (indices - self._starts[shards]) * self._record_bytes
        # First what is in memory; the kernel is told of all the rest before the first read waits for the disk, which
        # then serves many requests at once.
        waiting = []
        for k, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            row = rows[k * self._record_bytes : (k + 1) * self._record_bytes]
            file, start = self._shard_file(shard)
            if not _read_if_cached(file, row, start + offset):
                waiting.append((file, row, start + offset))
        if hasattr(os, "posix_fadvise"):
            for file, row, at in waiting:
                os.posix_fadvise(file.fileno(), at, len(row), os.POSIX_FADV_WILLNEED)
        for file, row, at in waiting:
            _read_exactly(file, row, at)
        return records, self._read_labels(indices)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256 with the index. Raises ValueError naming all that differ."""
        entries = [*self.meta["shards"], self.meta["labels"]]
        altered = [entry["file"] for entry in entries if file_digest(self.path / entry["file"]) != entry["sha256"]]
        if altered:
            raise ValueError(
                f"{self.path}: the contents of {', '.join(altered)} are not what index.json states. Copy them again, "
                f"or delete them and run the extraction again, which makes these files anew"
            )

    def check_against(
        self,
        autoencoder: dict | None = None,
        record_shape: Sequence[int] | None = None,
        n_classes: int | None = None,
    ) -> None:
        """Raises ValueError naming both sides if the store was made with another autoencoder (its `identity`), holds
        records of another shape, or another number of classes than the caller is set to. None is not compared."""
        wanted = {
            "autoencoder": autoencoder,
            "record_shape": None if record_shape is None else tuple(record_shape),
            "n_classes": n_classes,
        }
        advice = {
            "autoencoder": "set the config's autoencoder to the one the latents were made with",
            "record_shape": "set the config's latent size and channels to the store's",
            "n_classes": "set the config's number of classes to the store's",
        }
        for name, value in wanted.items():
            if value is not None and value != getattr(self, name):
                raise ValueError(
                    f"The latents in {self.path} do not fit the config: {name} of the store is {getattr(self, name)}, "
                    f"of the config {value}. Either {advice[name]}, or extract again with the config's"
                )

    def _shard_file(self, number):
        """(open file, offset of its first record)."""
        found = self._files.get(number)
        if found is None:
            with self._lock:
                found = self._files.get(number) or self._open_shard(number)
        return found

    def _open_shard(self, number):
        entry = self.meta["shards"][number]
        file = _open_npy(self.path / entry["file"], (entry["records"], *self.record_shape), self.dtype)
        if hasattr(os, "posix_fadvise"):  # a single record must not drag in the kernel's readahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        if len(self._files) >= MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files)))  # closed by whoever lets go of it last, as a thread may be reading
        self._files[number] = file, file.tell()
        return self._files[number]

    def _read_labels(self, indices):
        if self._labels is None:
            path = self.path / self.meta["labels"]["file"]
            with _open_npy(path, (len(self),), np.dtype(np.int32)) as file:
                self._labels = np.memmap(path, np.int32, "r", file.tell(), (len(self),))
        labels = self._labels[indices].astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.n_classes:
            raise ValueError(f"{self.path / 'labels.npy'} was altered: a label lies outside 0..{self.n_classes - 1}")
        return labels


class StoreWriter:
    """Writes a store shard by shard, from any number of processes, and picks up what an earlier run left.

    Args:
        path: folder of the store.
        settings: all that decides its bytes, and becomes part of index.json: `record_shape`, `dtype`, `resolution`,
            `flips`, `crop`, `autoencoder`, `class_names`, `images_per_shard`, and `source`, a dict with `n_images`.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path = Path(path)
        settings = {"format": FORMAT, "version": VERSION, **settings}
        self.settings = json.loads(json.dumps(settings))  # as it will be read back, to compare
        self.n_shards = -(-settings["source"]["n_images"] // settings["images_per_shard"])

    def begin(self) -> None:
        """Makes the folder, or checks that what is there was begun with the same settings: before the first shard is
        done any settings, before the store is complete any class names. One process calls it, before any writes.

        Raises ValueError naming the settings that differ, OSError if the folder cannot be written.
        """
        with naming_the_way_out(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "index.json").exists():
                self._compare(read_index(self.path))
            elif (self.path / "unfinished.json").exists():
                shards = any(self.path.glob("latents-*.json"))
                decisive = self.settings.keys() - {"class_names"} if shards else ("format", "version")
                self._compare(_read_json(self.path / "unfinished.json"), decisive)
                _write_json(self.path / "unfinished.json", self.settings)
            elif any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise ValueError(
                    f"{self.path} holds other files: expected a new or empty folder, or a store begun earlier"
                )
            else:
                _write_json(self.path / "unfinished.json", self.settings)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()

    def image_range(self, shard: int) -> tuple[int, int]:
        """(first, one past the last) image of shard number `shard`."""
        first = shard * self.settings["images_per_shard"]
        return first, min(first + self.settings["images_per_shard"], self.settings["source"]["n_images"])

    def entries(self) -> dict[int, dict]:
        """{shard number: its entry} for the shards that are complete on disk."""
        found = {}
        if (self.path / "index.json").exists():
            found = {shard["file"]: shard for shard in read_index(self.path)["shards"]}
        for file in self.path.glob("latents-*.json"):
            entry = _check_shard_entry(_read_json(file), file)
            found[entry["file"]] = entry
        numbers = {_shard_name(number): number for number in range(self.n_shards)}
        return {
            numbers[name]: entry
            for name, entry in found.items()
            if name in numbers and (self.path / name).is_file() and (self.path / name).stat().st_size == entry["bytes"]
        }

    def is_complete(self) -> bool:
        """Whether index.json is there and every file has the size it states."""
        try:
            LatentStore.open(self.path)
        except (ValueError, OSError):
            return False
        return True

    def check_sources(self, digest: Callable[[int], str]) -> None:
        """Raises ValueError if shards are done whose source is not what `digest`, a function of the shard's number as
        given to `write_shard`, says now. Shards written without one are not compared."""
        other = [
            _shard_name(number)
            for number, entry in sorted(self.entries().items())
            if "source_sha256" in entry and entry["source_sha256"] != digest(number)
        ]
        if other:
            raise ValueError(
                f"{self.path}: {len(other)} shards ({', '.join(other[:3])}{', ...' if len(other) > 3 else ''}) were "
                f"made from another source than the one given now: give that, delete these files to have them made "
                f"anew, or set another --out"
            )

    def write_shard(
        self, number: int, records: np.ndarray, skipped: Sequence[int] = (), source: str | None = None
    ) -> None:
        """Writes shard `number` whole: under a temporary name, to the disk, then renamed; then its entry.

        Args:
            records: (records, *record_shape), converted to the store's dtype; views of an image lie together.
            skipped: indices of the images of this shard that are left out.
            source: digest of what tells this shard's source from others, for `check_sources`.

        Raises:
            ValueError: values that are not finite in the store's dtype, another run began the store anew meanwhile.
            OSError: it cannot be written.
        """
        given = np.asarray(records)
        with np.errstate(over="ignore"):
            records = np.ascontiguousarray(given, dtype=self.settings["dtype"])
        if not np.isfinite(records).all():
            # an infinity in half precision may be one of rounding
            if (np.isnan(given) if given.dtype == np.float16 else ~np.isfinite(given)).any():
                raise ValueError(
                    f"The moments of shard {number} are not all finite, in any --dtype: expected finite numbers of the "
                    f"source and of --autoencoder, check both"
                )
            raise ValueError(
                f"The moments of shard {number} are not all finite in {self.settings['dtype']}: set --dtype float32, "
                f"and another --out if shards are done in this one"
            )
        if (self.path / "unfinished.json").exists():
            self._compare(_read_json(self.path / "unfinished.json"))
        entry = self._write_npy(_shard_name(number), records)
        entry = {**entry, "records": len(records), "skipped": [int(i) for i in skipped]}
        if source is not None:
            entry["source_sha256"] = source
        _write_json(self.path / _shard_name(number).replace(".npy", ".json"), entry)

    def finish(self, labels: Sequence[int], names: Callable[[int], str] = str) -> None:
        """Writes labels.npy and index.json, once every shard is there, and removes what only an unfinished store needs.

        Args:
            labels: integer per source image, skipped ones included.
            names: function from image index to its name, for the list of those skipped.
        """
        entries = self.entries()
        missing = [number for number in range(self.n_shards) if number not in entries]
        if missing:
            raise ValueError(f"{self.path}: shards {missing[:5]} of {self.n_shards} are not written: run it again")
        shards = [entries[number] for number in range(self.n_shards)]
        skipped = [i for shard in shards for i in shard["skipped"]]
        labels = np.delete(np.asarray(labels, dtype=np.int32), skipped)
        if not len(labels):
            raise ValueError(f"{self.path}: no image is left to store")
        n_views = 2 if self.settings["flips"] else 1
        index = {
            **self.settings,
            "n_images": len(labels),
            "n_records": len(labels) * n_views,
            "images_per_class": np.bincount(labels, minlength=len(self.settings["class_names"])).tolist(),
            "skipped": [names(i) for i in skipped],
            "labels": self._write_npy("labels.npy", np.repeat(labels, n_views)),
            "shards": shards,
        }
        index["sha256"] = json_digest(index)
        _check_index(index, self.path / "index.json")
        _write_json(self.path / "index.json", index)
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Removes the files that only an unfinished store needs."""
        for file in [*self.path.glob("latents-*.json"), self.path / "unfinished.json"]:
            file.unlink(missing_ok=True)

    def _write_npy(self, name, array):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        digest = hashlib.sha256(header.getvalue())
        digest.update(array)
        with replacing(self.path / name) as file:
            file.write(header.getvalue())
            file.write(array.data)
        return {"file": name, "bytes": len(header.getvalue()) + array.nbytes, "sha256": digest.hexdigest()}

    def _compare(self, found, keys=None):
        different = [
            key for key in self.settings if (keys is None or key in keys) and found.get(key) != self.settings[key]
        ]
        if different:
            both = "; ".join(
                f"{key}: there {_short(found.get(key))}, now {_short(self.settings[key])}" for key in different
            )
            raise ValueError(
                f"{self.path} holds latents made with other settings ({both}). Use those, or another --out"
            )


def read_index(path: str | Path) -> dict:
    """index.json of the store at `path`, checked to be whole and consistent.

    Raises FileNotFoundError if there is none (saying whether an unfinished store is), ValueError if it is not valid.
    """
    file = Path(path) / "index.json"
    if not file.is_file():
        if (Path(path) / "unfinished.json").is_file():
            raise FileNotFoundError(
                f"The latents in {path} are unfinished: run the same extraction again to complete them"
            )
        raise FileNotFoundError(
            f"No latents at {path} (no index.json): make them with scripts/extract_imagenet_feature.py"
        )
    return _check_index(_read_json(file), file)


def _shard_name(number):
    return f"latents-{number:05d}.npy"


def _open_npy(path, shape, dtype):
    """The file, unbuffered, at its first value. Raises ValueError if it does not hold just such an array."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (handed to the caller)
    try:
        found = read_npy_header(file, path)
        expected = (tuple(shape), dtype)
        n_bytes = os.fstat(file.fileno()).st_size - file.tell()
        if found != expected or n_bytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path} was altered: expected an array of shape {expected[0]} and dtype {expected[1]}, found "
                f"{found[0]} and {found[1]} with {n_bytes} bytes"
            )
    except BaseException:
        file.close()
        raise
    return file


def _read_if_cached(file, buffer, offset):
    """Whether `buffer` could be filled without waiting for the disk (never, where the system cannot tell)."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(file.fileno(), [buffer], offset, os.RWF_NOWAIT) == len(buffer)
    except OSError:  # not in memory, or a file system that does not know the flag
        return False


def _read_exactly(file, buffer, offset):
    while len(buffer):
        n = os.preadv(file.fileno(), [buffer], offset)
        if n == 0:
            raise ValueError(f"{file.name} was truncated: nothing at byte {offset}. Copy it again, or extract again")
        buffer, offset = buffer[n:], offset + n


def _read_json(file):
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} should hold a JSON object, found {_short(value)}")
    return value


def _write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _check_index(index, file):
    """`index` itself, if it is what this version writes and reading relies on. Raises ValueError naming `file`."""
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{file} is of format {_short(index.get('format'))} version {_short(index.get('version'))}, expected "
            f"{FORMAT} version {VERSION}: extract again, or use the release of this project that wrote it"
        )
    if json_digest({key: value for key, value in index.items() if key != "sha256"}) != index.get("sha256"):
        raise ValueError(
            f"{file} was altered: its contents do not match its own checksum. Copy it again, or extract again"
        )

    def require(condition, what):
        if not condition:
            raise ValueError(f"{file} is not valid: expected {what}")

    shape = index.get("record_shape")
    require(isinstance(shape, list) and shape and all(_is_count(n) and n > 0 for n in shape), "record_shape, a list")
    require(index.get("dtype") in DTYPES, f"dtype, one of {', '.join(DTYPES)}")
    names = index.get("class_names")
    require(isinstance(names, list) and names and all(isinstance(name, str) for name in names), "class_names, a list")
    identity = index.get("autoencoder")
    require(isinstance(identity, dict) and {"sha256", "scaling_factor"} <= identity.keys(), "autoencoder, its identity")
    shards = index.get("shards")
    require(isinstance(shards, list) and shards, "shards, a list")
    record_bytes = math.prod(shape) * np.dtype(index["dtype"]).itemsize
    for shard in shards:
        _check_shard_entry(shard, file)
        require(shard["records"] * record_bytes < shard["bytes"], f"{shard['file']} to have room for its records")
    labels = index.get("labels")
    require(
        isinstance(labels, dict) and labels.get("file") == "labels.npy" and _is_count(labels.get("bytes")), "labels"
    )
    require(isinstance(labels.get("sha256"), str), "the checksum of the labels")
    n_records = index.get("n_records")
    require(_is_count(n_records) and n_records > 0, "n_records, a positive number")
    require(sum(shard["records"] for shard in shards) == n_records, "the records of all shards to add up to n_records")
    return index


def _check_shard_entry(entry, file):
    valid = (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and re.fullmatch(r"latents-\d{5,}\.npy", entry["file"])
        and _is_count(entry.get("records"))
        and _is_count(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("skipped"), list)
        and all(_is_count(i) for i in entry["skipped"])
    )
    if not valid:
        raise ValueError(f"{file} is not valid: expected the entry of a shard, found {_short(entry)}")
    return entry


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
