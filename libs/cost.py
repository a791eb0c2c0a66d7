"""What a network costs, before any of it is allocated: parameters, arithmetic and the memory of a training step.

Counted on fake tensors (shapes without storage), so a model of any size takes seconds on any machine.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from libs import dimr
from libs.dimr import PRODUCTS, DiMR, Stage

BYTES_PER_WEIGHT = {"weights": 4, "gradients": 4, "moments": 8}  # float32 master weights, AdamW
PRECISIONS = {"no": None, "fp16": torch.bfloat16, "bf16": torch.bfloat16}  # both take two bytes


@dataclass(frozen=True)
class BranchCost:
    """One branch of a network. Multiply-adds are of one image's forward pass."""

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a device. `state` does not grow with the batch; `per_image` holds what backward needs."""

    state: int  # weights, gradients, moments, averages, and the weights' 16-bit copies that autocast keeps
    per_image: int  # activations kept between forward and backward
    block: int  # per image: the largest block computed again in backward (0: none are)

    def total(self, batch: int) -> int:
        return self.state + batch * (self.per_image + self.block)

    def largest_batch(self, memory: float) -> int:
        """Images that fit into `memory` bytes; 0 if not even one does."""
        return max(0, int((memory - self.state) // (self.per_image + self.block)))


def fake_inputs(shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, *shape), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)


def block_inputs(stage: Stage, shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    h, w = (size // stage.spec.patch_size for size in shape[1:])
    cells = (h * w + 1,) if stage.class_embed is not None else (h, w)
    return torch.zeros(batch, *cells, stage.spec.dim, requires_grad=True), torch.zeros(batch)


def branch_costs(nnet: DiMR, shape: tuple[int, ...]) -> list[BranchCost]:
    """Parameters and multiply-adds of each branch, coarsest first, for images of `shape` (C, H, W).

    Args:
        nnet: on the meta device.
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


def training_memory(nnet: DiMR, shape: tuple[int, ...], precision: str, averages: int) -> TrainingMemory:
    """The memory of a training step, from the tensors that autograd keeps in an eager forward pass.

    An estimate: temporary tensors, the allocator's rounding and a compiler's own choices are not in it.

    Args:
        nnet: built within `fake_model`, in training mode, with the recomputation that is to be described.
        shape: (C, H, W) of an image.
        precision: "no", "fp16" or "bf16".
        averages: number of averages of the weights.
    """
    again = [stage for stage in nnet.stages if stage.recompute_every]
    blocks = [kept_bytes(s.blocks[0], functools.partial(block_inputs, s, shape), precision)[1] for s in again]
    fixed, per_image = kept_bytes(nnet, lambda batch: fake_inputs(shape, batch), precision)
    n_weights = sum(p.numel() for p in nnet.parameters())
    state = n_weights * (sum(BYTES_PER_WEIGHT.values()) + 4 * averages) + fixed
    return TrainingMemory(state=state, per_image=per_image, block=max(blocks, default=0))


@contextlib.contextmanager
def fake_model() -> Iterator[None]:
    """Within, tensors have shapes and no storage: build a network here and describe it here."""
    with FakeTensorMode():
        yield


def kept_bytes(module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], precision: str) -> tuple[int, int]:
    """Bytes that live from a module's forward pass to its backward pass: (whatever the batch, per image).

    Weights are not counted; their 16-bit copies (the first number) and the inputs of recomputed blocks are.
    """
    two, four = (kept_by_batch(module, inputs(batch), precision) for batch in (2, 4))
    return 2 * two - four, (four - two) // 2


def kept_by_batch(module: nn.Module, inputs: tuple[Tensor, ...], precision: str) -> int:
    """Bytes kept for one batch, each storage counted once."""
    own = {storage(p) for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if storage(tensor) not in own:
            kept[storage(tensor)] = tensor
        return tensor

    def keep_input(block: nn.Module, arguments: tuple) -> None:
        keep(arguments[0])

    def keep_output(block: nn.Module, arguments: tuple, output: Tensor) -> None:
        keep(output)

    # What is computed again starts from the output of the block before it.
    recomputing = [stage for stage in getattr(module, "stages", ()) if stage.recompute_every]
    hooks = [stage.blocks[0].register_forward_pre_hook(keep_input) for stage in recomputing]
    hooks += [block.register_forward_hook(keep_output) for stage in recomputing for block in stage.blocks]
    products = KeptProducts(keep) if any(stage.recompute_context for stage in recomputing) else contextlib.nullcontext()
    dtype = PRECISIONS[precision]
    with (
        products,
        mock.patch.object(dimr, "attention", F.scaled_dot_product_attention),  # a GPU's, which keeps 16-bit inputs
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        output = module(*inputs)
    for hook in hooks:
        hook.remove()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class KeptProducts(TorchDispatchMode):
    """Hands the results of matrix products, convolutions and attention to `keep`, as their recomputation keeps them."""

    def __init__(self, keep: Callable[[Tensor], Tensor]):
        super().__init__()
        self.keep = keep

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            self.keep(result[0] if isinstance(result, tuple) else result)
        return result


def storage(tensor: Tensor) -> int:
    """What tells one storage from another while both live."""
    return tensor.untyped_storage()._cdata
