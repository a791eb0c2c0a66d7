"""Files that are whole or not there, their hashes, and the header of a .npy file."""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextmanager
def replacing(path: str | Path, way_out: str = "set --out") -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only once it is whole and on the disk.

    On any error the temporary file is removed and whatever was at `path` stays. OSErrors name `path` and `way_out`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with naming_the_way_out(path, way_out):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, setting: str = "--out", endings: Sequence[str] = (), folder: bool = False) -> None:
    """Can a file, or a `folder`, be written at `path`? To be asked before the work that makes it; leaves nothing there.

    Raises:
        ValueError: not one of `endings`, or a folder where a file is wanted or the other way round.
        OSError: nothing can be written there, or in the first folder above it that exists. Both name `setting`.
    """
    path = Path(path)
    if endings and path.suffix not in endings:
        raise ValueError(f"{setting} must end in {' or '.join(endings)}; found {path}")
    if path.exists() and path.is_dir() != folder:
        kinds = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"{setting} must be a {kinds[0]}, and {path} is a {kinds[1]}: set another {setting}")
    place = (path if folder else path.parent).absolute()
    place = next(above for above in (place, *place.parents) if above.exists())
    with naming_the_way_out(path, f"set {setting}"), tempfile.TemporaryFile(dir=place):
        pass


def flush_to_disk(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_the_way_out(path: str | Path, way_out: str = "set --out") -> Iterator[None]:
    """Gives an OSError of the block the path and the way out, once."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # named already
            raise
        raise OSError(
            f"Cannot write {path}: {error.strerror}. Free space or permissions there, or {way_out}"
        ) from error


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: dict) -> str:
    """SHA-256 of a JSON value, as hex: the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_npy_header(file: BinaryIO, name: str | Path) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the header of an open .npy file (version 1.0, C order), leaving the file at its first value.

    Returns (shape, dtype). Raises ValueError, naming `name`, for anything else. Runs no code whatever the file holds.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the .npy format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order or min(shape, default=0) < 0:
            raise ValueError("not a plain array in C order")
    # numpy parses the header as a Python literal and lets through whatever Python's parser raises on a damaged one
    except Exception as error:
        raise ValueError(f"{name} is not a readable .npy file: {error or type(error).__name__}") from error
    return shape, dtype
