import contextlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run

from libs import UserError
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


# --- Processes --------------------------------------------------------------------------------------------------------


def answer(item):
    """What reading processes are asked in these tests."""
    if item == "array":
        return np.arange(3_000_000).reshape(3, -1), ["text"], np.empty((0, 2))
    if item == "error":
        raise UserError("item 2 is damaged")
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "half":  # ends while it answers
        with contextlib.suppress(ValueError):
            os.closerange(3, 100)
        os._exit(1)
    if item == "signals":
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    return os.getpid(), os.getppid()


def test_results_of_processes_are_those_of_the_function():
    (array, text, empty), pids = read_ahead(answer, ["array", "signals"], 1, by_processes=True)
    assert torch.equal(array, torch.from_numpy(answer("array")[0])) and text == ["text"] and empty.shape == (0, 2)
    assert pids[1] == os.getpid() != pids[0]
    array += 1  # writable
    results = read_ahead(answer, ["signals", "error"], 2, by_processes=True)
    next(results)
    with pytest.raises(UserError, match="item 2 is damaged") as caught:
        next(results)
    assert 'raise UserError("item 2 is damaged")' in str(caught.value.__cause__)  # where it happened


@pytest.mark.parametrize("how", ["die", "half"])
def test_a_killed_reader_is_an_error_at_once(how):
    started = time.monotonic()
    results = read_ahead(answer, ["array", how, "array", "array"], 2, by_processes=True)
    next(results)
    with pytest.raises(UserError, match=r"a reading process ended \(killed\? out of memory\?\): give fewer --workers"):
        next(results)
    assert time.monotonic() - started < 30


def test_readers_end_with_the_main_process():
    """However it ends, and with results that nobody asked for."""
    code = """if True:
        import os, signal, sys
        from libs.data import read_ahead
        def answer(item):
            return (os.getpid(), bytes(10_000_000)) if item else (os.getpid(),)
        results = read_ahead(answer, [0, 0] + [1] * 20, 2, by_processes=True)
        print(next(results)[0], next(results)[0], flush=True)
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for how in ("killed", "ends"):
        pids = map(int, run("-c", code, how, timeout=60).stdout.split())
        deadline = time.monotonic() + 20
        for pid in pids:
            while (status := Path(f"/proc/{pid}/stat")).exists() and status.read_text().split()[2] != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.1)
