"""Weights from any form into any other: released names, this project's safetensors, a diffusers pipeline.

    python scripts/convert_checkpoint.py WEIGHTS OUT [--config configs/NAME.py]

WEIGHTS is all that --nnet_path takes: a .pth in the released names, a .safetensors, a checkpoint folder (its EMA
weights), a folder of a pipeline, or hf://OWNER/REPOSITORY/FILE. OUT decides what is made:

    NAME.safetensors   this project's names, the config and the classes' inside; beside it a model card, README.md
    NAME.pth           a plain state dict in the released names
    a folder           a pipeline for libs/pipeline.py, with the autoencoder and the class names; and a model card

Tensors stay as they are, to the bit, in whatever precision they are stored. The config is --config, or else what was
saved with the weights: inside a .safetensors, in a checkpoint's or pipeline's state.json. For the released files it is
configs/DiMR-XL-2R_imagenet256.py or configs/DiMR-G-2R_imagenet256.py.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_collections
import torch
from absl import logging
from safetensors import SafetensorError
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from libs.checkpoint import (
    PIPELINE_FILE,
    find_weights,
    fitting_weights,
    read_state_dict,
    released_name,
    settings_metadata,
    write_safetensors,
)
from libs.files import check_writable, file_digest, replacing
from libs.launch import errors_in_one_line
from libs.pipeline import DiMRNetwork, DiMRPipeline, SolverScheduler

RELEASED_FILES = (".pth", ".pt")
CARD_FILE = "README.md"
MARK = "library_name: dimr"
CARD = """---
{mark}
pipeline_tag: unconditional-image-generation
tags: [diffusion, dimr{conditional}]
---
# {name}

A DiMR, a diffusion model that denoises at several resolutions at once (Liu et al., NeurIPS 2024, arXiv 2406.09416).

| | |
|---|---|
| parameters | {parameters:,} |
| branches, coarsest first | {branches} |
| input | {z_shape} ({space}), {n_classes} classes, noise schedule {schedule} |
| training step | {step} |
| weights converted from | `{source}` |
| SHA-256 of that file | `{source_sha256}` |
| SHA-256 of `{file}` | `{sha256}` |

## Use

From the root of this project's repository, with the path that the weights have there:

```bash
{use}
```

## To fill in

Data it was trained on and their licence; scores, each with the command that measured it and the machine; known faults.

## Config

```json
{config}
```
"""


@dataclass
class Model:
    """Weights in this project's names with what is known of them."""

    state: dict[str, Tensor]
    config: ml_collections.ConfigDict
    step: int | None  # of training
    class_names: list[str]
    source: Path

    @property
    def settings(self) -> dict:
        """What is saved with the weights (see libs.checkpoint.saved_settings)."""
        return {"config": utils.config_json(self.config), "step": self.step, "class_names": self.class_names}


def read_model(path: str, config_path: str | None = None) -> Model:
    """Weights in any form, with their config.

    Raises:
        ValueError, OSError: no such weights, no config for them, or one that does not fit.
    """
    file = find_weights(path)
    state = read_state_dict(file)
    config, step = utils.config_of(file, config_path)
    state = fitting_weights(utils.build_network_on_meta(config), state, str(file))
    return Model(state, config, step, utils.class_names(config, file), file)


def write_released(model: Model, out: Path) -> None:
    """One file in the released names, such as the released code loads. Raises OSError where it cannot be written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(out, "set OUT") as file:
            torch.save({released_name(name): tensor for name, tensor in model.state.items()}, file)
    except RuntimeError as error:  # how torch.save says that the disk is full
        raise OSError(f"Cannot write {out}: {str(error).splitlines()[0]}. Free space there, or set OUT") from error


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path to write a folder to, which is named `out` at the end; after an error nothing is left of it."""
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.replace(out)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(f"Cannot write {out}: {error}. Free space there, or set OUT") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_pipeline(model: Model) -> DiMRPipeline:
    """The pipeline of a model and its config's autoencoder, sampling as the config says.

    Raises:
        ValueError, OSError: sampling settings that a pipeline has not, or an autoencoder that is not there.
    """
    config, sample = model.config, model.config.sample
    utils.check_sampling(config)
    if sample.autoguidance_path:
        raise ValueError("a pipeline has no second network: set config.sample.autoguidance_path to none")
    autoencoder = utils.open_autoencoder(config, torch.device("cpu"))
    nnet = utils.build_network_on_meta(config)
    nnet.load_state_dict(model.state, assign=True)
    return DiMRPipeline(
        DiMRNetwork.of(nnet, config.nnet.norm_type),
        SolverScheduler(config.schedule, sample.algorithm),
        autoencoder.vae if autoencoder else None,
        config.schedule,
        dict(enumerate(model.class_names)),
        {
            "guidance_scale": sample.scale,
            "guidance_power": sample.scale_pow,
            "guidance_interval": sample.interval,
            "num_inference_steps": sample.sample_steps,
        },
        {"step": model.step, "config": utils.config_json(config)},
    )


def write_pipeline(model: Model, out: Path) -> None:
    """A folder for DiMRPipeline.from_pretrained; beside the weights a state.json with the config."""
    pipe = build_pipeline(model)
    with whole(out) as temporary:
        pipe.save_pretrained(temporary)
        write_card(model, temporary / PIPELINE_FILE, temporary / CARD_FILE, out)


def write_card(model: Model, weights: Path, card: Path, out: Path) -> None:
    """Fill in the model card `card` of what is at `out`; one that is there is kept, as somebody may have filled it."""
    if card.exists():
        print(f"{card} is kept as it is: remove it to have it written for {out.name}")
        return
    stages = utils.build_stages(model.config)
    config = model.config
    if out.suffix == ".safetensors":
        use = f"python scripts/sample.py --nnet_path {out} --grid out.png"
    else:
        use = (
            "python -c 'from libs.pipeline import DiMRPipeline; "
            f'DiMRPipeline.from_pretrained("{out}")([0]).images[0].save("out.png")\''
        )
    text = CARD.format(
        mark=MARK,
        conditional=", class-conditional" if config.dataset.n_classes else "",
        name=out.stem,
        parameters=sum(tensor.numel() for tensor in model.state.values()),
        branches=", ".join(f"{s.depth} x {s.block_type} {s.dim} on {s.max_height}x{s.max_width}" for s in stages),
        z_shape="x".join(map(str, config.z_shape)),
        space="latents" if config.autoencoder.pretrained_path else "pixels",
        n_classes=config.dataset.n_classes,
        schedule=config.schedule,
        step="unknown" if model.step is None else f"{model.step:,}",
        source=model.source.name,
        source_sha256=file_digest(model.source),
        file=weights.name,
        sha256=file_digest(weights),
        use=use,
        config=json.dumps(utils.config_json(config), indent=1),
    )
    card.write_text(text)


def check_out(out: Path) -> None:
    """Raises ValueError or OSError where OUT cannot be written, or would write over something that it did not make."""
    is_file = out.suffix in (".safetensors", *RELEASED_FILES)
    if not is_file and re.match(r"\.[A-Za-z]", out.suffix):  # a folder's name may end in a version
        raise ValueError(f"{out}: expected NAME.safetensors, NAME.pth or a new folder, whose name has no ending")
    if not is_file and out.exists():
        raise ValueError(f"{out} exists: give a new folder (or NAME.safetensors or NAME.pth)")
    check_writable(out, "OUT", folder=not is_file)
    card = out.parent / CARD_FILE
    if out.suffix == ".safetensors" and card.is_file() and MARK not in card.read_text(errors="replace"):
        raise ValueError(f"{card} is there and no model card: put {out.name} into a folder of its own")


def convert(weights: str, out: Path, config_path: str | None = None) -> None:
    """Convert `weights` to what the name of `out` says (see above).

    Raises:
        ValueError, OSError: weights, config or `out` that cannot be used; nothing is written then.
    """
    check_out(out)
    model = read_model(weights, config_path)
    if out.suffix == ".safetensors":
        write_safetensors(model.state, out, settings_metadata(model.settings), "OUT")
        write_card(model, out, out.parent / CARD_FILE, out)
    elif out.suffix in RELEASED_FILES:
        write_released(model, out)
    else:
        write_pipeline(model, out)
    print(f"{out}: {len(model.state)} tensors of {model.source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="file, folder or hf://OWNER/REPOSITORY/FILE")
    parser.add_argument("out", type=Path, help="NAME.safetensors, NAME.pth or a new folder")
    parser.add_argument("--config", help="the config it was trained with; what is saved with the weights unless given")
    arguments = parser.parse_args()
    logging.use_absl_handler()
    with errors_in_one_line():
        convert(arguments.weights, arguments.out, arguments.config)


if __name__ == "__main__":
    main()
