"""Read every image of a folder, and list those that cannot be read: before a training on pixels meets them.

    python scripts/check_images.py --images ~/imagenet/train --out unreadable.txt
    accelerate launch train.py --config=configs/DiMR-M-3R_imagenet64.py --config.dataset.leave_out=unreadable.txt ...

Images left out are no part of the data set: a run goes on only with the data that it began with. To go on with a run,
replace its unreadable image by a readable one of the same name.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.data import read_ahead
from libs.files import check_writable, replacing
from libs.images import ImageTree, batch_ranges, read_range
from libs.launch import Parser, cpu_count, errors_in_one_line

SIDE = 32  # pixels of the crops, which are thrown away


def check(root: str, out: str | None, workers: int) -> None:
    """Print the images under `root` that cannot be read, and write their names to `out`. Raises UserError, OSError."""
    if out:
        check_writable(out)
    tree = ImageTree(root)
    if tree.left_out:
        print(tree.left_out)
    unreadable = []
    with tqdm(total=len(tree), unit=" images") as progress:
        ranges = batch_ranges(0, len(tree), 64)
        for (_, problems), (start, stop) in zip(
            read_ahead(partial(read_range, tree, SIDE), ranges, workers, by_processes=True), ranges, strict=True
        ):
            unreadable += problems
            progress.update(stop - start)
    print(f"{len(unreadable)} of {len(tree)} images cannot be read", *[reason for _, reason in unreadable], sep="\n  ")
    names = [tree.name(i) for i, _ in unreadable]
    if unreadable and not out:
        raise UserError("replace these images, or list them by --out for config.dataset.leave_out")
    if out:
        with replacing(out) as file:
            file.write(b"".join(os.fsencode(name) + b"\n" for name in names))
        ImageTree(root, names)  # raises for a class without an image left


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder with one folder per class, or of images alone")
    parser.add_argument("--out", help="list to write, one name a line, for config.dataset.leave_out")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="image-reading processes")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        check(args.images, args.out, args.workers)


if __name__ == "__main__":
    main()
