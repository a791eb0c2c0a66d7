"""Batches for training: which records a process reads at which step, and reading them ahead of time.

A data set here is anything with `len()`, `record_shape`, `n_classes`, `class_names` and `read(indices)` ->
(records, labels) as numpy arrays: a latent store (libs/latents.py) or a tree of images (libs/images.py).

Latent stores are read by threads: reads release the GIL, and a thread hands over its arrays as they are, where a worker
process would copy them through shared memory, which costs several times what reading does.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from libs import UserError
from libs.images import ImageDataset, UnreadableImage
from libs.latents import LatentStore
from libs.randomness import epoch_order


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
        if batch_size % (n_processes * accumulation):
            raise UserError(
                "config.train.batch_size must be divisible by processes x accumulation; found "
                f"{batch_size} for {n_processes} x {accumulation}"
            )
        if n_records < batch_size:
            raise UserError(f"the data has {n_records} records, less than config.train.batch_size, {batch_size}")
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


class TensorReads:
    """A data set in the form that PyTorch's loader takes: a whole batch per request.

    An unreadable image comes back as the error itself, to be raised in the training process: raised in a worker, its
    message would arrive inside a stack trace.
    """

    def __init__(self, dataset: LatentStore | ImageDataset):
        self.dataset = dataset

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | UnreadableImage:
        try:
            records, labels = self.dataset.read(indices)
        except UnreadableImage as error:
            return error
        return torch.from_numpy(records), torch.from_numpy(labels)


def as_it_is(batch: object) -> object:
    """Collate nothing: a batch is read whole. A function with a name, which worker processes can be sent."""
    return batch


def make_loader(
    dataset: LatentStore | ImageDataset, batches: StepBatches, num_workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the endless (records, labels) of `batches`, in order, read ahead.

    Args:
        num_workers: threads that read a latent store, or worker processes that decode images, which the GIL would hold
            up; 0 reads in the training process.
    """
    if num_workers and isinstance(dataset, LatentStore):
        return read_ahead(dataset, batches, num_workers, pin_memory)
    loader = DataLoader(
        TensorReads(dataset),
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # its own: making an iterator draws from the global one otherwise
    )
    return raise_unreadable(iter(loader))


def raise_unreadable(batches: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if isinstance(batch, UnreadableImage):
            raise batch
        yield batch


def read_ahead(
    dataset: LatentStore, batches: Iterable[Sequence[int]], n_threads: int, pin_memory: bool = False, depth: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the batches of `dataset` by threads, in order.

    Args:
        dataset: anything with `read(indices) -> (records, labels)` as numpy arrays that threads may call.
        batches: record indices of each batch; may be endless.
        n_threads: at least 1.
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.
        depth: batches read ahead per thread.

    Yields:
        (records (B, ...), labels int64 (B,)). Errors of `read` are raised as they are, in their place.
    """

    def read(indices):
        tensors = [torch.from_numpy(array) for array in dataset.read(indices)]
        return tuple(tensor.pin_memory() if pin_memory else tensor for tensor in tensors)

    batches = iter(batches)
    pool = threads(n_threads)
    try:
        pending = deque(pool.submit(read, indices) for indices in itertools.islice(batches, n_threads * depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(read, indices) for indices in itertools.islice(batches, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def threads(number: int) -> ThreadPoolExecutor:
    """Make threads whose current GPU is this thread's: a new thread's is the first GPU, where it would take memory."""
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(number)
    return ThreadPoolExecutor(number, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
