"""Encode a folder of images into a store of autoencoder moments for training.

    accelerate launch scripts/extract_imagenet_feature.py --images ~/imagenet/train \\
        --out assets/datasets/imagenet256_features

`--images` is ImageNet's `train/`, any folder with one folder per class, or a folder of images alone (no classes).
The images are cropped as ADM does, and each is encoded as it is and mirrored. Any number of processes on any number
of machines that share `--out` can work together. Re-run the command to resume. Images that cannot be read are listed at
the end; the store is then only completed with `--skip_unreadable`. See docs/latents.md.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.autoencoder import Autoencoder, load_autoencoder, uint8_to_float
from libs.data import read_ahead
from libs.images import ImageTree, batch_ranges, image_size, read_range, sides
from libs.latents import DTYPES, LatentStore, StoreWriter
from libs.launch import Parser, cpu_count, errors_in_one_line, make_state, raise_on_all_ranks
from libs.normalization import describe_latents

AUTOENCODER = "assets/stable-diffusion/autoencoder_kl_ema.pth"


def sizes_digest(tree: ImageTree, first: int, last: int) -> str:
    """SHA-256 of some files' sizes, of images first..last - 1: it tells other images of the same names."""
    some = range(first, last, max(1, (last - first) // 16))
    sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in map(tree.path, some)]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def encode_shards(
    writer: StoreWriter,
    shards: list[int],
    tree: ImageTree,
    autoencoder: Autoencoder,
    state: PartialState,
    args: argparse.Namespace,
) -> list[tuple[int, str]]:
    """Encode and write the shards numbered `shards`. Return [(image index, reason)] of the unreadable images.

    Workers read ahead and a thread writes, so that the encoder waits for neither. Batches begin anew with each shard,
    so their contents depend on nothing else. A shard with unreadable images is written if args.skip_unreadable.
    """
    ranges_of = {shard: batch_ranges(*writer.image_range(shard), args.batch_size) for shard in shards}
    ranges = [r for shard in shards for r in ranges_of[shard]]
    read, workers = partial(read_range, tree, args.resolution), min(args.workers, len(ranges))
    batches = read_ahead(read, ranges, workers, state.device.type == "cuda", by_processes=True, depth=2)
    all_unreadable, writing = [], None
    n_views, n_images = 2 if args.flip else 1, sum(stop - start for start, stop in ranges)
    hidden = not state.is_main_process
    progress = tqdm(total=n_images, unit=" images", disable=hidden)
    with closing(batches), ThreadPoolExecutor(1) as thread, progress:
        for shard in shards:
            first, last = writer.image_range(shard)
            records = np.empty(((last - first) * n_views, *writer.settings["record_shape"]), args.dtype)
            n_records, unreadable = 0, []
            for start, stop in ranges_of[shard]:
                images, problems = next(batches)
                unreadable += problems
                if len(images) and (args.skip_unreadable or not unreadable):
                    images = images.to(state.device, non_blocking=True)  # uint8 (B, 3, H, W)
                    if args.flip:  # a mirror image follows its image
                        images = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
                    moments = autoencoder.encode_moments(uint8_to_float(images)).cpu()
                    if not hidden and progress.n == 0:
                        print(*filter(None, describe_latents(moments, autoencoder.normalization)), sep="\n")
                    with np.errstate(over="ignore"):  # reported, with the remedy, when the shard is written
                        records[n_records : n_records + len(moments)] = moments.numpy()
                    n_records += len(moments)
                progress.update(stop - start)
            all_unreadable += unreadable
            if writing is not None:
                writing.result()  # raises what the thread raised, and keeps at most two shards in memory
            if args.skip_unreadable or not unreadable:
                skipped, source = [i for i, _ in unreadable], sizes_digest(tree, first, last)
                writing = thread.submit(writer.write_shard, shard, records[:n_records], skipped, source)
        if writing is not None:
            writing.result()
    return all_unreadable


def extract(args: argparse.Namespace, state: PartialState) -> None:
    """Make or complete the store `args.out`, working as one of `state`'s processes."""
    tree = ImageTree(args.images)
    autoencoder = load_autoencoder(args.autoencoder, latent_stats=args.latent_stats)
    (height, width), factor = sides(args.resolution), autoencoder.downsample
    autoencoder.check_size(height, width)
    settings = {
        "record_shape": [2 * autoencoder.latent_channels, height // factor, width // factor],
        "dtype": args.dtype,
        "resolution": args.resolution,
        "flips": args.flip,
        "crop": "adm-centre",
        "autoencoder": autoencoder.identity,
        "class_names": tree.class_names,
        "images_per_shard": args.shard_size,
        "source": {"kind": "images", "n_images": len(tree), "names_sha256": tree.digest},
    }
    writer, todo = StoreWriter(args.out, settings), None
    with raise_on_all_ranks(state):
        if state.is_main_process:
            todo = prepare(writer, tree, args)
    (todo,) = broadcast_object_list([todo])
    if todo is None:
        return

    if state.device.type == "cpu":
        torch.set_num_threads(1)  # the number of threads changes the last bits of a convolution
    torch.backends.cudnn.deterministic = True
    autoencoder.to(state.device)
    mine = todo[state.process_index :: state.num_processes]
    with raise_on_all_ranks(state):  # the others finish their shards, which are kept
        unreadable = encode_shards(writer, mine, tree, autoencoder, state, args)
    unreadable = sorted(gather_object(unreadable))
    with raise_on_all_ranks(state):
        if state.is_main_process:
            finish(writer, tree, unreadable, args)


def prepare(writer: StoreWriter, tree: ImageTree, args: argparse.Namespace) -> list[int] | None:
    """Begin the store or look at what is there. Returns the numbers of the shards to encode, None if it is complete."""
    todo = writer.begin(lambda shard: sizes_digest(tree, *writer.image_range(shard)))
    if writer.is_complete():
        print(f"{args.out} is complete with these settings ({len(LatentStore(args.out))} records): nothing to do")
        return None
    n_images = sum(last - first for first, last in map(writer.image_range, todo))
    record_bytes = np.dtype(args.dtype).itemsize * int(np.prod(writer.settings["record_shape"]))
    needed, free = n_images * (2 if args.flip else 1) * record_bytes, shutil.disk_usage(args.out).free
    if needed > free:
        found = f"{args.out} needs {needed / 1e6:,.1f} MB more, its disk has {free / 1e6:,.1f} MB free"
        raise UserError(f"{found}: free space, set another --out, or use --dtype float16")
    if tree.left_out:
        print(tree.left_out)
    print(f"{len(tree)} images in {len(tree.class_names)} classes; {n_images} to encode in {len(todo)} shards")
    return todo


def finish(writer: StoreWriter, tree: ImageTree, unreadable: list[tuple[int, str]], args: argparse.Namespace) -> None:
    """Complete the store, or say why it is not complete."""
    if unreadable:
        print(f"{len(unreadable)} images cannot be read:", *[reason for _, reason in unreadable], sep="\n  ")
        if not args.skip_unreadable:
            found = f"{len(unreadable)} images (listed above) cannot be read"
            raise UserError(f"{found}: replace them, or give --skip_unreadable to leave them out, and re-run")
    writer.finish(tree.labels, tree.name)
    store = LatentStore(args.out)
    if absent := [name for name, n in zip(tree.class_names, store.meta["images_per_class"], strict=True) if not n]:
        print(f"warning: no image is left of {len(absent)} classes, which cannot be learned: {', '.join(absent)}")
    print(f"{args.out}: {len(store)} records of {store.record_shape} {store.dtype}, {store.n_classes} classes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__.split("\n\n")[0], argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, help="folder with one folder per class, or of images alone")
    add("--out", required=True, help="folder of the latent store")
    add("--autoencoder", default=AUTOENCODER, help="diffusers folder, hub id, or single file")
    add("--latent_stats", default="", help="scaling factor or statistics file in place of the autoencoder's own")
    add("--resolution", type=image_size, default=256, help="size of the crop in pixels: a side, or HEIGHTxWIDTH")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="also encode mirror images")
    add("--dtype", choices=DTYPES, default="float16", help="precision of the stored moments")
    add("--batch_size", type=int, default=64, help="images per encoding (twice as many views with --flip)")
    add("--shard_size", type=int, default=8192, help="images per file: the unit of work and of resuming")
    cores = max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--workers", type=int, default=cores, help="image-reading processes per process")
    add("--skip_unreadable", action="store_true", help="leave out images that cannot be read")
    args = parser.parse_args(argv)
    # Processes finish shards at different times: wait for hours, not for the default minutes.
    with errors_in_one_line():
        state = make_state(timedelta(hours=12))
        extract(args, state)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
