"""FSDP: weights, gradients, moments and EMA weights spread over the processes, by PyTorch's `fully_shard`.

Each tensor is a `DTensor`, split along its first axis with one shard per process. A block's weights are whole only
while it computes. Files do not depend on it: `libs.train_state` gathers what it writes and splits what it reads.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from libs import UserError


def shard(nnet: nn.Module, copies: Iterable[nn.Module], device: torch.device) -> None:
    """Shard a network's parameters over all processes, in place. Make the optimizer after this, not before.

    Units: each block, skip and upsampling; the rest of the network together. Weights stay float32 and mixed precision
    is autocast's, as under DDP.

    Args:
        nnet: a `DiMR`.
        copies: networks of the same architecture that are not trained (EMA weights): sharded alike, but they compute
            only within `whole`.
        device: of this process.
    """
    n_processes = dist.get_world_size() if dist.is_initialized() else 1
    if n_processes == 1:
        raise UserError("train.sharded needs several processes, found 1: start more, or set it to False")
    mesh = init_device_mesh(device.type, (n_processes,))
    for stage in nnet.stages:
        upsample = [stage.upsample] if hasattr(stage, "upsample") else []
        for unit in [*upsample, *stage.blocks, *stage.skips]:
            fully_shard(unit, mesh=mesh)
    fully_shard(nnet, mesh=mesh, reshard_after_forward=True)
    like = dict(nnet.named_parameters())
    for copy in copies:
        for name, parameter in list(copy.named_parameters()):
            set_parameter(copy, name, split_like(parameter.detach(), like[name]))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, by its dotted name, with one that is not trained."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, on the device of `like`; all of it if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return value
    # Every process has the whole tensor and takes its own shard: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds, sharing its memory; all of it if it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: Tensor) -> Tensor:
    """Gather a sharded tensor on every process, a collective call; return others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def whole(nnet: nn.Module) -> Iterator[None]:
    """Gather one of the `copies` of `shard` on every process, which can then evaluate it without the others.

    A collective call to enter. Does nothing to a network that is not sharded.
    """
    shards = {name: p for name, p in nnet.named_parameters() if isinstance(p, DTensor)}
    try:
        for name, parameter in shards.items():
            set_parameter(nnet, name, full(parameter.detach()))
        yield
    finally:
        for name, parameter in shards.items():
            path, _, leaf = name.rpartition(".")
            setattr(nnet.get_submodule(path), leaf, parameter)
