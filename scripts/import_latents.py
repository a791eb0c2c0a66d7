"""Turn features that other projects extracted into a latent store.

    python scripts/import_latents.py --format uvit --source /data/imagenet256_features \\
        --out assets/datasets/imagenet256_features --autoencoder assets/stable-diffusion/autoencoder_kl_ema.pth

Formats: `uvit` ({index}.npy of U-ViT and DiMR: pickled moments and label), `fast-dit` (a folder with *_features/ and
*_labels/), `lightningdit` (.safetensors with latents, latents_flip and labels), `repa` and `edm2` (a folder or .zip of
img-mean-std-*.npy with dataset.json) and `repa-e` (the same in a .h5, needs h5py). The autoencoder is the one the
features were made with; its content is recorded, and training checks it. fast-DiT and LightningDiT keep one sampled
latent instead of moments: it is stored as a mean with the least log-variance, so training sees that latent every time.
Re-run the command to resume.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.autoencoder import Autoencoder, load_autoencoder
from libs.latent_archives import ARCHIVES
from libs.latent_formats import FORMATS
from libs.latents import DTYPES, LatentStore, StoreWriter
from libs.launch import Parser, errors_in_one_line
from libs.normalization import LOGVAR_RANGE, describe_latents

N_MEASURED = 256  # records of which mean and deviation are printed


def as_moments(values: np.ndarray, autoencoder: Autoencoder, moments: bool, scaled: bool) -> np.ndarray:
    """Return moments (n, 2C, h, w) as they are, sampled latents (n, C, h, w) as means with the least log-variance."""
    holds, times = ("moments", 2) if moments else ("latents", 1)
    if values.shape[1] != times * autoencoder.latent_channels:
        raise UserError(
            f"the features have {values.shape[1]} channels, {holds} of the autoencoder {times} x "
            f"{autoencoder.latent_channels}: set --autoencoder to the one they were made with, or another --format"
        )
    if moments:
        return values
    means = autoencoder.normalization.invert(torch.from_numpy(values)).numpy() if scaled else values
    return np.concatenate([means, np.full_like(means, LOGVAR_RANGE[0])], axis=1)


def import_latents(args: argparse.Namespace) -> None:
    """Make or complete the store `args.out`."""
    source = (FORMATS | ARCHIVES)[args.format](args.source)
    latent_stats = args.latent_stats or ("edm2" if args.format == "edm2" else "")
    autoencoder = load_autoencoder(args.autoencoder, latent_stats=latent_stats)
    scaled = source.scaled if args.scaled is None else args.scaled
    if scaled and source.moments:
        raise UserError(f"--scaled is of latents, and {args.format} holds moments")
    form = autoencoder, source.moments, scaled
    first = as_moments(source.read(0, 1), *form)[0]
    if not first.size:
        raise UserError(f"{args.source} holds empty records: expected (channels, h, w), found {first.shape}")
    height, width = (side * autoencoder.downsample for side in first.shape[1:])
    settings = {
        "record_shape": first.shape,
        "dtype": args.dtype,
        "resolution": height if height == width else [height, width],
        "flips": source.flips,
        "crop": "as imported",
        "autoencoder": autoencoder.identity,
        "class_names": [str(label) for label in range(args.n_classes)],
        "images_per_shard": args.shard_size,
        "source": {"kind": args.format, "n_images": len(source), "scaled": scaled},
    }
    writer = StoreWriter(args.out, settings)

    def digest(shard: int) -> str:
        """Digest the shard's first and last image, which tells one extraction from another."""
        start, stop = writer.image_range(shard)
        ends = source.read(start, start + 1).tobytes() + source.read(stop - 1, stop).tobytes()
        return hashlib.sha256(ends).hexdigest()

    todo, labels = writer.begin(digest), []
    if writer.is_complete():
        print(f"{args.out} is complete with these settings: nothing to do")
        return
    for shard in tqdm(range(writer.n_shards), unit=" shards"):
        start, stop = writer.image_range(shard)
        labels.append(source.labels(start, stop))
        low, high = labels[-1].min(), labels[-1].max()
        if low < 0 or high >= args.n_classes:
            raise UserError(f"{args.source} holds labels from {low} to {high}: expected 0 to --n_classes - 1")
        if shard in todo:
            records = as_moments(source.read(start, stop), *form)
            if shard == todo[0]:
                some = torch.from_numpy(records[:N_MEASURED])
                print(*filter(None, describe_latents(some, autoencoder.normalization)), sep="\n")
            writer.write_shard(shard, records, source=digest(shard))
    writer.finish(np.concatenate(labels))
    store = LatentStore(args.out)
    print(f"{args.out}: {len(store)} records of {store.record_shape} {store.dtype}, {store.n_classes} classes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--format", required=True, choices=FORMATS | ARCHIVES)
    parser.add_argument("--source", required=True, help="folder of the features; of some formats a .zip or .h5 file")
    parser.add_argument("--out", required=True, help="folder of the latent store")
    parser.add_argument("--autoencoder", required=True, help="the autoencoder the features were made with")
    parser.add_argument("--latent_stats", default="", help="scaling factor or statistics file in place of its own")
    parser.add_argument("--n_classes", type=int, default=1000, help="labels are 0 to n_classes - 1 (default 1000)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the stored moments")
    parser.add_argument("--shard_size", type=int, default=8192, help="images per file (default 8192)")
    parser.add_argument(
        "--scaled",
        action=argparse.BooleanOptionalAction,
        help="whether sampled latents are times the scaling factor already (default: yes in fast-dit, else no)",
    )
    with errors_in_one_line():
        import_latents(parser.parse_args(argv))


if __name__ == "__main__":
    main()
