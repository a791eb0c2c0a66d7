"""ImageNet's names of classes, labels from names of any, and a search among them."""

import difflib
import re
from collections.abc import Sequence

from torchvision.models import ResNet50_Weights


def imagenet_names() -> list[str]:
    """ImageNet's English names in the order of its 1000 labels (from torchvision, no network)."""
    return list(ResNet50_Weights.DEFAULT.meta["categories"])


def are_imagenets_folders(names: Sequence[str]) -> bool:
    """Are they ImageNet's 1000 folders: WordNet's numbers, in order from the tench to toilet tissue?"""
    ends = ("n01440764", "n15075141")
    return len(names) == 1000 and (names[0], names[-1]) == ends and all(re.fullmatch(r"n\d{8}", n) for n in names)


def find_classes(word: str, names: Sequence[str]) -> list[int]:
    """Labels of the classes that a number, a name or a part of one may mean, likeliest first.

    First the class of that number, then of that name, then those that begin with it, then names that contain it; for a
    word without any, names spelt much like it. Upper and lower case are the same; an empty word means every class.
    """
    lower = [name.lower() for name in names]
    wanted = word.strip().lower()
    ranks = {}
    for label, name in enumerate(lower):
        forms = (str(label), name)
        begins = any(form.startswith(wanted) for form in forms)
        kinds = (wanted == str(label), wanted == name, begins, wanted in name)
        if any(kinds):
            ranks[label] = kinds.index(True)
    found = sorted(ranks, key=ranks.get)
    if found or wanted.isdecimal():
        return found
    return [lower.index(name) for name in difflib.get_close_matches(wanted, lower, n=5)]


def class_label(word: int | str, names: Sequence[str]) -> int:
    """The label of a class given by its number or its name.

    A word of digits is always a number, even where a class is called so. Upper and lower case are the same unless names
    differ in nothing else. Numbers go up to len(names), which is the null label: no class.

    Raises:
        ValueError: no such class, and the message has the names that come closest (or the first ones); or several.
    """
    if isinstance(word, str) and not word.strip().isdecimal():
        wanted = word.strip()
        same = [label for label, name in enumerate(names) if name == wanted]
        same = same or [label for label, name in enumerate(names) if name.lower() == wanted.lower()]
        if len(same) == 1:
            return same[0]
        if same:
            found = ", ".join(f"{names[label]} ({label})" for label in same)
            raise ValueError(f"several classes are called {word!r}: {found}; give the number of one")
        close = [names[label] for label in find_classes(wanted, names)[:5]] if wanted else []
        more = ", ..." if len(names) > 5 else ""
        near = f"near it: {', '.join(close)}" if close else f"there are: {', '.join(names[:5])}{more}"
        raise ValueError(f"no class is called {word!r}" + (f"; {near}" if names else ""))
    if int(word) != float(word) or not 0 <= int(word) <= len(names):
        raise ValueError(f"class labels are 0..{len(names)} ({len(names)}: no class); found {word}")
    return int(word)
