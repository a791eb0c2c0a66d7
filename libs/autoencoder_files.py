"""Single files of autoencoders of Stable Diffusion's kind: their config is read off their tensors.

CompVis' code names the tensors, of Stable Diffusion, SDXL, VA-VAE, REPA-E and MAR's KL-16, alone or in a checkpoint of
a whole model; diffusers' names are taken too. Every tensor is mapped and loaded strictly: diffusers' own converter
leaves over the attention of VA-VAE's and MAR's lowest level, and a load that is not strict drops it.
"""

import re
from pathlib import Path

import torch
from absl import logging
from diffusers import AutoencoderKL
from torch import Tensor

from libs import UserError
from libs.checkpoint import read_state_dict

# Stable Diffusion's KL-f8 autoencoder.
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

# Published scaling factors by (latent channels, pixels per cell): of Stable Diffusion, and of MAR's KL-16
FACTORS = {(4, 8): 0.18215, (16, 16): 0.2325}
SDXL_FACTOR = 0.13025

OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# What is trained beside an autoencoder: losses, VA-VAE's foundation model and its projection, EMA weights
BESIDE = r"(loss|foundation_model|linear_proj|model_ema)\..*"

# (CompVis' name, diffusers'), applied in order; the levels of a decoder are counted backwards besides.
RENAMES = [
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
]


def read_single_file(file: Path) -> AutoencoderKL:
    """Read an autoencoder from a file of tensors, alone or in a checkpoint of a whole model. Runs no code.

    Raises:
        UserError: no autoencoder in it, or not a whole one.
    """
    tensors = read_state_dict(file)
    sdxl = any(name.startswith("conditioner.") for name in tensors)
    if inside := {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith("first_stage_model.")}:
        tensors = inside
    state = to_diffusers_names({name: t for name, t in tensors.items() if not re.fullmatch(BESIDE, name)})
    config = config_of(state)
    add_factor(config, sdxl, file)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    own = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    wrong = sorted(
        name for name in own.keys() | state.keys() if name not in state or state[name].shape != own.get(name)
    )
    if wrong:
        raise UserError(f"{len(wrong)} tensors are missing, unknown or of another shape, such as {wrong[0]}")
    vae.load_state_dict(state, assign=True)
    return vae


def to_diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from CompVis' names; its attention projects by 1x1 convolutions, diffusers' by matrices."""
    levels = [int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    renamed = {}
    for name, tensor in state.items():
        if levels:
            name = re.sub(r"^(decoder\.up\.)(\d+)", lambda found: f"{found[1]}{max(levels) - int(found[2])}", name)
        for compvis, diffusers in RENAMES:
            name = re.sub(compvis, diffusers, name)
        is_projection = re.search(r"attentions\.\d+\.to_", name) and tensor.ndim == 4
        renamed[name] = tensor[:, :, 0, 0] if is_projection else tensor
    return renamed


def config_of(state: dict[str, Tensor]) -> dict:
    """Read the config of an AutoencoderKL off its tensors, all but the scaling factor."""

    def count(pattern: str) -> int:
        return len({found[0] for name in state if (found := re.match(pattern, name))})

    try:
        n_levels = count(r"encoder\.down_blocks\.\d+")
        attends = [
            [f"{part}_blocks.{level}.attentions.0.to_q.weight" in state for level in range(n_levels)]
            for part in ("encoder.down", "decoder.up")
        ]
        return {
            **SD_CONFIG,
            "in_channels": state["encoder.conv_in.weight"].shape[1],
            "out_channels": state["decoder.conv_out.weight"].shape[0],
            "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends[0]],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[1]],
            "block_out_channels": [
                len(state[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(n_levels)
            ],
            "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.\d+"),
            "latent_channels": state["decoder.conv_in.weight"].shape[1],
            "use_quant_conv": "quant_conv.weight" in state,
            "use_post_quant_conv": "post_quant_conv.weight" in state,
        }
    except (KeyError, IndexError) as error:
        raise UserError(f"no autoencoder in it: {error} is missing among {len(state)} tensors") from error


def add_factor(config: dict, sdxl: bool, file: Path) -> None:
    """Set the scaling factor, which single files do not state, and say which it is."""
    channels, factor = config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    config["scaling_factor"] = SDXL_FACTOR if sdxl else FACTORS.get((channels, factor), 1.0)
    known = "SDXL's" if sdxl else "that of its shape" if (channels, factor) in FACTORS else "its own is not known"
    line = f"{file}: {channels} channels, {factor} pixels a cell, scaling factor {config['scaling_factor']:g} ({known})"
    logging.info("%s; --latent_stats (config.autoencoder.latent_stats) gives another: SDXL's is %g", line, SDXL_FACTOR)
