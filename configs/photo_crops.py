"""Pixels without classes, in three branches: 64x64 pieces of photographs. Worked through in docs/new_data.md."""

from configs.common import convnext, transformer
from configs.imagenet64 import imagenet64


def get_config():
    config = imagenet64()  # pixels of 64x64, no autoencoder, no guidance
    config.nnet.stages = (transformer(96, depth=5, num_heads=4), convnext(48, depth=3), convnext(24, depth=3))
    config.dataset.path = "workdir/new_data/crops"
    config.dataset.n_classes = 0  # unconditional: any tree or flat folder will do
    config.dataset.num_workers = 1
    config.fid_stat = ""
    config.train.update(n_steps=500, batch_size=16, eval_interval=250, save_interval=250)
    config.optimizer.update(lr=1e-3, betas=(0.9, 0.99))
    config.lr_scheduler.warmup_steps = 50
    config.ema.rate = 0.99
    config.sample.update(sample_steps=20, grid_steps=10, n_samples=50)
    return config
