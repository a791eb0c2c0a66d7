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

from libs import UserError
from libs.autoencoder import SD_CONFIG, Autoencoder, load_autoencoder

TINY = {
    **SD_CONFIG,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
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
    """A random autoencoder of Stable Diffusion's architecture: (diffusers folder, CompVis-named file, its tensors)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    vae = AutoencoderKL(**SD_CONFIG)
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
    assert diffusers.identity == compvis.identity and diffusers.identity["scaling_factor"] == 0.18215
    assert (compvis.downsample, compvis.latent_channels, compvis.scaling_factor) == (8, 4, 0.18215)
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
        with pytest.raises(UserError, match=rf"{file.name} is not a whole AutoencoderKL \(.*\): expected"):
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
    with pytest.raises(UserError, match=r"assets is not a whole AutoencoderKL \(Error no file named config\.json"):
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
    with pytest.raises(UserError, match="is not a whole AutoencoderKL"):
        load_autoencoder(tmp_path)


def test_identity_follows_the_weights(tiny, tmp_path):
    """Also from a pipeline's folder."""
    identity = load_autoencoder(tiny).identity
    (tmp_path / "vae").symlink_to(tiny)
    assert load_autoencoder(tmp_path).identity == identity
    assert load_autoencoder(tiny, dtype=torch.bfloat16).identity == identity
    vae = AutoencoderKL.from_pretrained(tiny)
    assert Autoencoder(vae).identity == identity
    vae.quant_conv.bias[0] += 1e-3
    assert Autoencoder(vae).identity["sha256"] != identity["sha256"]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("shift_factor", 0.1, r"shift_factor=0\.1"),
        *(
            ("scaling_factor", v, "normalize by one scaling_factor above 0; its config sets scaling_factor=")
            for v in (None, 0, -1.0, math.nan, "1")
        ),
    ],
)
def test_a_shift_or_no_scale_is_refused(setting, value, message):
    with pytest.raises(UserError, match=message):
        Autoencoder(AutoencoderKL(**{**TINY, setting: value}))


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
    torch.testing.assert_close(autoencoder.normalize(autoencoder.denormalize(latents)), latents)


def test_sample_latents_computes_in_float32(tiny):
    moments = torch.tensor([[[[300.0]], [[22.0]]]])  # std e^10 = 22026: times the noise beyond float16
    latents = load_autoencoder(tiny).sample_latents(moments.half(), torch.full((1, 1, 1, 1), 8.0))
    assert latents.dtype == torch.float32
    assert latents.item() == pytest.approx(0.5 * (300 + 8 * torch.tensor(10.0).exp().item()), rel=1e-6)
