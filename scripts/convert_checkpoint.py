"""Convert weights from any form into any other: released names, this project's safetensors, a diffusers pipeline.

    python scripts/convert_checkpoint.py WEIGHTS OUT [--config configs/NAME.py]

WEIGHTS is all that --nnet_path takes: a .pth in the released names, a .safetensors, a checkpoint folder (its EMA
weights), a pipeline folder, or hf://OWNER/REPOSITORY/FILE. OUT decides what is made:

    NAME.safetensors   this project's names, with the config and the class names inside
    NAME.pth           a plain state dict in the released names
    a new folder       a diffusers pipeline, with the autoencoder, the class names and the code

Beside the first and in the last is a short model card, README.md. Tensors stay as they are, to the bit. The config is
--config, or else what was saved with the weights; for the released files give configs/DiMR-XL-2R_imagenet256.py or
configs/DiMR-G-2R_imagenet256.py.
"""

import re
import sys
from pathlib import Path

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import utils
from libs import UserError
from libs.checkpoint import released_name, saved_settings, settings_metadata, write_safetensors
from libs.dimr import DiMR
from libs.files import check_writable, file_digest, replacing, replacing_folder
from libs.launch import Parser, errors_in_one_line
from libs.model import class_names, config_json, open_autoencoder, read_network
from libs.network import DiMRNetwork
from libs.pipeline import DiMRPipeline
from libs.scheduler import SolverScheduler

CARD = """---
library_name: dimr
tags: [diffusion, dimr]
---
# {name}

A DiMR (multi-resolution diffusion model, arXiv 2406.09416) of {parameters:,} parameters, step {step}, converted from
`{source}` (SHA-256 {sha256}). Its config is in `{config}`.
"""


def build_pipeline(nnet: DiMR, state: dict[str, Tensor], config: ConfigDict, file: Path) -> DiMRPipeline:
    """Build the pipeline of what `read_network` gives and its config's autoencoder, sampling as the config says."""
    sample = config.sample
    utils.check_sampling(config)
    if sample.autoguidance_path:
        raise UserError("a pipeline has no guiding network: set config.sample.autoguidance_path to none")
    autoencoder = open_autoencoder(config, "cpu", trained_autoencoder(file))
    nnet.load_state_dict(state, assign=True)
    return DiMRPipeline(
        DiMRNetwork.of(nnet, config.nnet.norm_type),
        SolverScheduler(config.schedule, sample.algorithm, sample.time_shift),
        autoencoder.vae if autoencoder else None,
        config.schedule,
        dict(enumerate(class_names(config, file))),
        {
            "guidance_scale": sample.scale,
            "guidance_power": sample.scale_pow,
            "guidance_interval": sample.interval,
            "num_inference_steps": sample.sample_steps,
        },
        {"step": training_step(file), "config": config_json(config), "autoencoder": trained_autoencoder(file)},
        config.prediction,
    )


def training_step(file: Path) -> int | None:
    """Return the step that is saved with a weights file, None if none is."""
    return (saved_settings(file) or {}).get("step")


def trained_autoencoder(file: Path) -> dict | None:
    """Return the identity of the autoencoder that is saved with a weights file, None if none is."""
    return (saved_settings(file) or {}).get("autoencoder")


def write_card(folder: Path, name: str, state: dict[str, Tensor], file: Path, config: str) -> None:
    """Write a model card; one that is there is kept."""
    card = folder / "README.md"
    if card.exists():
        print(f"{card} is kept as it is")
        return
    parameters, step = sum(tensor.numel() for tensor in state.values()), training_step(file) or "unknown"
    values = {"name": name, "parameters": parameters, "step": step, "source": file.name, "config": config}
    card.write_text(CARD.format(sha256=file_digest(file), **values))


def convert(weights: str, out: Path, config_path: str | None = None) -> None:
    """Convert `weights` to what the name of `out` says; after an error nothing is left there."""
    is_file = out.suffix in (".safetensors", ".pth", ".pt")
    if not is_file and (re.match(r"\.[A-Za-z]", out.suffix) or out.exists()):  # a folder's name may end in a version
        raise UserError(f"{out} must be NAME.safetensors, NAME.pth or a new folder, whose name has no ending")
    check_writable(out, "OUT", folder=not is_file)
    nnet, state, config, file = read_network(weights, config_path and utils.load_config(config_path))
    pipe = None if is_file else build_pipeline(nnet, state, config, file)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        names = class_names(config, file)
        settings = {"config": config_json(config), "step": training_step(file), "class_names": names}
        settings["autoencoder"] = trained_autoencoder(file)
        write_safetensors(state, out, settings_metadata(settings), "OUT")
        write_card(out.parent, out.stem, state, file, f"the metadata of {out.name}")
    elif is_file:
        with replacing(out, "set OUT") as opened:
            torch.save({released_name(name): tensor for name, tensor in state.items()}, opened)
    else:
        with replacing_folder(out) as folder:
            pipe.save_pretrained(folder)
            write_card(folder, out.name, state, file, "model_index.json")
    print(f"{out}: {len(state)} tensors of {file}")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", help="file, folder or hf://OWNER/REPOSITORY/FILE")
    parser.add_argument("out", type=Path, help="NAME.safetensors, NAME.pth or a new folder")
    parser.add_argument("--config", help="the config it was trained with; what is saved with the weights unless given")
    arguments = parser.parse_args()
    logging.use_absl_handler()
    with errors_in_one_line():
        convert(arguments.weights, arguments.out, arguments.config)


if __name__ == "__main__":
    main()
