"""What a run leaves on record: its settings and code, compared when it is resumed, and its metrics."""

import errno
import fcntl
import functools
import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from absl import logging
from accelerate import Accelerator
from accelerate.utils import gather_object

ROOT = Path(__file__).resolve().parents[1]

# Settings that change nothing of what a run computes; the others must be as in its checkpoint.
FREE_SETTINGS = (
    r"config\.train\.(n_steps|accumulation|sharded|compile|recompute\w*|\w+_interval|keep_last|max_skipped)",
    r"config\.train\.(depthwise_kernel|(grid|fid)_\w+)",
    r"config\.((sample|wandb)\..*|init\.path|fid_stat|resume_changes.*)",
    r"config\.(dataset\.(path|num_workers)|autoencoder\.pretrained_path)",  # the store knows its autoencoder
)


def flat(values: dict | list, prefix: str = "") -> dict:
    """Nested JSON values as {"a.b[0].c": value}."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    result = {}
    for key, value in items:
        name = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}" if prefix else key
        result |= flat(value, name) if isinstance(value, (dict, list)) and value else {name: value}
    return result


def check_same_run(settings: dict, saved: dict, may_change: Sequence[str], source: Path) -> None:
    """Compare a run's settings with those in its checkpoint (both nested JSON values).

    Args:
        may_change: names (such as "optimizer.lr") that may differ, beside `FREE_SETTINGS`.
        source: the checkpoint, for the message.

    Raises:
        ValueError: they differ in anything that matters; the message lists both values.
    """
    now, then = flat(settings), flat(saved)
    allowed = FREE_SETTINGS + tuple(r"(config\.)?" + re.escape(name) + r"(\..*|\[.*)?" for name in may_change)
    different = [
        name
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not any(re.fullmatch(pattern, name) for pattern in allowed)
    ]
    if different:
        lines = "".join(f"  {name}: {then.get(name)} there, {now.get(name)} now\n" for name in different)
        names = tuple(name.removeprefix("config.") for name in different)
        raise ValueError(
            f"{source} was trained with other settings:\n{lines}"
            f'Use another --workdir, or allow the change by --config.resume_changes="{names}"'
        )


# Where files lie may differ between nodes; what is in the data may not.
PLACES = (
    r"config\.(dataset\.(path|num_workers)|autoencoder\.pretrained_path|init\.path|fid_stat|sample\.autoguidance_\w+)"
)


def check_same_everywhere(settings: dict) -> None:
    """Were all processes started alike, on the same data? A collective call.

    Raises:
        ValueError: on all processes, if the settings (nested JSON values) of two differ in more than `PLACES`.
    """
    mine = {name: value for name, value in flat(settings).items() if not re.fullmatch(PLACES, name)}
    first, *others = gather_object([mine])
    for process, other in enumerate(others, 1):
        names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if names:
            found = "; ".join(f"{name}: {first.get(name)} on 0, {other.get(name)} on {process}" for name in names)
            raise ValueError(f"processes 0 and {process} were started differently ({found}): give all the same command")


def become_only_writer(workdir: Path) -> IO:
    """Lock a work folder until the file returned is closed or the process ends.

    Raises:
        ValueError: another process writes into it.
    """
    file = open(workdir / ".lock", "w")  # noqa: SIM115 (closing it ends the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"another training writes into {workdir}: wait for it or end it, or give another --workdir"
        ) from None
    except OSError as error:  # a file system without locks
        logging.warning("%s cannot be locked (%s): let no other training write into it", workdir, error)
    return file


@functools.cache
def code_version() -> str:
    """The git commit of this code, "unknown" outside a checkout, and PyTorch's version."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{commit}, torch {torch.__version__}"


class MetricsLog:
    """A file of one JSON object per logged step, each written at once; resuming at a step drops what came after it."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text(errors="replace").splitlines(keepends=True) if step and path.exists() else []
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(line for line in lines if _step_of(line) <= step))
        temporary.replace(path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line; on a full disk it is lost, the run is not."""
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # no half lines
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            logging.error("metrics of step %d are lost, training goes on: %s", step, error)


def _step_of(line: str) -> float:
    """The step of a whole line of the metrics file; infinity for what is left of one."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, TypeError, KeyError):
        return math.inf


def log_to_trackers(accelerator: Accelerator, metrics: dict[str, float], step: int) -> None:
    """TensorBoard and Weights & Biases. One that cannot write (a full disk) is given up for the rest of the run."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(metrics, step=step)
        except OSError as error:
            logging.error("%s is given up, training goes on: %s", tracker.name, error)
            accelerator.trackers.remove(tracker)
