"""EDM2's, REPA's and REPA-E's latents, written in their layouts."""

import json
import zipfile

import numpy as np
import pytest
import torch
from test_import import CLASSES, LABELS, N, run

from libs import UserError
from libs.autoencoder import load_autoencoder
from libs.latent_archives import ARCHIVES
from libs.normalization import EDM2


def features(mean=(0, 0, 0, 0), seed=0):
    """Means and standard deviations (N, 8, 4, 4) float32."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((N, 4, 4, 4)) + np.reshape(mean, (1, 4, 1, 1))
    return np.concatenate([means, rng.uniform(0.01, 2, (N, 4, 4, 4))], axis=1).astype(np.float32)


def name_of(i):
    return f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"


def write_folder(folder, values, labels=LABELS):
    (folder / "00000").mkdir(parents=True)
    for i, value in enumerate(values):
        np.save(folder / name_of(i), value)
    pairs = [[name_of(i), int(label)] for i, label in enumerate(labels)][::-1]  # in any order
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def write_zip(file, folder):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder).as_posix())
    return file


def write_h5(file, values):
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as archive:
        for i, value in enumerate(values):
            archive[name_of(i)] = value
        archive["dataset.json"] = json.dumps({"labels": [[name_of(i), int(k)] for i, k in enumerate(LABELS)]}).encode()
    return file


def as_moments(values):
    return np.concatenate([values[:, :4], 2 * np.log(values[:, 4:])], axis=1)


@pytest.mark.parametrize("form", ["folder", "beside images", "zip", "h5"])
def test_repas_latents_are_stored_as_moments(tmp_path, tiny_autoencoder, form):
    values = features()
    source = write_folder(tmp_path / "source" / "vae-sd", values)
    kind = "repa-e" if form == "h5" else "repa"
    if form == "beside images":
        source = source.parent
    elif form == "zip":
        source = write_zip(tmp_path / "vae-sd.zip", source)
    elif form == "h5":
        source = write_h5(tmp_path / "vae.h5", values)
    store = run(source, tmp_path / "out", tiny_autoencoder, kind, "--dtype", "float32")
    records, labels = store.read(range(N))
    np.testing.assert_allclose(records, as_moments(values), rtol=1e-5, atol=1e-6)
    assert np.array_equal(labels, LABELS) and store.meta["images_per_class"] == np.bincount(LABELS).tolist()


def test_edm2s_latents_are_of_pixels_from_0_to_1(tmp_path, tiny_autoencoder):
    values = features(EDM2["latents_mean"])
    source = write_folder(tmp_path / "source", values)
    store = run_edm2(source, tmp_path / "out", tiny_autoencoder)
    own, edm2 = (load_autoencoder(tiny_autoencoder, latent_stats=stats) for stats in ("", "edm2"))
    assert store.autoencoder == edm2.identity and edm2.identity["encoder"] != own.identity["encoder"]
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(edm2.encode_moments(images), own.encode_moments(images / 2 + 0.5))
    latents = torch.randn(1, 4, 8, 8)
    raw = latents * torch.tensor(EDM2["latents_std"])[:, None, None] + torch.tensor(EDM2["latents_mean"])[:, None, None]
    with torch.no_grad():
        unit = own.vae.decode(raw).sample
    torch.testing.assert_close(edm2.decode(latents), (unit * 2 - 1).clamp(-1, 1))


def run_edm2(source, out, autoencoder):
    from libs.latents import LatentStore
    from scripts import import_latents

    flags = ["--format", "edm2", "--source", source, "--out", out, "--autoencoder", autoencoder, "--n_classes", CLASSES]
    import_latents.main([str(flag) for flag in flags])
    return LatentStore(out)


def test_edm2s_and_repas_are_not_confused(tmp_path):
    edm2 = write_folder(tmp_path / "edm2", features(EDM2["latents_mean"]))
    repa = write_folder(tmp_path / "repa", features((0.9, -0.3, 0.2, 0.4)))
    with pytest.raises(UserError, match=r"has channel means \[.*\]: these look like --format edm2 .pixels in \[0, 1\]"):
        ARCHIVES["repa"](edm2)
    with pytest.raises(UserError, match=r"these look like --format repa .pixels in \[-1, 1\]"):
        ARCHIVES["edm2"](repa)


def test_damaged_and_mixed_sources_end_with_one_line(tmp_path):
    def source(name, change):
        folder = write_folder(tmp_path / name, features())
        change(folder)
        return folder

    for name, change, message in (
        ("gap", lambda f: (f / name_of(3)).unlink(), r"should hold 00000/img-mean-std-00000003\.npy; found .*00000004"),
        ("none", lambda f: [p.unlink() for p in f.rglob("*.npy")], r"should hold .*00000000\.npy; found None"),
        ("twice", lambda f: (f / "00001").mkdir() or np.save(f / "00001/img-mean-std-00000003.npy", features()[3]),
         r"should hold 00000/img-mean-std-00000011\.npy; found 00001/img-mean-std-00000003\.npy"),
        ("damaged", lambda f: (f / name_of(3)).write_bytes(b"damaged"), r"00000003\.npy is not a readable \.npy"),
        ("mixed", lambda f: np.save(f / name_of(1), np.zeros((8, 4, 5), np.float32)), "1.npy should hold floats"),
        ("odd", lambda f: [np.save(f / name_of(i), np.zeros((7, 4, 4), np.float32)) for i in range(N)], "7 channels"),
        ("unlabelled", lambda f: (f / "dataset.json").write_text('{"labels": null}'), "with a label of each image"),
        ("fewer", lambda f: (f / "dataset.json").write_text(json.dumps({"labels": [[name_of(0), 1]]})), "00000001.npy"),
        ("unindexed", lambda f: (f / "dataset.json").unlink(), "with a label of each image; found FileNotFoundError"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            ARCHIVES["repa"](source(name, change)).read(0, N)
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is neither a folder nor a whole"):
        ARCHIVES["repa"](tmp_path / "broken.zip")


def test_h5_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match="repa-e needs h5py: python -m pip install -r scripts/import_requirements"):
        ARCHIVES["repa-e"](tmp_path / "broken.h5")
    monkeypatch.undo()
    pytest.importorskip("h5py")
    with pytest.raises(UserError, match=r"is not a whole \.h5 file"):
        ARCHIVES["repa-e"](tmp_path / "broken.h5")
