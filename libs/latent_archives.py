"""Readers of the latents that EDM2's, REPA's and REPA-E's scripts write: means and deviations by image, with labels.

They hold `00000/img-mean-std-00000000.npy`, ..., (2C, h, w) with C means, then C standard deviations, and
`dataset.json`, {"labels": [[name, label], ...]}: in a folder, a .zip or, of REPA-E, a .h5 file. EDM2's and REPA's are
alike but for the pixels that were encoded, in [0, 1] and in [-1, 1]; the means of their channels tell them apart. The
readers have the attributes of libs.latent_formats.
"""

import functools
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from libs import UserError
from libs.latent_formats import as_label, read_plain_npy, stack
from libs.normalization import EDM2, LOGVAR_RANGE

INDEX = "dataset.json"
N_COMPARED = 64  # images whose channel means are compared with EDM2's


class MeanStdFiles:
    """`img-mean-std-*.npy` in a folder, or a .zip; of REPA also the folder above `vae-sd/`."""

    flips, moments, scaled = False, True, False

    def __init__(self, source: str | Path, edm2: bool = False):
        self.source = Path(source)
        if (self.source / "vae-sd").is_dir():
            self.source = self.source / "vae-sd"
        self.names = sorted(name for name in self._list() if name.endswith(".npy"))
        expected = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(max(len(self.names), 1))]
        if wrong := next(
            (pair for pair in zip(expected, [*self.names, None], strict=False) if pair[0] != pair[1]), None
        ):
            raise UserError(f"{self.source} should hold {wrong[0]}; found {wrong[1]} in its place")
        self._labels = self._read_labels()
        sample = np.unique(np.linspace(0, len(self) - 1, N_COMPARED).round().astype(int))
        means = np.split(self._values([self.names[i] for i in sample]).mean(axis=(0, 2, 3)), 2)[0]
        if edm2 != looks_like_edm2(means):
            found = np.array2string(means, precision=2, threshold=8)
            kind = "repa (pixels in [-1, 1])" if edm2 else "edm2 (pixels in [0, 1])"
            raise UserError(f"{self.source} has channel means {found}: these look like --format {kind}")

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, first: int, last: int) -> np.ndarray:
        return self._labels[first:last]

    def read(self, first: int, last: int) -> np.ndarray:
        mean, std = np.split(self._values(self.names[first:last]), 2, axis=1)
        return np.concatenate([mean, 2 * np.log(np.maximum(std, math.exp(LOGVAR_RANGE[0] / 2)))], axis=1)

    def _values(self, names):
        values = stack([self._array(name) for name in names], names)
        if values.shape[1] % 2:
            raise UserError(f"{self.source} should hold means and deviations; found {values.shape[1]} channels")
        return values

    def _read_labels(self):
        try:
            labels = json.loads(self._bytes(INDEX))["labels"]
            labels = {name: as_label(label, INDEX) for name, label in labels}
            return np.array([labels[name] for name in self.names])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{self.source} should hold {INDEX} with a label of each image; found {error!r}") from error

    @functools.cached_property
    def _zip(self):
        try:
            return zipfile.ZipFile(self.source)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.source} is neither a folder nor a whole .zip file: {error}") from error

    def _list(self):
        if self.source.is_dir():
            return [path.relative_to(self.source).as_posix() for path in self.source.rglob("*.npy")]
        return self._zip.namelist()

    def _bytes(self, name):
        return (self.source / name).read_bytes() if self.source.is_dir() else self._zip.read(name)

    def _array(self, name):
        try:
            return read_plain_npy(name, self._bytes(name))
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.source}: {name} is damaged: {error}") from error


class MeanStdH5(MeanStdFiles):
    """REPA-E's .h5, with a data set for each name and `dataset.json` as a byte string."""

    @functools.cached_property
    def _file(self):
        try:
            import h5py
        except ImportError as error:
            raise UserError("repa-e needs h5py: python -m pip install -r scripts/import_requirements.txt") from error
        try:
            return h5py.File(self.source)
        except OSError as error:
            raise UserError(f"{self.source} is not a whole .h5 file: {error}") from error

    def _list(self):
        return [f"{folder}/{name}" for folder, group in self._file.items() if hasattr(group, "keys") for name in group]

    def _bytes(self, name):
        return bytes(self._file[name][()])

    def _array(self, name):
        return self._file[name][()]


def looks_like_edm2(means: np.ndarray) -> bool:
    """Tell whether channel means (C,) are nearer to EDM2's than to 0, in EDM2's deviations."""
    if len(means) != len(EDM2["latents_mean"]):
        return False
    mean, std = np.array(EDM2["latents_mean"]), np.array(EDM2["latents_std"])
    return np.abs((means - mean) / std).sum() < np.abs(means / std).sum()


ARCHIVES = {"repa": MeanStdFiles, "edm2": functools.partial(MeanStdFiles, edm2=True), "repa-e": MeanStdH5}
