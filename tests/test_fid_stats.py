import numpy as np
import pytest
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
    """Two corners of the pixels instead of Inception's features: what is tested is everything around them."""

    def network(batch):
        return batch[:, :, :2, :2].flatten(1).float(), batch[:, :, 2:4, :3].flatten(1).float(), None

    monkeypatch.setattr(compute_fid_stats, "find_inception", lambda assets: None)
    monkeypatch.setattr(compute_fid_stats, "load_adm_inception", lambda path, device: network)


@pytest.mark.usefixtures("stand_in_network")
@pytest.mark.parametrize("source", [["--images", "images", "--resolution", "8"], ["--images", "images.npz"]])
def test_statistics_of_a_folder_and_of_an_npz(images, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    compute_fid_stats.main([*source, "--out", "deeper/stats.npz", "--batch_size", "5", "--workers", "0"])
    pixels = images.transpose(0, 3, 1, 2).astype(float)
    with np.load("deeper/stats.npz") as stats:
        for suffix, corner in (("", pixels[:, :, :2, :2]), ("_s", pixels[:, :, 2:4, :3])):
            features = corner.reshape(12, -1)
            np.testing.assert_allclose(stats["mu" + suffix], features.mean(0))
            np.testing.assert_allclose(stats["sigma" + suffix], np.cov(features, rowvar=False))


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
    with pytest.raises(SystemExit, match=r"other\.npz: arr_0 should be images .*, found no arr_0"):
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
    for flags, message in (
        (("--batch_size", "0"), "--batch_size must be at least 1; found 0"),
        (("--workers", "-1"), "--workers must be at least 0; found -1"),
        (("--out", "images"), "--out must be a file, and images is a folder"),
        (("--out", "images.npz/x.npz"), "Cannot write images.npz/x.npz: .*, or set --out"),
    ):
        with pytest.raises(SystemExit, match=message):
            compute_fid_stats.main(["--images", "images.npz", "--out", "stats.npz", *flags])
    assert not (tmp_path / "stats.npz").exists()
