import io
import os
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from test_latents import damage

from libs.autoencoder import load_autoencoder, sample_latents
from libs.latent_formats import LightningDiTFolder, load_arrays, read_pair, read_plain_npy
from libs.latents import LatentStore
from scripts import import_latents, inspect_latents

N, CLASSES, SCALE = 11, 5, 0.5


@pytest.fixture
def autoencoder(tiny_autoencoder):
    return tiny_autoencoder


def features(channels, n=N, seed=0):
    return np.random.default_rng(seed).standard_normal((n, channels, 4, 4)).astype(np.float32)


LABELS = np.arange(N) % CLASSES


def as_objects(moments, label):
    """What numpy before 1.24 made of `np.save(file, (moments, label))`: an array of two objects."""
    pair = np.empty(2, dtype=object)
    pair[0], pair[1] = moments, label
    return pair


def save_uvit(file, moments, label, form="objects"):
    if form == "objects":
        np.save(file, as_objects(moments, label), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps((moments, label), protocol=form))


def write_uvit(folder, form="objects"):
    folder.mkdir()
    for i, (moments, label) in enumerate(zip(features(8), LABELS, strict=True)):
        save_uvit(folder / f"{i}.npy", moments, label, form)
    return folder


def run(source, out, autoencoder, kind, *more):
    arguments = [
        "--format",
        kind,
        "--source",
        source,
        "--out",
        out,
        "--autoencoder",
        autoencoder,
        "--n_classes",
        CLASSES,
    ]
    import_latents.main([str(argument) for argument in [*arguments, "--shard_size", 4, *more]])
    store = LatentStore.open(out)
    store.verify()
    store.check_against(autoencoder=load_autoencoder(autoencoder).identity, n_classes=CLASSES)
    return store


@pytest.mark.parametrize("form", ["objects", 2, 3, 4])
def test_uvit(tmp_path, autoencoder, form):
    store = run(write_uvit(tmp_path / "source", form), tmp_path / "out", autoencoder, "uvit", "--dtype", "float32")
    records, labels = store.read(range(N))
    assert np.array_equal(records, features(8)) and np.array_equal(labels, LABELS)
    assert store.meta["resolution"] == 8 and not store.meta["flips"]


def test_uvit_in_half_precision(tmp_path, autoencoder):
    store = run(write_uvit(tmp_path / "source"), tmp_path / "out", autoencoder, "uvit")
    assert np.array_equal(store.read(range(N))[0], features(8).astype(np.float16))


@pytest.mark.parametrize("scaled", [True, False])
def test_fast_dit_latents_are_what_training_draws(tmp_path, autoencoder, scaled):
    for kind in ("features", "labels"):
        (tmp_path / "source" / f"imagenet256_{kind}").mkdir(parents=True)
    for i, (latent, label) in enumerate(zip(features(4), LABELS, strict=True)):
        np.save(tmp_path / "source" / "imagenet256_features" / f"{i}.npy", latent[None])
        np.save(tmp_path / "source" / "imagenet256_labels" / f"{i}.npy", np.array([label]))
    more = ["--dtype", "float32"] + ([] if scaled else ["--no-scaled"])
    store = run(tmp_path / "source", tmp_path / "out", autoencoder, "fast-dit", *more)
    records, labels = store.read(range(N))
    latents = sample_latents(torch.from_numpy(records), torch.randn(N, 4, 4, 4), SCALE)
    expected = torch.from_numpy(features(4)) * (1 if scaled else SCALE)
    torch.testing.assert_close(latents, expected, atol=5e-6, rtol=1e-5)
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightningdit(tmp_path, autoencoder, dtype):
    (tmp_path / "source").mkdir()
    plain, mirrored = (torch.from_numpy(features(4, seed=seed)).to(dtype) for seed in (0, 1))
    for k, rows in enumerate((slice(0, 6), slice(6, 7), slice(7, N))):
        shard = {"latents": plain[rows], "latents_flip": mirrored[rows], "labels": torch.from_numpy(LABELS[rows])}
        shard = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(shard, tmp_path / "source" / f"latents_rank00_shard{k:03d}.safetensors")
    store = run(tmp_path / "source", tmp_path / "out", autoencoder, "lightningdit", "--dtype", "float32")
    records, labels = store.read(range(2 * N))
    assert store.meta["flips"] and np.array_equal(labels, np.repeat(LABELS, 2))
    latents = sample_latents(torch.from_numpy(records), torch.randn(2 * N, 4, 4, 4), SCALE) / SCALE
    torch.testing.assert_close(latents[::2], plain.float(), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(latents[1::2], mirrored.float(), atol=5e-6, rtol=1e-5)


def test_interrupted_imports_are_continued(tmp_path, autoencoder, capsys, monkeypatch):
    source = write_uvit(tmp_path / "source")
    run(source, tmp_path / "whole", autoencoder, "uvit")
    (source / "9.npy").rename(tmp_path / "aside")
    (source / "9.npy").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"9\.npy is not a readable \.npy file"):
        run(source, tmp_path / "out", autoencoder, "uvit")
    assert len(list((tmp_path / "out").glob("latents-*.npy"))) == 2
    (tmp_path / "aside").rename(source / "9.npy")
    run(source, tmp_path / "out", autoencoder, "uvit")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    capsys.readouterr()
    run(source, tmp_path / "out", autoencoder, "uvit")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        run(source, tmp_path / "out", autoencoder, "uvit", "--dtype", "float32")
    save_uvit(source / "7.npy", features(8)[0], LABELS[7])
    with pytest.raises(SystemExit, match=r"1 shards \(latents-00001\.npy\) were made from another source"):
        run(source, tmp_path / "out", autoencoder, "uvit")
    (tmp_path / "out" / "latents-00001.npy").unlink()
    assert np.array_equal(
        run(source, tmp_path / "out", autoencoder, "uvit").read([7])[0][0], features(8)[0].astype("f2")
    )


def test_bad_sources_end_with_one_line(tmp_path, autoencoder):
    with pytest.raises(SystemExit, match=r"No folder of features at .*absent"):
        run(tmp_path / "absent", tmp_path / "out", autoencoder, "uvit")
    source = write_uvit(tmp_path / "source")
    with pytest.raises(SystemExit, match="should hold one folder"):
        run(source, tmp_path / "out", autoencoder, "fast-dit")
    with pytest.raises(SystemExit, match=r"No \.safetensors files"):
        run(source, tmp_path / "out", autoencoder, "lightningdit")
    with pytest.raises(SystemExit, match="labels from 0 to 3: set --n_classes to more than 3"):
        run(source, tmp_path / "out", autoencoder, "uvit", "--n_classes", 2)
    with pytest.raises(SystemExit, match="labels from 0 to 4: set --n_classes to more than 4"):  # in the second shard
        run(source, tmp_path / "out", autoencoder, "uvit", "--n_classes", 4)
    run(source, tmp_path / "out", autoencoder, "uvit")
    save_uvit(source / "5.npy", np.zeros((8, 4, 5), np.float32), 0)
    with pytest.raises(SystemExit, match=r"5\.npy should hold floats of shape \(8, 4, 4\), found .*\(8, 4, 5\)"):
        run(source, tmp_path / "other", autoencoder, "uvit")
    (source / "5.npy").unlink()
    with pytest.raises(SystemExit, match=r"10 files up to 10\.npy but 5\.npy is missing"):
        run(source, tmp_path / "other", autoencoder, "uvit")
    with pytest.raises(SystemExit, match="6 channels, but the autoencoder's moments 8 and its latents 4"):
        (tmp_path / "six").mkdir()
        save_uvit(tmp_path / "six" / "0.npy", features(6)[0], 0)
        run(tmp_path / "six", tmp_path / "other", autoencoder, "uvit")
    for moments, label, message in (
        (features(8)[0], -1, "labels from -1: expected 0 to n_classes - 1"),
        (np.zeros((8, 0, 8), np.float32), 0, r"empty records: expected \(channels, h, w\), found \(8, 0, 8\)"),
    ):
        save_uvit(tmp_path / "six" / "0.npy", moments, label)
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "six", tmp_path / "fresh", autoencoder, "uvit")


def test_lightningdit_shards_that_do_not_fit(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"latents": torch.zeros(2, 4, 4, 4), "labels": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"a\.safetensors has no latents_flip"):
        LightningDiTFolder(tmp_path)
    none = torch.zeros(0, 4, 4, 4)
    save_file({"latents": none, "latents_flip": none.clone(), "labels": torch.zeros(0)}, file)
    with pytest.raises(ValueError, match="hold no images"):
        LightningDiTFolder(tmp_path)
    save_file(
        {"latents": torch.zeros(2, 4, 4, 4), "latents_flip": torch.zeros(3, 4, 4, 4), "labels": torch.zeros(2)}, file
    )
    with pytest.raises(ValueError, match="the same, and"):
        LightningDiTFolder(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        LightningDiTFolder(tmp_path)


class RunsCode:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_that_would_run_code_are_refused_and_not_run(tmp_path, protocol):
    marker, file = tmp_path / "was_run", tmp_path / "0.npy"
    for call in (
        RunsCode(os.system, f"touch {marker}"),
        RunsCode(eval, f"open({str(marker)!r}, 'w')"),
        RunsCode(np.save, str(marker), 1),
        RunsCode(getattr, "text", "upper"),
    ):
        for pair in ((call, 1), (features(8)[0], call)):
            file.write_bytes(pickle.dumps(pair, protocol))
            with pytest.raises(ValueError, match=r"0\.npy (was not loaded|is not a readable)"):
                read_pair(file)
            np.save(file, as_objects(*pair), allow_pickle=True)
            with pytest.raises(ValueError, match=r"0\.npy was not loaded: it holds a reference to "):
                read_pair(file)
    assert not marker.exists()


def test_a_pickle_that_would_take_all_memory_is_refused():
    huge = (2**32 - 1).to_bytes(4, "little")
    for data in (
        b"\x80\x04N" + pickle.LONG_BINPUT + huge + b".",  # a memo of 4 billion entries
        b"\x80\x05" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little") + b".",
        b"\x80\x04" + pickle.BINBYTES + huge + b".",
        b"\x80\x04" + pickle.FRAME + (2**62).to_bytes(8, "little") + b"N.",
    ):
        with pytest.raises(ValueError, match=r"^x "):
            load_arrays(data, "x")
    itself = as_objects(None, 1)
    itself[0] = itself
    buffer = io.BytesIO()
    np.save(buffer, itself, allow_pickle=True)
    with pytest.raises(ValueError, match="RecursionError"):
        load_arrays(buffer.getvalue()[buffer.getvalue().index(b"\n") + 1 :], "x")


def test_arrays_of_every_number_type_come_back():
    for dtype in ("<f2", ">f4", "<f8", "|u1", ">i2", "<i8"):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        for value in (array, np.asfortranarray(array), array[1, 2, 3]):
            for protocol in (2, 3, 4):
                loaded = load_arrays(pickle.dumps([value, 1], protocol), "x")[0]
                assert loaded.dtype == value.dtype and np.array_equal(loaded, value)


def test_four_thousand_damaged_npy_files(tmp_path):
    """Every one is a ValueError naming the file, or a pair of an array and an int."""
    rng, file = np.random.default_rng(0), tmp_path / "0.npy"
    originals = []
    for form in ("objects", 2, 4):
        save_uvit(file, features(8)[0], LABELS[3], form)
        originals.append(file.read_bytes())
    refused = 0
    for k in range(3000):
        original = originals[k % 3]
        # the values take most of the file, the header and the opcodes are what can do harm
        file.write_bytes(damage(original[:420], rng) + original[420:] if k % 2 else damage(original, rng))
        try:
            moments, label = read_pair(file)
            assert isinstance(moments, np.ndarray) and isinstance(label, int)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
    assert 1500 < refused < 3000

    np.save(file, features(4)[0])
    original = file.read_bytes()
    for _ in range(1000):
        file.write_bytes(damage(original[:130], rng) + original[130:])
        try:
            assert read_plain_npy(file).dtype.kind in "fiu"
        except ValueError as error:
            assert str(file) in str(error)


def test_a_plain_npy_is_no_pair_and_a_pickled_one_no_plain_array(tmp_path):
    np.save(tmp_path / "0.npy", features(8)[0])
    with pytest.raises(ValueError, match=r"0\.npy holds float32 numbers .* expected a pair"):
        read_pair(tmp_path / "0.npy")
    save_uvit(tmp_path / "1.npy", features(8)[0], 0)
    with pytest.raises(ValueError, match=r"1\.npy is not a whole \.npy file of numbers: found object"):
        read_plain_npy(tmp_path / "1.npy")


def test_inspect_prints_verifies_and_draws(tmp_path, autoencoder, capsys):
    run(write_uvit(tmp_path / "source"), tmp_path / "out", autoencoder, "uvit")
    capsys.readouterr()
    png = tmp_path / "samples.png"
    inspect_latents.main([str(tmp_path / "out"), "--verify", "--png", str(png), "--autoencoder", str(autoencoder)])
    printed = capsys.readouterr().out
    assert "11 of shape (8, 4, 4) float16" in printed and "5 with 2 to 3 images: 0, 1, 2" in printed
    assert "every file has the checksum" in printed and png.stat().st_size > 1000
    shard = tmp_path / "out" / "latents-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(SystemExit, match=r"latents-00000\.npy"):
        inspect_latents.main([str(tmp_path / "out"), "--verify"])


def test_inspect_refuses_another_autoencoder(tmp_path, autoencoder):
    run(write_uvit(tmp_path / "source"), tmp_path / "out", autoencoder, "uvit")
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(tmp_path / "other")
    for png, message in (
        ("x.png", "autoencoder of the store is"),
        ("x.foo", "--png must end in .png; found "),
        ("out/index.json/x.png", "Cannot write .*, or set --png"),
    ):
        with pytest.raises(SystemExit, match=message):
            inspect_latents.main(
                [str(tmp_path / "out"), "--png", str(tmp_path / png), "--autoencoder", str(tmp_path / "other")]
            )
