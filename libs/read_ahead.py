"""Batches read ahead of the training step by threads.

For latent stores: reading them leaves Python's lock to others, and a thread hands over its arrays as they are, where a
worker process would have to copy them through shared memory, which costs several times what reading does.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from libs.latents import LatentStore
from libs.transfer import threads


def read_ahead(
    dataset: LatentStore, batches: Iterable[Sequence[int]], n_threads: int, pin_memory: bool = False, depth: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `dataset`, in order.

    Args:
        dataset: anything with `read(indices) -> (records, labels)` as numpy arrays that threads may call.
        batches: record indices of each batch; may be endless.
        n_threads: at least 1.
        pin_memory: whether the tensors are put in page-locked memory, for copies to a GPU that do not wait.
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
        pending = deque(pool.submit(read, indices) for indices in islice(batches, n_threads * depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(read, indices) for indices in islice(batches, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
