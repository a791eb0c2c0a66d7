"""DiMR-L/3R on ImageNet 64x64 pixels: 284.14M parameters (284.38M with config.nnet.norm_type=LN; paper 284.0M).

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 train.py \
        --config=configs/DiMR-L-3R_imagenet64.py

Hardware: not stated in the paper for this model; the command is for one node of 8 GPUs. Published FID-50K after 300K
iterations: 2.21 without guidance (IS 55.73). Not reproduced by this project. No weights or config were released: the
depths are deduced from the parameter count, and the 12 heads are assumed.
"""

from configs.common import convnext, transformer
from configs.imagenet64 import imagenet64


def get_config():
    config = imagenet64()
    config.nnet.stages = (
        transformer(dim=768, depth=33, num_heads=12),
        convnext(dim=384, depth=17),
        convnext(dim=192, depth=17),
    )
    return config
