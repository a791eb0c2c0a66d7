"""The ADM suite's network, files and scores, on random weights of pytorch-fid's architecture and file name."""

import copy
import json
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torch_fidelity.feature_extractor_inceptionv3
from conftest import quick_distance, run
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from libs import inception, metrics
from libs.inception import find_inception, load_adm_inception, resize_like_tensorflow1
from libs.metrics import NpzImages, SetFeatures, extract_features, inception_score, read_statistics, score
from scripts import evaluate_npz


@pytest.fixture(scope="module")
def assets(inception_assets):
    return inception_assets


@pytest.fixture(scope="module")
def network(assets):
    return load_adm_inception(find_inception(assets), "cpu")


@pytest.fixture(scope="module")
def fidelity(assets):
    """torch-fidelity's own network, with the same weights: pool features and logits without the bias."""
    return torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "other", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(find_inception(assets))
    )


def pytorch_fid_network(assets):
    """pytorch-fid's own network, which reads the weights from PyTorch's hub cache."""
    with patch.object(
        pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(find_inception(assets))
    ):
        return pytorch_fid.inception.InceptionV3([3])


def pictures(n, size, seed=0):
    """(n, size, size, 3) uint8: random colours in squares, so that a resized picture is not grey."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(size // 8, 1).repeat(size // 8, 2)


def tensors(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_resizing_is_tensorflow_1s(size):
    """Bit for bit torch-fidelity's, and within float32 of the definition in float64."""
    images = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    found = resize_like_tensorflow1(images, 299)
    assert torch.equal(found, interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False))
    position = np.arange(299) * (size / 299)
    low = np.floor(position).astype(int)
    high, share = np.minimum(low + 1, size - 1), position - low
    weights = np.zeros((299, size))
    weights[np.arange(299), low] += 1 - share
    weights[np.arange(299), high] += share
    expected = weights @ images.double().numpy() @ weights.T
    np.testing.assert_allclose(found, expected, atol=0.02)  # positions in float32 move by up to 3e-5 pixels


@pytest.mark.parametrize("size", [256, 512])
def test_features_are_those_of_other_networks(size, network, fidelity, assets):
    images = tensors(pictures(2, size))
    pool, spatial, logits = network(images)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)

    expected_pool, expected_logits = fidelity(images)
    scale = expected_pool.abs().max().item()
    assert scale > 0.1 and (expected_pool[0] - expected_pool[1]).abs().max() > 0.01 * scale
    torch.testing.assert_close(pool, expected_pool, rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4 * expected_logits.abs().max().item())

    # pytorch-fid's blocks, run by hand on the resized pixels.
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    blocks = pytorch_fid_network(assets).eval().blocks
    x = blocks[1](blocks[0]((x - 128) / 128))
    for module in blocks[2][:6]:  # Mixed_5b to Mixed_6c
        x = module(x)
    mixed_6d = blocks[2][6].branch1x1(x).numpy()
    by_hand = np.array([[mixed_6d[n, c, h, w] for h in range(17) for w in range(17) for c in range(7)] for n in (0, 1)])
    np.testing.assert_allclose(spatial, by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())
    direct = blocks[3](blocks[2][7](blocks[2][6](x))).flatten(1)
    torch.testing.assert_close(pool, direct, rtol=1e-4, atol=1e-4 * scale)


def test_weights_are_found_or_asked_for(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected pt_inception.*checkpoints.*python -c"):
        find_inception(tmp_path)
    (tmp_path / "inception").mkdir()
    (tmp_path / "inception" / inception.WEIGHTS).write_bytes(find_inception(assets).read_bytes()[:100_000])
    with pytest.raises(ValueError, match="does not hold pytorch-fid's Inception weights"):
        load_adm_inception(find_inception(tmp_path), "cpu")
    assert torch.hub.get_dir() == str(tmp_path)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "inception" / inception.WEIGHTS)
    with pytest.raises(ValueError, match="does not hold pytorch-fid's Inception weights"):
        load_adm_inception(find_inception(tmp_path), "cpu")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.WEIGHTS).symlink_to(find_inception(assets))
    assert find_inception(tmp_path / "nowhere") == tmp_path / "checkpoints" / inception.WEIGHTS


def test_images_must_be_bytes(network):
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\); found torch.float32 \(1, 3, 8, 8\)"):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"found torch.uint8 \(1, 8, 8, 3\)"):
        network(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches_from_anywhere(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)
    save(tmp_path / "images.npz", images)
    npz = NpzImages(tmp_path / "images.npz")
    assert (npz.count, npz.size) == (11, (6, 5))
    batches = list(npz.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat(batches), tensors(images))
    assert torch.equal(torch.cat(list(npz.batches(2, 3, 8))), tensors(images[3:8]))


def ragged():
    pair = np.empty(2, object)
    pair[:] = [np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    return pair


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ragged(), "found Python objects: are the images of different sizes"),
        (np.zeros((5, 8, 8, 3), np.float32), r"found float32 \(5, 8, 8, 3\): save pixels as integers"),
        (np.zeros((5, 3, 8, 8), np.uint8), r"found the channels first, \(5, 3, 8, 8\)"),
        (np.zeros((5, 8, 8), np.uint8), r"found \(5, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "found an empty set"),
        (np.zeros((3, 8, 8, 3), np.uint8), "at least 4 images; found 3"),
        (np.zeros((5, 16, 16, 3), np.uint8), "samples.npz is 16x16 but the images of .*reference.npz are 8x8"),
    ],
)
def test_samples_that_cannot_be_scored(tmp_path, array, message):
    np.savez(tmp_path / "samples.npz", array)
    np.savez(tmp_path / "reference.npz", np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match=message):
        evaluate_npz.main([str(tmp_path / "reference.npz"), str(tmp_path / "samples.npz")])


def test_folders_and_files_are_not_mixed(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((5, 8, 8, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    files = [str(tmp_path / name) for name in ("images.npz", "images.npz", "empty")]
    with pytest.raises(SystemExit, match=r"SAMPLES are folders \(.*empty, ...\) and files: give either"):
        evaluate_npz.main(files)
    for flags, message in (
        (("--out", files[0]), "--out must be a folder, and .* is a file"),
        (("--keep", files[2]), "--keep must be a file, and .* is a folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate_npz.main([*files[:2], *flags])
    with pytest.raises(SystemExit, match="expected at least one image"):
        evaluate_npz.main([files[0], files[2]])
    np.savez(tmp_path / "wide.npz", np.zeros((5, 8, 16, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"wide\.npz is 16x8 but .*images\.npz is 8x8: give parts of one set"):
        evaluate_npz.main([files[0], files[0], str(tmp_path / "wide.npz")])


def test_one_image_has_no_covariance(tmp_path):
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(SystemExit, match="at least 2 images; found 1"):
        evaluate_npz.main([str(tmp_path / "statistics.npz"), str(tmp_path / "one.npz")])


def test_damaged_files_are_named(tmp_path):
    whole = tmp_path / "whole.npz"
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(whole, images)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(SystemExit, match=r"cut\.npz is not a whole \.npz"):
        evaluate_npz.main([str(whole), str(cut)])
    with pytest.raises(SystemExit, match=r"absent\.npz"):
        evaluate_npz.main([str(whole), str(tmp_path / "absent.npz")])
    # A header that promises more images than there are.
    with zipfile.ZipFile(whole) as archive:
        member = archive.read("arr_0.npy")
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("arr_0.npy", member[:-200])
    with pytest.raises(ValueError, match=r"cut\.npz is truncated: expected 9 images, found 7"):
        list(NpzImages(cut).batches(4))
    flipped = bytearray(whole.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"cut\.npz.* Bad CRC-32"):
        list(NpzImages(cut).batches(4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3)}, "is no reference: expected images .* found labels"),
        ({"mu": np.zeros(2048)}, "mu and sigma cannot be read"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"should be \(2048,\) and \(2048, 2048\), found \(64,\) and"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "mu or sigma holds NaN"),
    ],
)
def test_references_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "reference.npz")


# --- Scores -----------------------------------------------------------------------------------------------------------


def exact_distance(x1, x2):
    """Fréchet distance of fewer images than features, by the singular values of X1 X2ᵀ (see test_metrics)."""
    x1, x2 = np.asarray(x1, np.float64), np.asarray(x2, np.float64)
    c1, c2 = x1 - x1.mean(0), x2 - x2.mean(0)
    n1, n2 = len(x1) - 1, len(x2) - 1
    root = np.linalg.svd(c1 @ c2.T / np.sqrt(n1 * n2), compute_uv=False).sum()
    return ((x1.mean(0) - x2.mean(0)) ** 2).sum() + (c1**2).sum() / n1 + (c2**2).sum() / n2 - 2 * root


def expected_scores(fidelity, network, reference, samples):
    (pool_r, _), (pool_s, logits) = fidelity(tensors(reference)), fidelity(tensors(samples))
    p = logits.double().softmax(1)
    distances = {
        (a, b): torch.cdist(x.double(), y.double())
        for a, x in (("r", pool_r), ("s", pool_s))
        for b, y in (("r", pool_r), ("s", pool_s))
    }
    radii = {name: distances[name, name].sort(1).values[:, 3] for name in "rs"}  # the first is the image itself
    return {
        "fid": exact_distance(pool_r, pool_s),
        "sfid": exact_distance(network(tensors(reference))[1], network(tensors(samples))[1]),
        "inception_score": (p * (p / p.mean(0)).log()).sum(1).mean().exp().item(),
        "precision": (distances["s", "r"] <= radii["r"]).any(1).double().mean().item(),
        "recall": (distances["r", "s"] <= radii["s"]).any(1).double().mean().item(),
    }


@pytest.fixture(scope="module")
def sets():
    """Two sets that overlap in part: each has pictures of its own contrast, which the network tells apart."""
    reference, samples = pictures(10, 16, 1), pictures(9, 16, 2)
    samples[:4] = samples[:4] // 2 + 60
    reference[:4] = reference[:4] // 32 + 220
    return reference, samples


def test_the_five_scores(tmp_path, monkeypatch, capsys, assets, network, fidelity, sets):
    """Statistics beside the images go before theirs; what a reference does not allow is left out and said."""
    reference, samples = sets
    other = fidelity(tensors(pictures(6, 16, 3)))[0]
    mu, sigma = other.double().mean(0).numpy(), np.cov(other.double().numpy(), rowvar=False)
    expected = expected_scores(fidelity, network, reference, samples)
    expected["fid"] = exact_distance(other, fidelity(tensors(samples))[0])
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1 and expected["inception_score"] > 1.01

    monkeypatch.setattr(evaluate_npz, "ASSETS", assets)
    np.savez(tmp_path / "reference.npz", reference, mu=mu, sigma=sigma)
    np.savez(tmp_path / "samples.npz", samples)
    out, written = tmp_path / "report", tmp_path / "report" / "metrics.json"
    args = [str(tmp_path / "reference.npz"), str(tmp_path / "samples.npz"), "--out", str(out), "--batch_size", "3"]
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


def test_two_processes_share_the_work(tmp_path, assets, network, sets):
    """The features of one process, in order. Weights in PyTorch's cache, where pytorch-fid leaves them."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "checkpoints").symlink_to(assets / "inception")
    mu, sigma = np.ones(2048), np.eye(2048)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "samples.npz", sets[1])
    files = [tmp_path / "reference.npz", tmp_path / "samples.npz", "--out", tmp_path, "--batch_size", "2"]
    done = run("scripts/evaluate_npz.py", *files, processes=2, env={"TORCH_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    pool, _, logits = network(tensors(sets[1]))
    # The root of a covariance times 1 has the singular values of the centred features over sqrt(N - 1).
    values = np.linalg.svd((pool.double() - pool.double().mean(0)).numpy() / np.sqrt(8), compute_uv=False)
    fid = ((pool.double().mean(0).numpy() - mu) ** 2).sum() + (values**2).sum() + 2048 - 2 * values.sum()
    assert report["fid"] == pytest.approx(fid, rel=1e-4)
    assert report["inception_score"] == pytest.approx(inception_score(logits), rel=1e-4)


def test_parts_of_a_set_are_the_set(network, sets):
    whole = extract_features(network, [tensors(sets[0])])
    parts = SetFeatures.joined([extract_features(network, [tensors(part)]) for part in (sets[0][:3], sets[0][3:])])
    torch.testing.assert_close(parts.pool, whole.pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(parts.gaussians()["sfid"][1], whole.gaussians()["sfid"][1], rtol=1e-3, atol=1e-4)


def test_kept_features_stand_for_their_images(tmp_path, assets, sets, monkeypatch):
    """As parts of the samples, one with images, and as the reference; what they are not taken for is refused."""
    monkeypatch.setattr(evaluate_npz, "ASSETS", assets)
    monkeypatch.setattr(metrics, "frechet_distance", quick_distance)
    names = {"reference": sets[0], "samples": sets[1], "first": sets[1][:6], "last": sets[1][6:]}
    files = {name: str(tmp_path / f"{name}.npz") for name in (*names, "kept_first", "kept_reference")}
    for name, images in names.items():
        np.savez(files[name], images)

    def scores(*args):
        evaluate_npz.main([*args, "--out", str(tmp_path), "--batch_size", "3"])
        report = json.loads((tmp_path / "metrics.json").read_text())
        return [report[name] for name in ("fid", "sfid", "inception_score", "precision", "recall")]

    scores(files["first"], files["reference"], "--keep", files["kept_reference"])
    whole = scores(files["reference"], files["samples"])
    scores(files["reference"], files["first"], "--keep", files["kept_first"])
    assert scores(files["kept_reference"], files["kept_first"], files["last"]) == pytest.approx(whole, rel=1e-6)

    statistics = read_statistics(files["kept_reference"])
    np.testing.assert_allclose(statistics["fid"][0], np.load(files["kept_reference"])["pool"].mean(0), rtol=1e-5)
    with np.load(files["kept_first"]) as arrays:
        kept = dict(arrays)
    for change, message in (
        ({"size": np.array([8, 8])}, "kept_first.npz is 8x8 but the images of .* are 16x16"),
        ({"inception": np.array("0" * 64)}, "kept_first.npz holds features of other Inception weights"),
        ({"logits": kept["logits"][:2]}, "kept_first.npz: expected features of shapes"),
        ({"size": np.array(8)}, r"kept_first.npz: expected size \(H, W\) and pool"),
        ({"pool": np.array(8.0)}, r"kept_first.npz: expected size \(H, W\) and pool"),
    ):
        np.savez(files["kept_first"], **{**kept, **change})
        with pytest.raises(SystemExit, match=message):
            scores(files["kept_reference"], files["kept_first"])
    del kept["mu_s"]
    np.savez(files["kept_first"], **kept)
    with pytest.raises(SystemExit, match="should hold kept features, found no mu_s"):
        scores(files["kept_reference"], files["kept_first"])


def test_nan_features_are_refused(network, sets):
    broken = copy.deepcopy(network)
    broken.trunk.Conv2d_1a_3x3.conv.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"spatial features of x\.npz: 2 of 2 rows hold NaN"):
        extract_features(broken, [tensors(sets[0][:2])], "x.npz")
    good = extract_features(network, [tensors(sets[0][:4])])
    bad = SetFeatures(good.pool * torch.nan, good.logits, good.spatial)
    with pytest.raises(ValueError, match="4 of 4 rows hold NaN"):
        score(bad, {}, good)
    with pytest.raises(ValueError, match="expected images, found none"):
        extract_features(network, [], "x.npz")
