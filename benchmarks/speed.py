"""Training and sampling speed of a config's network beside the released recipe and DiT-XL/2, one table per run.

    python benchmarks/speed.py train --config=configs/DiMR-XL-2R_imagenet256.py --batch=64 \
        --variants=released-no,released-bf16,eager-bf16,compiled-bf16,compiled-bf16-all,dit_compiled-bf16
    python benchmarks/speed.py gradient --config=configs/DiMR-XL-2R_imagenet256.py --batch=2 \
        --variants=released-no,eager-no
    python benchmarks/speed.py sample --config=configs/digits.py --batch=50 --steps=20 --variants=released-no,eager-no

"train" times whole training steps (forward, backward, optimiser, one average), "gradient" forward and backward alone,
"sample" guided sampling without decoding. A variant is WAY-PRECISION[-RECOMPUTE]. WAY: released
(benchmarks/released_recipe.py); eager, compiled (whole), blocks; dit, dit_compiled (diffusers' DiT-XL/2 at its size).
PRECISION: no, bf16 or fp16. RECOMPUTE: of config.train.recompute, but off.
On a CPU variants are timed in turn, a round at a time, so that a change of the machine's load falls on all of them; on
a GPU one after the other, as its memory need not hold all: a row is printed as soon as it is measured. Each is compared
with the eager float32 network: its outputs and, of "train", the losses of the first steps (--losses). "first" is the
seconds of the first call, in which a network is compiled. The matrix-multiply ceiling is measured in the same run.
--profile=FILE appends, for each variant on a GPU, where one more run's time went.
"""

import argparse
import collections
import contextlib
import copy
import gc
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from benchmarks.released_recipe import ReleasedRecipe, two_pass_noise_model
from libs.compilation import compile_network, round_weights
from libs.launch import keep_freed_memory
from libs.model import build_network, loss_weights
from libs.optim import EMA, clip_or_skip, make_adamw
from libs.solvers import dpm_solver_fast

COMPILED = {"compiled": "whole", "blocks": "blocks"}
PEERS = ("dit", "dit_compiled")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

KERNELS = {  # what a GPU's kernel is part of, by its name: the first that fits
    "attention": "sdpa|flash|fmha|attention",
    "fused passes": "^triton_",
    "depthwise, convolutions": "conv|wgrad2d|dgrad2d|cudnn|implicit|nchw|nhwc|winograd",
    "matrix products": "gemm|nvjet|cutlass|splitK|cublas",
    "optimiser, average, norm": "multi_tensor_apply|foreach|lpnorm",
    "copies": "^Memcpy|^Memset",
}


class DiT(torch.nn.Module):
    """diffusers' DiT-XL/2-256, called and answering as a DiMR.

    750 M parameters, not the published 675: diffusers embeds label and time in every block anew.
    """

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.model = DiTTransformer2DModel(sample_size=32, num_layers=28, num_attention_heads=16, attention_head_dim=72)
        self.null_label = 1000

    def forward(self, x, t, y):
        time = (t * 1000).long().expand(len(x))
        return (self.model(x, timestep=time, class_labels=y, return_dict=False)[0][:, : x.shape[1]],)


class Variant:
    """A network made ready to be timed one way."""

    def __init__(self, name: str, nnet, args, config):
        self.name = name
        way, precision, *rest = name.split("-")
        ways = ("eager", *COMPILED) if rest else ("released", "eager", *COMPILED, *PEERS)
        if way not in ways or precision not in DTYPES:
            raise SystemExit(f"error: no variant {name!r}: expected WAY-PRECISION[-RECOMPUTE]")
        self.way, self.dtype, self.args, self.config = way, DTYPES[precision], args, config
        self.device = torch.device(args.device)
        if way in PEERS:
            torch.manual_seed(0)
            self.nnet = DiT()
            if way == "dit_compiled":
                self.nnet.model.forward = torch.compile(self.nnet.model.forward, dynamic=False)
        else:
            self.nnet = ReleasedRecipe(nnet) if way == "released" else copy.deepcopy(nnet)
        self.nnet.to(self.device).train(args.task != "sample")
        if args.task == "sample" and way not in ("released", *PEERS):
            round_weights(self.nnet, precision)
        self.weights = (1.0,) if way in PEERS else loss_weights(config)
        self.schedule = sde.get_schedule(config.schedule)
        if way not in ("released", *PEERS):
            recompute = rest[0] if rest else "off"
            compile_network(self.nnet, COMPILED.get(way, "off"), args.task == "sample", recompute)
        generator = torch.Generator().manual_seed(1)
        shape = (args.batch, *config.z_shape)
        n_classes = max(config.dataset.n_classes, 1)
        self.x = torch.randn(shape, generator=generator).to(self.device)
        self.eps = torch.randn(shape, generator=generator).to(self.device)
        self.t = torch.rand(args.batch, generator=generator).to(self.device)
        self.y = torch.randint(0, n_classes, (args.batch,), generator=generator).to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if args.task == "train":
            self.optimizer = make_adamw(self.nnet, 1e-4, (0.99, 0.99), 0.03)
            self.average = EMA(torch.nn.ModuleList(self.nnet.children()), 0.9999)
            self.skipped = torch.zeros(2, device=self.device)

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else contextlib.nullcontext()

    def run(self):
        """One training step, or one batch of samples."""
        return {"train": self.step, "gradient": self.gradient, "sample": self.sample}[self.args.task]()

    def gradient(self):
        self.nnet.zero_grad()
        with self.autocast():
            predictions = self.nnet(self.x, self.t, self.y)
        loss = sde.multi_resolution_loss(predictions, self.eps, self.weights).mean()
        self.scaler.scale(loss).backward()
        return loss

    def step(self):
        loss = self.gradient()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        clip_or_skip(self.optimizer, 0.0, self.skipped)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(1)
        if self.way == "released":
            loss.item()
        return loss.detach()

    @torch.no_grad()
    def sample(self):
        make = two_pass_noise_model if self.way == "released" else sde.guided_noise_model
        noise_model = make(self.nnet, self.schedule, self.y, self.nnet.null_label, 1.4)
        with self.autocast():
            return dpm_solver_fast(noise_model, self.schedule, self.x, self.args.steps, 3)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self):
        """Operations of one `run` that the arithmetic needs: no recomputation, two per multiply-add."""
        with torch.device("meta"):
            inputs = self.x[:1].to("meta"), self.t[:1].to("meta"), self.y[:1].to("meta")
            plain = DiT() if self.way in PEERS else build_network(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain.to("meta")(*inputs)
        passes = 2 * self.args.steps if self.args.task == "sample" else 3
        return counter.get_total_flops() * passes * self.args.batch


def matmul_ceiling(device, dtype, repeats=3):
    """FLOP/s of one large matrix product, the best of a few."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 1):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / (10 if device.type == "cuda" else 1))
    return 2 * n**3 / min(seconds[1:])


def checked(variant):
    """What is compared of a variant: its outputs (sample: images), and of "train" the losses of its first steps."""
    task, inputs = variant.args.task, (variant.x, variant.t, variant.y)
    begun = time.perf_counter()
    with torch.set_grad_enabled(task != "sample"), variant.autocast():  # the graph that is timed, and no other
        outputs = variant.sample() if task == "sample" else variant.nnet(*inputs)[-1]
        found = [outputs.detach().float().cpu()]
    variant.first = time.perf_counter() - begun
    del outputs  # and the activations behind them
    if task == "train":
        found.append(torch.tensor([variant.step().item() for _ in range(variant.args.losses)]))
    return found


def deviation(found, reference):
    """Largest difference of values from the reference's, over its largest value."""
    return ((found - reference).abs().max() / reference.abs().max()).item()


@dataclass
class Result:
    """What was measured of a variant: seconds of each round, peak memory in GB (NaN on a CPU)."""

    seconds: list[float]
    memory: float
    deviations: list[float]  # of what `checked` gives; none of the peers
    flops: int
    dtype: torch.dtype
    first: float  # seconds of the first call, in which it is compiled


def measure(variants, args, reference):
    """{name: Result} of variants that are timed in turn, the first round not counted."""
    on_gpu = variants[0].device.type == "cuda"
    in_a_row = 5 if on_gpu and variants[0].args.task != "sample" else 1  # steps, as they come while training
    results = {}
    for variant in variants:
        found = checked(variant)
        found = [] if variant.way in PEERS else found
        deviations = [deviation(*pair) for pair in zip(found, reference, strict=False)]
        results[variant.name] = Result([], float("nan"), deviations, variant.flops(), variant.dtype, variant.first)
    for number in range(args.rounds + 1):
        for variant in variants:
            gc.collect()
            if on_gpu and not number:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            variant.wait()
            begun = time.perf_counter()
            for _ in range(in_a_row if number else 1):
                variant.run()
            variant.wait()
            if number:
                results[variant.name].seconds.append((time.perf_counter() - begun) / in_a_row)
            if on_gpu:
                results[variant.name].memory = torch.cuda.max_memory_allocated() / 1e9
    for variant in variants if on_gpu and args.profile else ():
        profile(variant, args.profile)
    return results


def profile(variant, file):
    """Append to a file where the GPU's time of one run goes: by `KERNELS`, and the kernels that take most of it."""
    variant.wait()
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        variant.run()
        variant.wait()
    seconds, averages = time.perf_counter() - begun, recorded.key_averages()
    sums, counts = collections.Counter(), collections.Counter()
    for kernel in averages:
        kind = next((kind for kind, words in KERNELS.items() if re.search(words, kernel.key)), "others")
        sums[kind] += kernel.self_device_time_total / 1e3
        counts[kind] += kernel.count
    busy = sum(sums.values())
    lines = [
        f"{variant.args.task} {variant.name}, batch {variant.args.batch}: {busy:.1f} ms of {seconds * 1e3:.1f} ms busy"
    ]
    lines += [
        f"{value:9.2f} ms {value / busy:5.1%} {counts[kind]:6d} calls  {kind}" for kind, value in sums.most_common()
    ]
    largest = sorted(averages, key=lambda kernel: -kernel.self_device_time_total)[:40]
    lines += [f"{k.self_device_time_total / 1e3:9.3f} ms {k.count:5d} x {k.key[:150]}" for k in largest]
    with open(file, "a") as text:
        text.write("\n".join([*lines, "", ""]))


def row(name, result, args, before, ceilings):
    """A line of the table; `before`: the median seconds of the variant that ratios are to."""
    median = statistics.median(result.seconds)
    rate = result.flops / median
    memory = "" if result.memory != result.memory else f"{result.memory:.1f}"
    off = [f"{value:.1e}" for value in result.deviations] + ["", ""]
    return (
        f"| {name} | {median:.3f} ({min(result.seconds):.3f} to {max(result.seconds):.3f}) | {args.batch / median:.3g} "
        f"| {before / median:.2f} | {rate / 1e12:.3f} | {rate / ceilings[result.dtype]:.0%} | {memory} "
        f"| {result.first:.0f} | {off[0]} | {off[1]} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["train", "gradient", "sample"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=250, help="network evaluations per image (sample)")
    parser.add_argument("--variants", default="released-no,eager-no,eager-bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", type=int, default=20, help="first steps compared; 0: nothing is compared")
    parser.add_argument("--profile", type=Path, help="file for where the time of each variant goes, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config, device = utils.load_config(args.config), torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py and eval.py do
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, as it is in matrix products
    torch.manual_seed(0)
    with device:  # where a GPU is, half a billion numbers are drawn at once
        nnet = build_network(config)
        for parameter in nnet.parameters():  # so that time, gates and norms do something
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    nnet.cpu()

    names = args.variants.split(",")
    ceilings = {dtype: matmul_ceiling(device, dtype) for dtype in {DTYPES[name.split("-")[1]] for name in names}}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, CPU"
    print(
        f"`python benchmarks/speed.py {' '.join(sys.argv[1:])}`\n\n{where}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start; Python "
        f"{platform.python_version()}, torch {torch.__version__}. {args.rounds} rounds, median (smallest to largest). "
        f"Ceilings: {', '.join(f'{str(dtype)[6:]} {rate / 1e12:.3g} TFLOP/s' for dtype, rate in ceilings.items())}.\n"
    )
    print(
        "| variant | seconds | images/s | ratio | TFLOP/s | of ceiling | peak GB | first s | outputs off | losses off |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    # Recomputing, for a GPU's memory.
    reference = checked(Variant("eager-no-all", nnet, args, config)) if args.losses else []
    gc.collect()
    before = None
    for together in [[name] for name in names] if device.type == "cuda" else [names]:
        try:
            results = measure([Variant(name, nnet, args, config) for name in together], args, reference)
        except torch.OutOfMemoryError:
            print(f"| {', '.join(together)} | out of memory |", flush=True)
            results = {}
        for name, result in results.items():
            before = before or statistics.median(result.seconds)
            print(row(name, result, args, before, ceilings), flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
