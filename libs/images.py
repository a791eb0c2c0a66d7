"""Pictures: class-per-folder trees, reading as RGB, ADM's center crop, a dataset of pixels; grids and sheets.

Axes: B batch, H W pixels.
"""

import functools
import hashlib
import itertools
import os
import re
import textwrap
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

from libs import UserError
from libs.files import replacing

SMALLEST = 96  # pixels of a picture's side in a sheet: smaller ones are enlarged by a whole factor

Size = int | tuple[int, int]  # side of a square, or (height, width), in pixels
# Formats that Pillow opens but does not read, or has Ghostscript read
UNREAD_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What systems and file servers put beside pictures, in lower case; names with a leading dot are no data either
NO_DATA = {"@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler"}
NO_DATA |= {"system volume information", "__macosx", "lost+found", "thumbs.db", "desktop.ini"}
# Factor from the transparent value of a PNG to the depth that Pillow reads it in, by its raw mode
TRANSPARENT_VALUE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


class UnreadableImage(UserError):
    """A file that cannot be read as a picture; the message names it and the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB, with transparency laid over white and 16 bits scaled to 8.

    Raises ValueError for values whose range is not known: floating point, more than 16 bits.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the range of its values (mode {image.mode}) is not known: save it as 8 or 16 bits")
        eight_bits = ((values.astype(np.float64) + 128) // 257).astype(np.uint8)
        eight_bits[values == (-1 if transparent is None else transparent)] = 255
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or transparent is not None:
        if factor := TRANSPARENT_VALUE.get(image.tile[0][3] if image.tile else ""):
            scaled = [int(value * factor) for value in np.atleast_1d(transparent)]
            image.info["transparency"] = tuple(scaled) if len(scaled) > 1 else scaled[0]
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_size(text: str) -> Size:
    """Parse a size from the command line: "256", or "256x384" for height x width. argparse reports the TypeError."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    height, width = int(match[1]), int(match[2] or match[1])
    return height if height == width else (height, width)


def sides(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def center_crop(image: Image.Image, size: Size) -> np.ndarray:
    """Resize and crop an RGB image as ADM does (Dhariwal & Nichol 2021), here to any proportions.

    Halve by box while both sides are at least twice the wanted ones, resize bicubically until the wanted size just
    fits in (also upwards), keep the center: uint8 (height, width, 3). For a square this is ADM's own crop. Of a line
    of pixels only the center is resized, as the whole would take gigabytes.
    """
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if image.width * image.height * scale**2 > 100 * width * height:
        w, h = width / scale, height / scale
        left, top = (image.width - w) / 2, (image.height - h) / 2
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h)))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]


def read_image(path: str | Path, size: Size) -> np.ndarray:
    """Read a picture file as uint8 (3, height, width), cropped by `center_crop`. Raises UnreadableImage.

    The orientation tag of a photo is not applied, as in ADM's statistics.
    """
    try:
        with Image.open(path) as image:
            pixels = center_crop(to_rgb(image), size)
    except Exception as error:  # Pillow's errors are of many types (OSError, SyntaxError, struct.error, ...)
        raise UnreadableImage(f"{path}: {error or type(error).__name__}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class ImageTree:
    """The pictures under a folder: one class per sub-folder, or a flat folder as one class.

    Classes are the sub-folders in sorted order (label = position), pictures in sorted order within a class, at any
    depth, links followed. What is no data and files that are no pictures by their ending are skipped. Paths are one
    NumPy array, so that a tree of millions of pictures is cheap to send to worker processes.

    Attributes:
        class_names: list of str; of a flat folder, ["images"].
        left_out: what is skipped by its ending, in words; "" for nothing.
        labels: int32 array (n,).
        digest: SHA-256 of the relative paths in order: the same for the same tree, wherever it lies.
    """

    def __init__(self, root: str | Path, leave_out: Collection[str] = ()):
        """Find the pictures, but for those that `leave_out` names by their path relative to the root.

        Raises OSError for a folder that cannot be read; UserError for no picture, a class without pictures, pictures
        beside classes, a link to nothing, a name to leave out that is not there.
        """
        self.root = str(root)
        folders, files = _list(self.root)
        flat = [name for name in files if _is_picture(name)]
        files_of = [_files_under(self.root, name, (os.path.realpath(root),)) for name in folders]
        others = [name for name in itertools.chain(files, *files_of) if not _is_picture(name)]
        listed = ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
        self.left_out = f"{len(others)} files are no pictures by their ending ({listed})" if others else ""
        also = f"; {self.left_out}" if others else ""
        if bool(folders) == bool(flat):
            found = f"both class folders ({folders[0]}, ...) and images ({flat[0]}, ...)" if flat else "no images"
            raise UserError(f"{root} holds {found}: expected one folder per class, or images alone{also}")
        self.class_names = [printable(name) for name in folders] or ["images"]
        dropped = set(leave_out)
        files_of = [sorted(filter(_is_picture, names)) for names in files_of] or [flat]
        if absent := dropped.difference(*files_of):
            raise UserError(f"{root} does not hold {min(absent)}, which is to be left out: check the images again")
        files_of = [[name for name in names if name not in dropped] for names in files_of]
        empty = [name for name, files in zip(self.class_names, files_of, strict=True) if not files]
        if empty:  # every folder becomes a class
            found = f"{len(empty)} of the {len(self.class_names)} class folders in {root} are empty"
            raise UserError(f"{found} ({empty[0]}, ...){also}")
        self.labels = np.repeat(np.arange(len(files_of), dtype=np.int32), [len(files) for files in files_of])
        self._names = np.array([os.fsencode(name) for files in files_of for name in files])
        self.digest = hashlib.sha256(b"\0".join(self._names)).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the path of picture i relative to the root, with forward slashes."""
        return os.fsdecode(self._names[i])

    def path(self, i: int) -> str:
        """Return the path of picture i."""
        return os.path.join(self.root, self.name(i))


def read_range(tree: ImageTree, size: Size, images: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Read pictures first..last - 1 of a tree, for `images` = (first, last), cropped to `size`.

    Returns uint8 (B, 3, height, width) of those that can be read, and [(index, reason)] of those that cannot.
    """
    pictures, unreadable = [np.empty((0, 3, *sides(size)), np.uint8)], []
    for i in range(*images):
        try:
            pictures.append(read_image(tree.path(i), size)[None])
        except UnreadableImage as error:
            unreadable.append((i, str(error)))
    return np.concatenate(pictures), unreadable


def batch_ranges(first: int, last: int, batch_size: int) -> list[tuple[int, int]]:
    """Return [(start, stop)] of the batches of pictures first..last - 1."""
    return [(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]


class ImageDataset:
    """Pixels for training without an autoencoder, read and cropped from a class-per-folder tree at every access.

    Records are uint8 (3, height, width). With flips record 2i is picture i, record 2i + 1 its mirror image. The digest
    is of the pictures' names, not of their contents. Attributes: those of every data set (libs.data).
    """

    releases_gil = False

    def __init__(self, root: str | Path, resolution: Size, flip: bool = False, leave_out: Collection[str] = ()):
        self.tree = ImageTree(root, leave_out)
        self.views = 2 if flip else 1
        self.record_shape = (3, *sides(resolution))
        self.class_names = self.tree.class_names
        self.n_classes = len(self.class_names)
        self.digest = self.tree.digest

    def __len__(self) -> int:
        return len(self.tree) * self.views

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read (records uint8 (B, 3, H, W), labels int64 (B,)). Raises UnreadableImage."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = self.tree.labels[indices // self.views].astype(np.int64)
        records = np.empty((len(indices), *self.record_shape), dtype=np.uint8)
        for record, (picture, mirrored) in zip(records, np.stack(np.divmod(indices, self.views), 1), strict=True):
            try:
                pixels = read_image(self.tree.path(picture), self.record_shape[1:])
            except UnreadableImage as error:
                advice = "replace it and re-run to resume, or list all such by scripts/check_images.py"
                raise UnreadableImage(f"{error}: {advice}") from error
            record[...] = pixels[:, :, ::-1] if mirrored else pixels
        return records, labels


def is_data(name: str) -> bool:
    """Tell whether a file or folder of this name is the user's, not put there by a system or file server."""
    return not name.startswith(".") and name.lower() not in NO_DATA


def printable(name: str) -> str:
    """Return a file's name as it can be printed and written as JSON: bytes that are not UTF-8 as \\x.."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@functools.cache
def picture_endings() -> frozenset[str]:
    """Return the endings of files that Pillow, as it is installed here, can read: ".jpg", ..."""
    Image.init()
    formats = Image.OPEN.keys() - UNREAD_FORMATS
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def _is_picture(name):
    return os.path.splitext(name)[1].lower() in picture_endings()


def _list(folder):
    """Return the sorted names of the folders and the files in a folder, by what links lead to."""
    folders, files = [], []
    for entry in os.scandir(folder):
        if is_data(entry.name):
            (folders if entry.is_dir() else files).append(entry.name)
            if entry.is_symlink() and not os.path.exists(entry.path) and not _is_picture(entry.name):
                raise UserError(f"{entry.path} links to nothing: restore what it links to, or remove it")
    return sorted(folders), sorted(files)


def _files_under(root, folder, above):
    """Return the files anywhere under root/folder, as paths relative to root; a link to a folder `above` is skipped."""
    here = os.path.realpath(os.path.join(root, folder))
    if here in above:
        return []
    folders, files = _list(os.path.join(root, folder))
    deeper = [_files_under(root, f"{folder}/{name}", (*above, here)) for name in folders]
    return [f"{folder}/{name}" for name in files] + list(itertools.chain.from_iterable(deeper))


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write uint8 images (B, 3, H, W) as one PNG, `columns` to a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_image(images.float() / 255, file, format="png", nrow=columns, padding=2)


def save_strip(newest: Path, columns: int, most: int = 20) -> None:
    """Write strip.png beside a grid <step>.png: of at most `most` grids, by step, the first sample of each class.

    Damaged grids are left out, and those of another size than the newest: they hold other classes or samples.
    """
    with Image.open(newest) as grid:
        size, strips = grid.size, []
    grids = sorted((p for p in newest.parent.glob("*.png") if p.stem.isdigit()), key=lambda p: int(p.stem))
    for path in dict.fromkeys(grids[round(k * (len(grids) - 1) / (most - 1))] for k in range(most)):
        with suppress(Exception), Image.open(path) as grid:  # Pillow's errors are of many types
            if grid.size == size:
                strips.append(pil_to_tensor(grid.convert("RGB"))[:, :, : (grid.width - 2) // columns])
    with replacing(newest.with_name("strip.png")) as file:
        save_image(torch.cat(strips, dim=2).float() / 255, file, format="png")


def draw_sheet(cells: list[list[np.ndarray | None]], rows: list[str], columns: list[str]) -> Image.Image:
    """Draw pictures (h, w, 3) uint8 with a caption for each row and column, all enlarged to the size of the largest."""
    height, width = np.max([cell.shape[:2] for row in cells for cell in row if cell is not None], axis=0)
    scale = max(1, -(-SMALLEST // min(height, width)))
    height, width, gap = int(height * scale), int(width * scale), 4
    font = ImageFont.load_default(13)
    titles = [textwrap.fill(title, width // 7, break_long_words=False) for title in columns]  # 7 pixels a letter
    left = 12 + int(max(font.getlength(title) for title in rows)) if any(rows) else gap
    top = 8 + 17 * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.multiline_text((left + c * (width + gap), 4), title, "black", font)
    for r, (title, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + r * (height + gap)
        draw.text((6, y + height // 2 - 8), title, "black", font)
        for c, cell in enumerate(row):
            if cell is not None:
                picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + c * (width + gap), y))
    return sheet
