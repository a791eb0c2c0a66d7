"""FID, sFID, Inception Score, precision and recall of a set of images, as the ADM evaluation suite defines them.

Definitions: openai/guided-diffusion, evaluations/evaluator.py. N images, D features, C classes. First the scores as
functions of features, NumPy arrays or tensors (N, D); then the .npz files; then the suite, of which
`utils.score_sets` is made.
"""

import functools
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from libs import UserError
from libs.files import read_npy_header
from libs.inception import POOL, SPATIAL, AdmInception

Features = np.ndarray | Tensor  # (N, D)
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)
ImageSet = Any  # NpzImages or libs.sample_set.SampleSet
ROWS = 2048  # rows worked on at a time: a tile of distances is then 16 MB, which the allocator keeps

# Score -> the arrays of a reference .npz that hold its Gaussian, and their dimension.
STATISTICS = {"fid": ("mu", "sigma", POOL), "sfid": ("mu_s", "sigma_s", SPATIAL)}


class GaussianStatistics:
    """Accumulate the number, mean and scatter of features in float64 (Chan, Golub and LeVeque 1979).

    Attributes:
        count: N so far. mean: (D,). scatter: (D, D), the sum of outer products of the centered features. Tensors on
        the features' device; None before the first.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def update(self, features: Features) -> None:
        """Add features (N, D), N >= 1. Raise UserError if some are not finite."""
        for rows in _checked(features, n_least=1).split(ROWS):
            part = GaussianStatistics()
            rows = rows.double()
            part.count, part.mean = len(rows), rows.mean(0)
            rows = rows - part.mean
            part.scatter = rows.T @ rows
            self.merge(part)

    def merge(self, other: "GaussianStatistics") -> None:
        """Add what `other` has accumulated; `other` stays as it is."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(shift, shift, alpha=self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    def mean_and_covariance(self) -> Gaussian:
        """Return float64 arrays (D,) and (D, D), the covariance with N - 1 in its denominator. N >= 2."""
        return self.mean.cpu().numpy().copy(), (self.scatter / (self.count - 1)).cpu().numpy()


def gaussian_statistics(features: Features) -> Gaussian:
    """Compute mean (D,) and covariance (D, D) of features (N, D), N >= 2, in float64."""
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics.mean_and_covariance()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance of two Gaussians in float64 (Heusel et al. 2017).

    It is |mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^½). (S1 S2)^½ has the eigenvalues of (S1^½ S2 S1^½)^½, which is
    symmetric and positive semi-definite: two symmetric eigenvalue problems give its trace. Covariances may be singular
    (fewer images than features): negative round-off is clipped.

    Args:
        mu1, mu2: (D,). sigma1, sigma2: (D, D), symmetric.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    product = root1 @ sigma2 @ root1
    trace_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    distance = float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)
    return max(distance, 0.0)  # in this order NaN stays NaN


def inception_score(logits: Features, split_size: int = 5000) -> float:
    """Compute exp(mean KL(p(y|x) ‖ p(y))) over runs of `split_size` consecutive images, averaged over the runs.

    Args:
        logits: (N, C) before the softmax, for ADM's numbers without the last layer's bias. Computed in float64.
        split_size: images per run; the last run may be shorter.
    """
    scores = []
    for rows in _checked(logits, n_least=1).split(split_size):
        log_p = rows.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(rows))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference: Features, samples: Features, k: int = 3) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of the balls around its points that reach their k-th neighbor in the set.
    Precision is the share of samples in the manifold of the reference, recall the share of the reference in that of
    the samples. Euclidean distances are taken in float32, tile by tile (ADM's suite takes float16 where it does not
    overflow, which raises both by 0.001 to 0.004).

    Args:
        reference: (M, D). samples: (N, D), on the same device. Each of more than k rows.
    """
    reference, samples = _checked(reference, k + 1), _checked(samples, k + 1)
    # Distances do not change when both sets move; near the origin |x|² - 2xy + |y|² loses fewer digits.
    center = reference.double().mean(0)
    reference, samples = ((features - center).float() for features in (reference, samples))
    reference_sides, sample_sides = _distance_factors(reference), _distance_factors(samples)
    reference_radii, sample_radii = _squared_radii(*reference_sides, k), _squared_radii(*sample_sides, k)
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for i in range(0, len(samples), ROWS):
        rows = slice(i, i + ROWS)
        for j in range(0, len(reference), ROWS):
            columns = slice(j, j + ROWS)
            distances = _matmul(sample_sides[0][rows], reference_sides[1][columns])
            in_reference[rows] |= (distances <= reference_radii[columns]).any(1)
            in_samples[columns] |= (distances <= sample_radii[rows, None]).any(0)
    return in_reference.double().mean().item(), in_samples.double().mean().item()


def _distance_factors(x):
    """Return left, right (N, D + 2) with left[i] @ right[j] = |x[i] - x[j]|²: a tile of distances is one matmul."""
    squares, ones = x.square().sum(1, keepdim=True), x.new_ones(len(x), 1)
    return torch.cat([-2 * x, squares, ones], dim=1), torch.cat([x, ones, squares], dim=1)


def _matmul(left, right):
    """Compute left @ right.T of (n, D) and (m, D)."""
    if left.device.type == "cpu" and not _is_intel():
        return torch.from_numpy(left.numpy() @ right.numpy().T)
    return left @ right.T


@functools.cache
def _is_intel():
    """Tell whether the CPU is Intel's: on others PyTorch's MKL is half as fast as NumPy's OpenBLAS."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def _squared_radii(left, right, k):
    """Compute the squared distance (N,) of each row to its k-th neighbor, from `_distance_factors`.

    Distances are symmetric: each tile above the diagonal serves its rows and its columns.
    """
    nearest = left.new_full((len(left), k), torch.inf)

    def offer(rows, distances):
        fewest = distances.topk(min(k, distances.shape[1]), dim=1, largest=False, sorted=False).values
        nearest[rows] = torch.cat([nearest[rows], fewest], dim=1).topk(k, dim=1, largest=False).values

    for i in range(0, len(left), ROWS):
        rows = slice(i, i + ROWS)
        for j in range(i, len(left), ROWS):
            columns = slice(j, j + ROWS)
            distances = _matmul(left[rows], right[columns])
            if i == j:
                distances.fill_diagonal_(torch.inf)
            else:
                offer(columns, distances.T.contiguous())
            offer(rows, distances)
    return nearest.amax(1).clamp_(min=0)  # rounding can make the distance of a duplicate negative


def _checked(features, n_least):
    """Return features as a tensor (N, D). Raise UserError where a score would silently be wrong: NaN, or too few."""
    features = torch.as_tensor(features).detach()
    bad = sum(int((~rows.isfinite()).any(1).sum()) for rows in features.split(ROWS))
    if bad or len(features) < n_least:
        raise UserError(f"expected features of {n_least} or more images, found {len(features)}, {bad} with NaN or inf")
    return features


@contextmanager
def open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz; any error of the block, as a damaged file can cause, becomes a UserError that names it."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Exception as error:
            raise UserError(f"{path} is damaged or not the .npz expected: {error or type(error).__name__}") from error


@contextmanager
def open_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open `arr_0` of an .npz at its first value: (file, shape, dtype)."""
    with open_npz(path) as archive, archive.open("arr_0.npy") as member:
        yield member, *read_npy_header(member, "arr_0")


def read_floats(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of an .npz as float64. Look at its size first, so that no file can fill the memory."""
    n_bytes, values = archive.getinfo(f"{name}.npy").file_size, np.array(np.nan)
    if n_bytes <= 8 * math.prod(shape) + 4096:  # the header, with room
        with archive.open(f"{name}.npy") as file:
            values = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(f"{name} should be {shape}, all finite: statistics of other features?")
    return values


class NpzImages:
    """The images of one .npz, or of several that are parts of one set: uint8 `arr_0` (N, H, W, 3), read as used.

    Raises FileNotFoundError; UserError for a file without such images.

    Attributes:
        paths: the files. count: N of all. size: (H, W) in pixels. name: for messages. settings, labels: not known.
    """

    settings, labels = {}, None  # as of a SampleSet

    def __init__(self, *paths: str | Path):
        self.paths, self.counts, self.name = [Path(path) for path in paths], [], str(paths[0])
        for path in self.paths:
            with open_images(path) as (_, shape, dtype):
                size = shape[1:3] if not self.counts else self.size
                if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (*size, 3) or 0 in shape:
                    expected = f"(N, {size[0]}, {size[1]}, 3), as in {self.name}" if self.counts else "(N, H, W, 3)"
                    raise ValueError(f"arr_0 should be images, uint8 {expected}; found {dtype} {shape}")
            self.size = size
            self.counts.append(shape[0])
        self.count = sum(self.counts)

    def images(self, indices: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Read the images at rising `indices`, all unless given: uint8 (H, W, 3). Raises UserError for damage."""
        indices = range(self.count) if indices is None else indices
        shape, start = (*self.size, 3), 0
        n_bytes = math.prod(shape)
        for path, count in zip(self.paths, self.counts, strict=True):
            with open_images(path) as (member, _, _):
                begin = member.tell()
                for i in indices:
                    if start <= i < start + count:
                        member.seek(begin + (i - start) * n_bytes)
                        yield np.frombuffer(member.read(n_bytes), np.uint8).reshape(shape)  # fails if truncated
            start += count


@dataclass(frozen=True)
class PlannedImages:
    """A set that is yet to be made: images, (H, W) of them, and the setting of their number, for messages."""

    count: int
    size: tuple[int, int]
    name: str


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: Gaussians of a whole data set by score ("fid", "sfid"), images of it, or both."""

    path: Path
    statistics: dict[str, Gaussian]
    images: NpzImages | None


def open_reference(path: str | Path) -> Reference:
    """Open ADM's reference .npz (images, statistics) or U-ViT's (mu, sigma).

    Raises FileNotFoundError; UserError for a file that is damaged or no reference.
    """
    statistics = {}
    with open_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not names & {"arr_0", "mu", "mu_s"}:
            raise ValueError(f"expected images (arr_0) or statistics (mu, sigma), found {sorted(names)[:5]}")
        for score_name, (mean, covariance, d) in STATISTICS.items():
            if mean in names:
                statistics[score_name] = read_floats(archive, mean, (d,)), read_floats(archive, covariance, (d, d))
    return Reference(Path(path), statistics, NpzImages(path) if "arr_0" in names else None)


def fewest_images(reference: Reference) -> int:
    """Return how many images it takes to be scored."""
    return 4 if reference.images else 2  # for the neighbors of precision and recall; for a covariance


def check_sets(samples: ImageSet | PlannedImages, reference: Reference) -> None:
    """Raise UserError for a set that cannot be scored against the reference: too few images, or of another size."""
    for images in (samples, reference.images):
        if images and images.count < fewest_images(reference):
            raise UserError(f"{images.name}: expected at least {fewest_images(reference)} images; found {images.count}")
    if reference.images and reference.images.size != samples.size:
        raise UserError(
            f"{samples.name} is {_pixels(samples.size)} but the images of {reference.path} are "
            f"{_pixels(reference.images.size)}: give the reference of this resolution"
        )


def _pixels(size):
    return f"{size[1]}x{size[0]}"


@dataclass
class SetFeatures:
    """Features of a set of images: pool (N, 2048) and logits (N, 1008), float32 on the CPU, in the images' order."""

    pool: Tensor
    logits: Tensor
    spatial: GaussianStatistics

    @staticmethod
    def joined(parts: Iterable["SetFeatures | None"]) -> "SetFeatures":
        """Concatenate parts of a set; None is an empty one."""
        parts, spatial = [part for part in parts if part], GaussianStatistics()
        if len(parts) == 1:
            return parts[0]
        for part in parts:
            spatial.merge(part.spatial)
        pool, logits = torch.cat([part.pool for part in parts]), torch.cat([part.logits for part in parts])
        return SetFeatures(pool, logits, spatial)

    def gaussians(self) -> dict[str, Gaussian]:
        """Compute the Gaussian behind each of the two Fréchet distances."""
        return {"fid": gaussian_statistics(self.pool), "sfid": self.spatial.mean_and_covariance()}


def stack_batches(images: Iterator[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    """Stack images (H, W, 3) as (B, 3, H, W), B = batch_size but for the last."""
    while batch := list(islice(images, batch_size)):
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def extract_features(
    network: AdmInception, images: ImageSet, batch_size: int, n_processes: int = 1, process: int = 0
) -> SetFeatures | None:
    """Extract the features of this process's share of a set; None of no images.

    The share is a run of the batches, which are the same for any number of processes.

    Raises UserError for NaN or infinite features.
    """
    n_batches = -(-images.count // batch_size)
    first, end = (n_batches * (process + i) // n_processes for i in (0, 1))
    batches = stack_batches(images.images(range(first * batch_size, min(end * batch_size, images.count))), batch_size)
    pools, logits, spatial = [], [], GaussianStatistics()
    for batch in tqdm(batches, f"features of {images.name}", end - first, disable=process > 0):
        pool, spatial_features, logit = network(batch.to(network.class_weights.device))
        spatial.update(spatial_features)
        pools.append(pool.cpu())
        logits.append(logit.cpu())
    if not pools:
        return None
    spatial.mean, spatial.scatter = spatial.mean.cpu(), spatial.scatter.cpu()  # to be gathered
    return SetFeatures(torch.cat(pools), torch.cat(logits), spatial)


@dataclass(frozen=True)
class Scores:
    """The suite's scores of a set, and what computed them.

    Attributes:
        values: fid, sfid, inception_score, precision, recall; None where the reference does not allow one.
        reasons: why, of each None. weights: SHA-256 of the Inception weights. device: type. code: version.
    """

    values: dict[str, float | None]
    reasons: dict[str, str]
    weights: str
    device: str = "cpu"
    code: str = "unknown"


def score(
    samples: SetFeatures,
    statistics: dict[str, Gaussian],
    reference: SetFeatures | None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Compute the suite's five scores from features: values and reasons, as in `Scores`.

    Args:
        samples: of at least 2 images, of at least 4 for precision and recall.
        statistics: those that come with the reference, of a whole data set. They go before those of its images.
        reference: features of the reference's images; None: it has none.
        device: where neighbors are sought.
    """
    scores, reasons = {}, {}
    own, given = samples.gaussians(), statistics
    if reference is not None and statistics.keys() != STATISTICS.keys():
        given = {**reference.gaussians(), **statistics}
    for name, (mean, covariance, _) in STATISTICS.items():
        if name in given:
            scores[name] = frechet_distance(*own[name], *given[name])
        else:
            reasons[name] = f"the reference holds neither {mean}, {covariance} nor images"
    scores["inception_score"] = inception_score(samples.logits)
    if reference is not None:
        scores["precision"], scores["recall"] = precision_recall(reference.pool.to(device), samples.pool.to(device))
    else:
        reasons["precision"] = reasons["recall"] = "the reference holds no images"
    return {**scores, **dict.fromkeys(reasons)}, reasons
