"""The parts that the programs are made of."""

import sys

if sys.platform == "win32":
    sys.exit("error: these programs need Linux or macOS; on Windows use WSL")


class UserError(ValueError):
    """A mistake that a user can mend. The launcher prints its message in one line, without a stack trace."""
