"""What the two ImageNet 64x64 pixel models (DiMR-M-3R_imagenet64.py, DiMR-L-3R_imagenet64.py) share."""

from configs.common import base


def imagenet64():
    config = base()
    config.schedule = "vpsde"
    config.z_shape = (3, 64, 64)
    config.dataset.path = "assets/datasets/ImageNet/train"
    config.autoencoder.pretrained_path = ""
    config.optimizer.lr = 3e-4
    config.train.n_steps = 300_000
    config.sample.scale = 1.0
    config.fid_stat = "assets/fid_stats/fid_stats_imagenet64_guided_diffusion.npz"
    return config
