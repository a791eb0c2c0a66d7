"""Train a DiMR.

    accelerate launch [--multi_gpu --num_processes N --num_machines M] [--mixed_precision fp16|bf16] train.py \
        --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=VALUE ...]

One process or many, GPU or CPU. The same command again goes on from the newest whole checkpoint, exactly. Writes into
the work folder (workdir/NAME unless given): ckpts/<step>.ckpt, samples/<step>.png (a grid from the EMA weights) and
samples/strip.png (how it came about), metrics.jsonl, and TensorBoard logs under tensorboard/. SIGTERM and SIGUSR1 save
at the next step and end with status 75 and the file requeue in the work folder: run the command again.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import accelerate
import ml_collections
import torch
from absl import flags, logging
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

import eval as evaluation
import sde
import utils
from configs.common import check_fields
from libs import checkpoint, launch, logger, pictures, sharding
from libs.autoencoder import Autoencoder
from libs.compilation import choose_compile, compile_network
from libs.data import StepBatches, make_loader, own_rows
from libs.files import advise_on_write_error
from libs.images import ImageDataset, uint8_to_float
from libs.latents import LatentStore
from libs.launch import REQUEUE_STATUS, StopRequest, raise_on_all_ranks
from libs.metrics import PlannedImages, Reference
from libs.model import (
    Model,
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
from libs.optim import EMA, PowerEMA, clip_or_skip, make_adamw, set_lr, split_decay, warmup_lr
from libs.randomness import StepDraws, step_draws

REQUEUE_FILE = "requeue"


def to_network_input(records: Tensor, draws: StepDraws, autoencoder: Autoencoder | None) -> Tensor:
    """What the network denoises, (B, C, H, W) float32: a fresh latent from stored moments, or pixels in [-1, 1]."""
    if autoencoder is None:
        return uint8_to_float(records)
    return autoencoder.sample_latents(records, draws.latent_noise)


def resolution_losses(
    nnet: nn.Module,
    schedule: sde.Schedule,
    x0: Tensor,
    labels: Tensor,
    draws: StepDraws,
    p_uncond: float,
    null_label: int,
) -> Tensor:
    """Squared error of the noise predictions per resolution and image: x0 (B, C, H, W), labels (B,) -> (R, B)."""
    labels = torch.where(draws.uniform_drop < p_uncond, null_label, labels)
    return sde.training_losses(nnet, schedule, x0, draws.eps, schedule.times(draws.uniform_time), labels)


def make_averages(nnet: nn.Module, config: ml_collections.ConfigDict) -> dict[str, EMA]:
    """The averages of a run by file name: the published one first, then extra rates and power-function profiles."""
    averages = {checkpoint.EMA_FILE: EMA(nnet, config.ema.rate)}
    for rate in config.ema.extra_rates:
        averages[f"nnet_ema_rate_{rate:g}.safetensors"] = EMA(nnet, rate)
    for width in config.ema.power_widths:
        averages[f"nnet_ema_width_{width:g}.safetensors"] = PowerEMA(nnet, width)
    return averages


def start_from(nnet: nn.Module, config: ml_collections.ConfigDict, resuming: bool = False) -> None:
    """Load config.init.path, fitted to this model, unless `resuming`; freeze what config.init.freeze names."""
    if config.init.path and not resuming:
        file = checkpoint.find_weights(config.init.path)
        if different := network_differences(config, file, but=("z_shape", "dataset.n_classes")):
            logging.warning("%s was trained in another network: %s", file, "; ".join(different))
        saved = checkpoint.saved_settings(file)
        stages = build_stages(config_from_json(saved["config"])) if saved else []
        grids = [(stage.max_height, stage.max_width) for stage in stages]
        state, notes = checkpoint.adapt_weights(nnet, checkpoint.read_state_dict(file), grids)
        checkpoint.load_weights(nnet, state, str(file))
        logging.info("starting from %s", file)
        for note in notes:
            logging.info("  %s", note)
    for pattern in config.init.freeze:
        names = checkpoint.freeze(nnet, pattern)
        logging.info("frozen by %r: %d tensors", pattern, len(names))
    if not any(parameter.requires_grad for parameter in nnet.parameters()):
        raise ValueError(f"config.init.freeze={tuple(config.init.freeze)} leaves nothing to train: freeze less")


def run_settings(
    config: ml_collections.ConfigDict, accelerator: accelerate.Accelerator, dataset: LatentStore | ImageDataset
) -> dict:
    """Everything that decides what a run computes, as nested JSON values, to be compared when it is resumed."""
    return {
        "config": config_json(config),
        "accelerate": {"mixed_precision": accelerator.mixed_precision},
        "data": {"n_records": len(dataset), "sha256": dataset.digest},
    }


def resume(
    ckpt_root: Path,
    settings: dict,
    may_change: Sequence[str],
    nnet: nn.Module,
    averages: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> int:
    """Load the newest whole checkpoint, naming damaged ones; returns the step to go on from (0: none is there).

    Args:
        settings: see `run_settings`. may_change: names of those that may differ from the checkpoint's.

    Raises:
        ValueError: it was trained with other settings (the message lists them), or none is whole.
    """
    folders = checkpoint.checkpoint_folders(ckpt_root)
    for folder in folders:
        try:
            state, tensors = checkpoint.read_checkpoint(folder)
        except ValueError as error:
            logging.warning("passed over: %s", error)
            continue
        saved = {name: state.get(name, {}) for name in settings}
        saved["config"] = config_json(config_from_json(saved["config"]))  # with what was added since
        logger.check_same_run(settings, saved, may_change, folder)
        checkpoint.load_weights(nnet, tensors[checkpoint.WEIGHTS_FILE], str(folder))
        for name, average in averages.items():
            if name not in tensors:
                raise ValueError(f"{folder} has no {name}: config.ema cannot change within a run")
            checkpoint.load_weights(average.model, tensors[name], str(folder / name))
        checkpoint.load_optimizer_tensors(optimizer, nnet, tensors[checkpoint.OPTIMIZER_FILE])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if state["code"] != logger.code_version():
            logging.warning("%s was written by code %s, this is %s", folder, state["code"], logger.code_version())
        logging.info("going on from %s", folder)
        return state["step"]
    if folders:
        raise ValueError(
            f"none of the {len(folders)} checkpoints in {ckpt_root} is whole: remove them to start again from step 0"
        )
    return 0


def gather_state(
    nnet: nn.Module, averages: dict[str, EMA], optimizer: torch.optim.Optimizer, main: bool
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file; sharded ones whole on the main process. All processes have to call it."""
    cut = {
        checkpoint.WEIGHTS_FILE: nnet.state_dict(),
        checkpoint.OPTIMIZER_FILE: checkpoint.optimizer_tensors(optimizer, nnet),
        **{name: average.state_dict() for name, average in averages.items()},
    }
    return {file: sharding.gather(tensors, keep=main) for file, tensors in cut.items()}


def save(
    folder: Path, settings: dict, step: int, tensors: dict[str, dict[str, Tensor]], scaler: torch.amp.GradScaler | None
) -> bool:
    """Write everything that `resume` needs, and remove what config.train no longer keeps; False if it failed.

    There is no random state in it: the data order and all noise follow from the seed and the step. A checkpoint that
    cannot be written (a full disk) is lost, the run and the older checkpoints are not.
    """
    state = {"step": step, "scaler": scaler.state_dict() if scaler is not None else None}
    state |= {"code": logger.code_version(), **settings}
    try:
        checkpoint.save_checkpoint(folder, tensors, state)
    except OSError as error:
        logging.error("checkpoint %s is lost, training goes on: %s", folder, error)
        return False
    keep = settings["config"]["train"]
    checkpoint.prune_checkpoints(folder.parent, step, keep["keep_last"], keep["keep_interval"])
    return True


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> int:
    """Train until config.train.n_steps updates are done, or a signal asks to stop.

    Returns:
        The exit status: 0, or `REQUEUE_STATUS` after a signal.

    Raises:
        ValueError, FileNotFoundError: settings or files that do not fit, before anything is written.
        FloatingPointError: too many updates in a row were not finite.
    """
    with StopRequest() as stop:  # from here on: what comes before the first step can take minutes
        return run_training(config, workdir, stop)


def run_training(config: ml_collections.ConfigDict, workdir: str | Path, stop: StopRequest) -> int:
    """`train`, told by `stop` when to end."""
    workdir, settings = Path(workdir), config.train
    log_with = ["tensorboard"] + (["wandb"] if config.wandb.mode != "disabled" else [])
    accelerator = launch.make_accelerator(log_with=log_with, project_dir=str(workdir))
    device, main, scaler = accelerator.device, accelerator.is_main_process, accelerator.scaler
    if not main:
        logging.set_verbosity(logging.ERROR)

    # Everything that a user can get wrong, before anything is written.
    sharding.check_launcher()
    utils.check_training(config)
    utils.check_sampling(config)
    weights = loss_weights(config)
    schedule = sde.get_schedule(config.schedule)
    n_processes, process = accelerator.num_processes, accelerator.process_index
    rows = [
        own_rows(settings.batch_size, n_processes, process, settings.accumulation, part)
        for part in range(settings.accumulation)
    ]
    torch.manual_seed(config.seed)
    resuming = bool(checkpoint.checkpoint_folders(workdir / "ckpts"))
    nnet = build_empty_network(config, device) if resuming else build_network(config).to(device)
    null_label = nnet.null_label
    guide = open_guide(config, device)
    autoencoder = open_autoencoder(config, device)
    dataset = utils.open_dataset(config, autoencoder)
    identity = run_settings(config, accelerator, dataset)
    class_names = dataset.class_names if config.dataset.n_classes else []
    logger.check_same_everywhere(identity)
    scoring = None
    if settings.fid_interval:
        planned = PlannedImages(settings.fid_samples, image_size(config, autoencoder), "config.train.fid_samples")
        scoring = utils.open_scoring(config.fid_stat, False, planned)

    start_from(nnet, config, resuming)
    averages = make_averages(nnet, config)
    if settings.sharded:
        sharding.shard(nnet, [average.model for average in averages.values()], device)
    compile_network(nnet, choose_compile(settings.compile, device), recompute=settings.recompute)
    optimizer = make_adamw(nnet, config.optimizer.lr, tuple(config.optimizer.betas), config.optimizer.weight_decay)
    step = resume(workdir / "ckpts", identity, config.resume_changes, nnet, averages, optimizer, scaler)
    steps = gather_object([step])
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}) in "
            f"{workdir / 'ckpts'}: give a --workdir on a file system that all of them see"
        )
    batches = StepBatches(
        len(dataset), settings.batch_size, config.seed, step, n_processes, process, settings.accumulation
    )
    if step >= settings.n_steps:
        logging.info("already trained for %d steps: nothing to do", step)
        (workdir / REQUEUE_FILE).unlink(missing_ok=True)
        del nnet, averages, optimizer
        launch.finish(accelerator)
        return 0

    data = make_loader(dataset, batches, config.dataset.num_workers, pin_memory=device.type == "cuda")
    # A sharded network synchronises itself, in every pass of accumulation (so that no process ever holds the whole
    # gradient), and needs no more than mixed precision around it: what accelerate calls evaluation mode.
    wrapped = accelerator.prepare_model(nnet, device_placement=False, evaluation_mode=settings.sharded)
    wrapped_optimizer = accelerator.prepare_optimizer(optimizer)
    lock = None
    with raise_on_all_ranks(accelerator), advise_on_write_error(workdir, "set --workdir"):
        if main:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = logger.become_only_writer(workdir)
            (workdir / REQUEUE_FILE).unlink(missing_ok=True)
            (workdir / "config.json").write_text(json.dumps(config_json(config), indent=1))
            log = logger.MetricsLog(workdir / "metrics.jsonl", step)
    if main:
        describe_run(config, workdir, nnet, averages, accelerator, len(dataset), batches.steps_per_epoch)
    accelerator.init_trackers(
        os.environ.get("WANDB_PROJECT", "dimr") if config.wandb.mode != "disabled" else "tensorboard",
        init_kwargs={"wandb": {"mode": config.wandb.mode, "dir": str(workdir), "config": config_json(config)}},
    )
    if config.sample.scale > 1 and config.dataset.n_classes and not config.dataset.p_uncond and guide is None:
        logging.warning(
            "config.dataset.p_uncond is 0, which leaves the null class of guidance (config.sample.scale %g) untrained",
            config.sample.scale,
        )
    p_uncond = config.dataset.p_uncond if config.dataset.n_classes else 1.0  # no classes: always the null label
    n_rows = min(settings.grid_classes, max(config.dataset.n_classes, 1))
    grid_labels = [label for label in range(n_rows) for _ in range(settings.grid_per_class)]
    sampled_network = averages[checkpoint.EMA_FILE].model
    uses = sum((settings.n_steps - step) // k for k in (settings.eval_interval, settings.fid_interval) if k)
    compile_ema = uses > 1 and not settings.sharded
    compile_network(sampled_network, choose_compile(settings.compile, device) if compile_ema else "off")
    model = Model(config, sampled_network, device, accelerator.mixed_precision, guide, autoencoder)
    sample = model.sampler(steps=config.sample.grid_steps)
    flops_per_image = logger.training_flops_per_image(build_network_on_meta(config), tuple(config.z_shape))
    losses, timer = logger.LossMeter(len(weights), device), logger.StepTimer(device)
    weighting = torch.tensor(weights, device=device)
    skipped = torch.zeros(2, device=device)  # updates that were not finite: in a row, in all
    saved_step, status = step, 0
    progress = tqdm(total=settings.n_steps, initial=step, unit="step", disable=not main, dynamic_ncols=True)

    nnet.train()
    timer.reset()
    while step < settings.n_steps:
        lr = warmup_lr(config.optimizer.lr, step, config.lr_scheduler.warmup_steps)
        set_lr(wrapped_optimizer, lr)
        draws = step_draws(config.seed, step, settings.batch_size, tuple(config.z_shape), device)
        wrapped_optimizer.zero_grad()
        for part in range(settings.accumulation):
            records, labels = next(data)
            timer.mark("data")
            records, labels = records.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            own = draws.rows(rows[part])
            last = part == settings.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                x0 = to_network_input(records, own, autoencoder)
                by_resolution = resolution_losses(wrapped, schedule, x0, labels, own, p_uncond, null_label)
                loss = sde.weighted_sum(by_resolution, weighting)  # (B,)
                accelerator.backward(loss.mean() / settings.accumulation)
            losses.add(by_resolution.detach(), loss.detach(), own.uniform_time)
            timer.mark("forward_backward")
        if scaler is not None:
            accelerator.unscale_gradients(wrapped_optimizer)
        grad_norm = clip_or_skip(optimizer, settings.grad_clip, skipped)
        wrapped_optimizer.step()
        step += 1
        for average in averages.values():
            average.update(step)
        stopping = stop.agreed()
        timer.mark("rest")
        progress.update()
        done = step == settings.n_steps

        if step % settings.log_interval == 0 or done or stopping:
            metrics = {**losses.read(accelerator), "lr": lr, "grad_norm": grad_norm.item(), **timer.read()}
            in_row, in_all = skipped.tolist()
            metrics |= utils.throughput(metrics["seconds_per_step/all"], config, flops_per_image, accelerator)
            metrics["skipped_updates"] = in_all
            logger.log_to_trackers(accelerator, metrics, step)
            if main:
                log.write(step, metrics)
                progress.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=f"{metrics['images_per_second']:.0f}")
            if in_row >= settings.max_skipped:
                raise FloatingPointError(
                    f"{int(in_row)} updates in a row up to step {step} had a loss or gradient that is not finite; the "
                    f"last checkpoint is of step {saved_step}. Lower config.optimizer.lr, set config.train.grad_clip, "
                    "or use bf16 in place of fp16 (config.train.max_skipped sets how many are allowed)"
                )

        if step % settings.eval_interval == 0:
            with sharding.whole(sampled_network):
                images = sample(range(len(grid_labels)), grid_labels)[0] if main else None
            try:
                if main:
                    pictures.save_grid(images, workdir / "samples" / f"{step}.png", columns=settings.grid_per_class)
                    pictures.save_strip(workdir / "samples" / f"{step}.png", settings.grid_per_class)
            except OSError as error:
                logging.error("the grid of step %d is lost, training goes on: %s", step, error)
            timer.reset()

        if step % settings.save_interval == 0 or done or stopping:
            tensors = gather_state(nnet, averages, optimizer, main)
            state = {**identity, "class_names": class_names}  # no setting: weights from before it was saved go on
            if main and save(workdir / "ckpts" / f"{step}.ckpt", state, step, tensors, scaler):
                saved_step = step
            del tensors
            timer.reset()

        if scoring and step % settings.fid_interval == 0:
            with sharding.whole(sampled_network):
                fid = fid_of_samples(model, workdir / "fid" / str(step), accelerator, scoring)
            if fid is not None:
                logger.log_to_trackers(accelerator, {"fid": fid}, step)
                log.write(step, {"fid": fid})
            timer.reset()

        if stopping and not done:
            status = REQUEUE_STATUS
            break

    progress.close()
    if main:
        if status:
            (workdir / REQUEUE_FILE).write_text(f"{step}\n")
        logging.info("%s at step %d; weights in %s", "stopped" if status else "trained", step, workdir / "ckpts")
        if saved_step != step:
            logging.error("the last checkpoint was lost: run the command again to train on from step %d", saved_step)
            status = status or 1
    # The wrapped model and what refers to it go before the processes part (see launch.finish).
    del nnet, wrapped, wrapped_optimizer, optimizer, data, loss, by_resolution, losses, averages, sample
    del sampled_network, model
    if lock is not None:
        lock.close()
    launch.finish(accelerator)
    return status


def describe_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    nnet: nn.Module,
    averages: dict[str, EMA],
    accelerator: accelerate.Accelerator,
    n_records: int,
    steps_per_epoch: int,
) -> None:
    """The derived numbers of a run, logged once at its start."""
    decayed, spared = split_decay(nnet)
    n_decayed, n_spared = (sum(p.numel() for p in group) for group in (decayed, spared))
    batch, passes, n_processes = config.train.batch_size, config.train.accumulation, accelerator.num_processes
    logging.info("%s: %d parameters", workdir, sum(p.numel() for p in nnet.parameters()))
    logging.info("  decayed: %d in %d tensors; not: %d in %d", n_decayed, len(decayed), n_spared, len(spared))
    logging.info(
        "  batch %d = %d processes x %d passes x %d", batch, n_processes, passes, batch // n_processes // passes
    )
    held = 3 * sharding.local_bytes(decayed + spared)  # a gradient and two moments for each trained weight
    held += sum(sharding.local_bytes(m.parameters()) for m in (nnet, *(a.model for a in averages.values())))
    layout = "sharded" if config.train.sharded else "whole"
    logging.info("  %.6g MB of weights, gradients, moments and averages per process, %s", held / 1e6, layout)
    logging.info("  data %s: %d records, %d steps per epoch", config.dataset.path, n_records, steps_per_epoch)
    logging.info(
        "  %s precision on %s; code %s", accelerator.mixed_precision, accelerator.device, logger.code_version()
    )


def fid_of_samples(
    model: Model, folder: Path, accelerator: accelerate.Accelerator, scoring: tuple[Reference, Path] | None
) -> float | None:
    """FID of config.train.fid_samples images, by the code of eval.py; the images are removed. None but on the main
    process, and where it failed, which is logged."""
    config = ml_collections.ConfigDict(model.config)
    config.sample.n_samples, config.sample.sample_steps = config.train.fid_samples, config.sample.grid_steps
    height, width = image_size(config, model.autoencoder)
    enough = None
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
        enough = shutil.disk_usage(folder.parent.parent).free > 2 * config.sample.n_samples * height * width * 3
        if not enough:
            logging.error("no FID at this step, training goes on: no room for its images in %s", folder)
    if not broadcast_object_list([enough])[0]:
        return None
    scores = None
    try:
        scores = evaluation.sample_and_score(replace(model, config=config), folder, accelerator, scoring)
    except (ValueError, OSError) as error:  # on all processes, or on the main one after all that they do together
        logging.error("no FID at this step, training goes on: %s", error)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return scores.values["fid"] if scores else None


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
