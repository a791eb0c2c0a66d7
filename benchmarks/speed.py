"""Training and sampling speed of a config's network beside the released recipe and DiT-XL/2, one table per run.

    python benchmarks/speed.py train --config=configs/DiMR-XL-2R_imagenet256.py --batch=64 \
        --variants=released-bf16,eager-bf16,blocks-bf16,blocks-bf16-all,dit_compiled-bf16
    python benchmarks/speed.py sample --config=configs/digits_released.py --batch=50 --steps=20 \
        --variants=released-no,eager-no

"train" times whole training steps (forward, backward, optimizer, EMA), "gradient" forward and backward alone, "sample"
guided sampling without decoding. A variant is WAY-PRECISION[-RECOMPUTE]. WAY: released (benchmarks/released_recipe.py),
eager, compiled (whole), blocks, dit or dit_compiled (diffusers' DiT-XL/2). PRECISION: no or bf16. RECOMPUTE: as
config.train.recompute.

On a CPU variants are timed in turn, a round at a time, so that a change of the machine's load falls on all of them; on
a GPU one after the other, as its memory need not hold all. Each is compared with the eager float32 network: its outputs
and, of "train", the losses of the first steps (--losses). "first" is the seconds of the first call, in which a network
is compiled. The ceiling is a large matmul in the same run. --profile=FILE appends where a GPU's time went.
"""

import collections
import copy
import gc
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from benchmarks.machine import describe_run
from benchmarks.released_recipe import ReleasedRecipe, two_pass_noise_model
from libs.compilation import compile_network, round_weights
from libs.launch import Parser, keep_freed_memory
from libs.model import build_network, loss_weights
from libs.optim import EMA, clip_or_skip, make_adamw
from libs.solvers import dpm_solver_fast

WAYS = {"eager": "off", "compiled": "whole", "blocks": "blocks"}  # of this code: how it is compiled
PEERS = ("dit", "dit_compiled")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}

KERNELS = {  # kinds of a GPU's kernels by their names, the first that fits
    "attention": "sdpa|flash|fmha|attention",
    "fused passes": "^triton_",
    "depthwise, convolutions": "conv|wgrad2d|dgrad2d|cudnn|implicit|nchw|nhwc|winograd",
    "matmuls": "gemm|nvjet|cutlass|splitK|cublas",
    "optimizer, EMA, norm": "multi_tensor_apply|foreach|lpnorm",
    "copies": "^Memcpy|^Memset",
}


class DiT(torch.nn.Module):
    """diffusers' DiT-XL/2-256, called as a DiMR; 750 M parameters, as every block embeds label and time anew."""

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.model = DiTTransformer2DModel(sample_size=32, num_layers=28, num_attention_heads=16, attention_head_dim=72)
        self.null_label = 1000

    def forward(self, x, t, y):
        time = (t * 1000).long().expand(len(x))
        return (self.model(x, timestep=time, class_labels=y, return_dict=False)[0][:, : x.shape[1]],)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Variant:
    """A network ready to be timed one way, and what was measured: `first`, `seconds`, `deviations`."""

    def __init__(self, name, nnet, args, config):
        self.name, self.args, self.config, self.device = name, args, config, torch.device(args.device)
        self.way, precision, *recompute = name.split("-")
        self.dtype, self.is_peer, sampling = DTYPES[precision], self.way in PEERS, args.task == "sample"
        self.schedule, self.weights = sde.get_schedule(config.schedule), loss_weights(config)
        self.seconds, self.deviations = [], []
        if self.is_peer:
            torch.manual_seed(0)
            self.nnet, self.weights = DiT(), (1.0,)
            if self.way == "dit_compiled":
                self.nnet.model.forward = torch.compile(self.nnet.model.forward, dynamic=False)
        else:
            self.nnet = ReleasedRecipe(nnet) if self.way == "released" else copy.deepcopy(nnet)
        self.nnet.to(self.device).train(not sampling)
        if self.way in WAYS:
            if sampling:
                round_weights(self.nnet, precision)
            compile_network(self.nnet, WAYS[self.way], sampling, *recompute)
        generator = torch.Generator().manual_seed(1)
        self.x, self.eps = torch.randn(2, args.batch, *config.z_shape, generator=generator).to(self.device)
        self.t = torch.rand(args.batch, generator=generator).to(self.device)
        self.y = (torch.arange(args.batch) % max(config.dataset.n_classes, 1)).to(self.device)
        self.run = {"train": self.step, "gradient": self.gradient, "sample": self.sample}[args.task]
        if args.task == "train":
            self.optimizer = make_adamw(self.nnet, 1e-4, (0.99, 0.99), 0.03)
            self.ema = EMA(torch.nn.ModuleList(self.nnet.children()), 0.9999)
            self.skipped = torch.zeros(2, device=self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def gradient(self):
        self.nnet.zero_grad()
        with self.autocast():
            predictions = self.nnet(self.x, self.t, self.y)
        loss = sde.multi_resolution_loss(predictions, self.eps, self.weights).mean()
        loss.backward()
        return loss.detach()

    def step(self):
        loss = self.gradient()
        clip_or_skip(self.optimizer, 0.0, self.skipped)
        self.optimizer.step()
        self.ema.update(1)
        if self.way == "released":
            loss.item()
        return loss

    @torch.no_grad()
    def sample(self):
        make = two_pass_noise_model if self.way == "released" else sde.guided_noise_model
        noise_model = make(self.nnet, self.schedule, self.y, self.nnet.null_label, 1.4)
        with self.autocast():
            return dpm_solver_fast(noise_model, self.schedule, self.x, self.args.steps, 3)

    def flops(self):
        """Operations of one `run` that the arithmetic needs: no recomputation, two per multiply-add."""
        with torch.device("meta"):
            inputs = self.x[:1].to("meta"), self.t[:1].to("meta"), self.y[:1].to("meta")
            plain = DiT() if self.is_peer else build_network(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(*inputs)
        passes = 2 * self.args.steps if self.args.task == "sample" else 3
        return counter.get_total_flops() * passes * self.args.batch

    def results(self):
        """Outputs (of "sample", images) and, of "train", the losses of the first steps. Sets `first`."""
        sampling, begun = self.args.task == "sample", time.perf_counter()
        with torch.set_grad_enabled(not sampling), self.autocast():  # the graph that is timed, and no other
            outputs = self.sample() if sampling else self.nnet(self.x, self.t, self.y)[-1]
            found = [outputs.detach().float().cpu()]
        self.first = time.perf_counter() - begun
        del outputs  # and the activations behind them
        if self.args.task == "train":
            found.append(torch.tensor([self.step().item() for _ in range(self.args.losses)]))
        return found

    def compare(self, reference):
        """Set `deviations` from the reference's results, over their largest value."""
        pairs = zip(self.results(), reference, strict=False)  # no reference: none
        self.deviations = [] if self.is_peer else [f"{(a - b).abs().max() / b.abs().max():.1e}" for a, b in pairs]


def matmul_ceiling(device, dtype):
    """FLOP/s of one large matmul, the best of three."""
    n, calls = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        wait(device)
        begun = time.perf_counter()
        for _ in range(calls):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - begun) / calls)
    return 2 * n**3 / min(seconds[1:])


def measure(variants, args, reference):
    """Time variants in turn, the first round not counted."""
    device = variants[0].device
    calls = 5 if device.type == "cuda" and args.task != "sample" else 1  # steps, as they come while training
    for variant in variants:
        variant.compare(reference)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(args.rounds + 1):
        for variant in variants:
            gc.collect()
            wait(device)
            begun = time.perf_counter()
            for _ in range(calls):
                variant.run()
            wait(device)
            if number:
                variant.seconds.append((time.perf_counter() - begun) / calls)


def profile(variant, file):
    """Append to a file where the GPU's time of one run goes: by `KERNELS`, and the kernels that take most of it."""
    wait(variant.device)
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        variant.run()
        wait(variant.device)
    seconds, averages = time.perf_counter() - begun, recorded.key_averages()
    sums, counts = collections.Counter(), collections.Counter()
    for kernel in averages:
        kind = next((kind for kind, words in KERNELS.items() if re.search(words, kernel.key)), "others")
        sums[kind] += kernel.self_device_time_total / 1e3
        counts[kind] += kernel.count
    busy = sum(sums.values())
    head = f"{variant.args.task} {variant.name}, batch {variant.args.batch}"
    lines = [f"{head}: {busy:.1f} ms of {seconds * 1e3:.1f} ms busy"]
    lines += [f"{ms:9.2f} ms {ms / busy:5.1%} {counts[kind]:6d} calls  {kind}" for kind, ms in sums.most_common()]
    largest = sorted(averages, key=lambda kernel: -kernel.self_device_time_total)[:40]
    lines += [f"{k.self_device_time_total / 1e3:9.3f} ms {k.count:5d} x {k.key[:150]}" for k in largest]
    with open(file, "a") as text:
        text.write("\n".join([*lines, "", ""]))


def row(variant, before, ceiling):
    """Write a line of the table; `before`: the median seconds of the variant that ratios are to."""
    seconds, batch, off = variant.seconds, variant.args.batch, [*variant.deviations, "", ""]
    median = statistics.median(seconds)
    rate = variant.flops() / median
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if variant.device.type == "cuda" else ""
    return (
        f"| {variant.name} | {median:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {batch / median:.3g} "
        f"| {before / median:.2f} | {rate / 1e12:.3f} | {rate / ceiling:.0%} | {memory} | {variant.first:.0f} "
        f"| {off[0]} | {off[1]} |"
    )


def main():
    parser = Parser(__doc__)
    parser.add_argument("task", choices=["train", "gradient", "sample"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=250, help="NFE per image (sample)")
    parser.add_argument("--variants", default="released-no,eager-no,eager-bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", type=int, default=20, help="first steps compared; 0: nothing is compared")
    parser.add_argument("--profile", type=Path, help="file for where the time of each variant goes, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config, device = utils.load_config(args.config), torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as train.py and eval.py do
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, as it is in matmuls
    torch.manual_seed(0)
    with device:  # where a GPU is, half a billion numbers are drawn at once
        nnet = build_network(config)
        for parameter in nnet.parameters():  # so that time, gates and norms do something
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    nnet.cpu()

    names = args.variants.split(",")
    ceilings = {dtype: matmul_ceiling(device, dtype) for dtype in {DTYPES[name.split("-")[1]] for name in names}}
    words = ", ".join(f"{str(dtype)[6:]} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings.items())
    print(f"{describe_run()}. {args.rounds} rounds, median (smallest to largest). Ceilings: {words}.\n")
    print(
        "| variant | seconds | images/s | ratio | TFLOP/s | of ceiling | peak GB | first s | outputs off | losses off |"
    )
    print("|---" * 10 + "|", flush=True)
    # With activation checkpointing, for a GPU's memory.
    reference = Variant("eager-no-all", nnet, args, config).results() if args.losses else []
    before = None

    def measure_and_print(names):
        nonlocal before
        variants = [Variant(name, nnet, args, config) for name in names]
        measure(variants, args, reference)
        for variant in variants:
            before = before or statistics.median(variant.seconds)
            print(row(variant, before, ceilings[variant.dtype]), flush=True)
            if args.profile and device.type == "cuda":
                profile(variant, args.profile)

    for together in [[name] for name in names] if device.type == "cuda" else [names]:
        try:
            measure_and_print(together)
        except torch.OutOfMemoryError:
            print(f"| {', '.join(together)} | out of memory |", flush=True)
        gc.collect()
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
