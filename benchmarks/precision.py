"""What compiling and 16 bits change: deviations from the released code's tensors, and the loss of a short training run.

    python benchmarks/precision.py            # prints benchmarks/results/precision.md; needs the quickstart's latents

Per group of the golden files the largest relative error max |a - b| / max |b|, with the network in float32 as it is and
translated by torch.compile, and under autocast in bf16 and fp16. Then the digits run, with the same noise, data order
and initial weights, in float32 and in bf16.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from scripts.check_golden import Way, check_file

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "float32": Way(),
    "float32, compiled": Way(compile="whole"),  # minutes for each shape and mode: of the first file only
    "bf16": Way(precision="bf16"),
    "fp16": Way(precision="fp16"),
}


def deviations(files: list[Path], way: Way) -> dict[str, float]:
    """The largest relative error of each group over the files."""
    largest = {}
    for file in files:
        for group, error in check_file(str(file), way).items():
            largest[group] = max(error, largest.get(group, 0.0))
    return largest


def final_loss(precision: str, latents: Path, n_steps: int, average_over: int) -> float:
    """Mean loss of the last `average_over` of `n_steps` steps of configs/digits.py."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={workdir}"]
        command += [f"--config.dataset.path={latents}", f"--config.train.n_steps={n_steps}"]
        command += [f"--config.train.log_interval={average_over}", f"--config.train.eval_interval={n_steps + 1}"]
        env = {**os.environ, "ACCELERATE_MIXED_PRECISION": precision}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, default=ROOT / "workdir" / "quickstart" / "latents")
    parser.add_argument("--n_steps", type=int, default=500)
    args = parser.parse_args()
    if not args.latents.is_dir():
        sys.exit(f"error: no latents in {args.latents}: run `bash scripts/quickstart.sh`, or give --latents")
    print(
        f"`python benchmarks/precision.py {' '.join(sys.argv[1:])}".rstrip()
        + f"`, {platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}.\n"
    )
    files = sorted((ROOT / "tests" / "golden").glob("tiny_*.safetensors"))
    found = {name: deviations(files[: 1 if way.compile != "off" else None], way) for name, way in WAYS.items()}
    head = f"largest relative error over {len(files)} files (compiled: {files[0].stem})"
    print(f"| {head} | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for group in found["float32"]:
        print(f"| {group} | {' | '.join(f'{errors[group]:.1e}' for errors in found.values())} |")
    losses = {precision: final_loss(precision, args.latents, args.n_steps, 50) for precision in ("no", "bf16")}
    change = losses["bf16"] / losses["no"] - 1
    print(
        f"\nDigits, {args.n_steps} steps, mean loss of the last 50: float32 {losses['no']:.5f}, bf16 "
        f"{losses['bf16']:.5f} ({change:+.2%})."
    )


if __name__ == "__main__":
    main()
