"""Time, memory and accuracy of the scores in libs/metrics.py at the size of a 50K evaluation, on random features.

    python benchmarks/metrics.py            # prints benchmarks/results/metrics.md

Each score runs in a process of its own, so that its peak memory is its own (features included, 410 MB for 50,000).
The Fréchet distance is checked where the exact value is known without a matrix square root: with fewer images than
features, tr (S1 S2)^½ is the sum of the singular values of X1 X2ᵀ / sqrt((n1 - 1) (n2 - 1)), X centred.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.metrics import (
    SPATIAL,
    GaussianStatistics,
    SetFeatures,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    precision_recall,
    score,
)


def features(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def run_precision_recall(args):
    reference, samples = features(args.n_reference, args.dim, 0), features(args.n_samples, args.dim, 1, 0.02)
    started = time.perf_counter()
    precision, recall = precision_recall(reference, samples)
    return time.perf_counter() - started, f"precision {precision:.4f}, recall {recall:.4f}"


def run_statistics(args):
    x = features(args.n_samples, args.dim, 1)
    started = time.perf_counter()
    gaussian_statistics(x)
    return time.perf_counter() - started, ""


def run_inception_score(args):
    logits = features(args.n_samples, 1008, 1)
    started = time.perf_counter()
    value = inception_score(logits)
    return time.perf_counter() - started, f"{value:.4f}"


def run_all(args):
    pool, logits = features(args.n_samples, args.dim, 1, 0.02), features(args.n_samples, 1008, 2)
    spatial = GaussianStatistics()
    spatial.update(features(4 * SPATIAL, SPATIAL, 3))
    reference = SetFeatures(features(args.n_reference, args.dim, 0), features(args.n_reference, 1008, 4), spatial)
    statistics = reference.gaussians()  # ADM's files hold them
    samples = SetFeatures(pool, logits, spatial)  # made while features are extracted
    started = time.perf_counter()
    scores, _ = score(samples, statistics, reference)
    return time.perf_counter() - started, ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def exact_distance(x1, x2):
    """Fréchet distance of the Gaussians fitted to x1, x2 (n, D), from the singular values of an n1 x n2 matrix."""
    c1, c2 = (x - x.mean(0) for x in (x1, x2))
    n1, n2 = len(x1) - 1, len(x2) - 1
    root = np.linalg.svd(c1 @ c2.T / np.sqrt(n1 * n2), compute_uv=False).sum()
    return ((x1.mean(0) - x2.mean(0)) ** 2).sum() + (c1**2).sum() / n1 + (c2**2).sum() / n2 - 2 * root


def eigvals_distance(mu1, sigma1, mu2, sigma2):
    """The same from the eigenvalues of the general matrix S1 S2, for comparison."""
    root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).real.clip(min=0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root


def run_frechet(args, n1, n2, other):
    x1 = features(n1, args.dim, 0).double().numpy()
    # Features of very different scales, as an Inception network's are.
    scales = np.logspace(-2, 0, args.dim)
    x1, x2 = x1 * scales, (features(n2, args.dim, 1, 0.1).double().numpy()) * scales
    statistics = (*gaussian_statistics(x1), *gaussian_statistics(x2))
    started = time.perf_counter()
    found = frechet_distance(*statistics)
    seconds = time.perf_counter() - started
    expected = exact_distance(x1, x2) if other == "exact" else eigvals_distance(*statistics)
    return seconds, f"{found:.9f}, {other} {expected:.9f}: relative difference {abs(found / expected - 1):.1e}"


def measured(connection, function, arguments):
    seconds, note = function(*arguments)
    connection.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, note))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_reference", type=int, default=10_000)
    parser.add_argument("--n_samples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048, help="features per image")
    args = parser.parse_args()
    n, m, d = args.n_samples, args.n_reference, args.dim
    cases = [
        (f"all five scores from the features of {n:,} images, reference of {m:,} and statistics", run_all, (args,)),
        (f"precision and recall, {n:,} x {m:,}, {d} features", run_precision_recall, (args,)),
        (f"mean and covariance, {n:,} x {d}", run_statistics, (args,)),
        (f"Inception Score, {n:,} x 1008", run_inception_score, (args,)),
        (f"Fréchet distance, {d}, full rank", run_frechet, (args, 2 * d, 2 * d, "eigvals")),
        (f"Fréchet distance, {d}, rank {d // 2} and {d // 4}", run_frechet, (args, d // 2 + 1, d // 4 + 1, "eigvals")),
        (f"Fréchet distance, {d}, rank {d // 2} and {d // 4}", run_frechet, (args, d // 2 + 1, d // 4 + 1, "exact")),
    ]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; Python "
        f"{platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}; "
        f"`python benchmarks/metrics.py {' '.join(sys.argv[1:])}`".rstrip(" `")
        + "`\n"
    )
    print("| score | seconds | peak memory, GB | result |\n|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name, function, arguments in cases:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measured, args=(sender, function, arguments))
        process.start()
        sender.close()
        seconds, peak, note = receiver.recv()
        process.join()
        print(f"| {name} | {seconds:.1f} | {peak:.2f} | {note} |", flush=True)


if __name__ == "__main__":
    main()
