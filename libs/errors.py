"""A user's mistake ends a program in one line; a bug keeps its stack trace."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class UserError(ValueError):
    """A mistake that a user can mend. The launcher prints its message in one line, without a stack trace."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A block whose errors, where users can mend them, end the program with `error: ...` and status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not is_for_users(error):
            raise
        sys.exit(f"error: {error}")


def is_for_users(error: BaseException) -> bool:
    """Does its message tell a user what to change?

    So it does where a line of this project raised it, and where the system refuses a file or its space.
    """
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename).resolve().is_relative_to(ROOT) and "site-packages" not in frame.filename
    return own and "raise" in frame.line
