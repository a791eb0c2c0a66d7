"""DiMR-XL/2R with narrow branches of three blocks, to try the programs of this folder on a CPU."""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).parents[1] / "configs/DiMR-XL-2R_imagenet256.py"))["get_config"]()
    for stage in config.nnet.stages:
        stage.dim, stage.depth, stage.num_heads = 24, 3, 2
    return config
