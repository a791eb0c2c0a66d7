"""Pictures as tensors: grids of samples, and the film strip of a training run."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

T = TypeVar("T")


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (others are cut off) as uint8, of the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def finite(images: Tensor) -> Tensor:
    """Which of float images (B, ...) have neither NaN nor infinity: (B,) bool."""
    return images.isfinite().flatten(1).all(dim=1)


def check_finite(finite: Tensor) -> None:
    """Raises ValueError unless all images were finite (B,), which uint8 does not show. Waits for the device."""
    if bad := int((~finite).sum()):
        raise ValueError(
            f"{bad} of {len(finite)} images came out with NaN or infinity: the weights are damaged or of a run that "
            "diverged, or fp16 cannot hold the network's values (take --mixed_precision bf16 or no)"
        )


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """uint8 images (B, 3, H, W) as one PNG, `columns` to a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_png(make_grid(images.float() / 255, nrow=columns, padding=2), path)


def read_png(path: Path) -> Tensor:
    """A picture file as uint8 (3, H, W)."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture file, of which only the head is read."""
    with Image.open(path) as image:
        return image.size


def save_strip(newest: Path, columns: int, most: int = 20) -> None:
    """strip.png beside a grid <step>.png: a column per grid there, its first sample of each class, by step.

    Grids of another size than the newest are left out: they were made with other numbers of classes or samples. So are
    damaged ones.
    """
    folder, size = newest.parent, picture_size(newest)
    grids = [p for p in folder.glob("*.png") if p.stem.isdigit() and _unless_damaged(picture_size, p) == size]
    grids.sort(key=lambda p: int(p.stem))
    chosen = [grids[i] for i in sorted({round(k * (len(grids) - 1) / (most - 1)) for k in range(most)})]
    strips = []
    for path in chosen:
        if (grid := _unless_damaged(read_png, path)) is not None:
            strips.append(grid[:, :, : (grid.shape[2] - 2) // columns])
    _save_png(torch.cat(strips, dim=2).float() / 255, folder / "strip.png")


def _unless_damaged(read: Callable[[Path], T], path: Path) -> T | None:
    try:
        return read(path)
    except Exception:  # Pillow's decoders raise many kinds
        return None


def _save_png(image: Tensor, path: Path) -> None:
    """A picture (3, H, W) in [0, 1], whole under its name or not there: later strips are made from it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_image(image, temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
