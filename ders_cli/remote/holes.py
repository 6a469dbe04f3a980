"""Giving back the room of a part of a file. Linux alone can; elsewhere the file keeps it until it is removed."""

import ctypes
import sys
from functools import cache

KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # fallocate(2)


def punch(handle: int, begin: int, size: int) -> bool:
    """Turn bytes of a file, open for writing, into a hole that reads as zeros; False: not possible here."""
    fallocate = _fallocate()
    return bool(fallocate) and fallocate(handle, KEEP_SIZE_PUNCH_HOLE, begin, size) == 0


@cache
def _fallocate():
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "fallocate64"):
        return None
    function = ctypes.CDLL(None, use_errno=True).fallocate64
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function
