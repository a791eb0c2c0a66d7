"""Reading the ImageNet features that other projects' scripts write, so that they need not be extracted again.

Each format is a class with `len()`, `flips` (whether record 2i + 1 mirrors record 2i; then `len` counts the pairs),
`labels(first, last)` and `read(first, last)`, which gives float32 (n or 2n, channels, h, w). What is read was written
by others: it is checked, errors name the file, and no code in it is run.
"""

import io
import math
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from libs.files import read_npy_header


class UViTFolder:
    """U-ViT's and DiMR's `{index}.npy`: a pickled pair of moments (2C, h, w) and label, also as an object array.

    Their scripts encode a batch and its mirror images one after the other, so the views of an image do not lie
    together: they are records like any other here.
    """

    flips = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.n = _count_numbered(self.folder)

    def __len__(self) -> int:
        return self.n

    def labels(self, first: int, last: int) -> np.ndarray:
        return np.array([read_pair(self.folder / f"{i}.npy")[1] for i in range(first, last)], dtype=np.int64)

    def read(self, first: int, last: int) -> np.ndarray:
        files = [self.folder / f"{i}.npy" for i in range(first, last)]
        return _stack([read_pair(file)[0] for file in files], files)


class FastDiTFolder:
    """fast-DiT's `*_features/{index}.npy`, (1, C, h, w), beside `*_labels/{index}.npy`, (1,).

    They hold one latent per image, drawn once and times the scaling factor.
    """

    flips = False

    def __init__(self, folder: str | Path):
        self.folders = []
        for kind in ("features", "labels"):
            found = sorted(path for path in Path(folder).glob(f"*_{kind}") if path.is_dir())
            if len(found) != 1:
                raise ValueError(
                    f"{folder} should hold one folder *_{kind}, found {len(found)}: expected fast-DiT's pair"
                )
            self.folders.append(found[0])
        features, labels = (_count_numbered(path) for path in self.folders)
        if features != labels:
            raise ValueError(
                f"{self.folders[0]} holds {features} files but {self.folders[1]} {labels}: copy them again"
            )
        self.n = features

    def __len__(self) -> int:
        return self.n

    def labels(self, first: int, last: int) -> np.ndarray:
        files = [self.folders[1] / f"{i}.npy" for i in range(first, last)]
        return np.array([_as_label(read_plain_npy(file), file) for file in files], dtype=np.int64)

    def read(self, first: int, last: int) -> np.ndarray:
        files = [self.folders[0] / f"{i}.npy" for i in range(first, last)]
        arrays = [read_plain_npy(file) for file in files]
        return _stack([a[0] if a.ndim == 4 and len(a) == 1 else a for a in arrays], files)


class LightningDiTFolder:
    """LightningDiT's `*.safetensors` shards with `latents` and `latents_flip` (n, C, h, w), and `labels` (n,).

    They hold one latent per view, drawn once, not scaled.
    """

    flips = True

    def __init__(self, folder: str | Path):
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise FileNotFoundError(f"No .safetensors files in {folder}: expected LightningDiT's shards")
        self.starts = np.cumsum([0] + [self._count(file) for file in self.files]).tolist()
        if not len(self):
            raise ValueError(f"The .safetensors files in {folder} hold no images: expected LightningDiT's shards")

    def __len__(self) -> int:
        return self.starts[-1]

    def labels(self, first: int, last: int) -> np.ndarray:
        labels = np.concatenate(self._slices("labels", first, last))
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{self.files[0].parent}: labels should be integers, one per image, found {labels.dtype}")
        return labels.astype(np.int64)

    def read(self, first: int, last: int) -> np.ndarray:
        plain, mirrored = (np.concatenate(self._slices(name, first, last)) for name in ("latents", "latents_flip"))
        return np.stack([plain, mirrored], axis=1).reshape(-1, *plain.shape[1:])

    def _count(self, file):
        names = ("latents", "latents_flip", "labels")
        with _opened(file) as shard:
            missing = [name for name in names if name not in shard.keys()]  # noqa: SIM118 (not a dict)
            if missing:
                raise ValueError(f"{file} has no {' and no '.join(missing)}: expected LightningDiT's shards")
            shapes = [shard.get_slice(name).get_shape() for name in names]
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[2] != shapes[0][:1]:
            raise ValueError(
                f"{file}: latents, latents_flip and labels should be (n, C, h, w), the same, and (n,); found {shapes}"
            )
        return shapes[0][0]

    def _slices(self, name, first, last):
        """The parts of tensor `name` for images first..last - 1, of each file that has some, as numpy."""
        parts = []
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:], strict=True):
            if start < last and stop > first:
                with _opened(file) as shard:
                    part = shard.get_slice(name)[max(first - start, 0) : min(last, stop) - start]
                parts.append((part.float() if part.is_floating_point() else part).numpy())
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(f"The files in {self.files[0].parent} hold {name} of different shapes: import them apart")
        return parts


FORMATS = {"uvit": UViTFolder, "fast-dit": FastDiTFolder, "lightningdit": LightningDiTFolder}


def read_pair(file: str | Path) -> tuple[np.ndarray, int]:
    """(moments (2C, h, w), label) of one of U-ViT's .npy files, or of a plain pickle of the pair.

    Only numpy arrays, numpy scalars and plain numbers are admitted. Raises ValueError naming the file otherwise.
    """
    data = Path(file).read_bytes()
    if not data.startswith(pickle.PROTO):
        opened = io.BytesIO(data)
        shape, dtype = read_npy_header(opened, file)
        if not dtype.hasobject:
            raise ValueError(f"{file} holds {dtype} numbers of shape {shape}: expected a pair of moments and label")
        data = data[opened.tell() :]
    pair = load_arrays(data, file)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], np.ndarray):
        raise ValueError(f"{file} should hold a pair of moments and label, found {type(pair).__name__}")
    return pair[0], _as_label(pair[1], file)


def read_plain_npy(file: str | Path) -> np.ndarray:
    """A .npy file of numbers. Raises ValueError naming the file, also if it would need unpickling."""
    data = io.BytesIO(Path(file).read_bytes())
    shape, dtype = read_npy_header(data, file)
    values = data.read()
    if dtype.kind not in "fiu" or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{file} is not a whole .npy file of numbers: found {dtype}, {shape} and {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)


def load_arrays(data: bytes, name: str | Path) -> object:
    """Unpickles numbers, numpy arrays and scalars, and tuples and lists of them. Everything else is refused.

    An array of objects comes back as a (flat) list. Raises ValueError naming `name`.
    """
    try:
        return _value(_ArrayUnpickler(io.BytesIO(data)).load())
    except _Refused as error:
        raise ValueError(
            f"{name} was not loaded: it holds {error}, and only numpy arrays and numbers are read"
        ) from error
    # The opcodes of a damaged pickle fail in any way their operands can: the file is what is wrong.
    except Exception as error:
        raise ValueError(f"{name} is not a readable pickle: {type(error).__name__}: {error}") from error


class _Refused(Exception):
    pass


class _Dtype:
    """Stands for `numpy.dtype` while unpickling, which takes the byte order afterwards."""

    def __init__(self, name, align=False, copy=False):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    @property
    def is_object(self):
        return self.name in ("O8", "O4", "O")

    def resolve(self):
        if not (
            isinstance(self.name, str) and re.fullmatch("[fiu][1248]", self.name) and self.order in ("<", ">", "|", "=")
        ):
            raise _Refused(f"values of dtype {self.order!r} {self.name!r}")
        return np.dtype(self.order + self.name)


class _Array:
    """Stands for an array while unpickling: numpy's own reconstruction trusts its operands, this does not."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def value(self):
        if self.dtype.is_object:
            return [_value(item) for item in self.data]
        values = np.frombuffer(self.data, self.dtype.resolve())
        return values.reshape(self.shape, order="F" if self.is_fortran else "C")


def _reconstruct(subtype, shape, typecode):
    return _Array()


def _scalar(dtype, data):
    (value,) = np.frombuffer(data, dtype.resolve())
    return value


def _encode(text, encoding):
    return text.encode("latin1")  # how protocol 2 writes bytes; other encodings are never written


def _value(item):
    if isinstance(item, _Array):
        return item.value()
    if isinstance(item, (tuple, list)):
        return type(item)(_value(part) for part in item)
    if isinstance(item, (int, float, np.number)):
        return item
    raise _Refused(f"a {type(item).__name__}")


class _ArrayUnpickler(pickle._Unpickler):
    """Python's unpickler in Python (the one in C can be made to take any amount of memory by one opcode), with the
    opcodes that numpy's arrays and numbers need, and stand-ins for the functions they name."""

    dispatch = {  # noqa: RUF012 (as in the base class)
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL),
            *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
            *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.REDUCE, pickle.BUILD),
        )
    }
    admitted = {  # noqa: RUF012 (a constant)
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        **{
            (f"numpy.{core}.multiarray", name): function
            for core in ("core", "_core")
            for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
        },
    }

    def find_class(self, module, name):
        if (module, name) not in self.admitted:
            raise _Refused(f"a reference to {module}.{name}")
        return self.admitted[module, name]


def _as_label(value, file):
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{file} should hold one integer label, found {array.dtype} of shape {array.shape}")
    return int(array.reshape(()))


def _count_numbered(folder):
    """n, if the folder holds 0.npy to (n - 1).npy. Raises ValueError or FileNotFoundError naming what is missing."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"No folder of features at {folder}")
    numbers = {int(path.stem) for path in Path(folder).glob("*.npy") if re.fullmatch(r"\d+", path.stem)}
    if not numbers:
        raise ValueError(f"{folder} holds no files 0.npy, 1.npy, ...")
    missing = sorted(set(range(len(numbers))) - numbers)
    if missing:
        raise ValueError(
            f"{folder} holds {len(numbers)} files up to {max(numbers)}.npy but {missing[0]}.npy is missing"
        )
    return len(numbers)


def _stack(arrays, files):
    for array, file in zip(arrays, files, strict=True):
        if array.ndim != 3 or array.dtype.kind != "f" or array.shape != arrays[0].shape:
            raise ValueError(
                f"{file} should hold floats of shape {arrays[0].shape if arrays[0].ndim == 3 else '(channels, h, w)'}, "
                f"found {array.dtype} of shape {array.shape}"
            )
    return np.stack(arrays).astype(np.float32, copy=False)


@contextmanager
def _opened(file):
    """safetensors.safe_open, with its errors turned into ValueErrors that name the file."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
