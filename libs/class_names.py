"""Classes by number and by name."""

import difflib
import math
import numbers
from collections.abc import Sequence

from libs import UserError


def find_classes(word: str, names: Sequence[str]) -> list[int]:
    """Return labels of the classes that a number, a name or a part of one may mean, likeliest first.

    First the class of that number, then of that name, then those that begin with it, then those that contain it; for a
    word without any, names spelt much like it. Case is ignored. An empty word means every class.
    """
    lower = [name.lower() for name in names]
    wanted = word.strip().lower()
    ranks = {}
    for label, name in enumerate(lower):
        begins = str(label).startswith(wanted) or name.startswith(wanted)
        kinds = (wanted == str(label), wanted == name, begins, wanted in name)
        if any(kinds):
            ranks[label] = kinds.index(True)
    found = sorted(ranks, key=ranks.get)
    if found or wanted.isdecimal():
        return found
    return [lower.index(name) for name in difflib.get_close_matches(wanted, lower, n=5)]


def class_label(word: int | str, names: Sequence[str]) -> int:
    """Return the label of a class given by its number or its name.

    A word of digits is a number, even where a class has that name. Case is ignored unless names differ in nothing else.
    len(names) is the null label: no class.
    """
    if isinstance(word, str) and not word.strip().isdecimal():
        wanted = word.strip()
        same = [label for label, name in enumerate(names) if name == wanted]
        same = same or [label for label, name in enumerate(names) if name.lower() == wanted.lower()]
        if len(same) == 1:
            return same[0]
        near = same or find_classes(wanted, names)[:5] or range(min(5, len(names)))
        shown = ", ".join(f"{names[label]} ({label})" for label in near)
        problem = "several classes are" if same else "no class is"
        raise UserError(f"{problem} called {word!r}" + (f"; there are {shown}" if shown else ""))
    whole = isinstance(word, str) or (isinstance(word, numbers.Real) and math.isfinite(word) and word == int(word))
    if not whole or not 0 <= int(word) <= len(names):
        raise UserError(f"class labels are 0..{len(names)} ({len(names)}: no class); found {word}")
    return int(word)
