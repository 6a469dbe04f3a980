"""Exact experts: a chunk of weights stored bit for bit as its difference from the base, about 1.5 bits per weight.

Fine-tuning in bf16 leaves most weights where the base has them and moves the rest by a few steps of the number format.
An optimiser's steps are about equally large everywhere, so *counted in steps of the format* they halve with each
exponent of the base weight. Hence: count the difference in steps, and code it in the context of the base's exponent.

    key(b)   = b if the sign bit of the pattern b is 0, else b with all other bits flipped; read as a signed integer.
               A bijection that keeps order: -0 is -1, +0 is 0, NaN payloads are integers too. No value needs an escape.
    d        = key(expert) - key(base), wrapped to a signed number of 16 (32) bits
    value    = zigzag(d) = 2d for d >= 0, -2d - 1 for d < 0
    token    = value for value < 16, else 16 + 4 * (m - 5) + the two bits under the leading one; m = bit length of value
    raw bits = the other m - 3 bits of a value >= 16, as they are
    context  = by the exponent field of the base weight: neighbouring exponents share a table of token frequencies

Tokens are rANS-coded (cpu_ops/rans.py) with 12-bit frequencies. The same machinery without a base serves for experts
that do not resemble it: there value = zigzag(key(expert)), which is the pattern rotated left by one bit, and the
token is the expert's exponent field (contexts remain, but mostly one is enough). What does not get smaller is stored.

**Bytes of a chunk of n weights.** Integers are little-endian; s is the width of the mantissa field and e that of the
exponent field: BF16 s = 7, e = 8; F16 s = 10, e = 5; F32 s = 23, e = 8. n, s, e and the base come from outside.

    u8   mode: 0 stored, 1 difference, 2 no base
    mode 0: n patterns, u16 (u32 for F32). The end.
    u8   K: contexts, 1..32; then K times, by ascending exponent:
        u8   the first exponent of the context; 0 in the first. It reaches to the next one's first exponent
        u8   first token, u8 last token of the table (below 64; F32 128; mode 2: below 2^e)
        for each of these tokens its frequency f: one byte f if f < 128, else two, 128 + f // 256 and f % 256
        the frequencies of a context sum to 4096; token t owns the slots [sum of f below t, + f(t))
    u32 x 8   rANS states
    u32  W; u16 x W   words
    u8 x rest   raw bits in weight order, each value's lowest bit first, from the lowest bit of a byte; the last byte
                is filled up with zeros. Mode 2: each value has s + 1 raw bits and is token << (s + 1) | raw bits

Decoding weight i = 0, 1, ... with x = states[i % 8] and the table of its context:
    t = the token that owns slot x % 4096;  x = f(t) * (x // 4096) + x % 4096 - (first slot of t)
    if x < 65536: x = x * 65536 + the next word
At the end each state is 65536, the words are used up, and so are the raw bits but for zeros in the last byte. Eight
consecutive weights can be decoded at once: those of them that take a word take it in weight order.

**Cost.** Four experts fine-tuned from a 135M model take 1.44-1.53 bits per weight, 1 % above the entropy of the
difference given the exponent; 12 contexts and 430 bytes of tables, 0.3 %, are in that ([576, 1536] matrices). Unlike
weights take 10.55 bits in bf16, random bits 16 and one byte. One core of a Zen 5 server encodes 0.7 GB of bf16 experts
a second and decodes 0.8. Equal input gives equal bytes everywhere: all choices are made in integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .cpu_ops.rans import (
    BLOCK,
    DIRECT,
    LANES,
    LOWEST_STATE,
    SLOT_BITS,
    SLOTS,
    TOKENS,
    count_symbols,
    decode_tokens,
    encode_symbols,
    expand,
    fill_slots,
    merge_exponents,
    pack_raw_bits,
    tokenise,
    zigzag_difference,
)

STORED, DIFFERENCE, NO_BASE = 0, 1, 2
MAX_CONTEXTS = 32

Patterns = NDArray[np.uint16] | NDArray[np.uint32]
Bytes = NDArray[np.uint8]

# numba compiles anew for each memory layout, some seconds each: let there be one
LAYOUT = ("C_CONTIGUOUS", "ALIGNED", "WRITEABLE")


class CorruptStream(ValueError):
    """The bytes are no whole chunk of this format for so many weights of this dtype."""


@cache
def _token_values(mode: int, width: int, shift: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(smallest value of each token [256], raw bits of each token [256], number of tokens in use)."""
    tokens = np.arange(TOKENS, dtype=np.int64)
    if mode == NO_BASE:
        return tokens << (shift + 1), np.full(TOKENS, shift + 1), 1 << (width - 1 - shift)
    number = DIRECT + 4 * (width - 4)
    raw_bits = np.where((tokens >= DIRECT) & (tokens < number), 2 + (tokens - DIRECT) // 4, 0)
    return np.where(tokens < DIRECT, tokens, (4 + tokens % 4) << raw_bits), raw_bits, number


def _direct(mode: int) -> int:
    """Tokens below it are values: no raw bits."""
    return 0 if mode == NO_BASE else DIRECT


def _fields(base: Patterns, shift: int) -> tuple[int, int]:
    """(bits of a pattern, number of exponents), or ValueError if there can be no chunk of such arrays."""
    width = 8 * base.dtype.itemsize
    dtype_fits = base.dtype in (np.uint16, np.uint32) and width - 9 <= shift < width - 1
    if not dtype_fits or base.ndim != 1 or base.size == 0:
        raise ValueError(
            f"expected patterns [n] uint16 or uint32, n >= 1, of at most 8 exponent bits; found {base.dtype} "
            f"{base.shape} with mantissas of {shift} bits"
        )
    return width, 1 << (width - 1 - shift)


@dataclass(frozen=True)
class _Model:
    """One way to code a chunk: its values, tokens and symbols [n], the exponents there are, the contexts' first exponents
    [K] and token counts [K, 256].
    """

    mode: int
    values: Patterns
    tokens: Bytes
    symbols: NDArray[np.uint16]
    exponents: NDArray[np.int64]
    heads: list[int]
    counts: NDArray[np.int64]
    bits: int  # estimate: entropy, tables and raw bits


def _make_model(mode: int, expert: Patterns, base: Patterns, shift: int) -> _Model:
    """Tokens of the mode, and the contexts that suit them."""
    width, exponents = _fields(base, shift)
    values, tokens = np.empty_like(expert), np.empty(expert.size, np.uint8)
    if mode == DIFFERENCE:
        zigzag_difference(expert, base, width - 1, values)
        tokenise(values, tokens)
    else:
        zigzag_difference(expert, np.zeros_like(base), width - 1, values)
        tokens[:] = values >> (shift + 1)
    symbols, halves = np.empty(expert.size, np.uint16), np.zeros((2, exponents * TOKENS), np.uint32)
    count_symbols(tokens, base, shift, symbols, halves)
    counts = halves.sum(axis=0, dtype=np.int64).reshape(exponents, TOKENS)
    there = np.flatnonzero(counts.any(axis=1))
    raw_bits = int(counts.sum(axis=0) @ _token_values(mode, width, shift)[1])
    rows, cost = merge_exponents(counts, MAX_CONTEXTS)
    heads = [0, *rows[1:].tolist()]
    return _Model(mode, values, tokens, symbols, there, heads, counts[rows], raw_bits + (cost >> 16))


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Counts [K, 256] -> frequencies [K, 256] of sum 4096, at least 1 where a token occurs; the largest take the rounding."""
    total = counts.sum(axis=1, keepdims=True)
    frequencies = np.maximum((counts * SLOTS + total // 2) // total, counts > 0)
    for frequency in frequencies:
        while rest := SLOTS - int(frequency.sum()):
            largest = frequency.argmax()
            most = int(frequency[largest]) // 8 + 1
            frequency[largest] += min(max(rest, -most), most)
    return frequencies.astype(np.int32)


def _context_of(heads: Sequence[int], exponents: int) -> NDArray[np.uint32]:
    """The context of each exponent [exponents], from the contexts' first exponents, of which the first is 0."""
    return np.searchsorted(heads, np.arange(exponents), side="right").astype(np.uint32) - np.uint32(1)


def _table_bytes(head: int, frequency: NDArray[np.int32]) -> bytes:
    """A context as it stands in a chunk: its first exponent, its tokens, their frequencies (of [256])."""
    used = np.flatnonzero(frequency)
    table = bytearray((head, used[0], used[-1]))
    for f in frequency[used[0] : used[-1] + 1].tolist():
        table += bytes((f,)) if f < 128 else bytes((128 + f // 256, f % 256))
    return bytes(table)


def _coding_tables(
    frequency: NDArray[np.int32], there: NDArray[np.int64], context_of: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """`code` and `inverse` of encode_symbols [exponents * 256], of frequencies [K, 256]; only at exponents that occur."""
    start = np.cumsum(frequency, axis=1) - frequency
    code, inverse = np.empty((context_of.size, TOKENS), np.uint32), np.empty((context_of.size, TOKENS))
    contexts = context_of[there]
    code[there] = (frequency << SLOT_BITS | start)[contexts]
    inverse[there] = ((1 + 2.0**-50) / np.maximum(frequency, 1))[contexts]
    return code.ravel(), inverse.ravel()


def _encode_model(model: _Model, base: Patterns, shift: int) -> bytes:
    """The chunk, mode byte first."""
    width, exponents = _fields(base, shift)
    frequency = _frequencies(model.counts)
    code, inverse = _coding_tables(frequency, model.exponents, _context_of(model.heads, exponents))
    words, states = np.empty(base.size + LANES, np.uint16), np.empty(LANES, np.uint32)
    begin = encode_symbols(model.symbols, code, inverse, words, states)

    raw_bits = _token_values(model.mode, width, shift)[1]
    packed = np.empty(int(model.counts.sum(axis=0) @ raw_bits) // 32 + 1, np.uint32)
    packed_bits = pack_raw_bits(model.values, model.tokens, _direct(model.mode), raw_bits, packed)

    tables = [_table_bytes(head, table) for head, table in zip(model.heads, frequency, strict=True)]
    return b"".join(
        (
            bytes((model.mode, len(tables))),
            *tables,
            states.astype("<u4").tobytes(),
            (words.size - begin).to_bytes(4, "little"),
            words[begin:].astype("<u2").tobytes(),
            packed.astype("<u4").tobytes()[: -(-packed_bits // 8)],
        )
    )


def encode_chunk(expert: Patterns, base: Patterns, exponent_shift: int) -> bytes:
    """The bytes that decode_chunk turns back into `expert`, given the same base; at most one byte more than `expert`.

    expert, base [n] uint16 (BF16: shift 7, F16: shift 10) or uint32 (F32: shift 23) bit patterns, n >= 1. About 2^20
    weights make the tables' cost vanish and still fit a cache. Raises ValueError for other arrays.
    """
    width, _ = _fields(base, exponent_shift)
    expert, base = np.require(expert, requirements=LAYOUT), np.require(base, requirements=LAYOUT)
    if expert.dtype != base.dtype or expert.shape != base.shape:
        found = f"{expert.dtype} {expert.shape}"
        raise ValueError(f"expected an expert like its base, {base.dtype} {base.shape}; found {found}")
    model = _make_model(DIFFERENCE, expert, base, exponent_shift)
    # without a base, sign and mantissa are raw bits: it cannot win below that
    if model.bits > expert.size * (exponent_shift + 1):
        model = min(model, _make_model(NO_BASE, expert, base, exponent_shift), key=lambda model: model.bits)
    if model.bits < 8 * expert.nbytes:
        chunk = _encode_model(model, base, exponent_shift)
        if len(chunk) <= expert.nbytes:
            return chunk
    return bytes((STORED,)) + expert.astype(f"<u{width // 8}").tobytes()


def difference_tokens(width: int) -> NDArray[np.int64]:
    """Raw bits of each token that a difference of so many bits can have [tokens]."""
    _, raw_bits, number = _token_values(DIFFERENCE, width, 0)
    return raw_bits[:number]


def expected_bytes(differences: NDArray[np.int64], own: NDArray[np.int64], shift: int, width: int) -> int:
    """How long encode_chunk's answer will be, to some bytes in a thousand, from counts alone (cpu_ops/steps.py).

    differences [exponents, tokens]: weights by the exponent of their base and the token of their difference. own
    [exponents]: some of them by their own exponent, for the mode without a base, of which one context is expected; zeros
    where these were not counted. width: bits of a weight.
    """
    n = int(differences.sum())
    bits, size = _expected(DIFFERENCE, differences, shift, width)
    if bits > n * (shift + 1) and own.any():
        every = np.rint(own * (n / int(own.sum()))).astype(np.int64)
        bits, size = min((bits, size), _expected(NO_BASE, every[None], shift, width))
    stored = n * width // 8
    return size if bits < 8 * stored and size <= stored else stored + 1


def _expected(mode: int, counts: NDArray[np.int64], shift: int, width: int) -> tuple[int, int]:
    """(_Model.bits, bytes of the chunk), but for what the last words of the states and the roundings make of them."""
    merged = np.zeros((counts.shape[0], TOKENS), np.int64)
    merged[:, : counts.shape[1]] = counts
    raw_bits = int(merged.sum(axis=0) @ _token_values(mode, width, shift)[1])
    rows, cost = merge_exponents(merged, MAX_CONTEXTS)
    frequency = _frequencies(merged[rows])
    tables = sum(len(_table_bytes(0, table)) for table in frequency)
    coded = float((merged[rows] * (SLOT_BITS - np.log2(np.maximum(frequency, 1)))).sum())
    return raw_bits + (cost >> 16), 2 + tables + 4 * LANES + 4 + round(coded / 8) + -(-raw_bits // 8)


class _Reader:
    """Bytes taken from the front; CorruptStream where there are too few."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def take(self, count: int, what: str) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise CorruptStream(f"{what}: expected {count} bytes, found {len(taken)}; the chunk is cut short")
        self.position += count
        return taken

    def byte(self, what: str) -> int:
        """What take(1) holds; quicker, for there are hundreds."""
        if self.position >= len(self.data):
            self.take(1, what)
        self.position += 1
        return self.data[self.position - 1]

    def integers(self, count: int, dtype: str, what: str) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """[count] in the byte order of this machine."""
        found = np.frombuffer(self.take(count * np.dtype(dtype).itemsize, what), dtype)
        return found.astype(found.dtype.newbyteorder("="))

    def frequency(self) -> int:
        high = self.byte("frequency")
        return high if high < 128 else (high - 128) * 256 + self.byte("frequency")


def _read_tables(reader: _Reader, exponents: int, number: int) -> tuple[list[int], NDArray[np.int32]]:
    """(first exponent of each context, frequencies [K, 256])."""
    (contexts,) = reader.take(1, "number of contexts")
    if not 1 <= contexts <= MAX_CONTEXTS:
        raise CorruptStream(f"expected 1 to {MAX_CONTEXTS} contexts, found {contexts}")
    heads: list[int] = []
    frequency = np.zeros((contexts, TOKENS), np.int32)
    for row in frequency:
        head, first, last = reader.take(3, "table head")
        if not (heads[-1] < head < exponents if heads else head == 0):
            raise CorruptStream(f"context {len(heads)}: first exponent {head} out of order")
        if not first <= last < number:
            raise CorruptStream(f"context {len(heads)}: expected tokens below {number}, found {first} to {last}")
        heads.append(head)
        row[first : last + 1] = [reader.frequency() for _ in range(first, last + 1)]
        if row.sum() != SLOTS:
            raise CorruptStream(f"context {len(heads) - 1}: frequencies sum to {row.sum()}, expected {SLOTS}")
    return heads, frequency


def _decode_tokens(reader: _Reader, base: Patterns, shift: int, number: int) -> Bytes:
    """Tokens [n] uint8, from all that stands before the raw bits."""
    _, exponents = _fields(base, shift)
    heads, frequency = _read_tables(reader, exponents, number)
    owner, code = np.empty(len(heads) * SLOTS, np.uint8), np.empty(len(heads) * TOKENS, np.uint32)
    fill_slots(frequency, owner, code)
    row = _context_of(heads, exponents) * np.uint32(TOKENS)

    states = reader.integers(LANES, "<u4", "states")
    count = int.from_bytes(reader.take(4, "number of words"), "little")
    words = np.append(reader.integers(count, "<u2", "words"), np.zeros(LANES, np.uint16))
    tokens = np.empty(base.size, np.uint8)
    used = decode_tokens(words, states, owner, code, row, base, shift, tokens)
    if used != count or (states != LOWEST_STATE).any():
        raise CorruptStream(f"{count} words of tokens do not end as they should; damaged, or of another base")
    return tokens


def _decode_model(reader: _Reader, mode: int, base: Patterns, shift: int) -> Patterns:
    """Weights [n], from all that stands behind the mode byte."""
    width, _ = _fields(base, shift)
    first_value, raw_bits, number = _token_values(mode, width, shift)
    tokens = _decode_tokens(reader, base, shift, number)
    rest = reader.take(len(reader.data) - reader.position, "raw bits")
    words = np.frombuffer(rest + bytes(-len(rest) % 4 + 4 * (BLOCK + 2)), "<u4").astype(np.int64)
    expert = np.empty_like(base)
    reference = base if mode == DIFFERENCE else np.zeros_like(base)
    used = expand(
        tokens, _direct(mode), first_value, raw_bits, words[:-1] | words[1:] << 32, reference, width - 1, expert
    )
    if used < 0 or len(rest) != (used + 7) // 8 or (used % 8 and rest[-1] >> used % 8):
        wanted = "more" if used < 0 else f"{used} bits"
        raise CorruptStream(f"{len(rest)} bytes of raw bits where the tokens ask for {wanted}")
    return expert


def decode_chunk(data: Bytes | bytes, base: Patterns, exponent_shift: int) -> Patterns:
    """The expert's patterns [n], of base's dtype, from the bytes of encode_chunk and the same base and shift.

    Raises CorruptStream where the bytes are not a whole chunk, or where the tokens do not come out even, as damage to
    them makes them do. Raw and stored bits carry no check of their own: hash what must be known to be right.
    """
    width, _ = _fields(base, exponent_shift)
    base = np.require(base, requirements=LAYOUT)
    reader = _Reader(bytes(data))
    (mode,) = reader.take(1, "mode")
    if mode in (DIFFERENCE, NO_BASE):
        return _decode_model(reader, mode, base, exponent_shift)
    if mode != STORED:
        raise CorruptStream(f"expected mode 0, 1 or 2, found {mode}")
    if len(reader.data) != 1 + base.nbytes:
        raise CorruptStream(f"expected {base.nbytes} bytes of stored weights, found {len(reader.data) - 1}")
    return reader.integers(base.size, f"<u{width // 8}", "stored weights")
