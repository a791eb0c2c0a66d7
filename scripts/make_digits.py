"""Write scikit-learn's handwritten digits as a folder of images, one folder per class.

    python scripts/make_digits.py --out workdir/quickstart/digits

The 1,797 real 8x8 digits (`sklearn.datasets.load_digits`, values 0..16, no download) are enlarged bicubically to
32x32 and passed through sigmoid(10 (u - 0.5)), which turns the blur of the enlargement into strokes. They become RGB
PNGs `train/<class>/<id>.png` and `held_out/<class>/<id>.png`, where id is the digit's index in `load_digits`: 500
digits, balanced over the classes and always the same, are held out from everything that is trained.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from libs import UserError
from libs.files import replacing_folder
from libs.launch import Parser, errors_in_one_line

IMAGE_SIZE = 32
N_HELD_OUT = 500
SPLIT_SEED = 0


def enlarge(digit: np.ndarray) -> np.ndarray:
    """Enlarge one digit (8, 8) of values 0..16 to (32, 32, 3) uint8, white strokes on black."""
    u = Image.fromarray((digit / 16).astype(np.float32))
    u = np.asarray(u.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    gray = 1 / (1 + np.exp(-10 * (u - 0.5)))
    return np.repeat(np.round(255 * gray).astype(np.uint8)[:, :, None], 3, axis=2)


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the fixed stratified split, {"train": indices, "held_out": indices} into `load_digits`, each sorted."""
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=N_HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    return {"train": np.sort(train), "held_out": np.sort(held_out)}


def make_digits(out: str | Path) -> dict[str, int] | None:
    """Write the two trees under `out`. Returns {"train": count, "held_out": count}, None if they were there."""
    out, digits = Path(out), load_digits()
    splits = split_indices(digits.target)
    counts = {split: len(indices) for split, indices in splits.items()}
    if out.exists():
        found = {split: len(list((out / split).glob("*/*.png"))) for split in splits}
        if found == counts:
            return None
        raise UserError(f"{out} does not hold the digits, {counts}, but {found}: remove it, or give another --out")
    with replacing_folder(out) as temporary:
        for split, indices in splits.items():
            for i in indices:
                folder = temporary / split / str(digits.target[i])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(enlarge(digits.images[i])).save(folder / f"{i:04d}.png")
    return counts


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="workdir/quickstart/digits", help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    with errors_in_one_line():
        written = make_digits(args.out)
    counts = "{train} training and {held_out} held-out digits".format(**written) if written else "complete, as before"
    print(f"{args.out}: {counts}")


if __name__ == "__main__":
    main()
