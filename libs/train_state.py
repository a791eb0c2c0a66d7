"""The state of a training run: network, EMA weights, optimizer, loss scaler and step, saved to and resumed from files.

A checkpoint is a folder <step>.ckpt of safetensors files and one state.json, whole or not there. It holds no random
state: data order and noise follow from the seed and the step. Nothing in it depends on the number of processes, or on
whether they train by DDP or FSDP.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from absl import logging
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from libs import UserError
from libs.checkpoint import (
    EMA_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    checkpoint_folders,
    load_weights,
)
from libs.files import file_digest, flush_to_disk, json_digest
from libs.logger import code_version
from libs.optim import EMA, PowerEMA, clip_or_skip
from libs.sample_set import flatten_dict
from libs.sharding import split_like

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole on the main process, {} on the others

# Settings that a resumed run shares with its checkpoint; others may change.
MUST_MATCH = re.compile(
    r"mixed_precision|(data|autoencoder)\b.*"
    r"|config\.(seed|schedule|z_shape|nnet|ema|dataset\.(kind|n_classes))\b.*"
)
# Settings that may differ between the processes of a run: where files lie, and who writes
MAY_DIFFER = re.compile(
    r"config\.(dataset\.(path|num_workers)|autoencoder\.pretrained_path|init\.path|fid_stat|sample\.autoguidance_\w+)"
)


def make_emas(
    nnet: nn.Module, rate: float, extra_rates: tuple[float, ...], sigma_rels: tuple[float, ...]
) -> dict[str, EMA]:
    """Start the EMA weights of a run, by file name: the published rate first, then extra rates and power functions."""
    emas = {EMA_FILE: EMA(nnet, rate)}
    emas |= {f"nnet_ema_rate_{extra:g}.safetensors": EMA(nnet, extra) for extra in extra_rates}
    return emas | {f"nnet_ema_width_{sigma:g}.safetensors": PowerEMA(nnet, sigma) for sigma in sigma_rels}


class TrainState:
    """Network, EMA weights, optimizer, loss scaler and step: all that an update changes.

    Attributes:
        nnet: the network that is trained, not wrapped by DDP.
        emas: EMA weights by file name, see `make_emas`.
        step: number of updates done.
        saved_step: step of the newest checkpoint, on the main process.
        skipped: float tensor (2,), updates skipped for gradients that are not finite: in a row, in all since the start.
    """

    def __init__(
        self,
        nnet: nn.Module,
        emas: dict[str, EMA],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.nnet, self.emas, self.optimizer, self.scaler = nnet, emas, optimizer, scaler
        self.step = self.saved_step = 0
        self.skipped = torch.zeros(2, device=next(nnet.parameters()).device)

    def update(self, max_norm: float) -> Tensor:
        """Clip the gradients or skip them, update weights and EMA weights, and return the norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_or_skip(self.optimizer, max_norm, self.skipped)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        for ema in self.emas.values():
            ema.update(self.step)
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather the tensors of a checkpoint by file, whole on the main process. A collective call under FSDP.

        Those of the optimizer are named <quantity>/<parameter name>.
        """
        models = {WEIGHTS_FILE: self.nnet, **{file: ema.model for file, ema in self.emas.items()}}
        result = {file: get_model_state_dict(model, options=GATHERED) for file, model in models.items()}
        moments = get_optimizer_state_dict(self.nnet, self.optimizer, options=GATHERED).get("state", {})
        result[OPTIMIZER_FILE] = {f"{key}/{name}": t for name, state in moments.items() for key, t in state.items()}
        return result

    def save(self, root: Path, run: dict, main: bool, keep_last: int, keep_interval: int) -> None:
        """Write <root>/<step>.ckpt on the main process, and prune older ones. All processes have to call it.

        A checkpoint that cannot be written (a full disk) is lost; the run and the older checkpoints are not.

        Args:
            run: what `resume` compares, JSON values.
            keep_last, keep_interval: see `prune_checkpoints`.
        """
        tensors, folder = self.tensors(), root / f"{self.step}.ckpt"
        if not main:
            return
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        try:
            save_checkpoint(folder, tensors, {"step": self.step, "scaler": scaler, "code": code_version(), **run})
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
            logging.error("checkpoint %s is lost, training goes on: %s", folder, error)
            return
        self.saved_step = self.step
        prune_checkpoints(root, self.step, keep_last, keep_interval)

    def resume(self, root: Path, run: dict) -> None:
        """Load the newest whole checkpoint under `root`, if there is any; damaged ones are named and passed over.

        Args:
            run: see `check_same_run`.

        Raises:
            UserError: it is of a run with other settings, none is whole, or processes found different ones.
        """
        folders = checkpoint_folders(root)
        for folder in folders:
            try:
                saved, tensors = read_checkpoint(folder)
            except UserError as error:
                logging.warning("passed over: %s", error)
                continue
            check_same_run(run, saved, folder)
            load_weights(self.nnet, tensors[WEIGHTS_FILE], str(folder))
            for file, ema in self.emas.items():
                load_weights(ema.model, tensors[file], str(folder / file))
            self.load_optimizer(tensors[OPTIMIZER_FILE])
            if self.scaler is not None and saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            self.step = self.saved_step = saved["step"]
            logging.info("resuming from %s", folder)
            break
        steps = gather_object([self.step])
        if folders and not self.step:
            raise UserError(f"none of the {len(folders)} checkpoints in {root} is whole: remove them to start anew")
        if len(set(steps)) > 1:
            raise UserError(f"processes found different checkpoints in {root}, steps {steps}: share one --workdir")

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Load the optimizer's tensors, whole, onto the parameters' devices and split as they are.

        Those of parameters that are frozen by now are left out; parameters without any begin as in a new run.
        """
        parameters = {name: p for name, p in self.nnet.named_parameters() if p.requires_grad}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        order, state = {id(p): i for i, p in enumerate(trained)}, {}
        for key, value in tensors.items():
            quantity, name = key.split("/", 1)
            if name in parameters:
                parameter = parameters[name]
                whole = value.shape == parameter.shape  # else a number: the count of updates
                value = split_like(value, parameter) if whole else value
                state.setdefault(order[id(parameter)], {})[quantity] = value
        # Through load_state_dict, which knows which of an optimizer's tensors belong on which device.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def check_same_run(run: dict, saved: dict, folder: Path) -> None:
    """Compare a run with its checkpoint, as nested JSON values; differences that may be are logged as a warning.

    Raises:
        UserError: they differ in what `MUST_MATCH`; all such settings are named, with both values.
    """
    now, then = flatten_dict(run), flatten_dict({name: saved.get(name) for name in run})
    changed = [name for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
    lines = {name: f"{name}: {then.get(name)} there, {now.get(name)} now" for name in changed}
    if refused := [line for name, line in lines.items() if MUST_MATCH.fullmatch(name)]:
        raise UserError(f"{folder} is of another run ({'; '.join(refused)}): set another --workdir, or these as there")
    if lines:
        logging.warning("settings changed since %s: %s", folder, "; ".join(lines.values()))
    if saved["code"] != code_version():
        logging.warning("%s was written by code %s, this is %s", folder, saved["code"], code_version())


def check_same_everywhere(run: dict) -> None:
    """Compare the run of all processes, as nested JSON values. A collective call.

    Raises:
        UserError: on all processes, if two differ in more than `MAY_DIFFER`.
    """
    mine = {name: value for name, value in flatten_dict(run).items() if not MAY_DIFFER.fullmatch(name)}
    first, *others = gather_object([mine])
    for process, other in enumerate(others, 1):
        names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if names:
            found = "; ".join(f"{name}: {first.get(name)} on 0, {other.get(name)} on {process}" for name in names)
            raise UserError(f"processes 0 and {process} were started differently ({found}): give all the same command")


# --- Checkpoint folders -----------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write a checkpoint folder so that it is either whole under its name or not there at all.

    Args:
        folder: written under a temporary name, flushed to disk and renamed to this.
        tensors: {file name: named tensors}.
        state: everything else, as JSON; the files' SHA-256, and its own, are added under "sha256".

    Raises:
        OSError, SafetensorError: it cannot be written, for example on a full disk.
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Read (state, {file name: tensors}) of a checkpoint folder, its files checked against their SHA-256.

    Raises:
        UserError: a damaged checkpoint; the message names the file.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        expected = state.pop("sha256")
        found = {name: json_digest(state) if name == STATE_FILE else file_digest(folder / name) for name in expected}
        if altered := [name for name in expected if found[name] != expected[name]]:
            raise ValueError(f"{altered[0]} is not what was written (checksum differs)")
        return state, {name: load_file(folder / name) for name in expected if name != STATE_FILE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
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
