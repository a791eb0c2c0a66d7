"""Convert sampled images to the `.npz` file that the ADM evaluation suite reads.

    python3 img2npz.py                                  # saved_images/ -> saved_images.npz
    python3 img2npz.py workdir/run/images --out samples.npz
    python3 img2npz.py part0 part1 part2 --out samples.npz

A folder holds PNGs or shards as eval.py writes them, beside its `class_lab.txt` and `sampling.json`; several folders
are the parts of one set (eval.py --indices or --classes). The file holds one array `arr_0`, uint8, N x H x W x 3, in
index order; of several folders, the labels go beside it as <out>_class_lab.txt. Images are streamed into the file, so
memory does not grow with N. A set with missing, doubled, extra, unreadable, non-RGB or differently sized images, or
with labels that are not the images', is refused by name and nothing is written. A file that is there already is written
again, and keeps its old content until the new one is whole.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from libs.files import check_writable, replacing
from libs.launch import errors_in_one_line
from libs.sample_set import SampleSet, few


def write_npz(images: SampleSet, out: Path) -> tuple[int, ...]:
    """Stream a SampleSet into `out`; returns the array's shape. Raises ValueError naming the files that are refused."""
    shape = (images.count, *images.size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    out.parent.mkdir(parents=True, exist_ok=True)
    refused = []
    with replacing(out) as file:
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            progress = tqdm(total=images.count, desc="img2npz")
            for path, indices, pixels in images.files():
                if isinstance(pixels, str):
                    refused.append(f"{path.name} {pixels}")
                else:
                    entry.write(pixels.tobytes())
                progress.update(len(indices))
            progress.close()
        if refused:
            folders = few([part.folder for part in images.parts])
            raise ValueError(
                f"{folders}: {len(refused)} of {len(images.paths)} {'images' if path.suffix == '.png' else 'shards'} "
                f"refused ({few(refused)}). Remove them and run eval.py again, which makes only what is missing"
            )
    return shape


def img2npz(
    folders: str | Path | list[str | Path], out: str | Path | None = None, n_samples: int | None = None
) -> tuple[Path, tuple[int, ...]]:
    """Convert a folder, or a list of folders, to `out` (default: the folder's name + .npz).

    Returns (out, shape). Raises ValueError.
    """
    folders = [Path(folder) for folder in (folders if isinstance(folders, list | tuple) else [folders])]
    if len(folders) > 1 and (out is None or n_samples is not None):
        raise ValueError("several folders are put together into --out, which must be given, and know their --n_samples")
    images = SampleSet(*folders, n_samples=n_samples)
    out = Path(out) if out else Path(f"{folders[0].resolve()}.npz")
    for folder in folders:
        if out.resolve().parent == folder.resolve():
            raise ValueError(f"{out} would lie among the images: give an --out outside {folder}")
    check_writable(out)
    shape = write_npz(images, out)
    if len(folders) > 1 and images.labels is not None:
        with replacing(out.with_name(f"{out.stem}_class_lab.txt")) as file:
            file.write("".join(f"{label}\n" for label in images.labels).encode())
    return out, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
