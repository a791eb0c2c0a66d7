"""The latent store: moments of a whole data set in a few large files that training reads at random.

A store is a folder:

    index.json           what it holds; written last, so a folder with it is complete
    labels.npy           int32 (n_records,)
    latents-00000.npy    float16 or float32 (records, 2C, h, w): C means, then C log-variances; and so on

A record is one view of one image: with flips, image i is record 2i and its mirror image record 2i + 1. Shard k is made
from images k * images_per_shard and following, whatever the number of processes and interruptions. While a store is
being written, `unfinished.json` holds its settings and `latents-*.json` the entries of the finished shards.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from libs import UserError
from libs.files import advise_on_write_error, file_digest, json_digest, read_json, read_npy_header, replacing
from libs.normalization import Normalization, differing_parts

FORMAT = "dimr-latents"
VERSION = 2
DTYPES = ("float16", "float32")
MOST_VALUES = 1 << 25  # of records that are read at once to look at
MAX_OPEN_FILES = 256  # below the usual limit of 1024 per process, whatever the number of shards


class LatentStore:
    """A complete store, opened for reading by any number of threads.

    Attributes, besides those of every data set (libs.data):
        meta: index.json as a dict (keys: see `docs/latents.md`).
        autoencoder: identity of the autoencoder it was made with, see `libs.autoencoder.measure_identity`.
    """

    releases_gil = True

    def __init__(self, path: str | Path):
        """Open the store in folder `path`, in the same time whatever the number of records.

        Raises UserError if there is no store, or the index or the size of a file is not as written.
        """
        self.path = Path(path)
        self.meta = meta = read_index(self.path)
        for entry in [*meta["shards"], meta["labels"]]:
            found = _size(self.path / entry["file"])
            if found != entry["bytes"]:
                raise UserError(
                    f"{self.path / entry['file']} is missing or truncated: expected {entry['bytes']} bytes, found "
                    f"{found}. Copy it again, or delete it and run the extraction again, which makes it anew"
                )
        self.dtype = np.dtype(meta["dtype"])
        self.record_shape = tuple(meta["record_shape"])
        self.class_names = meta["class_names"]
        self.n_classes = len(self.class_names)
        self.autoencoder = meta["autoencoder"]
        self._record_bytes = math.prod(self.record_shape) * self.dtype.itemsize
        self._starts = np.cumsum([0] + [shard["records"] for shard in meta["shards"]])
        # A file beyond these is closed by the last thread that reads it.
        self._shard_file = functools.lru_cache(MAX_OPEN_FILES)(self._open_shard)
        self._labels = None

    @property
    def digest(self) -> str:
        """SHA-256 of the index, which holds the checksums of all files: the same for the same records."""
        return self.meta["sha256"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read records (B, *record_shape), of the store's dtype, and labels int64 (B,) in the order of `indices`.

        Raises UserError if a file is not what the index says.
        """
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        records = np.empty((len(indices), *self.record_shape), self.dtype)
        rows = memoryview(records.reshape(-1)).cast("B")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = (indices - self._starts[shards]) * self._record_bytes
        # Read what the page cache holds, then announce all other reads, so that the disk serves many at once.
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
        """Read every file and compare its SHA-256 with the index. Raises UserError naming all that differ."""
        files = {entry["file"]: entry.get("sha256") for entry in [*self.meta["shards"], self.meta["labels"]]}
        altered = [name for name, digest in files.items() if file_digest(self.path / name) != digest]
        if altered:
            raise UserError(
                f"{self.path}: the contents of {', '.join(altered):.200} are not what index.json states. Copy "
                f"them again, or delete them and run the extraction again, which makes them anew"
            )

    def check_against(self, **wanted) -> None:
        """Raise UserError, naming both, if an attribute of the store is not as `wanted`; None is not compared."""
        for name, value in wanted.items():
            if value is not None and value != getattr(self, name):
                raise UserError(
                    f"The latents in {self.path} do not fit the config: {name} of the store is {getattr(self, name)}, "
                    f"of the config {value}. Change the config, or extract again"
                )

    @property
    def normalization(self) -> Normalization:
        """The normalization that was recorded, which the moments do not have."""
        return Normalization(tuple(self.autoencoder["shift"]), tuple(self.autoencoder["scale"]))

    def read_spread(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Read at most n records, fewer if they are large, evenly spread over the store, and their labels."""
        n = max(1, min(n, MOST_VALUES // math.prod(self.record_shape)))
        return self.read(np.unique(np.linspace(0, len(self) - 1, n).round().astype(int)))

    def _open_shard(self, number):
        """Return (open file, offset of its first record)."""
        entry = self.meta["shards"][number]
        start = _check_npy(self.path / entry["file"], (entry["records"], *self.record_shape), self.dtype)
        file = open(self.path / entry["file"], "rb", buffering=0)  # noqa: SIM115 (kept open)
        if hasattr(os, "posix_fadvise"):  # a single record must not drag in the kernel's readahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return file, start

    def _read_labels(self, indices):
        path = self.path / "labels.npy"
        if self._labels is None:
            start = _check_npy(path, (len(self),), np.dtype(np.int32))
            self._labels = np.memmap(path, np.int32, "r", start, (len(self),))
        labels = self._labels[indices].astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.n_classes:
            raise UserError(f"{path} was altered: a label lies outside 0..{self.n_classes - 1}")
        return labels


class StoreWriter:
    """Write a store shard by shard, from any number of processes, and resume what an earlier run left.

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

    def begin(self, source: Callable[[int], str] | None = None) -> list[int]:
        """Make the folder, or check what an earlier run left there, and return the numbers of the shards to write.

        One process calls it, before any writes. Settings may change until a shard is finished, class names until the
        store is complete. Raises UserError for other settings, another source, or a folder of other things.

        Args:
            source: function from a shard's number to the digest that `write_shard` gets; finished shards must have it.
        """
        with advise_on_write_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "index.json").exists():
                self._compare(read_index(self.path))
            elif (self.path / "unfinished.json").exists():
                if any(self.path.glob("latents-*.json")):
                    self._compare(read_json(self.path / "unfinished.json"), but="class_names")
            elif any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"{self.path} holds other files: expected a new or empty folder, or a store")
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
            if self.is_complete():
                self._remove_leftovers()
            elif not (self.path / "index.json").exists():
                _write_json(self.path / "unfinished.json", self.settings)
        done = self._entries()
        others = [entry["file"] for k, entry in done.items() if source and entry.get("source_sha256") != source(k)]
        if others:
            raise UserError(
                f"{self.path}: {len(others)} shards ({', '.join(others):.200}) were made from another source: "
                f"give that, delete these files, or set another --out"
            )
        return [number for number in range(self.n_shards) if number not in done]

    def image_range(self, shard: int) -> tuple[int, int]:
        """Return (first, one past the last) image of shard number `shard`."""
        first = shard * self.settings["images_per_shard"]
        return first, min(first + self.settings["images_per_shard"], self.settings["source"]["n_images"])

    def is_complete(self) -> bool:
        """Return whether index.json is there and every file has the size it states."""
        try:
            LatentStore(self.path)
        except UserError:
            return False
        return True

    def write_shard(
        self, number: int, records: np.ndarray, skipped: Sequence[int] = (), source: str | None = None
    ) -> None:
        """Write shard `number` and then its entry, each whole or not at all.

        Args:
            records: (records, *record_shape), converted to the store's dtype; views of an image lie together.
            skipped: indices of the images of this shard that are left out.
            source: digest of what the shard is made from, see `begin`.

        Raises UserError for values that are not finite in the store's dtype, and for other settings than the folder's.
        """
        dtype = self.settings["dtype"]
        with np.errstate(over="ignore"):
            records = np.ascontiguousarray(records, dtype=dtype)
        if not np.isfinite(records).all():
            advice = "set --dtype float32 and another --out, or " if dtype == "float16" else ""
            raise UserError(f"the moments of shard {number} are not finite in {dtype}: {advice}check --autoencoder")
        if (self.path / "unfinished.json").exists():
            self._compare(read_json(self.path / "unfinished.json"))
        entry = self._write_npy(_shard_name(number), records)
        entry |= {"records": len(records), "skipped": [int(i) for i in skipped]}
        entry |= {"source_sha256": source} if source is not None else {}
        _write_json(self.path / _shard_name(number, "json"), entry)

    def finish(self, labels: Sequence[int], names: Callable[[int], str] = str) -> None:
        """Write labels.npy and index.json, once every shard is there, and remove what an unfinished store needs.

        Args:
            labels: integer per source image, skipped ones included.
            names: function from image index to its name, for the list of those skipped.
        """
        entries = self._entries()
        missing = [number for number in range(self.n_shards) if number not in entries]
        if missing:
            raise UserError(f"{self.path}: shards {missing[:5]} of {self.n_shards} are not written: run it again")
        shards = [entries[number] for number in range(self.n_shards)]
        skipped = [i for shard in shards for i in shard["skipped"]]
        labels = np.delete(np.asarray(labels, dtype=np.int32), skipped)
        if not len(labels):
            raise UserError(f"{self.path}: no image is left to store")
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
        _write_json(self.path / "index.json", {**index, "sha256": json_digest(index)})
        self._remove_leftovers()

    def _entries(self):
        """Return {shard number: its entry} of the shards that are whole on disk."""
        has_index = (self.path / "index.json").exists()
        found = dict(enumerate(read_index(self.path)["shards"])) if has_index else {}
        for number in range(self.n_shards):
            file = self.path / _shard_name(number, "json")
            if file.exists():
                found[number] = read_json(file)
        return {n: found[n] for n in sorted(found) if _size(self.path / _shard_name(n)) == found[n].get("bytes", -1)}

    def _remove_leftovers(self):
        for file in [*self.path.glob("latents-*.json"), self.path / "unfinished.json"]:
            file.unlink(missing_ok=True)

    def _write_npy(self, name, array):
        path = self.path / name
        with replacing(path) as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)  # numpy.save would hide the system's reason for an error
        return {"file": name, "bytes": _size(path), "sha256": file_digest(path)}

    def _compare(self, found, but=None):
        """Raise UserError for other settings. The numbers of the same encoder become those that were found."""
        if differing_parts(self.settings["autoencoder"], found.get("autoencoder")).keys() <= {"decoder"}:
            self.settings["autoencoder"] = found.get("autoencoder")
        differences = [
            f"{key}: there {found.get(key)!r:.200}, now {value!r:.200}"
            for key, value in self.settings.items()
            if key != but and found.get(key) != value
        ]
        if differences:
            raise UserError(
                f"{self.path} holds latents made with other settings ({'; '.join(differences)}). Use those, or another "
                "--out"
            )


def read_index(path: str | Path) -> dict:
    """Read index.json of the store at `path` and check that it is whole and consistent, as reading relies on it."""
    file = Path(path) / "index.json"
    if not file.is_file():
        found = "Unfinished" if (file.parent / "unfinished.json").is_file() else "No"
        raise UserError(f"{found} latents at {path} (no index.json): run scripts/extract_imagenet_feature.py")
    index = read_json(file)
    found, digest = (index.get("format"), index.get("version")), index.pop("sha256", None)
    if found[0] == FORMAT and found[1] != VERSION:
        raise UserError(
            f"{path} is of version {found[1]} of the format, this is {VERSION}: remove it and extract again"
        )
    if found != (FORMAT, VERSION) or json_digest(index) != digest or not _is_consistent(index):
        raise UserError(
            f"{file} was altered, contradicts itself or is not of format {(FORMAT, VERSION)}, found {found!s:.200}: "
            "copy it again, or extract again"
        )
    return {**index, "sha256": digest}


def _shard_name(number, suffix="npy"):
    return f"latents-{number:05d}.{suffix}"


def _size(path):
    return path.stat().st_size if path.is_file() else None


def _check_npy(path, shape, dtype):
    """Return the offset of the first value. Raises UserError if the file does not hold just such an array."""
    with open(path, "rb") as file:
        found, start = read_npy_header(file, path), file.tell()
    n_bytes = _size(path) - start
    if found != (shape, dtype) or n_bytes != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path} was altered: expected {dtype} {shape}, found {found[1]} {found[0]} in {n_bytes} bytes")
    return start


def _read_if_cached(file, buffer, offset):
    """Return whether `buffer` could be filled without waiting for the disk: never, where the system cannot tell."""
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
            raise UserError(f"{file.name} was truncated: nothing at byte {offset}. Copy it again, or extract again")
        buffer, offset = buffer[n:], offset + n


def _write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _is_consistent(index):
    try:
        shape, shards, labels = index["record_shape"], index["shards"], index["labels"]
        record_bytes = math.prod(shape) * np.dtype(index["dtype"]).itemsize
        counts = [labels["bytes"], *(shard[key] for shard in shards for key in ("records", "bytes"))]
        return (
            index["dtype"] in DTYPES
            and all(type(count) is int and 0 <= count < 2**62 for count in counts + [side - 1 for side in shape])
            and all(shard["file"] == _shard_name(number) for number, shard in enumerate(shards))
            and all(shard["records"] * record_bytes < shard["bytes"] for shard in shards)
            and 0 < index["n_records"] == sum(shard["records"] for shard in shards)
            and labels["file"] == "labels.npy"
            and {type(name) for name in index["class_names"]} == {str}
            and {"encoder", "decoder", "shift", "scale"} <= index["autoencoder"].keys()
        )
    except (KeyError, TypeError, AttributeError):
        return False
