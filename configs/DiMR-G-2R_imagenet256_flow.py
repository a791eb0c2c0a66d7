"""DiMR-G/2R on ImageNet 256x256 by flow matching: velocity on the linear path (docs/objectives.md).

For comparison FreqFlow-L (arXiv 2604.15521), half its size, on the same backbone, has FID 3.12 without
guidance and 1.54 with; it adds a frequency branch, which is not used here. Not trained by this project. Guidance scales
do not carry over from noise prediction: sweep them (scripts/sweep_guidance.py).
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.nnet.stages = (transformer(dim=1152, depth=57), convnext(dim=576, depth=29))
    config.update(schedule="linear", prediction="v", time_sampling="logit_normal")
    config.sample.update(algorithm="euler", time_shift=0.3)
    return config
