"""Convert sampled images to the `.npz` file that the ADM evaluation suite reads.

    python3 img2npz.py                                  # saved_images/ -> saved_images.npz
    python3 img2npz.py workdir/run/images --out samples.npz
    python3 img2npz.py part0 part1 part2 --out samples.npz

A folder holds PNGs as eval.py writes them, beside its `class_lab.txt` and `sampling.json`; several folders are parts of
one set (eval.py --indices). The file holds one array `arr_0`, uint8, N x H x W x 3, in index order; of several
folders, the labels go beside it as <out>_class_lab.txt. Images are streamed, so memory does not grow with N. A set with
missing, doubled, extra, unreadable, non-RGB or differently sized images, or with labels that are not the images', is
refused by name: then nothing is written, and a file that is there already stays.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from libs import UserError
from libs.files import check_writable, replacing
from libs.launch import Parser, errors_in_one_line
from libs.sample_set import SampleSet, shorten


def img2npz(
    folders: Sequence[str | Path], out: str | Path | None = None, n_samples: int | None = None
) -> tuple[Path, tuple[int, ...]]:
    """Convert folders to `out` (default for one: the folder's name + .npz); return `out` and the array's shape.

    Raises UserError for a set that is not whole, OSError.
    """
    folders = [Path(folder) for folder in folders]
    if len(folders) > 1 and (out is None or n_samples is not None):
        raise UserError("several folders are put together into --out, which must be given, and know their --n_samples")
    out = Path(out or f"{folders[0].resolve()}.npz")
    if out.resolve().parent in [folder.resolve() for folder in folders]:
        raise UserError(f"{out} would lie among the images: give another --out")
    images = SampleSet(*folders, n_samples=n_samples)
    check_writable(out)
    shape, refused = (images.count, *images.size, 3), []
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for image in tqdm(images.read(), "img2npz", images.count):
                if isinstance(image, str):
                    refused.append(image)
                else:
                    entry.write(image.tobytes())
        if refused:
            raise UserError(
                f"{len(refused)} of {images.count} images refused ({shorten(refused)}): remove them and "
                "re-run eval.py, which makes what is missing"
            )
    if len(folders) > 1 and images.labels is not None:
        with replacing(out.with_name(f"{out.stem}_class_lab.txt")) as file:
            file.write("".join(f"{label}\n" for label in images.labels).encode())
    return out, shape


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", default=["saved_images"], help="what eval.py wrote (%(default)s)")
    parser.add_argument("--out", help="file to write (default: the folder's name + .npz)")
    parser.add_argument(
        "--n_samples", type=int, help="images expected (default: by sampling.json, class_lab.txt, else all)"
    )
    args = parser.parse_args()
    with errors_in_one_line():
        out, shape = img2npz(args.folders, args.out, args.n_samples)
    print(f"{out}: arr_0 of shape {shape}")


if __name__ == "__main__":
    main()
