"""The autoencoder between pixels and latents: diffusers' `AutoencoderKL`, from whatever form its weights come in.

Axes: B batch, C latent channels, H W pixels, h w latent cells (h = H / downsample).

Latent diffusion with a KL autoencoder: Rombach et al., CVPR 2022. The encoder gives *moments*, a mean and a
log-variance per latent cell; the diffusion model is trained on samples of that Gaussian times the scaling factor.
"""

import hashlib
import math
import pickle
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Stable Diffusion's KL-f8 autoencoder. CompVis-named files carry no config, so they are read as this one.
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

WEIGHT_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

WHERE_TO_GET = (
    "Expected one of: the released file assets/stable-diffusion/autoencoder_kl.pth or autoencoder_kl_ema.pth "
    "(linked from the U-ViT and DiMR repositories), a folder in diffusers format (config.json and "
    "diffusion_pytorch_model.safetensors), or a Hugging Face hub id such as stabilityai/sd-vae-ft-ema or "
    "stabilityai/sd-vae-ft-mse"
)


class Autoencoder:
    """A frozen `AutoencoderKL` in eval mode.

    Attributes:
        scaling_factor: latents = scaling_factor * sample of the moments (0.18215 for Stable Diffusion).
        downsample: pixels per latent cell along a side (8 for Stable Diffusion).
        latent_channels: C (4 for Stable Diffusion).
        identity: {"sha256", "scaling_factor"}: what makes two autoencoders the same, whatever file they came from.
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Takes over `vae`, whose weights should still have the precision of their file: the identity hashes them.

        Raises ValueError if its latents need more than one scale (a shift or per-channel statistics), or have none.
        """
        config = vae.config
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(name):
                raise ValueError(
                    f"The autoencoder's config.json sets {name}={config[name]}, but latents here are only scaled: "
                    f"expected an autoencoder with a scaling_factor alone, such as Stable Diffusion's"
                )
        scale = config.scaling_factor
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"The autoencoder's config.json: scaling_factor must be a number above 0, found {scale!r}")
        self.scaling_factor = float(scale)
        self.latent_channels = int(config.latent_channels)
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.identity = {"sha256": hash_weights(vae.state_dict()), "scaling_factor": self.scaling_factor}
        # Module.to itself: diffusers' override warns, wrongly, at every cast of a model loaded in its file's precision
        self.vae = torch.nn.Module.to(vae.eval().requires_grad_(False), device=device, dtype=dtype)

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Moves the weights to `device`; returns self."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode_moments(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Means and log-variances of the latents.

        Args:
            images: (B, 3, H, W) floats in [-1, 1]; H and W multiples of `downsample`.
            batch_size: images encoded at a time; None for all at once.

        Returns:
            (B, 2C, h, w) float32 on the device of `images`: C means, then C log-variances (not clamped).
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.downsample for side in images.shape[2:]):
            raise ValueError(
                f"Images must be (B, 3, H, W) with H and W multiples of {self.downsample}, found "
                f"{tuple(images.shape)}: change the resolution"
            )
        return self._in_batches(lambda x: self.vae.encode(x).latent_dist.parameters, images, batch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Images of scaled latents.

        Args:
            latents: (B, C, h, w), as the diffusion model sees them: already times `scaling_factor`.
            batch_size: latents decoded at a time, which bounds the memory of the decoder whatever B is.

        Returns:
            (B, 3, H, W) float32 in [-1, 1] on the device of `latents`.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"Latents must be (B, {self.latent_channels}, h, w), found {tuple(latents.shape)}")
        return self._in_batches(
            lambda z: self.vae.decode(z / self.scaling_factor).sample.clamp(-1, 1), latents, batch_size
        )

    def _in_batches(self, function, x, batch_size):
        weights = next(self.vae.parameters())
        parts = x.split(batch_size or max(len(x), 1))
        return torch.cat([function(part.to(weights.device, weights.dtype)).float().to(x.device) for part in parts])


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Latents for training: scaling_factor * (mean + std * noise), computed in float32.

    Args:
        moments: (B, 2C, h, w) of any float type: C means, then C log-variances.
        noise: (B, C, h, w) standard normal.
        scaling_factor: `Autoencoder.scaling_factor`.

    Returns:
        (B, C, h, w) float32.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return scaling_factor * (mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise.float())


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
    """Loads an autoencoder from a diffusers folder, a hub id or a CompVis-named file.

    Args:
        path: a folder with config.json and weights in diffusers format (or a pipeline folder holding it as `vae/`);
            a hub id `owner/name`; or a .pth, .pt, .ckpt, .bin or .safetensors file with CompVis names (bare, or under
            `first_stage_model.` as in a full Stable Diffusion checkpoint), read as Stable Diffusion's KL-f8.
        dtype: precision in which it computes (float32, float16 or bfloat16).
        device: where it is placed.

    Returns:
        Autoencoder.

    Raises:
        FileNotFoundError: nothing is there, or the hub cannot be reached; says where to get the weights.
        ValueError: the file or folder is not such an autoencoder; names what is missing or does not fit.
    """
    path = str(path)
    if Path(path).is_dir():
        vae = _load_folder(Path(path))
    elif Path(path).is_file():
        vae = _load_compvis(Path(path))
    elif _looks_like_hub_id(path):
        vae = _load_folder(_fetch_from_hub(path))
    else:
        raise FileNotFoundError(f"No autoencoder at {path}. {WHERE_TO_GET}")
    return Autoencoder(vae, dtype, device)


def _looks_like_hub_id(path: str) -> bool:
    """owner/name, where `owner` is no folder here (else it is a missing local path) and `name` no weight file."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith(WEIGHT_FILE_SUFFIXES)
        and not Path(path).parent.is_dir()
    )


def _fetch_from_hub(hub_id: str) -> Path:
    patterns = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    try:  # what was fetched once is used without asking the network again
        return Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
    except OSError:
        pass
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        folder = f"assets/{hub_id.split('/')[1]}"
        raise FileNotFoundError(
            f"The autoencoder {hub_id} is not on this machine and could not be fetched from the Hugging Face hub "
            f"({_first_line(error)}). On a machine with network run `hf download {hub_id} --local-dir {folder}`, copy "
            f"the folder here and give {folder} as the autoencoder"
        ) from error


def _load_folder(folder: Path) -> AutoencoderKL:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers autoencoder: it has no config.json. {WHERE_TO_GET}")
    try:
        vae, info = AutoencoderKL.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} does not load as a diffusers AutoencoderKL: {_first_line(error)}") from error
    _refuse_bad_names(folder, info["missing_keys"], info["unexpected_keys"])
    return vae


def _load_compvis(path: Path) -> AutoencoderKL:
    state = _read_tensors(path)
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise ValueError(
            f"{path} holds weights under diffusers' names, whose architecture is in the config.json beside them: "
            f"give the folder ({path.parent}) instead of the file"
        )
    with torch.device("meta"):  # the names and shapes alone; the file's tensors become the weights below
        vae = AutoencoderKL(**SD_CONFIG)
    expected = vae.state_dict()
    try:
        converted = convert_ldm_vae_checkpoint(state, vae.config)
    except (KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold Stable Diffusion's KL-f8 autoencoder: {error}") from error
    _refuse_bad_names(path, expected.keys() - converted.keys(), converted.keys() - expected.keys())
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} does not hold Stable Diffusion's KL-f8 autoencoder: {name} should have shape "
                f"{tuple(expected[name].shape)}, found {tuple(tensor.shape)}. For another architecture give a folder "
                f"in diffusers format, whose config.json describes it"
            )
    converted = {name: tensor.float() for name, tensor in converted.items()}
    vae.load_state_dict(converted, assign=True)
    return vae


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a weight file. Pickled files are read with weights_only=True: tensors, and no code."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain file of weights and was not loaded, because it could run code: "
            f"{_first_line(error)}. Convert it to .safetensors on a machine where you trust it"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a file of weights: {_first_line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # a full training checkpoint
        state = state["state_dict"]
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise ValueError(f"{path} holds no named tensors. {WHERE_TO_GET}")
    return state


def _refuse_bad_names(path, missing, unexpected):
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} are not known ({_some(unexpected)})")
    if problems:
        raise ValueError(f"{path} does not hold a whole autoencoder: {' and '.join(problems)}. {WHERE_TO_GET}")


def _some(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
