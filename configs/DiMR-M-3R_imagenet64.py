"""DiMR-M/3R on ImageNet 64x64 pixels: 132.83M parameters (132.94M with config.nnet.norm_type=LN; paper 132.9M).

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 train.py \
        --config=configs/DiMR-M-3R_imagenet64.py

Hardware: not stated in the paper for this model; the command is for one node of 8 GPUs. Published FID-50K after 300K
iterations: 3.65 without guidance (IS 42.41). Not reproduced by this project. No weights or config were released: the
depths are deduced from the parameter count, and the 12 heads are assumed.
"""

from configs.common import convnext, transformer
from configs.imagenet64 import imagenet64


def get_config():
    config = imagenet64()
    config.nnet.stages = (
        transformer(dim=768, depth=15, num_heads=12),
        convnext(dim=384, depth=9),
        convnext(dim=192, depth=9),
    )
    return config
