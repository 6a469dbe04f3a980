"""The compiled kernels as plain Python, so that a fuzzer sees their branches and an index past an array's end is an IndexError.

For a process in which NUMBA_DISABLE_JIT is set: what has no Python form there gets one, and the generator of draws, which reads
nothing that was stored, a fast one. Numbers then wrap as in the compiled code, but for a negative index, which Python wraps too.
"""

import numpy as np
from ders_kernels import counter_rng, packing
from ders_kernels.cpu_ops import select

LOW = np.uint64(0xFFFFFFFF)


def lowest_bit(word: np.uint64) -> int:
    return (int(word) & -int(word)).bit_length() - 1 if word else 64


def count_bits(word: np.uint64) -> int:
    return int(word).bit_count()


def fill(key: np.uint64, first: np.uint64, out: np.ndarray) -> None:
    """counter_rng.fill, all blocks at once."""
    first, (k0, k1) = int(first), (np.uint64(int(key) & 0xFFFFFFFF), np.uint64(int(key) >> 32))
    block = np.arange(first >> 2, (first + out.size + 3) >> 2, dtype=np.uint64)
    c0, c1, c2, c3 = block & LOW, block >> np.uint64(32), np.zeros_like(block), np.zeros_like(block)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & LOW, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    out[:] = np.stack((c0, c1, c2, c3), axis=1).reshape(-1)[first & 3 :][: out.size]


def install() -> None:
    np.seterr(over="ignore")
    counter_rng.fill = select.fill = fill
    for module in (packing, select):
        module.lowest_bit, module.count_bits = lowest_bit, count_bits
