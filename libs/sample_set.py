"""A sampled set of images on disk: eval.py writes it, img2npz.py and the scores read it.

A folder holds the images of one range of indices of a set as <index>.png, or as other programs name them: 000000.png,
with as many digits in each. Beside them lie sampling.json, all that decides the images, and class_lab.txt, one label
per line in index order. A set is one folder, or several whose ranges are disjoint and together the whole.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from libs import UserError
from libs.files import read_json, replacing
from libs.images import is_data

SETTINGS_FILE = "sampling.json"
LABELS_FILE = "class_lab.txt"
RANGE = "indices"  # the setting that differs between the parts of a set: [first, end)
IMAGE_NAME = re.compile(r"(0|[1-9][0-9]*)\.png")
ZEROS, PADDED_NAME = re.compile(r"00+\.png"), re.compile(r"[0-9]+\.png")
PNG_END = bytes.fromhex("49454e44ae426082")  # the IEND chunk: a PNG without it is cut short
READ_AHEAD = 256  # images decoded at a time: 50 MB at 256x256


def balanced_label(index: int, n_samples: int, n_classes: int) -> int:
    """Return the label of sample `index` of a class-balanced set; 0, the null label, if unconditional."""
    return index * n_classes // n_samples


def batches_of(indices: range, n_samples: int, batch_size: int) -> list[range]:
    """Return the batches that hold `indices`. They depend on the set alone, not on which part of it is made."""
    starts = range(indices.start // batch_size * batch_size, indices.stop, batch_size)
    return [range(start, min(start + batch_size, n_samples)) for start in starts]


def intersect(a: range, b: range) -> range:
    """Return the indices that are in both of two ranges."""
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def span(indices: range) -> str:
    """Say a range in words: "images 0 to 49"."""
    return f"images {indices.start} to {indices.stop - 1}"


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image (H, W, 3) whole or not at all. Raises WriteError.

    It is not forced to the disk, which is slow for so many: `missing_files` finds a PNG that a power cut left short.
    """
    with replacing(path, "set another folder", sync=False) as file:
        Image.fromarray(image).save(file, format="png", compress_level=1)


def missing_files(folder: Path, indices: Iterable[int]) -> list[int]:
    """Return those of `indices` whose PNG `folder` lacks or holds cut short. Reads the last bytes of each."""

    def is_complete(path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                file.seek(-len(PNG_END), os.SEEK_END)
                return file.read() == PNG_END
        except OSError:
            return False

    return [i for i in indices if not is_complete(folder / f"{i}.png")]


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed program left half-written. Call it while nobody writes into `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


class SetWriter:
    """Write batches of a set by threads, while sampling goes on; `put` waits where `depth` batches are unwritten."""

    def __init__(self, folder: Path, depth: int = 3):
        self.folder, self.depth = folder, depth
        self.pool = ThreadPoolExecutor(4)
        self.pending: deque[list[Future]] = deque()

    def put(self, indices: range, images: Callable[[], np.ndarray], wanted: Iterable[int]) -> None:
        """Write the images `wanted` of a batch of `indices`. Raises what an earlier writing raised, such as WriteError.

        Args:
            images: gives the batch when called, uint8 (B, H, W, 3); it may wait, and is called by threads.
        """
        while len(self.pending) >= self.depth:
            self._finish_oldest()

        def write(i: int) -> None:
            write_png(images()[i - indices.start], self.folder / f"{i}.png")

        self.pending.append([self.pool.submit(write, i) for i in wanted])

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


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; the function returned waits, in any thread, and gives the CPU tensor."""
    if not tensor.is_cuda:
        return lambda: tensor
    host, device = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), tensor.device
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # blocking: waiting sleeps
    copied.record()

    def wait() -> Tensor:
        with torch.cuda.device(device):  # a new thread's current GPU is the first, where this would take memory
            copied.synchronize()
        return host

    return wait


def shorten(names: Sequence) -> str:
    """List the first five names, for a message."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def read_settings(folder: Path) -> dict:
    """Read sampling.json of a folder; empty if there is none. Raises UserError where it is damaged."""
    try:
        return read_json(folder / SETTINGS_FILE, f"remove {folder} and sample again")
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class Part:
    """One folder of a set: its settings, the indices of its images, the digits in each of their names at least, and
    their labels, None without class_lab.txt.
    """

    folder: Path
    settings: dict
    indices: range
    digits: int
    labels: list[int] | None

    def names(self) -> list[str]:
        """Return the names of its images, in order."""
        return [f"{i:0{self.digits}}.png" for i in self.indices]


def open_part(folder: Path, n_samples: int | None = None) -> Part:
    """Open one folder of a set.

    Raises FileNotFoundError; UserError for missing or extra files, or labels that are not the images'.

    Args:
        n_samples: images expected; None: what sampling.json says, else as many as in class_lab.txt, else as found.
    """
    names = {entry.name for entry in os.scandir(folder) if is_data(entry.name)} - {SETTINGS_FILE, LABELS_FILE}
    first = min(names, default="")
    digits = len(first) - len(".png") if ZEROS.fullmatch(first) and len({len(name) for name in names}) == 1 else 1
    settings, labels_file = read_settings(folder), folder / LABELS_FILE
    labels = expected_labels = None
    try:
        if labels_file.exists():
            labels = [int(word) for word in labels_file.read_text().split()]
        if n_samples is not None:
            indices, source = range(n_samples), "--n_samples"
        elif RANGE in settings:
            first, end = settings[RANGE]
            indices, source = range(first, end), SETTINGS_FILE
        elif labels is not None:
            indices, source = range(len(labels)), LABELS_FILE
        else:
            pattern = IMAGE_NAME if digits == 1 else PADDED_NAME
            indices, source = range(sum(bool(pattern.fullmatch(name)) for name in names)), "the images found"
        if {"dataset.n_classes", "n_samples"} <= settings.keys():
            total, n_classes = settings["n_samples"], settings["dataset.n_classes"]
            expected_labels = [balanced_label(i, total, n_classes) for i in indices]
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder}: {SETTINGS_FILE} or {LABELS_FILE} is damaged ({error}): sample again") from error
    wanted = Part(folder, settings, indices or range(1), digits, labels).names()
    missing, extra = [name for name in wanted if name not in names], sorted(names.difference(wanted))
    if missing or extra:
        problems = [f"{len(x)} {what} ({shorten(x)})" for x, what in ((missing, "missing"), (extra, "extra")) if x]
        found = f"{folder}: expected {wanted[0]} to {wanted[-1]} by {source}, found {' and '.join(problems)}"
        advice = "re-run eval.py, remove what does not belong, or set --n_samples"
        if not settings:
            advice += "; name images of other programs 0.png, 1.png, ... or all with as many digits, from 000000.png on"
        raise UserError(f"{found}: {advice}")
    if labels is not None and (len(labels) != len(indices) or labels != (expected_labels or labels)):
        raise UserError(f"{labels_file} does not hold the labels of {span(indices)}: re-run eval.py, which writes it")
    return Part(folder, settings, indices, digits, labels)


class SampleSet:
    """All images of a set, in index order, read as they are used.

    Args:
        n_samples: images expected, as of `open_part`.

    Attributes:
        folders: in index order. paths: N PNGs. count: N. size: (H, W) in pixels. labels: N of them, or None.
        settings: without the range. name: for messages.

    Raises the errors of `open_part`, and UserError for folders of other settings and images in two folders or in none.
    """

    def __init__(self, *folders: str | Path, n_samples: int | None = None):
        parts = sorted((open_part(Path(folder), n_samples) for folder in folders), key=lambda part: part.indices.start)
        first = parts[0]
        self.settings = {name: value for name, value in first.settings.items() if name != RANGE}
        for part in parts[1:]:
            names = (part.settings.keys() | first.settings.keys()) - {RANGE}
            different = sorted(name for name in names if part.settings.get(name) != first.settings.get(name))
            if different or RANGE not in part.settings:
                reason = f"{', '.join(different)} differ" if different else f"no {RANGE} in {SETTINGS_FILE}"
                raise UserError(f"{part.folder} and {first.folder} are of two sets ({reason}): give parts of one")
        self.folders = [part.folder for part in parts]
        self.count = parts[-1].indices.stop
        total = self.count if n_samples is not None else self.settings.get("n_samples", self.count)
        end = 0
        for indices in [*(part.indices for part in parts), range(total, total)]:
            if indices.start != end:
                problem = f"{span(range(indices.start, end))} are in two folders: give each once"
                if indices.start > end:
                    way_out = f"make them with eval.py --indices={end}:{indices.start} in a folder of their own"
                    problem = f"{span(range(end, indices.start))} are missing: {way_out}"
                raise UserError(f"{shorten(self.folders)}: {problem}")
            end = indices.stop
        self.paths = [part.folder / name for part in parts for name in part.names()]
        labels = [part.labels for part in parts]
        self.labels = None if None in labels else list(chain.from_iterable(labels))
        self.name, self.size = str(first.folder), None
        self.size = next(self.images([0])).shape[:2]

    def _read(self, path):
        """Read an 8-bit RGB PNG of the set's size as (H, W, 3) uint8; a string says why a file is none."""
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.mode != "RGB":
                    return f"{path} is of mode {image.mode}, expected RGB"
                pixels = np.asarray(image)
        except Exception as error:  # Pillow's errors are of many types
            return f"{path} cannot be read as PNG ({error})"
        if self.size and pixels.shape[:2] != self.size:
            (h, w), (h0, w0) = pixels.shape[:2], self.size
            return f"{path} is {w}x{h}, expected {w0}x{h0} like {self.paths[0].name}"
        return pixels

    def read(self, indices: Sequence[int] | None = None) -> Iterator[np.ndarray | str]:
        """Read the images at `indices`, all unless given: (H, W, 3) uint8, or a string that says why one is refused."""
        indices = range(self.count) if indices is None else indices
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i in range(0, len(indices), READ_AHEAD):
                yield from pool.map(self._read, [self.paths[k] for k in indices[i : i + READ_AHEAD]])

    def images(self, indices: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Read the images at `indices`, all unless given: (H, W, 3) uint8. Raises UserError for one that is refused."""
        for image in self.read(indices):
            if isinstance(image, str):
                raise UserError(f"{image}: remove it and re-run eval.py, which makes what is missing")
            yield image
