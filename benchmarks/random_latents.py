"""An untrained autoencoder and random latents, to run a recipe where there is neither data nor weights.

    python benchmarks/random_latents.py FOLDER [--records 4096] [--tiny]

writes FOLDER/autoencoder (Stable Diffusion's architecture, weights as PyTorch begins; --tiny: a small one) and
FOLDER/latents (moments of 32x32 cells in float16, made with it as far as training can tell).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs.autoencoder import load_autoencoder
from libs.autoencoder_files import SD_CONFIG
from libs.latents import LatentStore, StoreWriter
from libs.launch import Parser


def write_store(folder, n_records, moments, autoencoder):
    """Write a store of 1000 classes whose shards are all `moments` (n, 8, 32, 32) float16, unless it is there."""
    settings = {
        "record_shape": moments.shape[1:],
        "dtype": "float16",
        "resolution": 256,
        "flips": False,
        "crop": "none",
        "autoencoder": autoencoder,
        "class_names": [str(label) for label in range(1000)],
        "images_per_shard": len(moments),
        "source": {"kind": "random", "n_images": n_records},
    }
    writer = StoreWriter(folder, settings)
    writer.begin()
    if not writer.is_complete():
        for shard in range(writer.n_shards):
            first, last = writer.image_range(shard)
            writer.write_shard(shard, moments[: last - first])
        writer.finish(np.arange(n_records) % 1000)
    return LatentStore(folder)


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    settings = {**SD_CONFIG, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4} if args.tiny else SD_CONFIG
    AutoencoderKL(**settings).half().save_pretrained(args.folder / "autoencoder")
    moments = np.random.default_rng(0).standard_normal((args.records, 8, 32, 32), dtype=np.float32)
    moments[:, :4] /= SD_CONFIG["scaling_factor"]  # means of latents of deviation 1
    moments[:, 4:] -= 12  # log-variances as small as they are
    identity = load_autoencoder(args.folder / "autoencoder").identity
    write_store(args.folder / "latents", args.records, moments.astype(np.float16), identity)


if __name__ == "__main__":
    main()
