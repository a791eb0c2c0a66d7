"""Write the pictures of docs/new_data.md: two folders of images as a user might bring them.

    python scripts/make_pictures.py --out workdir/new_data

`pairs/<class>/<n>.png` are 32 high and 64 wide, two handwritten digits side by side, the class being the left one;
`crops/<n>.png` are pieces of scikit-learn's two sample photographs (a temple, a flower; CC-BY), 64 to 128 pixels to a
side, without classes. Nothing is downloaded, and the same pictures come out every time. Running it again does nothing.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.files import replacing_folder
from libs.launch import Parser, errors_in_one_line
from scripts.make_digits import enlarge, split_indices

N_CLASSES = 10
SMALLEST, LARGEST = 64, 128  # sides of a crop in pixels


def write_pairs(folder: Path, n: int, rng: np.random.Generator) -> None:
    """Write n pairs of training digits, the classes taking turns on the left."""
    digits = load_digits()
    chosen = split_indices(digits.target)["train"]
    of_class = [rng.permutation(chosen[digits.target[chosen] == label]) for label in range(N_CLASSES)]
    for i, b in enumerate(rng.choice(chosen, n)):
        turn, label = divmod(i, N_CLASSES)
        a = of_class[label][turn % len(of_class[label])]
        picture = np.concatenate([enlarge(digits.images[a]), enlarge(digits.images[b])], axis=1)
        path = folder / str(label) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def write_crops(folder: Path, n: int, rng: np.random.Generator) -> None:
    """Write n pieces of the two photographs, at random places and of random sizes."""
    photos = load_sample_images().images
    folder.mkdir(parents=True)
    for i in range(n):
        photo = photos[i % len(photos)]
        height, width = rng.integers(SMALLEST, LARGEST + 1, 2)
        top, left = rng.integers(0, photo.shape[0] - height + 1), rng.integers(0, photo.shape[1] - width + 1)
        Image.fromarray(photo[top : top + height, left : left + width]).save(folder / f"{i:05d}.png")


def make_pictures(out: str | Path, n: int) -> bool:
    """Write both folders under `out`, n pictures each, unless they are there; return whether anything was written."""
    out = Path(out)
    if out.exists():
        found = {name: len(list((out / name).rglob("*.png"))) for name in ("pairs", "crops")}
        if set(found.values()) == {n}:
            return False
        raise UserError(f"{out} exists, expected {n} pictures in each of its folders, found {found}: remove it")
    with replacing_folder(out) as temporary:
        write_pairs(temporary / "pairs", n, np.random.default_rng(0))
        write_crops(temporary / "crops", n, np.random.default_rng(1))
    return True


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="workdir/new_data", help="folder to write (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1200, help="pictures in each folder, 10 or more (default %(default)s)")
    args = parser.parse_args()
    with errors_in_one_line():
        written = make_pictures(args.out, args.n)
    print(f"{args.out}: {args.n} pictures in each of pairs/ and crops/{'' if written else ', as before'}")


if __name__ == "__main__":
    main()
