"""Training and sampling speed of a config's network beside the released recipe and DiT-XL/2, one table per run.

    python benchmarks/speed.py train --config=configs/DiMR-XL-2R_imagenet256.py --batch=64 \
        --variants=released-no,released-bf16,eager-bf16,compiled-bf16,compiled-bf16-recompute1,dit_compiled-bf16
    python benchmarks/speed.py gradient --config=configs/DiMR-XL-2R_imagenet256.py --batch=2 \
        --variants=released-no,eager-no
    python benchmarks/speed.py sample --config=configs/digits.py --batch=50 --steps=20 --variants=released-no,eager-no

"train" times whole training steps (forward, backward, optimiser, one average), "gradient" forward and backward alone,
"sample" guided sampling without decoding. A variant is WAY-PRECISION[-recomputeK[-products]][-triton]. WAY: released
(benchmarks/released_recipe.py); eager, compiled (whole), blocks, graphs (see config.sample.compile); dit, dit_compiled
(diffusers' DiT-XL/2 at its size). PRECISION: no, bf16 or fp16. triton: depthwise convolutions by the kernels of
libs/depthwise_kernels.py, on a GPU.
On a CPU variants are timed in turn, a round at a time, so that a change of the machine's load falls on all of them; on
a GPU one after the other, as its memory need not hold all. Each is compared with the eager float32 network: its outputs
and, of "train", the losses of the first 20 steps. The matrix-multiply ceiling is measured in the same run.
"""

import argparse
import contextlib
import copy
import gc
import os
import platform
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
from libs.ema import EMA
from libs.optim import clip_or_skip, make_adamw
from libs.program import keep_freed_memory
from libs.solvers import dpm_solver_fast

COMPILED = {"compiled": "whole", "blocks": "blocks", "graphs": "graphs"}
PEERS = ("dit", "dit_compiled")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = 20  # steps whose losses are compared


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
        ways = ("eager", *COMPILED) if "triton" in rest else ("released", "eager", *COMPILED, *PEERS)
        if way not in ways or precision not in DTYPES:
            raise SystemExit(f"error: no variant {name!r}: expected WAY-PRECISION[-recomputeK[-products]][-triton]")
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
        if "triton" in rest:
            rest.remove("triton")
            utils.choose_depthwise_kernel(self.nnet, "triton", f"the kernel of variant {name}", self.device)
        if rest and way in ("released", *PEERS):
            raise SystemExit(
                f"error: variant {name!r}: recomputation is a choice of eager, compiled, blocks and graphs only"
            )
        if rest:
            self.nnet.recompute(int(rest[0].removeprefix("recompute")), "products" in rest)
        if args.task == "sample" and way not in ("released", *PEERS):
            round_weights(self.nnet, precision)
        self.weights = (1.0,) if way in PEERS else utils.loss_weights(config)
        self.schedule = sde.get_schedule(config.schedule)
        if way in COMPILED:
            compile_network(self.nnet, COMPILED[way], final_weights=args.task == "sample")
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
        plain = DiT() if self.way in PEERS else utils.build_network(self.config)
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
    with torch.no_grad(), variant.autocast():
        outputs = variant.sample() if task == "sample" else variant.nnet(*inputs)[-1]
        found = [outputs.float().cpu()]  # at once: the next run of a CUDA graph writes over them
    if task == "train":
        found.append(torch.tensor([variant.step().item() for _ in range(LOSSES)]))
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


def measure(variants, rounds, reference):
    """{name: Result} of variants that are timed in turn, the first round not counted."""
    on_gpu = variants[0].device.type == "cuda"
    in_a_row = 5 if on_gpu and variants[0].args.task != "sample" else 1  # steps, as they come while training
    results = {}
    for variant in variants:
        found = [] if variant.way in PEERS else checked(variant)
        deviations = [deviation(*pair) for pair in zip(found, reference, strict=False)]
        results[variant.name] = Result([], float("nan"), deviations, variant.flops(), variant.dtype)
    for number in range(rounds + 1):
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
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["train", "gradient", "sample"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=250, help="network evaluations per image (sample)")
    parser.add_argument("--variants", default="released-no,eager-no,eager-bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config, device = utils.load_config(args.config), torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py and eval.py do
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, as it is in matrix products
    torch.manual_seed(0)
    nnet = utils.build_network(config)
    for parameter in nnet.parameters():  # so that time, gates and norms do something
        parameter.data.add_(torch.randn_like(parameter) * 0.02)

    reference = checked(Variant("eager-no-recompute1", nnet, args, config))  # recomputing: for a GPU's memory
    gc.collect()
    names = args.variants.split(",")
    results = {}
    for together in [[name] for name in names] if device.type == "cuda" else [names]:
        results |= measure([Variant(name, nnet, args, config) for name in together], args.rounds, reference)
        torch._dynamo.reset()

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, CPU"
    print(
        f"`python benchmarks/speed.py {' '.join(sys.argv[1:])}`\n\n{where}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the end; Python "
        f"{platform.python_version()}, torch {torch.__version__}. {args.rounds} rounds, median (smallest to largest).\n"
    )
    print("| variant | seconds | images/s | ratio | TFLOP/s | share of ceiling | peak GB | outputs off | losses off |")
    print("|---|---|---|---|---|---|---|---|---|")
    ceilings = {dtype: matmul_ceiling(device, dtype) for dtype in {result.dtype for result in results.values()}}
    first = statistics.median(results[names[0]].seconds)
    for name, result in results.items():
        median = statistics.median(result.seconds)
        rate = result.flops / median
        memory = f"{result.memory:.1f}" if device.type == "cuda" else ""
        off = [f"{value:.1e}" for value in result.deviations] + ["", ""]
        print(
            f"| {name} | {median:.3f} ({min(result.seconds):.3f} to {max(result.seconds):.3f}) "
            f"| {args.batch / median:.3g} | {first / median:.2f} | {rate / 1e12:.3f} "
            f"| {rate / ceilings[result.dtype]:.0%} | {memory} | {off[0]} | {off[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
