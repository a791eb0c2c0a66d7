"""Weights in and out: safetensors and plain state dicts, this project's tensor names and the released ones.

Nothing here unpickles freely: `.pth` files are read with weights_only=True.
"""

import json
import math
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

from libs.files import file_digest, flush_to_disk, hub_download, json_digest, replacing
from libs.sharding import cut_like

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


RELEASED = "hf://QHL067/DiMR/DiMR-XL_2R_800epochs.pth"


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
    """Copy a state dict of whole tensors (own or released names) into a model, which may be sharded.

    Raises:
        ValueError: see `fitting_weights`.
    """
    state, own = fitting_weights(model, state, source), model.state_dict()
    model.load_state_dict({name: cut_like(tensor, own[name]) for name, tensor in state.items()})


def fitting_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict in own or released names, in the model's names. The model may be without memory (meta).

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
    return {name: state[name] for name in own}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth` or `.pt` file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or a pickle with anything but tensors in it (it is refused, not run).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}. Released weights: {RELEASED} or .../DiMR-G_2R_800epochs.pth; a training run's "
            "are in <workdir>/ckpts/<step>.ckpt"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} could not be read as a plain state dict: it holds something else than tensors, which is refused "
            "because it could run code (or it is damaged)"
        ) from error
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # of an empty file EOFError, without a word
        raise ValueError(f"{path} could not be read as a plain state dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a plain state dict of tensors, found something else inside")
    return state


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], setting: str = "--out") -> None:
    """One .safetensors file, whole or not there. Raises OSError, naming `setting`, where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path, f"set {setting}") as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.name, metadata)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(f"Cannot write {path}: {error}. Free space there, or set {setting}") from error


# --- Training checkpoints: a folder <step>.ckpt of safetensors files and one state.json -------------------------------

STATE_FILE = "state.json"
WEIGHTS_FILE = "nnet.safetensors"
EMA_FILE = "nnet_ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write a checkpoint folder so that it is either whole under its name or not there at all.

    Args:
        folder: where it will be; written under a temporary name, flushed to disk and renamed.
        tensors: {file name: named tensors}.
        state: everything else, as JSON; the files' SHA-256, and its own, are added under "sha256".
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, named in tensors.items():
            save_file({k: v.detach().contiguous() for k, v in named.items()}, temporary / name)
        digests = {name: file_digest(temporary / name) for name in tensors}
        digests[STATE_FILE] = json_digest(state)
        (temporary / STATE_FILE).write_text(json.dumps({**state, "sha256": digests}, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
        temporary.rename(folder)
        flush_to_disk(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors says that the disk is full
            raise OSError(f"{folder} could not be written: {error}") from error
        raise


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """(state, {file name: tensors}) of a checkpoint folder, its files checked against their digests.

    Raises:
        ValueError: a damaged checkpoint; the message says what is wrong with which file.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        digests = state.pop("sha256")
        if digests.pop(STATE_FILE) != json_digest(state):
            raise ValueError(f"{folder / STATE_FILE} is not what was written (checksum differs)")
        for name, digest in digests.items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"{folder / name} is not what was written (checksum differs)")
        return state, {name: load_file(folder / name) for name in digests}
    except (
        OSError,
        KeyError,
        AttributeError,
        TypeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {error}") from error


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, newest step first."""
    folders = [p for p in root.glob("*.ckpt") if p.is_dir() and p.stem.isdigit()]
    return sorted(folders, key=lambda p: int(p.stem), reverse=True)


def find_weights(path: str | Path) -> Path:
    """The weights file that `path` stands for, of a folder its EMA weights.

    Args:
        path: a file; a checkpoint folder of this project or of U-ViT style; a pipeline folder (libs/pipeline.py); or
            hf://OWNER/REPOSITORY/FILE, a file of the Hugging Face hub, fetched once and then kept in its cache.

    Raises:
        FileNotFoundError: a folder without weights, or a hub file that is neither in the cache nor to be fetched.
        ValueError: a hub address of another form.
    """
    if str(path).startswith(HUB):
        return fetch_from_hub(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (EMA_FILE, "nnet_ema.pth", PIPELINE_FILE):
        if (path / name).is_file():
            return path / name
    for name in (WEIGHTS_FILE, "nnet.pth"):
        if (path / name).is_file():
            logging.warning("%s has no EMA weights; taking %s, whose samples are worse", path, name)
            return path / name
    raise FileNotFoundError(
        f"{path} is a folder without {EMA_FILE} or nnet_ema.pth (or {PIPELINE_FILE}): give a .ckpt folder or a file"
    )


HUB = "hf://"
PIPELINE_FILE = "network/diffusion_pytorch_model.safetensors"


def fetch_from_hub(address: str) -> Path:
    """The local path of hf://OWNER/REPOSITORY/FILE: from the hub's cache, else fetched into it (an interrupted fetch
    goes on where it was). HF_HUB_OFFLINE=1 and HF_HOME are honoured.

    Raises:
        ValueError: an address of another form.
        FileNotFoundError: not in the cache and not to be fetched; says what to fetch and where to put it.
    """
    owner, repository, file = (*address.removeprefix(HUB).split("/", 2), "", "")[:3]
    if not (owner and repository and file):
        raise ValueError(f"expected hf://OWNER/REPOSITORY/FILE, such as {RELEASED}; found {address}")
    return hub_download(f"{owner}/{repository}", file)


CONFIG_KEY = "config"  # in a state.json, and in the metadata of a safetensors file
PROFILE_KEY = "ema_profile"  # in that metadata


def settings_metadata(settings: dict) -> dict[str, str]:
    """What `saved_settings` gives, or some of it, as the metadata of a safetensors file."""
    return {name: json.dumps(value) for name, value in settings.items()}


def saved_settings(weights: Path) -> dict | None:
    """What is saved with a weights file, None if nothing is.

    {"config": the config as JSON values, "step": the training step or None, "class_names": what the classes are called
    in the training data, in the order of their labels, or None}. From the file's own metadata (of `settings_metadata`),
    else from the state.json beside it. Weights from before names were saved have None.

    Raises:
        ValueError: they are damaged.
    """
    try:
        if weights.suffix == ".safetensors":
            with safe_open(weights, "pt") as file:
                metadata = file.metadata() or {}
            if CONFIG_KEY in metadata:
                found = {name: metadata[name] for name in (CONFIG_KEY, "step", "class_names") if name in metadata}
                return _settings({name: json.loads(value) for name, value in found.items()})
        beside = weights.with_name(STATE_FILE)
        return _settings(json.loads(beside.read_text())) if beside.is_file() else None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"the settings saved with {weights} are damaged: {error}") from error


def _settings(found):
    config, names = found[CONFIG_KEY], found.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise TypeError("class_names is no list of names")
    return {"config": config, "step": found.get("step"), "class_names": names}


def ema_profile(weights: Path) -> str:
    """Which average of a run's weights a file holds, such as "rate 0.9999" or "width 0.05"; "" if that is not known.

    From its name and the config in the state.json beside it, or, of what scripts/posthoc_ema.py made, its metadata.
    """
    if named := re.fullmatch(r"nnet_ema_(rate|width)_(.+)\.safetensors", weights.name):
        return f"{named[1]} {named[2]}"
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            if profile := (file.metadata() or {}).get(PROFILE_KEY):
                return profile
    saved = saved_settings(weights) if weights.name == EMA_FILE else None
    return f"rate {saved['config']['ema']['rate']:g}" if saved else ""


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `<quantity>/<parameter name>`."""
    return {
        f"{quantity}/{name}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out, whole, on the parameters' devices and cut as they are.

    Of parameters that are frozen by now it is left out; those that were frozen begin as in a new run.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {}
    for key, value in tensors.items():
        quantity, name = key.split("/", 1)
        if name not in parameters:
            continue
        if value.shape == parameters[name].shape:  # else a number of its own: the count of updates
            value = cut_like(value, parameters[name])
        state.setdefault(name, {})[quantity] = value
    positions = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    # Through load_state_dict, which knows which of an optimiser's tensors belong on which device.
    packed = optimizer.state_dict()
    packed["state"] = {positions[id(parameters[name])]: values for name, values in state.items()}
    optimizer.load_state_dict(packed)


def prune_checkpoints(root: Path, step: int, keep_last: int, keep_interval: int) -> None:
    """After one of `step`, remove all but the newest `keep_last` checkpoints and those at multiples of `keep_interval`
    steps (0: none).

    Those of later steps are damaged ones that were passed over: they neither count nor are touched, until the run comes
    to their step. Also removed is what a process that was killed while it wrote one has left. What cannot be removed is
    logged, and tried again the next time. Not to be called while one is being written.
    """
    whole = [folder for folder in checkpoint_folders(root) if int(folder.stem) <= step]
    old = [f for f in whole[keep_last:] if not (keep_interval and int(f.stem) % keep_interval == 0)]
    for folder in [*old, *root.glob(".*.ckpt.tmp")]:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logging.warning("%s could not be removed, training goes on: %s", folder, error)


# --- Starting from other weights --------------------------------------------------------------------------------------


def adapt_weights(
    model: nn.Module, state: dict[str, Tensor], grids: Sequence[tuple[int, int]] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Make weights of another resolution or class count fit: (state dict, what was done, a line each).

    Position tables are interpolated (bicubic) to the model's grids; class embeddings of another count are left as the
    model has initialised them. Everything else must fit as it is.

    Args:
        grids: (height, width) of the branches' position tables in `state`; without them those of as many cells as the
            model's are taken as they are, and others as `grid_of` guesses.
    """
    state, own, notes = dict(to_own_names(state, model)), model.state_dict(), []
    for r, stage in enumerate(model.stages):
        name = f"stages.{r}.pos_embed.weight"
        table, grid = state.get(name), (stage.spec.max_height, stage.spec.max_width)
        if table is None or table.shape[1] != own[name].shape[1]:
            old = grid  # nothing to interpolate
        elif r < len(grids):
            old = grids[r]
        else:
            old = grid if len(table) == len(own[name]) else grid_of(len(table), grid)
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


def grid_of(rows: int, like: tuple[int, int]) -> tuple[int, int]:
    """The height and width of a position table of `rows` cells: of the shape of `like`, else square.

    Raises:
        ValueError: neither fits.
    """
    height = round((rows * like[0] / like[1]) ** 0.5)
    for candidate in (height, math.isqrt(rows)):
        if candidate and rows % candidate == 0 and candidate * (rows // candidate) == rows:
            width = rows // candidate
            if width * like[0] == candidate * like[1] or width == candidate:
                return candidate, width
    raise ValueError(f"a position table of {rows} cells is neither square nor of the shape {like[0]}:{like[1]}")


def freeze(model: nn.Module, pattern: str) -> list[str]:
    """Stop training the parameters whose name matches a regular expression; returns their names.

    Raises:
        ValueError: no name matches, or the pattern is not a regular expression.
    """
    try:
        names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"config.init.freeze: {pattern!r} is not a regular expression: {error}") from error
    if not names:
        example = next(name for name, _ in model.named_parameters())
        raise ValueError(f"config.init.freeze: {pattern!r} matches no parameter (names look like {example})")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
