"""Train the small KL autoencoder of the digits and save it as a diffusers folder.

    python scripts/make_digits.py --out workdir/quickstart/digits
    python scripts/train_autoencoder.py --images workdir/quickstart/digits/train \\
        --held_out workdir/quickstart/digits/held_out --out assets/digits_autoencoder

These commands made the autoencoder in `assets/`, in 441 s with OMP_NUM_THREADS=1 beside other programs (two cores of
an x86-64 machine, torch 2.15.0). It is 1.65 MB, reconstructs the 500 held-out digits with a PSNR of 37.99 dB from mean
latents and 35.30 dB from sampled ones, and decodes them in 1.5 s. Other machines' round-off gives other weights.

The KL weighs more than in Stable Diffusion's autoencoder: for pictures this simple it costs little sharpness, and it
fills the parts of the latent that the digits do not need with plain Gaussian noise, which is easy to generate.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.autoencoder import float_to_uint8, uint8_to_float
from libs.files import check_writable, replacing, replacing_folder
from libs.images import ImageTree, read_image
from libs.launch import errors_in_one_line

IMAGE_SIZE = 32
MAX_SHIFT = 2  # pixels; the digits leave at least this much black around them


def read_images(root: str | Path) -> Tensor:
    """Read a class-per-folder tree as (N, 3, 32, 32) float32 in [-1, 1], in the order of the paths."""
    tree = ImageTree(root)
    pixels = np.stack([read_image(tree.path(i), IMAGE_SIZE) for i in range(len(tree))])
    return uint8_to_float(torch.from_numpy(pixels))


def build_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 3 x 32 x 32 images to 4 x 8 x 8 latents, 0.41M parameters, 1.6 MB in float32."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image of (B, 3, H, W) by up to MAX_SHIFT pixels in both directions, black moving in."""
    height, width = images.shape[2:]
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=-1.0)
    offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, i : i + height, j : j + width] for image, (i, j) in zip(padded, offsets, strict=True)])


def train(images: Tensor, *, n_steps: int, batch_size: int, lr: float, kl_weight: float, seed: int) -> AutoencoderKL:
    """Fit an autoencoder to `images` (N, 3, H, W) in [-1, 1] by squared error + kl_weight · KL, both means."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=n_steps, pct_start=0.05)
    progress = tqdm(range(n_steps), desc="autoencoder")
    for step in progress:
        batch = images[torch.randint(0, len(images), (batch_size,), generator=generator)]
        batch = shifted(batch, generator).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(batch).latent_dist
        reconstruction = autoencoder.decode(posterior.sample(generator)).sample
        error = F.mse_loss(reconstruction, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent element
        optimizer.zero_grad()
        (error + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{psnr(error.item()):.1f}", kl=f"{kl.item():.2f}")
    return autoencoder.eval()


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * np.log10(4 / mean_squared_error)


@torch.no_grad()
def measure(autoencoder: AutoencoderKL, images: Tensor, seed: int = 0) -> dict:
    """Encode, sample and decode `images` (N, 3, H, W); PSNRs in dB, times in seconds."""
    posterior = autoencoder.encode(images).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    reconstructions = autoencoder.decode(latents).sample.clamp(-1, 1)
    seconds = time.perf_counter() - started
    from_mean = autoencoder.decode(posterior.mean).sample.clamp(-1, 1)
    return {
        "reconstructions": reconstructions,
        "psnr_sampled": psnr(F.mse_loss(reconstructions, images).item()),
        "psnr_mean": psnr(F.mse_loss(from_mean, images).item()),
        "latents": latents,
        "posterior_std": posterior.std.mean().item(),
        "decode_seconds": seconds,
    }


def side_by_side(originals: Tensor, reconstructions: Tensor, path: Path, n_columns: int = 20, n_rows: int = 5) -> None:
    """Write a PNG of rows of originals, each above its reconstructions; both (N, 3, H, W) in [-1, 1], all classes."""
    rows = []
    for chosen in torch.linspace(0, len(originals) - 1, n_rows * n_columns).long().split(n_columns):
        rows += [torch.cat(tuple(originals[chosen]), dim=2), torch.cat(tuple(reconstructions[chosen]), dim=2)]
    grid = float_to_uint8(torch.cat(rows, dim=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "set --picture") as file:
        Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(file, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", default="workdir/quickstart/digits/train", help="class-per-folder training images")
    add("--held_out", default="workdir/quickstart/digits/held_out", help="images to measure the error on")
    add("--out", default="assets/digits_autoencoder", help="diffusers folder to write")
    add("--picture", help="PNG to write with held-out images above their reconstructions")
    add("--n_steps", type=int, default=1500)
    add("--batch_size", type=int, default=32)
    add("--lr", type=float, default=2e-3)
    add("--kl_weight", type=float, default=2e-3, help="weight of the KL in nats per latent element")
    add("--seed", type=int, default=1234)
    args = parser.parse_args()
    with errors_in_one_line():
        run(args)


def run(args: argparse.Namespace) -> None:
    for name, least in (("n_steps", 1), ("batch_size", 1), ("lr", 0), ("kl_weight", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be at least {least}; found {getattr(args, name)}")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists: remove it, or give another --out")
    check_writable(out, folder=True)
    if args.picture:
        check_writable(args.picture, "--picture", [".png"])
    images, held_out = read_images(args.images), read_images(args.held_out)
    settings = {name: getattr(args, name) for name in ("n_steps", "batch_size", "lr", "kl_weight", "seed")}
    started = time.perf_counter()
    autoencoder = train(images, **settings)
    seconds = time.perf_counter() - started
    latents = measure(autoencoder, images)["latents"]
    # The published rule for latents: scaled to unit variance over the training set.
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    with replacing_folder(out) as temporary:
        autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    result = measure(autoencoder, held_out)
    if args.picture:
        side_by_side(held_out, result["reconstructions"], Path(args.picture))
    channel_std = ", ".join(f"{std:.2f}" for std in latents.std(dim=(0, 2, 3)))
    print(
        f"{out}: {n_bytes / 1e6:.2f} MB after {seconds:.0f} s on {torch.get_num_threads()} thread(s)\n"
        f"held-out PSNR {result['psnr_mean']:.2f} dB from mean latents, "
        f"{result['psnr_sampled']:.2f} dB from sampled ones\n"
        f"scaling_factor {autoencoder.config.scaling_factor}; latent std per channel {channel_std}\n"
        f"mean posterior std {result['posterior_std']:.3f}; decoding {len(held_out)}: "
        f"{result['decode_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
