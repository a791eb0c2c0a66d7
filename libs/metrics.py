"""The ADM evaluation suite: from two sets of images to FID, sFID, Inception Score, precision and recall.

Definitions: openai/guided-diffusion, evaluations/evaluator.py. First the scores as functions of features, NumPy arrays
or tensors (N, D), one row per image; N images, D features, C classes. Then sets of images, each kept as the pool
features and logits of each image (12 KB) and the statistics of the spatial features; kept in a file, they stand for the
images, as samples or as a reference, and parts kept apart are put together to the whole.

The way: `open_set` and `open_reference`, `score_sets` by all processes of a run.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from libs.files import file_digest, read_npy_header, replacing
from libs.inception import CLASSES, POOL, SPATIAL, AdmInception, load_adm_inception
from libs.launch import raise_on_all_ranks
from libs.sample_set import SampleSet

Features = np.ndarray | Tensor  # (N, D)
ROWS = 2048  # rows worked on at a time: a tile of distances is then 16 MB, which the allocator keeps
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)

# Score -> the arrays of a reference .npz that hold its Gaussian, and their dimensions.
STATISTICS = {"fid": ("mu", "sigma", POOL), "sfid": ("mu_s", "sigma_s", SPATIAL)}


# --- Scores of features -----------------------------------------------------------------------------------------------


class GaussianStatistics:
    """Number, mean and scatter of features that arrive in parts, in float64 (Chan, Golub and LeVeque 1979).

    Parts may be given one after the other (`update`), or apart and put together (`merge`): the result is that of all of
    them at once, to round-off. What is kept is independent of the number of images.

    Attributes:
        count: images seen. mean: (D,). scatter: (D, D), the sum of the outer products of features minus their mean.
        The last two are tensors where the features are, None before the first.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def update(self, features: Features, name: str = "features") -> None:
        """Take in features (N, D), N >= 1. Raises ValueError, naming `name`, for what are none, or another D."""
        for rows in _checked(features, name, n_least=1).split(ROWS):
            part = GaussianStatistics()
            rows = rows.double()
            part.count, part.mean = len(rows), rows.mean(0)
            rows = rows - part.mean
            part.scatter = rows.T @ rows
            self.merge(part)

    def merge(self, other: "GaussianStatistics") -> None:
        """Take in what `other` has seen; it stays as it is. Raises ValueError for features of another D."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"expected statistics of the same features, found {len(self.mean)} and {len(other.mean)} dimensions: "
                "were they made with the same network?"
            )
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(shift, shift, alpha=self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sigma), float64 arrays (D,) and (D, D); N - 1 in the denominator. Raises ValueError for N < 2."""
        if self.count < 2:
            raise ValueError(f"expected at least 2 images for a covariance; found {self.count}")
        return self.mean.cpu().numpy().copy(), (self.scatter / (self.count - 1)).cpu().numpy()


def gaussian_statistics(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features.

    Args:
        features: (N, D), N >= 2.

    Returns:
        (mu, sigma), float64 arrays (D,) and (D, D); the covariance has N - 1 in its denominator.
    """
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics.mean_and_covariance()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: |mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^½).

    (S1 S2)^½ has the eigenvalues of (S1^½ S2 S1^½)^½, which is symmetric and positive semi-definite, so that its trace
    needs two symmetric eigenvalue problems and no square root of a general matrix (Heusel et al. 2017, who use one).
    Singular covariances (fewer images than features) are fine: negative round-off is clipped.

    Args:
        mu1, mu2: (D,). sigma1, sigma2: (D, D), symmetric. Computed in float64.

    Returns:
        float, zero or more.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    d = mu1.size
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        raise ValueError(
            f"expected statistics (D,), (D, D), (D,), (D, D) of the same features, found {mu1.shape}, {sigma1.shape}, "
            f"{mu2.shape}, {sigma2.shape}: were they made with the same network?"
        )
    for name, values in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinite values: make the statistics again from finite features")
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    product = root1 @ sigma2 @ root1
    trace_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root))


def inception_score(logits: Features, split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))) over each run of `split_size` consecutive images, averaged over the runs.

    Args:
        logits: (N, C) before the softmax, for ADM's numbers without the last layer's bias. Computed in float64.
        split_size: images per run; the last run may be shorter.
    """
    logits = _checked(logits, "logits", n_least=1)
    scores = []
    for rows in logits.split(split_size):
        log_p = rows.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(rows))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference: Features, samples: Features, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of the balls around its points that reach their k-th neighbour in the set.
    Precision is the share of samples in the manifold of the reference, recall the share of the reference in that of
    the samples. Euclidean distances are taken in float32, tile by tile: memory is that of four copies of the features
    (ADM's suite takes float16 where it does not overflow, which can differ in the last digits).

    Args:
        reference: (M, D). samples: (N, D), on the same device. Each of more than k rows.

    Returns:
        (precision, recall), floats.
    """
    reference, samples = _checked(reference, "reference features", k + 1), _checked(samples, "sample features", k + 1)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"expected reference and samples in the same features, found {reference.shape[1]} and {samples.shape[1]} "
            f"dimensions: were they made with the same network?"
        )
    # Distances do not change when both sets move; near the origin |x|² - 2xy + |y|² loses fewer digits.
    centre = reference.double().mean(0)
    reference, samples = ((features - centre).float() for features in (reference, samples))
    reference_sides, sample_sides = _distance_factors(reference), _distance_factors(samples)
    reference_radii, sample_radii = _squared_radii(*reference_sides, k), _squared_radii(*sample_sides, k)
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for i in range(0, len(samples), ROWS):
        rows = slice(i, i + ROWS)
        for j in range(0, len(reference), ROWS):
            columns = slice(j, j + ROWS)
            distances = _product(sample_sides[0][rows], reference_sides[1][columns])
            in_reference[rows] |= (distances <= reference_radii[columns]).any(1)
            in_samples[columns] |= (distances <= sample_radii[rows, None]).any(0)
    return in_reference.double().mean().item(), in_samples.double().mean().item()


def _distance_factors(x):
    """x (N, D) -> left, right (N, D + 2) with left[i] @ right[j] = |x[i] - x[j]|²: a tile is one product.

    The rows are (-2x, |x|², 1) and (x, 1, |x|²).
    """
    squares, ones = x.square().sum(1, keepdim=True), x.new_ones(len(x), 1)
    return torch.cat([-2 * x, squares, ones], dim=1), torch.cat([x, ones, squares], dim=1)


def _product(left, right):
    """(n, D), (m, D) -> left @ right.T, (n, m)."""
    if left.device.type == "cpu" and not _is_intel():
        return torch.from_numpy(left.numpy() @ right.numpy().T)
    return left @ right.T


@functools.cache
def _is_intel():
    """Is the CPU Intel's? PyTorch's MKL is half as fast on others as NumPy's OpenBLAS; on Intel's the two are equal,
    and PyTorch's threads need not give way to NumPy's between products."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _squared_radii(left, right, k):
    """Squared distance of each row to its k-th neighbour, itself excluded, from `_distance_factors`: (N,).

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
            distances = _product(left[rows], right[columns])
            if i == j:
                distances.fill_diagonal_(torch.inf)
            else:
                offer(columns, distances.T.contiguous())
            offer(rows, distances)
    return nearest.amax(1).clamp_(min=0)  # rounding can make the distance of a duplicate negative


def _checked(features, name, n_least=2):
    """`features` as a floating-point tensor (N, D) on its device; ValueError for what no score can be made of."""
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or len(features) < n_least or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point array (images, features) of at least {n_least} images, found "
            f"{tuple(features.shape)} {str(features.dtype).removeprefix('torch.')}"
        )
    bad = sum(int((~rows.isfinite()).any(1).sum()) for rows in features.split(ROWS))
    if bad:
        raise ValueError(f"{name}: {bad} of {len(features)} rows hold NaN or infinite values: expected finite features")
    return features


# --- Files ------------------------------------------------------------------------------------------------------------


class NpzImages:
    """The images of an .npz, uint8 `arr_0` (N, H, W, 3), read from the archive as they are used.

    Attributes:
        count: N. size: (H, W) in pixels. name: for messages.

    Raises:
        OSError: no such file.
        ValueError: not a whole .npz, no arr_0, or no uint8 images of one size in it; the message names the file.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), str(path)
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

    def pick(self, indices: Sequence[int]) -> list[Tensor]:
        """The images at rising indices, uint8 (3, H, W)."""
        height, width = self.size
        image, pictures = height * width * 3, []
        with self._open() as (member, _, _):
            begin = member.tell()
            for index in indices:
                member.seek(begin + index * image)
                pixels = torch.frombuffer(bytearray(member.read(image)), dtype=torch.uint8)
                pictures.append(pixels.view(height, width, 3).permute(2, 0, 1))
        return pictures


class SampledImages(SampleSet):
    """The images that eval.py wrote, as tensors; attributes and batches as of `NpzImages`, errors as of `SampleSet`."""

    @property
    def name(self) -> str:
        return str(self.parts[0].folder)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Images start..stop - 1 (default: all) as uint8 (B, 3, H, W), B at most `batch_size`."""
        for images in super().batches(batch_size, start, stop):
            yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def pick(self, indices: Sequence[int]) -> list[Tensor]:
        """The images at `indices`, uint8 (3, H, W)."""
        return [next(self.batches(1, index, index + 1))[0] for index in indices]


class KeptFeatures:
    """A file that `keep_features` wrote, in the place of the images it was made of.

    Attributes:
        count: images. size: (H, W) of them. inception: SHA-256 of the network's weights. name: for messages.

    Raises OSError, ValueError (damaged, or not such a file).
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), str(path)
        missing = set(KEPT) - array_names(path)
        if missing:
            raise ValueError(
                f"{path} should hold kept features, found no {', '.join(sorted(missing))}: keep them again"
            )
        with naming_damage(path), np.load(path, allow_pickle=False) as arrays:
            size, self.inception = arrays["size"], str(arrays["inception"])
        with naming_damage(path), zipfile.ZipFile(path) as archive, archive.open("pool.npy") as member:
            shape, _ = read_npy_header(member, f"{path}: pool")
        if size.shape != (2,) or size.dtype.kind not in "iu" or len(shape) != 2:
            raise ValueError(
                f"{path}: expected size (H, W) and pool (n, {POOL}), found {size.dtype} {size.shape} and {shape}: "
                "keep the features again"
            )
        self.size, self.count = tuple(size.tolist()), shape[0]

    def load(self) -> "SetFeatures":
        """The features. Raises ValueError for arrays that do not belong together."""
        with naming_damage(self.path), np.load(self.path, allow_pickle=False) as arrays:
            pool, logits = torch.from_numpy(arrays["pool"]), torch.from_numpy(arrays["logits"])
            mean, covariance = arrays["mu_s"], arrays["sigma_s"]
        n = self.count
        shapes = tuple(pool.shape), tuple(logits.shape), mean.shape, covariance.shape
        expected = (n, POOL), (n, CLASSES), (SPATIAL,), (SPATIAL, SPATIAL)
        if shapes != expected:
            raise ValueError(f"{self.path}: expected features of shapes {expected}, found {shapes}: keep them again")
        spatial = GaussianStatistics()
        spatial.count, spatial.mean = n, torch.from_numpy(mean)
        spatial.scatter = torch.from_numpy(covariance * (n - 1))
        return SetFeatures(pool, logits, spatial)


@dataclass(frozen=True)
class PlannedImages:
    """A set that is yet to be made: images, (H, W) of them, and the setting of their number, for messages."""

    count: int
    size: tuple[int, int]
    name: str


KEPT = ("pool", "logits", "mu", "sigma", "mu_s", "sigma_s", "size", "inception")
ImageSet = NpzImages | SampledImages | KeptFeatures


def keep_features(path: str | Path, features: "SetFeatures", size: tuple[int, int], inception: str) -> None:
    """Write features to an .npz, whole or not at all, to score again or merge without the images.

    It holds what `KeptFeatures` reads and, as `mu`, `sigma`, `mu_s`, `sigma_s`, statistics that other programs read:
    12 KB per image and 66 MB. `size` (H, W) of the images and `inception`, the SHA-256 of the network's weights, tell
    later which features may be compared.
    """
    (mu, sigma), (mu_s, sigma_s) = features.gaussians().values()
    arrays = {"pool": features.pool.numpy(), "logits": features.logits.numpy(), "mu": mu, "sigma": sigma}
    with replacing(path, "set --keep") as file:
        np.savez(file, **arrays, mu_s=mu_s, sigma_s=sigma_s, size=np.array(size), inception=np.array(inception))


def open_set(path: str | Path) -> NpzImages | KeptFeatures:
    """The images in an .npz, or the features kept in one. Raises OSError, ValueError."""
    return KeptFeatures(path) if "pool" in array_names(path) else NpzImages(path)


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
        if len(parts) == 1:
            return parts[0]
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


def features_of(
    images: ImageSet, network: Callable[[], AdmInception], batch_size: int, state: Accelerator | PartialState
) -> SetFeatures | None:
    """Features of a set, made by all processes of `state` (accelerate's), given to the main one; None to the others.

    Each process takes a run of the batches, which are the same for any number of processes.
    """
    if isinstance(images, KeptFeatures):
        return images.load() if state.is_main_process else None
    n_batches = -(-images.count // batch_size)
    first, end = (n_batches * (state.process_index + i) // state.num_processes for i in (0, 1))
    batches = tqdm(
        images.batches(batch_size, first * batch_size, min(end * batch_size, images.count)),
        total=end - first,
        desc=f"features of {images.name}",
        unit="batch",
        disable=not state.is_main_process,
    )
    part = None
    with raise_on_all_ranks(state):
        if end > first:
            part = extract_features(network(), batches, images.name)
    if state.num_processes == 1:
        return part
    parts = gather_object([part])
    return SetFeatures.joined([part for part in parts if part]) if state.is_main_process else None


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics of a whole data set (see `read_statistics`), images of it, or both."""

    path: Path
    statistics: dict[str, Gaussian]
    images: NpzImages | KeptFeatures | None


def open_reference(path: str | Path) -> Reference:
    """ADM's reference .npz (images, statistics), U-ViT's (mu, sigma) or kept features. Raises OSError, ValueError."""
    names = array_names(path)
    statistics = read_statistics(path)
    return Reference(Path(path), statistics, open_set(path) if names & {"arr_0", "pool"} else None)


def fewest_images(reference: Reference) -> int:
    """How many images it takes to be scored."""
    return 4 if reference.images else 2  # for the neighbours of precision and recall; for a covariance


def check_sets(samples: Sequence[ImageSet | PlannedImages], reference: Reference) -> None:
    """Raises ValueError for sets (`samples` the parts of one) that cannot be scored: too few images, other sizes."""
    fewest = fewest_images(reference)
    n_samples = sum(part.count for part in samples)
    if n_samples < fewest:
        raise ValueError(f"{samples[0].name}: expected at least {fewest} images; found {n_samples}")
    if reference.images and reference.images.count < fewest:
        raise ValueError(f"{reference.path}: expected at least {fewest} images; found {reference.images.count}")
    for part in samples:
        if part.size != samples[0].size:
            (h, w), (h0, w0) = part.size, samples[0].size
            raise ValueError(f"{part.name} is {w}x{h} but {samples[0].name} is {w0}x{h0}: give parts of one set")
    if reference.images and reference.images.size != samples[0].size:
        (h, w), (h0, w0) = samples[0].size, reference.images.size
        raise ValueError(
            f"{samples[0].name} is {w}x{h} but the images of {reference.path} are {w0}x{h0}: give the reference of "
            "this resolution, or sample at that one"
        )


def check_features(parts: Sequence[ImageSet | None], weights: Path) -> str:
    """Raises ValueError for features kept with other Inception weights; returns the SHA-256 of `weights`."""
    digest = file_digest(weights)
    for part in parts:
        if isinstance(part, KeptFeatures) and part.inception != digest:
            raise ValueError(
                f"{part.name} holds features of other Inception weights than {weights} (SHA-256 "
                f"{part.inception[:8]}..., here {digest[:8]}...): keep them again"
            )
    return digest


@dataclass(frozen=True)
class Scores:
    """The suite's scores of a set.

    Attributes:
        values: fid, sfid, inception_score, precision, recall; None where the reference does not allow one.
        reasons: why, of each None.
        features: of the samples.
        weights: SHA-256 of the Inception weights.
    """

    values: dict[str, float | None]
    reasons: dict[str, str]
    features: SetFeatures
    weights: str


def score_sets(
    samples: Sequence[ImageSet],
    reference: Reference,
    weights: Path,
    state: Accelerator | PartialState,
    batch_size: int = 64,
) -> Scores | None:
    """Score a set of images against a reference, all processes of a run extracting features, the main one scoring.

    Args:
        samples: parts of one set, in order.
        weights: pytorch-fid's Inception weights (see libs.inception.find_inception).
        state: accelerate's Accelerator or PartialState.
        batch_size: images at a time per process.

    Returns:
        The scores on the main process, None on others.

    Raises:
        ValueError, OSError: sets or weights that cannot be used, NaN in features.
    """
    check_sets(samples, reference)
    digest = check_features((*samples, reference.images), weights)
    loaded = []

    def network() -> AdmInception:  # none where all features were kept
        if not loaded:
            loaded.append(load_adm_inception(weights, state.device))
        return loaded[0]

    reference_features = features_of(reference.images, network, batch_size, state) if reference.images else None
    parts = [features_of(part, network, batch_size, state) for part in samples]
    if not state.is_main_process:
        return None
    features = SetFeatures.joined(parts)
    return Scores(*score(features, reference.statistics, reference_features, state.device), features, digest)


def score(
    samples: SetFeatures,
    statistics: dict[str, Gaussian],
    reference: SetFeatures | None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The suite's five scores: fid, sfid, inception_score, precision, recall.

    Args:
        samples: of at least 2 images, of at least 4 for precision and recall.
        statistics: those that come with the reference (see `read_statistics`). As in the suite they are those of a
            whole data set and go before the statistics of the reference's images.
        reference: features of the reference's images; None: it has none.
        device: where neighbours are sought.

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
        scores["precision"], scores["recall"] = precision_recall(reference.pool.to(device), samples.pool.to(device))
    return scores, reasons
