"""Random bits as a function of (key, index): the same on any machine, thread count and block order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element i of a
matrix, counted row by row, draws word i mod 4 of the block whose counter is (low 32 bits of i // 4, high 32 bits
of i // 4, 0, 0), under a key of 64 bits (low word first). Triton has the same generator as tl.philox.

Known answers (Random123, kat_vectors): counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
"""

import hashlib

import numpy as np
from numba import njit

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def make_key(seed: int, group: str, label: str) -> int:
    """The 64-bit key of one expert matrix: SHA-256 of "seed/group/label", its first 8 bytes, low byte first."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{group}/{label}".encode()).digest()[:8], "little")


@njit(nogil=True, cache=True)
def fill(key, first, out):
    """uint64 key and number of the first element -> uint32 out [count]: draw() for compiled callers."""
    zero = np.uint64(0)
    skip = np.int64(first & np.uint64(3))
    first_block = first >> np.uint64(2)
    for i in range((out.size + skip + 3) // 4):
        block = first_block + np.uint64(i)
        # words are held in uint64: numba widens uint32 arithmetic to 64 bits anyway
        c0, c1, c2, c3 = block & _LOW, block >> _32, zero, zero
        k0, k1 = key & _LOW, key >> _32
        for _ in range(10):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        at = 4 * i - skip
        if at >= 0 and at + 4 <= out.size:
            out[at], out[at + 1], out[at + 2], out[at + 3] = c0, c1, c2, c3
            continue
        words = (c0, c1, c2, c3)
        for j in range(4):
            if 0 <= at + j < out.size:
                out[at + j] = words[j]


def draw(key: int, first: int, count: int) -> np.ndarray:
    """uint32 [count]: the words of elements first ... first + count - 1."""
    out = np.empty(count, np.uint32)
    fill(np.uint64(key), np.uint64(first), out)
    return out
