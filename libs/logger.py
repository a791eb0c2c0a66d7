"""What a run reports and keeps of itself: losses, where the time goes, achieved FLOP/s; its settings, code and metrics.

Losses and times are summed on the device and read when a log line is written, so no step waits for the device. Settings
and code are compared when a run is resumed.
"""

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from absl import logging
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# --- Losses, time and FLOP/s ------------------------------------------------------------------------------------------

# Dense bf16/fp16 peak in FLOP/s by words of the device's name, the first that fit (data sheets, without sparsity).
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 990e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
}


class LossMeter:
    """Means since the last reading of the loss, of the loss per resolution, and of the loss per quartile of time.

    Quartile 1 holds the least noisy quarter of the training times.
    """

    def __init__(self, n_resolutions: int, device: torch.device):
        # rows: loss, one per resolution, one per quartile; columns: sum, count
        self.sums = torch.zeros(1 + n_resolutions + 4, 2, device=device)
        self.n_resolutions = n_resolutions

    def add(self, resolution_losses: Tensor, losses: Tensor, uniform_time: Tensor) -> None:
        """Add a batch: losses per resolution (R, B), weighted losses (B,), and the times' draws in [0, 1) (B,)."""
        batch = losses.shape[0]
        quartiles = torch.nn.functional.one_hot((uniform_time * 4).long().clamp(0, 3), 4).to(losses.dtype)  # B 4
        per_resolution = resolution_losses.sum(1)
        sums = torch.cat([losses.sum()[None], per_resolution, losses @ quartiles])
        counts = torch.cat([torch.full((1 + self.n_resolutions,), float(batch), device=sums.device), quartiles.sum(0)])
        self.sums += torch.stack([sums, counts], dim=1)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, and start again. Waits for the device; a collective call."""
        sums, counts = accelerator.reduce(self.sums, reduction="sum").T.tolist()
        self.sums.zero_()
        means = [s / c if c else float("nan") for s, c in zip(sums, counts, strict=True)]
        names = ["loss"]
        names += [f"loss_by_resolution/{r}" for r in range(self.n_resolutions)]
        names += [f"loss_by_noise/quartile_{q}" for q in range(1, 5)]
        return dict(zip(names, means, strict=True))


class StepTimer:
    """Seconds per step spent waiting for data, in forward and backward, and in the rest, since the last reading."""

    PARTS = ("data", "forward_backward", "rest")

    def __init__(self, device: torch.device):
        self.events = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start again from now; also after what is not training time, such as sampling."""
        self.seconds, self.pending, self.steps = dict.fromkeys(self.PARTS, 0.0), [], 0
        self.started = self.last = time.perf_counter()
        if self.events:
            self.note("")

    def note(self, part: str) -> None:
        """An event at the end of `part`: the device works behind the host, and is asked later when it came there."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.pending.append((part, event))

    def mark(self, part: str) -> None:
        """The time since the last mark belonged to `part`, on a GPU the device's; the last part ends the step."""
        if self.events:
            self.note(part)
        else:
            now = time.perf_counter()
            self.seconds[part] += now - self.last
            self.last = now
        self.steps += part == self.PARTS[-1]

    def read(self) -> dict[str, float]:
        """Mean seconds per step by part and in all, and start again. Waits for the device."""
        if self.pending:
            torch.cuda.synchronize()
        for (_, before), (part, event) in itertools.pairwise(self.pending):
            self.seconds[part] += before.elapsed_time(event) / 1000
        steps = max(self.steps, 1)
        result = {f"seconds_per_step/{part}": seconds / steps for part, seconds in self.seconds.items()}
        result["seconds_per_step/all"] = (time.perf_counter() - self.started) / steps
        self.reset()
        return result


def training_flops_per_image(nnet: nn.Module, shape: tuple[int, ...]) -> float:
    """Floating-point operations of a forward and backward pass per image: three times the forward's, counted once."""
    with torch.device("meta"):
        inputs = torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nnet.to("meta")(*inputs)
    return 3.0 * counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Peak 16-bit FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


# --- The run's record -------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]

# Settings that change nothing of what a run computes; the others must be as in its checkpoint.
FREE_SETTINGS = (
    r"config\.train\.(n_steps|accumulation|sharded|compile|recompute|\w+_interval|keep_last|max_skipped)",
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
