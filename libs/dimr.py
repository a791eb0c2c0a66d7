"""The DiMR network: one branch per resolution, each conditioned on the features of the next coarser one.

Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", NeurIPS 2024 (arXiv 2406.09416). Where the paper and the released weights disagree, the weights are
followed; docs/differences.md lists those places. What makes the network faster is in libs/compilation.py.

Axes: B batch, C image channels, H W pixels or latent cells, h w cells of a branch's grid, N tokens, D width of a
branch, R number of resolutions.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from libs import UserError
from libs.norms import NORMS, TDLayerNorm


@dataclass(frozen=True)
class StageSpec:
    """Describe one branch. Sizes are in cells of its grid unless said otherwise. Raises UserError if it cannot be."""

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
        problems = []
        if self.block_type not in BLOCKS:
            problems.append(f"block_type must be one of {', '.join(BLOCKS)}; found {self.block_type!r}")
        if self.depth % 2 == 0:  # the released code builds one more
            problems.append(f"depth of a stage must be odd; found {self.depth}: set {self.depth + 1} (as released)")
        if self.block_type == "TransformerBlock" and self.dim % self.num_heads:
            problems.append(f"num_heads must divide dim; found num_heads {self.num_heads} and dim {self.dim}")
        if self.kernel_size % 2 == 0 or self.head_kernel_size % 2 == 0:
            problems.append(f"kernel sizes must be odd; found {self.kernel_size} and {self.head_kernel_size}")
        if problems:
            raise UserError("; ".join(problems))


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
        return self.w2(F.gelu(self.w0(z)) * self.w1(z))


class Attention(nn.Module):
    """norm, then multi-head self-attention. (B, N, D), t (B,) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, norm: type[nn.Module]):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x, t))  # B N 3D
        q, k, v = rearrange(qkv, "B N (three heads d) -> three B heads N d", three=3, heads=self.num_heads)
        z = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(z, "B heads N d -> B N (heads d)"))


class TransformerBlock(nn.Module):
    """Pre-norm attention and gated MLP, both residual. (B, N, D), t (B,) -> (B, N, D)."""

    on_tokens = True  # takes the class token and a list of cells, (B, 1 + h w, D)

    def __init__(self, spec: StageSpec, norm: type[nn.Module]):
        super().__init__()
        self.attn = Attention(spec.dim, spec.num_heads, norm)
        self.mlp = GatedMLP(spec.dim, spec.hidden_dim, norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.attn(x, t)
        return x + self.mlp(x, t)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a grid with zeros around it. (B, h, w, D) -> (B, h, w, D)."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "B h w D -> B D h w")), "B D h w -> B h w D")


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution (no norm in front) and gated MLP, both residual. (B, h, w, D), t (B,) -> (B, h, w, D)."""

    on_tokens = False  # takes the grid, (B, h, w, D)

    def __init__(self, spec: StageSpec, norm: type[nn.Module]):
        super().__init__()
        self.depthwise = DepthwiseConv(spec.dim, spec.kernel_size)
        self.mlp = GatedMLP(spec.dim, spec.hidden_dim, norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.depthwise(x)
        return x + self.mlp(x, t)


# A block is made from (spec, norm) and called as block(x, t).
BLOCKS: dict[str, type[nn.Module]] = {"TransformerBlock": TransformerBlock, "ConvNeXtBlock": ConvNeXtBlock}


class PositionTable(nn.Embedding):
    """Add a learned vector to each cell: the top left of the table. (B, h, w, D) -> (B, h, w, D)."""

    def __init__(self, height: int, width: int, dim: int):
        super().__init__(height * width, dim)
        self.height, self.width = height, width

    def forward(self, z: Tensor) -> Tensor:
        h, w = z.shape[1:3]
        if h > self.height or w > self.width:
            raise UserError(f"a grid of {h}x{w} exceeds the position table {self.height}x{self.width}: set z_shape")
        return z + rearrange(self.weight, "(H W) D -> H W D", W=self.width)[:h, :w]


class LongSkip(nn.Linear):
    """Join the features of two blocks: side by side, then a Linear. x, skip (B, ..., D) -> (B, ..., D)."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(torch.cat([x, skip], dim=-1))


class Upsample(nn.Module):
    """Bring all features of the coarser branch to this one's width and grid: norm, Linear, pixel shuffle, norm.

    n+1 features (B, h, w, D_prev), t (B,) -> (B, h q, w q, D).
    """

    def __init__(self, in_dim: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.norm_in = TDLayerNorm(in_dim)
        self.proj = nn.Linear(in_dim, dim * ratio**2)
        self.norm_out = TDLayerNorm(dim)

    def forward(self, features: list[Tensor], t: Tensor) -> Tensor:
        x = self.proj(self.norm_in(torch.cat(features, dim=-1), t))
        x = rearrange(x, "B h w (a b D) -> B (h a) (w b) D", a=self.ratio, b=self.ratio)
        return self.norm_out(x, t)


class Head(nn.Module):
    """Predict at the resolution of a branch. (B, h, w, D), t (B,) -> (B, C, h, w)."""

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
    """

    def __init__(
        self, spec: StageSpec, previous: StageSpec | None, channels: int, n_labels: int, norm: type[nn.Module]
    ):
        super().__init__()
        self.spec = spec
        block = BLOCKS[spec.block_type]
        self.patch_embed = nn.Conv2d(channels, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.pos_embed = PositionTable(spec.max_height, spec.max_width, spec.dim)
        self.class_embed = nn.Embedding(n_labels, spec.dim) if block.on_tokens else None
        if previous is not None:
            in_dim = (previous.depth + 1) * previous.dim
            self.upsample = Upsample(in_dim, spec.dim, previous.patch_size // spec.patch_size)
        self.blocks = nn.ModuleList(block(spec, norm) for _ in range(spec.depth))
        self.skips = nn.ModuleList(LongSkip(spec.dim) for _ in range(spec.depth // 2))
        self.head = Head(spec.dim, channels, spec.head_kernel_size)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, features: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Predict from x (B, C, H, W), t (B,) or (1,), y (B,) and the coarser branch's features.

        Returns:
            The prediction (B, C, h, w), and depth + 1 features (B, h, w, D): the embedding and each block's output.
        """
        z = rearrange(self.patch_embed(x), "B D h w -> B h w D").contiguous()  # channels last, for all that follows
        h, w = z.shape[1:3]
        z = self.pos_embed(z)  # B h w D
        if features is not None:
            z = z + self.upsample(features, t)
        if self.class_embed is not None:
            z = torch.cat([self.class_embed(y)[:, None], rearrange(z, "B h w D -> B (h w) D")], dim=1)  # B 1+hw D

        blocks, half = list(self.blocks), len(self.skips)
        kept = [z]
        for block in blocks[: half + 1]:
            z = block(z, t)
            kept.append(z)
        for block, skip, early in zip(blocks[half + 1 :], self.skips, reversed(kept[1 : half + 1]), strict=True):
            z = block(skip(z, early), t)
            kept.append(z)

        if self.class_embed is not None:
            kept = [rearrange(z[:, 1:], "B (h w) D -> B h w D", h=h, w=w) for z in kept]
        return self.head(kept[-1], t), kept


class DiMR(nn.Module):
    """Predict noise at every resolution.

    Args:
        stages: the branches, coarsest first; each patch size is a multiple of the next, the last is 1.
        channels: channels C of the input and of each output.
        n_classes: number of classes, the null class not counted (0 for an unconditional model).
        norm_type: norm inside the blocks, a key of `libs.norms.NORMS`. Heads and upsampling always use TD-LayerNorm.
        block_grad_to_lowres: stop gradients from a branch into the coarser ones (released models: False).

    Raises:
        UserError: stages that do not fit together, or no branch that is conditioned on the class.
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
        patches, problems = [spec.patch_size for spec in stages], []
        if patches[-1:] != [1] or any(coarse % fine or coarse == fine for coarse, fine in itertools.pairwise(patches)):
            problems.append(f"patch sizes must each be a multiple of the next and end in 1; found {patches}")
        if n_classes and not any(BLOCKS[spec.block_type].on_tokens for spec in stages):
            problems.append(f"{n_classes} classes need a TransformerBlock stage; found none (or set n_classes=0)")
        if norm_type not in NORMS:
            problems.append(f"norm_type must be one of {', '.join(NORMS)}; found {norm_type!r}")
        if problems:
            raise UserError("; ".join(problems))
        self.channels = channels
        self.n_classes = n_classes
        self.null_label = n_classes  # the last embedding: the class of classifier-free guidance's unconditional half
        self.block_grad_to_lowres = block_grad_to_lowres
        self.patch_sizes = tuple(patches)
        self.stages = nn.ModuleList(
            Stage(spec, previous, channels, n_classes + 1, NORMS[norm_type])
            for previous, spec in zip([None, *stages[:-1]], stages, strict=True)
        )
        self.initialize()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Predict the noise in x at every resolution.

        Args:
            x: noisy images or latents (B, C, H, W).
            t: time condition (B,), or (1,) when the whole batch is at one time.
            y: labels (B,), int64 in [0, n_classes]; n_classes is the null label.

        Returns:
            R predictions (B, C, H / patch_r, W / patch_r), coarsest first; the last is at full resolution.

        Raises:
            UserError: a size of x that the patches do not divide or the position tables do not cover.
        """
        patch = math.lcm(*self.patch_sizes)
        if x.shape[2] % patch or x.shape[3] % patch:
            raise UserError(f"height and width must be divisible by the coarsest patch {patch}; found {x.shape[2:]}")
        outputs, features = [], None
        for stage in self.stages:
            if self.block_grad_to_lowres and features is not None:
                features = [feature.detach() for feature in features]
            output, features = stage(x, t, y, features)
            outputs.append(output)
        return tuple(outputs)

    def initialize(self) -> None:
        """Draw Linear and embedding weights from a normal of std 0.02 (cut at ±2), biases zero, as in ViT.

        Convolutions keep PyTorch's default; time-dependent vectors start independent of time.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
