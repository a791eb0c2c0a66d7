"""Pictures as tensors: grids of samples, labelled sheets, and the film strip of a training run."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

from libs import UserError
from libs.files import replacing

T = TypeVar("T")
SMALLEST = 96  # pixels of a picture's side in a sheet: smaller ones are enlarged by a whole factor


def finite(images: Tensor) -> Tensor:
    """Find which of float images (B, ...) have neither NaN nor infinity: (B,) bool."""
    return images.isfinite().flatten(1).all(dim=1)


def check_finite(finite: Tensor) -> None:
    """Raise UserError unless all images were finite (B,), which uint8 does not show. Waits for the device."""
    if bad := int((~finite).sum()):
        raise UserError(
            f"{bad} of {len(finite)} images came out with NaN or infinity: the weights are damaged or diverged, "
            "or fp16 overflows (set --mixed_precision bf16 or no)"
        )


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write uint8 images (B, 3, H, W) as one PNG, `columns` to a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_image(images.float() / 255, file, format="png", nrow=columns, padding=2)


def read_png(path: Path) -> Tensor:
    """Read a picture file as uint8 (3, H, W)."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of a picture file, of which only the head is read."""
    with Image.open(path) as image:
        return image.size


def save_strip(newest: Path, columns: int, most: int = 20) -> None:
    """Write strip.png beside a grid <step>.png: a column per grid there, its first sample of each class, by step.

    Damaged grids are left out, and those of another size than the newest: they hold other classes or samples.
    """
    folder, size = newest.parent, picture_size(newest)
    grids = [p for p in folder.glob("*.png") if p.stem.isdigit() and _unless_damaged(picture_size, p) == size]
    grids.sort(key=lambda p: int(p.stem))
    chosen = [grids[i] for i in sorted({round(k * (len(grids) - 1) / (most - 1)) for k in range(most)})]
    read = [_unless_damaged(read_png, path) for path in chosen]
    strips = [grid[:, :, : (grid.shape[2] - 2) // columns] for grid in read if grid is not None]
    with replacing(folder / "strip.png") as file:
        save_image(torch.cat(strips, dim=2).float() / 255, file, format="png")


def _unless_damaged(read: Callable[[Path], T], path: Path) -> T | None:
    try:
        return read(path)
    except Exception:  # Pillow's decoders raise many kinds
        return None


def draw_sheet(cells: list[list[np.ndarray | None]], rows: list[str], columns: list[str]) -> Image.Image:
    """Draw pictures (h, w, 3) uint8 with a caption for each row and column, all enlarged to the size of the largest."""
    height, width = np.max([cell.shape[:2] for row in cells for cell in row if cell is not None], axis=0)
    scale = max(1, -(-SMALLEST // min(height, width)))
    height, width, gap = int(height * scale), int(width * scale), 4
    font = ImageFont.load_default(13)
    titles = ["\n".join(wrap(title, width, font)) for title in columns]
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


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
