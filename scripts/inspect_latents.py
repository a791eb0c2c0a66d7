"""Print what a latent store holds, check its files, and draw decoded samples under their class names.

    python scripts/inspect_latents.py assets/datasets/imagenet256_features --verify \\
        --png samples.png --autoencoder assets/stable-diffusion/autoencoder_kl_ema.pth
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.autoencoder import Autoencoder, float_to_uint8, load_autoencoder
from libs.checkpoint import write_safetensors
from libs.files import check_writable, replacing
from libs.images import draw_sheet
from libs.latents import LatentStore
from libs.launch import Parser, errors_in_one_line
from libs.normalization import check_same_autoencoder, describe_latents, latent_statistics

N_DRAWN = 16
N_MEASURED = 256  # records of which mean and deviation are printed
N_STATISTICS = 4096  # records that --statistics measures


def describe(store: LatentStore) -> str:
    """Return what the index says, for people."""
    meta = store.meta
    counts = meta["images_per_class"]
    n_bytes = sum(entry["bytes"] for entry in [*meta["shards"], meta["labels"]])
    names = ", ".join(store.class_names[:8]) + (", ..." if store.n_classes > 8 else "")
    lines = {
        "records": f"{len(store):,} of shape {store.record_shape} {store.dtype} ({n_bytes / 1e9:.3f} GB)",
        "images": f"{meta['n_images']:,}, flips: {meta['flips']}, left out as unreadable: {len(meta['skipped'])}",
        "crop": f"{meta['crop']}, resolution {meta['resolution']}",
        "classes": f"{store.n_classes} with {min(counts):,} to {max(counts):,} images: {names}",
        "autoencoder": f"shift {store.autoencoder['shift']}, scale {store.autoencoder['scale']}",
        "source": str(meta["source"]),
        "files": f"{len(meta['shards'])} shards, format {meta['format']} version {meta['version']}",
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def draw_samples(store: LatentStore, autoencoder: Autoencoder) -> Image.Image:
    """Draw N_DRAWN decoded records, evenly spread over the store, under their class names."""
    records, labels = store.read_spread(N_DRAWN)
    moments = torch.from_numpy(records)
    noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=torch.Generator().manual_seed(0))
    pixels = float_to_uint8(autoencoder.decode(autoencoder.sample_latents(moments, noise))).permute(0, 2, 3, 1).numpy()
    return draw_sheet([list(pixels)], [""], [store.class_names[label] for label in labels])


def write_statistics(store: LatentStore, path: Path) -> None:
    """Measure mean and deviation of each channel, and write what --latent_stats takes."""
    mean, std = latent_statistics(torch.from_numpy(store.read_spread(N_STATISTICS)[0]))
    write_safetensors({"mean": mean.float(), "std": std.float()}, path, {}, "--statistics")
    print(f"{'statistics':12} {path}: mean {mean.mean():.4f}, std {std.mean():.4f} over {len(mean)} channels")


def inspect(args: argparse.Namespace) -> None:
    if args.png:
        check_writable(args.png, "--png", [".png"])
    store = LatentStore(args.store)
    print(describe(store))
    lines = describe_latents(torch.from_numpy(store.read_spread(N_MEASURED)[0]), store.normalization)
    print(f"{'latents':12} {lines[0]}" + (f"\n{lines[1]}" if lines[1] else ""))
    if args.statistics is not None:
        write_statistics(store, Path(args.statistics or Path(args.store) / "latent_stats.safetensors"))
    if args.verify:
        store.verify()
        print(f"{'verified':12} every file has the checksum of the index")
    if args.png:
        autoencoder = load_autoencoder(args.autoencoder)
        check_same_autoencoder(
            autoencoder.identity, {**store.autoencoder, **autoencoder.normalization.to_json()}, args.store
        )
        autoencoder.normalization = store.normalization
        Path(args.png).parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.png, "set --png") as file:
            draw_samples(store, autoencoder).save(file, format="png")
        print(f"{'samples':12} {args.png}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("store", help="folder of the latent store")
    parser.add_argument(
        "--statistics",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"measure {N_STATISTICS} records for --latent_stats; latent_stats.safetensors in the store unless named",
    )
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--png", help=f"draw {N_DRAWN} decoded samples into this file (needs --autoencoder)")
    parser.add_argument("--autoencoder", help="the autoencoder the latents were made with")
    args = parser.parse_args(argv)
    if args.png and not args.autoencoder:
        parser.error("--png needs --autoencoder, the one the latents were made with")
    with errors_in_one_line():
        inspect(args)


if __name__ == "__main__":
    main()
