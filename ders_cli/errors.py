"""What a user can mend. Each error is one line: where, what was expected, what was found, what to do.

Anything that is not a DersError is a fault of ders and keeps its traceback.
"""

import errno


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


_GOES_ON = "an unfinished output can be continued with --resume"
REMEDIES = {
    errno.ENOSPC: f"free some space, or -o names another disk; {_GOES_ON}",
    errno.EDQUOT: f"free some space, or -o names another disk; {_GOES_ON}",
    errno.EFBIG: "this file system or `ulimit -f` takes no file of this size; --max-shard-size makes smaller ones",
    errno.EIO: f"the disk or the network's storage failed; look after it, then run again: {_GOES_ON}",
    errno.ESTALE: f"the network's storage lost the file; run again: {_GOES_ON}",
    errno.EROFS: "-o names another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EMFILE: "raise the limit on open files with `ulimit -n`",
    errno.ENFILE: "the whole machine has too many files open; run again later",
    errno.ENOMEM: "fewer --jobs need less memory",
}


def in_words(error: OSError) -> str:
    """An error of the operating system as one line: where, what, and what to do."""
    where = error.filename or "output"
    if error.filename2:  # copying or renaming
        where = f"{where} -> {error.filename2}"
    found = f"{where}: {error.strerror or error}"
    remedy = REMEDIES.get(error.errno)
    return f"{found}; {remedy}" if remedy else found
