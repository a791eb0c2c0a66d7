"""Reference statistics for FID and sFID: mean and covariance of Inception features of a set of images.

    python scripts/compute_fid_stats.py --images ~/imagenet/val --resolution 256 --out assets/fid_stats/imagenet256.npz
    python scripts/compute_fid_stats.py --images VIRTUAL_imagenet256_labeled.npz --out assets/fid_stats/adm256.npz

`--images` is a folder (one folder per class, or images alone; cropped as for training) or an .npz with images as uint8
`arr_0` (N, H, W, 3). The output holds `mu` (2048,), `sigma` (2048, 2048), `mu_s` (2023,) and `sigma_s` (2023, 2023), as
ADM's references do (pytorch-fid and U-ViT read the first two), of images resized as ADM's suite does. Memory does not
grow with the number of images.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.data import read_ahead
from libs.files import check_writable, replacing
from libs.images import ImageTree, batch_ranges, image_size, read_range
from libs.inception import find_inception, load_adm_inception
from libs.launch import Parser, cpu_count, errors_in_one_line
from libs.metrics import GaussianStatistics, NpzImages, stack_batches

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def open_images(args: argparse.Namespace) -> tuple[int, Iterator[torch.Tensor]]:
    """Open a folder or .npz: the number of images, and uint8 batches (B, 3, H, W)."""
    if args.images.endswith(".npz"):
        images = NpzImages(args.images)
        return images.count, stack_batches(images.images(), args.batch_size)
    if not args.resolution:
        raise UserError("a folder of images needs --resolution, the size they are cropped to")
    tree = ImageTree(args.images)
    if tree.left_out:
        print(tree.left_out)
    read, ranges = partial(read_range, tree, args.resolution), batch_ranges(0, len(tree), args.batch_size)

    def readable() -> Iterator[torch.Tensor]:
        for images, unreadable in read_ahead(read, ranges, args.workers, by_processes=True, depth=2):
            if unreadable:
                raise UserError(f"an image cannot be read: {unreadable[0][1]}. Replace or remove it")
            yield images

    return len(tree), readable()


def compute(args: argparse.Namespace) -> None:
    """Write the statistics of `args.images` to `args.out`. Raises UserError, OSError."""
    check_writable(args.out)
    n_images, batches = open_images(args)
    if n_images < 2:
        raise UserError(f"{args.images} holds {n_images} image: a covariance needs two or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_adm_inception(find_inception(ASSETS), device)
    pool, spatial = GaussianStatistics(), GaussianStatistics()
    for batch in tqdm(batches, total=-(-n_images // args.batch_size)):
        pool_features, spatial_features, _ = network(batch.to(device))
        pool.update(pool_features)
        spatial.update(spatial_features)
    (mu, sigma), (mu_s, sigma_s) = pool.mean_and_covariance(), spatial.mean_and_covariance()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as file:
        np.savez(file, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    print(f"{args.out}: statistics of {n_images} images")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder, or .npz with arr_0")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument(
        "--resolution", type=image_size, help="crop in pixels, a side or HEIGHTxWIDTH; a folder needs it, an .npz not"
    )
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=cpu_count(), help="image-reading processes")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        compute(args)


if __name__ == "__main__":
    main()
