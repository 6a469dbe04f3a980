"""The loops of the exact format: differences, tokens, their counts, rANS, raw bits. exact_format.py tells what for.

rANS (Duda, arXiv:1311.2540; interleaved: Giesen, arXiv:1402.3392) keeps an integer x in [2^16, 2^32). A token that
owns f of the 2^12 slots, from slot s on, is coded by   x -> (x // f) * 2^12 + x % f + s   and costs 12 - log2(f) bits.
Before a step that would push x over 2^32, its low 16 bits leave as one word. A decoder undoes the steps in reverse,
so the encoder walks the weights backwards and fills the words from the end. Weight i belongs to state i % LANES:
eight independent states hide the latency of a table read and a multiplication.

All arithmetic is int64: numba turns a mixture with uint64 into floats. A store cuts it to the width of the array.
ns per weight on one core of a Zen 5 server at 4.2 GHz, bf16, experts that resemble their base: zigzag_difference 0.18,
tokenise 0.1, count_symbols 0.45, merge_exponents 0.14, encode_symbols 1.3, pack_raw_bits 0.25; decode_tokens 1.9,
expand 0.35. Where bits decide what is done next, both ways are computed: a branch that cannot be foreseen costs more.
"""

import numpy as np

from ..jit import njit

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
def count_symbols(tokens, base, shift, symbols, counts):
    """Write each weight's symbol, 256 * the exponent of its base + its token, and add 1 to its count.

    tokens [n] uint8, base [n] uint16|uint32, symbols [n] uint16, written; counts [2, exponents * 256] uint32: their sum
    counts. Neighbours are often equal, and adding to what was just written waits for the write: so they take turns.
    """
    mask = counts.shape[1] // TOKENS - 1
    even, odd = counts[0], counts[1]
    for first in range(0, tokens.size, BLOCK):
        t, b, s = tokens[first : first + BLOCK], base[first : first + BLOCK], symbols[first : first + BLOCK]
        for i in range(t.size):
            s[i] = ((b[i] >> shift) & mask) << 8 | t[i]
        for i in range(0, t.size - 1, 2):
            even[s[i]] += np.uint32(1)
            odd[s[i + 1]] += np.uint32(1)
        if t.size & 1:
            even[s[t.size - 1]] += np.uint32(1)


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


@njit(inline="always")
def push(state, here, inverse):
    """One step of a coder: its state and the symbol's code and inverse -> whether the low word leaves, the next state."""
    own = here >> SLOT_BITS
    full = state >> (32 - SLOT_BITS) >= own
    state = state >> 16 if full else state
    # exact: below 2^20, and never too low; a quotient that is no integer lies 1 / 4096 or more below the next one
    quotient = np.int64(state * inverse)
    return full, state + quotient * (SLOTS - own) + (here & (SLOTS - 1))


@njit(nogil=True, cache=True)
def encode_symbols(symbols, code, inverse, words, states):
    """Code the symbols, last to first. Returns p: words[p:] is the stream; states holds what the decoder starts from.

    symbols [n] uint16; by symbol: code uint32, its token's frequency << 12 | first slot in the context of its exponent,
    and inverse fp64, (1 + 2^-50) / frequency; words [n + LANES] uint16, written from the end: a weight sends at most
    one, which is put in place before it is known to be needed; states [LANES] uint32, written.
    """
    p, whole = words.size, symbols.size // LANES * LANES
    x = np.full(LANES, LOWEST_STATE, np.int64)
    for i in range(symbols.size - 1, whole - 1, -1):
        words[p - 1] = x[i - whole]
        full, x[i - whole] = push(x[i - whole], np.int64(code[symbols[i]]), inverse[symbols[i]])
        p -= full
    for first in range(whole - LANES, -1, -LANES):
        s, w = symbols[first : first + LANES], words[p - LANES : p]
        free = np.uint64(LANES)  # unsigned: else numba looks at each place whether it counts from the end
        for back in range(LANES):
            lane = np.uint64(LANES - 1 - back)
            w[free - np.uint64(1)] = x[lane]
            full, x[lane] = push(x[lane], np.int64(code[s[lane]]), inverse[s[lane]])
            free -= np.uint64(full)
        p -= LANES - np.int64(free)
    states[:] = x
    return p


@njit(nogil=True, cache=True)
def fill_slots(frequency, owner, code):
    """Write for each slot of each context its token, and for each token its frequency << 12 | its first slot.

    frequency [contexts, 256] int32, each row of sum 4096; owner [contexts * 4096] uint8; code [contexts * 256] uint32.
    """
    for row in range(frequency.shape[0]):
        slot = 0
        for token in range(TOKENS):
            code[row * TOKENS + token] = frequency[row, token] << SLOT_BITS | slot
            for _ in range(frequency[row, token]):
                owner[row * SLOTS + slot] = token
                slot += 1


@njit(inline="always")
def pop(state, row, owner, code, words, p):
    """One step of a decoder: a state, 256 * the context, the tables of fill_slots -> token, next state, next p."""
    slot = state & (SLOTS - 1)
    token = owner[(np.uint64(row) << np.uint64(SLOT_BITS - 8)) + np.uint64(slot)]
    own = np.int64(code[np.uint64(row) + np.uint64(token)])
    state = (own >> SLOT_BITS) * (state >> SLOT_BITS) + (slot - (own & (SLOTS - 1)))
    short = state < LOWEST_STATE
    word = np.int64(words[p])
    return token, (state << 16 | word if short else state), p + np.uint64(short)


@njit(nogil=True, cache=True)
def decode_tokens(words, states, owner, code, row, base, shift, tokens):
    """Decode tokens.size tokens; states go from the encoder's last to, in a sound stream, LOWEST_STATE.

    words [w + LANES] uint16: the stream and spare ones, so that words can be read before they are known to be needed;
    states [LANES] uint32; owner, code of fill_slots; row [exponents] uint32: 256 * its context; base [n] uint16|uint32;
    tokens [n] uint8, written. Returns the number of words used, more than w or -1 if there are too few.
    """
    mask, p = np.uint64(row.size - 1), np.uint64(0)  # unsigned: else numba looks at each place whether it is negative
    whole = tokens.size // LANES * LANES
    # eight variables, not an array: a tenth faster, because they stay in registers
    x = states.astype(np.int64)
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for first in range(0, whole, LANES):
        if np.int64(p) + LANES > words.size:
            return -1
        b, t = base[first : first + LANES], tokens[first : first + LANES]
        t[0], x0, p = pop(x0, row[np.uint64(b[0] >> shift) & mask], owner, code, words, p)
        t[1], x1, p = pop(x1, row[np.uint64(b[1] >> shift) & mask], owner, code, words, p)
        t[2], x2, p = pop(x2, row[np.uint64(b[2] >> shift) & mask], owner, code, words, p)
        t[3], x3, p = pop(x3, row[np.uint64(b[3] >> shift) & mask], owner, code, words, p)
        t[4], x4, p = pop(x4, row[np.uint64(b[4] >> shift) & mask], owner, code, words, p)
        t[5], x5, p = pop(x5, row[np.uint64(b[5] >> shift) & mask], owner, code, words, p)
        t[6], x6, p = pop(x6, row[np.uint64(b[6] >> shift) & mask], owner, code, words, p)
        t[7], x7, p = pop(x7, row[np.uint64(b[7] >> shift) & mask], owner, code, words, p)
    states[:] = np.array((x0, x1, x2, x3, x4, x5, x6, x7))
    if np.int64(p) + LANES > words.size:
        return -1
    for i in range(whole, tokens.size):
        here = row[np.uint64(base[i] >> shift) & mask]
        tokens[i], states[i - whole], p = pop(np.int64(states[i - whole]), here, owner, code, words, p)
    return np.int64(p)


@njit(nogil=True, cache=True)
def list_raw(tokens, direct, listed):
    """Write the places of tokens that are `direct` (DIRECT, or 0: all) or more, ascending; returns their number.

    tokens [n] uint8, listed [2 * BLOCK] uint16, n <= BLOCK: the places, and behind them the groups of eight that hold
    any. Experts that resemble their base have raw bits in a fiftieth of their weights, in a sixth of the groups: to
    find these is cheaper than to treat all weights alike.
    """
    eights = tokens[: tokens.size // 8 * 8].view(np.uint64)
    mask, least = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(1 if direct else 0)
    groups = listed[BLOCK:]
    held = np.uint64(0)
    for group in range(eights.size):
        groups[held] = group
        held += np.uint64((eights[group] & mask) >= least)
    number = np.uint64(0)
    for group in groups[: np.int64(held)]:
        first = 8 * np.int64(group)
        t = tokens[first : first + 8]
        for i in range(8):
            listed[number] = first + i
            number += np.uint64(t[i] >= direct)
    for i in range(8 * eights.size, tokens.size):
        listed[number] = i
        number += np.uint64(tokens[i] >= direct)
    return np.int64(number)


@njit(nogil=True, cache=True)
def pack_raw_bits(values, tokens, direct, raw_bits, packed):
    """Append the low raw_bits[token] bits of each value, lowest bit first. Returns the number of bits.

    values [n] uint16|uint32, tokens [n] uint8, those below `direct` (DIRECT or 0) have no raw bits; raw_bits [256] int64
    (below 32); packed uint32, written: bits / 32 + 1.
    """
    pending, filled, word = 0, 0, 0
    listed = np.empty(2 * BLOCK, np.uint16)
    for first in range(0, tokens.size, BLOCK):
        v, t = values[first : first + BLOCK], tokens[first : first + BLOCK]
        for i in listed[: list_raw(t, direct, listed)]:
            bits = raw_bits[t[i]]
            pending |= (v[i] & ((1 << bits) - 1)) << filled
            filled += bits
            if filled >= 32:
                packed[word] = pending
                word += 1
                pending >>= 32
                filled -= 32
    packed[word] = pending
    return 32 * word + filled


@njit(nogil=True, cache=True)
def expand(tokens, direct, first_value, raw_bits, pairs, base, sign_bit, expert):
    """Write the weights: value = first_value[token] + raw bits, the inverse of zigzag_difference applied to it.

    tokens [n] uint8, those below `direct` (DIRECT or 0) are their own values; first_value, raw_bits (below 32) [256]
    int64; base, expert [n] uint16|uint32; pairs int64: at k words k and k + 1 of the w uint32 words of raw bits, then
    BLOCK + 1 spare ones, so that a whole block can be read before the end is looked for. Returns the number of raw bits
    used, or -1 if there are too few.
    """
    magnitude = (1 << sign_bit) - 1
    end = 32 * (pairs.size - BLOCK - 1)
    position = 0
    listed = np.empty(2 * BLOCK, np.uint16)
    for first in range(0, tokens.size, BLOCK):
        t, b, e = tokens[first : first + BLOCK], base[first : first + BLOCK], expert[first : first + BLOCK]
        for i in range(t.size):
            e[i] = t[i]
        for i in listed[: list_raw(t, direct, listed)]:
            bits = raw_bits[t[i]]
            e[i] = first_value[t[i]] + (pairs[position >> 5] >> (position & 31) & ((1 << bits) - 1))
            position += bits
        if position > end:
            return -1
        for i in range(t.size):
            there = b[i] ^ ((b[i] >> sign_bit) * magnitude)
            here = (there + (e[i] >> 1 ^ -(e[i] & 1))) & (2 * magnitude + 1)
            e[i] = here ^ ((here >> sign_bit) * magnitude)
    return position
