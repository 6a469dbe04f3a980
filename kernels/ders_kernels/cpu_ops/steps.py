"""How far experts are from their base, counted in steps of the number format: the exact codec's tokens, only counted.

exact_format.py defines key, value, token and context, and says from such counts what a stream would take
(expected_bytes). 0.5 ns a weight on one core of a Zen 5 server, bf16.
"""

import numpy as np

from ..jit import njit
from .rans import BLOCK, DIRECT


@njit(nogil=True, cache=True)
def count_differences(expert, base, sign_bit, shift, counts):
    """Count each weight by the exponent of its base and the token of its difference from that.

    expert, base [n] uint16|uint32; sign_bit 15|31; shift: bits of the mantissa; counts [2, exponents, tokens] uint32, added
    to: their sum counts. Neighbours are often equal, and adding to what was just written waits for the write: so they take turns.
    """
    magnitude, mask, tokens = (1 << sign_bit) - 1, counts.shape[1] - 1, counts.shape[2]
    even, odd = counts[0].reshape(-1), counts[1].reshape(-1)
    floats, symbols = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.uint16)
    patterns = floats.view(np.int64)
    for first in range(0, expert.size, BLOCK):
        e, b = expert[first : first + BLOCK], base[first : first + BLOCK]
        for i in range(e.size):
            here = e[i] ^ ((e[i] >> sign_bit) * magnitude)
            there = b[i] ^ ((b[i] >> sign_bit) * magnitude)
            difference = (here - there) & (2 * magnitude + 1)
            floats[i] = ((difference << 1) ^ -(difference >> sign_bit)) & (2 * magnitude + 1)
        for i in range(e.size):
            # an fp64 has n - 1 + 1023 in its exponent field and the two bits right below; 16.0 begins with 4 * 1027
            token = np.int64(floats[i]) if floats[i] < DIRECT else (patterns[i] >> 50) - 4 * 1027 + DIRECT
            symbols[i] = ((b[i] >> shift) & mask) * tokens + token
        for i in range(0, e.size - 1, 2):
            even[symbols[i]] += np.uint32(1)
            odd[symbols[i + 1]] += np.uint32(1)
        if e.size & 1:
            even[symbols[e.size - 1]] += np.uint32(1)


@njit(nogil=True, cache=True)
def count_exponents(expert, shift, counts):
    """Count each weight by its own exponent: the tokens of a chunk that is coded without a base.

    expert [n] uint16|uint32; shift: bits of the mantissa; counts [2, exponents] uint32, added to: their sum counts.
    """
    mask, even, odd = counts.shape[1] - 1, counts[0], counts[1]
    for i in range(0, expert.size - 1, 2):
        even[(expert[i] >> shift) & mask] += np.uint32(1)
        odd[(expert[i + 1] >> shift) & mask] += np.uint32(1)
    if expert.size & 1:
        even[(expert[expert.size - 1] >> shift) & mask] += np.uint32(1)


@njit(nogil=True, cache=True)
def conditional_bits(counts, raw_bits):
    """Bits of all that was counted: the entropy of the tokens given the exponent, and each token's raw bits.

    counts [2, exponents, tokens] uint32 of count_differences; raw_bits [tokens] int64.
    """
    bits = 0.0
    for exponent in range(counts.shape[1]):
        total = 0
        for token in range(counts.shape[2]):
            total += np.int64(counts[0, exponent, token]) + np.int64(counts[1, exponent, token])
        if total:
            log_total = np.log2(total)
            for token in range(counts.shape[2]):
                count = np.int64(counts[0, exponent, token]) + np.int64(counts[1, exponent, token])
                if count:
                    bits += count * (log_total - np.log2(count) + raw_bits[token])
    return bits
