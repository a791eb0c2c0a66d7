"""Write docs/configuration.md, the table of all settings, from the comments of configs/common.py.

python scripts/make_config_reference.py
"""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from configs import common

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "configuration.md"

ABOUT = {
    "": "The run",
    "nnet": "The network",
    "dataset": "Data",
    "autoencoder": "Autoencoder",
    "train": "Training",
    "optimizer": "Optimiser",
    "lr_scheduler": "Learning rate",
    "ema": "Averages of the weights",
    "init": "Weights to start from",
    "sample": "Sampling",
    "wandb": "Weights & Biases",
}
HEAD = """# Configuration

Every setting, its default (the ImageNet 256x256 recipe of the paper) and what it may be. Made from the comments of
[configs/common.py](../configs/common.py) by `python scripts/make_config_reference.py`; a test keeps the two equal.

An experiment is a file that states its differences; any field can be set on the command line,
`--config.train.batch_size=256`, `--config.nnet.stages[0].dim=768`, `--config.sample.interval="(0.5, 5.0)"`. Sizes that
follow from others are no settings: patch sizes and position tables come from `z_shape` and the number of stages, hidden
widths from `mlp_ratio`.
"""


def rows(lines: list[str]) -> list[tuple[str, str, str, str]]:
    """(section, field, default, comment) of the lines of a config function, in order.

    A comment stands behind a field or in the lines before it. Raises ValueError for a field without one.
    """
    found, section, above = [], "", []
    for line in lines:
        if match := re.fullmatch(r"    config\.(\w+) = d\(", line):
            section = match[1]
        elif line == "    )":
            section = ""
        elif match := re.fullmatch(r" {8}# (.*)", line):
            above.append(match[1])
        elif match := re.fullmatch(r"    config\.(\w+) = (.*?)(?:  # (.*))?| {8}(\w+)=(.*?),(?:  # (.*))?", line):
            name, value = match[1] or match[4], match[2] or match[5]
            comment = " ".join([*above, match[3] or match[6] or ""]).strip()
            if value.startswith("ml_collections"):
                continue
            if not comment:
                raise ValueError(f"common.py: {name} has no comment: say there what it means and may be")
            found.append((section, name, "None" if value.startswith("placeholder") else value, comment))
            above = []
    return found


def table(title: str, of: list[tuple[str, str, str]]) -> str:
    """A section of the document: (name, default, comment) to a Markdown table."""
    cells = ""
    for name, value, text in of:
        default = f"`{value}`" if value else ""
        cells += f"| `{name}` | {default} | {text.replace('<', '&lt;')} |\n"
    return f"\n## {title}\n\n| setting | default | |\n|---|---|---|\n{cells}"


def reference() -> str:
    """The whole document."""
    stage, base = stage_rows(common.stage), rows_of(common.base)
    document = HEAD
    for section, title in ABOUT.items():
        of = [(f"{section}.{name}" if section else name, value, text) for s, name, value, text in base if s == section]
        document += table(title, of)
        if section == "nnet":
            document += table("A branch (`stage`, or its short forms `transformer` and `convnext`)", stage)
    return document


def rows_of(function: Callable) -> list[tuple[str, str, str, str]]:
    return rows(inspect.getsource(function).splitlines())


def stage_rows(stage: Callable) -> list[tuple[str, str, str]]:
    """(name, default, comment) of the settings of a branch, their defaults being the function's."""
    defaults = {
        name: json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
        for name, parameter in inspect.signature(stage).parameters.items()
        if parameter.default is not parameter.empty
    }
    return [(f"nnet.stages[i].{name}", defaults.get(name, ""), text) for _, name, _, text in rows_of(stage)]


def main() -> None:
    OUT.write_text(reference())
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
