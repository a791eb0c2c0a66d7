"""What a run reports of itself: losses by resolution and noise level, where the time goes, achieved FLOP/s.

Everything is summed on the device and read when a log line is written, so no step waits for the device.
"""

import itertools
import re
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
