"""Space of files: taken at once before they are written, given back in the middle of them. Linux; elsewhere nothing is done."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02  # fallocate(2)


def allocate(handle: int, size: int) -> None:
    """Give an empty file its size and its space. Raises OSError where the disk is full.

    posix_fallocate writes into every block where the file system has no such call; there the file stays a hole.
    """
    os.ftruncate(handle, size)
    if size and _fallocate(handle, KEEP_SIZE, 0, 1):
        os.posix_fallocate(handle, 0, size)


def punch(handle: int, begin: int, size: int) -> bool:
    """Give back the space of some bytes of a file, which then read as zeros; False where it can't be done."""
    return _fallocate(handle, KEEP_SIZE | PUNCH_HOLE, begin, size)


def _fallocate(handle: int, mode: int, begin: int, size: int) -> bool:
    function = _function()
    return function is not None and function(handle, mode, begin, size) == 0


@cache
def _function() -> Any:
    """fallocate(2) itself, which never writes in the place of a call that is missing; or None."""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "fallocate64"):
        return None
    function = ctypes.CDLL(None, use_errno=True).fallocate64
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function
