"""DiMR-XL/3R on ImageNet 512x512: 525.03M parameters, 206 G multiply-adds.

    accelerate launch --multi_gpu --num_processes 16 --num_machines 2 --mixed_precision fp16 train.py \
        --config=configs/DiMR-XL-3R_imagenet512.py

Hardware: the paper trained on 16 GPUs over 2 nodes. Published FID-50K after 1M iterations: 7.93 without guidance, 2.89
with (IS 289.8). Not reproduced by this project. No weights or config of this model were released: depths and widths
are deduced from the paper's 525M parameters and 206 G multiply-adds, which they give exactly to the printed digits.
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.z_shape = (4, 64, 64)
    config.dataset.path = "assets/datasets/imagenet512_features"
    config.fid_stat = "assets/fid_stats/fid_stats_imagenet512_guided_diffusion.npz"
    config.nnet.stages = (transformer(dim=960, depth=39), convnext(dim=480, depth=21), convnext(dim=240, depth=21))
    return config
