"""Make EMA weights of any width after training, from the power-function averages that checkpoints keep.

    python scripts/posthoc_ema.py --ckpts workdir/NAME/ckpts --width 0.07 [--step STEP] --out ema.safetensors

Needs a run trained with config.ema.power_widths (two widths, such as (0.05, 0.1), are enough) and some checkpoints kept
(config.train.keep_last, keep_interval). Combines them with the weights of EDM2's post-hoc EMA (arXiv 2312.02696).
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs.checkpoint import PROFILE_KEY, checkpoint_folders, read_state_dict, saved_settings, settings_metadata
from libs.ema import posthoc_weights
from libs.errors import errors_in_one_line


def stored_averages(root: Path, step: int | None) -> list[tuple[int, float, Path]]:
    """(step, width, file) of every power-function average under `root` up to `step`.

    Raises:
        ValueError: there are none.
    """
    found = []
    for folder in checkpoint_folders(root):
        for file in sorted(folder.glob("nnet_ema_width_*.safetensors")):
            width = float(re.fullmatch(r"nnet_ema_width_(.+)\.safetensors", file.name)[1])
            if step is None or int(folder.stem) <= step:
                found.append((int(folder.stem), width, file))
    if not found:
        raise ValueError(f"no power-function averages in {root}: train with --config.ema.power_widths='(0.05, 0.1)'")
    return found


def combine(stored: list[tuple[int, float, Path]], step: int, width: float) -> dict[str, torch.Tensor]:
    """The reconstructed weights, summed in float64 one file at a time."""
    weights = posthoc_weights([(t, w) for t, w, _ in stored], step, width)
    total = {}
    for weight, (_, _, file) in zip(weights, stored, strict=True):
        for name, tensor in read_state_dict(file).items():
            part = tensor.double() * weight
            total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpts", required=True, type=Path, help="the ckpts folder of a training run")
    parser.add_argument("--width", required=True, type=float, help="relative width of the wanted average")
    parser.add_argument("--step", type=int, help="training step at which it ends; the newest unless given")
    parser.add_argument("--out", required=True, type=Path, help=".safetensors to write, for --nnet_path")
    arguments = parser.parse_args()
    with errors_in_one_line():
        stored = stored_averages(arguments.ckpts, arguments.step)
        step = arguments.step or max(t for t, _, _ in stored)
        state = combine(stored, step, arguments.width)
        settings = {**(saved_settings(max(stored)[2]) or {}), "step": step}
    metadata = {PROFILE_KEY: f"width {arguments.width:g}, reconstructed", **settings_metadata(settings)}
    save_file(state, arguments.out, metadata)
    print(f"{arguments.out}: width {arguments.width:g} at step {step} from {len(stored)} stored averages")


if __name__ == "__main__":
    main()
