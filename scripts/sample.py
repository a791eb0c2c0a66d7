"""Pictures of chosen classes in one grid, and how they come about.

    python scripts/sample.py --classes "golden retriever,207" --nnet_path WEIGHTS [--config configs/NAME.py] \\
        [--autoencoder PATH] [--seed 0 --per_class 4 --cfg 1,1.4,3 --steps 20,50 --columns guidance] [--trajectory] \\
        --grid out.png
    python scripts/sample.py --grid out.png

The second line takes the digits model that scripts/quickstart.sh has trained, and the first ten classes. Classes are
numbers or names, those of the training data's folders (ImageNet's: in English); the config and the names are what is
saved with the weights, the config unless given. Sample j of class k of the list has the index k * per_class + j: with
the same seed, batches and settings it is eval.py's picture of that index and label, to the bit.

--columns chooses what varies along a row, of class, sample, guidance and steps; the rest varies down the rows.
--trajectory writes NAME_trajectory.png beside the grid: for the first sample of each class, at times t from 1 (noise)
to 0, what each branch takes the picture to be, x_0 = (x_t - sigma eps) / alpha at its resolution, coarsest first; the
finest is the one sampled with.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from absl import logging
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from libs import launch
from libs.checkpoint import PIPELINE_FILE, checkpoint_folders, find_weights, load_weights, read_state_dict
from libs.class_names import class_label
from libs.compilation import compile_network, round_weights
from libs.files import advise_on_write_error, replacing
from libs.launch import errors_in_one_line
from libs.pictures import check_finite, finite, to_uint8
from libs.randomness import SampleNoise
from libs.solvers import SOLVERS

QUICKSTART = utils.ROOT / "workdir" / "quickstart" / "train" / "ckpts"
AXES = ("class", "sample", "guidance", "steps")
MOST_TIMES = 8  # of a trajectory that are shown
SMALLEST = 96  # pixels of a picture's side in the grid: smaller ones are enlarged by a whole factor


class Model:
    """A network with all that makes pictures of it.

    Raises ValueError or OSError for weights, a config or an autoencoder that are not there or do not fit.
    """

    def __init__(self, nnet_path: str | None, config_path: str | None, autoencoder: str | None = None):
        if nnet_path is None:
            folders = checkpoint_folders(QUICKSTART)
            if not folders:
                raise FileNotFoundError(
                    f"no trained digits in {QUICKSTART}: run `bash scripts/quickstart.sh`, or give --nnet_path"
                )
            nnet_path = folders[0]
        file = find_weights(nnet_path)
        state = read_state_dict(file)
        self.config, _ = utils.config_of(file, config_path)
        self.config.autoencoder.pretrained_path = autoencoder or find_autoencoder(
            self.config.autoencoder.pretrained_path, file
        )
        self.accelerator = launch.make_accelerator()
        device = self.accelerator.device
        self.nnet = utils.build_empty_network(self.config, device).eval().requires_grad_(False)
        load_weights(self.nnet, state, str(file))
        self.weaker, _ = utils.open_weaker_network(self.config, device)
        for network in [self.nnet, self.weaker] if self.weaker else [self.nnet]:
            round_weights(network, self.accelerator.mixed_precision)
            compile_network(network, "off")
        self.autoencoder = utils.open_autoencoder(self.config, device)
        self.schedule = sde.get_schedule(self.config.schedule)
        self.names = utils.class_names(self.config, file)

    def with_settings(self, seed: int | None, scale: float | None, steps: int | None) -> ml_collections.ConfigDict:
        """The config with those of the settings that are given. Raises ValueError for ones that cannot work."""
        config = self.config.copy_and_resolve_references()
        config.seed = config.seed if seed is None else seed
        config.sample.scale = config.sample.scale if scale is None else scale
        config.sample.sample_steps = config.sample.sample_steps if steps is None else steps
        try:
            utils.check_sampling(config)
        except ValueError as error:  # settings by their names here
            told = str(error).replace("config.sample.sample_steps", "the number of steps (--steps)")
            raise ValueError(told.replace("config.seed", "the seed (--seed)")) from None
        return config

    def sample(self, config: ml_collections.ConfigDict, labels: Sequence[int]) -> np.ndarray:
        """Pictures of the labels, uint8 (len(labels), H, W, 3), in the batches that eval.py makes of them."""
        n, size = len(labels), min(config.sample.mini_batch_size, len(labels))
        batches = [range(first, first + size) for first in range(0, n, size)]  # the last one is filled up
        bar = self.progress(len(batches) * config.sample.sample_steps)

        def watched(*arguments: Tensor) -> tuple[Tensor, ...]:
            outputs = self.nnet(*arguments)
            bar.update()
            return outputs

        sample = utils.make_sampler(
            config,
            watched,
            self.nnet.null_label,
            self.schedule,
            self.autoencoder,
            self.accelerator,
            config.sample.sample_steps,
            self.weaker,
        )
        with bar:
            parts = [sample(batch, [labels[min(i, n - 1)] for i in batch]) for batch in batches]
        check_finite(torch.cat([whole for _, whole in parts])[:n])
        return np.concatenate([as_pictures(images) for images, _ in parts])[:n]

    def progress(self, evaluations: int) -> tqdm:
        """A bar over the network's evaluations, where somebody looks at it."""
        return tqdm(total=evaluations, unit="evaluation", disable=None)

    @torch.no_grad()
    def trajectory(
        self, config: ml_collections.ConfigDict, indices: Sequence[int], labels: Sequence[int]
    ) -> tuple[list[float], list[list[np.ndarray]], np.ndarray]:
        """How samples come about: (times, x_0 estimates [time][branch], the samples), pictures uint8 (B, h, w, 3).

        Raises ValueError for autoguidance, whose guide has other branches.
        """
        settings = config.sample
        if self.weaker is not None:
            raise ValueError("a trajectory shows a network guided by itself: config.sample.autoguidance_path is set")
        bar = self.progress(settings.sample_steps)
        noise = SampleNoise(indices, config.seed, tuple(config.z_shape), self.accelerator.device)
        y = torch.tensor(labels, device=self.accelerator.device)
        predict = sde.guided_predictions(
            self.nnet, self.schedule, y, self.nnet.null_label, settings.scale, settings.scale_pow, settings.interval
        )
        times, estimates = [], []

        def noise_model(x: Tensor, t: float) -> Tensor:
            predictions = predict(x, t)
            bar.update()
            times.append(t)
            estimates.append([self.estimate(x, t, eps) for eps in predictions])
            return predictions[-1]

        with bar, self.accelerator.autocast():
            solver = SOLVERS[settings.algorithm]
            x = solver(noise_model, self.schedule, noise.draw(), settings.sample_steps, noise.draw)
        shown = sorted({round(i) for i in np.linspace(0, len(times) - 1, MOST_TIMES)})
        pictures = [[self.decoded(x_0) for x_0 in estimates[i]] for i in shown]
        return [times[i] for i in shown], pictures, self.decoded(x)

    def estimate(self, x: Tensor, t: float, eps: Tensor) -> Tensor:
        """x_0 at the resolution of a noise prediction eps, which is ratio times the mean noise there (sde.py)."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = self.schedule.log_alpha(time).exp().item(), self.schedule.sigma(time).item()
        ratio = x.shape[-1] // eps.shape[-1]
        return (F.avg_pool2d(x, ratio) - sigma / ratio * eps) / alpha

    def decoded(self, x: Tensor) -> np.ndarray:
        """Latents or pixels as pictures; latents of a smaller grid make smaller pictures."""
        images = self.autoencoder.decode(x) if self.autoencoder else x
        check_finite(finite(images))
        return as_pictures(to_uint8(images))


def find_autoencoder(path: str, weights: Path) -> str:
    """Where the autoencoder is that a config calls `path` ("": none, for pixels). A pipeline has its own beside it."""
    own = weights.parent.parent / "vae"
    return str(own) if path and weights.match(PIPELINE_FILE) and own.is_dir() else path


def as_pictures(images: Tensor) -> np.ndarray:
    """uint8 (B, 3, H, W) as a NumPy array (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def draw_grid(cells: list[list[np.ndarray | None]], rows: list[str], columns: list[str]) -> Image.Image:
    """Pictures with a caption for every row and column; smaller ones are enlarged to the size of the largest."""
    height, width = np.max([cell.shape[:2] for row in cells for cell in row if cell is not None], axis=0)
    scale = max(1, -(-SMALLEST // min(height, width)))
    height, width, gap = int(height * scale), int(width * scale), 4
    font = ImageFont.load_default(13)
    titles = ["\n".join(broken(title, width, font)) for title in columns]
    left = 12 + int(max(font.getlength(title) for title in rows)) if any(rows) else gap
    top = 8 + 17 * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.multiline_text((left + c * (width + gap), 4), title, "black", font)
    for r, (title, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + r * (height + gap)
        draw.text((6, y + height // 2 - 8), title, "black", font)
        for c, cell in enumerate(row):
            if cell is not None:
                picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + c * (width + gap), y))
    return sheet


def broken(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Words in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def save(draw: Callable[[], Image.Image], path: Path) -> None:
    """Draw a picture into a file. Raises OSError, before it is drawn, where the file cannot be written."""
    with advise_on_write_error(path, "set --grid"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"--grid should be the picture to write; {path} is a folder")
    with replacing(path, "set --grid") as file:
        draw().save(file, format="png")


def sample_grid(
    model: Model,
    labels: list[int],
    per_class: int,
    seed: int | None,
    scales: list[float | None],
    steps: list[int | None],
    columns: tuple[str, ...],
) -> Image.Image:
    """The grid of every class, sample, guidance scale and number of steps."""
    every = [label for label in labels for _ in range(per_class)]
    made = {}
    for scale, n_steps in itertools.product(range(len(scales)), range(len(steps))):
        config = model.with_settings(seed, scales[scale], steps[n_steps])
        made[scale, n_steps] = model.sample(config, every)
    default = model.config.sample
    captions = {
        "class": [class_caption(label, model.names) for label in labels],
        "sample": [f"sample {i}" for i in range(per_class)],
        "guidance": [f"scale {default.scale if scale is None else scale:g}" for scale in scales],
        "steps": [f"{default.sample_steps if n is None else n} steps" for n in steps],
    }
    rows = tuple(axis for axis in AXES if axis not in columns)
    across, down = places(columns, captions), places(rows, captions)
    cells = [
        [made[at["guidance"], at["steps"]][at["class"] * per_class + at["sample"]] for at in (r | c for c in across)]
        for r in down
    ]
    return draw_grid(cells, [title(r, captions) for r in down], [title(c, captions) for c in across])


def places(axes: tuple[str, ...], captions: dict[str, list[str]]) -> list[dict[str, int]]:
    """Every place along these axes, {axis: position}, the last axis fastest."""
    ranges = (range(len(captions[axis])) for axis in axes)
    return [dict(zip(axes, found, strict=True)) for found in itertools.product(*ranges)]


def title(place: dict[str, int], captions: dict[str, list[str]]) -> str:
    """The captions of a place, without those of axes of one position (a class is always named)."""
    return ", ".join(captions[a][i] for a, i in place.items() if a == "class" or len(captions[a]) > 1)


def class_caption(label: int, names: Sequence[str]) -> str:
    """A class's name; beside one that is another class's number, its own number."""
    if label == len(names):
        return "no class"
    name = names[label]
    return f"{name} ({label})" if name.isdecimal() and int(name) != label else name


def trajectory_sheet(
    model: Model, config: ml_collections.ConfigDict, labels: list[int], indices: Sequence[int]
) -> Image.Image:
    """How the samples of these labels and indices come about: a row per sample and branch, a column per time.

    In the last column is the sample. Raises ValueError for autoguidance.
    """
    times, pictures, samples = model.trajectory(config, indices, labels)
    rows, cells = [], []
    branches = range(len(model.nnet.stages))
    for k, r in itertools.product(range(len(labels)), branches):
        patch = model.nnet.patch_sizes[r]
        rows.append(f"{class_caption(labels[k], model.names)}, branch {r + 1}" + (f" (1/{patch})" if patch > 1 else ""))
        cells.append([at_time[r][k] for at_time in pictures] + [samples[k] if r == branches[-1] else None])
    return draw_grid(cells, rows, [f"t = {t:.3g}" for t in times] + ["sample"])


def numbers(text: str | None, kind: type, option: str) -> list:
    """The values of a list option, [None] where it is not given. Raises ValueError naming it."""
    try:
        return [None] if text is None else [kind(value) for value in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between; found {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = "with commas between; the config's unless given; a trajectory takes the first"
    parser.add_argument("--classes", help="numbers or names, with commas between; the first ten unless given")
    parser.add_argument("--nnet_path", help="weights, as of eval.py; the quickstart's newest unless given")
    parser.add_argument("--config", help="the config it was trained with; what is saved with the weights unless given")
    parser.add_argument("--autoencoder", help="file, folder or hub id; the config's unless given")
    parser.add_argument("--seed", type=int, help="0 to 2^63 - 1; the config's unless given")
    parser.add_argument("--per_class", type=int, default=1, help="samples of each class")
    parser.add_argument("--cfg", help=f"guidance scales, {listed}")
    parser.add_argument("--steps", help=f"numbers of network evaluations, {listed}")
    parser.add_argument("--columns", default="class,sample", help=f"what varies along a row, of {', '.join(AXES)}")
    parser.add_argument("--trajectory", action="store_true", help="also draw how the samples come about")
    parser.add_argument("--grid", type=Path, default=Path("samples.png"), help="the picture to write, a .png")
    arguments = parser.parse_args()
    logging.use_absl_handler()
    with errors_in_one_line():
        columns = tuple(axis.strip() for axis in arguments.columns.split(","))
        if not set(columns) <= set(AXES) or len(set(columns)) < len(columns):
            raise ValueError(f"--columns must be some of {', '.join(AXES)}; found {arguments.columns}")
        if arguments.per_class < 1:
            raise ValueError(f"--per_class must be at least 1; found {arguments.per_class}")
        if arguments.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid must end in .png, the form it is written in; found {arguments.grid}")
        scales, steps = numbers(arguments.cfg, float, "--cfg"), numbers(arguments.steps, int, "--steps")
        model = Model(arguments.nnet_path, arguments.config, arguments.autoencoder)
        words = arguments.classes.split(",") if arguments.classes else range(min(10, len(model.names) or 1))
        labels = [class_label(word, model.names) for word in words]
        for scale, n_steps in itertools.product(scales, steps):
            model.with_settings(arguments.seed, scale, n_steps)  # a bad one is told before any is made
        grid = partial(sample_grid, model, labels, arguments.per_class, arguments.seed, scales, steps, columns)
        save(grid, arguments.grid)
        print(arguments.grid)
        if arguments.trajectory:
            path = arguments.grid.with_name(f"{arguments.grid.stem}_trajectory.png")
            config = model.with_settings(arguments.seed, scales[0], steps[0])
            indices = [k * arguments.per_class for k in range(len(labels))]  # the first sample of each class
            save(partial(trajectory_sheet, model, config, labels, indices), path)
            print(path)


if __name__ == "__main__":
    main()
