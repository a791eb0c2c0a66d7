"""DiMR-XL/2R on ImageNet 256x256 by flow matching: velocity on the linear path (docs/objectives.md).

For comparison FreqFlow-L (arXiv 2604.15521), of this size, on the same backbone, has FID 3.12 without
guidance and 1.54 with; it adds a frequency branch, which is not used here. Not trained by this project. Guidance scales
do not carry over from noise prediction: sweep them (scripts/sweep_guidance.py).
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.nnet.stages = (transformer(dim=960, depth=39), convnext(dim=480, depth=21))
    config.update(schedule="linear", prediction="v", time_sampling="logit_normal")
    config.sample.update(algorithm="euler", time_shift=0.3)
    return config
