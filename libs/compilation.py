"""Speed up a network without changing its results: faster forms of its layers, torch.compile, activation checkpointing.

All of it is applied to a network from outside, in place. A faster form has the signature of the forward method that it
replaces, which is its reference: the same numbers to round-off, values and gradients (tests/test_compile.py).

Axes: B batch, h w grid, D channels (adjacent in memory), N tokens, k taps along a side of a kernel (odd).
"""

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from absl import logging
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from libs.dimr import Attention, DepthwiseConv, DiMR, GatedMLP, LongSkip, Upsample
from libs.norms import LAYER_NORM_EPS, at_least_float32, per_sample

COMPILE = ("auto", "whole", "blocks", "off")

# --- Depthwise convolution as one operation ---------------------------------------------------------------------------


def as_image_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a grid with zeros around it: (B, h, w, D), weight (D, 1, k, k) -> (B, h, w, D).

    Seen as an image, channels-last features are in the layout that F.conv2d wants already.
    """
    dim, _, k, _ = weight.shape
    y = F.conv2d(rearrange(x, "B h w D -> B D h w"), weight, padding=k // 2, groups=dim)
    return rearrange(y, "B D h w -> B h w D")


@torch.library.custom_op("dimr::depthwise", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `as_image_convolution` out of torch.compile's sight: it would copy features to other layouts."""
    return as_image_convolution(x.contiguous(), weight).contiguous()


@torch.library.custom_op("dimr::depthwise_gradients", mutates_args=())
def depthwise_gradients(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    """Compute the gradients of x and the weights; an empty tensor for one that is not asked for."""
    grad, x, nothing = grad.contiguous(), x.contiguous(), x.new_empty(0)
    if x.device.type == "cpu":
        return [
            as_image_convolution(grad, weight.flip(2, 3)).contiguous() if of_x else nothing,
            weight_gradient_on_cpu(grad, x, weight) if of_weight else nothing,
        ]
    dim, _, k, _ = weight.shape
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(rearrange(a, "B h w D -> B D h w") for a in (grad, x)),
        *(weight, None, [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], dim, [of_x, of_weight, False]),
    )
    return [
        rearrange(grad_x, "B D h w -> B h w D").contiguous() if of_x else nothing,
        grad_weight.flatten().view(weight.shape) if of_weight else nothing,  # with the strides of the weights
    ]


def weight_gradient_on_cpu(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute the weight gradient as a convolution of x by grad, a kernel as large as the grid for each channel.

    On a CPU oneDNN's own takes several times as long, most of all in bfloat16.
    """
    dim, _, k, _ = weight.shape
    images = rearrange(at_least_float32(x), "B h w D -> 1 (B D) h w")
    kernels = rearrange(at_least_float32(grad), "B h w D -> (B D) 1 h w")
    taps = F.conv2d(images, kernels, padding=k // 2, groups=len(kernels))
    return rearrange(taps, "1 (B D) ky kx -> B D 1 ky kx", D=dim).sum(0).to(weight.dtype)


@depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@depthwise_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor]:
    return [x.new_empty(x.shape if of_x else 0), x.new_empty(weight.shape if of_weight else 0)]


def keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def depthwise_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = depthwise_gradients(grad, *ctx.saved_tensors, *needed)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


depthwise_conv.register_autograd(depthwise_backward, setup_context=keep_inputs)


# --- Faster forms when compiled ---------------------------------------------------------------------------------------


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a matmul takes x: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def joined_gated_mlp(self: GatedMLP, x: Tensor, t: Tensor) -> Tensor:
    """Compute GatedMLP.forward with one matmul for both inputs of the gate: z and its gradient are read once."""
    z = self.norm(x, t)
    weight, bias = (torch.cat([getattr(layer, name) for layer in (self.w0, self.w1)]) for name in ("weight", "bias"))
    a, b = F.linear(z, weight, bias).chunk(2, dim=-1)
    return self.w2(F.gelu(a) * b)


def padded_attention(self: Attention, x: Tensor, t: Tensor) -> Tensor:
    """Compute Attention.forward with heads padded to a multiple of 8 by rows of zeros in the weights.

    GPU kernels need such heads; PyTorch would pad and copy the features. XL's heads of 60, on an H100 at batch 64,
    forward and backward of 39 layers: 50.2 ms as they are, 25.8 ms padded (benchmarks/parts.py).
    """
    heads, d = self.num_heads, self.out.in_features // self.num_heads
    into = F.pad(self.qkv.weight.unflatten(0, (3, heads, d)), (0, 0, 0, -d % 8)).flatten(0, 2)
    q, k, v = rearrange(F.linear(self.norm(x, t), into), "B N (three h d) -> three B h N d", three=3, h=heads)
    z = rearrange(F.scaled_dot_product_attention(q, k, v, scale=d**-0.5), "B h N d -> B N (h d)")
    back = F.pad(self.out.weight.unflatten(1, (heads, d)), (0, -d % 8)).flatten(1)
    return F.linear(z, back, self.out.bias)


def rounded_long_skip(self: LongSkip, x: Tensor, skip: Tensor) -> Tensor:
    """Compute LongSkip.forward, rounding before the copy side by side: fewer bytes, the same numbers."""
    dtype = matmul_dtype(x)
    return F.linear(torch.cat([x.to(dtype), skip.to(dtype)], dim=-1), self.weight, self.bias)


def upsample_by_parts(self: Upsample, features: list[Tensor], t: Tensor) -> Tensor:
    """Compute Upsample.forward without a float32 copy of all features side by side (38,400 channels in XL).

    Mean and variance are summed part by part; variance is mean square less squared mean, which loses digits where a
    mean is far larger than the spread.
    """
    dtype = matmul_dtype(features[0])
    parts = [at_least_float32(feature) for feature in features]
    mean, square = (sum(x.pow(p).mean(dim=-1, keepdim=True) for x in parts) / len(parts) for p in (1, 2))
    inverse = torch.rsqrt((square - mean.square()).clamp_min(0) + LAYER_NORM_EPS)
    gains, shifts = (
        per_sample(v(t), parts[0]).chunk(len(parts), dim=-1) for v in (self.norm_in.weight, self.norm_in.bias)
    )

    def normalized(mean: Tensor, inverse: Tensor) -> list[Tensor]:
        return [((x - mean) * inverse * g + s).to(dtype) for x, g, s in zip(parts, gains, shifts, strict=True)]

    # Checkpointed, or float32 copies of the parts less their mean would be kept for the backward pass.
    z = torch.cat(checkpoint(normalized, mean, inverse, use_reentrant=False, preserve_rng_state=False), dim=-1)
    z = rearrange(self.proj(z), "B h w (a b D) -> B (h a) (w b) D", a=self.ratio, b=self.ratio)
    return self.norm_out(z, t)


def opaque_depthwise(self: DepthwiseConv, x: Tensor) -> Tensor:
    """Compute DepthwiseConv.forward as one operation, which the compiler neither looks into nor lays out anew."""
    dtype = matmul_dtype(x)
    return depthwise_conv(x.to(dtype), self.weight.to(dtype)) + self.bias.to(dtype)


# --- Faster forms on a CPU --------------------------------------------------------------------------------------------

FEW_TOKENS = 64  # up to these, PyTorch's attention gains nothing and keeps the compiler from fusing


def cpu_attention(self: Attention, x: Tensor, t: Tensor) -> Tensor:
    """Compute Attention.forward in float32: PyTorch's 16-bit kernel takes many times as long in the backward pass."""
    qkv = self.qkv(self.norm(x, t))
    q, k, v = rearrange(at_least_float32(qkv), "B N (three h d) -> three B h N d", three=3, h=self.num_heads)
    with torch.autocast("cpu", enabled=False):
        if q.shape[-2] > FEW_TOKENS:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return self.out(rearrange(z.to(qkv.dtype), "B h N d -> B N (h d)"))


def cpu_depthwise(self: DepthwiseConv, x: Tensor) -> Tensor:
    """Compute DepthwiseConv.forward with a faster weight gradient; without gradients the compiler had better see it."""
    return opaque_depthwise(self, x) if torch.is_grad_enabled() else DepthwiseConv.forward(self, x)


# --- All of it, applied to a network ----------------------------------------------------------------------------------

Forms = dict[type[nn.Module], Callable[..., Tensor]]
CPU_FORMS: Forms = {Attention: cpu_attention, DepthwiseConv: cpu_depthwise}
COMPILED_FORMS: Forms = {GatedMLP: joined_gated_mlp, LongSkip: rounded_long_skip, Upsample: upsample_by_parts}
COMPILED_GPU_FORMS: Forms = {Attention: padded_attention, DepthwiseConv: opaque_depthwise}


def use_forms(nnet: nn.Module, forms: Forms) -> None:
    """Replace the forward method of each layer that `forms` has one for."""
    for module in nnet.modules():
        if type(module) in forms:
            module.forward = types.MethodType(forms[type(module)], module)


def choose_compile(how: str, device: torch.device) -> str:
    """Return what auto of `COMPILE` stands for: blocks on GPUs, off on CPUs."""
    return how if how != "auto" else "off" if device.type == "cpu" else "blocks"


def compile_network(nnet: DiMR, how: str, final_weights: bool = False, recompute: str = "off") -> None:
    """Use the faster forms for the network's device, activation checkpointing and torch.compile.

    Compiling happens at the first call of each shape, without graph breaks.

    Args:
        how: whole (one graph), blocks (each block by itself: compiles sooner, blocks of a branch share their code) or
            off.
        final_weights: for sampling: weights change no more and no gradient is asked for. Every process then compiles
            to the same kernels (by default the compiler chooses among reductions by timing them), so that the images
            are the same from any number of processes. On a CPU a whole network lays its weights out once.
        recompute: see `checkpoint_activations`.
    """
    on_cpu = next(nnet.parameters()).device.type == "cpu"
    if not on_cpu:
        avoid_wrong_attention(nnet)
    if how != "off":
        use_forms(nnet, COMPILED_FORMS | ({} if on_cpu else COMPILED_GPU_FORMS))
    use_forms(nnet, CPU_FORMS if on_cpu else {})
    checkpoint_activations(nnet, recompute)
    if how == "off":
        return
    logging.info("torch.compile (%s): the first call takes minutes for a large network", how)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = 64  # branches share code, compiled once for each way of calling it
    parts = [nnet]
    if how == "blocks":
        dynamo.optimize_ddp = False  # or blocks would be cut again, to send their gradients sooner
        parts = [stage.upsample for stage in nnet.stages[1:]]
        for stage in nnet.stages:
            parts += [*stage.blocks, *stage.skips, stage.head]
    options = {"deterministic": True} if final_weights else None
    for module in parts:
        # The forward method and not the module, whose hooks (DDP's, FSDP's) stay outside.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)
    if how == "whole" and final_weights and on_cpu:
        nnet.forward = with_frozen_weights(nnet.forward)


def avoid_wrong_attention(nnet: DiMR) -> None:
    """Turn off cuDNN's attention, PyTorch's fastest, for this process where it is wrong for one of the branches.

    Its gradients are NaN at 64 tokens modulo 128 (pytorch issue 196678; seen with cuDNN 9.19 on an H100:
    benchmarks/results/gpu.md).
    """
    tokens = [1 + s.spec.max_height * s.spec.max_width for s in nnet.stages if s.class_embed is not None]
    if any(n % 128 == 64 for n in tokens):
        torch.backends.cuda.enable_cudnn_sdp(False)


def with_frozen_weights(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Let a compiled function prepack its weights for its matmuls, and call its kernels from C++.

    Compiled so, two CPU cores sample the digits 1.8 times as fast as the released recipe (benchmarks/results/speed.md).
    """

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Read as a call compiles; freezing is no option of torch.compile.
        inductor = torch._inductor.config
        with inductor.patch(freezing=True, cpp_wrapper=True):
            return forward(*inputs)

    return call


def round_weights(nnet: nn.Module, precision: str) -> None:
    """Round the weights of matmuls to 16 bits once, as autocast would at every call: the same numbers.

    For a network that is sampled with, always within autocast. `precision` is accelerate's: no, bf16 or fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for module in nnet.modules() if dtype else ():
        for name, weight in module.named_parameters(recurse=False) if isinstance(module, nn.Linear) else ():
            setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad))


# --- Activation checkpointing -----------------------------------------------------------------------------------------

SAVED_OPS = [  # most of a block's time and little of its memory: their results are kept by selective checkpointing
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.dimr.depthwise.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_activations(nnet: DiMR, how: str) -> None:
    """Recompute activations of blocks in the backward pass in place of keeping them (Chen et al., arXiv 1604.06174).

    The same numbers in less memory and more time.

    Args:
        how: off; all; k (every k-th block, such as 2); or selective: all, but the results of matmuls, convolutions and
            attention are kept.
    """
    if how == "off":
        return
    contexts = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    settings = {"context_fn": contexts} if how == "selective" else {}

    def checkpointed(module: nn.Module, forward: Callable[..., Tensor], *args) -> Tensor:
        if not module.training:
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **settings)

    every = int(how) if how.isdigit() else 1
    for stage in nnet.stages:
        modules = [stage.upsample] if hasattr(stage, "upsample") else []
        modules += stage.blocks[::every]
        modules += [skip for i, skip in enumerate(stage.skips, len(stage.skips) + 1) if i % every == 0]
        for module in modules:
            module.forward = functools.partial(checkpointed, module, module.forward)
