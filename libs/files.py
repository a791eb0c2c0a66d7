"""Files written whole or not at all, files from the Hugging Face hub, digests, the header of a .npy."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import huggingface_hub
import numpy as np

from libs import UserError

SAFETENSORS = "a safetensors file"


class WriteError(UserError, OSError):
    """A file or folder that cannot be written; the message names it, the reason and the setting to change."""


@contextmanager
def replacing(path: str | Path, advice: str = "set --out", sync: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` once it is whole and, if `sync`, on the disk.

    On any error the temporary file is removed and whatever was at `path` stays. Raises WriteError, with `advice`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with advise_on_write_error(path, advice):
        try:
            with open(temporary, "xb") as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if sync:
                flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder, which is renamed to `path` at the end of the block and removed on any error.

    Its files get the mode that the umask asks for, which safetensors passes over.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*.safetensors"):
            file.chmod(temporary.stat().st_mode & 0o666)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | Path, setting: str = "--out", endings: Sequence[str] = (), folder: bool = False) -> None:
    """Check, before the work that makes it, that a file or `folder` can be written at `path`; leave nothing there.

    Raises UserError, naming `setting`: a wrong ending, a folder in place of a file or the reverse, or nothing can be
    written in the first existing folder above `path`.
    """
    path = Path(path)
    if (endings and path.suffix not in endings) or (path.exists() and path.is_dir() != folder):
        expected = "folder" if folder else f"{' or '.join(endings)} file".strip()
        raise UserError(f"{setting} must be a {expected}; found the {'folder' if path.is_dir() else 'file'} {path}")
    place = (path if folder else path.parent).absolute()
    place = next(above for above in (place, *place.parents) if above.exists())
    with advise_on_write_error(path, f"set {setting}"), tempfile.TemporaryFile(dir=place):
        pass


def flush_to_disk(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def advise_on_write_error(path: str | Path, advice: str = "set --out") -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names `path`, the reason and `advice`."""
    try:
        yield
    except WriteError:  # has its advice
        raise
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f"Cannot write {path}: {reason}. Free space or permissions there, or {advice}") from error


def hub_download(repository: str, file: str, whole_repository: bool = False) -> Path:
    """Return the local path of a file on the Hugging Face hub: from the cache, else fetched unless HF_HUB_OFFLINE=1.

    Raises UserError with the command to run elsewhere, for the file or for the `whole_repository`.
    """
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # otherwise each retry prints a line
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)  # hf_hub_download would ask the network
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        what = repository if whole_repository else f"{repository} {file}"
        raise UserError(
            f"{file} of the Hugging Face repository {repository} is not here and could not be fetched ({reason}): "
            f"run `hf download {what} --local-dir assets` where there is a network, copy it here and give its path"
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)


def file_kind(path: str | Path) -> str | None:
    """Tell by its first bytes what a file is that its name does not say; None for none of these."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (of a download that failed?)"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs (run git lfs pull)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    return "a JSON file" if text.startswith((b"{", b"[")) else None


def file_digest(path: str | Path) -> str:
    """Compute the SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: dict) -> str:
    """Compute the SHA-256 of a JSON value, as hex: the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, advice: str = "copy or make it again") -> dict:
    """Read a file that holds a JSON object. Raises UserError, with `advice`, for anything else."""
    try:
        return dict(json.loads(path.read_bytes()).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200}): {advice}") from error


def read_npy_header(file: BinaryIO, name: str | Path) -> tuple[tuple[int, ...], np.dtype]:
    """Read (shape, dtype) from an open .npy file of version 1.0 in C order, and leave it at its first value.

    Raises UserError naming `name` for anything else. Runs no code, whatever the file holds.
    """
    problem = "not version 1.0, or not a plain array in C order"
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if version == (1, 0) and not fortran_order and min(shape, default=0) >= 0:
            return shape, dtype
    except Exception as error:  # a damaged header can make Python's parser fail in any way
        problem = str(error) or type(error).__name__
    raise UserError(f"{name} is not a readable .npy file: {problem}")
