"""Time, memory and accuracy of the scores in libs/metrics.py at the size of a 50K evaluation, on random features.

    python benchmarks/metrics.py            # prints benchmarks/results/metrics.md

Each score has a process, and so a peak memory, of its own (features included, 410 MB for 50,000). The Fréchet distance
is checked against the eigenvalues of S1 S2 and, for fewer images than features, against the exact value: tr (S1 S2)^½
is the sum of the singular values of X1 X2ᵀ / sqrt((n1 - 1) (n2 - 1)), X centered.
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from benchmarks.machine import describe_run
from libs import metrics

N_SAMPLES, N_REFERENCE, DIM = 50_000, 10_000, 2048


def features(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def timed(function, *args):
    """Return what a function returns, and the seconds it takes."""
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started


def run_all():
    spatial = metrics.GaussianStatistics()  # made while features are extracted; here both sides have the same
    spatial.update(features(4 * metrics.SPATIAL, metrics.SPATIAL, 3))
    sides = [(N_REFERENCE, 0, 0.0), (N_SAMPLES, 1, 0.02)]
    reference, samples = (
        metrics.SetFeatures(features(n, DIM, seed, shift), features(n, 1008, 4 - 2 * seed), spatial)
        for n, seed, shift in sides
    )
    statistics = reference.gaussians()  # ADM's files hold them
    (scores, _), seconds = timed(metrics.score, samples, statistics, reference)
    return seconds, ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def run_precision_recall():
    sides = features(N_REFERENCE, DIM, 0), features(N_SAMPLES, DIM, 1, 0.02)
    (precision, recall), seconds = timed(metrics.precision_recall, *sides)
    return seconds, f"precision {precision:.4f}, recall {recall:.4f}"


def run_statistics():
    return timed(metrics.gaussian_statistics, features(N_SAMPLES, DIM, 1))[1], ""


def run_inception_score():
    value, seconds = timed(metrics.inception_score, features(N_SAMPLES, 1008, 1))
    return seconds, f"{value:.4f}"


def run_frechet(n1, n2, other):
    scales = np.logspace(-2, 0, DIM)  # of very different sizes, as an Inception network's features are
    x1, x2 = (features(n, DIM, i, i / 10).double().numpy() * scales for i, n in enumerate((n1, n2)))
    (mu1, sigma1), (mu2, sigma2) = statistics = [metrics.gaussian_statistics(x) for x in (x1, x2)]
    found, seconds = timed(metrics.frechet_distance, *statistics[0], *statistics[1])
    if other == "exact":
        between = (x1 - mu1) @ (x2 - mu2).T / np.sqrt((n1 - 1) * (n2 - 1))
        root = np.linalg.svd(between, compute_uv=False).sum()
    else:
        root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).real.clip(min=0)).sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return seconds, f"{found:.9f}, {other} {expected:.9f}: relative difference {abs(found / expected - 1):.1e}"


def measured(function, *arguments):
    seconds, note = function(*arguments)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, note


def main():
    n, m, d = N_SAMPLES, N_REFERENCE, DIM
    cases = [
        (f"all five scores from the features of {n:,} images, reference of {m:,} and statistics", run_all),
        (f"precision and recall, {n:,} x {m:,}, {d} features", run_precision_recall),
        (f"mean and covariance, {n:,} x {d}", run_statistics),
        (f"Inception Score, {n:,} x 1008", run_inception_score),
        (f"Fréchet distance, {d}, full rank", run_frechet, 2 * d, 2 * d, "eigvals"),
        (f"Fréchet distance, {d}, rank {d // 2} and {d // 4}", run_frechet, d // 2 + 1, d // 4 + 1, "eigvals"),
        (f"Fréchet distance, {d}, rank {d // 2} and {d // 4}", run_frechet, d // 2 + 1, d // 4 + 1, "exact"),
    ]
    print(f"{describe_run()}\n\n| score | seconds | peak memory, GB | result |\n|---|---|---|---|")
    for name, *call in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, note = pool.apply(measured, call)
        print(f"| {name} | {seconds:.1f} | {peak:.2f} | {note} |", flush=True)


if __name__ == "__main__":
    main()
