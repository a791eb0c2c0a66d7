"""Weights in and out: safetensors and plain state dicts, this project's tensor names and the released ones.

Nothing here unpickles freely: `.pth` files are read with weights_only=True.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# (this project's name, released name); each pair is undone by its mirror image, so the table serves both directions.
RENAMES = [
    (r"\.patch_embed\.", ".input_layer.1."),
    (r"\.pos_embed\.", ".input_layer.3.position_embeddings."),
    (r"\.class_embed\.", ".class_embeds."),
    (r"\.attn\.norm\.", ".block1.norm."),
    (r"\.attn\.qkv\.", ".block1.query_key_value."),
    (r"\.attn\.out\.", ".block1.dense."),
    (r"\.depthwise\.", ".block1.1."),
    (r"\.mlp\.", ".block2."),
    (r"\.skips\.", ".skip_denses."),
    (r"\.upsample\.norm_in\.", ".upsample.0."),
    (r"\.upsample\.proj\.", ".upsample.1.kernel."),
    (r"\.upsample\.norm_out\.", ".upsample.2."),
    (r"\.head\.norm\.", ".output_layer.0."),
    (r"\.head\.conv\.", ".output_layer.2."),
    (r"\.time_weight$", ".nodecay_weight"),
    (r"\.time_bias$", ".nodecay_bias"),
]


def released_name(name: str) -> str:
    """The released checkpoints' name of one of this project's tensors: stages.0.mlp.w0 ... -> stages.0.block2.w0 ..."""
    for own, released in RENAMES:
        name = re.sub(own, released, name)
    return name


def to_own_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in released names, renamed to this project's; one already in ours, or unknown names, are kept."""
    own_names = {released_name(name): name for name in model.state_dict()}
    return {own_names.get(name, name): tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a state dict (own or released names) into a model.

    Raises:
        ValueError: tensors missing, left over or of another shape, the first few named.
    """
    state = to_own_names(state, model)
    own = model.state_dict()
    problems = [f"{name}: missing in the file" for name in own if name not in state]
    problems += [f"{name}: not in the model" for name in state if name not in own]
    problems += [
        f"{name}: expected shape {tuple(own[name].shape)}, found {tuple(state[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source} does not fit this model ({len(problems)} of {len(own)} tensors differ); was it trained with "
            f"another config (--config, config.nnet, config.z_shape)?\n  {shown}{more}"
        )
    model.load_state_dict(state)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth` or `.pt` file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or a pickle with anything but tensors in it (it is refused, not run).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}. Released weights: DiMR-XL_2R_800epochs.pth and DiMR-G_2R_800epochs.pth in the "
            "Hugging Face repository QHL067/DiMR; a training run's are in <workdir>/ckpts/<step>.ckpt"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged or refused file
        raise ValueError(f"{path} could not be read as a plain state dict: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a plain state dict of tensors, found something else inside")
    return state
