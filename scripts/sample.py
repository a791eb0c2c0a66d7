"""Draw samples of chosen classes in one grid, and how they come about.

    python scripts/sample.py --classes "golden retriever,207" --nnet_path WEIGHTS [--config configs/NAME.py] \\
        [--autoencoder PATH] [--seed 0 --per_class 4 --cfg 1,1.4,3 --steps 20,50] [--trajectory] --grid out.png
    python scripts/sample.py --grid out.png

The second line takes the digits model that scripts/quickstart.sh has trained, and the first ten classes. Sample j of
class k of the list has the index k * per_class + j: with the same seed, batches and settings it is eval.py's image of
that index and label, to the bit. The grid has a row for each guidance scale and NFE, and a column for each sample.

--trajectory writes NAME_trajectory.png beside the grid: for the first sample of each class, at times t from 1 (noise)
to 0, each branch's estimate x_0 = (x_t - sigma eps) / alpha at its resolution, coarsest first.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from absl import logging
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from libs import UserError, launch
from libs.autoencoder import check_finite
from libs.checkpoint import checkpoint_folders
from libs.class_names import class_label
from libs.files import check_writable, replacing
from libs.images import draw_sheet
from libs.launch import Parser, errors_in_one_line
from libs.model import Model

QUICKSTART = utils.ROOT / "workdir" / "quickstart" / "train" / "ckpts"
MOST_TIMES = 8  # of a trajectory that are shown


def open_model(nnet_path: str | None, config_path: str | None = None, autoencoder: str | None = None) -> Model:
    """Open a model on this machine's device; nnet_path None: the quickstart's newest checkpoint."""
    if nnet_path is None:
        folders = checkpoint_folders(QUICKSTART)
        if not folders:
            raise UserError(f"no model in {QUICKSTART}: run `bash scripts/quickstart.sh`, or give --nnet_path")
        nnet_path = folders[0]
    accelerator = launch.make_accelerator()
    config = utils.load_config(config_path) if config_path else None
    return Model.open(nnet_path, config, accelerator.device, accelerator.mixed_precision, autoencoder=autoencoder)


def with_settings(model: Model, seed: int | None, scale: float | None, steps: int | None) -> Model:
    """Return the model with those settings that are given. Raises UserError for ones that cannot work."""
    config = model.config.copy_and_resolve_references()
    given = {"seed": seed, "sample.scale": scale, "sample.sample_steps": steps}
    config.update_from_flattened_dict({name: value for name, value in given.items() if value is not None})
    utils.check_sampling(config)
    return replace(model, config=config)


def draw_samples(model: Model, labels: Sequence[int]) -> np.ndarray:
    """Sample the labels, uint8 (len(labels), H, W, 3), in the batches that eval.py makes of them."""
    n, size = len(labels), min(model.config.sample.mini_batch_size, len(labels))
    batches = [range(first, first + size) for first in range(0, n, size)]  # the last one is filled up
    nfe = len(batches) * model.config.sample.sample_steps
    with tqdm(total=nfe, unit="evaluation", disable=None) as progress:
        sample = model.sampler(watch=lambda *_: progress.update())
        parts = [sample(batch, [labels[min(i, n - 1)] for i in batch]) for batch in batches]
    check_finite(torch.cat([finite for _, finite in parts])[:n])
    return np.concatenate([as_arrays(images) for images, _ in parts])[:n]


def trajectory(
    model: Model, indices: Sequence[int], labels: Sequence[int]
) -> tuple[list[float], list[list[np.ndarray]], np.ndarray]:
    """Sample, and record how: (times, x_0 estimates [time][branch], the samples), pictures uint8 (B, h, w, 3)."""
    times, estimates, schedule = [], [], sde.get_schedule(model.config.schedule)

    def record(x: Tensor, t: float, predictions: Sequence[Tensor]) -> None:
        progress.update()
        times.append(t)
        estimates.append([sde.convert(schedule, x, output, t, model.config.prediction, "x") for output in predictions])

    with tqdm(total=model.config.sample.sample_steps, unit="evaluation", disable=None) as progress:
        samples, finite = model.sampler(watch=record)(indices, labels)
    check_finite(finite)
    shown = sorted({round(i) for i in np.linspace(0, len(times) - 1, MOST_TIMES)})
    pictures = [[as_arrays(model.to_images(x_0)[0]) for x_0 in estimates[i]] for i in shown]
    return [times[i] for i in shown], pictures, as_arrays(samples)


def as_arrays(images: Tensor) -> np.ndarray:
    """Turn uint8 (B, 3, H, W) into a NumPy array (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "set --grid") as file:
        picture.save(file, format="png")
    print(path)


def sample_grid(
    model: Model, labels: list[int], per_class: int, seed: int | None, scales: list, steps: list
) -> Image.Image:
    """Draw the samples of every class, a row for each guidance scale and NFE."""
    models = [with_settings(model, seed, scale, n) for scale in scales for n in steps]  # checks all before sampling
    cells = [list(draw_samples(each, [label for label in labels for _ in range(per_class)])) for each in models]
    settings = [each.config.sample for each in models]
    rows = [f"scale {each.scale:g}, {each.sample_steps} steps" if len(models) > 1 else "" for each in settings]
    names = [class_caption(label, model.class_names) for label in labels]
    columns = [f"{name}, sample {j}" if per_class > 1 else name for name in names for j in range(per_class)]
    return draw_sheet(cells, rows, columns)


def class_caption(label: int, names: Sequence[str]) -> str:
    """Return a class's name; beside one that is another class's number, its own number."""
    if label == len(names):
        return "no class"
    name = names[label]
    return f"{name} ({label})" if name.isdecimal() and int(name) != label else name


def trajectory_sheet(model: Model, labels: list[int], indices: Sequence[int]) -> Image.Image:
    """Draw how samples come about: a row per sample and branch, a column per time, the sample in the last column."""
    times, pictures, samples = trajectory(model, indices, labels)
    rows, cells = [], []
    patches = model.nnet.patch_sizes[-len(pictures[0]) :]  # a guiding network may lack the coarsest
    for k, (r, patch) in itertools.product(range(len(labels)), enumerate(patches)):
        name = class_caption(labels[k], model.class_names)
        rows.append(f"{name}, branch {r + 1}" + (f" (1/{patch})" if patch > 1 else ""))
        cells.append([at_time[r][k] for at_time in pictures] + [samples[k] if patch == 1 else None])
    return draw_sheet(cells, rows, [f"t = {t:.3g}" for t in times] + ["sample"])


def floats(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def integers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def main() -> None:
    parser = Parser(__doc__)
    listed = "with commas between; the config's unless given; a trajectory takes the first"
    parser.add_argument("--classes", help="numbers or names, with commas between; the first ten unless given")
    parser.add_argument("--nnet_path", help="weights, as of eval.py; the quickstart's newest unless given")
    parser.add_argument("--config", help="the config it was trained with; what is saved with the weights unless given")
    parser.add_argument("--autoencoder", help="file, folder or hub id; the config's unless given")
    parser.add_argument("--seed", type=int, help="0 to 2^63 - 1; the config's unless given")
    parser.add_argument("--per_class", type=int, default=1, help="samples of each class")
    parser.add_argument("--cfg", type=floats, default=[None], help=f"guidance scales, {listed}")
    parser.add_argument("--steps", type=integers, default=[None], help=f"NFE, {listed}")
    parser.add_argument("--trajectory", action="store_true", help="also draw how the samples come about")
    parser.add_argument("--grid", type=Path, default=Path("samples.png"), help="the picture to write, a PNG")
    arguments = parser.parse_args()
    logging.use_absl_handler()
    with errors_in_one_line():
        check_writable(arguments.grid, "--grid", [".png", ".PNG"])
        model = open_model(arguments.nnet_path, arguments.config, arguments.autoencoder)
        words = arguments.classes.split(",") if arguments.classes else range(min(10, len(model.class_names) or 1))
        labels = [class_label(word, model.class_names) for word in words]
        seed, scales, steps, per_class = arguments.seed, arguments.cfg, arguments.steps, arguments.per_class
        save(sample_grid(model, labels, per_class, seed, scales, steps), arguments.grid)
        if arguments.trajectory:
            path = arguments.grid.with_name(f"{arguments.grid.stem}_trajectory.png")
            indices = [k * per_class for k in range(len(labels))]  # the first sample of each class
            first = with_settings(model, seed, scales[0], steps[0])
            save(trajectory_sheet(first, labels, indices), path)


if __name__ == "__main__":
    main()
