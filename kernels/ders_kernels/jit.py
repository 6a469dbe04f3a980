"""numba's njit, with a cache that several processes may fill at once.

numba numbers the machine code of a function's signatures 1, 2, ... in the order in which they come. Of two processes that
compile different signatures of one function at the same time both write number 1, and what the index then names may be
the other signature's code. Here the names have a word and the number of the process in them: at worst a signature is compiled twice.
"""

import contextlib
import os
import secrets
from collections.abc import Callable
from typing import Any

import numba

WORD = secrets.token_hex(4)  # of several machines with one home, process numbers may be equal


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit(**options)."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if options.get("cache"):
            name_own(dispatcher)
            spare_full_disks(dispatcher)
        return dispatcher

    return compiled


def name_own(dispatcher: Any) -> None:
    """Put this process into the names of the files that the function's machine code will be saved in.

    These are numba's own insides (0.68 has them); where they are others, its names stay.
    """
    file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    pattern = getattr(file, "_data_name_pattern", None)
    if pattern is not None:
        file._data_name = lambda number: pattern.replace("{number", f"{WORD}-{os.getpid()}-{{number").format(
            number=number
        )


def spare_full_disks(dispatcher: Any) -> None:
    """Code that cannot be saved is compiled again by the next process; that is no reason to stop this one."""
    cache = getattr(dispatcher, "_cache", None)
    save = getattr(cache, "save_overload", None)
    if save is None:
        return

    def saved(signature: Any, code: Any) -> None:
        with contextlib.suppress(OSError):
            save(signature, code)

    cache.save_overload = saved
