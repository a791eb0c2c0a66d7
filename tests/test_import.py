import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import RunsCode, contents
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from test_latents import damage

import utils
from libs import UserError
from libs.autoencoder import load_autoencoder
from libs.latent_formats import MAX_PICKLE_BYTES, LightningDiTFolder, read_pair, read_plain_npy
from libs.latents import LatentStore
from scripts import import_latents, inspect_latents

N, CLASSES, SCALE = 11, 5, 0.5


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
    arguments = ["--format", kind, "--source", source, "--out", out, "--autoencoder", autoencoder]
    arguments += ["--n_classes", CLASSES, "--shard_size", 4, *more]
    import_latents.main([str(argument) for argument in arguments])
    store = LatentStore(out)
    store.verify()
    store.check_against(n_classes=CLASSES)
    assert store.autoencoder == load_autoencoder(autoencoder).identity
    return store


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("objects", "float32"), (2, "float32"), (3, "float32"), (4, "float32"), ("objects", "float16")],
)
def test_uvit(tmp_path, tiny_autoencoder, form, dtype):
    source = write_uvit(tmp_path / "source", form)
    store = run(source, tmp_path / "out", tiny_autoencoder, "uvit", "--dtype", dtype)
    records, labels = store.read(range(N))
    assert np.array_equal(records, features(8).astype(dtype)) and np.array_equal(labels, LABELS)
    assert store.meta["resolution"] == 8 and not store.meta["flips"]


@pytest.mark.parametrize("scaled", [True, False])
def test_fast_dit_latents_are_what_training_draws(tmp_path, tiny_autoencoder, scaled):
    for kind in ("features", "labels"):
        (tmp_path / "source" / f"imagenet256_{kind}").mkdir(parents=True)
    for i, (latent, label) in enumerate(zip(features(4), LABELS, strict=True)):
        np.save(tmp_path / "source" / "imagenet256_features" / f"{i}.npy", latent[None])
        np.save(tmp_path / "source" / "imagenet256_labels" / f"{i}.npy", np.array([label]))
    more = ["--dtype", "float32"] + ([] if scaled else ["--no-scaled"])
    store = run(tmp_path / "source", tmp_path / "out", tiny_autoencoder, "fast-dit", *more)
    records, labels = store.read(range(N))
    latents = load_autoencoder(tiny_autoencoder).sample_latents(torch.from_numpy(records), torch.randn(N, 4, 4, 4))
    expected = torch.from_numpy(features(4)) * (1 if scaled else SCALE)
    torch.testing.assert_close(latents, expected, atol=5e-6, rtol=1e-5)
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightningdit(tmp_path, tiny_autoencoder, dtype):
    (tmp_path / "source").mkdir()
    plain, mirrored = (torch.from_numpy(features(4, seed=seed)).to(dtype) for seed in (0, 1))
    for k, rows in enumerate((slice(0, 6), slice(6, 7), slice(7, N))):
        shard = {"latents": plain[rows], "latents_flip": mirrored[rows], "labels": torch.from_numpy(LABELS[rows])}
        shard = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(shard, tmp_path / "source" / f"latents_rank00_shard{k:03d}.safetensors")
    store = run(tmp_path / "source", tmp_path / "out", tiny_autoencoder, "lightningdit", "--dtype", "float32")
    records, labels = store.read(range(2 * N))
    assert store.meta["flips"] and np.array_equal(labels, np.repeat(LABELS, 2))
    latents = load_autoencoder(tiny_autoencoder).sample_latents(torch.from_numpy(records), torch.randn(2 * N, 4, 4, 4))
    torch.testing.assert_close(latents[::2] / SCALE, plain.float(), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(latents[1::2] / SCALE, mirrored.float(), atol=5e-6, rtol=1e-5)


def test_latents_of_the_wrong_kind_or_scale_are_said(tmp_path, tiny_autoencoder, tiny_config, capsys, caplog):
    """At import, by inspect_latents.py and at the start of training."""
    source, scaled = tmp_path / "source", ("--scaled", "--no-scaled")
    for kind in ("features", "labels"):
        (source / f"imagenet256_{kind}").mkdir(parents=True)
    for i, label in enumerate(LABELS):  # normalized, of deviation 1: 0.125 if they are normalized once more
        np.save(source / "imagenet256_features" / f"{i}.npy", features(4)[i][None] / 4)
        np.save(source / "imagenet256_labels" / f"{i}.npy", np.array([label]))
    for flag, deviation in zip(scaled, ("0.2", "0.12"), strict=True):
        run(source, tmp_path / flag, tiny_autoencoder, "fast-dit", flag)
        assert f"a deviation of {deviation}" in capsys.readouterr().out
    inspect_latents.main([str(tmp_path / "--no-scaled")])
    assert (out := capsys.readouterr().out).count("a deviation of 0.12") == 1 and "set --latent_stats" in out
    tiny_config.dataset.update(path=str(tmp_path / "--no-scaled"), n_classes=CLASSES)
    tiny_config.z_shape = (4, 4, 4)
    utils.open_dataset(tiny_config, load_autoencoder(tiny_autoencoder))
    assert "a deviation of 0.12" in caplog.text
    with pytest.raises(SystemExit, match="the features have 4 channels, moments of the autoencoder 2 x 4"):
        run(uvit_of_latents(tmp_path / "uvit"), tmp_path / "no", tiny_autoencoder, "uvit")
    with pytest.raises(SystemExit, match="--scaled is of latents, and uvit holds moments"):
        run(write_uvit(tmp_path / "moments"), tmp_path / "no", tiny_autoencoder, "uvit", "--scaled")


def uvit_of_latents(folder):
    folder.mkdir()
    save_uvit(folder / "0.npy", features(4)[0], 0)
    return folder


def test_interrupted_imports_are_continued(tmp_path, tiny_autoencoder, capsys):
    source, out = write_uvit(tmp_path / "source"), tmp_path / "out"
    run(source, tmp_path / "whole", tiny_autoencoder, "uvit")
    (source / "9.npy").rename(tmp_path / "aside")
    (source / "9.npy").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"9\.npy is not a readable \.npy file"):
        run(source, out, tiny_autoencoder, "uvit")
    assert len(list(out.glob("latents-*.npy"))) == 2
    (tmp_path / "aside").rename(source / "9.npy")
    run(source, out, tiny_autoencoder, "uvit")
    assert contents(out) == contents(tmp_path / "whole")
    capsys.readouterr()
    run(source, out, tiny_autoencoder, "uvit")
    assert "nothing to do" in capsys.readouterr().out
    save_uvit(source / "7.npy", features(8)[0], LABELS[7])
    with pytest.raises(SystemExit, match=r"1 shards \(latents-00001\.npy\) were made from another source"):
        run(source, out, tiny_autoencoder, "uvit")
    (out / "latents-00001.npy").unlink()
    assert np.array_equal(run(source, out, tiny_autoencoder, "uvit").read([7])[0][0], features(8)[0].astype("f2"))


def test_bad_sources_end_with_one_line(tmp_path, tiny_autoencoder):
    source = write_uvit(tmp_path / "source")
    for name, kind, n_classes, message in (
        ("absent", "uvit", 5, r"absent should hold 0\.npy, 1\.npy, \.\.\. without gaps: 0\.npy is missing"),
        ("source", "fast-dit", 5, "should hold one folder"),
        ("source", "lightningdit", 5, r"should hold LightningDiT's \.safetensors shards; found no record in 0"),
        ("source", "uvit", 2, "labels from 0 to 3: expected 0 to --n_classes - 1"),
        ("source", "uvit", 4, "labels from 0 to 4: expected 0 to --n_classes - 1"),  # in the second shard
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / name, tmp_path / "out", tiny_autoencoder, kind, "--n_classes", n_classes)
    save_uvit(source / "5.npy", np.zeros((8, 4, 5), np.float32), 0)
    with pytest.raises(SystemExit, match=r"5\.npy should hold floats of shape \(8, 4, 4\), found .*\(8, 4, 5\)"):
        run(source, tmp_path / "other", tiny_autoencoder, "uvit")
    (source / "5.npy").unlink()
    with pytest.raises(SystemExit, match=r"without gaps: 5\.npy is missing"):
        run(source, tmp_path / "other", tiny_autoencoder, "uvit")
    (tmp_path / "one").mkdir()
    for moments, label, message in (
        (features(6)[0], 0, "6 channels, moments of the autoencoder 2 x 4: set --autoencoder"),
        (features(8)[0], -1, "labels from -1 to -1: expected 0 to --n_classes - 1"),
        (np.zeros((8, 0, 8), np.float32), 0, r"empty records: expected \(channels, h, w\), found \(8, 0, 8\)"),
    ):
        save_uvit(tmp_path / "one" / "0.npy", moments, label)
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "one", tmp_path / "fresh", tiny_autoencoder, "uvit")


def test_lightningdit_shards_that_do_not_fit(tmp_path):
    def shard(latents, flipped, labels, label_dtype=torch.int64):
        return {
            "latents": torch.zeros(latents),
            "latents_flip": torch.zeros(flipped),
            "labels": torch.zeros(labels, dtype=label_dtype),
        }

    four, five, none = (2, 4, 4, 4), (2, 4, 5, 5), (0, 4, 4, 4)
    for shards, message in (
        ([{"latents": torch.zeros(four), "labels": torch.zeros(2)}], r"0\.safetensors is not a shard.*latents_flip"),
        ([shard(none, none, 0)], r"shards; found no record in 1"),
        ([shard(four, five, 2)], r"0\.safetensors is not a shard .*: found latents .*4, 4.*, latents_flip .*5, 5"),
        ([shard(four, four, 2), shard(five, five, 2)], r"1\.safetensors .* found latents .*5, 5.*; first .*4, 4"),
        ([b"damaged"], r"0\.safetensors is not a shard"),
    ):
        for k, content in enumerate(shards):
            file = tmp_path / f"{k}.safetensors"
            file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
        with pytest.raises(UserError, match=message):
            LightningDiTFolder(tmp_path)
        (tmp_path / "1.safetensors").unlink(missing_ok=True)
    save_file(shard(four, four, 2, torch.float32), tmp_path / "0.safetensors")
    with pytest.raises(UserError, match=r"labels \('F32', 2\)"):
        LightningDiTFolder(tmp_path)


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
            with pytest.raises(UserError, match=r"0\.npy is not a (pair|readable)"):
                read_pair(file)
            np.save(file, as_objects(*pair), allow_pickle=True)
            with pytest.raises(UserError, match=r"0\.npy is not a pair .*it holds a reference to "):
                read_pair(file)
    assert not marker.exists()


def nested(head, opcodes, times=100):
    return b"\x80\x04" + head + opcodes * times


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04N" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff.",  # a memo of 4 billion entries
        b"\x80\x05" + pickle.BYTEARRAY8 + (2**36).to_bytes(8, "little") + b".",
        b"\x80\x04" + pickle.BINBYTES + b"\xff\xff\xff\xff.",
        b"\x80\x04" + pickle.FRAME + (2**62).to_bytes(8, "little") + b"N.",
        nested(b"K\0", b"2\x86") + b".",  # a tuple of a tuple twice, and so on: 2**100 numbers as moments,
        nested(b"cnumpy\nndarray\n", b"") + nested(b"K\0", b"2\x86")[2:] + b"\x86.",  # as the label,
        nested(b"}K\0", b"2\x86") + b"Ns.",  # and as the key of a dict, which is hashed
        nested(b"", b"(", MAX_PICKLE_BYTES),
    ],
)
def test_a_pickle_that_would_take_all_memory_or_time_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x is (not|larger)"):
        read_pair(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_stand_ins_cannot_be_changed(tmp_path):
    for name in ("numpy\nndarray", "numpy.core.multiarray\nscalar", "numpy\ndtype", "_codecs\nencode"):
        for state in (b"}", b"}}\x86", b"(lN\x86"):
            (tmp_path / "x").write_bytes(b"\x80\x02c" + name.encode() + b"\n" + state + b"b.")
            with pytest.raises(UserError, match=r"x is not a pair .*__setstate__"):
                read_pair(tmp_path / "x")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_number_type_come_back(tmp_path, protocol):
    for dtype in ("<f2", ">f4", "<f8", "|u1", ">i2", "<i8"):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        for value in (array, np.asfortranarray(array)):
            for label in (7, np.int64(7), np.array([7]), np.array(7, ">i2")):
                (tmp_path / "x").write_bytes(pickle.dumps([value, label], protocol))
                loaded, loaded_label = read_pair(tmp_path / "x")
                assert loaded.dtype == dtype and np.array_equal(loaded, value) and loaded_label == 7


def test_damaged_npy_files(tmp_path):
    """Every one is a UserError naming the file, or a pair of an array and an int."""
    rng, file = np.random.default_rng(0), tmp_path / "0.npy"
    originals = []
    for form in ("objects", 2, 4):
        save_uvit(file, features(8)[0], LABELS[3], form)
        originals.append(file.read_bytes())
    refused = 0
    for k in range(1200):
        original = originals[k % 3]
        # the values take most of the file, the header and the opcodes are what can do harm
        file.write_bytes(damage(original[:420], rng) + original[420:] if k % 2 else damage(original, rng))
        try:
            moments, label = read_pair(file)
            assert isinstance(moments, np.ndarray) and isinstance(label, int)
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
    assert 600 < refused < 1200

    np.save(file, features(4)[0])
    original = file.read_bytes()
    for _ in range(300):
        file.write_bytes(damage(original[:130], rng) + original[130:])
        try:
            assert read_plain_npy(file).dtype.kind in "fiu"
        except UserError as error:
            assert str(file) in str(error)


def test_what_is_no_pair_and_what_no_plain_array(tmp_path):
    itself = as_objects(None, 1)
    itself[0] = itself
    np.save(tmp_path / "0.npy", itself, allow_pickle=True)
    np.save(tmp_path / "1.npy", features(8)[0])
    for name, message in (("0.npy", ".*values of dtype O8"), ("1.npy", "")):
        with pytest.raises(UserError, match=rf"{name} is not a pair{message}"):
            read_pair(tmp_path / name)
    with pytest.raises(UserError, match=r"0\.npy is not a whole \.npy file of numbers: found object"):
        read_plain_npy(tmp_path / "0.npy")


def test_inspect_prints_verifies_and_draws(tmp_path, tiny_autoencoder, capsys):
    run(write_uvit(tmp_path / "source"), tmp_path / "out", tiny_autoencoder, "uvit")
    capsys.readouterr()
    png = tmp_path / "samples.png"
    inspect_latents.main([str(tmp_path / "out"), "--verify", "--png", str(png), "--autoencoder", str(tiny_autoencoder)])
    printed = capsys.readouterr().out
    assert "11 of shape (8, 4, 4) float16" in printed and "5 with 2 to 3 images: 0, 1, 2" in printed
    assert "every file has the checksum" in printed and png.stat().st_size > 1000
    shard = tmp_path / "out" / "latents-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(SystemExit, match=r"latents-00000\.npy"):
        inspect_latents.main([str(tmp_path / "out"), "--verify"])


def test_inspect_refuses_another_autoencoder(tmp_path, tiny_autoencoder):
    run(write_uvit(tmp_path / "source"), tmp_path / "out", tiny_autoencoder, "uvit")
    vae = AutoencoderKL.from_pretrained(tiny_autoencoder)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(tmp_path / "other")
    for png, message in (
        ("x.png", "out is of another autoencoder"),
        ("x.foo", "--png must be a .png file; found "),
        ("out/index.json/x.png", "Cannot write .*, or set --png"),
    ):
        with pytest.raises(SystemExit, match=message):
            inspect_latents.main(
                [str(tmp_path / "out"), "--png", str(tmp_path / png), "--autoencoder", str(tmp_path / "other")]
            )
