"""Autoencoders of every class and normalization, tiny and random, against diffusers' own arithmetic; single files."""

import re

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from test_autoencoder import TINY, compvis_name

import train as training
import utils
from libs import UserError
from libs.autoencoder import load_autoencoder
from libs.autoencoder_files import SD_CONFIG, to_diffusers_names
from libs.latents import LatentStore
from libs.model import Model
from libs.normalization import Normalization
from scripts import extract_imagenet_feature, inspect_latents
from scripts.convert_checkpoint import convert

MEAN, STD = [0.1, -0.2, 0.3, -0.4], [1.5, 2.0, 3.0, 0.5]
LEVELS = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
DC = {f"{part}_block_types": ["ResBlock", "EfficientViTBlock"] for part in ("encoder", "decoder")}
DC |= {f"{part}_block_out_channels": [8, 8] for part in ("encoder", "decoder")}
DC |= {f"{part}_layers_per_block": [1, 1] for part in ("encoder", "decoder")}
DC |= {f"{part}_qkv_multiscales": [[], [5]] for part in ("encoder", "decoder")}
VIDEO = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": MEAN,
    "latents_std": STD,
}
RAE = {f"encoder_{name}": value for name, value in {"hidden_size": 64, "patch_size": 4, "input_size": 16}.items()}
RAE |= {f"decoder_{name}": 16 for name in ("hidden_size", "intermediate_size")} | {"decoder_num_attention_heads": 2}
RAE |= {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "patch_size": 4, "scaling_factor": 0.9}

# name: (class, settings, pixels per cell, channels)
KINDS = {
    "sd": ("AutoencoderKL", {**BLOCKS, **LEVELS, "scaling_factor": 0.18215}, 2, 4),
    "sd3": (
        "AutoencoderKL",
        {**BLOCKS, **LEVELS, "latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06},
        2,
        16,
    ),
    "playground": (
        "AutoencoderKL",
        {**BLOCKS, **LEVELS, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD, "shift_factor": 7.0},
        2,
        4,
    ),
    "flux2": ("AutoencoderKLFlux2", {**BLOCKS, **LEVELS, "latent_channels": 2}, 4, 8),
    "dc": ("AutoencoderDC", {**DC, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41407}, 2, 4),
    "tiny": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
        | {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]},
        2,
        4,
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": [32, 32],
            "layers_per_block": 1,
        }
        | {"spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.75289},
        2,
        8,
    ),
    "wan": ("AutoencoderKLWan", VIDEO, 8, 4),
    "wan22": (
        "AutoencoderKLWan",
        {
            **VIDEO,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "is_residual": True,
            "scale_factor_spatial": 16,
        },
        16,
        4,
    ),
    "qwen": ("AutoencoderKLQwenImage", VIDEO, 8, 4),
    "rae": ("AutoencoderRAE", RAE, 4, 64),
}


def build(kind):
    name, settings, *_ = KINDS[kind]
    if kind == "rae":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**settings).eval()
    if kind == "flux2":
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
        vae.bn.running_var.copy_(torch.linspace(0.5, 4, 8))
    if kind == "rae":
        vae.register_to_config(latents_mean=[[[0.2]]] * 64, latents_std=[[[2.0]]] * 64)
        vae._latents_mean, vae._latents_std = torch.full((64, 1, 1), 0.2), torch.full((64, 1, 1), 2.0)
    return vae


def column(values):
    return torch.tensor(values)[:, None, None]


def by_hand(kind, vae, images):
    """Normalized latents (B, C, h, w), of the posterior's mode, and their pictures, as diffusers' pipelines do it."""
    s = vae.config.get("scaling_factor")
    if kind in ("sd", "hunyuan"):
        z = vae.encode(images).latent_dist.mode() * s
        return z, vae.decode(z / s).sample
    if kind == "sd3":
        z = (vae.encode(images).latent_dist.mode() - 0.06) * s
        return z, vae.decode(z / s + 0.06).sample
    if kind == "playground":  # as SDXL's pipeline: both factors, not the shift
        z = (vae.encode(images).latent_dist.mode() - column(MEAN)) * s / column(STD)
        return z, vae.decode(z * column(STD) / s + column(MEAN)).sample
    if kind == "flux2":
        r = vae.encode(images).latent_dist.mode()
        b, c, h, w = r.shape
        packed = r.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        mean, std = vae.bn.running_mean[:, None, None], (vae.bn.running_var + 1e-4).sqrt()[:, None, None]
        return (packed - mean) / std, vae.decode(r).sample
    if kind == "dc":
        z = vae.encode(images).latent * s
        return z, vae.decode(z / s).sample
    if kind == "tiny":
        z = vae.encode(images).latents
        return z, vae.decode(z).sample
    if kind == "rae":
        z = vae.encode(images / 2 + 0.5).latent
        return z, vae.decode(z).sample * 2 - 1
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
    z = (vae.encode(images[:, :, None]).latent_dist.mode() - mean) / std
    return z[:, :, 0], vae.decode(z * std + mean).sample[:, :, 0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_and_pictures_are_those_of_diffusers_pipelines(tmp_path, kind):
    *_, factor, channels = KINDS[kind]
    vae = build(kind)
    vae.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path)
    assert (autoencoder.downsample, autoencoder.latent_channels) == (factor, channels)
    side = 16 if kind == "rae" else 4 * factor
    images = torch.rand(2, 3, side, side) * 2 - 1
    z, pictures = by_hand(kind, vae, images)
    moments = autoencoder.encode_moments(images)
    assert moments.shape == (2, 2 * channels, 4, 4) and moments.dtype == torch.float32
    found = autoencoder.sample_latents(moments, torch.zeros(2, channels, 4, 4))
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.decode(found), pictures.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    if kind in ("dc", "tiny", "rae"):  # without a posterior
        assert (moments[:, channels:] == -30).all()
        assert (autoencoder.sample_latents(moments, torch.ones(2, channels, 4, 4)) - found).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux2", "dc", "tiny", "hunyuan", "wan"])
def test_from_extraction_to_samples(tiny_config, tiny_images, tmp_path, caplog, kind):
    """With statistics that are measured: the network sees deviation 1, and the converted pipeline knows them."""
    *_, factor, channels = KINDS[kind]
    caplog.set_level("INFO")
    vae, store = build(kind), tmp_path / "store"
    vae.save_pretrained(tmp_path / "vae")
    places = ("--images", tiny_images, "--out", store, "--autoencoder", tmp_path / "vae")
    flags = ("--resolution", str(8 * factor), "--no-flip", "--workers", "0", "--dtype", "float32")
    extract_imagenet_feature.main([*map(str, places), *flags])
    assert LatentStore(store).record_shape == (2 * channels, 8, 8)
    inspect_latents.main([str(store), "--statistics"])
    tiny_config.autoencoder.update(
        pretrained_path=str(tmp_path / "vae"), latent_stats=f"{store}/latent_stats.safetensors"
    )
    tiny_config.dataset.path, tiny_config.z_shape = str(store), (channels, 8, 8)
    tiny_config.train.update(n_steps=2, save_interval=2, eval_interval=2, grid=(1, 2))
    caplog.clear()
    assert training.train(tiny_config, tmp_path / "run") == 0
    seen = re.search(r"latents of mean (\S+), deviation (\S+) \((\S+) to (\S+)\)", caplog.text)
    assert [abs(float(value)) for value in seen.groups()] == pytest.approx([0, 1, 1, 1], abs=0.02)
    assert (tmp_path / "run" / "samples" / "2.png").is_file()

    weights = tmp_path / "run" / "ckpts" / "2.ckpt"
    model = Model.open(weights)
    images, finite = model.sampler(steps=3, scale=1.0)([0], [1])
    assert finite.all() and images.shape == (1, 3, 8 * factor, 8 * factor)
    (store / "latent_stats.safetensors").unlink()  # as on another machine: those that were trained with
    moved = Model.open(weights).autoencoder.normalization
    assert moved.scale == pytest.approx(model.autoencoder.normalization.scale)
    convert(str(weights), tmp_path / "pipeline")
    assert Model.open(tmp_path / "pipeline").autoencoder.normalization.shift == pytest.approx(moved.shift)


# --- Normalization ----------------------------------------------------------------------------------------------------


def test_one_factor_gives_the_published_bits():
    latents = torch.randn(3, 4, 5, 5) * 5
    normalization = Normalization((0.0,), (0.18215,))
    assert torch.equal(normalization.apply(latents), 0.18215 * latents)
    assert torch.equal(normalization.invert(latents), latents / 0.18215)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    build("sd").save_pretrained(folder)
    return folder


def test_statistics_files_of_either_convention(plain, tmp_path):
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")  # LightningDiT's
    torch.save({"latents_bias": mean, "latents_scale": 1 / std}, tmp_path / "repa_e.pt")
    save_file({"mean": mean.flatten(), "std": std.flatten()}, tmp_path / "ours.safetensors")
    for name in ("latents_stats.pt", "repa_e.pt", "ours.safetensors"):
        found = load_autoencoder(plain, latent_stats=tmp_path / name).normalization
        assert found.shift == pytest.approx(MEAN) and found.scale == pytest.approx([1 / value for value in STD])
    torch.save({"latents_bias": torch.zeros(4), "latents_scale": torch.full((4,), 0.18215)}, tmp_path / "repa.pt")
    latents = torch.randn(1, 4, 2, 2)  # z = r * scale + bias, of REPA, is the same with its bias
    found = load_autoencoder(plain, latent_stats=tmp_path / "repa.pt").normalization.apply(latents)
    torch.testing.assert_close(found, latents * 0.18215 + 0)
    assert load_autoencoder(plain, latent_stats="0.13025").normalization == Normalization((0.0,), (0.13025,))


def test_statistics_that_cannot_be_used(plain, tmp_path):
    torch.save({"mean": torch.zeros(8), "std": torch.ones(8)}, tmp_path / "eight.pt")
    torch.save({"mean": torch.zeros(4), "std": torch.zeros(4)}, tmp_path / "zero.pt")
    torch.save({"mu": torch.zeros(4)}, tmp_path / "other.pt")
    for stats, message in (
        ("eight.pt", "it normalizes 8 channels, its latents have 4"),
        ("zero.pt", "no normalization"),
        ("other.pt", r"should hold mean and std, or latents_bias and latents_scale; found \['mu'\]"),
        ("none.pt", "no statistics of latents at .*none.pt: give such a file, or a scaling factor"),
    ):
        with pytest.raises(UserError, match=message):
            load_autoencoder(plain, latent_stats=tmp_path / stats)


def test_a_rae_is_not_normalized_again_and_takes_one_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="AutoencoderRAE needs transformers: python -m pip install transformers"):
        load_autoencoder(tmp_path)
    monkeypatch.undo()
    build("rae").save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).normalization == Normalization()
    with pytest.raises(UserError, match="it normalizes by itself"):
        load_autoencoder(tmp_path, latent_stats="0.5")
    with pytest.raises(UserError, match="--resolution 32x32 is not the autoencoder's only one, 16x16"):
        load_autoencoder(tmp_path).check_size(32, 32)


def test_decoding_in_16_bits_is_a_setting(tiny_config, tiny_autoencoder, trained_run, tmp_path, caplog):
    weights, z = trained_run / "ckpts" / "6.ckpt", torch.randn(2, 4, 8, 8)
    config = Model.open(weights).config
    config.autoencoder.decode_dtype = "bfloat16"
    full, half = Model.open(weights).autoencoder, Model.open(weights, config).autoencoder
    assert next(half.vae.parameters()).dtype == torch.bfloat16 and half.identity == full.identity
    assert 0 < (half.decode(z) - full.decode(z)).abs().max() < 0.05
    config.autoencoder.decode_dtype = "int8"
    with pytest.raises(UserError, match=r"config\.autoencoder\.decode_dtype must be one of float32, bfloat16, float16"):
        utils.check_sampling(config)
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        AutoencoderKL(**{**TINY, "force_upcast": upcast}).save_pretrained(tmp_path)
        assert next(load_autoencoder(tmp_path, torch.float16).vae.parameters()).dtype == dtype
    assert sum("overflows in float16 (force_upcast): computing in float32" in line for line in caplog.messages) == 1


# --- Single files with attention in the lowest level ------------------------------------------------------------------

ATTENTION = {"down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]}
PLAIN_UP, ATTENTION_UP = ["UpDecoderBlock2D"] * 5, ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4
WIDTHS = {"block_out_channels": [128, 128, 256, 256, 512]}
VA_VAE = {**SD_CONFIG, **WIDTHS, **ATTENTION, "up_block_types": ATTENTION_UP, "latent_channels": 32}
MAR = {**VA_VAE, "up_block_types": PLAIN_UP, "latent_channels": 16}
NARROW = {"block_out_channels": [32, 32, 32, 32, 32]}


def original_state(vae):
    """The tensors under the names and shapes of LightningDiT's and MAR's code."""
    levels, state = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        old = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{3 - (levels - 1 - int(found[1]))}", name)
        if found := re.match(r"(encoder\.down|decoder\.up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", name):
            level = int(found[2]) if found[1] == "encoder.down" else levels - 1 - int(found[2])
            end = found[4].replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_", "")
            old = f"{found[1]}.{level}.attn.{found[3]}.{end}"
        elif found := re.match(r"decoder\.up_blocks\.(\d)\.(.*)", name):
            level = levels - 1 - int(found[1])
            old = re.sub(r"^resnets\.(\d)", r"block.\1", found[2]).replace("upsamplers.0", "upsample")
            old = f"decoder.up.{level}.{old}".replace("conv_shortcut", "nin_shortcut")
        else:
            old = compvis_name(name)
        is_projection = ".attn" in old and tensor.ndim == 2
        state[old] = tensor[:, :, None, None] if is_projection else tensor
    return state


@pytest.mark.parametrize(("config", "count", "left"), [(VA_VAE, 342, 50), (MAR, 312, 20), (SD_CONFIG, 248, 0)])
def test_every_published_tensor_has_its_place(config, count, left):
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    state = original_state(vae)
    assert len(state) == count and sum(bool(re.search(r"\.\d\.attn\.", name)) for name in state) == left
    shapes = [{name: t.shape for name, t in each.items()} for each in (to_diffusers_names(state), vae.state_dict())]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("config", "key", "factor"), [(VA_VAE, "state_dict", 1.0), (MAR, "model", 0.2325)])
@torch.no_grad()
def test_attention_in_the_lowest_level_is_read_from_single_files(tmp_path, config, key, factor, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**config, **NARROW}).eval()
    state = original_state(vae)
    beside = {"loss.logvar": torch.zeros(()), "foundation_model.model.norm.weight": torch.ones(3)}
    beside["linear_proj.weight"] = torch.ones(8, 4, 1, 1)
    torch.save({key: {**state, **beside}, "epoch": 3}, tmp_path / "kl.pt")
    autoencoder = load_autoencoder(tmp_path / "kl.pt")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = autoencoder.encode_moments(images)
    torch.testing.assert_close(moments, vae.encode(images).latent_dist.parameters, atol=1e-5, rtol=1e-5)
    latents = moments.chunk(2, dim=1)[0]
    torch.testing.assert_close(
        autoencoder.decode(latents * factor), vae.decode(latents).sample.clamp(-1, 1), atol=2e-5, rtol=0
    )
    assert autoencoder.identity["scale"] == [factor]
    known = "that of its shape" if factor != 1 else "its own is not known"
    assert f"16 pixels a cell, scaling factor {factor:g} ({known})" in caplog.text

    missing = next(name for name in state if re.search(r"attn\.1\.k\.weight", name))
    for other in (
        {name: t for name, t in state.items() if name != missing},
        {**state, "decoder.extra.weight": torch.ones(1)},
    ):
        torch.save({key: other}, tmp_path / "broken.pt")
        with pytest.raises(UserError, match="1 tensors are missing, unknown or of another shape, such as"):
            load_autoencoder(tmp_path / "broken.pt")
