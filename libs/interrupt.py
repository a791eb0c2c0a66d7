"""Stopping a run in time: signals that ask for it, agreed on by all processes at the same step."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=2)  # of a collective operation: the main process may write or sample for long
REQUEUE_STATUS = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """SIGTERM or SIGUSR1 (the warning that Slurm sends) asks for a checkpoint and an end at the next step.

    Whether a signal has come to any process is agreed on over the host's network, so the device never waits. A process
    that is gone makes the others' agreement fail at once instead of leaving them in a collective operation.

    A context manager: signals are noted within, and given back to their former handlers after it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = ""
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        self.group = None

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Has any process been asked to stop? A collective call, once a step.

        Raises:
            RuntimeError: another process is gone.
        """
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
