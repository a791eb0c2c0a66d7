"""The ADM evaluation suite: from two sets of images to FID, sFID, Inception Score, precision and recall.

Definitions: openai/guided-diffusion, evaluations/evaluator.py. A set of images is kept as the pool features and logits
of each (12 KB per image) and the statistics of the spatial features.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libs.inception import POOL, SPATIAL, AdmInception
from libs.latents import read_npy_header
from libs.metrics import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    precision_recall,
)

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)

# Score -> the arrays of a reference .npz that hold its Gaussian, and their dimensions.
STATISTICS = {"fid": ("mu", "sigma", POOL), "sfid": ("mu_s", "sigma_s", SPATIAL)}


# --- Files ------------------------------------------------------------------------------------------------------------


class NpzImages:
    """The images of an .npz, uint8 `arr_0` (N, H, W, 3), read from the archive as they are used.

    Attributes:
        count: N. size: (H, W) in pixels.

    Raises:
        OSError: no such file.
        ValueError: not a whole .npz, no arr_0, or no uint8 images of one size in it; the message names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        expected = f"{self.path}: arr_0 should be images as uint8 (N, H, W, 3)"
        if "arr_0" not in array_names(self.path):
            raise ValueError(f"{expected}, found no arr_0")
        with self._open() as (_, shape, dtype):
            pass
        if dtype.hasobject:
            raise ValueError(f"{expected}, found Python objects: are the images of different sizes?")
        if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
            raise ValueError(f"{expected}, found the channels first, {shape}: transpose to (0, 2, 3, 1)")
        if dtype != np.uint8:
            raise ValueError(f"{expected}, found {dtype} {shape}: save pixels as integers 0..255")
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"{expected}, found {shape}")
        if 0 in shape:
            raise ValueError(f"{expected}, found an empty set, {shape}")
        self.count, self.size = shape[0], shape[1:3]

    @contextmanager
    def _open(self):
        """The archive's arr_0 at its first value, its shape and dtype."""
        with naming_damage(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            yield member, *read_npy_header(member, f"{self.path}: arr_0")

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Images start..stop - 1 (default: all) as uint8 (B, 3, H, W), B at most `batch_size`.

        Raises ValueError where the archive ends early or its checksum is wrong.
        """
        stop = self.count if stop is None else stop
        height, width = self.size
        image = height * width * 3  # bytes
        with self._open() as (member, _, _):
            member.seek(start * image, 1)
            for first in range(start, stop, batch_size):
                n = min(batch_size, stop - first)
                pixels = bytearray(member.read(n * image))
                if len(pixels) < n * image:
                    found = first + len(pixels) // image
                    raise ValueError(f"{self.path} is truncated: expected {self.count} images, found {found}")
                yield torch.frombuffer(pixels, dtype=torch.uint8).view(n, height, width, 3).permute(0, 3, 1, 2)


def array_names(path: str | Path) -> set[str]:
    """Names of the arrays in an .npz. Raises OSError, ValueError (damaged)."""
    with naming_damage(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_statistics(path: str | Path) -> dict[str, Gaussian]:
    """Gaussians that a reference .npz holds: "fid" from `mu`, `sigma`, "sfid" from `mu_s`, `sigma_s`; or neither.

    Raises:
        OSError: no such file.
        ValueError: damaged, of another network's features, or neither statistics nor images in it.
    """
    names, statistics = array_names(path), {}
    if not names & {"arr_0", "mu", "mu_s"}:
        raise ValueError(
            f"{path} is no reference: expected images (arr_0) or statistics (mu, sigma, mu_s, sigma_s), found "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )
    with naming_damage(path), np.load(path, allow_pickle=False) as arrays:
        for score, (mean, covariance, d) in STATISTICS.items():
            if mean not in names:
                continue
            try:
                gaussian = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}: {mean} and {covariance} cannot be read: {error}") from error
            if gaussian[0].shape != (d,) or gaussian[1].shape != (d, d):
                raise ValueError(
                    f"{path}: {mean} and {covariance} should be ({d},) and ({d}, {d}), found {gaussian[0].shape} and "
                    f"{gaussian[1].shape}: statistics of another network's features"
                )
            if not all(np.isfinite(part).all() for part in gaussian):
                raise ValueError(f"{path}: {mean} or {covariance} holds NaN or infinite values: make the file again")
            statistics[score] = gaussian
    return statistics


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """What a damaged zip archive raises, as a ValueError that names it."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole .npz ({error}): make or copy it again") from error


# --- Features and scores ----------------------------------------------------------------------------------------------


@dataclass
class SetFeatures:
    """Features of a set of images: pool (N, 2048) and logits (N, 1008), float32 on the CPU, in the images' order."""

    pool: Tensor
    logits: Tensor
    spatial: GaussianStatistics

    @staticmethod
    def joined(parts: list["SetFeatures"]) -> "SetFeatures":
        """Parts of a set, put together in the order given."""
        spatial = GaussianStatistics()
        for part in parts:
            spatial.merge(part.spatial)
        pool, logits = torch.cat([part.pool for part in parts]), torch.cat([part.logits for part in parts])
        return SetFeatures(pool, logits, spatial)

    def gaussians(self) -> dict[str, Gaussian]:
        """The Gaussian behind each of the two Fréchet distances."""
        return {"fid": gaussian_statistics(self.pool), "sfid": self.spatial.mean_and_covariance()}


def extract_features(network: AdmInception, batches: Iterable[Tensor], name: str = "images") -> SetFeatures:
    """Features of uint8 batches (B, 3, H, W), on the device of `network`.

    Raises ValueError, naming `name`, for NaN or infinite features and for an empty set.
    """
    device = network.class_weights.device
    pools, logits, spatial = [], [], GaussianStatistics()
    for batch in batches:
        pool, spatial_features, logit = network(batch.to(device))
        spatial.update(spatial_features, f"spatial features of {name}")
        pools.append(pool.cpu())
        logits.append(logit.cpu())
    if not pools:
        raise ValueError(f"{name}: expected images, found none")
    # Where they can be merged with another process's.
    spatial.mean, spatial.scatter = spatial.mean.cpu(), spatial.scatter.cpu()
    return SetFeatures(torch.cat(pools), torch.cat(logits), spatial)


def score(
    samples: SetFeatures, statistics: dict[str, Gaussian], reference: SetFeatures | None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The suite's five scores: fid, sfid, inception_score, precision, recall.

    Args:
        samples: of at least 2 images, of at least 4 for precision and recall.
        statistics: those that come with the reference (see `read_statistics`). As in the suite they are those of a
            whole data set and go before the statistics of the reference's images.
        reference: features of the reference's images; None: it has none.

    Returns:
        The scores, None where the reference does not allow one, and the reason of each None.

    Raises:
        ValueError: NaN in features, fewer images than needed.
    """
    scores, reasons = {}, {}
    own, given = samples.gaussians(), statistics
    if reference is not None and statistics.keys() != STATISTICS.keys():
        given = {**reference.gaussians(), **statistics}
    for name, (mean, covariance, _) in STATISTICS.items():
        if name in given:
            scores[name] = frechet_distance(*own[name], *given[name])
        else:
            scores[name] = None
            reasons[name] = f"the reference holds neither {mean}, {covariance} nor images"
    scores["inception_score"] = inception_score(samples.logits)
    if reference is None:
        scores["precision"] = scores["recall"] = None
        reasons["precision"] = reasons["recall"] = "the reference holds no images"
    else:
        scores["precision"], scores["recall"] = precision_recall(reference.pool, samples.pool)
    return scores, reasons
