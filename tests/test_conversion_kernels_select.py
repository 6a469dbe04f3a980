"""The kernels that go from stored bf16 patterns to a selective codec's parts and back, against the slow way: bit for bit.

The slow way is codecs.base.DeltaCodec's: subtract, encode, decode, add, each on whole fp32 blocks; and for what selects, below,
a sort. Shapes are awkward, and so are values: ties, zeros of both signs, subnormals, the largest bf16.
"""

import numpy as np
import pytest
from ders_kernels.cpu_ops import floats, n_of_m, select, ternary
from ders_kernels.packing import count_bits, lowest_bit, pack_positions, unpack_positions
from numba import njit

from ders_cli.codecs import parse_codec
from ders_cli.codecs.base import DeltaCodec, NonFiniteError, gain
from ders_cli.errors import CheckpointError

TERMS = ["drop0.9", "drop0.5", "drop0", "top0.1", "top0.5", "top1", "top0.001", "2:4", "1:3", "4:8", "1:2", "63:64"]
TERNARY = ["ternary0.02", "ternary0.3", "ternary0.5"]
SHAPES = [(1, 1), (2, 2), (3, 3), (1, 61), (5, 64), (9, 129), (3, 1001), (2, 4099)]
KINDS = [
    "gaussian",
    "six in ten zeros",
    "zeros",
    "equal",
    "two sizes",
    "grid",
    "subnormal",
    "huge",
    "outliers",
    "signs of zero",
]
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)
VALUED = pytest.mark.parametrize("kind", KINDS)
KEY = 2**64 - 3


def pair(kind, shape):
    """bf16 patterns of (expert, base)."""
    random = np.random.default_rng(shape[0] * 10_000 + shape[1])
    base, change = random.standard_normal(shape) * 0.02, random.standard_normal(shape) * 1e-3
    if kind == "six in ten zeros":
        change[random.random(shape) < 0.6] = 0
    if kind == "zeros":
        change[:] = 0
    if kind in ("equal", "two sizes"):
        base[:], change = 0.5, np.where(random.random(shape) < 0.5, 0.25, -0.25)
        change[random.random(shape) < (0.3 if kind == "two sizes" else 0)] = 2
    if kind == "grid":
        base[:], change = 1, np.round(change * 4000) / 64
    if kind == "subnormal":
        base, change = base * 1e-38, change * 1e-37
    if kind == "huge":
        base, change = np.clip(base, -0.05, 0.05) * 1e39, np.clip(change, -3e-3, 3e-3) * 3e39
    if kind == "outliers":
        change[:, random.integers(shape[1], size=1 + shape[1] // 50)] *= 900
    if kind == "signs of zero":
        base[:], change[:] = -0.0, -0.0
        change[random.random(shape) < 0.1] = 1e-3
    base = floats.narrow(base.astype(np.float32), "BF16")
    return floats.narrow(floats.widen(base, "BF16") + change.astype(np.float32), "BF16"), base


def same(found, expected):
    assert found.keys() == expected.keys()
    for part, data in expected.items():
        assert (found[part].dtype, found[part].shape) == (data.dtype, data.shape)
        assert found[part].tobytes() == data.tobytes(), part


def of_sort(keys, k):
    """Columns of each row's k largest keys, ascending; ties go to the lower."""
    return np.sort(np.argsort(-keys.astype(np.int64), axis=1, kind="stable")[:, :k], axis=1)


@SHAPED
@VALUED
@pytest.mark.parametrize("term", [*TERMS, *TERNARY])
def test_the_fast_way_and_the_slow(term, kind, shape):
    codec, (expert, base) = parse_codec(term, 128), pair(kind, shape)
    parts = codec.encode_expert(expert, base, "BF16", KEY, 7)
    with np.errstate(over="ignore"):  # a huge value after the gain
        same(parts, DeltaCodec.encode_expert(codec, expert, base, "BF16", KEY, 7))
    for onto in (base, pair("signs of zero", shape)[1]):
        found = codec.decode_expert(parts, onto, "BF16", KEY, 7)
        assert found.tobytes() == DeltaCodec.decode_expert(codec, parts, onto, "BF16", KEY, 7).tobytes()


@pytest.mark.parametrize("term", [*TERMS, *TERNARY])
def test_views_that_are_not_contiguous(term):
    codec, (expert, base) = parse_codec(term, 128), pair("gaussian", (9, 129))
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    same(codec.encode_expert(np.asfortranarray(expert), np.asfortranarray(base), "BF16", KEY, 0), parts)
    found = codec.decode_expert(parts, np.asfortranarray(base), "BF16", KEY, 0)
    assert found.tobytes() == codec.decode_expert(parts, base, "BF16", KEY, 0).tobytes()


@pytest.mark.parametrize("term", ["drop0.9", "top0.1", "2:4", "1:3", "ternary0.02"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0xFFC1, 0x7F80, 0xFF80], ids=hex)
def test_no_finite_base(term, bits):
    """Encoding says where; decoding adds to whatever the base holds, kept entry or not, and quiets a NaN."""
    codec, (expert, base) = parse_codec(term, 128), pair("gaussian", (5, 130))
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    for row, column in ((4, 64), (2, 129), (2, 5), (0, 0)):  # each before the last
        base[row, column] = bits
        with pytest.raises(NonFiniteError) as error:
            codec.encode_expert(expert, base, "BF16", KEY, 100)
        assert (error.value.row, error.value.column) == (100 + row, column)
    base[:, ::3] = bits
    found = codec.decode_expert(parts, base, "BF16", KEY, 0)
    assert found.tobytes() == DeltaCodec.decode_expert(codec, parts, base, "BF16", KEY, 0).tobytes()


@pytest.mark.parametrize("term", ["drop0.9", "top0.1", "2:4", "ternary0.02"])
def test_a_difference_past_fp32(term):
    expert, base = np.full((2, 9), 0x7F7F, np.uint16), np.full((2, 9), 0x0000, np.uint16)
    base[1, 8] = 0xFF7F
    with pytest.raises(NonFiniteError) as error:
        parse_codec(term, 128).encode_expert(expert, base, "BF16", KEY, 0)
    assert (error.value.row, error.value.column) in (
        (1, 8),
        (0, 0),
    )  # ternary: no value for row 0, as mean / density is past bf16
    assert (error.value.column == 8) == (error.value.row == 1)


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 333, 500, 999, 1000])
def test_largest_of_any_keys(k):
    """All alike, few alike, none alike, in order, the extremes; and rows that a guess from the row before misleads."""
    random = np.random.default_rng(k)
    keys = random.integers(0, 1 << 32, (40, 1000), dtype=np.uint32)
    keys[3], keys[4], keys[5] = 0, 2**32 - 1, np.arange(1000)
    keys[6], keys[7] = np.arange(1000)[::-1], keys[7] >> 31
    keys[8], keys[9] = keys[8] >> 24, keys[9] | np.uint32(0xFFFFFF00)
    keys[10, :k], keys[11, -k:], keys[12] = 2**32 - 1, 0, 1
    keys[13:20] >>= np.arange(0, 28, 4, dtype=np.uint32)[:, None]
    columns = np.full((40, k), -1, np.int32)
    select.largest(keys, columns)
    assert (columns == of_sort(keys, k)).all()
    for row in range(40):  # alone, without a guess
        select.largest(keys[row : row + 1], columns[:1])
        assert (columns[0] == of_sort(keys[row : row + 1], k)[0]).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 61, 130])
@VALUED
def test_two_of_four_against_any(kind, width):
    """The planes of 2:4 and the loop that serves every N:M; -0 is no larger than +0."""
    delta = floats.delta(*pair(kind, (6, width)), "BF16")
    columns = np.empty((6, parse_codec("2:4", 128).kept(width)), np.int32)
    bitmap, values = np.full((6, -(-width // 8)), 0xFF, np.uint8), np.full(columns.shape, np.nan, np.float32)
    select.largest_of_blocks(select.magnitudes(delta), 2, 4, columns)
    n_of_m.keep(delta, 2, 4, bitmap, values)
    assert (np.unpackbits(bitmap, axis=1, bitorder="little").nonzero()[1].reshape(columns.shape) == columns).all()
    assert values.tobytes() == np.take_along_axis(delta, columns, axis=1).tobytes()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 61, 64])
def test_every_damaged_two_of_four_is_refused(width):
    codec, (expert, base) = parse_codec("2:4", 128), pair("gaussian", (3, width))
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    for bit in range(8 * parts["bitmap"].shape[1]):
        damaged = {name: data.copy() for name, data in parts.items()}
        damaged["bitmap"][1, bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match="^row 6: bitmap does not keep 2 of every 4"):
            codec.decode_expert(damaged, base, "BF16", KEY, 5)


@pytest.mark.parametrize("term", ["top0.1", "top0.5", "ternary0.02", "1:3"])
def test_damaged_positions_are_named(term):
    codec, (expert, base) = parse_codec(term, 128), pair("gaussian", (4, 129))
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    name = "bitmap" if "bitmap" in parts else "high"
    parts[name][2, 0] ^= 1
    with pytest.raises(CheckpointError, match="^row 12: "):
        codec.decode_expert(parts, base, "BF16", KEY, 10)


@VALUED
@SHAPED
def test_gains(kind, shape):
    """Against fp64 sums in numpy's order. A row whose last bit an order could change says so, by NaN, and is few."""
    delta = floats.delta(*pair(kind, shape), "BF16")
    kept = np.ascontiguousarray(np.take_along_axis(delta, of_sort(select.magnitudes(delta), 1 + shape[1] // 9), axis=1))
    energy, held = ((x.astype(np.float64) ** 2).sum(1) for x in (delta, kept))
    expected = np.where(held > 0, energy / np.where(held > 0, held, 1), 1).astype(np.float32)
    found = np.full(shape[0], -1, np.float32)
    select.gains(delta, kept, found)
    sure = ~np.isnan(found)
    assert (found[sure] == expected[sure]).all()
    assert (gain(delta, kept)[:, 0] == expected).all()
    assert sure.all() or kind in ("two sizes", "grid")


@pytest.mark.parametrize(("term", "width"), [("top0.001", 2), ("1:2", 2), ("top0.001", 61), ("1:64", 61)])
def test_a_gain_between_two_numbers_is_left_to_the_slow_way(term, width):
    """1 + 2^-24 is halfway from 1 to the next fp32; 1 + 3 * 2^-24 halfway on, where the even one is above."""
    expert = np.zeros((3, width), np.float32)
    expert[:, 0], expert[0, -1], expert[1, 1:4] = 1, 2.0**-12, 2.0**-12
    codec, expert = parse_codec(term, 128), floats.narrow(expert, "BF16")
    base, ratios = np.zeros_like(expert), np.zeros(3, np.float32)
    columns, values = np.empty((3, 1), np.int32), np.empty((3, 1), np.uint16)
    assert select.largest_bf16(expert, base, columns, values, ratios)
    assert np.isnan(ratios).tolist() == [True, True, False]
    bitmap = np.empty((3, -(-width // 8)), np.uint8)
    assert n_of_m.keep_bf16(expert, base, 1, 64, bitmap, values, ratios)
    assert np.isnan(ratios).tolist() == [True, True, False]
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    same(parts, DeltaCodec.encode_expert(codec, expert, base, "BF16", KEY, 0))
    assert (floats.widen(parts["values"], "BF16")[:, 0] == 1).all()


@pytest.mark.parametrize("n", [1, 2, 41, 300])
@VALUED
def test_ternary_by_eights_and_one_by_one(kind, n):
    """Draws at both ends of their range too, where the running sum begins on a whole number or next to one."""
    delta = floats.delta(*pair(kind, (40, 601)), "BF16")
    draws = np.random.default_rng(n).integers(0, 1 << 32, 40, dtype=np.uint32)
    draws[:4] = 0, 2**32 - 1, 1, 2**31
    found = np.full((40, n), -1, np.int32), np.full((40, n), 7, np.uint8), np.empty(40, np.uint16)
    clipped, expected = ternary.encode(delta, draws, *found), 0
    for row in range(40):
        columns, negative = np.full(n, -1, np.int32), np.full(n, 7, np.uint8)
        bits, more = ternary.encode_row(delta[row], draws[row] * 2.0**-32, columns, negative)
        expected += more
        assert found[0][row].tolist() == columns.tolist()
        assert found[1][row].tolist() == negative.tolist()
        assert found[2][row] == bits
    assert clipped == expected


def test_ternary_leaves_what_is_too_close_to_the_definition():
    """Eight entries of 1 or just less at a density of a half: s = 2, and the sum of p goes by halves."""
    columns, negative, sums = np.empty(4, np.int32), np.empty(4, np.uint8), np.empty(1)
    ones, fewer = np.ones(8, np.float32), np.float32([1] * 7 + [0.99])
    assert ternary._encode_row_by_eights(fewer, np.float32(1), 0.3, sums, columns, negative)[0]
    assert columns.tolist() == [1, 3, 5, 7]
    for u in (0.0, 0.5, 2.0**-49):  # from there it meets whole numbers, or nearly
        assert not ternary._encode_row_by_eights(fewer, np.float32(1), u, sums, columns, negative)[0]
    # s is the least bf16 that reaches the mean of 2: the one that the sum of eight, in another order, may just miss
    assert not ternary._encode_row_by_eights(ones, np.float32(1), 0.3, sums, columns, negative)[0]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 9), (8, 64), (9, 300), (205, 2048), (2, 1 << 20), (40, 70_000)])
def test_positions_of_any_spacing(n, m):
    """l from 0 to 19 low bits; the wide ones are packed bit by bit."""
    random = np.random.default_rng(m)
    columns = np.sort(np.stack([random.choice(m, n, replace=False) for _ in range(5)]), axis=1).astype(np.int32)
    for unused in (False, True):
        if unused:
            columns[2, n // 2 :] = m
        parts = pack_positions(columns, m, unused)
        assert (unpack_positions(parts, n, m, unused) == columns).all()


def test_bits_of_a_word():
    @njit
    def both(word):
        return lowest_bit(word), count_bits(word)

    for word in (0, 1, 2, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x0F00):
        lowest = 64 if word == 0 else (word & -word).bit_length() - 1
        assert both(np.uint64(word)) == (lowest, word.bit_count())
