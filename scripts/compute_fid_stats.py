"""Reference statistics for FID: the mean and covariance of Inception features of a set of images.

    python scripts/compute_fid_stats.py --images ~/imagenet/val --resolution 256 --out assets/fid_stats/imagenet256.npz
    python scripts/compute_fid_stats.py --images VIRTUAL_imagenet256_labeled.npz --out assets/fid_stats/adm256.npz

`--images` is a folder (one folder per class, or images alone; cropped as for training) or an .npz with images as uint8
`arr_0` (N, H, W, 3). The output holds `mu` (2048,) and `sigma` (2048, 2048) as pytorch-fid and U-ViT read them, from
pytorch-fid's network. Memory: 16 KB per image.
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.images import ImageBatches, ImageTree, batch_ranges
from libs.inception import find_inception, load_inception, pool_features
from libs.latents import read_npy_header, replacing
from libs.metrics import gaussian_statistics

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", required=True, help="folder, or .npz with arr_0")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument(
        "--resolution", type=int, help="side of the crop in pixels; a folder needs it, an .npz does not"
    )
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="image-reading processes")
    return parser.parse_args(argv)


def folder_batches(folder, resolution, batch_size, workers):
    """(number of images, uint8 tensors (B, 3, H, W) one after the other) of a folder."""
    tree = ImageTree(folder)
    ranges = batch_ranges(0, len(tree), batch_size)
    loader = DataLoader(ImageBatches(tree, ranges, resolution), batch_size=None, num_workers=min(workers, len(ranges)))

    def batches():
        for images, unreadable in loader:
            if unreadable:
                raise ValueError(f"An image cannot be read: {unreadable[0][1]}. Replace or remove it")
            yield images

    return len(tree), batches()


def npz_batches(file, batch_size):
    """The same of an .npz, read from the archive as it is used."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
            shape, dtype = read_npy_header(member, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} should be an .npz with images as arr_0: {error}") from error
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"{file}: arr_0 should be uint8 (N, H, W, 3), found {dtype} {shape}")

    def batches():
        with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
            read_npy_header(member, file)
            for start, stop in batch_ranges(0, shape[0], batch_size):
                data = member.read((stop - start) * int(np.prod(shape[1:])))
                try:
                    images = np.frombuffer(bytearray(data), np.uint8).reshape(stop - start, *shape[1:])
                except ValueError as error:
                    raise ValueError(f"{file} is truncated: image {stop - 1} of {shape[0]} is missing") from error
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

    return shape[0], batches()


def compute(args) -> None:
    """Write the statistics of `args.images` to `args.out`. Raises ValueError, OSError."""
    if args.images.endswith(".npz"):
        n_images, batches = npz_batches(args.images, args.batch_size)
    elif args.resolution:
        n_images, batches = folder_batches(args.images, args.resolution, args.batch_size, args.workers)
    else:
        raise ValueError("A folder of images needs --resolution, the side of the square they are cropped to")
    if n_images < 2:
        raise ValueError(f"{args.images} holds {n_images} image: a covariance needs two or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_inception(find_inception(ASSETS), device)
    batches = tqdm(batches, total=-(-n_images // args.batch_size), unit=" batches")
    mu, sigma = gaussian_statistics(pool_features(network, batches, device))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as file:
        np.savez(file, mu=mu, sigma=sigma)
    print(f"{args.out}: statistics of {n_images} images")


def main(argv=None):
    args = parse_args(argv)
    try:
        compute(args)
    except (ValueError, OSError) as error:
        sys.exit(f"compute_fid_stats.py: {error}")


if __name__ == "__main__":
    main()
