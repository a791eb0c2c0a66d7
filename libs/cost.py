"""What a network costs, before any of it is allocated: parameters, arithmetic and the memory of a training step.

Counted on fake tensors (shapes without storage), so a model of any size takes seconds on any machine.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from libs import compilation

BYTES_PER_WEIGHT = 16  # float32 weights, gradients and AdamW's two moments
PRECISIONS = {"no": None, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # both take two bytes


@dataclass(frozen=True)
class BranchCost:
    """One branch of a network. Multiply-adds are of one image's forward pass."""

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a device. `state` does not grow with the batch; `per_image` holds what the backward pass needs."""

    state: int  # weights, gradients, moments, EMA weights, and the 16-bit copies of weights that autocast keeps
    per_image: int  # activations kept between forward and backward

    def largest_batch(self, memory: float) -> int:
        """Return how many images fit into `memory` bytes; 0 if not even one does."""
        return max(0, int((memory - self.state) // self.per_image))


def fake_inputs(shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, *shape), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)


def branch_costs(nnet: nn.Module, shape: tuple[int, ...]) -> list[BranchCost]:
    """Count parameters and multiply-adds of each branch, coarsest first, of a `DiMR` on the meta device.

    Args:
        shape: (C, H, W) of an image.
    """
    with torch.device("meta"):
        inputs = fake_inputs(shape, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nnet(*inputs)
    counts = counter.get_flop_counts()
    return [
        BranchCost(
            parameters=sum(p.numel() for p in stage.parameters()),
            multiply_adds=sum(counts[f"{type(nnet).__name__}.stages.{r}"].values()) // 2,
        )
        for r, stage in enumerate(nnet.stages)
    ]


def training_memory(
    build: Callable[[], nn.Module], shape: tuple[int, ...], precision: str, recompute: str = "off", n_ema: int = 1
) -> TrainingMemory:
    """Count the memory of a training step whose blocks are compiled.

    The compiler's own partition of each block's graph into forward and backward decides what is kept. Temporary
    tensors and the allocator's rounding are not counted: leave a tenth of a card.

    Args:
        build: makes the network.
        shape: (C, H, W) of an image.
        precision: no, fp16 or bf16.
        recompute: see `libs.compilation.checkpoint_activations`.
        n_ema: number of EMA copies of the weights.
    """
    compiler = functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    with FakeTensorMode(), mock.patch.object(torch, "compile", lambda forward, **kwargs: compiler(forward)):
        nnet = build().train()
        nnet(*fake_inputs(shape, 1))  # einops meets fake tensors here, which it must not while compiling
        compilation.use_forms(nnet, {compilation.Attention: compilation.padded_attention})
        with mock.patch.dict(compilation.CPU_FORMS, clear=True):
            compilation.compile_network(nnet, "blocks", recompute=recompute)
        two, four = (kept_bytes(nnet, fake_inputs(shape, batch), precision) for batch in (2, 4))
    n_weights = sum(p.numel() for p in nnet.parameters())
    state = n_weights * (BYTES_PER_WEIGHT + 4 * n_ema) + 2 * two - four
    return TrainingMemory(state=state, per_image=(four - two) // 2)


def kept_bytes(nnet: nn.Module, inputs: tuple[Tensor, ...], precision: str) -> int:
    """Count the bytes that live from the forward pass to the backward pass, each storage once, without weights."""
    own = {p.untyped_storage()._cdata for p in nnet.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept[storage] = tensor
        return tensor

    dtype = PRECISIONS[precision]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        outputs = nnet(*inputs)
    del outputs
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
