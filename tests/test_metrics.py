"""Scores of features against independent programs; the suite on random weights of pytorch-fid's Inception."""

import copy
import json
import types
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import scipy
import torch
import torch_fidelity.feature_extractor_inceptionv3
from conftest import quick_distance, run
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_prc import calculate_precision_recall_full

from libs import inception, metrics
from libs.inception import find_inception, load_adm_inception, resize_like_tensorflow1
from libs.metrics import (
    GaussianStatistics,
    NpzImages,
    SetFeatures,
    extract_features,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    open_reference,
    precision_recall,
    score,
    stack_batches,
)
from scripts import evaluate_npz


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles smaller than the sets, and not a divisor of them."""
    monkeypatch.setattr(metrics, "ROWS", 37)


# --- Scores of features -----------------------------------------------------------------------------------------------


def test_statistics_are_numpys_also_of_parts(rng, small_tiles):
    """Given one after the other, and made apart and merged in another order; far from the origin, where sums cancel."""
    features = (rng.normal(size=(300, 9)) @ rng.normal(size=(9, 9)) + 1e4).astype(np.float32)
    exact = features.astype(np.float64)
    parts = np.split(features, [1, 40, 41, 230])
    in_order, merged = GaussianStatistics(), GaussianStatistics()
    for part in parts:
        in_order.update(part)
    for part in reversed(parts):
        alone = GaussianStatistics()
        alone.update(torch.from_numpy(part))
        merged.merge(alone)
        merged.merge(GaussianStatistics())
    assert in_order.count == merged.count == 300
    kept, _ = merged.mean_and_covariance()
    for mu, sigma in (gaussian_statistics(features), in_order.mean_and_covariance(), merged.mean_and_covariance()):
        assert mu.dtype == sigma.dtype == np.float64
        np.testing.assert_allclose(mu, exact.mean(0), rtol=1e-14)
        np.testing.assert_allclose(sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
    merged.update(features + 1)
    np.testing.assert_allclose(kept, exact.mean(0), rtol=1e-14)  # what was given out does not change


@pytest.mark.parametrize("seed", range(10))
def test_frechet_distance(seed, monkeypatch):
    """The closed form where covariances commute; else pytorch-fid's.

    pytorch-fid calls SciPy's sqrtm with `disp`, which SciPy 1.18 no longer takes: given here by a function that does.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    (std1, std2), (mu1, mu2) = rng.uniform(0, 3, size=(2, 20)), rng.normal(size=(2, 20))
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    found = frechet_distance(mu1, (basis * std1**2) @ basis.T, mu2, (basis * std2**2) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)

    x, y = rng.normal(size=(200, 40)) @ rng.normal(size=(40, 40)), 1.1 * rng.normal(size=(150, 40)) + 0.2
    take_disp = types.SimpleNamespace(sqrtm=lambda a, disp: (scipy.linalg.sqrtm(a), None))
    monkeypatch.setattr(pytorch_fid.fid_score, "linalg", take_disp)
    statistics = *gaussian_statistics(x), *gaussian_statistics(y)
    expected = pytorch_fid.fid_score.calculate_frechet_distance(*statistics)
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-9)


def exact_distance(x1, x2):
    """Fréchet distance of fewer images than features, without a square root of a matrix.

    tr (S1 S2)^½ is the sum of the singular values of X1 X2ᵀ / sqrt((n1 - 1) (n2 - 1)), X centered.
    """
    x1, x2 = np.asarray(x1, np.float64), np.asarray(x2, np.float64)
    c1, c2 = x1 - x1.mean(0), x2 - x2.mean(0)
    n1, n2 = len(x1) - 1, len(x2) - 1
    root = np.linalg.svd(c1 @ c2.T / np.sqrt(n1 * n2), compute_uv=False).sum()
    return ((x1.mean(0) - x2.mean(0)) ** 2).sum() + (c1**2).sum() / n1 + (c2**2).sum() / n2 - 2 * root


def test_frechet_distance_of_fewer_images_than_features(rng):
    x1, x2 = rng.normal(size=(25, 120)), 2 * rng.normal(size=(40, 120)) + 0.3
    found = frechet_distance(*gaussian_statistics(x1), *gaussian_statistics(x2))
    assert found == pytest.approx(exact_distance(x1, x2), rel=1e-7)
    assert frechet_distance(*gaussian_statistics(x1), *gaussian_statistics(x1)) == pytest.approx(0, abs=1e-4)


def test_inception_score_is_its_formula(rng):
    logits = 3 * rng.normal(size=(250, 17))
    scores = []
    for part in (logits[:100], logits[100:200], logits[200:]):
        p = scipy.special.softmax(part, axis=1)
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))
    assert inception_score(logits, split_size=100) == pytest.approx(np.mean(scores), rel=1e-10)
    assert inception_score(np.zeros((60, 10))) == pytest.approx(1)
    sure = np.full((60, 10), -1e4)
    sure[np.arange(60), np.arange(60) % 10] = 0
    assert inception_score(sure) == pytest.approx(10)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_torch_fidelitys(seed, k, small_tiles):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(110, 16)).astype(np.float32) + 5
    samples = torch.from_numpy(0.8 * rng.normal(size=(150, 16)).astype(np.float32) + 5.3)
    expected = calculate_precision_recall_full(samples, torch.from_numpy(reference), neighborhood=k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=1e-6)
    assert precision_recall(reference, reference, k) == (1, 1)
    assert precision_recall(reference, reference + 100, k) == (0, 0)


@pytest.mark.parametrize("function", [gaussian_statistics, inception_score, lambda x: precision_recall(x, x)])
@pytest.mark.parametrize("features", [np.full((9, 3), np.nan), np.zeros((0, 3))])
def test_features_that_would_give_wrong_scores_are_refused(function, features):
    with pytest.raises(ValueError, match=r"expected features of . or more images, found"):
        function(features)


def test_nan_statistics_and_too_few_neighbors_give_no_score():
    assert np.isnan(frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="features of 4 or more images, found 3"):
        precision_recall(np.zeros((9, 3)), np.zeros((3, 3)))


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(inception_assets):
    return load_adm_inception(find_inception(inception_assets), "cpu")


@pytest.fixture(scope="module")
def fidelity(inception_assets):
    """torch-fidelity's own network, with the same weights: pool features and logits without the bias."""
    return torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "other", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(find_inception(inception_assets))
    )


def pictures(n, size, seed=0):
    """(n, size, size, 3) uint8: random colors in squares, so that a resized picture is not gray."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(size // 8, 1).repeat(size // 8, 2)


def tensors(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_resizing_is_tensorflow_1s(size):
    """Bit for bit as torch-fidelity has it."""
    images = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    found = resize_like_tensorflow1(images, 299)
    assert torch.equal(found, interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False))


@pytest.mark.parametrize("size", [256, 512])
def test_features_are_those_of_other_networks(size, network, fidelity, inception_assets):
    images = tensors(pictures(2, size))
    pool, spatial, logits = network(images)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)

    expected_pool, expected_logits = fidelity(images)
    scale = expected_pool.abs().max().item()
    assert scale > 0.1 and (expected_pool[0] - expected_pool[1]).abs().max() > 0.01 * scale
    torch.testing.assert_close(pool, expected_pool, rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4 * expected_logits.abs().max().item())

    # pytorch-fid's blocks, run by hand on the resized pixels.
    weights = torch.load(find_inception(inception_assets))
    with patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights):
        blocks = pytorch_fid.inception.InceptionV3([3]).eval().blocks
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    x = blocks[1](blocks[0]((x - 128) / 128))
    for module in blocks[2][:6]:  # Mixed_5b to Mixed_6c
        x = module(x)
    mixed_6d = blocks[2][6].branch1x1(x).numpy()
    by_hand = np.array([[mixed_6d[n, c, h, w] for h in range(17) for w in range(17) for c in range(7)] for n in (0, 1)])
    np.testing.assert_allclose(spatial, by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())


def test_weights_are_found_or_asked_for(inception_assets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no Inception weights .*checkpoints.*python -c"):
        find_inception(tmp_path)
    (tmp_path / "inception").mkdir()
    file = tmp_path / "inception" / inception.WEIGHTS
    file.write_bytes(find_inception(inception_assets).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged or not pytorch-fid's Inception"):
        load_adm_inception(find_inception(tmp_path), "cpu")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, file)
    with pytest.raises(ValueError, match=r"not pytorch-fid's Inception \(RuntimeError: .*Missing key"):
        load_adm_inception(find_inception(tmp_path), "cpu")
    torch.save({"fc.weight": types.SimpleNamespace()}, file)
    with pytest.raises(ValueError, match=r"not pytorch-fid's Inception \(UnpicklingError"):
        load_adm_inception(find_inception(tmp_path), "cpu")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.WEIGHTS).symlink_to(find_inception(inception_assets))
    assert find_inception(tmp_path / "nowhere") == tmp_path / "checkpoints" / inception.WEIGHTS


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches_from_anywhere(tmp_path, save):
    """From one file, or from parts of a set."""
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)
    names = [tmp_path / name for name in ("whole.npz", "first.npz", "last.npz")]
    for name, part in zip(names, (images, images[:3], images[3:]), strict=True):
        save(name, part)
    for npz in (NpzImages(names[0]), NpzImages(*names[1:])):
        assert (npz.count, npz.size) == (11, (6, 5))
        batches = list(stack_batches(npz.images(), 4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert torch.equal(torch.cat(batches), tensors(images))
        for indices in (range(3, 8), [0, 2, 9]):
            assert np.array_equal(list(npz.images(indices)), images[indices])


def ragged():
    pair = np.empty(2, object)
    pair[:] = [np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    return pair


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ragged(), r"arr_0 should be images, uint8 \(N, H, W, 3\); found object \(2,\)"),
        (np.zeros((5, 8, 8, 3), np.float32), r"found float32 \(5, 8, 8, 3\)"),
        (np.zeros((5, 3, 8, 8), np.uint8), r"found uint8 \(5, 3, 8, 8\)"),
        (np.zeros((5, 8, 8), np.uint8), r"found uint8 \(5, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"found uint8 \(0, 8, 8, 3\)"),
        (np.zeros((3, 8, 8, 3), np.uint8), r"samples\.npz: expected at least 4 images; found 3"),
        (np.zeros((5, 16, 16, 3), np.uint8), r"samples\.npz is 16x16 but the images of .*reference\.npz are 8x8"),
    ],
)
def test_samples_that_cannot_be_scored(tmp_path, inception_assets, monkeypatch, array, message):
    monkeypatch.setattr(evaluate_npz, "ASSETS", inception_assets)
    np.savez(tmp_path / "samples.npz", array)
    np.savez(tmp_path / "reference.npz", np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match=message):
        evaluate_npz.main([str(tmp_path / "reference.npz"), str(tmp_path / "samples.npz")])


def test_what_the_command_cannot_score(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", np.zeros((5, 8, 16, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    images, wide, empty = (str(tmp_path / name) for name in ("images.npz", "wide.npz", "empty"))
    for arguments, message in (
        ([images, images, empty], "SAMPLES must be folders or files, not both"),
        ([images, images, "--out", images], "--out must be a folder; found the file .*images"),
        ([images, empty], r"expected 0\.png to 0\.png by the images found, found 1 missing"),
        (
            [images, images, wide],
            r"wide\.npz .* uint8 \(N, 8, 8, 3\), as in .*images\.npz; found uint8 \(5, 8, 16, 3\)",
        ),
        ([images, str(tmp_path / "absent.npz")], r"absent\.npz"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate_npz.main(arguments)


def test_damaged_images_are_named(tmp_path):
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    np.savez(whole, np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    cut.write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cut\.npz is damaged or not the \.npz expected: File is not a zip file"):
        NpzImages(cut)
    with zipfile.ZipFile(whole) as archive:
        member = archive.read("arr_0.npy")
    with zipfile.ZipFile(cut, "w") as archive:  # a header that promises more images than there are
        archive.writestr("arr_0.npy", member[:-200])
    with pytest.raises(ValueError, match=r"cut\.npz is damaged"):
        list(NpzImages(cut).images())
    flipped = bytearray(whole.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"cut\.npz.* Bad CRC-32"):
        list(NpzImages(cut).images())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3)}, r"expected images .* found \['labels'\]"),
        ({"mu": np.zeros(2048)}, r"no item named 'sigma\.npy'"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"mu should be \(2048,\), all finite"),
        ({"mu": np.zeros(2048), "sigma": np.zeros(5_000_000)}, r"sigma should be \(2048, 2048\), all finite"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "mu should be .*, all finite"),
        ({"mu": ragged(), "sigma": np.eye(2048)}, "allow_pickle=False"),
    ],
)
def test_references_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=rf"reference\.npz.*{message}"):
        open_reference(tmp_path / "reference.npz")


# --- The suite --------------------------------------------------------------------------------------------------------


def expected_scores(fidelity, network, reference, samples):
    (pool_r, _), (pool_s, logits) = fidelity(tensors(reference)), fidelity(tensors(samples))
    p = logits.double().softmax(1)
    precision, recall = calculate_precision_recall_full(pool_s, pool_r)
    return {
        "sfid": exact_distance(network(tensors(reference))[1], network(tensors(samples))[1]),
        "inception_score": (p * (p / p.mean(0)).log()).sum(1).mean().exp().item(),
        "precision": precision,
        "recall": recall,
    }


@pytest.fixture(scope="module")
def sets():
    """Two sets that overlap in part: each has pictures of its own contrast, which the network tells apart."""
    reference, samples = pictures(10, 16, 1), pictures(9, 16, 2)
    samples[:4] = samples[:4] // 2 + 60
    reference[:4] = reference[:4] // 32 + 220
    return reference, samples


@pytest.mark.slow
def test_the_five_scores(tmp_path, monkeypatch, capsys, inception_assets, network, fidelity, sets):
    """Statistics beside the images go before theirs; what a reference does not allow is left out and said."""
    reference, samples = sets
    other = fidelity(tensors(pictures(6, 16, 3)))[0]
    mu, sigma = other.double().mean(0).numpy(), np.cov(other.double().numpy(), rowvar=False)
    expected = expected_scores(fidelity, network, reference, samples)
    expected["fid"] = exact_distance(other, fidelity(tensors(samples))[0])
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1 and expected["inception_score"] > 1.01

    monkeypatch.setattr(evaluate_npz, "ASSETS", inception_assets)
    np.savez(tmp_path / "reference.npz", reference, mu=mu, sigma=sigma)
    parts = [str(tmp_path / name) for name in ("first.npz", "last.npz")]
    for part, images in zip(parts, (samples[:5], samples[5:]), strict=True):
        np.savez(part, images)
    written = tmp_path / "report" / "metrics.json"
    args = [str(tmp_path / "reference.npz"), *parts, "--out", str(tmp_path / "report"), "--batch_size", "3"]
    evaluate_npz.main(args)
    report = json.loads(written.read_text())
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-3), name
    assert report["not_computed"] == {} and report["samples"]["images"] == 9
    printed = capsys.readouterr().out
    assert f"FID: {report['fid']:.4f}" in printed and "warning: 9 images" in printed

    monkeypatch.setattr(metrics, "frechet_distance", quick_distance)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    evaluate_npz.main(args)
    report = json.loads(written.read_text())
    assert report["fid"] > 0
    assert report["sfid"] is report["precision"] is report["recall"] is None
    assert report["not_computed"]["sfid"] == "the reference holds neither mu_s, sigma_s nor images"
    assert "precision: the reference holds no images" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, inception_assets, network, sets):
    """The features of one process. Weights in PyTorch's cache, where pytorch-fid leaves them."""
    for name, images in zip(("reference", "samples"), sets, strict=True):
        np.savez(tmp_path / f"{name}.npz", images)
    files = [tmp_path / "reference.npz", tmp_path / "samples.npz", "--out", tmp_path, "--batch_size", "2"]
    done = run("scripts/evaluate_npz.py", *files, processes=2, env={"TORCH_HOME": str(inception_assets)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    (reference, _, _), (pool, _, logits) = (network(tensors(images)) for images in sets)
    assert report["fid"] == pytest.approx(exact_distance(reference, pool), rel=1e-4)
    assert report["inception_score"] == pytest.approx(inception_score(logits), rel=1e-4)


def in_memory(images):
    return types.SimpleNamespace(count=len(images), name="", images=lambda indices: iter(images[indices]))


def test_features_of_parts_are_those_of_the_set(network, sets):
    whole = extract_features(network, in_memory(sets[0]), 20)
    parts = SetFeatures.joined([extract_features(network, in_memory(sets[0]), 3, 5, i) for i in range(5)])  # of 4
    torch.testing.assert_close(parts.pool, whole.pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(parts.gaussians()["sfid"][1], whole.gaussians()["sfid"][1], rtol=1e-3, atol=1e-4)


def test_nan_features_are_refused(network, sets):
    broken = copy.deepcopy(network)
    broken.trunk.Conv2d_1a_3x3.conv.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"found 2, 2 with NaN"):
        extract_features(broken, in_memory(sets[0][:2]), 2)
    good = extract_features(network, in_memory(sets[0][:4]), 4)
    with pytest.raises(ValueError, match="found 4, 4 with NaN"):
        score(SetFeatures(good.pool * torch.nan, good.logits, good.spatial), {}, good)
