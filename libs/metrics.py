"""The scores of generated images, as functions of features: Fréchet distance, Inception Score, precision and recall.

Definitions are those of the ADM evaluation suite (openai/guided-diffusion, evaluations/evaluator.py). Features are
NumPy arrays or tensors (N, D), one row per image. N images, D features, C classes.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Features = np.ndarray | Tensor  # (N, D)
ROWS = 2048  # rows worked on at a time: a tile of distances is then 16 MB, which the allocator keeps


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
