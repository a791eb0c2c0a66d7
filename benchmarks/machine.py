"""What a benchmark ran on, for the head of its report."""

import os
import platform
import sys
from pathlib import Path

import torch


def describe_run() -> str:
    """Return processor, load, versions and the command of this process, in one line."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = cpu[0].split(":")[1].strip() if cpu else platform.machine()
    if torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {cores}; {versions}; `python {' '.join(sys.argv)}`"
