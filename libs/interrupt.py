"""Stopping together: signals that ask for it, agreed on by all processes at the same step, and errors of one."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

TIMEOUT = timedelta(hours=2)  # of a collective operation: the main process may write or sample for long
REQUEUE_STATUS = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """SIGTERM or SIGUSR1 (the warning that Slurm sends) asks for a checkpoint and an end at the next step.

    So does the end of the launcher (accelerate launch, torchrun), which a signal kills without passing it on.

    Whether a signal has come to any process is agreed on over the host's network, so the device never waits. A process
    that is gone makes the others' agreement fail at once instead of leaving them in a collective operation.

    A context manager: signals are noted within, and given back to their former handlers after it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = ""
        self.launcher = os.getppid() if started_by_launcher() else None
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        self.group = None

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Has any process been asked to stop? A collective call, once a step.

        Raises:
            RuntimeError: another process is gone.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.received = self.received or "the launcher's end"
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return bool(self.received)
        if self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        asked = torch.tensor([int(bool(self.received))])
        try:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"another process of this run is gone (rank {os.environ.get('RANK')}: {error})"
            ) from error
        return bool(asked.item())

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.group = None


@contextmanager
def failing_together(state: Accelerator | PartialState) -> Iterator[None]:
    """A block of all processes, without collective calls, whose ValueError or OSError in one is raised by all of them.

    All have left the block when one goes on. Else one that failed would leave the others waiting for it.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as own:
        error = own
    errors = gather_object([error]) if state.num_processes > 1 else [error]
    for found in [error, *errors]:  # its own first, which has a stack trace
        if found is not None:
            raise found


def started_by_launcher() -> bool:
    """Is the parent process accelerate's or PyTorch's launcher? False where the system does not tell."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = rb"(^|/)(accelerate|torchrun)$|^(accelerate\.commands|torch\.distributed)\."
    return any(re.search(names, word) for word in words)
