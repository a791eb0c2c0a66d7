"""Training state spread over the processes (FSDP), for models whose weights, gradients, moments and averages are too
large to be whole on every one.

Each tensor is cut along its first axis, one piece per process (a `DTensor`), by PyTorch's `fully_shard`: a block's
weights are whole only while it computes. Files never know: what is written is gathered, what is read is cut.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from libs.dimr import DiMR


def check_launcher() -> None:
    """Raises ValueError under a launcher told to shard: accelerate does so on GPUs only, and in its own way."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "accelerate was started with its own FSDP (--use_fsdp, or distributed_type FSDP in its config file): start "
            "it as for DDP (--multi_gpu) and set --config.train.sharded=True"
        )


def shard(nnet: DiMR, copies: Iterable[nn.Module], device: torch.device) -> None:
    """Cut a network's parameters over all processes, in place; an optimiser is made after this, not before.

    Units that are made whole one at a time: each block, skip and upsampling; the rest of the network together. Weights
    stay float32 and mixed precision is autocast's, as without sharding: a 16-bit copy of the time-dependent vectors
    would move the gates of `libs.norms.TimeDependentVector`, whose argument goes up to the number of timesteps. What
    backward needs of the weights is kept until then in autocast's precision, whole, but for blocks computed again.

    Args:
        copies: networks of the same architecture that are not trained (averages): their parameters are cut alike, but
            they compute only within `whole`.
        device: of this process.

    Raises:
        ValueError: there is one process only.
    """
    n_processes = dist.get_world_size() if dist.is_initialized() else 1
    if n_processes == 1:
        raise ValueError(
            "config.train.sharded spreads the model over several processes; found 1: start more (accelerate launch "
            "--multi_gpu --num_processes N) or set it to False"
        )
    mesh = init_device_mesh(device.type, (n_processes,))
    for stage in nnet.stages:
        upsample = [stage.upsample] if hasattr(stage, "upsample") else []
        for unit in [*upsample, *stage.blocks, *stage.skips]:
            fully_shard(unit, mesh=mesh)
    fully_shard(nnet, mesh=mesh, reshard_after_forward=True)
    pattern = dict(nnet.named_parameters())
    for copy in copies:
        for name, parameter in list(copy.named_parameters()):
            set_parameter(copy, name, cut_like(parameter.detach(), pattern[name]))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by its dotted name with one that is not trained."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def cut_like(value: Tensor, pattern: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut (or not) as `pattern` is and on its device."""
    if not isinstance(pattern, DTensor):
        return value
    # Every process has the whole tensor and takes its own piece: nothing is sent.
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """The piece of a tensor that this process holds, sharing its memory; all of it if it is not cut."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: Tensor) -> Tensor:
    """The whole tensor on every process. A collective call if it is cut."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that tensors take on this process."""
    return sum(local(tensor).nbytes for tensor in tensors)


def gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Named tensors made whole one after the other, in host memory where `keep` is true; {} elsewhere.

    A collective call if they are cut; all processes have to make it. Those that are not cut are passed on as they are.
    """
    result = {}
    for name, value in tensors.items():
        value, cut = full(value), isinstance(value, DTensor)
        if keep:
            result[name] = value.cpu() if cut else value
    return result


@contextlib.contextmanager
def whole(nnet: nn.Module) -> Iterator[None]:
    """Within it, a network among the `copies` of `shard` has all of its weights on every process, which can then
    evaluate it as often as it likes without the others. A collective call to enter. Does nothing to one not cut."""
    pieces = {name: p for name, p in nnet.named_parameters() if isinstance(p, DTensor)}
    try:
        for name, piece in pieces.items():
            set_parameter(nnet, name, full(piece.detach()))
        yield
    finally:
        for name, piece in pieces.items():
            path, _, leaf = name.rpartition(".")
            setattr(nnet.get_submodule(path), leaf, piece)
