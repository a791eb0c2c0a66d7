"""The parts of a step of XL/2R on a GPU, each timed alone and printed at once: a step of these and no more.

    python benchmarks/parts.py --batch=64

Matmuls of every shape (forward, and the two of backward), attention by each of PyTorch's backends, the convolutions as
cuDNN's rules and as its search choose them, optimizer and EMA; beside the ceilings of a large matmul and a large copy.
Takes half a minute. On a CPU (--device=cpu --batch=1) it only shows that it runs.
"""

import itertools
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from benchmarks.machine import describe_run
from benchmarks.speed import matmul_ceiling, wait
from libs.autoencoder_files import SD_CONFIG
from libs.launch import Parser
from libs.model import build_empty_network
from libs.optim import clip_or_skip, make_adamw

ROOT = Path(__file__).resolve().parents[1]
TOKENS, CELLS, COARSE = 257, 1024, 256
MATMULS = [  # name, how many in a forward pass, rows per image, inputs, outputs
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


def timed(function, *args):
    """Milliseconds per call: on a GPU the mean of calls that the host queues, after two that warm up."""
    on_gpu = torch.cuda.is_available()
    device, calls = (torch.device("cuda"), 30) if on_gpu else (torch.device("cpu"), 1)
    for _ in range(2 * on_gpu):
        function(*args)
    wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        function(*args)
    wait(device)
    return 1e3 * (time.perf_counter() - begun) / calls


def say(*words):
    print(*words, flush=True)


def matmuls(batch, device):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    total, operations = 0.0, 0.0
    for name, number, rows, inputs, outputs in MATMULS:
        m = batch * rows
        x, w, g, bias = draw(m, inputs), draw(outputs, inputs), draw(m, outputs), draw(outputs)
        ms = [timed(F.linear, x, w, bias), timed(torch.mm, g, w), timed(torch.mm, g.T, x)]
        flops = 2 * m * inputs * outputs
        total, operations = total + number * sum(ms), operations + 3 * number * flops
        rates = ", ".join(f"{t:.3f} ms {flops / t / 1e9:.0f}" for t in ms)
        say(f"{name:20s} x{number:<3d} {m} x {inputs} -> {outputs}: {rates} TFLOP/s (forward, of input, of weights)")
    say(f"all matmuls of a training step: {total:.1f} ms, {operations / total / 1e9:.0f} TFLOP/s")


def attend(backend, qkv):
    """Attention of (B, N, 3, heads, d) by a backend; None: as PyTorch chooses."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, scale=60**-0.5)


def attention(batch, device):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for d in (64, 60):
        qkv, along = draw(batch, TOKENS, 3, 16, d, requires_grad=True), draw(batch, TOKENS, 16, d).transpose(1, 2)
        for backend in [None, *BACKENDS]:
            title = f"attention, heads of {d}, {backend.name if backend else 'as PyTorch chooses'}"
            try:
                with torch.no_grad():
                    one = timed(attend, backend, qkv)
                two = timed(lambda: torch.autograd.grad(attend(backend, qkv), qkv, along))  # noqa: B023
                name = type(attend(backend, qkv).grad_fn).__name__
                say(f"{title}: forward {one:.3f} ms, with backward {two:.3f}, x39 {39 * two:.1f} ms ({name})")
            except RuntimeError as error:
                say(f"{title}: {str(error).splitlines()[0][:120]}")


def gradients_of_attention(*leaves, along):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, along.to(leaves[0].dtype))


def attention_gradients(batch, device):
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


def gradients_of_convolution(grad, x, weight, groups=1, of_x=True, of_weight=True):
    padding = [weight.shape[-1] // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups, [of_x, of_weight, False]
    )


def convolutions(batch, device):
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    image, grad = (draw(batch, 32, 32, 480).permute(0, 3, 1, 2) for _ in range(2))
    depthwise, head, patch, small = (
        draw(480, 1, 7, 7) / 7,
        draw(4, 480, 3, 3),
        draw(480, 4, 1, 1),
        draw(batch, 4, 32, 32),
    )
    for search in (False, True):
        torch.backends.cudnn.benchmark = search
        ms = [
            timed(partial(F.conv2d, padding=3, groups=480), image, depthwise),
            timed(gradients_of_convolution, grad, image, depthwise, 480, True, False),
            timed(gradients_of_convolution, grad, image, depthwise, 480, False, True),
        ]
        say(
            f"depthwise, cuDNN's {'search' if search else 'rules'}: forward {ms[0]:.3f}, of input {ms[1]:.3f}, of "
            f"weights {ms[2]:.3f} ms, x21 {21 * sum(ms):.1f} ms"
        )
        ms = [timed(partial(F.conv2d, padding=1), image, head), timed(gradients_of_convolution, small, image, head)]
        ms.append(timed(F.conv2d, small, patch))
        say(f"head 480 -> 4: forward {ms[0]:.3f}, gradients {ms[1]:.3f} ms; patches 4 -> 480: {ms[2]:.3f} ms")
    torch.backends.cudnn.benchmark = False


def decoding(batch, device):
    decoder = AutoencoderKL(**SD_CONFIG).to(device)
    latents = torch.randn(batch, 4, 32, 32, device=device)
    with torch.no_grad():
        ms = timed(decoder.decode, latents)
    say(f"Stable Diffusion's decoder, {batch} images of 256x256, float32 (TF32): {ms:.0f} ms")


def memory_and_optimizer(batch, device):
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
    say(f"gradient norm {norm:.2f}, AdamW {step:.2f}, EMA {averaging:.2f} ms")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    say(f"{describe_run()}; cuDNN {torch.backends.cudnn.version()}")
    say(f"ceiling: a large bf16 matmul {matmul_ceiling(device, torch.bfloat16) / 1e12:.3g} TFLOP/s")
    for part in (attention, attention_gradients, matmuls, convolutions, decoding, memory_and_optimizer):
        try:
            part(args.batch, device)
        except RuntimeError as error:  # the other parts all the same
            say(f"{part.__name__}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
