"""Pixels as uint8, as floats and as latents: diffusers' autoencoders, from whatever form their weights come in.

Axes: B batch, C latent channels, H W pixels, h w latent cells (h = H / downsample).

Latent diffusion with a KL autoencoder: Rombach et al., CVPR 2022. The encoder gives *moments*, a mean and a
log-variance per latent cell. The diffusion model is trained on normalized samples of that Gaussian.
"""

import functools
import hashlib
import importlib.util
import re
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from absl import logging
from diffusers import ModelMixin
from torch import Tensor

from libs import UserError
from libs.autoencoder_files import read_single_file
from libs.checkpoint import HUB
from libs.files import SAFETENSORS, file_kind, hub_download, read_json
from libs.normalization import (
    LOGVAR_RANGE,
    channel_statistics,
    read_latent_stats,
    read_normalization,
)

CONFIG = "config.json"
FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
FRAMES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")  # of videos, given one frame
OTHERS = ("KL", "KLFlux2", "DC", "Tiny", "RAE", "KLHunyuanImage")
CLASSES = (*(f"Autoencoder{kind}" for kind in OTHERS), *FRAMES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
    """One of diffusers' autoencoders, frozen and in eval mode.

    Attributes:
        vae: the model of diffusers, whose config and weights also hold the normalization.
        normalization: from its latents to those that the network sees.
        downsample: pixels per latent cell along a side (8 for Stable Diffusion).
        latent_channels: C (4 for Stable Diffusion).
        unit_pixels: its pixels are in [0, 1] (RAE, EDM2's use), in place of [-1, 1].
        patch: side of the latent patches that are one cell (FLUX.2: 2), their channels in the order of pixel_unshuffle.
        side: of the only pictures it takes, in pixels (RAE); None: it takes multiples of `downsample`.
        identity: see `measure_identity`; None: it was not measured.
    """

    identity: dict | None = None

    def __init__(self, vae: ModelMixin, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Take over `vae`. Raises UserError if it is of another class, or not for pictures of 3 channels."""
        name, settings = type(vae).__name__, vae.config
        if name not in CLASSES:
            raise UserError(f"it is of class {name}: expected {', '.join(CLASSES)}")
        is_rae, self.takes_frames = name == "AutoencoderRAE", name in FRAMES
        self.unit_pixels = is_rae or settings.get("unit_pixels", False)
        pixels = {settings.get(key) or 3 for key in ("in_channels", "out_channels")}
        if pixels != {3} and not self.takes_frames:  # which count patches of pixels
            raise UserError(f"its pixels have {sorted(pixels)} channels: expected 3")
        self.normalization = read_normalization(vae)
        self.side = vae.decoder_image_size if is_rae else None
        self.patch = settings.patch_size[0] if name == "AutoencoderKLFlux2" else 1
        sizes = [settings.get(key) for key in ("latent_channels", "z_dim", "encoder_hidden_size")]
        self.latent_channels = int(next(filter(None, sizes))) * self.patch**2
        self.downsample = pixels_per_cell(vae) * self.patch
        if not {len(self.normalization.shift), len(self.normalization.scale)} <= {1, self.latent_channels}:
            raise UserError(
                f"it normalizes {len(self.normalization.shift)} channels, its latents have {self.latent_channels}"
            )
        # Module.to itself: diffusers' override warns, wrongly, at every cast of a model loaded in its file's precision
        self.vae = torch.nn.Module.to(vae.eval().requires_grad_(False), device=device, dtype=dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Autoencoder":
        """Move the weights to `device`, in another precision if given, and return self."""
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)
        return self

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless pictures of this size, in pixels, can be encoded."""
        if self.side and (height, width) != (self.side, self.side):
            raise UserError(f"--resolution {height}x{width} is not the autoencoder's only one, {self.side}x{self.side}")
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"--resolution {height}x{width} is not a multiple of {self.downsample}, as the autoencoder needs"
            )

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 of the weights, which tells sets of samples apart."""
        return hash_weights(self.vae.state_dict())

    @torch.no_grad()
    def encode_moments(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Encode images to the means and log-variances of their latents.

        Args:
            images: (B, 3, H, W) floats in [-1, 1]; H and W multiples of `downsample`.
            batch_size: images encoded at a time; None for all at once.

        Returns:
            (B, 2C, h, w) float32 on the device of `images`: C means, then C log-variances (not clamped).
        """
        return self._in_batches(self._encode, images, batch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Decode normalized latents (B, C, h, w) to images (B, 3, H, W) float32 in [-1, 1] on the device of `latents`.

        `batch_size` latents are decoded at a time, which bounds the memory whatever B is.
        """
        latents = self.normalization.invert(latents)
        return self._in_batches(lambda z: self._decode(z).clamp(-1, 1), latents, batch_size)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample normalized latents for training, see `Normalization.sample`."""
        return self.normalization.sample(moments, noise)

    def _encode(self, images):
        images = (images + 1) / 2 if self.unit_pixels else images
        latents = self.vae.encode(images[:, :, None] if self.takes_frames else images)[0]  # whatever it is named
        if isinstance(latents, Tensor):  # without a posterior
            moments = torch.cat([latents, torch.full_like(latents, LOGVAR_RANGE[0])], dim=1)
        else:
            moments = latents.parameters
        return F.pixel_unshuffle(moments[:, :, 0] if self.takes_frames else moments, self.patch)

    def _decode(self, latents):
        latents = F.pixel_shuffle(latents, self.patch)
        images = self.vae.decode(latents[:, :, None] if self.takes_frames else latents).sample
        images = images[:, :, 0] if self.takes_frames else images
        return images * 2 - 1 if self.unit_pixels else images

    def _in_batches(self, function, x, batch_size):
        weights = next(self.vae.parameters())
        parts = x.split(batch_size or max(len(x), 1))
        return torch.cat([function(part.to(weights.device, weights.dtype)).float().to(x.device) for part in parts])


def pixels_per_cell(vae: ModelMixin) -> int:
    """Return how many pixels a cell of raw latents has along a side."""
    if type(vae).__name__ == "AutoencoderRAE":
        return vae.decoder_patch_size
    levels = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    ratio = vae.config.get("spatial_compression_ratio") or getattr(vae, "spatial_compression_ratio", None)
    return int(ratio or 2 ** (len(levels) - 1))


def hash_weights(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over named tensors: names (sorted), shapes and float32 values, so the file format does not enter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def measure_identity(autoencoder: Autoencoder) -> dict:
    """Measure what tells an autoencoder from others, whatever file it came from.

    Returns:
        {"encoder": {"mean", "std"} of each channel of the moments of a fixed picture of 4x4 cells, "decoder": of the
        picture that their means decode to, "shift" and "scale" of its normalization}; see `differing_parts`.
    """
    side, n_threads = autoencoder.side or 4 * autoencoder.downsample, torch.get_num_threads()
    steps = torch.arange(3 * side * side, dtype=torch.float64)
    picture = (steps**1.3).sin().reshape(1, 3, side, side).float()  # of all frequencies
    torch.set_num_threads(1)  # their number changes the last bits
    try:
        moments = autoencoder.encode_moments(picture)
        mean, logvar = moments.chunk(2, dim=1)
        decoded = autoencoder._in_batches(autoencoder._decode, mean, 1)
    finally:
        torch.set_num_threads(n_threads)
    if decoded.shape != picture.shape:
        raise UserError(f"it turns pictures {tuple(picture.shape)} into {tuple(decoded.shape)}: expected the same")
    return {
        "encoder": channel_statistics(torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)),
        "decoder": channel_statistics(decoded),
        **autoencoder.normalization.to_json(),
    }


def load_autoencoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    latent_stats: str | Path = "",
    recorded: dict | None = None,
) -> Autoencoder:
    """Load an autoencoder from a diffusers folder, a single file or the Hugging Face hub.

    Args:
        path: a folder in diffusers format, or a pipeline folder holding it as `vae/`; a .pth, .pt, .ckpt, .bin or
            .safetensors file, see `libs.autoencoder_files`; or of the hub, owner/name or hf://owner/name/file.
        dtype: precision in which it computes (float32, float16 or bfloat16).
        device: where it is placed.
        latent_stats, recorded: normalization in place of its own, see `read_latent_stats`; "": its own.

    Raises:
        UserError: nothing is there, the hub cannot be reached, or it is not a whole autoencoder.
    """
    name, path = str(path), Path(path).expanduser()
    if name.startswith(HUB):
        path = fetch(name.removeprefix(HUB))
    elif not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or path.suffix in FILES or path.parent.is_dir():
            raise UserError(f"No autoencoder at {path}: {EXPECTED}")
        path = fetch(name)
    entries = read_latent_stats(latent_stats, recorded) if latent_stats else {}
    try:
        vae = read_folder(path) if path.is_dir() else read_single_file(path)
        if entries and type(vae).__name__ == "AutoencoderRAE":
            raise UserError("it normalizes by itself: leave --latent_stats (config.autoencoder.latent_stats) away")
        vae.register_to_config(**entries)
        autoencoder = Autoencoder(vae)
        autoencoder.identity = measure_identity(autoencoder)
    except Exception as error:  # of many types, for files that are not what they should be
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is not a whole autoencoder ({reason}): {EXPECTED}") from error
    if dtype == torch.float16 and vae.config.get("force_upcast"):
        logging.warning("%s overflows in float16 (force_upcast): computing in float32", path)
        dtype = torch.float32
    if dtype != torch.float32:
        vae.to(memory_format=torch.channels_last)
    return autoencoder.to(device, dtype)


def fetch(address: str) -> Path:
    """Return the file owner/name/file of the hub, or the folder of its cache that holds the autoencoder owner/name."""
    owner, name, file = (*address.split("/", 2), "", "")[:3]
    repository, folder = f"{owner}/{name}", f"{file}/" if file else ""
    if Path(file).suffix in FILES:
        return hub_download(repository, file)
    try:
        config = hub_download(repository, f"{folder}{CONFIG}", whole_repository=True)
    except UserError as error:  # a pipeline's?
        folder = f"{folder}vae/"
        try:
            config = hub_download(repository, f"{folder}{CONFIG}", whole_repository=True)
        except UserError:
            raise error from None
    try:
        hub_download(repository, f"{folder}diffusion_pytorch_model.safetensors", whole_repository=True)
    except UserError:  # a repository from before safetensors
        hub_download(repository, f"{folder}diffusion_pytorch_model.bin", whole_repository=True)
    return config.parent


def read_folder(folder: Path) -> ModelMixin:
    """Read an autoencoder of `CLASSES` from a diffusers folder, or from vae/ of a pipeline's."""
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    for file in folder.glob("diffusion_pytorch_model*"):
        if (kind := file_kind(file)) not in (None, SAFETENSORS, "a JSON file"):
            raise UserError(f"{file.name} is {kind}")
    name = read_json(folder / CONFIG).get("_class_name", "AutoencoderKL")
    if name not in CLASSES:
        raise UserError(f"it is of class {name}: expected {', '.join(CLASSES)}")
    if name == "AutoencoderRAE" and importlib.util.find_spec("transformers") is None:
        raise UserError(f"{name} needs transformers: python -m pip install transformers")
    vae, info = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):  # diffusers fills in random values
        raise UserError(f"{len(wrong)} tensors are missing or unknown, such as {wrong[0]}")
    return vae
