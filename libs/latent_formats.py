"""Readers of the ImageNet latents that other projects' scripts write, so that they need not be extracted again.

A reader has `len()`, the number of images; `labels(first, last)`; `read(first, last)`, which gives float32
(n, channels, h, w) of images first..last - 1; `flips`, with which `read` gives 2n views, each image followed by its
mirror image; `moments`, whether it gives these or sampled latents; and `scaled`, whether those are normalized. Files
are checked, errors name them, and no code in them is run.
"""

import io
import math
import pickle
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open

from libs import UserError
from libs.files import read_npy_header

MAX_PICKLE_BYTES = 1 << 22  # 32 times the moments of a 512-pixel image; bounds what unpickling can take


class UViTFolder:
    """U-ViT's and DiMR's `{index}.npy`: a pickled pair of moments (2C, h, w) and label, also as an object array.

    Their scripts encode a batch and then its mirror images: the views of an image are apart, and images of their own.
    """

    flips, moments, scaled = False, True, False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.n = _count_numbered(self.folder)

    def __len__(self) -> int:
        return self.n

    def labels(self, first: int, last: int) -> np.ndarray:
        return np.array([read_pair(self.folder / f"{i}.npy")[1] for i in range(first, last)])

    def read(self, first: int, last: int) -> np.ndarray:
        files = [self.folder / f"{i}.npy" for i in range(first, last)]
        return stack([read_pair(file)[0] for file in files], files)


class FastDiTFolder:
    """fast-DiT's `*_features/{index}.npy`, (1, C, h, w), beside `*_labels/{index}.npy`, (1,).

    They hold one latent per image, sampled once and times the scaling factor.
    """

    flips, moments, scaled = False, False, True

    def __init__(self, folder: str | Path):
        found = [sorted(Path(folder).glob(f"*_{kind}/")) for kind in ("features", "labels")]
        counts = [[_count_numbered(place) for place in places] for places in found]
        if len(counts[0]) != 1 or counts[0] != counts[1]:
            raise UserError(f"{folder} should hold one folder *_features and one *_labels, of as many; found {counts}")
        ((self.features,), (self.label_folder,)), self.n = found, counts[0][0]

    def __len__(self) -> int:
        return self.n

    def labels(self, first: int, last: int) -> np.ndarray:
        files = [self.label_folder / f"{i}.npy" for i in range(first, last)]
        return np.array([as_label(read_plain_npy(file), file) for file in files])

    def read(self, first: int, last: int) -> np.ndarray:
        files = [self.features / f"{i}.npy" for i in range(first, last)]
        return stack([array[0] if array.shape[:1] == (1,) else array for array in map(read_plain_npy, files)], files)


class LightningDiTFolder:
    """LightningDiT's `*.safetensors` shards with `latents` and `latents_flip` (n, C, h, w), and `labels` (n,).

    They hold one latent per view, sampled once, not scaled.
    """

    flips, moments, scaled = True, False, False

    def __init__(self, folder: str | Path):
        self.files, self.starts, first = sorted(Path(folder).glob("*.safetensors")), [0], None
        for file in self.files:
            with _opened(file) as shard:
                slices = [shard.get_slice(name) for name in ("latents", "latents_flip", "labels")]
                latents, flipped, labels = ((part.get_dtype(), *part.get_shape()) for part in slices)
                first = first or latents
                fits = len(latents) == 5 and latents[2:] == first[2:] and "F" in latents[0] and labels[0][0] == "I"
                if not fits or flipped != latents or labels[1:] != latents[1:2]:
                    raise ValueError(f"found latents {latents}, latents_flip {flipped}, labels {labels}; first {first}")
            self.starts.append(self.starts[-1] + latents[1])
        if not len(self):
            raise UserError(
                f"{folder} should hold LightningDiT's .safetensors shards; found no record in {len(self.files)}"
            )

    def __len__(self) -> int:
        return self.starts[-1]

    def labels(self, first: int, last: int) -> np.ndarray:
        return self._slices("labels", first, last)

    def read(self, first: int, last: int) -> np.ndarray:
        plain, mirrored = (self._slices(name, first, last) for name in ("latents", "latents_flip"))
        return np.stack([plain, mirrored], axis=1).reshape(-1, *plain.shape[1:])

    def _slices(self, name, first, last):
        """Return images first..last - 1 of tensor `name`, which may lie in several files, as float32 or int64."""
        parts = []
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:], strict=True):
            if start < last and stop > first:
                with _opened(file) as shard:
                    part = shard.get_slice(name)[max(first - start, 0) : min(last, stop) - start]
                    parts.append((part.long() if name == "labels" else part.float()).numpy())
        return np.concatenate(parts)


FORMATS = {"uvit": UViTFolder, "fast-dit": FastDiTFolder, "lightningdit": LightningDiTFolder}


def read_pair(file: str | Path) -> tuple[np.ndarray, int]:
    """Read (moments (2C, h, w), label) from one of U-ViT's .npy files, or from a plain pickle of the pair.

    Only numpy arrays and numbers are admitted. Raises UserError naming the file otherwise.
    """
    if Path(file).stat().st_size > MAX_PICKLE_BYTES:
        raise UserError(f"{file} is larger than {MAX_PICKLE_BYTES} bytes: expected a pair of moments and label")
    data = io.BytesIO(Path(file).read_bytes())
    if not data.getvalue().startswith(pickle.PROTO):
        read_npy_header(data, file)
    try:
        pair = _ArrayUnpickler(data).load()
        if isinstance(pair, _Array):  # of two objects
            pair = pair.data
        moments, label = (item.value() if isinstance(item, _StandIn) else item for item in pair)
        if not (isinstance(moments, np.ndarray) and isinstance(label, int | np.ndarray | np.generic)):
            raise TypeError(f"found {type(moments).__name__} and {type(label).__name__}")
    except Exception as error:  # the opcodes of a damaged pickle fail in any way their operands can
        raise UserError(f"{file} is not a pair of numpy moments and label: {error!r:.200}") from error
    return moments, as_label(label, file)


def read_plain_npy(file: str | Path, contents: bytes | None = None) -> np.ndarray:
    """Read a .npy file of numbers, or its `contents`. Raises UserError naming it, also if it would need unpickling."""
    data = io.BytesIO(Path(file).read_bytes() if contents is None else contents)
    shape, dtype = read_npy_header(data, file)
    values = data.read()
    if dtype.kind not in "fiu" or len(values) != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{file} is not a whole .npy file of numbers: found {dtype}, {shape} and {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)


class _StandIn:
    """Base of the classes in place of numpy's, which trust what a pickle gives them.

    With __setstate__, the opcode BUILD can change no attribute.
    """

    def __setstate__(self, state):
        pass


class _Array(_StandIn):
    """Stands for numpy.ndarray, and for the function that makes an empty one."""

    def __init__(self, subtype, shape, typecode):
        self.dtype = None

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def value(self):
        values = np.frombuffer(self.data, self.dtype.value())
        return values.reshape(self.shape, order="F" if self.is_fortran else "C")


class _Scalar(_StandIn):
    def __init__(self, dtype, data):
        self.dtype, self.data = dtype, data

    def value(self):
        (value,) = np.frombuffer(self.data, self.dtype.value())
        return value


class _Dtype(_StandIn):
    """Stands for numpy.dtype, which takes the byte order afterwards."""

    def __init__(self, name, align, copy):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    def value(self):
        if not re.fullmatch("[<>|=][fiu][1248]", self.order + self.name):
            raise TypeError(f"values of dtype {self.name}")
        return np.dtype(self.order + self.name)


class _Bytes(bytes, _StandIn):
    """Stands for _codecs.encode, with which protocol 2 writes bytes."""

    def __new__(cls, text, encoding):
        return super().__new__(cls, text, "latin1")


# They allocate what an operand says, or hash: of nested tuples that takes exponential time.
UNSAFE = (pickle.BYTEARRAY8, pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.FROZENSET, pickle.ADDITEMS)


class _ArrayUnpickler(pickle._Unpickler):
    """Python's unpickler in Python: the one in C can be made to take any amount of memory by one opcode."""

    dispatch = {  # noqa: RUF012 (as in the base class)
        code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in UNSAFE
    }
    admitted = {  # noqa: RUF012 (a constant)
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "_codecs.encode": _Bytes,
        **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.admitted:
            raise pickle.UnpicklingError(f"it holds a reference to {module}.{name}")
        return self.admitted[f"{module}.{name}"]


def as_label(value: int | np.ndarray, file: str | Path) -> int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{file} should hold one integer label, found {array.dtype} of shape {array.shape}")
    return int(array.reshape(()))


def _count_numbered(folder):
    """Return n, if the folder holds 0.npy to (n - 1).npy. Raises UserError naming what is missing."""
    numbers = {int(path.stem) for path in folder.glob("*.npy") if re.fullmatch(r"\d+", path.stem)}
    missing = [i for i in range(max(len(numbers), 1)) if i not in numbers]
    if missing:
        raise UserError(f"{folder} should hold 0.npy, 1.npy, ... without gaps: {missing[0]}.npy is missing")
    return len(numbers)


def stack(arrays: Sequence[np.ndarray], files: Sequence) -> np.ndarray:
    """Stack float arrays of one shape (channels, h, w) as float32. Raises UserError naming the file of another."""
    for array, file in zip(arrays, files, strict=True):
        if array.ndim != 3 or array.dtype.kind != "f" or array.shape != arrays[0].shape:
            shape = arrays[0].shape if arrays[0].ndim == 3 else "(channels, h, w)"
            raise UserError(f"{file} should hold floats of shape {shape}, found {array.dtype} of shape {array.shape}")
    return np.stack(arrays).astype(np.float32, copy=False)


@contextmanager
def _opened(file):
    """Open a safetensors file; errors of the block become UserErrors that name it."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except Exception as error:  # damaged, a tensor is missing, or of another shape
        raise UserError(f"{file} is not a shard of LightningDiT's: {error}") from error
