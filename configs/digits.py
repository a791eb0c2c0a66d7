"""Handwritten digits, 32x32 in 4x8x8 latents: the ImageNet recipe in miniature, minutes on two CPU cores.

    bash scripts/quickstart.sh

makes the data, extracts the latents, trains with this file, samples and scores. Result: see README.md.
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.z_shape = (4, 8, 8)
    config.nnet.stages = (transformer(dim=128, depth=7, num_heads=4), convnext(dim=64, depth=5))

    config.dataset.path = "workdir/quickstart/latents"
    config.dataset.n_classes = 10
    config.dataset.num_workers = 0
    config.autoencoder.pretrained_path = "assets/digits_autoencoder"
    config.fid_stat = ""

    config.train.n_steps = 1500
    config.train.batch_size = 128
    config.train.eval_interval = 500
    config.train.save_interval = 500
    config.optimizer.lr = 1e-3
    config.lr_scheduler.warmup_steps = 100
    config.ema_rate = 0.995  # so that the average spans a run of this length

    config.sample.sample_steps = 50
    config.sample.grid_steps = 25
    config.sample.n_samples = 500
    config.sample.scale = 1.4
    return config
