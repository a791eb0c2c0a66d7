"""The DiMR network: one branch per resolution, each handing its features to the next finer one.

Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", NeurIPS 2024 (arXiv 2406.09416). Where the paper and the released weights disagree, the weights are
followed; docs/differences.md lists those places.

Axes: B batch, C image channels, H W pixels or latent cells, h w cells of a branch's grid, N tokens, D branch width,
R number of resolutions.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from libs.depthwise import depthwise_conv
from libs.norms import NORMS, TDLayerNorm, at_least_float32, product_dtype

# What costs most of a block's time and little of its memory: kept by a `keep_products` recomputation.
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.dimr.depthwise.default,
    torch.ops.dimr.image_convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]

FEW_TOKENS = 64  # on a CPU: up to these, PyTorch's attention gains nothing and keeps the compiler from fusing


@dataclass(frozen=True)
class StageSpec:
    """One branch. Sizes are in cells of this branch's grid unless said otherwise.

    Raises ValueError when the values cannot make a branch.
    """

    block_type: str  # a key of BLOCKS
    dim: int  # width D
    depth: int  # number of blocks, odd: depth//2 in, one in the middle, depth//2 out
    hidden_dim: int  # width inside the gated MLPs
    patch_size: int  # pixels (or latent cells) per grid cell
    max_height: int  # rows of the position table
    max_width: int  # columns of the position table
    num_heads: int = 16  # attention heads; TransformerBlock only
    kernel_size: int = 7  # depthwise convolution; ConvNeXtBlock only
    head_kernel_size: int = 3  # convolution of the output head

    def __post_init__(self):
        if self.block_type not in BLOCKS:
            raise ValueError(f"block_type must be one of {', '.join(BLOCKS)}; found {self.block_type!r}")
        for name in ("dim", "depth", "hidden_dim", "patch_size", "max_height", "max_width", "num_heads", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a stage must be at least 1; found {getattr(self, name)}")
        if self.depth % 2 == 0:
            raise ValueError(
                f"depth of a stage must be odd (blocks in, one middle block, as many blocks out); found {self.depth}, "
                f"set it to {self.depth + 1} (what the released code builds for {self.depth}) or {self.depth - 1}"
            )
        if self.block_type == "TransformerBlock" and self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim; found num_heads {self.num_heads} and dim {self.dim}")
        if self.block_type == "ConvNeXtBlock" and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of a ConvNeXtBlock must be odd; found {self.kernel_size}")
        if self.head_kernel_size % 2 == 0:
            raise ValueError(f"head_kernel_size must be odd; found {self.head_kernel_size}")


def gated_gelu(a: Tensor, b: Tensor) -> Tensor:
    """GELU(a) * b with the exact (erf) GELU."""
    return F.gelu(a) * b if torch.compiler.is_compiling() else GatedGELU.apply(a, b)  # see libs/norms.py


class GatedGELU(torch.autograd.Function):
    """`gated_gelu` that keeps a and b alone, and computes GELU(a) again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.gelu(a).mul_(b)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad * b, a), F.gelu(a).mul_(grad)


class GatedMLP(nn.Module):
    """norm, then w2(GELU(w0 z) * w1 z) with the exact (erf) GELU. (B, ..., D), t (B,) -> (B, ..., D)."""

    def __init__(self, dim: int, hidden_dim: int, norm: type[nn.Module]):
        super().__init__()
        self.norm = norm(dim)
        self.w0 = nn.Linear(dim, hidden_dim)
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = self.norm(x, t)
        if not torch.compiler.is_compiling():
            return self.w2(gated_gelu(self.w0(z), self.w1(z)))
        # One product in place of two reads z once, and so does its backward pass. The compiler joins the weights as it
        # brings them to the precision of the product; eagerly that would be a copy of them.
        dtype = product_dtype(z)
        weight, bias = (
            torch.cat([getattr(layer, name).to(dtype) for layer in (self.w0, self.w1)]) for name in ("weight", "bias")
        )
        return self.w2(gated_gelu(*F.linear(z, weight, bias).chunk(2, dim=-1)))


class Attention(nn.Module):
    """norm, then multi-head self-attention. (B, N, D), t (B,) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, norm: type[nn.Module]):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = self.norm(x, t)
        if z.shape[-1] // self.num_heads % 8 and wants_full_heads(z):
            return self.with_full_heads(z)
        q, k, v = rearrange(self.qkv(z), "B N (three heads d) -> three B heads N d", three=3, heads=self.num_heads)
        return self.out(rearrange(attention(q, k, v), "B heads N d -> B N (heads d)"))

    def with_full_heads(self, z: Tensor) -> Tensor:
        """The same numbers from heads made a multiple of 8 wide by rows of zeros in the weights."""
        heads, dtype = self.num_heads, product_dtype(z)
        d = z.shape[-1] // heads
        into = rearrange(self.qkv.weight.to(dtype), "(three heads d) D -> three heads d D", three=3, d=d)
        into = rearrange(F.pad(into, (0, 0, 0, -d % 8)), "three heads d D -> (three heads d) D")
        q, k, v = rearrange(F.linear(z, into), "B N (three heads d) -> three B heads N d", three=3, heads=heads)
        x = rearrange(F.scaled_dot_product_attention(q, k, v, scale=d**-0.5), "B heads N d -> B N (heads d)")
        back = F.pad(rearrange(self.out.weight.to(dtype), "D (heads d) -> D heads d", d=d), (0, -d % 8))
        return F.linear(x, rearrange(back, "D heads d -> D (heads d)"), self.out.bias.to(dtype))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, heads, N, d).

    On a CPU in float32 whatever came in: PyTorch's 16-bit kernel takes longer there, many times in the backward pass.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    dtype = q.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.to(at_least_float32(part)) for part in (q, k, v))
        if q.shape[-2] > FEW_TOKENS:
            return F.scaled_dot_product_attention(q, k, v).to(dtype)
        return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v).to(dtype)


def wants_full_heads(z: Tensor) -> bool:
    """Attention on GPUs takes heads of a multiple of 8 and copies others, q, k and v each, to the next one (XL's 60 to
    64). Padding the weights avoids that; without a compiler it would be a copy itself."""
    return torch.compiler.is_compiling() and z.device.type == "cuda"


class TransformerBlock(nn.Module):
    """Pre-norm attention and gated MLP, both residual. (B, N, D), t (B,) -> (B, N, D)."""

    on_tokens = True

    def __init__(self, spec: StageSpec, norm: type[nn.Module]):
        super().__init__()
        self.attn = Attention(spec.dim, spec.num_heads, norm)
        self.mlp = GatedMLP(spec.dim, spec.hidden_dim, norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.attn(x, t)
        return x + self.mlp(x, t)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution (no norm in front) and gated MLP, both residual. (B, h, w, D), t (B,) -> (B, h, w, D)."""

    on_tokens = False
    kernel = "torch"  # see `DiMR.use_depthwise_kernel`

    def __init__(self, spec: StageSpec, norm: type[nn.Module]):
        super().__init__()
        self.depthwise = nn.Conv2d(spec.dim, spec.dim, spec.kernel_size, padding=spec.kernel_size // 2, groups=spec.dim)
        self.mlp = GatedMLP(spec.dim, spec.hidden_dim, norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = depthwise_conv(x, self.depthwise.weight, self.depthwise.bias, residual=True, kernel=self.kernel)
        return x + self.mlp(x, t)


# A block is made from (spec, norm) and called as block(x, t). Those on tokens get the class token and a list of cells,
# (B, 1 + h w, D); the others the grid, (B, h, w, D).
BLOCKS: dict[str, type[nn.Module]] = {"TransformerBlock": TransformerBlock, "ConvNeXtBlock": ConvNeXtBlock}


class LongSkip(nn.Linear):
    """The features of two blocks to one: side by side through a Linear. x, skip (B, ..., D) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        dtype = product_dtype(x)  # rounded before they are copied side by side: fewer bytes, the same numbers
        return super().forward(torch.cat([x.to(dtype), skip.to(dtype)], dim=-1))


class Upsample(nn.Module):
    """All features of the coarser branch to the width and grid of this one: norm, Linear, pixel shuffle, norm.

    n+1 features (B, h, w, D_prev), t (B,) -> (B, h q, w q, D).
    """

    def __init__(self, in_dim: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.norm_in = TDLayerNorm(in_dim)
        self.proj = nn.Linear(in_dim, dim * ratio**2)
        self.norm_out = TDLayerNorm(dim, exact=True)

    def forward(self, features: list[Tensor], t: Tensor) -> Tensor:
        x = self.proj(self.norm_in.joined(features, t))
        x = rearrange(x, "B h w (a b D) -> B (h a) (w b) D", a=self.ratio, b=self.ratio)
        return self.norm_out(x, t)


class Head(nn.Module):
    """Features to the noise prediction of a branch. (B, h, w, D), t (B,) -> (B, C, h, w)."""

    def __init__(self, dim: int, channels: int, kernel_size: int):
        super().__init__()
        self.norm = TDLayerNorm(dim)
        self.conv = nn.Conv2d(dim, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(rearrange(self.norm(x, t), "B h w D -> B D h w"))


class Stage(nn.Module):
    """One branch: a U-ViT (blocks with long skips) on its own patches of the full-resolution input.

    Args:
        previous: spec of the next coarser branch, None for the first.
        n_labels: number of class embeddings, the null class included (blocks on tokens only).
        keep_features: collect what the next branch needs; False for the last branch.
    """

    def __init__(
        self,
        spec: StageSpec,
        previous: StageSpec | None,
        channels: int,
        n_labels: int,
        norm: type[nn.Module],
        keep_features: bool,
    ):
        super().__init__()
        self.spec = spec
        self.keep_features = keep_features
        self.recompute_every, self.recompute_context = 0, {}
        block = BLOCKS[spec.block_type]
        self.patch_embed = nn.Conv2d(channels, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.pos_embed = nn.Embedding(spec.max_height * spec.max_width, spec.dim)
        self.class_embed = nn.Embedding(n_labels, spec.dim) if block.on_tokens else None
        if previous is not None:
            in_dim = (previous.depth + 1) * previous.dim
            self.upsample = Upsample(in_dim, spec.dim, previous.patch_size // spec.patch_size)
        self.blocks = nn.ModuleList(block(spec, norm) for _ in range(spec.depth))
        self.skips = nn.ModuleList(LongSkip(spec.dim) for _ in range(spec.depth // 2))
        self.head = Head(spec.dim, channels, spec.head_kernel_size)

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings of the top-left (h, w) of the table: (h, w, D)."""
        max_h, max_w = self.spec.max_height, self.spec.max_width
        if h > max_h or w > max_w:
            raise ValueError(
                f"the input is larger than the position table: expected at most {max_h}x{max_w} cells of "
                f"{self.spec.patch_size} (an input of {max_h * self.spec.patch_size}x{max_w * self.spec.patch_size}), "
                f"found {h}x{w}; set config.z_shape to the size of the data"
            )
        return rearrange(self.pos_embed.weight, "(H W) D -> H W D", W=max_w)[:h, :w]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, features: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x (B, C, H, W), t (B,) or (1,), y (B,) and the coarser branch's features -> prediction, own features."""
        z = rearrange(self.patch_embed(x), "B D h w -> B h w D").contiguous()  # or all that follows would be strided
        h, w = z.shape[1:3]
        z = z + self.positions(h, w)
        if features is not None:
            z = z + self.run(self.upsample, features, t, again=self.recompute_every > 0)
        if self.class_embed is not None:
            z = torch.cat([self.class_embed(y)[:, None], rearrange(z, "B h w D -> B (h w) D")], dim=1)  # B 1+hw D

        collected, skips = [z], []
        half = len(self.blocks) // 2
        for i in range(len(self.blocks)):
            skip = skips.pop() if i > half else None
            z = self.run(self.unit, i, z, skip, t, again=self.recompute_every > 0 and i % self.recompute_every == 0)
            if i < half:
                skips.append(z)
            if self.keep_features:
                collected.append(z)

        own_features = [self.to_grid(z, h, w) for z in collected] if self.keep_features else None
        return self.head(self.to_grid(z, h, w), t), own_features

    def unit(self, i: int, z: Tensor, skip: Tensor | None, t: Tensor) -> Tensor:
        """Block i, behind the long skip that enters there."""
        if skip is not None:
            z = self.skips[i - len(self.blocks) // 2 - 1](z, skip)
        return self.blocks[i](z, t)

    def run(self, function: Callable[..., Tensor], *args, again: bool) -> Tensor:
        """function(*args); in training and with `again`, without keeping its activations (see `DiMR.recompute`)."""
        if again and self.training:
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **self.recompute_context)
        return function(*args)

    def to_grid(self, z: Tensor, h: int, w: int) -> Tensor:
        """Tokens without the class token, as a grid: (B, 1+hw, D) -> (B, h, w, D); a grid stays as it is."""
        if self.class_embed is None:
            return z
        return rearrange(z[:, 1:], "B (h w) D -> B h w D", h=h, w=w)


class DiMR(nn.Module):
    """Noise predictor with one output per resolution.

    Args:
        stages: the branches, coarsest first; each patch size is a multiple of the next, the last is 1.
        channels: channels C of the input and of each output.
        n_classes: number of classes, the null class not counted (0 for an unconditional model).
        norm_type: norm inside the blocks, a key of `libs.norms.NORMS`. Heads and upsampling always use TD-LayerNorm.
        block_grad_to_lowres: stop gradients from a branch into the coarser ones (released models: False).
    """

    def __init__(
        self,
        stages: list[StageSpec] | tuple[StageSpec, ...],
        channels: int = 4,
        n_classes: int = 1000,
        norm_type: str = "TDRMSN",
        block_grad_to_lowres: bool = False,
    ):
        super().__init__()
        check_stages(stages, n_classes)
        if norm_type not in NORMS:
            raise ValueError(f"norm_type must be one of {', '.join(NORMS)}; found {norm_type!r}")
        self.channels = channels
        self.n_classes = n_classes
        self.null_label = n_classes  # the last embedding: the class of classifier-free guidance's unconditional half
        self.block_grad_to_lowres = block_grad_to_lowres
        self.patch_sizes = tuple(spec.patch_size for spec in stages)
        self.stages = nn.ModuleList(
            Stage(spec, previous, channels, n_classes + 1, NORMS[norm_type], keep_features=spec is not stages[-1])
            for previous, spec in zip([None, *stages[:-1]], stages, strict=True)
        )
        self.initialise()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Predict the noise in x at every resolution.

        Args:
            x: noisy images or latents (B, C, H, W).
            t: time condition (B,), or (1,) when the whole batch is at one time (then computed once for the batch).
            y: labels (B,), int64 in [0, n_classes]; n_classes is the null label.

        Returns:
            R predictions (B, C, H / patch_r, W / patch_r), coarsest first; the last is at full resolution.

        Raises:
            ValueError: a size of x that the patches do not divide or the position tables do not cover.
        """
        self.check_input(x)
        outputs, features = [], None
        for stage in self.stages:
            if self.block_grad_to_lowres and features is not None:
                features = [feature.detach() for feature in features]
            output, features = stage(x, t, y, features)
            outputs.append(output)
        return tuple(outputs)

    def recompute(self, every: int, keep_products: bool = False) -> None:
        """In training, compute blocks again in the backward pass in place of keeping their activations.

        The same numbers in less memory and more time (Chen et al., arXiv 1604.06174).

        Args:
            every: each `every`-th block of a branch, from its first, and what joins the branches; 1: all, 0: none.
            keep_products: keep the results of matrix products, convolutions and attention of those blocks, and compute
                the rest (norms, activations, gates) again.
        """
        contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
        for stage in self.stages:
            stage.recompute_every = every
            stage.recompute_context = {"context_fn": contexts} if keep_products else {}

    def use_depthwise_kernel(self, kernel: str) -> None:
        """Who computes the depthwise convolutions: one of `libs.depthwise.KERNELS`. No more than round-off changes."""
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock):
                module.kernel = kernel

    def check_input(self, x: Tensor) -> None:
        _, channels, height, width = x.shape
        if channels != self.channels:
            raise ValueError(f"expected {self.channels} channels, found {channels}; see config.z_shape")
        patch = math.lcm(*self.patch_sizes)
        if height % patch or width % patch:
            raise ValueError(
                f"height and width must be divisible by the coarsest patch, {patch}; found {height}x{width}; "
                "change config.z_shape or the number of stages"
            )

    def initialise(self) -> None:
        """Linear and embedding weights: normal of std 0.02 (cut at ±2), biases zero, as in ViT.

        Convolutions keep PyTorch's default; time-dependent vectors start independent of time (see libs/norms.py).
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def check_stages(stages: list[StageSpec] | tuple[StageSpec, ...], n_classes: int) -> None:
    """Raises ValueError unless the patch sizes are a chain of multiples ending in 1, and a branch sees the class."""
    if not stages:
        raise ValueError("a model needs at least one stage; found none in config.nnet.stages")
    patches = [spec.patch_size for spec in stages]
    steps_down = all(coarse % fine == 0 and coarse > fine for coarse, fine in itertools.pairwise(patches))
    if not steps_down or patches[-1] != 1:
        raise ValueError(
            f"patch sizes must each be a multiple of the next and end in 1 (4, 2, 1 for three stages); found {patches}"
        )
    if n_classes and not any(BLOCKS[spec.block_type].on_tokens for spec in stages):
        on_tokens = ", ".join(name for name, block in BLOCKS.items() if block.on_tokens)
        raise ValueError(
            f"{n_classes} classes need a stage that sees the class, with block_type {on_tokens}; found "
            f"{', '.join(spec.block_type for spec in stages)}: change a stage, or set config.dataset.n_classes=0"
        )
