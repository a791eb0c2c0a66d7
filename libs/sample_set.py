"""A sampled set of images on disk: eval.py writes it, img2npz.py and the scores read it.

A folder holds the images of one range of indices of a set, as <index>.png, or as shards <first>-<last>.npz, or both.
A shard is one batch: `arr_0` uint8 (n, H, W, 3) and `labels` int64 (n,). Beside them lie sampling.json, with everything
that decides the images, and class_lab.txt, one label per line in index order. A set is one folder, or several whose
ranges are disjoint and together the whole.
"""

import json
import os
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from libs.data import threads
from libs.files import replacing

SETTINGS_FILE = "sampling.json"
LABELS_FILE = "class_lab.txt"
RANGE = "indices"  # the setting that differs between the parts of a set: [first, end)
OUTPUTS = ("png", "npz", "both")
IMAGE_NAME = re.compile(r"(0|[1-9][0-9]*)\.png")
SHARD_NAME = re.compile(r"([0-9]{7,})-([0-9]{7,})\.npz")
TEMPORARY_NAME = re.compile(r"\..*\.tmp")
PNG_END = bytes.fromhex("49454e44ae426082")  # the IEND chunk: a PNG without it is cut short
READ_AHEAD = 256  # images decoded at a time: 50 MB at 256x256
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


# --- Indices ----------------------------------------------------------------------------------------------------------


def balanced_label(index: int, n_samples: int, n_classes: int) -> int:
    """Label of sample `index` of a class-balanced set: index // (n_samples / n_classes); 0 (null) if unconditional."""
    return index * n_classes // n_samples


def indices_of_classes(classes: range, n_samples: int, n_classes: int) -> range:
    """The samples of a class-balanced set that have these labels."""
    return range(*(-(-label * n_samples // n_classes) for label in (classes.start, classes.stop)))


def batches_of(indices: range, n_samples: int, batch_size: int) -> list[range]:
    """The batches that hold `indices`. They are fixed by the set, whatever part of it is made and by whom."""
    starts = range(indices.start // batch_size * batch_size, indices.stop, batch_size)
    return [range(start, min(start + batch_size, n_samples)) for start in starts]


def common(a: range, b: range) -> range:
    """The indices that are in both of two ranges."""
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def span(indices: range) -> str:
    """A range in words: "images 0 to 49"."""
    return f"images {indices.start} to {indices.stop - 1}"


# --- Writing ----------------------------------------------------------------------------------------------------------


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index}.png"


def shard_path(folder: Path, indices: range) -> Path:
    return folder / f"{indices.start:07d}-{indices.stop - 1:07d}.npz"


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image (H, W, 3) so that it is whole or not there; not forced to the disk, which is slow for so many
    (a PNG that a power cut leaves short is found, see `is_complete`). Raises OSError that names it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="png", compress_level=1)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; run the command again to go on", str(path)) from error


def write_shard(images: np.ndarray, labels: Sequence[int], path: Path) -> None:
    """Write uint8 images (n, H, W, 3) and their labels (n,) so that the shard is whole or not there."""
    with replacing(path, "give another folder") as file:
        np.savez(file, arr_0=images, labels=np.asarray(labels, np.int64))


def is_complete(path: Path) -> bool:
    """Is there a whole PNG at `path`? Reads its last bytes only."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def is_whole_shard(path: Path) -> bool:
    """Is there a shard at `path` that was not cut short? Reads the archive's directory, which is at its end."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist() == ["arr_0.npy", "labels.npy"]
    except DAMAGED:
        return False


def missing_files(folder: Path, indices: range, output: str) -> list[Path]:
    """The files of one batch's `indices` that `folder` lacks or holds cut short."""
    missing = []
    if output != "npz":
        missing += [path for path in (image_path(folder, i) for i in indices) if not is_complete(path)]
    if output != "png" and not is_whole_shard(shard_path(folder, indices)):
        missing.append(shard_path(folder, indices))
    return missing


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed program left half-written. Call it while nobody writes into `folder`."""
    for entry in os.scandir(folder):
        if TEMPORARY_NAME.fullmatch(entry.name):
            os.unlink(entry.path)


class SetWriter:
    """Writes batches of a set by threads, so that sampling goes on meanwhile.

    Args:
        depth: batches in hand; `put` waits for the oldest when there are as many.
    """

    def __init__(self, folder: Path, n_threads: int = 4, depth: int = 3):
        self.folder, self.depth = folder, depth
        self.pool = threads(n_threads)
        self.pending: deque[list[Future]] = deque()

    def put(self, indices: range, images: Callable[[], np.ndarray], labels: Sequence[int], files: list[Path]) -> None:
        """Write those `files` of a batch.

        Args:
            indices: the images of the batch that belong to the folder.
            images: gives them when called, uint8 (n, H, W, 3); it may wait, and is called by threads.
            files: PNGs and shards, as `missing_files` lists them.

        Raises:
            What an earlier writing raised: a full disk must not pass unseen.
        """
        while len(self.pending) >= self.depth:
            self._finish_oldest()

        def write(path: Path) -> None:
            if path.suffix == ".png":
                write_png(images()[int(path.stem) - indices.start], path)
            else:
                write_shard(images(), labels, path)

        self.pending.append([self.pool.submit(write, path) for path in files])

    def _finish_oldest(self) -> None:
        for write in self.pending.popleft():
            write.result()

    def __enter__(self) -> "SetWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            while self.pending and error is None:
                self._finish_oldest()
        finally:
            self.pool.shutdown(cancel_futures=True)


# --- Reading ----------------------------------------------------------------------------------------------------------


def few(names: Sequence) -> str:
    """The first few of a list, for a message."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def read_settings(folder: Path) -> dict:
    """What sampling.json of a folder says; empty if there is none. Raises ValueError where it is damaged."""
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object of settings, found a {type(settings).__name__}")
        return settings
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove {folder} and sample again") from error


def differences(found: dict, expected: dict, but: Sequence[str] = ()) -> list[str]:
    """Which of two folders' settings differ: ["scale: 1.4 there, 2.0 now"]."""
    names = [*found, *(name for name in expected if name not in found)]
    return [
        f"{name}: {found.get(name)} there, {expected.get(name)} now"
        for name in names
        if name not in but and found.get(name) != expected.get(name)
    ]


def read_image(path: Path) -> np.ndarray | str:
    """An 8-bit RGB PNG as (H, W, 3) uint8, or, if it is not one, a string that says why."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB":
                return f"is of mode {image.mode}, expected RGB"
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read as PNG ({error})"


def read_shard(path: Path, labels: Sequence[int] | None) -> np.ndarray | str:
    """The images of a shard, (n, H, W, 3) uint8, or a string that says why they cannot be used.

    Args:
        labels: what its labels should be; None: not known.
    """
    first, last = map(int, SHARD_NAME.fullmatch(path.name).groups())
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, own = arrays["arr_0"], arrays["labels"].tolist()
    except DAMAGED as error:
        return f"is damaged or cut short ({error})"
    if images.dtype != np.uint8 or images.shape[:1] + images.shape[3:] != (last - first + 1, 3):
        return f"holds {images.dtype} {images.shape}, expected uint8 ({last - first + 1}, H, W, 3)"
    if labels is not None and own != list(labels):
        return f"says labels {few(own)}, {LABELS_FILE} says {few(list(labels))}"
    return images


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Part:
    """One folder of a set.

    Attributes:
        folder: the folder. settings: of sampling.json. indices: the range of its images.
        labels: of class_lab.txt, None without one.
        files: (path, the indices in it) of its shards or, without shards, its PNGs, in index order.

    Raises:
        ValueError: missing or extra files, or labels that are not the images'; the message names them.
    """

    def __init__(self, folder: str | Path, n_samples: int | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(
                f"no folder {self.folder}: sample images with eval.py first, or give the folder that holds them"
            )
        self.settings = read_settings(self.folder)
        self._check_settings()
        names = {entry.name for entry in os.scandir(self.folder)} - {SETTINGS_FILE, LABELS_FILE}
        names = {name for name in names if not TEMPORARY_NAME.fullmatch(name)}
        self.labels = self._read_labels()
        self.indices, self.source = self._expected(n_samples, names)
        output = self.settings.get("output", "png")
        wanted = {path.name: (path, indices) for path, indices in self._wanted(output)}
        if output == "both":  # the same images twice: the shards are read
            names = {name for name in names if not IMAGE_NAME.fullmatch(name)}
        self._check_names(list(wanted), names)
        self.files = list(wanted.values())
        self._check_labels()

    def _check_settings(self) -> None:
        absent = 1 if self.settings.get("output", "png") == "png" else None  # shards are named by both
        counts = {name: self.settings.get(name, absent) for name in ("n_samples", "mini_batch_size")}
        wrong = [name for name, count in counts.items() if not _is_whole(count) or count < 1]
        ends = self.settings.get(RANGE, [0, 1])
        if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_whole, ends))):
            wrong.append(RANGE)
        if wrong:
            found = ", ".join(f"{name} {self.settings.get(name)}" for name in wrong)
            raise ValueError(
                f"{self.folder / SETTINGS_FILE}: expected whole numbers as eval.py writes them, found {found}: sample "
                "into a new folder"
            )

    def _read_labels(self) -> list[int] | None:
        file = self.folder / LABELS_FILE
        if not file.exists():
            return None
        words = file.read_text(errors="replace").split()
        if not all(word.isdecimal() for word in words):
            raise ValueError(f"{file}: expected one label per line, a whole number: run eval.py again, which writes it")
        return [int(word) for word in words]

    def _expected(self, n_samples: int | None, names: set[str]) -> tuple[range, str]:
        if n_samples is not None:
            expected, source = range(n_samples), "--n_samples"
        elif RANGE in self.settings:
            expected, source = range(*self.settings[RANGE]), f"{self.folder / SETTINGS_FILE}"
        elif self.labels is not None:
            expected, source = range(len(self.labels)), f"the labels in {self.folder / LABELS_FILE}"
        else:
            expected, source = range(sum(bool(IMAGE_NAME.fullmatch(name)) for name in names)), "the images found"
        if not expected:
            raise ValueError(f"{self.folder}: expected at least one image 0.png, found {len(expected)} by {source}")
        return expected, source

    def _wanted(self, output: str) -> Iterator[tuple[Path, range]]:
        if output == "png":
            for i in self.indices:
                yield image_path(self.folder, i), range(i, i + 1)
        else:
            for batch in batches_of(self.indices, self.settings["n_samples"], self.settings["mini_batch_size"]):
                indices = common(batch, self.indices)
                yield shard_path(self.folder, indices), indices

    def _check_names(self, wanted: list[str], found: set[str]) -> None:
        missing = [name for name in wanted if name not in found]
        extra = sorted(found.difference(wanted))
        if missing or extra:
            problems = [f"{len(missing)} missing ({few(missing)})"] * bool(missing)
            problems += [f"{len(extra)} extra ({few(extra)})"] * bool(extra)
            raise ValueError(
                f"{self.folder}: expected {wanted[0]} to {wanted[-1]} by {self.source}, found "
                f"{' and '.join(problems)}. Finish sampling with eval.py, remove what does not belong, or set "
                "--n_samples"
            )

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        file = self.folder / LABELS_FILE
        if len(self.labels) != len(self.indices):
            raise ValueError(f"{file}: expected {len(self.indices)} labels, one per image, found {len(self.labels)}")
        if "dataset.n_classes" in self.settings and "n_samples" in self.settings:
            for i, label in zip(self.indices, self.labels, strict=True):
                expected = balanced_label(i, self.settings["n_samples"], self.settings["dataset.n_classes"])
                if label != expected:
                    raise ValueError(
                        f"{file}: expected label {expected} for image {i} by {SETTINGS_FILE}, found {label}: run "
                        "eval.py again, which writes it"
                    )

    def read(self, path: Path, indices: range) -> np.ndarray | str:
        """Images of one of the files, (n, H, W, 3) uint8, or a string that says why they cannot be used."""
        if path.suffix == ".npz":
            start = self.indices.start
            return read_shard(path, self.labels and self.labels[indices.start - start : indices.stop - start])
        image = read_image(path)
        return image if isinstance(image, str) else image[None]


class SampleSet:
    """All images of a set, in index order, read as they are used.

    Args:
        folders: one or several.
        n_samples: images expected; None: what sampling.json says, else as many as in class_lab.txt, else as found.

    Attributes:
        count: N. size: (H, W) in pixels. labels: N of them, or None. settings: without the range.

    Raises:
        ValueError: as `Part`; folders made with other settings; images that are in two folders or in none.
    """

    def __init__(self, *folders: str | Path, n_samples: int | None = None):
        self.parts = sorted((Part(folder, n_samples) for folder in folders), key=lambda part: part.indices.start)
        first = self.parts[0]
        self.settings = {name: value for name, value in first.settings.items() if name != RANGE}
        for part in self.parts[1:]:
            different = differences(part.settings, first.settings, but=(RANGE, "output"))
            if RANGE not in part.settings or RANGE not in first.settings or different:
                reason = "; ".join(different) or f"no {RANGE} in {SETTINGS_FILE}"
                raise ValueError(
                    f"{part.folder} is no part of one set with {first.folder} ({reason}): give folders that "
                    "eval.py made with the same settings but for --indices or --classes"
                )
        self._check_ranges(n_samples)
        self.count = self.parts[-1].indices.stop
        labels = [part.labels for part in self.parts]
        self.labels = None if None in labels else [label for some in labels for label in some]
        image = first.read(*first.files[0])
        if isinstance(image, str):
            raise ValueError(f"{first.files[0][0]} {image}")
        self.size = image.shape[1:3]

    def _check_ranges(self, n_samples: int | None) -> None:
        expected = 0
        total = self.parts[-1].indices.stop if n_samples is not None else self.settings.get("n_samples")
        for before, part in zip([None, *self.parts], self.parts, strict=False):
            if part.indices.start < expected:
                raise ValueError(
                    f"{before.folder} holds {span(before.indices)} and {part.folder} {span(part.indices)}: each image "
                    "must be in one folder only"
                )
            if part.indices.start > expected:
                self._raise_absent(range(expected, part.indices.start))
            expected = part.indices.stop
        if total is not None and expected < total:
            self._raise_absent(range(expected, total))

    def _raise_absent(self, indices: range) -> None:
        raise ValueError(
            f"{few([part.folder for part in self.parts])}: {span(indices)} are missing: make them with eval.py "
            f"--indices={indices.start}:{indices.stop} in a folder of their own and give that too"
        )

    @property
    def paths(self) -> list[Path]:
        """The files with the images, in index order."""
        return [path for part in self.parts for path, _ in part.files]

    def files(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Path, range, np.ndarray | str]]:
        """(path, indices, images) of the files that hold some of images start..stop-1, in order.

        `images` is (n, H, W, 3) uint8, or a string that says why the file cannot be used: damaged, of another size, or
        with labels that are not those of class_lab.txt. Some are decoded in advance, READ_AHEAD images at most.
        """
        wanted = range(start, self.count if stop is None else stop)
        chosen = [(part, *file) for part in self.parts for file in part.files if common(file[1], wanted)]
        ahead = max(1, READ_AHEAD // max((len(indices) for _, _, indices in chosen), default=1))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i in range(0, len(chosen), ahead):
                some = chosen[i : i + ahead]
                contents = pool.map(lambda file: file[0].read(*file[1:]), some)
                for (_, path, indices), images in zip(some, contents, strict=True):
                    if not isinstance(images, str) and images.shape[1:3] != self.size:
                        (h, w), (h0, w0) = images.shape[1:3], self.size
                        images = f"is {w}x{h}, expected {w0}x{h0} like {self.paths[0].name}"
                    yield path, indices, images

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images start..stop-1 (default: all) as uint8 (B, H, W, 3), B = batch_size but for the last.

        Raises ValueError for a file that cannot be used.
        """
        stop = self.count if stop is None else stop
        waiting: list[np.ndarray] = []
        for path, indices, images in self.files(start, stop):
            if isinstance(images, str):
                raise ValueError(f"{path} {images}: remove it and run eval.py again, which makes only what is missing")
            own = common(indices, range(start, stop))
            waiting.append(images[own.start - indices.start : own.stop - indices.start])
            while sum(map(len, waiting)) >= batch_size:
                together = np.concatenate(waiting)
                yield together[:batch_size]
                waiting = [together[batch_size:]]
        if sum(map(len, waiting)):
            yield np.concatenate(waiting)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; the function returned waits, in any thread, and gives the CPU tensor."""
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # blocking: waiting sleeps
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
