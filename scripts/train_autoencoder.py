"""Train the small KL autoencoder of the digits and save it as a diffusers folder.

    python scripts/make_digits.py --out workdir/quickstart/digits
    python scripts/train_autoencoder.py --images workdir/quickstart/digits/train \\
        --held_out workdir/quickstart/digits/held_out --out assets/digits_autoencoder

These commands made the autoencoder in `assets/`, in 441 s with OMP_NUM_THREADS=1 (two cores of an x86-64 machine, torch
2.15.0). It is 1.65 MB, and reconstructs the 500 held-out digits from sampled latents with a PSNR of 35.30 dB. Other
machines' round-off gives other weights.

The KL weighs more than in Stable Diffusion's autoencoder: it fills the parts of the latent that the digits do not need
with plain Gaussian noise, which is easy to generate.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.autoencoder import uint8_to_float
from libs.files import check_writable, replacing_folder
from libs.images import ImageTree, read_image
from libs.launch import Parser, errors_in_one_line

IMAGE_SIZE = 32
MAX_SHIFT = 2  # pixels; the digits leave at least this much black around them
N_STEPS, BATCH_SIZE, LR, SEED = 1500, 32, 2e-3, 1234
KL_WEIGHT = 2e-3  # per nat and latent element


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


def train(images: Tensor) -> AutoencoderKL:
    """Fit an autoencoder to `images` (N, 3, H, W) in [-1, 1] by squared error + KL_WEIGHT · KL, both means."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=N_STEPS, pct_start=0.05)
    progress = tqdm(range(N_STEPS), desc="autoencoder")
    for step in progress:
        batch = images[torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)]
        batch = shifted(batch, generator).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(batch).latent_dist
        reconstruction = autoencoder.decode(posterior.sample(generator)).sample
        error = F.mse_loss(reconstruction, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent element
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(mse=error.item(), kl=kl.item())
    return autoencoder.eval()


@torch.no_grad()
def sample_latents(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (N, 3, H, W) to sampled latents (N, 4, h, w)."""
    return autoencoder.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))


def run(args: argparse.Namespace) -> None:
    """Train, set the scaling factor, save, and print the error on held-out images."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists: remove it, or give another --out")
    check_writable(out, folder=True)
    images, held_out = read_images(args.images), read_images(args.held_out)
    autoencoder = train(images)
    # The published rule for latents: scaled to unit variance over the training set.
    autoencoder.register_to_config(scaling_factor=round(1 / sample_latents(autoencoder, images).std().item(), 5))
    with replacing_folder(out) as temporary:
        autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
    with torch.no_grad():
        reconstructed = autoencoder.decode(sample_latents(autoencoder, held_out)).sample.clamp(-1, 1)
    psnr = 10 * np.log10(4 / F.mse_loss(reconstructed, held_out).item())  # of images in [-1, 1]
    print(f"{out}: scaling_factor {autoencoder.config.scaling_factor}, held-out PSNR {psnr:.2f} dB")


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", default="workdir/quickstart/digits/train", help="class-per-folder training images")
    add("--held_out", default="workdir/quickstart/digits/held_out", help="images to measure the error on")
    add("--out", default="assets/digits_autoencoder", help="diffusers folder to write")
    args = parser.parse_args()
    with errors_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
