"""Names of classes, labels from them, and a search among them."""

import difflib
from collections.abc import Sequence

from torchvision.models import ResNet50_Weights


def class_names(n_classes: int) -> list[str]:
    """ImageNet's English names (from torchvision, no network) for 1000 classes, else the numbers as words."""
    if n_classes == 1000:
        return list(ResNet50_Weights.DEFAULT.meta["categories"])
    return [str(i) for i in range(n_classes)]


def find_classes(word: str, names: Sequence[str]) -> list[int]:
    """Labels of the classes that a number, a name or a part of one may mean, likeliest first.

    First the class of that number or name, then those that begin with it, then names that contain it; for a word
    without any, names spelt much like it. Upper and lower case are the same; an empty word means every class.
    """
    lower = [name.lower() for name in names]
    wanted = word.strip().lower()
    ranks = {}
    for label, name in enumerate(lower):
        forms = (str(label), name)
        kinds = (wanted in forms, any(form.startswith(wanted) for form in forms), wanted in name)
        if any(kinds):
            ranks[label] = kinds.index(True)
    found = sorted(ranks, key=ranks.get)
    if found or wanted.isdecimal():
        return found
    return [lower.index(name) for name in difflib.get_close_matches(wanted, lower, n=5)]


def class_label(word: int | str, names: Sequence[str]) -> int:
    """The label of a class given by its number or its name (upper and lower case are the same).

    Numbers go up to len(names), which is the null label: no class.

    Raises:
        ValueError: no such class; the message has the names that come closest.
    """
    if isinstance(word, str) and not word.strip().isdecimal():
        lower = [name.lower() for name in names]
        wanted = word.strip().lower()
        if wanted in lower:
            return lower.index(wanted)
        close = [names[label] for label in find_classes(wanted, names)[:5]] if wanted else []
        raise ValueError(f"no class is called {word!r}" + (f"; near it: {', '.join(close)}" if close else ""))
    if int(word) != float(word) or not 0 <= int(word) <= len(names):
        raise ValueError(f"class labels are 0..{len(names)} ({len(names)}: no class); found {word}")
    return int(word)
