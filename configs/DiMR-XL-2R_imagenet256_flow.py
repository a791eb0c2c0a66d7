"""DiMR-XL/2R on ImageNet 256x256 with flow matching: velocity on the linear path.

For comparison, FreqFlow-L (arXiv 2604.15521), of this size, on the same backbone: FID 3.12 unguided and 1.54 guided. It
adds a frequency branch, which is not used here. Not trained by this project. Guidance scales do not carry over from
noise prediction: sweep them (scripts/sweep_guidance.py).
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("DiMR-XL-2R_imagenet256.py")))["get_config"]()
    config.update(schedule="linear", prediction="v", time_sampling="logit_normal")
    config.sample.update(algorithm="euler", time_shift=0.3)
    return config
