"""What a run reports and records: losses, time per step, FLOP/s, metrics files, its lock, the version of the code.

Losses and times are summed on the device and read when a log line is written, so no step waits for the device.
"""

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import IO

import torch
from absl import logging
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from libs import UserError
from libs.images import printable

EXPLODED = 100  # a loss so many times the median of recent ones

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
    """Average the loss, the loss per resolution, and that per quartile of time, of which the first is least noisy."""

    def __init__(self, n_resolutions: int, device: torch.device):
        # rows: loss, one per resolution, one per quartile; columns: sum, count
        self.sums = torch.zeros(1 + n_resolutions + 4, 2, device=device)
        self.names = ["loss", *(f"loss_by_resolution/{r}" for r in range(n_resolutions))]
        self.names += [f"loss_by_noise/quartile_{q}" for q in range(1, 5)]

    def add(self, losses: Tensor, by_resolution: Tensor, t: Tensor) -> None:
        """Add a batch: weighted losses (B,), losses per resolution (R, B), and times t in [0, 1] (B,)."""
        quartiles = torch.nn.functional.one_hot((t * 4).ceil().long().clamp(1, 4) - 1, 4).to(losses.dtype)  # B 4
        sums = torch.cat([losses.sum()[None], by_resolution.sum(1), losses @ quartiles])
        batch = torch.full((1 + len(by_resolution),), float(len(losses)), device=sums.device)
        self.sums += torch.stack([sums, torch.cat([batch, quartiles.sum(0)])], dim=1)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes and start again. Waits for the device; a collective call."""
        sums, counts = accelerator.reduce(self.sums, reduction="sum").T.tolist()
        self.sums.zero_()
        return {name: s / c if c else math.nan for name, s, c in zip(self.names, sums, counts, strict=True)}


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
            self.mark("")

    def mark(self, part: str) -> None:
        """Count the time since the last mark as `part`; the last part ends the step."""
        if self.events:  # the device lags behind the host, and is asked for the time later
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.pending.append((part, event))
        else:
            now = time.perf_counter()
            self.seconds[part] += now - self.last
            self.last = now
        self.steps += part == self.PARTS[-1]

    def read(self) -> dict[str, float]:
        """Return mean seconds per step, by part and in all, and start again. Waits for the device."""
        if self.pending:
            torch.cuda.synchronize()
        for (_, before), (part, event) in itertools.pairwise(self.pending):
            self.seconds[part] += before.elapsed_time(event) / 1000
        steps = max(self.steps, 1)
        result = {f"seconds_per_step/{part}": seconds / steps for part, seconds in self.seconds.items()}
        result["seconds_per_step/all"] = (time.perf_counter() - self.started) / steps
        self.reset()
        return result


class Logger:
    """Log the metrics of a run to metrics.jsonl (a JSON object per line), the trackers and the progress bar.

    Every process calls it; the main one writes. A full disk loses lines or a tracker, not the run.

    Args:
        step, n_steps: where the run starts, and where it ends. Lines of metrics.jsonl after `step` are dropped.
        flops_per_image: floating-point operations of forward and backward for one image.
    """

    def __init__(
        self,
        workdir: Path,
        accelerator: Accelerator,
        step: int,
        n_steps: int,
        n_resolutions: int,
        batch_size: int,
        flops_per_image: float,
    ):
        self.accelerator, self.path, main = accelerator, workdir / "metrics.jsonl", accelerator.is_main_process
        self.batch_size, self.flops_per_image = batch_size, flops_per_image
        self.losses = LossMeter(n_resolutions, accelerator.device)
        self.timer = StepTimer(accelerator.device)
        self.recent: deque[float] = deque(maxlen=100)  # losses of the last log lines, but exploded ones
        self.exploded = False  # is the last loss 100 times as large as is usual of late, or not finite?
        self.progress = tqdm(total=n_steps, initial=step, unit="step", disable=not main, dynamic_ncols=True)
        if main:
            drop_later_lines(self.path, step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log `metrics` with the mean losses, times and throughput since the last line. A collective call."""
        metrics = {**self.losses.read(self.accelerator), **metrics, **self.timer.read()}
        self.exploded = not metrics["loss"] <= EXPLODED * statistics.median(self.recent or [math.inf])
        self.recent += [] if self.exploded else [metrics["loss"]]
        images_per_second, device = self.batch_size / metrics["seconds_per_step/all"], self.accelerator.device
        flops = images_per_second * self.flops_per_image / self.accelerator.num_processes
        metrics |= {"images_per_second": images_per_second, "tflops_per_device": flops / 1e12}
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            peaks = [peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)]
            if peaks:
                metrics["share_of_peak"] = flops / peaks[0]
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self.log(step, metrics)
        self.progress.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=f"{images_per_second:.0f}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write `metrics` as they are."""
        if not self.accelerator.is_main_process:
            return
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(metrics, step=step)
            except OSError as error:
                logging.error("%s is given up, training goes on: %s", tracker.name, error)
                self.accelerator.trackers.remove(tracker)
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        line = (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # no half lines
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            logging.error("metrics of step %d are lost, training goes on: %s", step, error)


def drop_later_lines(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to `step`; what a power cut has left of others goes too."""

    def step_of(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return math.inf

    lines = path.read_text(errors="replace").splitlines(keepends=True) if step and path.exists() else []
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line for line in lines if step_of(line) <= step))
    temporary.replace(path)


def lock_workdir(workdir: Path) -> IO:
    """Lock a work folder against a second training run, until the returned file is closed or the process ends."""
    if printable(str(workdir)) != str(workdir):
        raise UserError(f"{workdir} is not UTF-8, as TensorBoard and safetensors need: set another --workdir")
    file = open(workdir / ".lock", "w")  # noqa: SIM115 (closing it ends the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another training writes into {workdir}: end it, or set another --workdir") from None
    except OSError as error:  # a file system without locks
        logging.warning("%s cannot be locked (%s): let no other training write into it", workdir, error)
    return file


@functools.cache
def code_version() -> str:
    """Return the git commit of this code ("unknown" outside a checkout) and PyTorch's version."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{commit}, torch {torch.__version__}"
