"""Score every combination of guidance scale, power, interval and number of steps: a table and a plot.

    accelerate launch [--multi_gpu --num_processes N] scripts/sweep_guidance.py --config=configs/NAME.py \
        --nnet_path=WEIGHTS --out=workdir/sweep --scales=1,1.5,2,3 --powers=none,2 --intervals=none,0.2:2 --steps=50 \
        --config.sample.n_samples=5000 [--reference=REF.npz | --digits=workdir/quickstart/digits]

Scores are those of ADM's suite against --reference (or config.fid_stat, where it and the Inception weights are there),
otherwise those of scripts/score_digits.py.

Writes into --out: <combination>/images and <combination>/scores.json; sweep.md, best first; and sweep.png. Re-run the
command, with more values if you like, to make what is missing; images of a scored combination may be removed.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import ml_collections
from absl import flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import eval as evaluation
import utils
from configs.common import check_fields
from libs import UserError, launch
from libs.files import file_digest, replacing
from libs.metrics import PlannedImages
from libs.model import image_size, open_autoencoder
from libs.report import NAMES
from libs.sample_set import RANGE, SampleSet
from scripts import score_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Setting(NamedTuple):
    """One combination; power None: constant, interval None: everywhere."""

    scale: float
    power: float | None
    interval: tuple[float, float] | None
    steps: int

    def cells(self) -> list[str]:
        interval = "none" if self.interval is None else "{:g}-{:g}".format(*self.interval)
        return [f"{self.scale:g}", "none" if self.power is None else f"{self.power:g}", interval, str(self.steps)]

    def name(self) -> str:
        return "_".join(field + cell for field, cell in zip(self._fields, self.cells(), strict=True))


class Scorer(NamedTuple):
    """Scores of a folder of images: titles by name, the first to rank by; what they depend on; score(folder, state)."""

    titles: dict[str, str]
    identity: dict
    score: Callable  # a collective call; returns {name: score} on the main process


def combine(scales: list, powers: list, intervals: list, steps: list) -> list[Setting]:
    """Make all combinations, in order of their steps; one per number of steps at scale 1, which is no guidance."""
    found = itertools.product(steps, scales, powers, intervals)
    return list(dict.fromkeys(Setting(s, *((None, None) if s == 1 else (p, i)), n) for n, s, p, i in found))


def open_scorer(reference: str | None, digits: str, config: ml_collections.ConfigDict) -> Scorer:
    """Open ADM's suite where it is asked for or possible, and otherwise the digits' scores."""
    size = image_size(config, open_autoencoder(config, "cpu"))
    planned = PlannedImages(config.sample.n_samples, size, "config.sample.n_samples")
    if scoring := utils.open_scoring(reference or config.fid_stat, reference is not None, planned):
        opened, weights = scoring

        def adm_scores(folder, accelerator):
            scores = utils.score_sets(SampleSet(folder), opened, weights, accelerator)
            return scores and scores.values

        identity = {"reference_sha256": file_digest(opened.path), "inception_sha256": file_digest(weights)}
        return Scorer(NAMES, identity, adm_scores)
    if not Path(digits).is_dir():
        raise UserError(f"nothing to score by: set --reference, or --digits to the real digits (no folder {digits})")
    real = [score_digits.read_real(Path(digits) / part) for part in ("train", "held_out")]
    judge = score_digits.Judge(*real[0])

    def digits_scores(folder, accelerator):
        if accelerator.is_main_process:
            return score_digits.score(*score_digits.read_generated(folder), *real, judge)

    titles = {"frechet_distance": "Fréchet distance", "class_accuracy": "class accuracy"}
    return Scorer(titles, {"digits": digits}, digits_scores)


def sweep(
    config: ml_collections.ConfigDict, nnet_path: str, out: Path, settings: list[Setting], scorer: Scorer
) -> list[tuple[Setting, dict]]:
    """Score all settings, on all processes. The main one writes table and plot, and returns the rows best first."""
    configs = []
    for setting in settings:
        configs.append(config.copy_and_resolve_references())
        configs[-1].sample.update(scale=setting.scale, scale_pow=setting.power, sample_steps=setting.steps)
        configs[-1].sample.interval = setting.interval
        utils.check_sampling(configs[-1])  # all of them, before any is sampled
    accelerator = launch.make_accelerator()
    logging.set_verbosity(logging.INFO if accelerator.is_main_process else logging.ERROR)
    model, rows = evaluation.open_model(nnet_path, config, accelerator), []
    for setting, own_config in zip(settings, configs, strict=True):
        own_config.sample.compile = model.config.sample.compile  # what auto stands for
        own = replace(model, config=own_config)
        made_with = {**evaluation.sampling_settings(own), RANGE: [0, config.sample.n_samples]}
        decided_by = {**made_with, **scorer.identity}
        folder, file = out / setting.name() / "images", out / setting.name() / "scores.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        accelerator.wait_for_everyone()  # every process has looked before one writes
        if found.get("decided_by") != decided_by:
            evaluation.sample_and_score(own, folder, accelerator, settings=made_with)
            found = {"scores": scorer.score(folder, accelerator), "decided_by": decided_by}
            if accelerator.is_main_process:
                with replacing(file) as opened:
                    opened.write(json.dumps(found, indent=1).encode())
        rows.append((setting, found["scores"]))
    if accelerator.is_main_process:
        (ranking, title), *_ = scorer.titles.items()
        rows.sort(key=lambda row: row[1][ranking])
        lines = [f"{config.sample.n_samples} images each, weights `{model.weights}`. Best first.", ""]
        lines += [f"| {' | '.join([*Setting._fields, *scorer.titles.values()])} |"]
        lines += ["|---" * (len(Setting._fields) + len(scorer.titles)) + "|"]
        for setting, scores in rows:
            values = ["-" if scores[name] is None else f"{scores[name]:.4f}" for name in scorer.titles]
            lines.append(f"| {' | '.join([*setting.cells(), *values])} |")
        (out / "sweep.md").write_text("\n".join(lines) + "\n")
        plot(rows, ranking, title, out / "sweep.png")
        logging.info("best: %s, %s; table and plot in %s", rows[0][0].name(), rows[0][1], out)
    launch.finish(accelerator)
    return rows


def plot(rows: list[tuple[Setting, dict]], name: str, title: str, path: Path) -> None:
    """Plot a score against the scale, one line for all that is sampled alike but for the scale."""
    lines = {}
    for setting, scores in sorted(rows, key=lambda row: row[0].scale):
        label = "power {}, interval {}, {} steps".format(*setting.cells()[1:])
        lines.setdefault(label, []).append((setting.scale, scores[name]))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), ".-", label=label)
    axes.set(xlabel="guidance scale (1: none)", ylabel=title, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    settings = combine(
        [float(value) for value in values.scales],
        [None if value == "none" else float(value) for value in values.powers],
        [None if value == "none" else tuple(map(float, value.split(":"))) for value in values.intervals],
        [int(value) for value in values.steps],
    )
    scorer = open_scorer(values.reference, values.digits, values.config)
    sweep(values.config, values.nnet_path, Path(values.out), settings, scorer)


if __name__ == "__main__":
    launch.define_config_flag("What to sample from: the config that the weights were trained with.")
    flags.DEFINE_string("nnet_path", None, "Weights: .pth, .safetensors or a checkpoint folder.", required=True)
    flags.DEFINE_string("out", None, "Folder for the sweep.", required=True)
    flags.DEFINE_list("scales", ["1", "1.5", "2", "3", "4"], "Guidance scales, 1: none.")
    flags.DEFINE_list("powers", ["none", "2"], "Powers of the power-cosine schedule, none: constant.")
    flags.DEFINE_list("intervals", ["none"], "LOW:HIGH in sigma / alpha, none: everywhere.")
    flags.DEFINE_list("steps", ["20", "50"], "NFE per image.")
    flags.DEFINE_string("reference", None, "Reference .npz: score by ADM's suite; config.fid_stat unless given.")
    flags.DEFINE_string("digits", "workdir/quickstart/digits", "Real digits, to score digits by.")
    launch.run(main, check_fields)
