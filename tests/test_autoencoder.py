import contextlib
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import RunsCode
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import utils
from libs import UserError
from libs.autoencoder import Autoencoder, load_autoencoder
from libs.autoencoder_files import SD_CONFIG
from libs.checkpoint import read_checkpoint
from libs.model import Model, open_autoencoder
from libs.normalization import check_same_autoencoder, differing_parts
from libs.train_state import check_same_run
from scripts.convert_checkpoint import convert

TINY = {
    **SD_CONFIG,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "force_upcast": False,
}


def compvis_name(name):
    """The name CompVis' code gives the tensor that diffusers calls `name`, for an autoencoder of four levels."""
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace("conv_shortcut", "nin_shortcut")
    for diffusers, compvis in [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]:
        name = name.replace(f"mid_block.attentions.0.{diffusers}", f"mid.attn_1.{compvis}")
    return name.replace("conv_norm_out", "norm_out")


def compvis_state(vae):
    state = {compvis_name(name): tensor.clone() for name, tensor in vae.state_dict().items()}
    for name, tensor in state.items():  # CompVis' attention projects with 1x1 convolutions
        if ".attn_1." in name and tensor.ndim == 2:
            state[name] = tensor[:, :, None, None].contiguous()
    return state


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A random, narrow autoencoder of Stable Diffusion's kind: (diffusers folder, CompVis-named file, its tensors)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    vae = AutoencoderKL(**{**SD_CONFIG, "block_out_channels": (32, 32, 64, 64)})
    vae.save_pretrained(folder / "diffusers")
    state = compvis_state(vae)
    torch.save(state, folder / "autoencoder_kl.pth")
    return folder / "diffusers", folder / "autoencoder_kl.pth", state


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    AutoencoderKL(**TINY).save_pretrained(folder)
    return folder


def test_compvis_and_diffusers_files_are_the_same_autoencoder(sd):
    folder, file, state = sd
    assert "encoder.down.0.block.0.norm1.weight" in state and "decoder.up.3.upsample.conv.weight" in state
    diffusers, compvis = load_autoencoder(folder), load_autoencoder(str(file))
    assert diffusers.identity == compvis.identity and diffusers.weights_digest == compvis.weights_digest
    assert (compvis.identity["shift"], compvis.identity["scale"]) == ([0.0], [0.18215])
    assert (compvis.downsample, compvis.latent_channels) == (8, 4)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    moments = diffusers.encode_moments(images)
    assert moments.shape == (1, 8, 8, 8) and moments.std() > 0.1
    assert (moments - compvis.encode_moments(images)).abs().max() < 1e-5
    assert (diffusers.decode(latents) - compvis.decode(latents)).abs().max() < 1e-5


def test_full_checkpoints_and_safetensors_of_either_names(sd, tmp_path):
    folder, file, state = sd
    identity = load_autoencoder(file).identity
    full = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    full["model.diffusion_model.out.0.weight"] = torch.ones(3)
    torch.save({"state_dict": full, "global_step": 3}, tmp_path / "sd.ckpt")
    save_file(full, tmp_path / "sd.safetensors")
    for name in ("sd.ckpt", "sd.safetensors"):
        assert load_autoencoder(tmp_path / name).identity == identity
    assert load_autoencoder(folder / "diffusion_pytorch_model.safetensors").identity == identity


def test_files_that_are_not_whole_are_refused(sd, tmp_path):
    _, _, state = sd
    whole = {
        "missing": {name: tensor for name, tensor in state.items() if "decoder.up.2" not in name},
        "shape": {**state, "encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)},
        "other": {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
        "empty": {},
        "number": {"epoch": 1},
        "list": [1, 2],
    }
    for name, content in whole.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for name in ("junk.pth", "junk.ckpt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"\x80not weights at all" * 20)
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{file.name} is not a whole autoencoder \(.*\): expected"):
            load_autoencoder(file)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_refused_and_not_run(tiny, tmp_path, save):
    marker = tmp_path / "was_run"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    for file in ("evil.pth", "folder/diffusion_pytorch_model.bin"):
        save({"encoder.conv_in.weight": RunsCode(Path.touch, marker)}, tmp_path / file)
    for name in ("evil.pth", "folder"):
        with pytest.raises(UserError, match=f"{name} is not a whole"):
            load_autoencoder(tmp_path / name)
    assert not marker.exists()


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "nothing.pth", "absent/a.pth", "assets/digits_autoencoder"):  # none of them is a hub id
        with pytest.raises(UserError, match=rf"No autoencoder at {path}: .*autoencoder_kl_ema\.pth.*sd-vae-ft-ema"):
            load_autoencoder(path)
    with pytest.raises(UserError, match=r"assets is not a whole autoencoder \(.*No such file .*config\.json"):
        load_autoencoder("assets")


def test_hub_id_without_network_says_how_to_fetch(monkeypatch):
    def no_network(hub_id, file, **kwargs):
        raise LocalEntryNotFoundError("Cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(UserError, match=r"Cannot reach.*hf download stabilityai/sd-vae-ft-ema --local-dir assets"):
        load_autoencoder("stabilityai/sd-vae-ft-ema")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hub_id_is_read_from_the_fetched_folder(monkeypatch, tiny, tmp_path, form):
    AutoencoderKL.from_pretrained(tiny).save_pretrained(tmp_path, safe_serialization=form == "safetensors")

    def fetched(hub_id, file, **kwargs):
        if not (tmp_path / file).exists():
            raise LocalEntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert load_autoencoder("someone/some-vae").identity == load_autoencoder(tiny).identity


def test_diffusers_folders_that_are_not_whole_are_refused(tiny, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny)
    vae.save_config(tmp_path)
    state = {name: tensor for name, tensor in vae.state_dict().items() if name != "quant_conv.bias"}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing or unknown, such as quant_conv\.bias"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match="is not a whole autoencoder"):
        load_autoencoder(tmp_path)


def test_identity_follows_the_weights(tiny, tmp_path):
    """Also from a pipeline's folder; in 16 bits they are the same autoencoder."""
    identity = load_autoencoder(tiny).identity
    (tmp_path / "vae").symlink_to(tiny)
    assert load_autoencoder(tmp_path).identity == identity
    assert load_autoencoder(tiny, dtype=torch.bfloat16).identity == identity
    for dtype in (torch.float16, torch.bfloat16):
        AutoencoderKL.from_pretrained(tiny).to(dtype).save_pretrained(tmp_path / str(dtype))
        assert not differing_parts(load_autoencoder(tmp_path / str(dtype)).identity, identity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stable_diffusions_weights_in_16_bits_are_the_same(sd, tmp_path, dtype):
    folder, _, state = sd
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "half.pth")
    assert not differing_parts(load_autoencoder(tmp_path / "half.pth").identity, load_autoencoder(folder).identity)


def altered(tiny, folder, part, change=0.05):
    """`tiny` with other weights in a part, or another config."""
    vae = AutoencoderKL.from_pretrained(tiny)
    if part == "scale":
        vae.register_to_config(scaling_factor=0.13025)
    else:
        getattr(vae, part).conv_in.weight.data *= 1 + change
    vae.save_pretrained(folder)
    return load_autoencoder(folder)


def test_another_encoder_or_scale_is_an_error_and_another_decoder_a_line(tiny, tmp_path, caplog):
    identity = load_autoencoder(tiny).identity
    check_same_autoencoder(identity, identity, "the store")
    check_same_autoencoder(None, None, "pixels")
    for part, message in (
        ("encoder", "the store is of another autoencoder .encoder: another.: set --autoencoder"),
        ("scale", r"scale \[0\.5\] there, shift \[0\.0\], scale \[0\.13025\] here"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_autoencoder(altered(tiny, tmp_path / part, part).identity, identity, "the store")
    for other in (None, {"sha256": "ab", "scaling_factor": 0.5}):
        with pytest.raises(UserError, match="the store is of another autoencoder"):
            check_same_autoencoder(other, identity, "the store")
    assert not caplog.messages
    check_same_autoencoder(altered(tiny, tmp_path / "decoder", "decoder", 0.5).identity, identity, "the store")
    assert caplog.messages == ["the store is of another decoder of the same encoder: pictures will differ a little"]


def test_a_model_is_sampled_with_the_autoencoder_it_was_trained_with(
    tiny_config, tiny_autoencoder, trained_run, tmp_path, caplog
):
    """By eval.py, sample.py and the demo, which open models alike, from checkpoints and what they are converted to."""
    checkpoint = trained_run / "ckpts" / "6.ckpt"
    convert(str(checkpoint), tmp_path / "converted.safetensors")
    others = {part: altered(tiny_autoencoder, tmp_path / part, part, 0.5) for part in ("encoder", "decoder", "scale")}
    for weights in (checkpoint, tmp_path / "converted.safetensors"):
        caplog.clear()
        assert Model.open(weights).autoencoder.identity == load_autoencoder(tiny_autoencoder).identity
        assert not [message for message in caplog.messages if "decoder" in message]
        for part in others:
            message = "another decoder of the same encoder" if part == "decoder" else "is of another autoencoder"
            with contextlib.nullcontext() if part == "decoder" else pytest.raises(UserError, match=message):
                Model.open(weights, autoencoder=str(tmp_path / part))
        assert len([message for message in caplog.messages if "another decoder of the same encoder" in message]) == 1


@pytest.mark.parametrize(("part", "refused"), [("encoder", True), ("scale", True), ("decoder", False)])
def test_training_and_resuming_with_another_autoencoder(
    tiny_config, tiny_autoencoder, trained_run, tmp_path, part, refused, caplog
):
    altered(tiny_autoencoder, tmp_path / "other", part, 0.5)
    tiny_config.autoencoder.pretrained_path = str(tmp_path / "other")
    autoencoder = open_autoencoder(tiny_config, "cpu")
    saved, _ = read_checkpoint(trained_run / "ckpts" / "6.ckpt")
    run = {"autoencoder": autoencoder.identity}
    for check in (lambda: utils.open_dataset(tiny_config, autoencoder), lambda: check_same_run(run, saved, "6.ckpt")):
        with pytest.raises(UserError, match=part[:5]) if refused else contextlib.nullcontext():
            check()
    assert refused or len([message for message in caplog.messages if "decoder of the same" in message]) == 2


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1"])
def test_no_scale_is_refused(value):
    with pytest.raises(UserError, match=r"scales above 0; found|no normalization: scaling_factor"):
        Autoencoder(AutoencoderKL(**{**TINY, "scaling_factor": value}))


# --- What a path may be -----------------------------------------------------------------------------------------------


def test_the_factor_of_single_files_is_said_and_of_sdxl_known(sd, tmp_path, caplog):
    folder, file, state = sd
    caplog.set_level("INFO")
    assert load_autoencoder(file).identity["scale"] == [0.18215]
    assert "autoencoder_kl.pth: 4 channels, 8 pixels a cell, scaling factor 0.18215 (that of its shape)" in caplog.text
    assert "gives another: SDXL's is 0.13025" in caplog.text
    full = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    full["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"] = torch.ones(3)
    save_file(full, tmp_path / "sd_xl_base_1.0.safetensors")
    sdxl = load_autoencoder(tmp_path / "sd_xl_base_1.0.safetensors")
    assert sdxl.identity["scale"] == [0.13025] and "0.13025 (SDXL's)" in caplog.text
    assert sdxl.identity["encoder"] == load_autoencoder(folder).identity["encoder"]
    assert load_autoencoder(file, latent_stats="0.13025").identity == sdxl.identity


def test_other_classes_and_pixels_are_named(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    for name, change, message in (
        ("video", {"_class_name": "AutoencoderKLCosmos"}, "it is of class AutoencoderKLCosmos: expected AutoencoderKL"),
        ("unet", {"_class_name": "UNet2DModel"}, "it is of class UNet2DModel: expected AutoencoderKL"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_autoencoder(tmp_path / name)
    AutoencoderKL(**{**TINY, "in_channels": 1, "out_channels": 1}).save_pretrained(tmp_path / "grey")
    with pytest.raises(UserError, match=r"its pixels have \[1\] channels: expected 3"):
        load_autoencoder(tmp_path / "grey")


def test_files_of_other_kinds_are_named_by_their_first_bytes(sd, tiny, tmp_path):
    _, _, state = sd
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Not found</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "config.pth").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").write_bytes(
        (tmp_path / "pointer.safetensors").read_bytes()
    )
    for name, kind in (
        ("page.pth", "is an HTML page"),
        ("pointer.safetensors", "is a pointer of git-lfs"),
        ("config.pth", "is a JSON file"),
        ("folder", "diffusion_pytorch_model.safetensors is a pointer of git-lfs"),
    ):
        with pytest.raises(UserError, match=kind):
            load_autoencoder(tmp_path / name)
    save_file(state, tmp_path / "named.ckpt")
    assert load_autoencoder(tmp_path / "named.ckpt").latent_channels == 4


def test_hub_ids_of_pipelines_and_of_single_files(monkeypatch, tiny, sd, tmp_path):
    (tmp_path / "vae").symlink_to(tiny)
    (tmp_path / "kl.pth").symlink_to(sd[1])

    def fetched(hub_id, file, **kwargs):
        if hub_id != "someone/pipeline" or not (tmp_path / file).exists():
            raise LocalEntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    identity = load_autoencoder(tiny).identity
    for path in ("someone/pipeline", "hf://someone/pipeline", "hf://someone/pipeline/vae"):
        assert load_autoencoder(path).identity == identity
    assert load_autoencoder("hf://someone/pipeline/kl.pth").downsample == 8


# --- Moments and pixels -----------------------------------------------------------------------------------------------


def test_moments_and_pixels_are_diffusers_own(tiny):
    autoencoder, vae = load_autoencoder(tiny), AutoencoderKL.from_pretrained(tiny).eval()
    assert autoencoder.downsample == 4
    images = torch.rand(3, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        distribution = vae.encode(images).latent_dist
        moments = autoencoder.encode_moments(images)
        torch.testing.assert_close(moments[:, :4], distribution.mean)
        torch.testing.assert_close(moments[:, 4:].clamp(-30, 20), distribution.logvar)
        latents = distribution.mode()
        torch.testing.assert_close(autoencoder.decode(latents * 0.5), vae.decode(latents).sample.clamp(-1, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_gives_float32_results_close_to_full(tiny, dtype, tolerance):
    full, half = load_autoencoder(tiny), load_autoencoder(tiny, dtype=dtype)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = half.encode_moments(images)
    assert moments.dtype == torch.float32
    assert 0 < (moments - full.encode_moments(images)).abs().max() < tolerance
    pixels = half.decode(moments[:, :4])
    assert pixels.dtype == torch.float32 and (pixels - full.decode(moments[:, :4])).abs().max() < tolerance


def test_batches_bound_what_is_decoded_at_once(tiny, monkeypatch):
    autoencoder = load_autoencoder(tiny)
    latents, sizes = torch.randn(7, 4, 4, 4), []
    whole = autoencoder.decode(latents, batch_size=7)
    decode = autoencoder.vae.decode
    monkeypatch.setattr(autoencoder.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    torch.testing.assert_close(autoencoder.decode(latents, batch_size=3), whole)
    assert sizes == [3, 3, 1]
    assert not whole.requires_grad


def test_sample_latents_is_the_gaussian_of_the_moments(tiny):
    torch.manual_seed(0)
    autoencoder, moments, noise = load_autoencoder(tiny), torch.randn(2, 8, 4, 4) * 20, torch.randn(2, 4, 4, 4)
    moments[0, 4] = -100.0  # below the range of the log-variance
    moments[1, 5] = 50.0  # above it
    distribution = DiagonalGaussianDistribution(moments)
    expected = 0.5 * (distribution.mean + distribution.std * noise)
    latents = autoencoder.sample_latents(moments, noise)
    torch.testing.assert_close(latents, expected)
    normalization = autoencoder.normalization
    torch.testing.assert_close(normalization.apply(normalization.invert(latents)), latents)


def test_sample_latents_computes_in_float32(tiny):
    moments = torch.tensor([[[[300.0]], [[22.0]]]])  # std e^10 = 22026: times the noise beyond float16
    latents = load_autoencoder(tiny).sample_latents(moments.half(), torch.full((1, 1, 1, 1), 8.0))
    assert latents.dtype == torch.float32
    assert latents.item() == pytest.approx(0.5 * (300 + 8 * torch.tensor(10.0).exp().item()), rel=1e-6)
