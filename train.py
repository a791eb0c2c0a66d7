"""Train a DiMR.

    accelerate launch [--multi_gpu --num_processes N --num_machines M] [--mixed_precision fp16|bf16] train.py \
        --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=VALUE ...]

One process or many, GPU or CPU. The same command again goes on from the newest checkpoint. Writes into the work folder
(workdir/NAME unless given): ckpts/<step>.ckpt, samples/<step>.png (a grid from the EMA weights), metrics.jsonl, and
TensorBoard logs under tensorboard/.
"""

import contextlib
import json
import time
from pathlib import Path

import ml_collections
import torch
from absl import flags, logging
from torch import Tensor, nn
from tqdm import tqdm

import sde
import utils
from libs.autoencoder import sample_latents
from libs.checkpoint import (
    EMA_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    checkpoint_folders,
    load_optimizer_tensors,
    load_weights,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
)
from libs.data import StepBatches, make_loader, own_rows
from libs.ema import EMA
from libs.optim import make_adamw, set_lr, split_decay, warmup_lr
from libs.randomness import StepDraws, step_draws


def to_network_input(records: Tensor, draws: StepDraws, scaling_factor: float | None) -> Tensor:
    """What the network denoises, (B, C, H, W) float32: a fresh latent from stored moments, or pixels in [-1, 1]."""
    if scaling_factor is None:
        return records.float() / 127.5 - 1
    return sample_latents(records, draws.latent_noise, scaling_factor)


def training_loss(
    nnet: nn.Module,
    schedule: sde.Schedule,
    x0: Tensor,
    labels: Tensor,
    draws: StepDraws,
    weights: tuple[float, ...],
    p_uncond: float,
    null_label: int,
) -> Tensor:
    """Mean multi-resolution loss of a batch: x0 (B, C, H, W), labels (B,) -> scalar."""
    t = schedule.times(draws.uniform_time)
    xt = schedule.add_noise(x0, draws.eps, t)
    labels = torch.where(draws.uniform_drop < p_uncond, null_label, labels)
    predictions = nnet(xt, schedule.network_time(t), labels)
    return sde.multi_resolution_loss(predictions, draws.eps, weights).mean()


def resume(ckpt_root: Path, nnet: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, scaler) -> int:
    """Load the newest whole checkpoint, naming damaged ones; returns the step to go on from (0: none)."""
    for folder in checkpoint_folders(ckpt_root):
        try:
            state, tensors = read_checkpoint(folder)
        except ValueError as error:
            logging.warning("passed over: %s", error)
            continue
        load_weights(nnet, tensors[WEIGHTS_FILE], str(folder / WEIGHTS_FILE))
        load_weights(ema.model, tensors[EMA_FILE], str(folder / EMA_FILE))
        load_optimizer_tensors(optimizer, nnet, tensors[OPTIMIZER_FILE])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        logging.info("going on from %s", folder)
        return state["step"]
    return 0


def save(
    folder: Path, config: ml_collections.ConfigDict, step: int, nnet: nn.Module, ema: EMA, optimizer, scaler
) -> None:
    """Write everything that `resume` needs; the data order and all noise follow from the seed and the step."""
    tensors = {
        WEIGHTS_FILE: nnet.state_dict(),
        EMA_FILE: ema.state_dict(),
        OPTIMIZER_FILE: optimizer_tensors(optimizer, nnet),
    }
    state = {"step": step, "scaler": scaler.state_dict() if scaler is not None else None}
    save_checkpoint(folder, tensors, {**state, "config": utils.config_json(config)})


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Train until config.train.n_steps updates are done. See the module's docstring for what it writes.

    Raises:
        ValueError, FileNotFoundError: settings or files that do not fit, before anything is written.
    """
    workdir = Path(workdir)
    ckpt_root = workdir / "ckpts"
    settings = config.train
    log_with = ["tensorboard"] + (["wandb"] if config.wandb.mode != "disabled" else [])
    accelerator = utils.make_accelerator(log_with=log_with, project_dir=str(workdir))
    device, main = accelerator.device, accelerator.is_main_process
    if not main:
        logging.set_verbosity(logging.ERROR)

    utils.check_sampling(config)
    weights = utils.loss_weights(config)
    schedule = sde.get_schedule(config.schedule)
    rows = [
        own_rows(settings.batch_size, accelerator.num_processes, accelerator.process_index, settings.accumulation, part)
        for part in range(settings.accumulation)
    ]
    torch.manual_seed(config.seed)
    nnet = utils.build_network(config).to(device)
    null_label = nnet.null_label
    autoencoder = utils.open_autoencoder(config, device)
    dataset = utils.open_dataset(config, autoencoder)
    scaling_factor = autoencoder.scaling_factor if autoencoder is not None else None
    StepBatches(len(dataset), settings.batch_size, config.seed)  # refuses a data set smaller than a batch

    ema = EMA(nnet, config.ema_rate)
    optimizer = make_adamw(nnet, config.optimizer.lr, tuple(config.optimizer.betas), config.optimizer.weight_decay)
    step = resume(ckpt_root, nnet, ema, optimizer, accelerator.scaler)
    if step >= settings.n_steps:
        logging.info("already trained for %d steps: nothing to do", step)
        utils.finish(accelerator)
        return

    batches = StepBatches(
        len(dataset),
        settings.batch_size,
        config.seed,
        start_step=step,
        n_processes=accelerator.num_processes,
        process=accelerator.process_index,
        accumulation=settings.accumulation,
    )
    loader = make_loader(dataset, batches, config.dataset.num_workers, pin_memory=device.type == "cuda")
    data = iter(loader)
    wrapped, wrapped_optimizer = accelerator.prepare(nnet, optimizer)

    if main:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(utils.config_json(config), indent=1))
    accelerator.init_trackers(
        config.wandb.project if config.wandb.mode != "disabled" else "tensorboard",
        init_kwargs={"wandb": {"mode": config.wandb.mode, "dir": str(workdir), "config": utils.config_json(config)}},
    )
    log = utils.MetricsLog(workdir / "metrics.jsonl", step) if main else None
    decayed, spared = split_decay(nnet)
    logging.info(
        "%s: %d parameters (%d decayed, %d not); batch %d = %d processes x %d passes x %d; %d records, %d steps per "
        "epoch; %s precision on %s",
        workdir,
        sum(p.numel() for p in nnet.parameters()),
        sum(p.numel() for p in decayed),
        sum(p.numel() for p in spared),
        settings.batch_size,
        accelerator.num_processes,
        settings.accumulation,
        settings.batch_size // (accelerator.num_processes * settings.accumulation),
        len(dataset),
        batches.steps_per_epoch,
        accelerator.mixed_precision if accelerator.mixed_precision != "no" else "float32",
        device,
    )

    n_rows = min(settings.grid_classes, max(config.dataset.n_classes, 1))
    grid_labels = [label for label in range(n_rows) for _ in range(settings.grid_per_class)]
    sample = utils.make_sampler(
        config, ema.model, null_label, schedule, autoencoder, accelerator, config.sample.grid_steps
    )
    progress = tqdm(total=settings.n_steps, initial=step, unit="step", disable=not main, dynamic_ncols=True)
    loss_sum, since_log, clock = torch.zeros((), device=device), 0, time.perf_counter()

    nnet.train()
    while step < settings.n_steps:
        lr = warmup_lr(config.optimizer.lr, step, config.lr_scheduler.warmup_steps)
        set_lr(wrapped_optimizer, lr)
        draws = step_draws(config.seed, step, settings.batch_size, tuple(config.z_shape), device)
        wrapped_optimizer.zero_grad()
        for part in range(settings.accumulation):
            last = part == settings.accumulation - 1
            records, labels = next(data)
            records, labels = records.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            own = draws.rows(rows[part])
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                x0 = to_network_input(records, own, scaling_factor)
                loss = training_loss(wrapped, schedule, x0, labels, own, weights, config.dataset.p_uncond, null_label)
                accelerator.backward(loss / settings.accumulation)
            loss_sum += loss.detach() / settings.accumulation
        wrapped_optimizer.step()
        ema.update()
        step += 1
        since_log += 1
        progress.update()

        if step % settings.log_interval == 0 or step == settings.n_steps:
            loss = accelerator.reduce(loss_sum, reduction="mean").item() / since_log
            now = time.perf_counter()
            metrics = {"loss": loss, "lr": lr, "images_per_second": settings.batch_size * since_log / (now - clock)}
            accelerator.log(metrics, step=step)
            if main:
                log.write(step, metrics)
                progress.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{metrics['images_per_second']:.0f}")
            loss_sum, since_log, clock = torch.zeros((), device=device), 0, now

        if main and step % settings.eval_interval == 0:
            images = sample(range(len(grid_labels)), grid_labels)
            utils.save_grid(images, workdir / "samples" / f"{step}.png", columns=settings.grid_per_class)
            clock = time.perf_counter()  # sampling is not training time

        if main and (step % settings.save_interval == 0 or step == settings.n_steps):
            save(ckpt_root / f"{step}.ckpt", config, step, nnet, ema, optimizer, accelerator.scaler)
            clock = time.perf_counter()

    progress.close()
    logging.info("trained for %d steps; weights in %s", step, ckpt_root / f"{step}.ckpt")
    # The wrapped model and what refers to it go before the processes part (see utils.finish).
    del wrapped, wrapped_optimizer, optimizer, loader, data, loss, loss_sum
    utils.finish(accelerator)


def main(argv: list[str]) -> None:
    utils.no_arguments(argv)
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    train(config, workdir or Path("workdir") / utils.config_name())


if __name__ == "__main__":
    utils.define_config_flag("What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Where to write; workdir/<name of the config file> unless given.")
    utils.run(main)
