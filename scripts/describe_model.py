"""What a config costs: parameters, arithmetic, memory, the largest batch on a card, and the time of the whole run.

    python scripts/describe_model.py --config=configs/DiMR-XL-2R_imagenet256.py \
        [--memory_gb=80 --tflops=400 --gpus=16 --precision=bf16] [--config.FIELD=VALUE ...]

Nothing is allocated or run, so any model takes seconds on any machine. Memory is that of autograd's kept tensors in
PyTorch's eager mode plus the training state; temporaries come on top (leave a tenth of the card). --tflops is the
FLOP/s that one GPU achieves on this model (two per multiply-add): what `train.py` logs as tflops_per_device.
"""

import math
import sys
import warnings
from pathlib import Path

import ml_collections
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from configs.common import check_fields
from libs import UserError, cost, launch

# (recompute, recompute_keeps_products) and how the table calls it
RECOMPUTATIONS = {
    (0, False): "none",
    (2, False): "every 2nd block",
    (1, True): "all, products kept",
    (1, False): "all",
}


def count(n: float) -> str:
    """1234567890 -> 1.23 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} "


def rounded(n: float) -> str:
    """Three digits: 3549216.6 -> 3,550,000, 12.04 -> 12, 0.0123 -> 0.0123; below that < 0.01."""
    if n < 0.01:
        return "< 0.01"
    n = float(f"{n:.3g}")
    return f"{n:,.0f}" if n >= 100 else f"{n:g}"


def describe(config: ml_collections.ConfigDict, precision: str, memory_gb: float, tflops: float, gpus: int) -> str:
    """The report as text. Raises ValueError for a config that makes no model."""
    shape = tuple(config.z_shape)
    nnet = utils.build_network_on_meta(config)
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
    lines.append(f"| in all | | | | {parameters:,} | {multiply_adds:,} |")

    averages = 1 + len(config.ema.extra_rates) + len(config.ema.power_widths)
    lines += [
        "",
        f"Training memory, {precision} precision, {averages} average(s) of the weights, {memory_gb:g} GB card:",
        "",
        "| computed again in backward | state, GB | per image, MB | largest batch per GPU | more arithmetic |",
        "|---|---|---|---|---|",
    ]
    for (every, keep_products), name in RECOMPUTATIONS.items():
        with cost.fake_model():
            fake = utils.build_network(config).train()
            fake.recompute(every, keep_products)
            memory = cost.training_memory(fake, shape, precision, averages)
        # A recomputed forward is a third of a step; one that keeps its products costs next to none.
        more = 0 if keep_products or not every else 100 / 3 / every
        lines.append(
            f"| {name} | {rounded(memory.state / 1e9)} | {rounded((memory.per_image + memory.block) / 1e6)} "
            f"| {memory.largest_batch(0.9 * memory_gb * 1e9)} | {more:.0f} % |"
        )

    per_second = tflops * 1e12 / (6 * multiply_adds)  # forward and backward: 3 passes of 2 operations
    images = config.train.n_steps * config.train.batch_size
    hours = images / per_second / 3600
    evaluations = config.sample.sample_steps * (2 if config.sample.scale > 1 else 1)
    sampled = tflops * 1e12 / (2 * multiply_adds * evaluations)
    lines += [
        "",
        f"At {tflops:g} TFLOP/s per GPU: {rounded(per_second)} trained images/s and {rounded(sampled)} sampled "
        f"images/s ({evaluations} evaluations each) per GPU.",
        f"The configured run ({config.train.n_steps:,} steps of {config.train.batch_size}): {rounded(hours)} "
        f"GPU-hours, {rounded(hours / gpus / 24)} days on {gpus} GPUs; {config.sample.n_samples:,} samples: "
        f"{rounded(config.sample.n_samples / sampled / 3600)} GPU-hours.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    for name in ("memory_gb", "tflops", "gpus"):
        if not 0 < values[name].value < math.inf:
            raise UserError(f"--{name} must be above 0; found {values[name].value:g}")
    utils.check_training(values.config)
    utils.check_sampling(values.config)
    # PyTorch asks how recomputation should treat hooks on kept tensors, of which libs/cost.py's only count.
    warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
    print(describe(values.config, values.precision, values.memory_gb, values.tflops, values.gpus))


if __name__ == "__main__":
    launch.define_config_flag("The model: a file of configs/.")
    flags.DEFINE_enum("precision", "bf16", sorted(cost.PRECISIONS), "As accelerate's --mixed_precision.")
    flags.DEFINE_float("memory_gb", 80, "Memory of a GPU.")
    flags.DEFINE_float("tflops", 400, "FLOP/s that a GPU achieves, in 1e12.")
    flags.DEFINE_integer("gpus", 8, "GPUs of the run.")
    launch.run(main, check_fields)
