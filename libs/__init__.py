"""The parts that the programs are made of."""


class UserError(ValueError):
    """A mistake that a user can mend. The launcher prints its message in one line, without a stack trace."""
