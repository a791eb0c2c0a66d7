"""Measure what compilation and 16 bits change: the golden files' errors, and the loss of a short training run.

    python benchmarks/precision.py            # prints benchmarks/results/precision.md; needs the quickstart's latents

Per group of the golden files the largest relative error max |a - b| / max |b|: float32, compiled float32, and autocast
in bf16 and fp16. Then the digits run in float32 and in bf16, with the same seed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from benchmarks.machine import describe_run
from scripts.check_golden import Way, check_file

ROOT = Path(__file__).resolve().parents[1]
N_STEPS = 500
WAYS = {
    "float32": Way(),
    "float32, compiled": Way(compile="whole"),  # minutes for each shape and mode: of the first file only
    "bf16": Way(precision="bf16"),
    "fp16": Way(precision="fp16"),
}


def largest_errors(files: list[Path], way: Way) -> dict[str, float]:
    """The largest relative error of each group over the files."""
    found = [check_file(str(file), way) for file in files]
    return {group: max(errors.get(group, 0.0) for errors in found) for group in found[0]}


def final_loss(precision: str) -> float:
    """Mean loss of the last 50 of N_STEPS steps of configs/digits_released.py."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config=configs/digits_released.py", f"--workdir={workdir}"]
        command += [f"--config.train.n_steps={N_STEPS}", "--config.train.log_interval=50"]
        command += ["--config.train.eval_interval=0"]
        env = {**os.environ, "ACCELERATE_MIXED_PRECISION": precision}
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        return json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def main() -> None:
    print(f"{describe_run()}\n")
    files = sorted((ROOT / "tests" / "golden").glob("tiny_*.safetensors"))
    found = {name: largest_errors(files[: 1 if way.compile != "off" else None], way) for name, way in WAYS.items()}
    head = f"largest relative error over {len(files)} files (compiled: {files[0].stem})"
    print(f"| {head} | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for group in found["float32"]:
        print(f"| {group} | {' | '.join(f'{errors[group]:.1e}' for errors in found.values())} |")
    full, half = (final_loss(precision) for precision in ("no", "bf16"))
    print(f"\nDigits, {N_STEPS} steps, mean loss of the last 50: float32 {full:.5f}, bf16 {half:.5f}.")


if __name__ == "__main__":
    main()
