"""What a user can mend. Each error is one line: where, what was expected, what was found, what to do.

Anything that is not a DersError is a fault of ders and keeps its traceback.
"""


class DersError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(DersError):
    """The command line or the recipe is off."""

    exit_code = 2


class CheckpointError(DersError):
    """The checkpoint is broken: its files contradict each other or the format."""

    exit_code = 4


class UnsupportedError(DersError):
    """The checkpoint may be whole, but it is of a kind that ders does not convert."""

    exit_code = 4


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not a KeyboardInterrupt: Typer would catch that one and say nothing of the unfinished output."""
