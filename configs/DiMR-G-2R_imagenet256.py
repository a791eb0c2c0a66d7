"""DiMR-G/2R on ImageNet 256x256: 1,056,352,904 parameters, 331 G multiply-adds.

    accelerate launch --multi_gpu --num_processes 16 --num_machines 2 --mixed_precision fp16 train.py \
        --config=configs/DiMR-G-2R_imagenet256.py

Hardware: the paper trained on 16 GPUs over 2 nodes. Published FID-50K after 1M iterations (800 epochs): 3.56 without
guidance, 1.63 with (IS 292.5). Not reproduced by this project (no ImageNet here).
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.nnet.stages = (transformer(dim=1152, depth=57), convnext(dim=576, depth=29))
    return config
