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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs.checkpoint import (
    PROFILE_KEY,
    checkpoint_folders,
    read_state_dict,
    saved_settings,
    settings_metadata,
    write_safetensors,
)
from libs.files import check_writable
from libs.launch import errors_in_one_line
from libs.optim import posthoc_weights


def stored_averages(root: Path, step: int | None) -> list[tuple[int, float, Path]]:
    """(step, width, file) of every power-function average under `root`, or `root`/ckpts, up to `step`.

    Raises:
        ValueError: there are none, none up to `step`, or none from there on.
    """
    root = root / "ckpts" if (root / "ckpts").is_dir() else root
    found = []
    for folder in checkpoint_folders(root):
        for file in sorted(folder.glob("nnet_ema_width_*.safetensors")):
            if width := re.fullmatch(r"nnet_ema_width_(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors", file.name):
                found.append((int(folder.stem), float(width[1]), file))
    if not found:
        raise ValueError(f"no power-function averages in {root}: train with --config.ema.power_widths='(0.05, 0.1)'")
    first, last = min(found)[0], max(found)[0]
    if step is not None and not first <= step <= last:
        raise ValueError(f"--step must be from {first} to {last}, the steps of the averages in {root}; found {step}")
    return [entry for entry in found if step is None or entry[0] <= step]


def combine(stored: list[tuple[int, float, Path]], step: int, width: float) -> dict[str, torch.Tensor]:
    """The reconstructed weights, summed in float64 one file at a time.

    Raises:
        ValueError: a damaged file, or averages of different networks.
    """
    weights = posthoc_weights([(t, w) for t, w, _ in stored], step, width)
    total = {}
    for weight, (_, _, file) in zip(weights, stored, strict=True):
        state = read_state_dict(file)
        if total and {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in total.items()}:
            raise ValueError(
                f"{file} and {stored[0][2]} are of different networks: expected one run's checkpoints in --ckpts"
            )
        for name, tensor in state.items():
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
        check_writable(arguments.out, endings=[".safetensors"])
        stored = stored_averages(arguments.ckpts, arguments.step)
        step = max(stored)[0] if arguments.step is None else arguments.step
        state = combine(stored, step, arguments.width)
        settings = {**(saved_settings(max(stored)[2]) or {}), "step": step}
        metadata = {PROFILE_KEY: f"width {arguments.width:g}, reconstructed", **settings_metadata(settings)}
        write_safetensors(state, arguments.out, metadata)
    print(f"{arguments.out}: width {arguments.width:g} at step {step} from {len(stored)} stored averages")


if __name__ == "__main__":
    main()
