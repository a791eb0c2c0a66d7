"""Compare objectives on the digits: the same network, data, updates and learning rate; what is predicted differs.

    python benchmarks/objectives.py [--seeds 1 2 3] [--rows "linear v logit_normal" ...]

Needs the digits and latents of scripts/quickstart.sh in workdir/quickstart. Every row is trained and sampled with and
without guidance by the programs themselves, in workdir/objectives, and scored by scripts/score_digits.py; what is done
already is not done again. Appends to benchmarks/results/objectives.md as rows come. Minutes a row and seed.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from benchmarks.machine import describe_run
from libs.launch import Parser

ROOT = Path(__file__).resolve().parents[1]
OUT, RESULTS = ROOT / "workdir" / "objectives", ROOT / "benchmarks" / "results" / "objectives.md"
ROWS = (  # schedule, prediction, law of training times
    "linear v logit_normal",
    "sd eps uniform",
    "linear v uniform",
    "sd v uniform",
    "linear eps uniform",
    "linear x uniform",
)
HEAD = """# Objectives on the digits

{machine}

configs/digits_released.py with the schedule, prediction and law of training times of each row; NFE 6 of dpm_solver,
guidance as in that config (scale 3.5, power 2) or none. Class accuracy of the generated digits and Fréchet distance of
the features of `scripts/score_digits.py` (lower is better; floor: that of held-out digits).

| schedule, prediction, times | seed | accuracy, guided | distance, guided | accuracy | distance | floor |
|---|---|---|---|---|---|---|
"""


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def scores(row: str, seed: int) -> list[dict]:
    """Train, sample with and without guidance, and score: the two reports of scripts/score_digits.py."""
    schedule, prediction, law = row.split()
    folder, reports = OUT / f"{row.replace(' ', '_')}_{seed}", []
    config = ["--config=configs/digits_released.py", f"--config.seed={seed}", f"--config.schedule={schedule}"]
    config += [f"--config.prediction={prediction}", f"--config.time_sampling={law}"]
    if not (folder / "ckpts" / "2000.ckpt").exists():
        run("train.py", *config, f"--workdir={folder}", "--config.train.eval_interval=0")
    for name, guidance in (("guided", []), ("unguided", ["--cfg=1"])):
        report = folder / f"{name}.json"
        if not report.exists():
            weights = f"--nnet_path={folder / 'ckpts' / '2000.ckpt'}"
            run("eval.py", *config, weights, f"--IMGsave_path={folder / name}", *guidance)
            run("scripts/score_digits.py", f"--images={folder / name}", f"--out={report}")
        reports.append(json.loads(report.read_text()))
    return reports


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    if not RESULTS.exists():
        RESULTS.write_text(HEAD.format(machine=describe_run()))
    for row in args.rows:
        for seed in args.seeds:
            guided, unguided = scores(row, seed)
            keys = ("class_accuracy", "frechet_distance")
            cells = [f"{report[key]:.3f}" for report in (guided, unguided) for key in keys]
            with RESULTS.open("a") as file:
                file.write(f"| {row} | {seed} | {' | '.join(cells)} | {guided['frechet_floor']:.3f} |\n")


if __name__ == "__main__":
    main()
