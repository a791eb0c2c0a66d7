"""Pictures on disk: class-per-folder trees, reading any picture as RGB, ADM's centre crop, a dataset of pixels.

Axes: B batch, H W pixels.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Size = int | tuple[int, int]  # side of a square, or (height, width), in pixels
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class UnreadableImage(ValueError):
    """A file that should be a picture and is not; the message names it and the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> mode RGB.

    Greyscale is repeated, CMYK converted, transparency (also of palettes) laid over white, 16 bits scaled to 8.
    Raises ValueError for values whose range is not known (floating point, more than 16 bits).
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"mode {image.mode} with values outside 0..65535 has no known white: save it as 8 or 16 bits"
            )
        return Image.fromarray(((values.astype(np.float64) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_size(text: str) -> Size:
    """A size from the command line: "256", or "256x384" for height x width. Raises ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise ValueError(f"expected a side or HEIGHTxWIDTH in pixels, 1 or more; found {text!r}")
    height, width = int(match[1]), int(match[2] or match[1])
    return height if height == width else (height, width)


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def centre_crop(image: Image.Image, size: Size) -> np.ndarray:
    """ADM's crop (Dhariwal & Nichol 2021), of any proportions: halve by box while both sides are at least twice the
    wanted ones, resize bicubically until the wanted size just fits in (also upwards, if the picture is smaller), keep
    the centre. For a square that is ADM's own, by the short side.

    Args:
        image: PIL image of mode RGB.
        size: of the result.

    Returns:
        uint8 array (height, width, 3).
    """
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]


def read_image(path: str | Path, size: Size) -> np.ndarray:
    """One picture file as uint8 (3, height, width), cropped by `centre_crop`.

    The orientation tag of a photo is not applied, as in ADM's statistics. Raises UnreadableImage, naming the file.
    """
    try:
        with Image.open(path) as image:
            pixels = centre_crop(to_rgb(image), size)
    # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, DecompressionBombError, ...): whatever
    # it is, the file is what is wrong, and it has to be named.
    except Exception as error:
        raise UnreadableImage(f"{path}: {error or type(error).__name__}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class ImageTree:
    """The pictures under a folder: one class per sub-folder, or a flat folder as one class.

    Classes are the sub-folders in sorted order (label = position), pictures in sorted order within a class; names
    starting with a dot and files that are no pictures are passed over. Paths are kept as one block of bytes, so a tree
    of millions costs what its names cost and goes to worker processes cheaply.

    Attributes:
        class_names: list of str; of a flat folder, ["images"].
        labels: int32 array (n,).
        digest: SHA-256 of the relative paths in order: the same for the same tree, wherever it lies.
    """

    def __init__(self, root: str | Path):
        """Raises FileNotFoundError if `root` is no folder, ValueError if it is empty, mixed, or a class is empty."""
        self.root = str(root)
        if not os.path.isdir(root):
            raise FileNotFoundError(f"No folder of images at {root}: set the images path to one folder per class")
        entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
        folders = [name for name in entries if os.path.isdir(os.path.join(root, name))]
        flat = [name for name in entries if _is_image(name) and name not in set(folders)]
        if folders and flat:
            raise ValueError(
                f"{root} holds both class folders ({folders[0]}, ...) and images ({flat[0]}, ...): expected one folder "
                f"per class, or images only for training without classes"
            )
        if flat:
            self.class_names, files_of = ["images"], [flat]
        else:
            self.class_names, files_of = folders, [_files_under(root, folder) for folder in folders]
        empty = [name for name, files in zip(self.class_names, files_of, strict=True) if not files]
        if not folders and not flat:
            raise ValueError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no class folders")
        if empty:
            raise ValueError(
                f"{len(empty)} of the {len(folders)} class folders in {root} hold no images ({', '.join(empty[:3])}"
                f"{', ...' if len(empty) > 3 else ''}): remove them or fill them, since every folder becomes a class"
            )
        self.labels = np.repeat(np.arange(len(files_of), dtype=np.int32), [len(files) for files in files_of])
        names = [os.fsencode(name) for files in files_of for name in files]
        self._names = b"\0".join(names)
        self._ends = np.cumsum([len(name) + 1 for name in names]) - 1
        self.digest = hashlib.sha256(self._names).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of picture i relative to the root, with forward slashes."""
        start = self._ends[i - 1] + 1 if i else 0
        return os.fsdecode(self._names[start : self._ends[i]])

    def path(self, i: int) -> str:
        """Path of picture i."""
        return os.path.join(self.root, self.name(i))


class ImageBatches:
    """Item j is batch j of a tree's pictures, for a loader whose workers read whole batches (`batch_size=None`).

    Args:
        ranges: [(first, one past the last)] pictures of each batch.

    An item is a pair: uint8 (B, 3, height, width) of the pictures that could be read, and [(index, reason)] of
    those that could not.
    """

    def __init__(self, tree: ImageTree, ranges: list[tuple[int, int]], resolution: Size):
        self.tree, self.ranges, self.resolution = tree, ranges, resolution

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, j: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
        images, unreadable = [], []
        for i in range(*self.ranges[j]):
            try:
                images.append(read_image(self.tree.path(i), self.resolution))
            except UnreadableImage as error:
                unreadable.append((i, str(error)))
        shape = (0, 3, *sides(self.resolution))
        return np.stack(images) if images else np.empty(shape, np.uint8), unreadable


def batch_ranges(first: int, last: int, batch_size: int) -> list[tuple[int, int]]:
    """[(start, stop)] of the batches of pictures first..last - 1."""
    return [(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]


class ImageDataset:
    """Pixels for training without an autoencoder, read and cropped from a class-per-folder tree at every access.

    With flips every picture is two records: record 2i is picture i, record 2i + 1 its mirror image.

    Attributes:
        record_shape: (3, height, width); records are uint8.
        n_classes, class_names: the classes of the tree.
    """

    def __init__(self, root: str | Path, resolution: Size, flip: bool = False):
        self.tree = ImageTree(root)
        self.flip = bool(flip)
        self.record_shape = (3, *sides(resolution))
        self.class_names = self.tree.class_names
        self.n_classes = len(self.class_names)

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures' names, not of their contents."""
        return self.tree.digest

    def __len__(self) -> int:
        return len(self.tree) * (2 if self.flip else 1)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Records and labels: (uint8 (B, 3, H, W), int64 (B,)). Raises UnreadableImage, IndexError."""
        indices = np.asarray(indices, dtype=np.int64)
        records = np.empty((len(indices), *self.record_shape), dtype=np.uint8)
        for record, index in zip(records, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"Record {index} asked of {len(self)}")
            image, mirrored = divmod(int(index), 2) if self.flip else (int(index), 0)
            pixels = read_image(self.tree.path(image), self.record_shape[1:])
            record[...] = pixels[:, :, ::-1] if mirrored else pixels
        labels = self.tree.labels[indices // 2 if self.flip else indices]
        return records, labels.astype(np.int64)


def _is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES)


def _files_under(root, folder):
    """Pictures anywhere under root/folder, as sorted paths relative to root."""
    found = []
    for parent, folders, files in os.walk(os.path.join(root, folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(os.path.relpath(parent, root)).as_posix()
        found += [f"{below}/{name}" for name in files if _is_image(name) and not name.startswith(".")]
    return sorted(found)
