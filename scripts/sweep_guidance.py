"""Score every combination of guidance scale, schedule, interval and number of steps on sets of images.

    accelerate launch [--multi_gpu --num_processes N] scripts/sweep_guidance.py --config=configs/NAME.py \
        --nnet_path=WEIGHTS --out=workdir/sweep --scales=1,1.5,2,3 --powers=none,2 --intervals=none,0.2:2 --steps=50 \
        --config.sample.n_samples=5000 [--reference=REF.npz | --digits=workdir/quickstart/digits]

Scores are those of ADM's suite against --reference (or config.fid_stat, where it and the Inception weights are there),
or else, for the digits, class accuracy and Fréchet distance as scripts/score_digits.py has them. A power is that of the
power-cosine schedule (none: constant); an interval is LOW:HIGH in sigma / alpha (none: always); scale 1 is no guidance,
made once per number of steps. All else is the config's.

Writes into --out: <combination>/images and <combination>/scores.json, sweep.csv and sweep.md (best first), sweep.png
(scores against scale, the first score against steps). The same command again, or one with more values, makes only what
is missing; of a scored combination the images may be removed. With few images FID ranks settings but is too high to be
compared with published ones.
"""

import csv
import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import accelerate
import matplotlib
import ml_collections
from absl import flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import eval as evaluation
import utils
from configs.common import check_fields
from libs import launch
from libs.files import file_digest, replacing
from libs.metrics import PlannedImages, SampledImages, open_reference, score_sets
from libs.report import NAMES
from libs.sample_set import RANGE
from scripts import score_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Setting:
    """One combination of the sweep; power None: constant, interval None: always."""

    scale: float
    power: float | None
    interval: tuple[float, float] | None
    steps: int

    @property
    def schedule(self) -> str:
        """What the scale is combined with, in words."""
        shape = "constant" if self.power is None else f"power {self.power:g}"
        return shape if self.interval is None else f"{shape}, {self.interval[0]:g} to {self.interval[1]:g}"

    @property
    def name(self) -> str:
        """A folder's name."""
        power = f"_power{self.power:g}" if self.power is not None else ""
        interval = f"_interval{self.interval[0]:g}-{self.interval[1]:g}" if self.interval is not None else ""
        return f"scale{self.scale:g}_steps{self.steps}{power}{interval}"


def parse(values: list[str], flag: str, kind: type, none: bool = False) -> list:
    """The values of a list flag, "none" among them where it may be. Raises ValueError naming the flag."""
    try:
        found = [None if none and value == "none" else kind(value) for value in values]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(values)} cannot be read: see --help for its form") from None
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--{flag} must hold one or more different values; found {','.join(values) or 'none'}")
    return found


def parse_interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(":"))
    return low, high


def settings_of(scales: list, powers: list, intervals: list, steps: list) -> list[Setting]:
    """All combinations; without guidance (scale 1) schedules are all the same."""
    found = [
        Setting(scale, *((None, None) if scale == 1 else (power, interval)), n)
        for n, scale, power, interval in itertools.product(steps, scales, powers, intervals)
    ]
    return list(dict.fromkeys(found))


class AdmScorer:
    """Scores by ADM's suite.

    Attributes (of every scorer):
        titles: of the scores; the first is the one to rank by, lower is better.
        identity: what they depend on beside the images, as JSON values.
    """

    def __init__(self, reference: str | Path, weights: Path):
        self.titles = NAMES
        self.reference, self.weights = open_reference(reference), weights
        self.identity = {"reference_sha256": file_digest(self.reference.path), "inception_sha256": file_digest(weights)}

    def __call__(self, folder: Path, accelerator: accelerate.Accelerator) -> dict | None:
        """Scores of the images in `folder`, by all processes; None but on the main one."""
        scores = score_sets([SampledImages(folder)], self.reference, self.weights, accelerator)
        return scores and scores.values


class DigitsScorer:
    """Scores of the digits: Fréchet distance and class accuracy by the classifier of scripts/score_digits.py."""

    def __init__(self, digits: str):
        self.titles = {"frechet_distance": "Fréchet distance", "class_accuracy": "class accuracy"}
        self.real = [score_digits.read_real(Path(digits) / part) for part in ("train", "held_out")]
        self.judge = score_digits.Judge(*self.real[0])
        self.identity = {"digits": digits}

    def __call__(self, folder: Path, accelerator: accelerate.Accelerator) -> dict | None:
        if not accelerator.is_main_process:
            return None
        found = score_digits.score(*score_digits.read_generated(folder), *self.real, self.judge)
        return {name: found[name] for name in self.titles}


Scorer = AdmScorer | DigitsScorer


def choose_scorer(reference: str | None, digits: str, config: ml_collections.ConfigDict) -> Scorer:
    """ADM's suite where it is asked for or possible, else the digits'. Raises ValueError, OSError."""
    size = utils.image_size(config, utils.open_autoencoder(config, "cpu"))
    planned = PlannedImages(config.sample.n_samples, size, "config.sample.n_samples")
    if scoring := utils.open_scoring(reference or config.fid_stat, reference is not None, planned):
        return AdmScorer(scoring[0].path, scoring[1])
    if not Path(digits).is_dir():
        raise ValueError(
            f"nothing to score by: set --reference to a reference .npz, or --digits (no folder {digits}) to what "
            "scripts/make_digits.py writes"
        )
    return DigitsScorer(digits)


def config_of(setting: Setting, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config that samples one combination. Raises ValueError for one that cannot be sampled."""
    config = ml_collections.ConfigDict(config)
    config.sample.update(scale=setting.scale, scale_pow=setting.power, sample_steps=setting.steps)
    config.sample.interval = setting.interval
    utils.check_sampling(config)
    return config


def read_scores(file: Path) -> tuple[dict, dict]:
    """The scores that `score_of` wrote, and what decided them. Raises ValueError for a damaged file."""
    try:
        kept = json.loads(file.read_text())
        return dict(kept["scores"]), dict(kept["decided_by"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it, and it is made again") from error


def score_of(
    setting: Setting,
    config: ml_collections.ConfigDict,
    out: Path,
    loaded: dict,
    scorer: Scorer,
    accelerator: accelerate.Accelerator,
) -> dict | None:
    """Scores of one combination, made or read; None but on the main process.

    Args:
        loaded: the arguments nnet, autoencoder and weaker of `eval.sample_and_score`, and the two files of weights.
    """
    config = config_of(setting, config)
    networks, (weights, weaker_weights) = loaded["networks"], loaded["files"]
    made_with = evaluation.sampling_settings(
        config, weights, weaker_weights, networks["autoencoder"], accelerator.mixed_precision
    )
    made_with[RANGE] = [0, config.sample.n_samples]
    folder, file = out / setting.name / "images", out / setting.name / "scores.json"
    decided_by = {**made_with, **scorer.identity}
    if file.is_file():
        scores, kept_by = read_scores(file)
        if kept_by == decided_by:
            return scores if accelerator.is_main_process else None
    evaluation.check_same_settings(folder, made_with)
    accelerator.wait_for_everyone()  # every process has looked before one writes
    evaluation.sample_and_score(config, folder, accelerator=accelerator, settings=made_with, **networks)
    scores = scorer(folder, accelerator)
    if accelerator.is_main_process:
        with replacing(file) as opened:
            opened.write(json.dumps({"scores": scores, "decided_by": decided_by}, indent=1).encode())
    accelerator.wait_for_everyone()  # no process looks for this file before it is there
    return scores


def write_tables(rows: list[tuple[Setting, dict]], scorer: Scorer, out: Path, head: str) -> None:
    """sweep.csv and sweep.md, best first."""
    titles = {name: title for name, title in scorer.titles.items() if rows[0][1][name] is not None}
    columns = ("scale", "schedule", "steps", *titles.values())
    cells = [
        (f"{setting.scale:g}", "none" if setting.scale == 1 else setting.schedule, str(setting.steps))
        + tuple(f"{scores[name]:.4f}" for name in titles)
        for setting, scores in rows
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    lines = [head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    for name, content in (("sweep.csv", text.getvalue()), ("sweep.md", "\n".join(lines) + "\n")):
        with replacing(out / name) as file:
            file.write(content.encode())


def draw(rows: list[tuple[Setting, dict]], scorer: Scorer, path: Path) -> None:
    """The first scores against scale, at the most steps; and the first score against steps, of each schedule's best."""
    names = [name for name in ("fid", "inception_score", *scorer.titles) if rows[0][1].get(name) is not None]
    names = list(dict.fromkeys(names))[:2]
    most = max(setting.steps for setting, _ in rows)
    unguided = {setting.steps: scores for setting, scores in rows if setting.scale == 1}
    schedules = list(dict.fromkeys(setting.schedule for setting, _ in rows if setting.scale > 1))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    for schedule in schedules:
        own = [row for row in rows if row[0].scale > 1 and row[0].schedule == schedule]
        at_most = sorted((s.scale, scores) for s, scores in own if s.steps == most)
        if most in unguided:
            at_most = [(1, unguided[most]), *at_most]
        for axis, name in zip(axes, names, strict=False):
            axis.plot([scale for scale, _ in at_most], [scores[name] for _, scores in at_most], ".-", label=schedule)
        best = own[0][0].scale  # rows come best first
        points = sorted((s.steps, scores[names[0]]) for s, scores in own if s.scale == best)
        axes[2].plot(*zip(*points, strict=True), ".-", label=f"{schedule}, scale {best:g}")
    if unguided:
        points = sorted((steps, scores[names[0]]) for steps, scores in unguided.items())
        axes[2].plot(*zip(*points, strict=True), ".--", color="grey", label="no guidance")
    for axis, name in zip(axes, names, strict=False):
        axis.set(xlabel=f"guidance scale ({most} steps; 1: none)", ylabel=scorer.titles[name])
    axes[0].set_yscale("log")
    axes[2].set(xlabel="network evaluations", ylabel=scorer.titles[names[0]], xscale="log")
    steps = sorted({setting.steps for setting, _ in rows})
    axes[2].set_xticks(steps, steps, minor=False)
    axes[2].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def sweep(
    config: ml_collections.ConfigDict, nnet_path: str, out: Path, settings: list[Setting], scorer: Scorer
) -> list | None:
    """Score all settings; on the main process write the tables and the plot and return the rows, best first.

    Raises:
        ValueError, OSError: settings or files that do not fit.
    """
    for setting in settings:
        config_of(setting, config)
    accelerator = launch.make_accelerator()
    if not accelerator.is_main_process:
        logging.set_verbosity(logging.ERROR)
    networks, files = evaluation.open_networks(config, nnet_path, accelerator)
    weights = files["nnet"]
    loaded = {"networks": networks, "files": (weights, files["weaker"])}
    rows = [(setting, score_of(setting, config, out, loaded, scorer, accelerator)) for setting in settings]
    if accelerator.is_main_process:
        first = next(iter(scorer.titles))
        rows.sort(key=lambda row: row[1][first])
        head = f"{config.sample.n_samples} images each, `{config.sample.algorithm}`, weights `{weights}`. Best first."
        write_tables(rows, scorer, out, head)
        draw(rows, scorer, out / "sweep.png")
        logging.info("best: %s, %s; tables and plot in %s", rows[0][0].name, rows[0][1], out)
    main = accelerator.is_main_process
    launch.finish(accelerator)
    return rows if main else None


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if not values.nnet_path or not values.out:
        raise ValueError("set --nnet_path (weights) and --out (folder for the sweep)")
    settings = settings_of(
        parse(values.scales, "scales", float),
        parse(values.powers, "powers", float, none=True),
        parse(values.intervals, "intervals", parse_interval, none=True),
        parse(values.steps, "steps", int),
    )
    scorer = choose_scorer(values.reference, values.digits, values.config)
    sweep(values.config, values.nnet_path, Path(values.out), settings, scorer)


if __name__ == "__main__":
    launch.define_config_flag("What to sample from: the config that the weights were trained with.")
    flags.DEFINE_string("nnet_path", None, "Weights: .pth, .safetensors or a checkpoint folder.")
    flags.DEFINE_string("out", None, "Folder for the sweep.")
    flags.DEFINE_list("scales", ["1", "1.5", "2", "3", "4"], "Guidance scales, 1: none.")
    flags.DEFINE_list("powers", ["none", "2"], "Powers of the power-cosine schedule, none: constant.")
    flags.DEFINE_list("intervals", ["none"], "LOW:HIGH in sigma / alpha, none: always.")
    flags.DEFINE_list("steps", ["20", "50"], "Network evaluations per image.")
    flags.DEFINE_string("reference", None, "Reference .npz: score by ADM's suite; config.fid_stat unless given.")
    flags.DEFINE_string("digits", "workdir/quickstart/digits", "Real digits, to score digits by.")
    launch.run(main, check_fields)
