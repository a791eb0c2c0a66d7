"""Copies between host and device that the host does not wait for, so that the device never runs out of work."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def threads(number: int) -> ThreadPoolExecutor:
    """Threads whose current GPU is this thread's: that of a new thread is the first, where it would take memory."""
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(number)
    return ThreadPoolExecutor(number, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`. To a GPU through page-locked memory: from ordinary memory the host may have to wait."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; the function returned waits, in any thread, and gives the CPU tensor."""
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # blocking: waiting sleeps
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
