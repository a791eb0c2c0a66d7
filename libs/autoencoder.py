"""Pixels as uint8, as floats and as latents: diffusers' `AutoencoderKL`, from whatever form its weights come in.

Axes: B batch, C latent channels, H W pixels, h w latent cells (h = H / downsample).

Latent diffusion with a KL autoencoder: Rombach et al., CVPR 2022. The encoder gives *moments*, a mean and a
log-variance per latent cell. The diffusion model is trained on normalized samples of that Gaussian.
"""

import hashlib
import json
import math
import re
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from libs import UserError
from libs.files import SAFETENSORS, file_kind, hub_download

# Stable Diffusion's KL-f8 autoencoder. Single files carry no config, so they are read as this one.
SD_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}

# Range of the log-variance before it is exponentiated, as in the CompVis and diffusers code.
LOGVAR_RANGE = (-30.0, 20.0)

FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

EXPECTED = (
    "expected autoencoder_kl.pth or autoencoder_kl_ema.pth of U-ViT's and DiMR's releases, a folder in diffusers' "
    "format, or a hub id such as stabilityai/sd-vae-ft-ema"
)


def uint8_to_float(pixels: Tensor) -> Tensor:
    """Map uint8 pixels of any shape to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def float_to_uint8(images: Tensor) -> Tensor:
    """Map floats in [-1, 1] of any shape to uint8, clamping those beyond."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def finite(images: Tensor) -> Tensor:
    """Find which of float images (B, ...) have neither NaN nor infinity: (B,) bool."""
    return images.isfinite().flatten(1).all(dim=1)


def check_finite(finite: Tensor) -> None:
    """Raise UserError unless all images were finite (B,), which uint8 does not show. Waits for the device."""
    if bad := int((~finite).sum()):
        raise UserError(
            f"{bad} of {len(finite)} images came out with NaN or infinity: the weights are damaged or diverged, "
            "or fp16 overflows (set --mixed_precision bf16 or no)"
        )


class Autoencoder:
    """A frozen `AutoencoderKL` in eval mode.

    Attributes:
        scaling_factor: normalized latents = scaling_factor * latents (0.18215 for Stable Diffusion).
        downsample: pixels per latent cell along a side (8 for Stable Diffusion).
        latent_channels: C (4 for Stable Diffusion).
        identity: {"sha256", "scaling_factor"}: the same for the same autoencoder, whatever file it came from.
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Take over `vae`, whose weights still have the precision of their file, because the identity hashes them.

        Raises UserError if its latents are not normalized by one scale alone.
        """
        settings = vae.config
        shifts = [f"{n}={settings[n]}" for n in ("shift_factor", "latents_mean", "latents_std") if settings.get(n)]
        scale = settings.scaling_factor
        if shifts or not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            found = ", ".join([f"scaling_factor={scale!r}", *shifts])
            raise UserError(f"an autoencoder must normalize by one scaling_factor above 0; its config sets {found}")
        self.scaling_factor = float(scale)
        self.latent_channels = int(settings.latent_channels)
        self.downsample = 2 ** (len(settings.block_out_channels) - 1)
        self.identity = {"sha256": hash_weights(vae.state_dict()), "scaling_factor": self.scaling_factor}
        # Module.to itself: diffusers' override warns, wrongly, at every cast of a model loaded in its file's precision
        self.vae = torch.nn.Module.to(vae.eval().requires_grad_(False), device=device, dtype=dtype)

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Move the weights to `device` and return self."""
        self.vae.to(device)
        return self

    def normalize(self, latents: Tensor) -> Tensor:
        """Scale latents (B, C, h, w) of the autoencoder to those that the diffusion model sees."""
        return self.scaling_factor * latents

    def denormalize(self, latents: Tensor) -> Tensor:
        """Invert `normalize`."""
        return latents / self.scaling_factor

    @torch.no_grad()
    def encode_moments(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Encode images to the means and log-variances of their latents.

        Args:
            images: (B, 3, H, W) floats in [-1, 1]; H and W multiples of `downsample`.
            batch_size: images encoded at a time; None for all at once.

        Returns:
            (B, 2C, h, w) float32 on the device of `images`: C means, then C log-variances (not clamped).
        """
        return self._in_batches(lambda x: self.vae.encode(x).latent_dist.parameters, images, batch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Decode normalized latents (B, C, h, w) to images (B, 3, H, W) float32 in [-1, 1] on the device of `latents`.

        `batch_size` latents are decoded at a time, which bounds the memory whatever B is.
        """
        return self._in_batches(lambda z: self.vae.decode(self.denormalize(z)).sample.clamp(-1, 1), latents, batch_size)

    def _in_batches(self, function, x, batch_size):
        weights = next(self.vae.parameters())
        parts = x.split(batch_size or max(len(x), 1))
        return torch.cat([function(part.to(weights.device, weights.dtype)).float().to(x.device) for part in parts])

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample normalized latents for training: mean + std * noise, computed in float32.

        Args:
            moments: (B, 2C, h, w) of any float type: C means, then C log-variances.
            noise: (B, C, h, w) standard normal.

        Returns:
            (B, C, h, w) float32.
        """
        mean, logvar = moments.float().chunk(2, dim=1)
        return self.normalize(mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise.float())


def hash_weights(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over named tensors: names (sorted), shapes and float32 values, so the file format does not enter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def load_autoencoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load an autoencoder from a diffusers folder, a hub id or a single file.

    Args:
        path: a folder in diffusers format, or a pipeline folder holding it as `vae/`;
            a hub id `owner/name`; or a .pth, .pt, .ckpt, .bin or .safetensors file of Stable Diffusion's KL-f8 under
            the names of CompVis (also a full Stable Diffusion checkpoint) or of diffusers.
        dtype: precision in which it computes (float32, float16 or bfloat16).
        device: where it is placed.

    Raises:
        UserError: nothing is there, the hub cannot be reached, or it is not a whole autoencoder.
    """
    path = Path(path)
    if path.is_file():
        if (kind := file_kind(path)) not in (None, SAFETENSORS):
            raise UserError(f"{path} is {kind}: {EXPECTED}")
        load = _load_file
    elif path.is_dir():
        load = _load_folder
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) or path.suffix in FILES or path.parent.is_dir():
        raise UserError(f"No autoencoder at {path}: {EXPECTED}")
    else:
        path, load = _fetch(str(path)), _load_folder
    try:
        vae = load(path)
    except Exception as error:  # of many types, for files that are not what they should be
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is not a whole AutoencoderKL ({reason}): {EXPECTED}") from error
    return Autoencoder(vae, dtype, device)


def _fetch(hub_id: str) -> Path:
    """Return the folder of the hub's cache that holds the autoencoder."""
    file = hub_download(hub_id, AutoencoderKL.config_name, whole_repository=True)
    try:
        hub_download(hub_id, "diffusion_pytorch_model.safetensors", whole_repository=True)
    except UserError:  # a repository from before safetensors
        hub_download(hub_id, "diffusion_pytorch_model.bin", whole_repository=True)
    return file.parent


def _load_folder(folder: Path) -> AutoencoderKL:
    subfolder = "vae" if (folder / "vae").is_dir() else None
    vae, info = AutoencoderKL.from_pretrained(
        folder, subfolder=subfolder, local_files_only=True, output_loading_info=True
    )
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):  # diffusers fills in random values
        raise UserError(f"{len(wrong)} tensors are missing or unknown, such as {wrong[0]}")
    return vae


def _load_file(file: Path) -> AutoencoderKL:
    """Read tensors alone, no code: diffusers opens pickled files with weights_only=True."""
    with tempfile.TemporaryDirectory() as config:
        Path(config, AutoencoderKL.config_name).write_text(json.dumps(SD_CONFIG))
        return AutoencoderKL.from_single_file(str(file), config=config, local_files_only=True)
