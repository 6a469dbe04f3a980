"""Random bits as a function of (key, index): the same on any machine, thread count and block order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element i of a
matrix, counted row by row, draws word i mod 4 of the block whose counter is (low 32 bits of i // 4, high 32 bits
of i // 4, 0, 0), under a key of 64 bits (low word first). Triton has the same generator as tl.philox.

Known answers (Random123, kat_vectors): counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
"""

import hashlib

import numpy as np

from .jit import njit

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_SIDE = 32  # blocks side by side, a constant so that the compiler puts them into vector lanes


def make_key(seed: int, group: str, label: str) -> int:
    """The 64-bit key of one expert matrix: SHA-256 of "seed/group/label", its first 8 bytes, low byte first."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{group}/{label}".encode()).digest()[:8], "little")


@njit(nogil=True, cache=True, inline="always")
def _two_pairs(block, high, key):
    """One block's four words as two uint64, the lower word in the lower half; `high` = block >> 32.

    State is held in 64 bits, of which only the lower half means anything: a multiplication of two halves is one vector
    instruction on any processor, and what its product leaves above the half is never looked at.
    """
    c0, c1, c2, c3 = block, high, np.uint64(0), np.uint64(0)
    k0, k1 = key & _LOW, key >> _32
    for _ in range(10):
        p0, p1 = _M0 * (c0 & _LOW), _M1 * (c2 & _LOW)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1, (p0 >> _32) ^ c3 ^ k1, p0
        k0, k1 = k0 + _W0, k1 + _W1
    return (c0 & _LOW) | (c1 << _32), (c2 & _LOW) | (c3 << _32)


@njit(nogil=True, cache=True)
def fill(key, first, out):
    """uint64 key and number of the first element -> uint32 out [count]: draw() for compiled callers."""
    pairs = np.empty(2 * _SIDE, np.uint64)
    words = pairs.view(np.uint32)
    block = first >> np.uint64(2) & ~np.uint64(_SIDE - 1)  # a multiple of _SIDE: its neighbours share `high`
    at = -np.int64(first & np.uint64(4 * _SIDE - 1))
    while at < out.size:
        high = block >> _32
        for i in range(_SIDE):
            pairs[2 * i], pairs[2 * i + 1] = _two_pairs(block + np.uint64(i), high, key)
        if at >= 0 and at + 4 * _SIDE <= out.size:
            part = out[at : at + 4 * _SIDE]
            for i in range(4 * _SIDE):
                part[i] = words[i]
        else:
            for i in range(max(0, -at), min(4 * _SIDE, out.size - at)):
                out[at + i] = words[i]
        block += np.uint64(_SIDE)
        at += 4 * _SIDE


@njit(nogil=True, cache=True)
def fill_blocks(key, first, blocks, out):
    """Blocks first // 4 + blocks[i] alone: uint32 [n, a multiple of 32] -> uint32 out [4 n], elements 4 of a block."""
    pairs = out.view(np.uint64)
    begin = first >> np.uint64(2)
    for at in range(0, blocks.size, _SIDE):
        number, part = blocks[at : at + _SIDE], pairs[2 * at : 2 * at + 2 * _SIDE]
        for i in range(_SIDE):
            block = begin + np.uint64(number[i])
            part[2 * i], part[2 * i + 1] = _two_pairs(block, block >> _32, key)


def draw(key: int, first: int, count: int) -> np.ndarray:
    """uint32 [count]: the words of elements first ... first + count - 1."""
    out = np.empty(count, np.uint32)
    fill(np.uint64(key), np.uint64(first), out)
    return out
