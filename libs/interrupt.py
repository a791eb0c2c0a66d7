"""Stopping a run in time: signals that ask for it, agreed on by all processes at the same step."""

import os
import signal

import torch
import torch.distributed as dist

REQUEUE_STATUS = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """SIGTERM or SIGUSR1 (the warning that Slurm sends) asks for a checkpoint and an end at the next step.

    Whether a signal has come to any process is agreed on over the host's network, so the device never waits. A process
    that is gone makes the others' agreement fail at once instead of leaving them in a collective operation.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = ""
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Has any process been asked to stop? A collective call, once a step.

        Raises:
            RuntimeError: another process is gone.
        """
        if self.group is None:
            return bool(self.received)
        asked = torch.tensor([int(bool(self.received))])
        try:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"another process of this run is gone (rank {os.environ.get('RANK')}: {error})"
            ) from error
        return bool(asked.item())

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.group = None
