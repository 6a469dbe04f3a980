"""The loops of the exact format: differences, tokens, their counts, rANS, raw bits. exact_format.py tells what for.

rANS (Duda, arXiv:1311.2540; interleaved: Giesen, arXiv:1402.3392) keeps an integer x in [2^16, 2^32). A token that
owns f of the 2^12 slots, from slot s on, is coded by   x -> (x // f) * 2^12 + x % f + s   and costs 12 - log2(f) bits.
Before a step that would push x over 2^32, its low 16 bits leave as one word. A decoder undoes the steps in reverse,
so the encoder walks the weights backwards and fills the words from the end. Weight i belongs to state i % LANES:
eight independent states hide the latency of a table read and a multiplication.

All arithmetic is int64: numba turns a mixture with uint64 into floats. A store cuts it to the width of the array.
ns per weight on one core of a Zen4 server, bf16: zigzag_difference 0.16, tokenise 0.1, count_tokens 0.55,
merge_exponents 0.12, encode_tokens 2.3, pack_raw_bits 0.4; decode_tokens 2.0, expand 0.9. Where bits decide what is
done next, both ways are computed: a branch that cannot be foreseen costs more (4.8 ns in expand).
"""

import numpy as np
from numba import njit

LANES = 8
SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
LOWEST_STATE = 1 << 16
DIRECT = 16  # smaller values are their own tokens
TOKENS = 256
BLOCK = 1024


@njit(nogil=True, cache=True)
def zigzag_difference(expert, base, sign_bit, values):
    """Write zigzag(key(expert) - key(base)), all modulo the dtype's range.

    expert, base, values [n] uint16|uint32; sign_bit 15|31.
    """
    magnitude = (1 << sign_bit) - 1
    for i in range(values.size):
        here = expert[i] ^ ((expert[i] >> sign_bit) * magnitude)
        there = base[i] ^ ((base[i] >> sign_bit) * magnitude)
        difference = (here - there) & (2 * magnitude + 1)
        values[i] = (difference << 1) ^ -(difference >> sign_bit)


@njit(nogil=True, cache=True)
def tokenise(values, tokens):
    """Write each value's token: itself below 16, else 16 + 4 * (its bits - 5) + the two bits under the leading one.

    values [n] uint16|uint32, tokens [n] uint8.
    """
    floats = np.empty(BLOCK, np.float64)
    patterns = floats.view(np.int64)
    for first in range(0, values.size, BLOCK):
        v, t = values[first : first + BLOCK], tokens[first : first + BLOCK]
        for i in range(v.size):
            floats[i] = v[i]
        for i in range(v.size):
            # an fp64 has n - 1 + 1023 in its exponent field and the two bits right below; 16.0 begins with 4 * 1027
            t[i] = v[i] if v[i] < DIRECT else (patterns[i] >> 50) - 4 * 1027 + DIRECT


@njit(nogil=True, cache=True)
def count_tokens(tokens, base, shift, counts):
    """Add 1 to counts[exponent of base[i], tokens[i]] for every weight. counts [exponents, 256] int64."""
    mask = counts.shape[0] - 1
    for i in range(tokens.size):
        counts[(base[i] >> shift) & mask, tokens[i]] += 1


@njit(nogil=True, cache=True)
def fixed_log2(count):
    """log2 of 1 <= count < 2^32 in units of 2^-16, rounded down: by squaring, so the same on every machine."""
    log = 0
    while count >> (log + 1):
        log += 1
    scaled = np.uint64(count) << np.uint64(31 - log)
    for _ in range(16):
        scaled = (scaled * scaled) >> np.uint64(31)
        doubled = scaled >> np.uint64(32)
        scaled >>= doubled
        log = 2 * log + np.int64(doubled)
    return log


@njit(nogil=True, cache=True)
def context_cost(counts, more):
    """Bits, in units of 2^-16, of a context that holds counts + more (both [256] int64): its tokens and its table."""
    total, first, last = 0, -1, -1
    for token in range(TOKENS):
        if counts[token] + more[token]:
            total += counts[token] + more[token]
            first = token if first < 0 else first
            last = token
    table_bytes, cost, log_total = 3 + last - first + 1, 0, fixed_log2(total)
    for token in range(first, last + 1):
        count = counts[token] + more[token]
        if count:
            cost += count * (log_total - fixed_log2(count))
            table_bytes += count * SLOTS >= 128 * total
    return cost + (8 * table_bytes << 16)


@njit(nogil=True, cache=True)
def merge_exponents(counts, most):
    """Merge neighbouring exponents into at most `most` contexts, always the pair that saves most bits.

    counts [exponents, 256] int64 -> the contexts' first exponents (ascending) and their cost in bits * 2^16;
    the counts of a context are gathered in the row of its first exponent.
    """
    nothing = np.zeros(TOKENS, np.int64)
    rows = np.array([e for e in range(counts.shape[0]) if counts[e].any()])  # each context's first exponent
    cost = np.array([context_cost(counts[e], nothing) for e in rows])
    joint = np.array([context_cost(counts[rows[i]], counts[rows[i + 1]]) for i in range(rows.size - 1)])
    while rows.size > 1:
        gain = cost[:-1] + cost[1:] - joint
        i = gain.argmax()
        if gain[i] <= 0 and rows.size <= most:
            break
        counts[rows[i]] += counts[rows[i + 1]]
        cost[i] = joint[i]
        rows, cost, joint = np.delete(rows, i + 1), np.delete(cost, i + 1), np.delete(joint, i)
        if i < joint.size:
            joint[i] = context_cost(counts[rows[i]], counts[rows[i + 1]])
        if i > 0:
            joint[i - 1] = context_cost(counts[rows[i - 1]], counts[rows[i]])
    return rows, cost.sum()


@njit(nogil=True, cache=True)
def encode_tokens(tokens, base, shift, row, frequency, start, words, states):
    """Code the tokens, last to first. Returns p: words[p:] is the stream; states holds what the decoder starts from.

    tokens [n] uint8, base [n] uint16|uint32; frequency, start (its first slot) of each token in each context
    [contexts * 256] int32; row [exponents] uint32: 256 * its context; words [n + 1] uint16, written from the end:
    a weight sends at most one, which is put in place before it is known to be needed; states [LANES] uint32, written.
    """
    mask = row.size - 1
    p = words.size
    x = np.full(LANES, LOWEST_STATE, np.int64)
    for i in range(tokens.size - 1, -1, -1):
        place = row[(base[i] >> shift) & mask] + tokens[i]
        own = frequency[place]
        state = x[i % LANES]
        full = state >= own << (32 - SLOT_BITS)
        words[p - 1] = state
        p -= full
        state = state >> 16 if full else state
        # exact: fp64 holds both, and a quotient that is no integer lies 1 / 4096 or more below the next one
        quotient = int(state / own)
        x[i % LANES] = state + quotient * (SLOTS - own) + start[place]
    states[:] = x
    return p


@njit(nogil=True, cache=True)
def fill_slots(frequency, slots):
    """Write for each slot of each context: token << 24 | (its frequency - 1) << 12 | slots since the token's first.

    frequency [contexts, 256] int32, each row of sum 4096; slots [contexts * 4096] uint32.
    """
    slot = 0
    for row in range(frequency.shape[0]):
        for token in range(TOKENS):
            for since in range(frequency[row, token]):
                slots[slot] = token << 24 | (frequency[row, token] - 1) << 12 | since
                slot += 1


@njit(nogil=True, cache=True)
def decode_tokens(words, states, slots, row, base, shift, tokens):
    """Decode tokens.size tokens; states go from the encoder's last to, in a sound stream, LOWEST_STATE.

    words [w + 1] uint16: the stream and one spare, so that a word can be read before it is known to be needed;
    states [LANES] uint32; slots [contexts * 4096] uint32 of fill_slots; row [exponents] uint32: 4096 * its context;
    base [n] uint16|uint32; tokens [n] uint8, written. Returns the number of words used, or -1 if there are too few.
    """
    mask = row.size - 1
    p = 0
    x = states.astype(np.int64)
    for i in range(tokens.size):
        if p >= words.size:
            return -1
        state = x[i % LANES]
        slot = slots[row[(base[i] >> shift) & mask] + (state & (SLOTS - 1))]
        tokens[i] = slot >> 24
        state = ((slot >> 12 & 0xFFF) + 1) * (state >> SLOT_BITS) + (slot & 0xFFF)
        short = state < LOWEST_STATE
        word = words[p]
        x[i % LANES] = state << 16 | word if short else state
        p += short
    states[:] = x
    return p


@njit(nogil=True, cache=True)
def pack_raw_bits(values, tokens, raw_bits, packed):
    """Append the low raw_bits[token] bits of each value, lowest bit first. Returns the number of bits.

    values [n] uint16|uint32, tokens [n] uint8, raw_bits [256] int64 (below 32); packed uint32, written: bits / 32 + 1.
    """
    pending, filled, word = 0, 0, 0
    for i in range(tokens.size):
        bits = raw_bits[tokens[i]]
        pending |= (values[i] & ((1 << bits) - 1)) << filled
        filled += bits
        if filled >= 32:
            packed[word] = pending
            word += 1
            pending >>= 32
            filled -= 32
    packed[word] = pending
    return 32 * word + filled


@njit(nogil=True, cache=True)
def expand(tokens, first_value, raw_bits, pairs, base, sign_bit, expert):
    """Write the weights: value = first_value[token] + raw bits, the inverse of zigzag_difference applied to it.

    tokens [n] uint8; first_value, raw_bits (below 32) [256] int64; base, expert [n] uint16|uint32; pairs int64: at k
    words k and k + 1 of the w uint32 words of raw bits, then BLOCK + 1 spare ones, so that a whole block can be read
    before the end is looked for. Returns the number of raw bits used, or -1 if there are too few.
    """
    magnitude = (1 << sign_bit) - 1
    end = 32 * (pairs.size - BLOCK - 1)
    position = 0
    values = np.empty(BLOCK, np.int64)
    for first in range(0, tokens.size, BLOCK):
        t, b, e = tokens[first : first + BLOCK], base[first : first + BLOCK], expert[first : first + BLOCK]
        for i in range(t.size):
            bits = raw_bits[t[i]]
            values[i] = first_value[t[i]] + (pairs[position >> 5] >> (position & 31) & ((1 << bits) - 1))
            position += bits
        if position > end:
            return -1
        for i in range(t.size):
            there = b[i] ^ ((b[i] >> sign_bit) * magnitude)
            here = (there + (values[i] >> 1 ^ -(values[i] & 1))) & (2 * magnitude + 1)
            e[i] = here ^ ((here >> sign_bit) * magnitude)
    return position
