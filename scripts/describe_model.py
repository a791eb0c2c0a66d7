"""Describe what a config costs: parameters, multiply-adds, memory, the largest batch on a GPU, and the time of the run.

    python scripts/describe_model.py --config=configs/DiMR-XL-2R_imagenet256.py \
        [--memory_gb=80 --tflops=400 --gpus=16 --precision=bf16] [--config.FIELD=VALUE ...]

Nothing is allocated or run, so any model takes a minute on any machine. Memory is that of the tensors that compiled
blocks keep for the backward pass plus the training state; temporaries come on top, so a tenth of the GPU is left free.
--tflops is the FLOP/s that one GPU achieves on this model (two per multiply-add), as `train.py` logs it.
"""

import sys
from functools import partial
from pathlib import Path

import ml_collections
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from configs.common import check_fields
from libs import cost, launch
from libs.model import build_network, build_network_on_meta


def count(n: float) -> str:
    """Write a large number with a unit: 1234567890 -> 1.23 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} "


def rounded(n: float) -> str:
    """Write a number with three digits: 3549216.6 -> 3,550,000, 12.04 -> 12, 0.0123 -> 0.0123; below that < 0.01."""
    if n < 0.01:
        return "< 0.01"
    n = float(f"{n:.3g}")
    return f"{n:,.0f}" if n >= 100 else f"{n:g}"


def describe(config: ml_collections.ConfigDict, precision: str, memory_gb: float, tflops: float, gpus: int) -> str:
    """Write the report."""
    shape = tuple(config.z_shape)
    nnet = build_network_on_meta(config)
    branches = cost.branch_costs(nnet, shape)
    lines = ["| branch | blocks | width | grid | parameters | multiply-adds |", "|---|---|---|---|---|---|"]
    for stage, branch in zip(nnet.stages, branches, strict=True):
        spec = stage.spec
        lines.append(
            f"| {spec.patch_size}x{spec.patch_size} patches | {spec.depth} {spec.block_type} | {spec.dim} "
            f"| {spec.max_height}x{spec.max_width} | {count(branch.parameters)}| {count(branch.multiply_adds)}|"
        )
    parameters = sum(b.parameters for b in branches)
    multiply_adds = sum(b.multiply_adds for b in branches)
    n_emas = 1 + len(config.ema.extra_rates) + len(config.ema.power_widths)
    memory = cost.training_memory(partial(build_network, config), shape, precision, config.train.recompute, n_emas)
    lines += [
        f"| in all | | | | {parameters:,} | {multiply_adds:,} |",
        "",
        f"Training memory, {precision} precision, {n_emas} set(s) of EMA weights, {memory_gb:g} GB:",
        "",
        "| activation checkpointing (config.train.recompute) | state, GB | per image, MB | largest batch per GPU |",
        "|---|---|---|---|",
        f"| {config.train.recompute} | {rounded(memory.state / 1e9)} | {rounded(memory.per_image / 1e6)} "
        f"| {memory.largest_batch(0.9 * memory_gb * 1e9)} |",
    ]

    per_second = tflops * 1e12 / (6 * multiply_adds)  # a backward is two forwards; 2 FLOPs per multiply-add
    images = config.train.n_steps * config.train.batch_size
    hours = images / per_second / 3600
    forwards = config.sample.sample_steps * (2 if config.sample.scale > 1 else 1)
    sampled = tflops * 1e12 / (2 * multiply_adds * forwards)
    lines += [
        "",
        f"At {tflops:g} TFLOP/s per GPU: {rounded(per_second)} trained images/s and {rounded(sampled)} sampled "
        f"images/s ({forwards} forward passes each) per GPU.",
        f"The configured run ({config.train.n_steps:,} steps of {config.train.batch_size}): {rounded(hours)} "
        f"GPU-hours, {rounded(hours / gpus / 24)} days on {gpus} GPUs; {config.sample.n_samples:,} samples: "
        f"{rounded(config.sample.n_samples / sampled / 3600)} GPU-hours.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    utils.check_training(values.config)
    utils.check_sampling(values.config)
    print(describe(values.config, values.precision, values.memory_gb, values.tflops, values.gpus))


if __name__ == "__main__":
    launch.define_config_flag("The model: a file of configs/.")
    flags.DEFINE_enum("precision", "bf16", sorted(cost.PRECISIONS), "As accelerate's --mixed_precision.")
    flags.DEFINE_float("memory_gb", 80, "Memory of a GPU.", lower_bound=0.1)
    flags.DEFINE_float("tflops", 400, "FLOP/s that a GPU achieves, in 1e12.", lower_bound=1e-3)
    flags.DEFINE_integer("gpus", 8, "GPUs of the run.", lower_bound=1)
    launch.run(main, check_fields)
