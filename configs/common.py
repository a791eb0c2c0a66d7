"""Declare every setting, with its unit, legal values and source. Experiment files state only their differences.

Any field can be set on the command line: --config.train.batch_size=256, --config.nnet.stages[0].dim=768,
--config.sample.interval="(0.5, 5.0)". Sizes that follow from others are no settings: patch sizes and position tables
come from z_shape and the number of stages, hidden widths from mlp_ratio.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from libs import UserError


def d(**kwargs):
    return ml_collections.ConfigDict(kwargs)


def stage(block_type, dim, depth, num_heads=16, kernel_size=7, mlp_ratio=2.0):
    """One branch of the network, for config.nnet.stages (coarsest first)."""
    return d(
        block_type=block_type,  # TransformerBlock or ConvNeXtBlock
        dim=dim,  # width D
        depth=depth,  # number of blocks, odd
        num_heads=num_heads,  # attention heads, must divide dim (TransformerBlock only)
        kernel_size=kernel_size,  # depthwise convolution, odd (ConvNeXtBlock only)
        mlp_ratio=mlp_ratio,  # hidden width of the gated MLPs / dim
    )


def transformer(dim, depth, **settings):
    return stage("TransformerBlock", dim, depth, **settings)


def convnext(dim, depth, **settings):
    return stage("ConvNeXtBlock", dim, depth, **settings)


def fields(config, prefix=""):
    """Yield the names of all fields, such as train.batch_size."""
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        yield from fields(value, f"{prefix}{name}.") if inner else [prefix + name]


def check_fields(config, name):
    """Raise a UserError unless a config has all the fields of base()."""
    found = set(fields(config)) if isinstance(config, ml_collections.ConfigDict) else set()
    if missing := sorted(set(fields(base())) - found):
        raise UserError(f"{name} lacks {', '.join(missing[:3])}, ...: start from base() of configs/common.py")


def base():
    """Return the ImageNet 256x256 recipe of the paper, without a network."""
    config = ml_collections.ConfigDict()

    config.seed = 1234  # decides weights, data order, training noise and samples
    # sd (Stable Diffusion's 1000 steps), vpsde or vpsde_cosine (continuous), linear (of flow matching)
    config.schedule = "sd"
    config.prediction = "eps"  # what the network predicts: eps (noise), v (velocity) or x (data); docs/objectives.md
    config.time_sampling = "uniform"  # times that are trained: uniform, or logit_normal with
    config.time_mean, config.time_std = 0.0, 1.0  # mean and standard deviation of logit t
    config.time_shift = 1.0  # above 1: times that are trained move toward noise, s t / (1 + (s - 1) t)
    config.loss_weighting = "unit"  # over times: unit, or min_snr (gamma 5)
    config.z_shape = (4, 32, 32)  # (channels, height, width) the network sees: latents (image / 8), or pixels
    config.loss_coeffs = placeholder(
        tuple
    )  # weight per resolution, coarsest first; None: 1/4 per halving (released; x: 1)

    config.nnet = d(
        norm_type="TDRMSN",  # TDRMSN (released), LN (time-dependent layer norm, the paper's text) or RMSN (no time)
        block_grad_to_lowres=False,  # stop gradients from a branch into the coarser ones (released: no)
        stages=(),  # tuple of stage(...), coarsest first; patch sizes are 2^(R-1), ..., 2, 1
    )

    config.dataset = d(
        path="assets/datasets/imagenet256_features",  # a store of latents; of pixels: class-per-folder tree
        n_classes=1000,  # classes, the null class not counted; 0: unconditional
        p_uncond=0.1,  # probability of replacing a label by the null label (classifier-free guidance)
        leave_out="",  # images only: file of names that are no data, as scripts/check_images.py writes it; "": none
        flip=True,  # images only: each image also mirrored (a store knows by itself)
        num_workers=4,  # threads (latents) or processes (images) that read, per training process; 0: none
    )

    config.autoencoder = d(
        pretrained_path="assets/stable-diffusion/autoencoder_kl_ema.pth",  # file, folder or hub id; "": none (pixels)
        latent_stats="",  # normalization: a scaling factor, edm2 or a file of statistics; "": the autoencoder's own
        decode_dtype="float32",  # precision of decoding: float32, bfloat16 or float16
    )

    config.train = d(
        n_steps=1_000_000,  # updates
        batch_size=1024,  # images per update over all processes
        accumulation=1,  # micro-batches per update
        compile="auto",  # torch.compile: blocks (each by itself), whole (takes minutes), off; auto: blocks on GPUs
        # activation checkpointing: off, all, selective (keeps results of matmuls, convolutions, attention), or k: every
        # k-th block
        recompute="off",
        sharded=False,  # spread weights, gradients, moments and EMA weights over the processes (FSDP); False: DDP
        log_interval=10,  # updates between log lines (one is also written at the end); 0: none
        eval_interval=5000,  # updates between grids of samples; 0: none
        save_interval=50_000,  # updates between checkpoints (one is also written at the end); 0: none
        keep_last=3,  # newest checkpoints that are kept
        keep_interval=50_000,  # checkpoints at multiples of this many updates are kept for good; 0: none
        grad_clip=0.0,  # largest norm of the gradient; 0: no clipping (published)
        fid_interval=0,  # updates between FIDs of the EMA weights; 0: none; needs config.fid_stat
        fid_samples=10_000,  # images for each, sampled in config.sample.grid_steps NFE
        grid=(10, 5),  # (rows, columns) of the grids: classes, and samples of each
    )

    config.optimizer = d(
        lr=2e-4,  # of AdamW, once warmed up; constant
        weight_decay=0.03,  # on everything but the time-dependent vectors' w and b
        betas=(0.99, 0.99),  # of AdamW's moments (released)
    )
    config.lr_scheduler = d(
        warmup_steps=5000,  # updates of linear warm-up, then constant
    )
    config.ema = d(
        rate=0.9999,  # per update, of the EMA weights that are sampled with
        extra_rates=(),  # of further EMA weights, saved beside them
        power_widths=(),  # sigma_rel of EDM2's power-function EMAs, such as (0.05, 0.1); see docs/training.md
    )
    config.init = d(
        path="",  # weights to start from (file or checkpoint folder); another resolution or class count is adapted
        freeze=(),  # regular expressions of parameter names that are not trained
    )

    config.sample = d(
        # dpm_solver (DPM-Solver++ singlestep of order 3; released), dpm_solver_1, dpm_solver_2 (lower orders),
        # dpm_solver_2m, dpm_solver_3m (multistep), ddim, ddpm, heun, euler, euler_maruyama_sde, euler_maruyama_ode
        # (SOLVERS in libs/solvers.py)
        algorithm="dpm_solver",
        time_shift=1.0,  # as config.time_shift, of times uniform in t: dpm_solver to _2, ddim, ddpm and euler
        sample_steps=250,  # NFE per image when evaluating
        grid_steps=50,  # NFE per image of the grids while training
        n_samples=50_000,  # images of an evaluation; labels are balanced: i * n_classes // n_samples
        compile="auto",  # as config.train.compile, when evaluating
        mini_batch_size=50,  # images sampled at a time by one process; the same images whatever the processes
        scale=1.4,  # guidance, 1: none (the released code writes this 0.4)
        scale_pow=placeholder(float),  # > 0: power-cosine schedule of the scale; None or 0: constant
        interval=placeholder(tuple),  # (low, high] of sigma / alpha in which to guide (arXiv 2404.07724); None: always
        # Weights of a guiding network, which replaces the unconditional half (arXiv 2406.02507); "": none
        autoguidance_path="",
        autoguidance_config="",  # its config file, where it differs from this one's; "": the same
    )

    config.fid_stat = "assets/fid_stats/fid_stats_imagenet256_guided_diffusion.npz"  # mu, sigma; "" or absent: no FID

    config.wandb = d(
        mode="disabled",  # disabled, offline or online (project dimr, or $WANDB_PROJECT); TensorBoard is always written
    )
    return config.lock()  # a misspelt field in an experiment file is an error
