"""Draw the network of a config, its shapes taken from the model that the config builds.

python scripts/draw_network.py --config configs/DiMR-XL-2R_imagenet256.py --out assets/pictures/network.png
"""

import sys
from pathlib import Path

import matplotlib
import ml_collections
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from libs.launch import Parser
from libs.model import build_network

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

PITCH = 2.3  # between rows
ATTENTION, CONVOLUTION, PLAIN, EDGE = "#cfe0f5", "#d8efd3", "#f1f1f1", "#444444"


def box(axes: plt.Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=EDGE, lw=1)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.4)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "lw": 1.2, **style})


def draw(config: ml_collections.ConfigDict, title: str, out: Path) -> None:
    """Draw one row per branch: patches, blocks with long skips, head; the features of each row go to the next."""
    with torch.device("meta"):
        nnet = build_network(config)
        outputs = nnet(torch.zeros(1, *config.z_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    channels, height, width = config.z_shape
    figure, axes = plt.subplots(figsize=(10, 0.8 + 1.9 * len(nnet.stages)))
    x_shape = f"x  {channels}×{height}×{width}"
    for r, (stage, output) in enumerate(zip(nnet.stages, outputs, strict=True)):
        spec, y = stage.spec, -PITCH * r
        transformer = spec.block_type == "TransformerBlock"
        half = spec.depth // 2
        color = ATTENTION if transformer else CONVOLUTION
        kind = "attention +\ngated MLP" if transformer else f"{spec.kernel_size}×{spec.kernel_size} conv +\ngated MLP"
        label = "\n+ class token" if transformer else ""
        for x, width, text, fill in (
            (0.0, 1.5, f"{x_shape}\nnoisy, full size", PLAIN),
            (2.0, 1.6, f"{spec.patch_size}×{spec.patch_size} patches\n+ positions{label}", PLAIN),
            (4.1, 1.5, f"{half} blocks\n{kind}", color),
            (6.1, 1.0, "1 block", color),
            (7.6, 1.5, f"{half} blocks\nwith skips", color),
            (9.6, 1.7, f"head\nε at {output.shape[-2]}×{output.shape[-1]}", PLAIN),
        ):
            box(axes, x, y, width, 0.9, text, fill)
            if x:
                arrow(axes, (x - 0.48, y + 0.45), (x - 0.02, y + 0.45))
        arrow(axes, (4.85, y + 0.92), (8.35, y + 0.92), color="#888888", connectionstyle="arc3,rad=-0.12", lw=1)
        axes.text(6.6, y + 1.14, "long skips", fontsize=7, ha="center", color="#666666")
        axes.text(
            11.45, y + 0.45, f"{spec.max_height}×{spec.max_width} cells, width {spec.dim}", fontsize=8, va="center"
        )
        if r + 1 < len(nnet.stages):
            dim = nnet.stages[r + 1].upsample.proj.in_features
            middle, top = y - 0.55, y - PITCH + 0.95  # down from the blocks, across, down into the next branch
            axes.plot([8.35, 8.35, 2.8], [y - 0.05, middle, middle], color=EDGE, lw=1.2)
            arrow(axes, (2.8, middle), (2.8, top))
            axes.text(5.6, y - 0.42, f"all {spec.depth + 1} features: {dim:,} channels", fontsize=7, ha="center")
            axes.text(5.6, y - 0.78, "norm, Linear, ×2 pixel shuffle, norm; added", fontsize=7, ha="center")
    axes.set(xlim=(-0.1, 13.6), ylim=(-PITCH * len(nnet.stages) + 2.2, 1.3), title=title)
    axes.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", default="configs/DiMR-XL-2R_imagenet256.py")
    parser.add_argument("--out", default="assets/pictures/network.png")
    arguments = parser.parse_args()
    title = f"{Path(arguments.config).stem}: time enters every norm, the class one token of the first branch"
    draw(utils.load_config(arguments.config), title, Path(arguments.out))


if __name__ == "__main__":
    main()
