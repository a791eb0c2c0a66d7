import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torchvision
from PIL import Image

from scripts import compute_fid_stats


@pytest.fixture
def images(tmp_path):
    """Twelve 8 x 8 pictures, as a folder, as an array, and as an .npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    np.savez(tmp_path / "images.npz", pixels)
    return pixels


@pytest.fixture
def stand_in_network(monkeypatch):
    """The pixels of a 2 x 2 corner instead of Inception's features: what is tested is everything around them."""
    monkeypatch.setattr(compute_fid_stats, "find_inception", lambda assets: None)
    monkeypatch.setattr(compute_fid_stats, "load_inception", lambda path, device: None)
    monkeypatch.setattr(
        compute_fid_stats,
        "pool_features",
        lambda network, batches, device: torch.cat([b[:, :, :2, :2].flatten(1).float() for b in batches]).numpy(),
    )


@pytest.mark.usefixtures("stand_in_network")
@pytest.mark.parametrize("source", [["--images", "images", "--resolution", "8"], ["--images", "images.npz"]])
def test_statistics_of_a_folder_and_of_an_npz(images, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    compute_fid_stats.main([*source, "--out", "deeper/stats.npz", "--batch_size", "5", "--workers", "0"])
    features = images.transpose(0, 3, 1, 2)[:, :, :2, :2].reshape(12, -1).astype(float)
    with np.load("deeper/stats.npz") as stats:
        np.testing.assert_allclose(stats["mu"], features.mean(0))
        np.testing.assert_allclose(stats["sigma"], np.cov(features, rowvar=False))


def test_statistics_are_pytorch_fids(images, tmp_path, monkeypatch):
    """Inception's architecture with random weights, scaled to keep its features apart, against pytorch-fid itself."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(torchvision.models.Inception3, "load_state_dict", lambda network, state: None)
    torch.manual_seed(0)
    network = pytorch_fid.inception.InceptionV3([3]).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    monkeypatch.setattr(compute_fid_stats, "find_inception", lambda assets: None)
    monkeypatch.setattr(compute_fid_stats, "load_inception", lambda path, device: network)
    monkeypatch.chdir(tmp_path)
    files = sorted((tmp_path / "images").iterdir())[:4]
    np.savez("four.npz", images[:4])
    compute_fid_stats.main(["--images", "four.npz", "--out", "stats.npz", "--batch_size", "3"])
    mu, sigma = pytorch_fid.fid_score.calculate_activation_statistics(files, network, batch_size=4, num_workers=0)
    with np.load("stats.npz") as stats:
        assert np.abs(mu).max() > 0.01
        np.testing.assert_allclose(stats["mu"], mu, rtol=1e-3, atol=1e-4 * np.abs(mu).max())
        np.testing.assert_allclose(stats["sigma"], sigma, rtol=1e-3, atol=1e-4 * np.abs(sigma).max())


@pytest.mark.usefixtures("stand_in_network")
def test_bad_input_ends_with_one_line(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        compute_fid_stats.main([*args, "--out", "stats.npz", "--workers", "0"])

    with pytest.raises(SystemExit, match="needs --resolution"):
        run("--images", "images")
    with pytest.raises(SystemExit, match=r"absent\.npz"):
        run("--images", "absent.npz")
    np.savez("other.npz", mu=np.zeros(3))
    with pytest.raises(SystemExit, match=r"other\.npz should be an \.npz with images as arr_0"):
        run("--images", "other.npz")
    np.savez("other.npz", np.zeros((2, 3)))
    with pytest.raises(SystemExit, match=r"uint8 \(N, H, W, 3\), found float64 \(2, 3\)"):
        run("--images", "other.npz")
    np.savez("one.npz", images[:1])
    with pytest.raises(SystemExit, match="needs two or more"):
        run("--images", "one.npz")
    (tmp_path / "images" / "03.png").write_bytes(b"junk")
    with pytest.raises(SystemExit, match=r"03\.png"):
        run("--images", "images", "--resolution", "8")
    assert not (tmp_path / "stats.npz").exists()
