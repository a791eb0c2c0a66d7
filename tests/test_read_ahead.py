import itertools
import threading

import numpy as np
import pytest

from libs.data import read_ahead


class Numbers:
    """Record i is i; notes which batches were asked for, and fails at a given one."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def read(self, indices):
        self.asked.append(indices)
        if self.fails_at in indices:
            raise ValueError(f"record {self.fails_at} is damaged")
        return np.array(indices, dtype=np.float32), np.array(indices, dtype=np.int64)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_batches_come_in_order(n_threads):
    batches = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(50)]
    result = list(read_ahead(Numbers().read, batches, n_threads))
    assert [records.tolist() for records, _ in result] == batches
    assert [labels.tolist() for _, labels in result] == batches


def test_an_endless_order_is_read_only_a_few_batches_ahead():
    numbers = Numbers()
    batches = read_ahead(numbers.read, ([k] for k in itertools.count()), n_workers=2, depth=3)
    assert [next(batches)[1].item() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(numbers.asked) <= 5 + 2 * 3
    before = threading.active_count()
    batches.close()
    assert threading.active_count() == before - 2


def test_errors_come_in_their_place():
    batches = read_ahead(Numbers(fails_at=2).read, [[0], [1], [2], [3]], n_workers=2)
    assert [next(batches)[1].item() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="record 2 is damaged"):
        next(batches)
