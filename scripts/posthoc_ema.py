"""Reconstruct EMA weights of any sigma_rel after training, from the power-function EMAs that checkpoints keep.

    python scripts/posthoc_ema.py --ckpts workdir/NAME/ckpts --width 0.07 [--step STEP] --out ema.safetensors

The width is EDM2's sigma_rel. Needs a run trained with config.ema.power_widths (two, such as (0.05, 0.1), are enough)
and some checkpoints kept (config.train.keep_last, keep_interval). The combination is EDM2's (arXiv 2312.02696).
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libs import UserError
from libs.checkpoint import (
    PROFILE_KEY,
    checkpoint_folders,
    read_state_dict,
    saved_settings,
    settings_metadata,
    write_safetensors,
)
from libs.files import check_writable
from libs.launch import Parser, errors_in_one_line
from libs.optim import posthoc_coefficients


def stored_emas(root: Path, step: int | None) -> list[tuple[int, float, Path]]:
    """List (step, sigma_rel, file) of every power-function EMA under `root`, or `root`/ckpts, up to `step`."""
    root = root / "ckpts" if (root / "ckpts").is_dir() else root
    found = []
    for folder in checkpoint_folders(root):
        for file in sorted(folder.glob("nnet_ema_width_*.safetensors")):
            if sigma_rel := re.fullmatch(r"nnet_ema_width_(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors", file.name):
                found.append((int(folder.stem), float(sigma_rel[1]), file))
    if not found:
        raise UserError(f"no power-function EMAs in {root}: train with --config.ema.power_widths='(0.05, 0.1)'")
    first, last = min(found)[0], max(found)[0]
    if step is not None and not first <= step <= last:
        raise UserError(f"--step must be from {first} to {last}, the steps of the EMAs in {root}; found {step}")
    return [entry for entry in found if step is None or entry[0] <= step]


def combine(stored: list[tuple[int, float, Path]], step: int, sigma_rel: float) -> dict[str, torch.Tensor]:
    """Combine the stored EMA weights in float64, one file at a time."""
    coefficients = posthoc_coefficients([(t, s) for t, s, _ in stored], step, sigma_rel)
    total = {}
    for coefficient, (_, _, file) in zip(coefficients, stored, strict=True):
        for name, tensor in read_state_dict(file).items():
            total[name] = total.get(name, 0) + tensor.double() * coefficient
    return {name: tensor.float() for name, tensor in total.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--ckpts", required=True, type=Path, help="the ckpts folder of a training run")
    parser.add_argument("--width", required=True, type=float, help="sigma_rel of the wanted EMA")
    parser.add_argument("--step", type=int, help="training step at which it ends; the newest unless given")
    parser.add_argument("--out", required=True, type=Path, help=".safetensors to write, for --nnet_path")
    arguments = parser.parse_args()
    with errors_in_one_line():
        check_writable(arguments.out, endings=[".safetensors"])
        stored = stored_emas(arguments.ckpts, arguments.step)
        step = max(stored)[0] if arguments.step is None else arguments.step
        state = combine(stored, step, arguments.width)
        settings = {**(saved_settings(max(stored)[2]) or {}), "step": step}
        metadata = {PROFILE_KEY: f"width {arguments.width:g}, reconstructed", **settings_metadata(settings)}
        write_safetensors(state, arguments.out, metadata)
    print(f"{arguments.out}: width {arguments.width:g} at step {step} from {len(stored)} stored EMAs")


if __name__ == "__main__":
    main()
