"""Latents that are not square, with classes: 32x64 pictures in 4x8x16 latents. Worked through in docs/new_data.md."""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.z_shape = (4, 8, 16)  # channels, height and width of the latents: the pictures' / 4 with this autoencoder
    config.nnet.stages = (transformer(dim=128, depth=5, num_heads=4), convnext(dim=32, depth=3))
    config.dataset.path = "workdir/new_data/latents"
    config.dataset.n_classes = 10
    config.dataset.num_workers = 0
    config.autoencoder.pretrained_path = "assets/digits_autoencoder"
    config.fid_stat = "workdir/new_data/pairs_stats.npz"
    config.train.update(n_steps=1000, batch_size=32, eval_interval=250, save_interval=500)
    config.optimizer.update(lr=3e-3, betas=(0.9, 0.99))  # a short run takes larger steps than a long one
    config.lr_scheduler.warmup_steps = 100
    config.ema.rate = 0.996
    config.sample.update(sample_steps=20, grid_steps=10, n_samples=200, scale=2.0)
    return config
