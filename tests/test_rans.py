"""Exact chunks: bit for bit, also by a second decoder written from the format's text; damage; size; speed."""

import hashlib
import math
import time

import ders_kernels.exact_format as exact_format
import numpy as np
import pytest
from ders_kernels.cpu_ops import rans
from ders_kernels.exact_format import DIFFERENCE, NO_BASE, STORED, CorruptStream, decode_chunk, encode_chunk

BF16, F16, F32 = (np.uint16, 7), (np.uint16, 10), (np.uint32, 23)
DTYPES = pytest.mark.parametrize(("dtype", "shift"), [BF16, F16, F32], ids=["bf16", "f16", "f32"])
SIZES = [1, 2, 3, 5, 8, 61, 1024, 4097]


def reference_decode(data, base, shift):
    """Weights of a chunk, one after the other in plain integers: the docstring of exact_format.py, nothing else."""
    width, weights, position = 8 * base.dtype.itemsize, base.tolist(), 0
    exponents = 1 << (width - 1 - shift)

    def take(size):
        nonlocal position
        position += size
        return int.from_bytes(data[position - size : position], "little")

    mode = take(1)
    if mode == 0:
        return [take(width // 8) for _ in weights]
    heads, tables = [], []
    for _ in range(take(1)):
        heads.append(take(1))
        table, first, last = [], take(1), take(1)
        for token in range(first, last + 1):
            f = take(1)
            f = f if f < 128 else 256 * (f - 128) + take(1)
            table += [(token, f, slot) for slot in range(f)]
        tables.append(table)
    context = [sum(head <= exponent for head in heads) - 1 for exponent in range(exponents)]
    x = [take(4) for _ in range(8)]
    words = iter([take(2) for _ in range(take(4))])

    tokens = []
    for i, b in enumerate(weights):
        token, f, slot = tables[context[(b >> shift) % exponents]][x[i % 8] % 4096]
        tokens.append(token)
        x[i % 8] = f * (x[i % 8] // 4096) + slot
        if x[i % 8] < 65536:
            x[i % 8] = 65536 * x[i % 8] + next(words)
    assert x == [65536] * 8
    assert next(words, None) is None

    position *= 8

    def take_raw(bits):
        nonlocal position
        five_bytes = int.from_bytes(data[position // 8 : position // 8 + 5], "little")
        position += bits
        return (five_bytes >> (position - bits) % 8) % (1 << bits)

    def key(b):
        return b if b < 1 << (width - 1) else -(b - (1 << (width - 1))) - 1

    expert = []
    for token, b in zip(tokens, weights, strict=True):
        if mode == 2:
            value, origin = token << (shift + 1) | take_raw(shift + 1), 0
        elif token < 16:
            value, origin = token, key(b)
        else:
            n, top = 5 + (token - 16) // 4, 4 + token % 4
            value, origin = top << (n - 3) | take_raw(n - 3), key(b)
        difference = value // 2 if value % 2 == 0 else -(value + 1) // 2
        pattern = (origin + difference) % (1 << width)
        expert.append(pattern if pattern < 1 << (width - 1) else (1 << width) + (1 << (width - 1)) - 1 - pattern)
    assert len(data) == math.ceil(position / 8)
    assert take_raw(-position % 8) == 0
    return expert


def patterns(numbers, dtype, shift):
    """fp64 numbers as bit patterns of BF16 (cut off), F16 or F32."""
    if (dtype, shift) == F16:
        return numbers.astype(np.float16).view(np.uint16)
    wide = numbers.astype(np.float32).view(np.uint32)
    return (wide >> 16).astype(np.uint16) if dtype is np.uint16 else wide


def pair(kind, n, dtype, shift):
    """(expert, base) patterns [n]."""
    draw = np.random.default_rng(n)
    bits = draw.integers(0, 1 << 8 * np.dtype(dtype).itemsize, (2, n), dtype=dtype)
    base = draw.standard_normal(n) * 0.02
    step = draw.standard_normal(n) * (draw.random(n) < 0.5) * {"tuned": 5e-5, "far": 2e-3}.get(kind, 0)
    if kind == "bits":
        return bits[0], bits[1]
    expert = draw.permutation(base) if kind == "other" else base + step
    return patterns(expert, dtype, shift), patterns(base, dtype, shift)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["equal", "tuned", "far", "other", "bits"])
@DTYPES
def test_two_decoders_give_back_the_expert(kind, n, dtype, shift):
    expert, base = pair(kind, n, dtype, shift)
    chunk = encode_chunk(expert, base, shift)
    decoded = decode_chunk(np.frombuffer(chunk, np.uint8), base, shift)
    assert decoded.dtype == dtype
    assert decoded.tolist() == expert.tolist()
    assert reference_decode(chunk, base, shift) == expert.tolist()
    assert len(chunk) <= 1 + expert.nbytes
    if n >= 1024:
        assert chunk[0] == {"other": NO_BASE, "bits": STORED}.get(kind, DIFFERENCE)


@pytest.mark.parametrize("start", [0x0000, 0x8000, 0x0001, 0x3F80, 0xBF80, 0x7F80, 0x7FFF, 0xFFFF, None])
@pytest.mark.parametrize("shift", [7, 10])
def test_every_pattern_against_a_base(start, shift):
    """NaN payloads, infinities, both zeros, subnormals; equal weights beside them keep the chunk from being stored."""
    every = np.arange(1 << 16, dtype=np.uint16)
    mixed = (every * 40503 + 12345).astype(np.uint16)
    base = np.concatenate([mixed if start is None else np.full_like(every, start), every, every])
    expert = np.concatenate([every, every, every])
    chunk = encode_chunk(expert, base, shift)
    assert chunk[0] == DIFFERENCE
    assert (decode_chunk(chunk, base, shift) == expert).all()
    if start is None:
        assert reference_decode(chunk, base, shift) == expert.tolist()


def test_zeros_and_nans_of_fp32():
    odd = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0xFFFFFFFF, 1], np.uint32)
    base = np.concatenate([np.repeat(odd, 9), np.tile(odd, 40)])
    expert = np.concatenate([np.tile(odd, 9), np.tile(odd, 40)])
    chunk = encode_chunk(expert, base, 23)
    assert chunk[0] == DIFFERENCE
    assert (decode_chunk(chunk, base, 23) == expert).all()
    assert reference_decode(chunk, base, 23) == expert.tolist()


def test_one_exponent_and_every_exponent():
    """One context of one token: no words at all; and all 256 exponents, each with statistics of its own."""
    same = np.full(1000, 0xFFFF, np.uint16)
    assert len(encode_chunk(same, same, 7)) == 1 + 1 + 3 + 2 + 32 + 4
    base = np.repeat(np.arange(256, dtype=np.uint16) << 7, 200)
    spread = np.arange(base.size, dtype=np.uint16) * 40503 >> np.repeat(np.arange(256) % 13 + 4, 200).astype(np.uint16)
    expert = base ^ spread
    chunk = encode_chunk(expert, base, 7)
    assert chunk[:2] == bytes((DIFFERENCE, 32))
    assert (decode_chunk(chunk, base, 7) == expert).all()
    assert reference_decode(chunk, base, 7) == expert.tolist()


def golden_pair(n):
    """(expert, base) BF16 [n] made of integers only, so that any machine and any numpy makes the same."""
    i = np.arange(n, dtype=np.uint64)
    noise = (i * i * 2654435761 >> 7) % 1009
    base = (0x3A00 + noise * 3 % 1500 + (noise % 2 << 15)).astype(np.uint16)
    step = np.where(noise % 4 == 1, i % 61 >> (base >> 7 & 7), 0).astype(np.uint16)
    return base + step, base


GOLDEN_61 = bytes.fromhex(
    "01010000158de7810d0043000000000043000000000000000000430043d1e95e081f060300bc"
    "e0a2001f060300fd666f086fa10200bd39540781602300000000000f"
)
GOLDEN = {
    "bf16": "5015351d0d386647",
    "f16": "26b5fae63812bff5",
    "f32": "c24ab59eccaaab5d",
    "no base": "c5b3a0c4704ede01",
}


def test_golden_bytes():
    expert, base = golden_pair(61)
    assert encode_chunk(expert, base, 7) == GOLDEN_61
    assert (decode_chunk(GOLDEN_61, base, 7) == expert).all()
    expert, base = golden_pair(50_000)
    wide = (expert.astype(np.uint32) << 16 | expert, base.astype(np.uint32) << 16 | base)
    chunks = {
        "bf16": encode_chunk(expert, base, 7),
        "f16": encode_chunk(expert, base, 10),
        "f32": encode_chunk(*wide, 23),
        "no base": encode_chunk(expert[::-1], base, 7),
    }
    assert [chunk[0] for chunk in chunks.values()] == [DIFFERENCE] * 3 + [NO_BASE]
    assert {name: hashlib.sha256(chunk).hexdigest()[:16] for name, chunk in chunks.items()} == GOLDEN


def test_same_input_same_bytes():
    expert, base = pair("tuned", 20_000, *BF16)
    chunk = encode_chunk(expert, base, 7)
    strided, readonly = np.repeat(expert, 2)[::2], base.copy()
    readonly.flags.writeable = False
    assert encode_chunk(strided, readonly, 7) == chunk
    assert (decode_chunk(bytearray(chunk), readonly, 7) == expert).all()


def small_chunk(kind):
    """(chunk, base) of BF16; few weights, but enough to pay for what the kind is about: two tables, or one."""
    if kind == "other":
        expert, base = pair(kind, 400, *BF16)
        base, expert = base & 0x80FF | 0x3C00, expert & 0x80FF | 0x3C00
    elif kind == "tuned":
        expert, base = pair(kind, 1500, *BF16)
    else:
        expert, base = pair(kind, 100, *BF16)
    return encode_chunk(expert, base, 7), base


def decode_or_refuse(data, base):
    """True if the bytes were refused; whatever is decoded has the right shape."""
    try:
        decoded = decode_chunk(data, base, 7)
    except CorruptStream:
        return True
    assert decoded.shape == base.shape
    assert decoded.dtype == base.dtype
    return False


@pytest.mark.parametrize(("kind", "mode"), [("tuned", DIFFERENCE), ("other", NO_BASE), ("bits", STORED)])
def test_damaged_chunks_are_refused_or_decoded_never_more(kind, mode):
    chunk, base = small_chunk(kind)
    assert chunk[0] == mode
    assert mode != DIFFERENCE or chunk[1] > 1
    refused = 0
    for bit in range(8 * len(chunk)):
        damaged = bytearray(chunk)
        damaged[bit // 8] ^= 1 << bit % 8
        refused += decode_or_refuse(damaged, base)
    if mode == DIFFERENCE:
        assert refused > 0.8 * 8 * len(chunk)  # all but raw bits
    for size in range(len(chunk)):
        assert decode_or_refuse(chunk[:size], base)
    assert decode_or_refuse(chunk + b"\0", base)
    for other in (base[:-1], np.append(base, base[:1])):
        assert decode_or_refuse(chunk, other)


@pytest.mark.parametrize("kind", ["tuned", "other"])
def test_damage_stays_within_bounds(kind, monkeypatch):
    """The same kernels as plain Python, where numpy checks every index."""
    for name in ("fill_slots", "decode_tokens", "expand"):
        monkeypatch.setattr(exact_format, name, getattr(exact_format, name).py_func)
    monkeypatch.setattr(rans, "pop", rans.pop.py_func)
    chunk, base = small_chunk(kind)
    assert not decode_or_refuse(chunk, base)
    for place in range(1, len(chunk), 5):
        damaged = bytearray(chunk)
        damaged[place] ^= 1 << place % 8
        decode_or_refuse(damaged, base)
        decode_or_refuse(chunk[:place], base)


def test_garbage_is_refused():
    draw = np.random.default_rng(0)
    base = np.zeros(50, np.uint16)
    for _ in range(2000):
        garbage = draw.integers(0, 256, draw.integers(0, 99), dtype=np.uint8)
        garbage[:2] = garbage[:2] % 4
        assert decode_or_refuse(garbage, base)


def table(first, last, *frequencies, head=0):
    return bytes((head, first, last)) + b"".join(bytes((128 + f // 256, f % 256)) for f in frequencies)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "mode"),
        (b"\3", "found 3"),
        (b"\0" * 9, "expected 18 bytes of stored weights, found 8"),
        (b"\1\0", "1 to 32 contexts, found 0"),
        (b"\1\x21", "found 33"),
        (b"\1\1" + table(0, 0, 4096, head=1), "first exponent 1 out of order"),
        (b"\1\2" + table(0, 0, 4096) * 2, "first exponent 0 out of order"),
        (b"\1\1" + table(3, 2), "found 3 to 2"),
        (b"\1\1" + table(64, 64, 4096), "tokens below 64"),
        (b"\1\1" + table(0, 1, 4000, 97), "sum to 4097"),
        (b"\1\1" + table(0, 1, 4000, 95), "sum to 4095"),
        (b"\1\1" + table(0, 0, 4096) + b"\0" * 31, "states: expected 32 bytes, found 31"),
        (b"\1\1" + table(0, 0, 4096) + b"\0" * 32 + b"\xff" * 4, "words: expected 8589934590 bytes, found 0"),
        (b"\1\1" + table(0, 0, 4096) + b"\0\0\1\0" * 8 + b"\1\0\0\0ab", "1 words"),
        (b"\1\1" + table(0, 0, 4096) + b"\0\0\1\0" * 8 + b"\0\0\0\0a", "1 bytes of raw bits"),
        (b"\1\1" + table(63, 63, 4096) + b"\0\0\1\0" * 8 + b"\0\0\0\0", "0 bytes of raw bits .* more"),
        (b"\2\1" + table(0, 0, 4096) + b"\0\0\1\0" * 8 + b"\0" * 4 + b"\0" * 10, "10 bytes of raw bits .* 72 bits"),
        # nine values of two bits each, then a bit too many
        (b"\1\1" + table(16, 16, 4096) + b"\0\0\1\0" * 8 + b"\0" * 4 + b"\0\0\4", "3 bytes of raw bits .* 18 bits"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(CorruptStream, match=reason):
        decode_chunk(data, np.zeros(9, np.uint16), 7)


def test_arrays_of_another_kind_are_refused():
    good = np.zeros(8, np.uint16)
    for bad in (good.astype(np.int16), good.astype(np.uint64), good.reshape(2, 4), good[:0]):
        with pytest.raises(ValueError, match="expected patterns"):
            encode_chunk(bad, bad, 7)
        with pytest.raises(ValueError, match="expected patterns"):
            decode_chunk(b"\0", bad, 7)
    with pytest.raises(ValueError, match="mantissas of 23 bits"):
        encode_chunk(good, good, 23)
    with pytest.raises(ValueError, match="an expert like its base"):
        encode_chunk(good[:7], good, 7)


def entropy(counts):
    """Bits in all of symbols with these counts."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def test_size_is_the_entropy_given_the_exponent():
    expert, base = pair("tuned", 1 << 19, *BF16)
    difference = expert.astype(np.int64) - base  # no sign changes among neighbours worth counting
    exponent = (base >> 7) & 255
    ideal = sum(entropy(np.unique(difference[exponent == e], return_counts=True)[1]) for e in np.unique(exponent))
    bits = 8 * len(encode_chunk(expert, base, 7))
    # tables are 0.7 % of so small a chunk; and the ideal knows how often each rare difference comes
    assert 0.99 * ideal < bits < 1.02 * ideal
    assert bits < 0.9 * entropy(np.unique(difference, return_counts=True)[1])


def test_without_likeness_exponents_still_pay():
    expert, base = pair("other", 1 << 18, *BF16)
    exponents = entropy(np.unique((expert >> 7) & 255, return_counts=True)[1])
    bits = 8 * len(encode_chunk(expert, base, 7))
    assert exponents + 8 * expert.size <= bits < 1.001 * (exponents + 8 * expert.size)


def test_speed():
    """A quarter of what one core of a Zen4 server does: a lost optimisation shows, a busy machine does not."""
    expert, base = pair("tuned", 1 << 19, *BF16)
    chunk = encode_chunk(expert, base, 7)
    seconds = {}
    for name, call in {
        "encode": lambda: encode_chunk(expert, base, 7),
        "decode": lambda: decode_chunk(chunk, base, 7),
    }.items():
        call()
        seconds[name] = min(measure(call) for _ in range(5))
    assert expert.nbytes / seconds["decode"] > 150e6
    assert expert.nbytes / seconds["encode"] > 110e6


def measure(call):
    begin = time.thread_time()
    call()
    return time.thread_time() - begin
