"""The parts of a step of XL/2R on a GPU, each timed alone and printed at once: a step of these and no more.

    python benchmarks/parts.py --batch=64

Matrix products of every shape (forward, and the two of backward), attention by each of PyTorch's backends, the
convolutions as cuDNN's rules and as its search choose them, optimiser and average; beside the ceilings of a large
product and a large copy. Takes half a minute. On a CPU (--device=cpu --batch=1) it only shows that it runs.
"""

import argparse
import itertools
import platform
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from benchmarks.speed import matmul_ceiling
from libs.autoencoder import SD_CONFIG
from libs.depthwise import depthwise_conv, depthwise_gradients
from libs.model import build_empty_network
from libs.optim import clip_or_skip, make_adamw

ROOT = Path(__file__).resolve().parents[1]
TOKENS, CELLS, COARSE = 257, 1024, 256
PRODUCTS = [  # name, how many in a forward pass, rows per image, inputs, outputs
    ("qkv, heads of 64", 39, TOKENS, 960, 3072),
    ("out", 39, TOKENS, 1024, 960),
    ("gated MLP, in", 39, TOKENS, 960, 3840),
    ("gated MLP, out", 39, TOKENS, 1920, 960),
    ("skip", 19, TOKENS, 1920, 960),
    ("upsampling", 1, COARSE, 38400, 1920),
    ("fine gated MLP, in", 21, CELLS, 480, 1920),
    ("fine gated MLP, out", 21, CELLS, 960, 480),
    ("fine skip", 10, CELLS, 960, 480),
]
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
CALLS = 5  # timed together


class Timer:
    """Milliseconds per call, the median of a few rounds; the first warms up. On a GPU the host's time is not in it."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"

    def __call__(self, function, *args, rounds=6):
        times = []
        for number in range(rounds + 1 if self.on_gpu else 2):
            if not self.on_gpu:
                begun = time.perf_counter()
                function(*args)
                times.append(1e3 * (time.perf_counter() - begun))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if number:
                torch.cuda._sleep(8_000_000)  # some 4 ms, in which the host queues the calls
            begin.record()
            for _ in range(CALLS):
                function(*args)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / CALLS)
        return statistics.median(times[1:])


def say(*words):
    print(*words, flush=True)


def facts(device):
    say(f"python {platform.python_version()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    if device.type == "cuda":
        say(torch.cuda.get_device_properties(device), f"{torch.cuda.mem_get_info()[0] / 1e9:.1f} GB free")
    say({name: shutil.which(name) for name in ("gcc", "cc", "nvcc", "ptxas")})


def products(batch, device, timed):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    total, operations = 0.0, 0.0
    for name, number, rows, inputs, outputs in PRODUCTS:
        m = batch * rows
        x, w, g, bias = draw(m, inputs), draw(outputs, inputs), draw(m, outputs), draw(outputs)
        ms = [timed(F.linear, x, w, bias), timed(torch.mm, g, w), timed(torch.mm, g.T, x)]
        flops = 2 * m * inputs * outputs
        total, operations = total + number * sum(ms), operations + 3 * number * flops
        rates = ", ".join(f"{t:.3f} ms {flops / t / 1e9:.0f}" for t in ms)
        say(f"{name:20s} x{number:<3d} {m} x {inputs} -> {outputs}: {rates} TFLOP/s (forward, of input, of weights)")
    say(f"all products of a training step: {total:.1f} ms, {operations / total / 1e9:.0f} TFLOP/s")


def attend(backend, qkv):
    """Attention of (B, N, 3, heads, d) by a backend; None: as PyTorch chooses."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, scale=60**-0.5)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=60**-0.5)


def attend_and_back(backend, qkv, along):
    return torch.autograd.grad(attend(backend, qkv), qkv, along)


def attention(batch, device, timed):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for d in (64, 60):
        qkv, along = draw(batch, TOKENS, 3, 16, d, requires_grad=True), draw(batch, TOKENS, 16, d).transpose(1, 2)
        for backend in [None, *BACKENDS]:
            title = f"attention, heads of {d}, {backend.name if backend else 'as PyTorch chooses'}"
            try:
                with torch.no_grad():
                    one = timed(attend, backend, qkv)
                two = timed(attend_and_back, backend, qkv, along)
                name = type(attend(backend, qkv).grad_fn).__name__
                say(f"{title}: forward {one:.3f} ms, with backward {two:.3f}, x39 {39 * two:.1f} ms ({name})")
            except RuntimeError as error:
                say(f"{title}: {str(error).splitlines()[0][:120]}")


def gradients_of_attention(*leaves, along):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, along.to(leaves[0].dtype))


def attention_gradients(batch, device, timed):
    """Each backend's against float32's: plain inputs, and logits all about -120, where cuDNN has been wrong."""
    for tokens, lowered in itertools.product((TOKENS, 65, 577, 1025, 192, 63), (0, 120)):
        parts = [torch.randn(2, 16, tokens, 64, device=device) for _ in range(4)]
        if lowered:
            parts[0][..., 0], parts[1][..., 0] = 1.0, -8.0 * lowered
        q, k, v, along = (part.bfloat16() for part in parts)
        with sdpa_kernel(SDPBackend.MATH):
            exact = gradients_of_attention(q.float(), k.float(), v.float(), along=along)
        for backend in BACKENDS:
            title = f"attention's gradients, {tokens} tokens, logits lowered by {lowered}, {backend.name}"
            try:
                with sdpa_kernel(backend):
                    found = [gradient.float() for gradient in gradients_of_attention(q, k, v, along=along)]
            except RuntimeError:
                continue  # not there, as said above
            off = [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(found, exact, strict=True)]
            bad = sum((~gradient.isfinite()).sum().item() for gradient in found)
            say(f"{title}: off by {', '.join(off)} (q, k, v); {bad} numbers not finite")


def gradients_of_head(grad, image, weight):
    return torch.ops.aten.convolution_backward(
        grad, image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )


def convolutions(batch, device, timed):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, grad, weight = draw(batch, 32, 32, 480), draw(batch, 32, 32, 480), draw(480, 1, 7, 7) / 7
    image, small, head, patch = x.permute(0, 3, 1, 2), draw(batch, 4, 32, 32), draw(4, 480, 3, 3), draw(480, 4, 1, 1)
    for search in (False, True):
        torch.backends.cudnn.benchmark = search
        ms = [
            timed(depthwise_conv, x, weight),
            timed(depthwise_gradients, grad, x, weight, True, False),
            timed(depthwise_gradients, grad, x, weight, False, True),
        ]
        say(
            f"depthwise, cuDNN's {'search' if search else 'rules'}: forward {ms[0]:.3f}, of input {ms[1]:.3f}, of "
            f"weights {ms[2]:.3f} ms, x21 {21 * sum(ms):.1f} ms"
        )
        ms = [timed(partial(F.conv2d, padding=1), image, head), timed(gradients_of_head, small, image, head)]
        ms.append(timed(F.conv2d, small, patch))
        say(f"head 480 -> 4: forward {ms[0]:.3f}, gradients {ms[1]:.3f} ms; patches 4 -> 480: {ms[2]:.3f} ms")
    torch.backends.cudnn.benchmark = False


def decoding(batch, device, timed):
    decoder = AutoencoderKL(**SD_CONFIG).to(device)
    latents = torch.randn(batch, 4, 32, 32, device=device)
    with torch.no_grad():
        ms = timed(decoder.decode, latents, rounds=1)
    say(f"Stable Diffusion's decoder, {batch} images of 256x256, float32 (TF32): {ms:.0f} ms")


def memory_and_optimizer(batch, device, timed):
    config = utils.load_config(ROOT / "configs/DiMR-XL-2R_imagenet256.py")
    if device.type == "cpu":  # only to see that it runs
        for stage in config.nnet.stages:
            stage.depth = 1
    source = torch.randn(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    ms = timed(target.copy_, source)
    say(f"copy of {source.nbytes / 2**30:.3g} GiB: {2 * source.nbytes / ms / 1e9:.2f} TB/s read and written")
    del source, target
    nnet = build_empty_network(config, device)
    for parameter in nnet.parameters():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter) * 1e-3
    weights = [parameter.detach() for parameter in nnet.parameters()]
    average = [weight.clone() for weight in weights]
    optimizer, skipped = make_adamw(nnet, 1e-4, (0.99, 0.99), 0.03), torch.zeros(2, device=device)
    norm, step = timed(clip_or_skip, optimizer, 0.0, skipped), timed(optimizer.step)
    averaging = timed(torch._foreach_lerp_, average, weights, 1e-4)
    say(f"gradient norm {norm:.2f}, AdamW {step:.2f}, average {averaging:.2f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="these parts, by their functions' names, separated by commas")
    args = parser.parse_args()
    device = torch.device(args.device)
    timed = Timer(device)
    facts(device)
    say(f"ceiling: a large bf16 product {matmul_ceiling(device, torch.bfloat16) / 1e12:.3g} TFLOP/s")
    for part in (attention, attention_gradients, products, convolutions, decoding, memory_and_optimizer):
        if args.only and part.__name__ not in args.only.split(","):
            continue
        try:
            part(args.batch, device, timed)
        except RuntimeError as error:  # the other parts all the same
            say(f"{part.__name__}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
