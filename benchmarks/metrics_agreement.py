"""The scores of libs/metrics.py beside independent ones on the same features, ten random draws of each.

    python benchmarks/metrics_agreement.py            # benchmarks/results/metrics_agreement.md; about a minute

- Fréchet distance of Gaussians whose covariances commute: the closed form |m1 - m2|² + sum (s1 - s2)².
- Fréchet distance of features, of full rank and of fewer images than features: pytorch-fid's own function. It calls
  SciPy's sqrtm with `disp`, which SciPy 1.18 no longer takes: it is given sqrtm behind a function that does.
- Inception Score: the formula in float64, NumPy and SciPy only, and torch-fidelity's function.
- Precision and recall: the definition, every distance by itself in float64.
"""

import argparse
import os
import platform
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_fid.fid_score
import scipy
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.metrics import frechet_distance, gaussian_statistics, inception_score, precision_recall

N_DRAWS = 10


def frechet_by_pytorch_fid(mu1, sigma1, mu2, sigma2):
    """pytorch-fid's Fréchet distance, with any SciPy."""
    own = pytorch_fid.fid_score.linalg
    pytorch_fid.fid_score.linalg = types.SimpleNamespace(sqrtm=lambda a, disp: (scipy.linalg.sqrtm(a), None))
    try:
        return pytorch_fid.fid_score.calculate_frechet_distance(mu1, sigma1, mu2, sigma2)
    finally:
        pytorch_fid.fid_score.linalg = own


def commuting_gaussians(rng, d):
    """Statistics of two Gaussians whose covariances share their eigenvectors, and their Fréchet distance."""
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    (std1, std2), (mu1, mu2) = rng.uniform(0, 3, size=(2, d)), rng.normal(size=(2, d))
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    return (mu1, (basis * std1**2) @ basis.T, mu2, (basis * std2**2) @ basis.T), expected


def two_sets(rng, n, d):
    """Features (n, d) of two sets, of scales from 0.01 to 1 as an Inception network's, float64."""
    scales = np.logspace(-2, 0, d)
    return rng.normal(size=(n, d)) * scales, (1.1 * rng.normal(size=(n, d)) + 0.1) * scales


def inception_score_by_formula(logits, split_size):
    """exp of the mean divergence of p(y|x) from p(y), per split, in float64; mean over the splits."""
    scores = []
    for start in range(0, len(logits), split_size):
        p = scipy.special.softmax(logits[start : start + split_size].astype(np.float64), axis=1)
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))
    return np.mean(scores)


def precision_recall_by_definition(reference, samples, k=3):
    """Every pair of points by itself, in float64."""

    def distances(a, b):
        return np.stack([np.sqrt(((row.astype(np.float64) - b) ** 2).sum(1)) for row in a])

    def radii(x):
        return np.sort(distances(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]

    between = distances(samples, reference)
    return (between <= radii(reference)).any(1).mean(), (between <= radii(samples)[:, None]).any(0).mean()


def draws():
    """Rows (score, against, draw, ours, theirs)."""
    for seed in range(N_DRAWS):
        rng = np.random.default_rng(seed)
        statistics, expected = commuting_gaussians(rng, 256)
        yield "Fréchet, 256 dimensions", "closed form", seed, frechet_distance(*statistics), expected
        for n, d, name in ((1000, 256, "full rank"), (200, 256, "rank 199")):
            x, y = two_sets(rng, n, d)
            statistics = (*gaussian_statistics(x), *gaussian_statistics(y))
            ours = frechet_distance(*statistics)
            yield f"Fréchet, {n} x {d}, {name}", "pytorch-fid", seed, ours, frechet_by_pytorch_fid(*statistics)
        logits = (2 * rng.normal(size=(2000, 1008))).astype(np.float32)
        ours = inception_score(logits, 500)
        yield "Inception Score, 2000 x 1008", "formula, float64", seed, ours, inception_score_by_formula(logits, 500)
        theirs = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)["inception_score_mean"]
        yield "Inception Score, 2000 x 1008", "torch-fidelity", seed, ours, theirs
        reference = rng.normal(size=(600, 64)).astype(np.float32)
        samples = (0.9 * rng.normal(size=(700, 64)) + 0.03).astype(np.float32)
        ours, theirs = precision_recall(reference, samples), precision_recall_by_definition(reference, samples)
        yield "precision, 600 and 700 x 64", "definition, float64", seed, ours[0], theirs[0]
        yield "recall, 600 and 700 x 64", "definition, float64", seed, ours[1], theirs[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/metrics_agreement.md", help="Markdown file to write")
    args = parser.parse_args()
    rows = sorted(draws(), key=lambda row: row[:2])  # stable: draws stay in order
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pytorch-fid", "torch-fidelity")
    )
    lines = ["# Scores beside independent ones on the same features", ""]
    lines += [f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}."]
    lines += ["`python benchmarks/metrics_agreement.py` (its head says what is compared).", ""]
    lines += ["| score | against | largest relative difference of 10 |", "|---|---|---|"]
    for kind in dict.fromkeys(row[:2] for row in rows):
        differences = [abs(ours - theirs) / abs(theirs) for *name, _, ours, theirs in rows if tuple(name) == kind]
        lines.append(f"| {kind[0]} | {kind[1]} | {max(differences):.1e} |")
    lines += ["", "| score | against | draw | here | there |", "|---|---|---|---|---|"]
    lines += [f"| {score} | {other} | {draw} | {a:.10f} | {b:.10f} |" for score, other, draw, a, b in rows]
    text = "\n".join(lines) + "\n"
    Path(args.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
