import numpy as np
import pytest
from PIL import Image

from scripts import compute_fid_stats


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Twelve 8 x 8 pictures, as a folder, as an array, and as an .npz; and a stand-in for the network.

    Two corners of the pixels instead of Inception's features: what is tested is everything around them.
    """

    def network(batch):
        return batch[:, :, :2, :2].flatten(1).float(), batch[:, :, 2:4, :3].flatten(1).float(), None

    monkeypatch.setattr(compute_fid_stats, "find_inception", lambda assets: None)
    monkeypatch.setattr(compute_fid_stats, "load_adm_inception", lambda path, device: network)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    np.savez(tmp_path / "images.npz", pixels)
    return pixels


@pytest.mark.parametrize("source", [["--images", "images", "--resolution", "8"], ["--images", "images.npz"]])
def test_statistics_of_a_folder_and_of_an_npz(images, source):
    compute_fid_stats.main([*source, "--out", "deeper/stats.npz", "--batch_size", "5", "--workers", "0"])
    pixels = images.transpose(0, 3, 1, 2).astype(float)
    with np.load("deeper/stats.npz") as stats:
        for suffix, corner in (("", pixels[:, :, :2, :2]), ("_s", pixels[:, :, 2:4, :3])):
            features = corner.reshape(12, -1)
            np.testing.assert_allclose(stats["mu" + suffix], features.mean(0))
            np.testing.assert_allclose(stats["sigma" + suffix], np.cov(features, rowvar=False))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images images", "needs --resolution"),
        ("--images damaged --resolution 8", r"03\.png"),
        ("--images absent.npz", r"absent\.npz"),
        ("--images other.npz", "no item named 'arr_0.npy'"),
        ("--images one.npz", "a covariance needs two or more"),
        ("--images images.npz --out images", "--out must be a file; found the folder images"),
        ("--images images.npz --out images.npz/x.npz", "Cannot write images.npz/x.npz: .*, or set --out"),
    ],
)
def test_bad_input_ends_with_one_line(images, tmp_path, flags, message):
    np.savez("other.npz", mu=np.zeros(3))
    np.savez("one.npz", images[:1])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "03.png").write_bytes(b"junk")
    (tmp_path / "damaged" / "04.png").write_bytes((tmp_path / "images" / "04.png").read_bytes())
    with pytest.raises(SystemExit, match=message):
        compute_fid_stats.main(["--out", "stats.npz", "--workers", "0", *flags.split()])
    assert not (tmp_path / "stats.npz").exists()
