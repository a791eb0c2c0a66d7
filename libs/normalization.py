"""The normalization of latents, z = (r - shift) * scale per channel, where it is read from, and what tells
autoencoders apart.

It is kept and computed as (shift, scale), never as 1 / scale, so that one factor for all channels gives the published
bits. Diffusers' configs state it as shift = latents_mean or shift_factor, scale = scaling_factor / latents_std.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from absl import logging
from diffusers import ModelMixin
from torch import Tensor

from libs import UserError
from libs.checkpoint import read_state_dict

# Range of the log-variance before it is exponentiated, as in the CompVis and diffusers code.
LOGVAR_RANGE = (-30.0, 20.0)

# EDM2's statistics of sd-vae-ft-mse, which it feeds pixels in [0, 1]: other latents than anyone else's
EDM2 = {
    "latents_mean": [5.81, 3.25, 0.12, -2.15],
    "latents_std": [4.17, 4.62, 3.71, 3.28],
    "scaling_factor": 1.0,
    "unit_pixels": True,
}

TOLERANCE = 1e-2  # of measured numbers, relative to a channel's root mean square: weights in 16 bits stay within
USUAL = (0.5, 2.0)  # deviations of latents that are normalized as they should be

Identity = dict  # {"encoder", "decoder": {"mean", "std"} of each channel, "shift", "scale": of the normalization}


@dataclass(frozen=True)
class Normalization:
    """The affine map per channel from an autoencoder's latents r to those that the network sees.

    Attributes:
        shift, scale: one number for all channels, or one for each.
    """

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if not (all(map(math.isfinite, self.shift)) and all(0 < scale < math.inf for scale in self.scale)):
            found = f"{list(self.shift)[:4]} and {list(self.scale)[:4]}"
            raise UserError(f"latents are normalized by finite shifts and scales above 0; found {found}")

    def to_json(self) -> dict[str, list[float]]:
        return {"shift": list(self.shift), "scale": list(self.scale)}

    def apply(self, latents: Tensor) -> Tensor:
        """Normalize latents (B, C, h, w): (r - shift) * scale."""
        return (latents - per_channel(self.shift, latents.device)) * per_channel(self.scale, latents.device)

    def invert(self, latents: Tensor) -> Tensor:
        """Invert `apply`: z / scale + shift."""
        return latents / per_channel(self.scale, latents.device) + per_channel(self.shift, latents.device)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample normalized latents, computed in float32.

        Args:
            moments: (B, 2C, h, w) of any float type: C means, then C log-variances.
            noise: (B, C, h, w) standard normal.

        Returns:
            (B, C, h, w) float32.
        """
        mean, logvar = moments.float().chunk(2, dim=1)
        return self.apply(mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise.float())


@functools.lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> float | Tensor:
    """Return one value as a number, which rounds as the published factor does, more as (C, 1, 1) on the device."""
    return values[0] if len(values) == 1 else torch.tensor(values, device=device)[:, None, None]


# --- Where it is read from --------------------------------------------------------------------------------------------


def read_normalization(vae: ModelMixin) -> Normalization:
    """Read the normalization of one of diffusers' autoencoders from its config or weights."""
    if type(vae).__name__ == "AutoencoderRAE":  # which normalizes in `encode`, per element
        return Normalization()
    config = vae.config
    shift, std = config.get("latents_mean"), config.get("latents_std")
    if type(vae).__name__ == "AutoencoderKLFlux2" and shift is None:  # statistics of the latents in patches
        shift = vae.bn.running_mean.double().tolist()
        std = (vae.bn.running_var.double() + config.batch_norm_eps).sqrt().tolist()
    shift = config.get("shift_factor") if shift is None else shift
    factor = config.get("scaling_factor")
    try:
        factor, shift, std = 1.0 if factor is None else factor, as_floats(shift, 0.0), as_floats(std, 1.0)
        return Normalization(shift, tuple(factor / value for value in std))
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"no normalization: scaling_factor {factor!r}, shift {shift!r}, std {std!r:.80}") from error


def as_floats(value: float | list | None, default: float) -> tuple[float, ...]:
    values = [default] if value is None else value if isinstance(value, list | tuple) else [value]
    return tuple(number + 0.0 for number in values)  # a TypeError for texts


def read_latent_stats(stats: str | Path, recorded: Identity | None = None) -> dict:
    """Read another normalization: a scaling factor, edm2, or a file with tensors `mean` and `std` of each channel.

    In place of these REPA-E's `latents_bias` and `latents_scale` are taken, z = (r - bias) * scale; REPA's file of
    the same names has the bias 0, where its other convention, z = r * scale + bias, is the same.

    Args:
        recorded: the identity whose normalization is taken where the file is not there any more.

    Returns:
        The entries of diffusers' configs that state it.
    """
    none = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    if stats == "edm2":
        return {**none, **EDM2}
    try:
        return {**none, "scaling_factor": float(str(stats))}
    except ValueError:
        stats = Path(stats).expanduser()
    if not stats.is_file():
        if recorded is None:
            raise UserError(f"no statistics of latents at {stats}: give such a file, or a scaling factor")
        logging.info("no statistics of latents at %s: taking those that were trained with", stats)
        std = [1 / scale for scale in recorded["scale"]]
        return {**none, "scaling_factor": 1.0, "latents_mean": recorded["shift"], "latents_std": std}
    tensors = {name: tensor.double().flatten() for name, tensor in read_state_dict(stats).items()}
    if {"mean", "std"} <= tensors.keys():
        mean, std = tensors["mean"], tensors["std"]
    elif {"latents_bias", "latents_scale"} <= tensors.keys():
        mean, std = tensors["latents_bias"], 1 / tensors["latents_scale"]
    else:
        raise UserError(f"{stats} should hold mean and std, or latents_bias and latents_scale; found {list(tensors)}")
    return {**none, "scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": std.tolist()}


# --- Statistics of what the network sees ------------------------------------------------------------------------------


def latent_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation (C,), float64, of latents drawn from moments (B, 2C, h, w)."""
    mean, logvar = moments.double().chunk(2, dim=1)
    within = logvar.clamp(*LOGVAR_RANGE).exp().mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)), (mean.var(dim=(0, 2, 3), unbiased=False) + within).sqrt()


def describe_latents(moments: Tensor, normalization: Normalization) -> tuple[str, str]:
    """Describe the latents that a network sees of some moments: a line, and a warning or "".

    The warning is of a deviation outside `USUAL`, as of a factor for another autoencoder, or latents scaled twice.
    """
    shift, scale = (torch.tensor(values).double() for values in (normalization.shift, normalization.scale))
    mean, std = latent_statistics(moments)
    means, stds = (mean - shift) * scale, std * scale
    overall = (stds.square().mean() + means.var(unbiased=False)).sqrt().item()
    low, high = stds.min().item(), stds.max().item()
    line = f"the network sees latents of mean {means.mean():.3f}, deviation {overall:.3f} ({low:.3f} to {high:.3f})"
    fits = USUAL[0] <= overall <= USUAL[1]
    return line, "" if fits else (
        f"a deviation of {overall:.3g} in place of about 1: set --latent_stats (config.autoencoder.latent_stats) to a "
        "scaling factor or to what `scripts/inspect_latents.py STORE --statistics` writes; for an import see --scaled"
    )


# --- Identity ---------------------------------------------------------------------------------------------------------


def differing_parts(found: Identity | None, expected: Identity | None) -> dict[str, str]:
    """Describe which of encoder, normalization and decoder differ: weights in 16 bits are the same autoencoder's."""
    if found is None or expected is None:
        return {} if found is expected else {"encoder": "pixels in place of latents"}
    if not all({"encoder", "decoder", "shift", "scale"} <= each.keys() for each in (found, expected)):
        return {"encoder": "recorded by other code"}
    parts = {name: "another" for name in ("encoder", "decoder") if not _alike(found[name], expected[name])}
    normalizations = [(each["shift"], each["scale"]) for each in (expected, found)]
    if not _same_normalization(*normalizations):
        there, here = (f"shift {str(shift)[:60]}, scale {str(scale)[:60]}" for shift, scale in normalizations)
        parts["normalization"] = f"{there} there, {here} here"
    return parts


def check_same_autoencoder(found: Identity | None, expected: Identity | None, source: str | Path) -> None:
    """Raise UserError unless `found` has the encoder and normalization recorded in `source`; of a decoder, warn."""
    parts = differing_parts(found, expected)
    if wrong := [f"{name}: {text}" for name, text in parts.items() if name != "decoder"]:
        raise UserError(
            f"{source} is of another autoencoder ({'; '.join(wrong)}): set --autoencoder "
            "(config.autoencoder.pretrained_path) and --latent_stats (config.autoencoder.latent_stats) as there"
        )
    if parts:
        logging.warning("%s is of another decoder of the same encoder: pictures will differ a little", source)


def channel_statistics(values: Tensor) -> dict[str, list[float]]:
    """Return mean and deviation of each channel of (B, C, h, w) as JSON values."""
    columns = values.double().transpose(0, 1).flatten(1)
    numbers = {"mean": columns.mean(dim=1), "std": columns.std(dim=1, unbiased=False)}
    return {name: [float(f"{value:.5g}") for value in column.tolist()] for name, column in numbers.items()}


def _alike(found, expected):
    rows = [list(zip(each["mean"], each["std"], strict=True)) for each in (found, expected)]
    return len(rows[0]) == len(rows[1]) and all(
        max(abs(mean - m), abs(std - s)) <= TOLERANCE * math.hypot(m, s)
        for (mean, std), (m, s) in zip(*rows, strict=True)
    )


def _same_normalization(found, expected):
    """Compare (shift, scale), which are data, not measured: up to rounding."""
    close = functools.partial(math.isclose, rel_tol=1e-5, abs_tol=1e-7)
    return all(
        len(values) == len(others) and all(map(close, values, others))
        for values, others in zip(found, expected, strict=True)
    )
