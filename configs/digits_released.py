"""Handwritten digits, 32x32 in 4x8x8 latents: the released ImageNet recipe in miniature.

configs/digits.py is the same network with a better objective. This one is the reference of scripts/first_losses.sh and
of the benchmarks of solvers, guidance and objectives.
"""

from configs.common import base, convnext, transformer


def get_config():
    config = base()
    config.z_shape = (4, 8, 8)
    # Wide where it is cheap: most of what makes a digit is decided on the coarse grid, which also sees the class.
    config.nnet.stages = (transformer(dim=128, depth=5, num_heads=4), convnext(dim=32, depth=3))

    config.dataset.path = "workdir/quickstart/latents"
    config.dataset.n_classes = 10
    config.dataset.num_workers = 0
    config.autoencoder.pretrained_path = "assets/digits_autoencoder"
    config.fid_stat = ""

    config.train.n_steps = 2000
    config.train.batch_size = 64
    config.train.eval_interval = 1000
    config.train.save_interval = 500
    config.train.keep_last = 2
    config.train.keep_interval = 0
    # A short run: larger and less inert steps than the published ones, and an average that spans its last quarter.
    config.optimizer.lr = 3e-3
    config.optimizer.betas = (0.9, 0.99)
    config.lr_scheduler.warmup_steps = 100
    config.ema.rate = 0.998

    config.sample.sample_steps = 6  # as good as more of them here: benchmarks/results/guidance_digits.md
    config.sample.grid_steps = 10
    config.sample.n_samples = 500
    # Guided late: at high noise the classes take their shares of shapes, at low noise each digit is made surer.
    config.sample.scale = 3.5
    config.sample.scale_pow = 2.0
    return config
