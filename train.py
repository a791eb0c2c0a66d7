"""Train a DiMR.

    accelerate launch [--multi_gpu --num_processes N --num_machines M] [--mixed_precision fp16|bf16] train.py \
        --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=VALUE ...]

One process or many, GPU or CPU. Re-run the command to resume from the newest whole checkpoint, exactly. Writes into the
work folder (workdir/NAME unless given): ckpts/<step>.ckpt, samples/<step>.png (a grid from the EMA weights) and
samples/strip.png (how it came about), metrics.jsonl, and TensorBoard logs under tensorboard/. Ctrl+C, SIGTERM, SIGUSR1
and SIGHUP save at the next step and end with status 75 and the file requeue in the work folder: re-run the command.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

import ml_collections
import torch
from absl import flags, logging
from accelerate import Accelerator
from torch import Tensor, nn

import eval as evaluation
import sde
import utils
from configs.common import check_fields
from libs import UserError, checkpoint, cost, launch, sharding
from libs.autoencoder import Autoencoder, uint8_to_float
from libs.compilation import choose_compile, compile_network
from libs.data import StepBatches, make_loader
from libs.files import advise_on_write_error
from libs.images import ImageDataset, save_grid, save_strip
from libs.latents import LatentStore
from libs.launch import REQUEUE_STATUS, StopRequest, raise_on_all_ranks
from libs.logger import Logger, code_version, lock_workdir
from libs.metrics import PlannedImages, Reference
from libs.model import (
    Model,
    Sampler,
    build_empty_network,
    build_network,
    build_network_on_meta,
    build_stages,
    config_from_json,
    config_json,
    image_size,
    loss_weights,
    network_differences,
    open_autoencoder,
    open_guide,
)
from libs.optim import make_adamw, set_lr, split_decay, warmup_lr
from libs.randomness import StepDraws, step_draws
from libs.train_state import TrainState, check_same_everywhere, make_emas

REQUEUE_FILE = "requeue"
MAX_SKIPPED = 50  # updates in a row without finite gradients, after which a run ends


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> int:
    """Train until config.train.n_steps updates are done, or a signal asks to stop.

    Returns:
        The exit status: 0, `REQUEUE_STATUS` after a signal, or 1 if the last checkpoint could not be written.

    Raises:
        UserError, FileNotFoundError: settings or files that do not fit, before anything is written.
        UserError: too many updates in a row were not finite.
    """
    log_with = ["tensorboard"] + (["wandb"] if config.wandb.mode != "disabled" else [])
    with StopRequest() as stop:  # from here on: what comes before the first step can take minutes
        accelerator = launch.make_accelerator(log_with=log_with, project_dir=str(workdir))
        status = run(config, Path(workdir), accelerator, stop)
        launch.finish(accelerator)  # by now nothing holds the network that DDP has wrapped
        return status


def run(config: ml_collections.ConfigDict, workdir: Path, accelerator: Accelerator, stop: StopRequest) -> int:
    """Train on all processes and return the exit status, see `train`."""
    # What a run is made of; all that a user can get wrong comes before anything is written.
    settings, device, is_main = config.train, accelerator.device, accelerator.is_main_process
    check_settings(config, accelerator)
    schedule, weights = sde.get_schedule(config.schedule), loss_weights(config)
    time_law = config.time_sampling, config.time_mean, config.time_std, config.time_shift
    objective = config.prediction, config.loss_weighting
    guide = open_guide(config, device)
    autoencoder = open_autoencoder(config, device)
    dataset = utils.open_dataset(config, autoencoder)
    scoring = open_fid(config, autoencoder)
    identity = run_identity(config, accelerator, dataset, autoencoder)
    check_same_everywhere(identity)
    state = make_state(config, workdir, accelerator)
    null_label, ema = state.nnet.null_label, state.emas[checkpoint.EMA_FILE].model
    state.resume(workdir / "ckpts", identity)
    topology = accelerator.num_processes, accelerator.process_index, settings.accumulation
    batches = StepBatches(len(dataset), settings.batch_size, config.seed, state.step, *topology)
    data = make_loader(dataset, batches, config.dataset.num_workers, pin_memory=device.type == "cuda")
    compile_ema(config, state.step, ema, device)
    model = Model(config, ema, device, accelerator.mixed_precision, guide, autoencoder)
    sample = model.sampler(steps=config.sample.grid_steps)
    lock = prepare_workdir(config, workdir, accelerator)
    describe_run(config, workdir, state, accelerator, batches)
    costs = cost.branch_costs(build_network_on_meta(config), tuple(config.z_shape))
    flops_per_image = 3 * sum(2 * branch.multiply_adds for branch in costs)  # backward costs two forward passes
    log = Logger(workdir, accelerator, state.step, settings.n_steps, len(weights), settings.batch_size, flops_per_image)
    # FSDP synchronizes by itself, in every micro-batch, and needs no more than mixed precision around the network: what
    # accelerate calls evaluation mode.
    nnet = accelerator.prepare_model(state.nnet, device_placement=False, evaluation_mode=settings.sharded)
    nnet.train()
    with raise_on_all_ranks(accelerator):
        step_data = list(itertools.islice(data, settings.accumulation))

    stopping = save_due = False
    allowed = min(MAX_SKIPPED, settings.n_steps - state.step)  # or nothing would have been trained
    log.timer.reset()
    while state.step < settings.n_steps and not stopping:
        lr = warmup_lr(config.optimizer.lr, state.step, config.lr_scheduler.warmup_steps)
        set_lr(state.optimizer, lr)
        draws = step_draws(config.seed, state.step, settings.batch_size, tuple(config.z_shape), device)
        state.optimizer.zero_grad()
        for rows, (records, labels) in zip(batches.rows, step_data, strict=True):  # a micro-batch each
            own = draws.rows(rows)
            x0, y = prepare_batch(records, labels, own, config.dataset, autoencoder, null_label)
            last = rows is batches.rows[-1]
            with contextlib.nullcontext() if last else accelerator.no_sync(nnet):
                t = sde.training_times(schedule, own.uniform_time, *time_law)
                losses = sde.training_losses(nnet, schedule, x0, own.eps, t, y, *objective)  # (R, b)
                loss = sde.weighted_sum(losses, weights)  # (b,)
                accelerator.backward(loss.mean() / settings.accumulation)
            log.losses.add(loss.detach(), losses.detach(), t)
        log.timer.mark("forward_backward")
        with stop.noting_errors():  # of the next step, so that this one is saved
            step_data = list(itertools.islice(data, settings.accumulation))
        log.timer.mark("data")
        grad_norm = state.update(settings.grad_clip)
        stopping = stop.agreed()
        log.timer.mark("rest")
        log.progress.update()
        ending = stopping or state.step == settings.n_steps

        if due(state.step, settings.log_interval) or ending:
            in_row, in_all = state.skipped.tolist()
            log.write(state.step, {"lr": lr, "grad_norm": grad_norm.item(), "skipped_updates": in_all})
            if in_row >= allowed and not stopping:
                raise UserError(
                    f"{int(in_row)} updates in a row up to step {state.step} were not finite (last checkpoint before: "
                    f"step {state.saved_step}): lower config.optimizer.lr, set config.train.grad_clip, or use bf16 in "
                    "place of fp16; if the loss had grown before (metrics.jsonl), move the newest checkpoints away"
                )
        if due(state.step, settings.eval_interval):
            draw_grid(workdir / "samples" / f"{state.step}.png", sample, ema, config, is_main)
            log.timer.reset()
        save_due = save_due or due(state.step, settings.save_interval)
        if ending or (save_due and not state.skipping()):
            kept = settings.keep_last, settings.keep_interval
            state.save(workdir / "ckpts", identity, is_main, *kept, healthy=not log.exploded)
            save_due = False
            log.timer.reset()
        if scoring and due(state.step, settings.fid_interval):
            fid = fid_of_samples(model, workdir / "fid" / str(state.step), accelerator, scoring)
            if fid is not None:
                log.log(state.step, {"fid": fid})
            log.timer.reset()

    log.progress.close()
    if state.step < settings.n_steps:
        stop.raise_noted(accelerator)
    return end_run(workdir, state, state.step < settings.n_steps, is_main, lock)


def due(step: int, interval: int) -> bool:
    """Tell whether `step` is a multiple of `interval`; never for interval 0."""
    return bool(interval) and step % interval == 0


# --- Set-up -----------------------------------------------------------------------------------------------------------


def check_settings(config: ml_collections.ConfigDict, accelerator: Accelerator) -> None:
    """Check the settings of a run, and leave logging to the main process."""
    if not accelerator.is_main_process:
        logging.set_verbosity(logging.ERROR)
    utils.check_training(config)
    utils.check_sampling(config)
    build_stages(config)
    guided = config.sample.scale > 1 and config.dataset.n_classes and not config.sample.autoguidance_path
    if guided and not config.dataset.p_uncond:
        logging.warning("config.dataset.p_uncond=0 leaves the null class, of guidance, untrained; scale is set above 1")


def run_identity(
    config: ml_collections.ConfigDict,
    accelerator: Accelerator,
    dataset: LatentStore | ImageDataset,
    autoencoder: Autoencoder | None,
) -> dict:
    """Collect what decides what a run computes, as nested JSON values, to be compared when it is resumed."""
    return {
        "config": config_json(config),
        "code": code_version(),
        "mixed_precision": accelerator.mixed_precision,
        "data": {"n_records": len(dataset), "sha256": dataset.digest},
        "autoencoder": autoencoder.identity if autoencoder is not None else None,
        "class_names": dataset.class_names if config.dataset.n_classes else [],
    }


def open_fid(config: ml_collections.ConfigDict, autoencoder: Autoencoder | None) -> tuple[Reference, Path] | None:
    """Open what FID while training needs, see `utils.open_scoring`; None without config.train.fid_interval."""
    if not config.train.fid_interval:
        return None
    planned = PlannedImages(config.train.fid_samples, image_size(config, autoencoder), "config.train.fid_samples")
    return utils.open_scoring(config.fid_stat, False, planned)


def make_state(config: ml_collections.ConfigDict, workdir: Path, accelerator: Accelerator) -> TrainState:
    """Build network, EMA weights and optimizer: as of step 0, or empty where there are checkpoints to resume from."""
    settings, device = config.train, accelerator.device
    resuming = bool(checkpoint.checkpoint_folders(workdir / "ckpts"))
    torch.manual_seed(config.seed)
    nnet = build_empty_network(config, device) if resuming else build_network(config).to(device)
    start_from(nnet, config, resuming)
    emas = make_emas(nnet, config.ema.rate, config.ema.extra_rates, config.ema.power_widths)
    if settings.sharded:
        sharding.shard(nnet, [ema.model for ema in emas.values()], device)
    compile_network(nnet, choose_compile(settings.compile, device), recompute=settings.recompute)
    optimizer = make_adamw(nnet, config.optimizer.lr, tuple(config.optimizer.betas), config.optimizer.weight_decay)
    return TrainState(nnet, emas, optimizer, accelerator.scaler)


def start_from(nnet: nn.Module, config: ml_collections.ConfigDict, resuming: bool = False) -> None:
    """Load config.init.path, fitted to this network, unless `resuming`; freeze what config.init.freeze names."""
    if config.init.path and not resuming:
        file = checkpoint.find_weights(config.init.path)
        different = network_differences(config, file)
        if lines := [line for name, line in different.items() if name not in ("z_shape", "dataset.n_classes")]:
            logging.warning("%s was trained in another network: %s", file, "; ".join(lines))
        saved = checkpoint.saved_settings(file)
        stages = build_stages(config_from_json(saved["config"])) if saved else []
        grids = [(stage.max_height, stage.max_width) for stage in stages]
        state, notes = checkpoint.adapt_weights(nnet, checkpoint.read_state_dict(file), grids)
        checkpoint.load_weights(nnet, state, str(file))
        logging.info("starting from %s%s", file, "".join(f"\n  {note}" for note in notes))
    for pattern in config.init.freeze:
        logging.info("frozen by %r: %d tensors", pattern, len(checkpoint.freeze(nnet, pattern)))


def compile_ema(config: ml_collections.ConfigDict, step: int, ema: nn.Module, device: torch.device) -> None:
    """Compile the network with the EMA weights if the rest of the run samples from it more than once."""
    settings = config.train
    uses = sum((settings.n_steps - step) // k for k in (settings.eval_interval, settings.fid_interval) if k)
    often = uses > 1 and not settings.sharded
    compile_network(ema, choose_compile(settings.compile, device) if often else "off")


def prepare_workdir(config: ml_collections.ConfigDict, workdir: Path, accelerator: Accelerator) -> IO | None:
    """Make and lock the work folder, write config.json and start the trackers; the lock is the main process's."""
    lock, values = None, config_json(config)
    with raise_on_all_ranks(accelerator), advise_on_write_error(workdir, "set --workdir"):
        if accelerator.is_main_process:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = lock_workdir(workdir)
            (workdir / REQUEUE_FILE).unlink(missing_ok=True)
            (workdir / "config.json").write_text(json.dumps(values, indent=1))
    with raise_on_all_ranks(accelerator):
        try:
            accelerator.init_trackers(
                os.environ.get("WANDB_PROJECT", "dimr") if config.wandb.mode != "disabled" else "tensorboard",
                init_kwargs={"wandb": {"mode": config.wandb.mode, "dir": str(workdir), "config": values}},
            )
        except Exception as error:  # of many types
            raise UserError(f"a logger cannot start ({error}): set config.wandb.mode offline or disabled") from error
    return lock


def describe_run(
    config: ml_collections.ConfigDict, workdir: Path, state: TrainState, accelerator: Accelerator, batches: StepBatches
) -> None:
    """Log the derived numbers of a run."""
    decayed, spared = split_decay(state.nnet)
    n_decayed, n_spared = (sum(p.numel() for p in group) for group in (decayed, spared))
    batch, micro, n_processes = config.train.batch_size, config.train.accumulation, accelerator.num_processes
    logging.info("%s: %d parameters", workdir, sum(p.numel() for p in state.nnet.parameters()))
    logging.info("  decayed: %d in %d tensors; not: %d in %d", n_decayed, len(decayed), n_spared, len(spared))
    size = batch // n_processes // micro
    logging.info("  batch %d = %d processes x %d micro-batches x %d", batch, n_processes, micro, size)
    networks = [state.nnet, *(ema.model for ema in state.emas.values())]
    held = 3 * (decayed + spared)  # a gradient and two moments for each trained weight
    held += [parameter for network in networks for parameter in network.parameters()]
    megabytes, layout = sum(sharding.local(p).nbytes for p in held) / 1e6, "FSDP" if config.train.sharded else "whole"
    logging.info("  %.6g MB of weights, gradients, moments and EMA weights per process, %s", megabytes, layout)
    path, steps = config.dataset.path, batches.steps_per_epoch
    logging.info("  data %s: %d records, %d steps per epoch", path, batches.n_records, steps)
    logging.info("  %s precision on %s; code %s", accelerator.mixed_precision, accelerator.device, code_version())


# --- In the loop ------------------------------------------------------------------------------------------------------


def prepare_batch(
    records: Tensor,
    labels: Tensor,
    draws: StepDraws,
    dataset: ml_collections.ConfigDict,
    autoencoder: Autoencoder | None,
    null_label: int,
) -> tuple[Tensor, Tensor]:
    """Turn a micro-batch of the data into clean images or latents, and drop labels for classifier-free guidance.

    Args:
        records: moments of latents (B, 2 C, H, W), of which fresh latents are drawn, or pixels, uint8 (B, 3, H, W).
        labels: (B,). dataset: config.dataset.

    Returns:
        x0 (B, C, H, W) float32, pixels in [-1, 1], and labels (B,), some replaced by the null label, on the device.
    """
    device = draws.eps.device
    records, labels = records.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    x0 = uint8_to_float(records) if autoencoder is None else autoencoder.sample_latents(records, draws.latent_noise)
    p_uncond = dataset.p_uncond if dataset.n_classes else 1.0  # without classes: always the null label
    return x0, torch.where(draws.uniform_drop < p_uncond, null_label, labels)


def draw_grid(path: Path, sample: Sampler, ema: nn.Module, config: ml_collections.ConfigDict, is_main: bool) -> None:
    """Write a grid of samples, a class to a row, and the strip of all grids so far; on a full disk they are lost."""
    rows, columns = config.train.grid
    labels = [label for label in range(min(rows, max(config.dataset.n_classes, 1))) for _ in range(columns)]
    with sharding.whole(ema):
        images = sample(range(len(labels)), labels)[0] if is_main else None
    try:
        if is_main:
            save_grid(images, path, columns=columns)
            save_strip(path, columns)
    except OSError as error:
        logging.error("the grid of step %s is lost, training goes on: %s", path.stem, error)


def fid_of_samples(
    model: Model, folder: Path, accelerator: Accelerator, scoring: tuple[Reference, Path]
) -> float | None:
    """Compute the FID of config.train.fid_samples images by the code of eval.py, and remove the images.

    Returns:
        None but on the main process, and where it failed, which is logged.
    """
    config, is_main = ml_collections.ConfigDict(model.config), accelerator.is_main_process
    config.sample.n_samples, config.sample.sample_steps = config.train.fid_samples, config.sample.grid_steps
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    accelerator.wait_for_everyone()
    scores = None
    try:
        with sharding.whole(model.nnet):
            scores = evaluation.sample_and_score(replace(model, config=config), folder, accelerator, scoring)
    except (ValueError, OSError) as error:  # on all processes, or on the main one after all that they do together
        logging.error("no FID at this step, training goes on: %s", error)
    accelerator.wait_for_everyone()
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return scores.values["fid"] if scores else None


# --- The end ----------------------------------------------------------------------------------------------------------


def end_run(workdir: Path, state: TrainState, stopped: bool, is_main: bool, lock: IO | None) -> int:
    """Unlock the work folder, ask for a requeue if the run was stopped, and return the exit status."""
    status = REQUEUE_STATUS if stopped else 0
    if is_main:
        if stopped:
            with launch.after_work("no file asks for a requeue"):
                (workdir / REQUEUE_FILE).write_text(f"{state.step}\n")
        logging.info("%s at step %d; weights in %s", "stopped" if stopped else "trained", state.step, workdir / "ckpts")
        if state.saved_step != state.step:
            logging.error("the last checkpoint was lost: re-run the command to resume from step %d", state.saved_step)
            status = status or 1
        lock.close()
    return status


def main(argv: list[str]) -> None:
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    status = train(config, workdir or Path("workdir") / launch.config_name())
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a launcher would turn a SystemExit's status into its own


if __name__ == "__main__":
    launch.define_config_flag("What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Where to write; workdir/<name of the config file> unless given.")
    launch.run(main, check_fields)
