"""The state of a training run: network, EMA weights, optimizer, loss scaler and step, saved to and resumed from files.

A checkpoint is a folder <step>.ckpt of safetensors files and one state.json, whole or not there. It holds no random
state: data order and noise follow from the seed and the step. Nothing in it depends on the number of processes, or on
whether they train by DDP or FSDP.
"""

import re
from pathlib import Path

import torch
from absl import logging
from accelerate.utils import gather_object
from safetensors import SafetensorError
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
    WEIGHTS_FILE,
    checkpoint_folders,
    differences,
    flatten_dict,
    load_weights,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from libs.normalization import check_same_autoencoder
from libs.optim import EMA, PowerEMA, clip_or_skip
from libs.sharding import split_like

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole on the main process, {} on the others

# Settings that a resumed run shares with its checkpoint; others may change.
MUST_MATCH_ON_RESUME = re.compile(
    r"mixed_precision|data\b.*"
    r"|config\.(seed|schedule|prediction|z_shape|nnet|ema|dataset\.n_classes)\b.*"
)
# Settings that may differ between the processes of a run: where files lie, and who writes
MAY_DIFFER_BETWEEN_RANKS = re.compile(
    r"code|autoencoder\..*|config\.(dataset\.(path|num_workers)|autoencoder\.(pretrained_path|latent_stats)"
    r"|init\.path|fid_stat|sample\.autoguidance_\w+)"
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
        skipped = (self.skipped[0] > 0).float()
        for ema in self.emas.values():
            ema.update(self.step, skipped)
        return norm

    def skipping(self) -> bool:
        """Tell whether the last update was skipped. Waits for the device."""
        return self.skipped[0].item() > 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather the tensors of a checkpoint by file, whole on the main process. A collective call under FSDP.

        Those of the optimizer are named <quantity>/<parameter name>.
        """
        models = {WEIGHTS_FILE: self.nnet, **{file: ema.model for file, ema in self.emas.items()}}
        result = {file: get_model_state_dict(model, options=GATHERED) for file, model in models.items()}
        moments = get_optimizer_state_dict(self.nnet, self.optimizer, options=GATHERED).get("state", {})
        result[OPTIMIZER_FILE] = {f"{key}/{name}": t for name, state in moments.items() for key, t in state.items()}
        return result

    def save(
        self, root: Path, run: dict, is_main: bool, keep_last: int, keep_interval: int, healthy: bool = True
    ) -> None:
        """Write <root>/<step>.ckpt on the main process, and prune older ones. All processes have to call it.

        Nothing is pruned while updates are skipped or the run is not `healthy`: the good checkpoints are older ones.

        A checkpoint that cannot be written (a full disk) is lost; the run and the older checkpoints are not.

        Args:
            run: what `resume` compares, JSON values.
            keep_last, keep_interval: see `prune_checkpoints`.
        """
        tensors, folder = self.tensors(), root / f"{self.step}.ckpt"
        if not is_main:
            return
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        try:
            save_checkpoint(folder, tensors, {"step": self.step, "scaler": scaler, **run})
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
            logging.error("checkpoint %s is lost, training goes on: %s", folder, error)
            return
        self.saved_step = self.step
        if healthy and not self.skipping():
            prune_checkpoints(root, self.step, keep_last, keep_interval)

    def resume(self, root: Path, run: dict) -> None:
        """Load the newest whole checkpoint under `root`, if there is any; damaged ones are named and passed over.

        Args:
            run: see `check_same_run`.

        Raises:
            UserError: it is of a run with other settings or of another program, the system does not let it be read,
                none is whole, or processes found different ones.
        """
        folders = checkpoint_folders(root)
        if others := [folder for folder in folders if (folder / "nnet.pth").exists()]:
            raise UserError(f"{others[0]} is of another program: set another --workdir, and config.init.path to it")
        for folder in folders:
            try:
                saved, tensors = read_checkpoint(folder)
            except UserError as error:
                logging.warning("passed over: %s", error)
                continue
            except OSError as error:  # to train on from an older one would replace it
                raise UserError(f"{folder} cannot be read now, and nothing was changed: {error}") from error
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
            raise UserError(f"none of the {len(folders)} checkpoints in {root} is whole: set another --workdir")
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
        UserError: they differ in what `MUST_MATCH_ON_RESUME`; all such settings are named, with both values.
    """
    check_same_autoencoder(run.get("autoencoder"), saved.get("autoencoder"), folder)
    compared = [name for name in run if name != "autoencoder"]
    lines = differences(*(flatten_dict({name: each.get(name) for name in compared}) for each in (saved, run)))
    if refused := [line for name, line in lines.items() if MUST_MATCH_ON_RESUME.fullmatch(name)]:
        raise UserError(f"{folder} is of another run ({'; '.join(refused)}): set another --workdir, or these as there")
    if lines:
        logging.warning("settings changed since %s: %s", folder, "; ".join(lines.values()))


def check_same_everywhere(run: dict) -> None:
    """Compare the run of all processes, as nested JSON values. A collective call.

    Raises:
        UserError: on all processes, if two differ in more than `MAY_DIFFER_BETWEEN_RANKS`.
    """
    mine = {name: value for name, value in flatten_dict(run).items() if not MAY_DIFFER_BETWEEN_RANKS.fullmatch(name)}
    (first, autoencoder), *others = gather_object([(mine, run.get("autoencoder"))])
    for process, (other, another) in enumerate(others, 1):
        check_same_autoencoder(another, autoencoder, "process 0")
        names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if names:
            found = "; ".join(f"{name}: {first.get(name)} on 0, {other.get(name)} on {process}" for name in names)
            raise UserError(f"processes 0 and {process} were started differently ({found}): give all the same command")
