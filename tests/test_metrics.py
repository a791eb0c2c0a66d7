import types

import numpy as np
import pytest
import pytorch_fid.fid_score
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from libs import metrics
from libs.metrics import frechet_distance, gaussian_statistics, inception_score, precision_recall


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles smaller than the sets, and not a divisor of them."""
    monkeypatch.setattr(metrics, "ROWS", 37)


def random_covariance(rng, d):
    factor = rng.normal(size=(d, d))
    return factor @ factor.T


def test_statistics_are_numpys(rng, small_tiles):
    features = (rng.normal(size=(200, 11)) @ rng.normal(size=(11, 11)) + 100).astype(np.float32)
    mu, sigma = gaussian_statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_frechet_distance_of_commuting_gaussians_is_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    std1, std2 = rng.uniform(0, 3, size=(2, 20))
    mu1, mu2 = rng.normal(size=(2, 20))
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    found = frechet_distance(mu1, (basis * std1**2) @ basis.T, mu2, (basis * std2**2) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_frechet_distance_is_pytorch_fids(seed, monkeypatch):
    """It calls SciPy's sqrtm with `disp`, which SciPy 1.18 no longer takes: given here by a function that does."""
    take_disp = types.SimpleNamespace(sqrtm=lambda a, disp: (scipy.linalg.sqrtm(a), None))
    monkeypatch.setattr(pytorch_fid.fid_score, "linalg", take_disp)
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(200, 40)) @ rng.normal(size=(40, 40)), 1.1 * rng.normal(size=(150, 40)) + 0.2
    statistics = (*gaussian_statistics(x), *gaussian_statistics(y))
    expected = pytorch_fid.fid_score.calculate_frechet_distance(*statistics)
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_frechet_distance_is_that_of_the_general_square_root(seed):
    rng = np.random.default_rng(seed)
    mu1, mu2 = rng.normal(size=(2, 30))
    sigma1, sigma2 = random_covariance(rng, 30), random_covariance(rng, 30)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * np.real(root))
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_fewer_images_than_features(rng):
    """tr (S1 S2)^½ is the sum of singular values of X1 X2ᵀ / sqrt((n1 - 1) (n2 - 1)), X centred: no square root."""
    x1, x2 = rng.normal(size=(25, 120)), 2 * rng.normal(size=(40, 120)) + 0.3
    c1, c2 = x1 - x1.mean(0), x2 - x2.mean(0)
    trace_root = np.linalg.svd(c1 @ c2.T / np.sqrt(24 * 39), compute_uv=False).sum()
    expected = ((x1.mean(0) - x2.mean(0)) ** 2).sum() + (c1**2).sum() / 24 + (c2**2).sum() / 39 - 2 * trace_root
    found = frechet_distance(*gaussian_statistics(x1), *gaussian_statistics(x2))
    assert found == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(*gaussian_statistics(x1), *gaussian_statistics(x1)) == pytest.approx(0, abs=1e-4)


def test_inception_score_is_its_formula(rng):
    logits = 3 * rng.normal(size=(250, 17))
    scores = []
    for part in (logits[:100], logits[100:200], logits[200:]):
        p = scipy.special.softmax(part, axis=1)
        kl = [scipy.stats.entropy(row, p.mean(0)) for row in p]
        scores.append(np.exp(np.mean(kl)))
    assert inception_score(logits, split_size=100) == pytest.approx(np.mean(scores), rel=1e-10)


def test_inception_score_limits():
    assert inception_score(np.zeros((60, 10))) == pytest.approx(1)
    sure = np.full((60, 10), -1e4)
    sure[np.arange(60), np.arange(60) % 10] = 0
    assert inception_score(sure) == pytest.approx(10)


def brute_force(reference, samples, k):
    """Precision and recall from the definition, in float64, every pair of points by itself."""

    def distances(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1))

    def radii(x):
        return np.sort(distances(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]

    between = distances(samples, reference)
    return (between <= radii(reference)).any(1).mean(), (between <= radii(samples)[:, None]).any(0).mean()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_brute_forces(seed, k, small_tiles):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(110, 16)).astype(np.float32) + 5
    samples = 0.8 * rng.normal(size=(150, 16)).astype(np.float32) + 5.3
    expected = brute_force(reference, samples, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(reference, torch.from_numpy(samples), k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_equal_and_distant_sets(rng):
    x = rng.normal(size=(50, 8)).astype(np.float32)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


@pytest.mark.parametrize("score", [gaussian_statistics, inception_score, lambda x: precision_recall(x, x)])
@pytest.mark.parametrize("features", [np.full((9, 3), np.nan), np.zeros((9, 3), int), np.zeros(9), np.zeros((0, 3))])
def test_refuses_what_are_no_features(score, features):
    with pytest.raises(ValueError, match=r"expected .*features"):
        score(features)


def test_refuses_too_few_and_mismatched(rng):
    x = rng.normal(size=(9, 3))
    with pytest.raises(ValueError, match="at least 2 images"):
        gaussian_statistics(x[:1])
    with pytest.raises(ValueError, match="at least 4 images"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="found 3 and 2 dimensions"):
        precision_recall(x, x[:, :2])
    with pytest.raises(ValueError, match="same network"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="sigma2 holds NaN"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.full((3, 3), np.nan))


def test_statistics_of_parts_are_those_of_the_whole(rng, small_tiles):
    """Given one after the other, and made apart and merged in another order; far from the origin, where sums cancel."""
    features = rng.normal(size=(300, 9)) @ rng.normal(size=(9, 9)) + 1e4
    parts = np.split(features, [1, 40, 41, 230])
    in_order, merged = metrics.GaussianStatistics(), metrics.GaussianStatistics()
    for part in parts:
        in_order.update(part)
    for part in reversed(parts):
        alone = metrics.GaussianStatistics()
        alone.update(torch.from_numpy(part))
        merged.merge(alone)
        merged.merge(metrics.GaussianStatistics())
    for statistics in (in_order, merged):
        assert statistics.count == 300
        mu, sigma = statistics.mean_and_covariance()
        np.testing.assert_allclose(mu, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
    mu, _ = merged.mean_and_covariance()
    kept = mu.copy()
    merged.update(features)
    np.testing.assert_array_equal(mu, kept)  # what was given out does not change
    with pytest.raises(ValueError, match="found 9 and 2 dimensions"):
        merged.update(features[:, :2])


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_torch_fidelitys(seed):
    """On the same features. Its splits of the Inception Score are of equal sizes, so 4 x 50 here."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(200, 12)), 1.1 * rng.normal(size=(150, 12)) + 0.2
    statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = frechet_distance(*gaussian_statistics(x), *gaussian_statistics(y))
    logits = torch.from_numpy(3 * x)
    score = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    print(f"Fréchet {found:.9f} {fid:.9f}, Inception Score {inception_score(logits, 50):.9f} {score:.9f}")
    assert found == pytest.approx(fid, rel=1e-8)
    assert inception_score(logits, 50) == pytest.approx(score, rel=1e-12)
    expected = calculate_precision_recall_full(torch.from_numpy(y), torch.from_numpy(x))
    assert precision_recall(x, y) == pytest.approx(expected, abs=1e-6)
