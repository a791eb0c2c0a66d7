"""Convert a folder of sampled images to the `.npz` file that the ADM evaluation suite reads.

    python3 img2npz.py                                  # saved_images/ -> saved_images.npz
    python3 img2npz.py workdir/run/images --out samples.npz

The folder holds `0.png .. N-1.png` as eval.py writes them, beside its `class_lab.txt` and `sampling.json`; the file
holds one array `arr_0`, uint8, N x H x W x 3. Images are streamed into the file, so memory does not grow with N. A
folder with missing, extra, unreadable, non-RGB or differently sized images is refused by name and nothing is written.
A file that is complete and newer than every image is kept.
"""

import argparse
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

IMAGE_NAME = re.compile(r"(0|[1-9][0-9]*)\.png")
OTHER_FILES = {"class_lab.txt", "sampling.json"}  # written beside the images by eval.py
READ_AHEAD = 256  # images decoded at a time: 50 MB at 256x256


def few(names):
    """The first few of a list, for a message."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def read_image(path):
    """An 8-bit RGB PNG as (H, W, 3) uint8, or, if it is not one, a string that says why."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB":
                return f"is of mode {image.mode}, expected RGB"
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read as PNG ({error})"


def list_images(folder, n_samples=None):
    """The paths of images 0..N-1 of a folder that holds exactly them.

    N is `n_samples`, else the number of lines of class_lab.txt, else the number of images found. Raises ValueError for
    missing or extra files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: sample images with eval.py first, or give the folder that holds them")
    names = {entry.name for entry in os.scandir(folder)} - OTHER_FILES
    labels = folder / "class_lab.txt"
    if n_samples is not None:
        expected, source = n_samples, "--n_samples"
    elif labels.exists():
        expected, source = len(labels.read_text().split()), f"the labels in {labels}"
    else:
        expected, source = sum(bool(IMAGE_NAME.fullmatch(name)) for name in names), "the images found"
    if expected < 1:
        raise ValueError(f"{folder}: expected at least one image 0.png, found {expected} by {source}")
    wanted = [f"{i}.png" for i in range(expected)]
    missing = [name for name in wanted if name not in names]
    extra = sorted(names.difference(wanted))
    if missing or extra:
        found = [f"{len(missing)} missing ({few(missing)})"] * bool(missing)
        found += [f"{len(extra)} extra ({few(extra)})"] * bool(extra)
        raise ValueError(
            f"{folder}: expected 0.png to {expected - 1}.png by {source}, found {' and '.join(found)}. "
            f"Finish sampling with eval.py, remove what does not belong, or set --n_samples"
        )
    return [folder / name for name in wanted]


def npz_shape(path):
    """Shape of the uint8 array `arr_0` in an npz file; None where there is no such file or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
            np.lib.format.read_magic(entry)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(entry)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return shape if dtype == np.uint8 and not fortran_order else None


def decoded(paths):
    """Yields what `read_image` makes of each path, in order, decoding at most READ_AHEAD of them in advance."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), READ_AHEAD):
            yield from pool.map(read_image, paths[start : start + READ_AHEAD])


def write_npz(paths, out):
    """Stream the images into `out`; returns the array's shape. Raises ValueError naming the images that are refused."""
    first = read_image(paths[0])
    if isinstance(first, str):
        raise ValueError(f"{paths[0]} {first}")
    shape = (len(paths), *first.shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    refused = []
    try:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for path, image in tqdm(zip(paths, decoded(paths), strict=True), total=len(paths), desc="img2npz"):
                if isinstance(image, str):
                    refused.append(f"{path.name} {image}")
                elif image.shape != first.shape:
                    (h, w), (h0, w0) = image.shape[:2], first.shape[:2]
                    refused.append(f"{path.name} is {w}x{h}, expected {w0}x{h0} like {paths[0].name}")
                else:
                    entry.write(image.tobytes())
        if refused:
            raise ValueError(
                f"{paths[0].parent}: {len(refused)} of {len(paths)} images refused ({few(refused)}). "
                f"Remove them and run eval.py again, which makes only what is missing"
            )
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return shape


def img2npz(folder, out=None, n_samples=None):
    """Convert `folder` to `out` (default: the folder's name + .npz). Returns (out, shape), shape None if kept as is."""
    paths = list_images(folder, n_samples)
    out = Path(out) if out else Path(f"{Path(folder).resolve()}.npz")
    if out.resolve().parent == Path(folder).resolve():
        raise ValueError(f"{out} would lie among the images: give an --out outside {folder}")
    if out.exists() and out.stat().st_mtime > max(path.stat().st_mtime for path in paths):
        first = read_image(paths[0])
        if not isinstance(first, str) and npz_shape(out) == (len(paths), *first.shape):
            return out, None
    return out, write_npz(paths, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="saved_images", help="images 0.png .. N-1.png (%(default)s)")
    parser.add_argument("--out", help="file to write (default: the folder's name + .npz)")
    parser.add_argument("--n_samples", type=int, help="images expected (default: the lines of class_lab.txt, else all)")
    args = parser.parse_args()
    try:
        out, shape = img2npz(args.folder, args.out, args.n_samples)
    except (ValueError, OSError) as error:
        raise SystemExit(f"img2npz.py: {error}") from None
    if shape is None:
        print(f"{out} is complete and newer than the images: nothing to do")
    else:
        print(f"{out}: arr_0 of shape {shape}")


if __name__ == "__main__":
    main()
