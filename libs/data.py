"""Batches for training: which records a process reads at which step, and reading them ahead of time.

A data set has `len()`, `record_shape`, `n_classes`, `class_names`, `digest`, `read(indices)` -> (records, labels) as
NumPy arrays, and `releases_gil`: whether threads can read it side by side. A thread hands over its arrays as they are;
a process copies them through shared memory, which costs several times what reading latents does.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from libs import UserError
from libs.randomness import epoch_order

DataSet = Any  # libs.latents.LatentStore or libs.images.ImageDataset


class StepBatches:
    """Batch sampler: for each step from `start_step` on, the record indices of this process, one array per micro-batch.

    The global batch of a step is a function of (seed, step) alone: epoch after epoch in the order of `epoch_order`, the
    last, incomplete batch of an epoch left out.

    Attributes:
        rows: slices of the global batch, one for each micro-batch of this process.
        steps_per_epoch: number of steps.
    """

    def __init__(
        self,
        n_records: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        n_processes: int = 1,
        process: int = 0,
        accumulation: int = 1,
    ):
        if batch_size % (n_processes * accumulation) or batch_size > n_records:
            raise UserError(
                "config.train.batch_size must be divisible by processes x accumulation and at most the number of "
                f"records; found {batch_size} with {n_processes} x {accumulation} and {n_records} records"
            )
        self.n_records, self.batch_size, self.seed, self.start_step = n_records, batch_size, seed, start_step
        self.steps_per_epoch = n_records // batch_size
        size = batch_size // (n_processes * accumulation)
        starts = [(process * accumulation + part) * size for part in range(accumulation)]
        self.rows = [slice(start, start + size) for start in starts]

    def __iter__(self) -> Iterator[np.ndarray]:
        first_epoch, first = divmod(self.start_step, self.steps_per_epoch)
        for epoch in itertools.count(first_epoch):
            order = epoch_order(self.n_records, self.seed, epoch)
            for k in range(first if epoch == first_epoch else 0, self.steps_per_epoch):
                batch = order[k * self.batch_size : (k + 1) * self.batch_size]
                for rows in self.rows:
                    yield batch[rows]


class BatchReads:
    """A data set whose item is a whole batch, given by its record indices.

    A UserError is returned: raised in a worker process, its message would arrive inside a stack trace.
    """

    def __init__(self, dataset: DataSet):
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | UserError:
        try:
            return self.dataset.read(indices)
        except UserError as error:
            return error


def make_loader(
    dataset: DataSet, batches: StepBatches, num_workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the endless (records, labels) of `batches`, in order, read ahead.

    Args:
        num_workers: threads or, for a data set whose reads hold the GIL, processes; 0 reads in the training process.
    """
    if num_workers and dataset.releases_gil:
        return read_ahead(dataset, batches, num_workers, pin_memory)
    loader = DataLoader(
        BatchReads(dataset),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # its own: making an iterator draws from the global one otherwise
    )
    return map(raise_error, loader)


def raise_error(batch: tuple[Tensor, Tensor] | UserError) -> tuple[Tensor, Tensor]:
    if isinstance(batch, UserError):
        raise batch
    return batch


def read_ahead(
    dataset: DataSet, batches: Iterable[Sequence[int]], n_threads: int, pin_memory: bool = False, depth: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the batches of `dataset` at the indices in `batches`, which may be endless, by threads and in order.

    Args:
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.
        depth: batches read ahead per thread.

    Yields (records (B, ...), labels int64 (B,)). Errors of `read` are raised as they are, in their place.
    """

    def read(indices):
        tensors = [torch.from_numpy(array) for array in dataset.read(indices)]
        return tuple(tensor.pin_memory() if pin_memory else tensor for tensor in tensors)

    batches = iter(batches)
    # The current GPU of a new thread is the first one, where pinning would take memory.
    own_gpu = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if pin_memory else {}
    pool = ThreadPoolExecutor(n_threads, **own_gpu)
    try:
        pending = deque(pool.submit(read, indices) for indices in itertools.islice(batches, n_threads * depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(read, indices) for indices in itertools.islice(batches, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
