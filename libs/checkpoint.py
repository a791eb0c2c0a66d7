"""Weights files and checkpoint folders: where they are, formats, tensors' names (own and released), metadata.

Nothing here unpickles freely: `.pth` files are read with weights_only=True.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from absl import logging
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from libs import UserError
from libs.files import (
    SAFETENSORS,
    file_digest,
    file_kind,
    flush_to_disk,
    hub_download,
    json_digest,
    replacing,
    replacing_folder,
)

RELEASED = "hf://QHL067/DiMR/DiMR-XL_2R_800epochs.pth"
HUB = "hf://"

# Files of a training checkpoint, a folder <step>.ckpt, and of a pipeline folder
STATE_FILE = "state.json"
WEIGHTS_FILE = "nnet.safetensors"
EMA_FILE = "nnet_ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PIPELINE_FILES = "transformer/diffusion_pytorch_model*"

CONFIG_KEY = "config"  # in a state.json, and in the metadata of a safetensors file
PROFILE_KEY = "ema_profile"  # in that metadata

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

WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # in names, put there by PyTorch
NESTED = ("ema", "model_ema", "ema_state_dict", "state_dict", "model")  # where training checkpoints keep weights

# --- Tensors and their names ------------------------------------------------------------------------------------------


def released_name(name: str) -> str:
    """Return the released checkpoints' name of one of this project's tensors: stages.0.mlp.w0 -> stages.0.block2.w0."""
    for own, released in RENAMES:
        name = re.sub(own, released, name)
    return name


def to_own_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a state dict from released names to this project's; own and unknown names are kept.

    What wrappers put into names goes (module., _orig_mod. and the like), and so does a prefix of all names (net.).
    """
    own_names = {released_name(name): name for name in model.state_dict()}
    state = {re.sub(WRAPPERS, "", name): tensor for name, tensor in state.items()}
    some = next(iter(own_names.items()))
    prefixes = {name.removesuffix(known) for name in state for known in some if name.endswith(f".{known}")}
    if len(prefixes) == 1 and all(name.startswith(prefix := min(prefixes)) for name in state):
        logging.info("the weights' names without %s", prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {own_names.get(name, name): tensor for name, tensor in state.items()}


def fitting_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dict in the model's names and order. The model may be on the meta device.

    Raises:
        UserError: tensors missing, left over or of another shape, the first few named; `source` says in which file.
    """
    state, own = to_own_names(state, model), model.state_dict()
    missing = [f"{name}: missing in the file" for name in own if name not in state]
    other = [
        f"{name}: expected shape {tuple(own[name].shape)}, found {tuple(state[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    left_over = [f"{name}: not in the model" for name in state if name not in own]
    if problems := missing + other + left_over:
        shown = "\n  ".join([*problems[:3], *left_over[:2], "..."][: len(problems)])
        raise UserError(
            f"{source} does not fit this model (of {len(own)} tensors {len(missing)} are missing and {len(other)} of "
            f"another shape; {len(left_over)} are left over); was it trained with another config?\n  {shown}"
        )
    return {name: state[name] for name in own}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a state dict of whole tensors, in own or released names, into a model, which may be sharded by FSDP.

    Raises:
        UserError: see `fitting_weights`.
    """
    state = fitting_weights(model, state, source)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, a PyTorch pickle (.pth, .pt, .bin) or all that an index lists.

    Of a training checkpoint that nests them, the EMA weights are taken.

    Raises:
        UserError: no such file, a damaged one, or a pickle with anything but tensors in it (refused, not run).
        OSError: it is there and cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a file, a <step>.ckpt folder, or released weights, {RELEASED}")
    kind = file_kind(path) or (SAFETENSORS if path.suffix == ".safetensors" else None)
    problem = f"is {kind}, no weights" if kind else None
    try:
        if ".index." in path.name and path.suffix == ".json":  # of a model in several files
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {name: each for shard in shards for name, each in read_state_dict(path.with_name(shard)).items()}
        if kind == SAFETENSORS:
            state, problem = load_file(path), None
        elif kind is None:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a run, in DiT's checkpoints
                state = torch.load(path, "cpu", weights_only=True)
            while isinstance(state, dict) and (inner := next((key for key in NESTED if key in state), None)):
                logging.info("%s: taking the weights under %r", path, inner)
                state = state[inner]
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                found = f"the keys {list(state)[:5]}" if isinstance(state, dict) else type(state).__name__
                problem = f"holds something else ({found}): expected a plain state dict of tensors"
    except SafetensorError as error:
        problem = f"is not a whole safetensors file ({error})"
    except UserError:  # of a shard
        raise
    except pickle.UnpicklingError:
        problem = "could not be read as a plain state dict: it is damaged, or holds more than tensors, that is, code"
    except Exception as error:  # torch.load raises many types for a damaged file, of an empty one without a message
        problem = f"could not be read as a plain state dict: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if problem:
        raise UserError(f"{path} {problem}")
    return state


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on the disk; its mode is that of the umask.

    safetensors itself (0.8) puts another file of mode 0600 in its place.
    """
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    os.chmod(path, mode)
    flush_to_disk(path)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], setting: str = "--out") -> None:
    """Write a .safetensors file whole or not at all. Errors name `setting`, which chooses another place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path, f"set {setting}") as file:
            save_tensors(tensors, file.name, metadata)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise UserError(f"Cannot write {path}: {error}. Free space there, or set {setting}") from error


# --- Finding a weights file -------------------------------------------------------------------------------------------


def find_weights(path: str | Path) -> Path:
    """Return the weights file that `path` stands for, of a folder its EMA weights.

    Args:
        path: a file; a checkpoint folder of this project or of U-ViT style; a pipeline folder (libs/pipeline.py); or
            hf://OWNER/REPOSITORY/FILE, a file of the Hugging Face hub, fetched once and then taken from its cache.

    Raises:
        UserError: a folder without weights, or a hub file that is neither in the cache nor to be fetched.
    """
    if str(path).startswith(HUB):
        return fetch_from_hub(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    shipped = [file.relative_to(path) for file in path.glob(PIPELINE_FILES) if "-of-" not in file.name]
    plain = {"diffusion_pytorch_model", "safetensors", "bin", "index", "json"}  # anything else is a variant, as fp16
    shipped.sort(key=lambda file: (len(set(file.name.split(".")) - plain), ".bin" in file.name))
    for name in (EMA_FILE, "nnet_ema.pth", *shipped, WEIGHTS_FILE, "nnet.pth"):
        if (path / name).is_file():
            if name in (WEIGHTS_FILE, "nnet.pth"):
                logging.warning("%s has no EMA weights; taking %s, whose samples are worse", path, name)
            return path / name
    raise UserError(f"{path} is a folder without {EMA_FILE} or nnet_ema.pth (or {PIPELINE_FILES}): give a .ckpt folder")


def fetch_from_hub(address: str) -> Path:
    """Return the local path of hf://OWNER/REPOSITORY/FILE, from the hub's cache or else fetched into it.

    An interrupted download is resumed. HF_HUB_OFFLINE=1 and HF_HOME are honoured.
    """
    owner, repository, file = (*address.removeprefix(HUB).split("/", 2), "", "")[:3]
    if not (owner and repository and file):
        raise UserError(f"expected hf://OWNER/REPOSITORY/FILE, such as {RELEASED}; found {address}")
    return hub_download(f"{owner}/{repository}", file)


# --- Checkpoint folders -----------------------------------------------------------------------------------------------


def checkpoint_folders(root: Path) -> list[Path]:
    """List the checkpoint folders under `root`, newest step first."""
    folders = [p for p in root.glob("*.ckpt") if p.is_dir() and p.stem.isdigit()]
    return sorted(folders, key=lambda p: int(p.stem), reverse=True)


def save_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write a checkpoint folder so that it is either whole under its name or not there at all.

    Args:
        folder: written under a temporary name, flushed to disk and renamed to this.
        tensors: {file name: named tensors}.
        state: everything else, as JSON; the files' SHA-256, and its own, are added under "sha256".

    Raises:
        OSError, SafetensorError: it cannot be written, for example on a full disk.
    """
    with replacing_folder(folder) as temporary:
        for name, named in tensors.items():
            save_tensors(named, temporary / name)
        digests = {name: file_digest(temporary / name) for name in tensors}
        digests[STATE_FILE] = json_digest(state)
        (temporary / STATE_FILE).write_text(json.dumps({**state, "sha256": digests}, indent=1))
        flush_to_disk(temporary / STATE_FILE)
        flush_to_disk(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
    flush_to_disk(folder.parent)


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Read (state, {file name: tensors}) of a checkpoint folder, its files checked against their SHA-256.

    Raises:
        UserError: a damaged checkpoint; the message names the file.
        OSError: the system does not give a file that is there, which says nothing about the checkpoint.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        expected = state.pop("sha256")
        found = {name: json_digest(state) if name == STATE_FILE else file_digest(folder / name) for name in expected}
        if altered := [name for name in expected if found[name] != expected[name]]:
            raise ValueError(f"{altered[0]} is not what was written (checksum differs)")
        return state, {name: load_file(folder / name) for name in expected if name != STATE_FILE}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {error}") from error


def prune_checkpoints(root: Path, step: int, keep_last: int, keep_interval: int) -> None:
    """Remove all but the newest `keep_last` checkpoints up to `step` and those at multiples of `keep_interval` steps.

    Those of later steps are damaged ones that were passed over: they neither count nor are touched. What a process
    killed in writing has left is removed too. What cannot be removed is logged, and tried again the next time.
    """
    whole = [folder for folder in checkpoint_folders(root) if int(folder.stem) <= step]
    old = [f for f in whole[keep_last:] if not (keep_interval and int(f.stem) % keep_interval == 0)]
    for folder in [*old, *root.glob(".*.ckpt.tmp")]:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logging.warning("%s could not be removed, training goes on: %s", folder, error)


# --- Settings, and what is saved with weights -------------------------------------------------------------------------


def flatten_dict(values: dict | list, prefix: str = "") -> dict:
    """Flatten nested JSON values to {"a.b[0].c": value}."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    result = {}
    for key, value in items:
        name = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}" if prefix else key
        result |= flatten_dict(value, name) if isinstance(value, (dict, list)) and value else {name: value}
    return result


def differences(found: dict, expected: dict) -> dict[str, str]:
    """Describe the values that differ: {"scale": "scale: 1.4 there, 2.0 now"}."""
    names = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    return {name: f"{name}: {found.get(name)} there, {expected.get(name)} now" for name in names}


def settings_metadata(settings: dict) -> dict[str, str]:
    """Write what `saved_settings` gives, or some of it, as the metadata of a safetensors file."""
    return {name: json.dumps(value) for name, value in settings.items()}


def read_metadata(weights: Path) -> dict[str, str]:
    if weights.suffix != ".safetensors":
        return {}
    with safe_open(weights, "pt") as file:
        return file.metadata() or {}


def saved_settings(weights: Path) -> dict | None:
    """Read what is saved with a weights file: in its metadata, a state.json or its pipeline; None if nothing is.

    Returns:
        {"config": the config as JSON values, "step": the training step or None, "class_names": the names of the classes
        in the training data in the order of their labels, or None, "autoencoder": its identity, or None}.

    Raises:
        UserError: it is damaged.
    """
    try:
        found, beside = read_metadata(weights), weights.with_name(STATE_FILE)
        index = weights.parent.parent / "model_index.json"  # of a pipeline
        if CONFIG_KEY in found:
            keys = (CONFIG_KEY, "step", "class_names", "autoencoder")
            found = {key: json.loads(found[key]) for key in keys if key in found}
        elif beside.is_file():
            found = json.loads(beside.read_text())
        elif weights.match(PIPELINE_FILES) and index.is_file():
            found = json.loads(index.read_text())
            names = found["id2label"] and list(found["id2label"].values())
            found = {**found["trained"], "class_names": names}
        else:
            return None
        names = found.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError("class_names is no list of names")
        rest = {key: found.get(key) for key in ("step", "autoencoder")}
        return {"config": found[CONFIG_KEY], "class_names": names, **rest}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the settings saved with {weights} are damaged: {error}") from error


def ema_profile(weights: Path) -> str:
    """Return which EMA weights a file holds, such as "rate 0.9999" or "width 0.05"; "" if that is not known.

    From its name and the config saved with it or, for what scripts/posthoc_ema.py made, its metadata. The width is
    EDM2's sigma_rel.
    """
    if named := re.fullmatch(r"nnet_ema_(rate|width)_(.+)\.safetensors", weights.name):
        return f"{named[1]} {named[2]}"
    if profile := read_metadata(weights).get(PROFILE_KEY):
        return profile
    saved = saved_settings(weights) if weights.name == EMA_FILE else None
    return f"rate {saved['config']['ema']['rate']:g}" if saved else ""


# --- Starting from other weights --------------------------------------------------------------------------------------


def adapt_weights(
    model: nn.Module, state: dict[str, Tensor], grids: Sequence[tuple[int, int]] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Make weights of another resolution or class count fit, and return (state dict, what was done, a line each).

    Position tables are interpolated (bicubic) to the model's grids; class embeddings of another count are left as the
    model has initialized them. Everything else must fit as it is.

    Args:
        grids: (height, width) of the branches' position tables in `state`; where they are not known, a table of as many
            cells as the model's is taken as it is, and others are `likely_grid`.
    """
    state, own, notes = to_own_names(state, model), model.state_dict(), []
    for r, stage in enumerate(model.stages):
        name, grid = f"stages.{r}.pos_embed.weight", (stage.spec.max_height, stage.spec.max_width)
        table = state.get(name)
        if table is not None and table.shape[1] == own[name].shape[1]:
            old = grids[r] if r < len(grids) else likely_grid(len(table), grid)
            if old != grid:
                image = rearrange(table.float(), "(h w) D -> 1 D h w", h=old[0])
                image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
                state[name] = rearrange(image, "1 D h w -> (h w) D").to(table.dtype)
                notes.append(f"{name}: interpolated from {old[0]}x{old[1]} to {grid[0]}x{grid[1]} cells")
        name = f"stages.{r}.class_embed.weight"
        if name in state and state[name].shape[0] != own[name].shape[0]:
            notes.append(f"{name}: {state[name].shape[0]} classes with the null one, {own[name].shape[0]} here: fresh")
            state[name] = own[name].clone()
    return state, notes


def likely_grid(cells: int, like: tuple[int, int]) -> tuple[int, int]:
    """Guess (height, width) of a position table: in the proportions of `like`, or else square."""
    scale = (cells / math.prod(like)) ** 0.5
    for grid in ((round(like[0] * scale), round(like[1] * scale)), (math.isqrt(cells), math.isqrt(cells))):
        if math.prod(grid) == cells:
            return grid
    raise UserError(f"a position table of {cells} cells is neither square nor of the shape {like[0]}:{like[1]}")


def freeze(model: nn.Module, pattern: str) -> list[str]:
    """Stop training the parameters whose name matches a regular expression, and return their names."""
    names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    if not names:
        example = next(name for name, _ in model.named_parameters())
        raise UserError(f"init.freeze: {pattern!r} matches no parameter (names look like {example})")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
