"""Time of depthwise convolutions on a GPU: PyTorch's in both layouts and the Triton kernels, one table per run.

    python benchmarks/kernels.py

For the convolutions of the released models: the forward pass, the gradient of the input and that of weights and bias.
In bfloat16, and the Triton kernels in float32 too: so they get the features of blocks before the middle, whose residual
stream is float32 (PyTorch's convolution gets a rounded copy of those). GB/s is of the bytes that a pass cannot do
without (two arrays of features, read or written), beside the bandwidth of a plain copy measured in the same run. The
deviation is the largest difference from float32's results over their largest value. The Triton kernels keep weights in
float32; PyTorch gets them in bfloat16, as autocast hands them.
"""

import argparse
import platform
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from einops import rearrange

from libs import depthwise

SIZES = {  # (B, h, w, D): the branches of ConvNeXt blocks
    "XL/2R, 64 images": (64, 32, 32, 480),
    "XL/2R, 256 images": (256, 32, 32, 480),
    "G/2R, 64 images": (64, 32, 32, 576),
    "XL/3R, finest, 64 images": (64, 64, 64, 240),
}
WAYS = ("PyTorch, channels last", "PyTorch, contiguous", "Triton")
TIMED = [(way, torch.bfloat16) for way in WAYS] + [("Triton", torch.float32)]
KERNEL_SIZE = 7
SETS = 3  # of inputs, taken in turn, so that none is still in the cache
CALLS = 10  # timed together


def passes(way, x, grad, weight, bias):
    """{pass: function} of one way for features (B, h, w, D); results are in its own shapes (see `alike`)."""
    k = weight.shape[-1]
    if way == "Triton":
        taps = rearrange(weight, "D 1 ky kx -> (ky kx) D").contiguous()
        return {
            "forward": lambda: depthwise.convolve(x, taps, bias, False, False),
            "input gradient": lambda: depthwise.convolve(grad, taps, None, False, True),
            "weight gradient": lambda: depthwise.weight_gradient(x, grad, k),
        }
    x, grad = (rearrange(a, "B h w D -> B D h w") for a in (x, grad))
    if way == "PyTorch, contiguous":
        x, grad = x.contiguous(), grad.contiguous()
    weight, bias, dim = weight.to(x.dtype), bias.to(x.dtype), len(weight)

    def backward(*mask):
        p = k // 2
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [dim], [1, 1], [p, p], [1, 1], False, [0, 0], dim, mask
        )

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, weight, bias, padding=k // 2, groups=dim),
        "input gradient": lambda: backward(True, False, False)[0],
        "weight gradient": lambda: backward(False, True, True)[1:],
    }


def alike(way, name, result):
    """A result of `passes` in one form, float32: features (B, h, w, D), weights and bias (k k + 1, D)."""
    if way != "Triton" and name == "weight gradient":
        weight, bias = result
        result = torch.cat([rearrange(weight, "D 1 ky kx -> (ky kx) D"), bias[None]])
    elif way != "Triton":
        result = rearrange(result, "B D h w -> B h w D")
    return result.float()


def make_inputs(shape, device, dtype, seed, k=KERNEL_SIZE):
    """Random features and gradients (B, h, w, D) in `dtype`, weights (D, 1, k, k) and bias (D,) in float32."""
    generator, dim = torch.Generator(device).manual_seed(seed), shape[-1]
    x, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(dim, 1, k, k, generator=generator, device=device) / k
    return x, grad, weight, torch.randn(dim, generator=generator, device=device)


def timed(functions, rounds):
    """Seconds per call, one number a round, of functions that are called in turn."""
    seconds = []
    for number in range(rounds + 2):  # the first two warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # some 10 ms, in which the host queues the calls: its time is not measured
        begin.record()
        for call in range(CALLS):
            functions[call % len(functions)]()
        end.record()
        end.synchronize()
        if number >= 2:
            seconds.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return seconds


def copy_bandwidth(rounds):
    """Bytes per second, read and written, of a copy of a GiB."""
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / statistics.median(timed([lambda: b.copy_(a)], rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", default="", help="only those with these words in their name, such as XL/2R")
    args = parser.parse_args()
    if not torch.cuda.is_available() or depthwise.kernels is None:
        raise SystemExit("error: times kernels on a GPU; found no CUDA device, or no triton")
    torch.backends.cudnn.allow_tf32 = False  # for the reference
    torch.backends.cudnn.benchmark = True  # PyTorch's best, as a search over cuDNN's algorithms finds it
    bandwidth = copy_bandwidth(args.rounds)
    print(
        f"`python benchmarks/kernels.py {' '.join(sys.argv[1:])}`\n\n{torch.cuda.get_device_name()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s. "
        f"{KERNEL_SIZE}x{KERNEL_SIZE}, {args.rounds} rounds of {CALLS} calls, median (smallest to largest).\n"
    )
    print("| size | pass | way | microseconds | GB/s | share of the copy's | deviation |")
    print("|---|---|---|---|---|---|---|")
    for title, shape in SIZES.items():
        if args.sizes not in title:
            continue
        sets = [make_inputs(shape, "cuda", torch.bfloat16, seed) for seed in range(SETS)]
        x, grad, weight, bias = sets[0]
        exact = passes(WAYS[1], x.float(), grad.float(), weight, bias)
        for name in exact:
            reference = alike(WAYS[1], name, exact[name]())
            for way, dtype in TIMED:
                functions = [passes(way, x.to(dtype), g.to(dtype), w, b)[name] for x, g, w, b in sets]
                found = alike(way, name, functions[0]())
                difference = ((found - reference).abs().max() / reference.abs().max()).item()
                times = [1e6 * second for second in timed(functions, args.rounds)]
                median = statistics.median(times)
                rate = 2 * x.numel() * dtype.itemsize / (median / 1e6)
                print(
                    f"| {title} | {name} | {way}, {str(dtype)[6:]} "
                    f"| {median:.1f} ({min(times):.1f} to {max(times):.1f}) "
                    f"| {rate / 1e9:.0f} | {rate / bandwidth:.0%} | {difference:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
