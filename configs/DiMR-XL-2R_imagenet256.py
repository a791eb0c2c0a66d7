"""DiMR-XL/2R on ImageNet 256x256: 505,046,408 parameters, 160 G multiply-adds.

    accelerate launch --multi_gpu --num_processes 16 --num_machines 2 --mixed_precision fp16 train.py \
        --config=configs/DiMR-XL-2R_imagenet256.py

Hardware: the paper trained on 16 GPUs over 2 nodes. Published FID-50K after 1M iterations (800 epochs): 4.50 without
guidance, 1.70 with (IS 289.0); after 500K: 4.87 and 1.77. Not reproduced by this project (no ImageNet here).
The released code says 20 blocks for the second branch and builds 21.
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.nnet.stages = (transformer(dim=960, depth=39), convnext(dim=480, depth=21))
    return config
