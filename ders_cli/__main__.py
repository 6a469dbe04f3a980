"""`ders`, and `python -m ders_cli`: signals and lost streams are seen to before anything else is imported."""

import os
import signal
import sys


def _end(number: int, frame: object) -> None:
    """SIGINT or SIGTERM where there is nothing to tell: before a command begins and after it ends."""
    try:
        os.write(2, b"ders: interrupted\n")
    finally:  # even where nobody reads stderr any more
        os._exit(130)


def _catch() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _open_streams() -> None:
    """Without descriptors 0, 1 and 2 the next file that is opened would take their place, and words would go into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def main() -> None:
    """Entry point of `ders`."""
    _open_streams()
    _catch()
    from .app import main as run

    try:
        run()
    finally:
        _catch()


if __name__ == "__main__":
    main()
