"""Batches for training: which records a process reads at which step, and reading them ahead of time.

A data set has `len()`, `record_shape`, `n_classes`, `class_names`, `digest`, `read(indices)` -> (records, labels) as
NumPy arrays, and `releases_gil`: whether threads can read it side by side. A thread hands over its arrays as they are;
a process copies them through a pipe, which costs several times what reading latents does.
"""

import itertools
import multiprocessing
import os
import pickle
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def make_loader(
    dataset: DataSet, batches: StepBatches, num_workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the endless (records, labels) of `batches`, in order, read ahead.

    Args:
        num_workers: threads or, for a data set whose reads hold the GIL, processes; 0 reads in the training process.
    """
    return read_ahead(dataset.read, batches, num_workers, pin_memory, by_processes=not dataset.releases_gil)


def read_ahead(
    read: Callable[[Any], tuple],
    items: Iterable,
    n_workers: int,
    pin_memory: bool = False,
    by_processes: bool = False,
    depth: int = 4,
) -> Iterator[tuple]:
    """Yield read(item), its NumPy arrays as tensors, for `items`, which may be endless; by workers and in order.

    Args:
        n_workers: threads, or processes if `by_processes`; 0 reads as the result is asked for.
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.
        depth: items read ahead per worker.

    Errors of `read` are raised as they are, in their place.
    """

    def read_tensors(item: Any) -> tuple:
        parts = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in read(item)]
        return tuple(part.pin_memory() if pin_memory and isinstance(part, Tensor) else part for part in parts)

    if not n_workers:
        yield from map(read_tensors, items)
        return
    items, processes = iter(items), None
    if by_processes:
        read = processes = CallsInProcesses(read, n_workers)
    # The current GPU of a new thread is the first one, where pinning would take memory.
    own_gpu = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if pin_memory else {}
    pool = ThreadPoolExecutor(n_workers, **own_gpu)
    try:
        pending = deque(pool.submit(read_tensors, item) for item in itertools.islice(items, n_workers * depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(read_tensors, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        if processes:
            processes.close()
        pool.shutdown(cancel_futures=True)


class CallsInProcesses:
    """A function that runs in n processes, one call at a time in each; threads wait for the results.

    Results come through pipes: PyTorch's way, /dev/shm, is small in containers, and the readers would hang. The
    processes leave signals to this one, which may have a checkpoint to save, and end with it or by `close`.
    """

    def __init__(self, function: Callable[[Any], Any], n: int):
        self.idle = queue.SimpleQueue()
        processes = []
        for _ in range(n):
            connection, other_end = multiprocessing.Pipe()
            ends = other_end, connection
            processes.append(multiprocessing.Process(target=serve, args=(function, *ends), daemon=True))
            processes[-1].start()
            other_end.close()  # or the end of the process would not close the pipe
            self.idle.put(connection)
        self.close = Finalize(self, kill_all, [processes], exitpriority=10)

    def __call__(self, item: Any) -> Any:
        connection = self.idle.get()
        try:
            connection.send(item)
            result = receive(connection)
        except (EOFError, OSError) as error:
            advice = "give fewer --workers, or lower config.dataset.num_workers"
            raise UserError(f"a reading process ended (killed? out of memory?): {advice}") from error
        finally:
            self.idle.put(connection)
        if isinstance(result, Exception):
            raise result
        return result


def serve(function: Callable[[Any], Any], connection: Connection, other_end: Connection) -> None:
    """Answer each item that comes through `connection` by function(item) or its error, until the other end closes."""
    other_end.close()  # this process's own copy, which would keep the pipe open when the main process is gone
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            try:
                result = function(item)
            except Exception as error:
                result = ExceptionWithTraceback(error, error.__traceback__)
            send(connection, result)


def send(connection: Connection, value: Any) -> None:
    """Send a value whose arrays are not copied into the message, but follow it."""
    buffers = []
    message = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((message, [len(view) for view in views]))
    for view in views:
        while view:
            view = view[os.write(connection.fileno(), view) :]


def receive(connection: Connection) -> Any:
    """Receive what `send` sends. Raises EOFError, OSError where the other end is gone."""
    message, sizes = connection.recv()
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        view = memoryview(array)
        while view:
            n = os.readv(connection.fileno(), [view])
            if not n:
                raise EOFError
            view = view[n:]
    return pickle.loads(message, buffers=arrays)


def kill_all(processes: list[multiprocessing.Process]) -> None:
    """Kill processes that have nothing to lose, and wait for their end."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
