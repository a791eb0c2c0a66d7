"""Names of classes, and labels from them."""

import difflib
from collections.abc import Sequence

from torchvision.models import ResNet50_Weights


def class_names(n_classes: int) -> list[str]:
    """ImageNet's English names (from torchvision, no network) for 1000 classes, else the numbers as words."""
    if n_classes == 1000:
        return list(ResNet50_Weights.DEFAULT.meta["categories"])
    return [str(i) for i in range(n_classes)]


def class_label(word: int | str, names: Sequence[str]) -> int:
    """The label of a class given by its number or its name (upper and lower case are the same).

    Numbers go up to len(names), which is the null label: no class.

    Raises:
        ValueError: no such class; the message has the names that come closest.
    """
    if isinstance(word, str) and not word.strip().isdigit():
        lower = [name.lower() for name in names]
        wanted = word.strip().lower()
        if wanted in lower:
            return lower.index(wanted)
        parts = [name for name in lower if wanted and wanted in name]
        close = (parts + [name for name in difflib.get_close_matches(wanted, lower, n=5) if name not in parts])[:5]
        raise ValueError(f"no class is called {word!r}" + (f"; near it: {', '.join(close)}" if close else ""))
    if not 0 <= int(word) <= len(names):
        raise ValueError(f"class labels are 0..{len(names)} ({len(names)}: no class); found {word}")
    return int(word)
