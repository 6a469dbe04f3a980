"""The fused kernels of a bf16 conversion against the step-by-step ones they replace: the same bits.

Mean, integer codes from stored bits, error sums from stored bits, and the draws of single blocks.
"""

import numpy as np
import pytest
from ders_kernels import reference
from ders_kernels.counter_rng import draw, fill, fill_blocks
from ders_kernels.cpu_ops import floats, ints, sums
from ders_kernels.cpu_ops import mean as means
from ders_kernels.packing import code_bytes

from ders_cli.base import mean
from ders_cli.codecs import parse_codec
from ders_cli.codecs.base import DeltaCodec, NonFiniteError

SHAPES = [(1, 1), (1, 61), (3, 7), (5, 128), (4, 129), (61, 64), (2, 1536), (3, 2051), (7, 250)]
KINDS = ["gaussian", "few zeros", "half zeros", "a zero", "zeros", "few signed zeros", "signed zeros"]
KINDS += ["subnormal", "tiny step", "huge", "outlier"]
KEY = 0xFEDCBA9876543210
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)
VALUED = pytest.mark.parametrize("kind", KINDS)


def pair(kind, shape):
    """Stored bf16 bits of an expert and its base; the smallest bf16 is 9.2e-41, the largest 3.4e38."""
    random = np.random.default_rng(shape[0] * 10_000 + shape[1])
    scale = {"subnormal": 1e-39, "tiny step": 1e-37, "huge": 5e37}.get(kind, 0.02)
    base = np.clip(random.standard_normal(shape), -3, 3) * scale
    delta = np.clip(random.standard_normal(shape), -3, 3) * scale / 20
    share = {"few zeros": 0.03, "half zeros": 0.6, "zeros": 1, "signed zeros": 0.6}.get(kind, 0)
    delta[random.random(shape) < share] = 0
    if kind == "a zero":
        delta[-1, shape[1] // 2] = 0
    if kind == "tiny step":  # no base: steps whose inverses overflow stand beside such as do not
        base, delta = base * 0, np.exp2(random.uniform(-133, -120, shape)) * random.choice([-1, 1], shape)
    if kind == "outlier":
        delta[:, random.integers(shape[1])] = -7
    found = [floats.narrow(x.astype(np.float32), "BF16") for x in (base + delta, base)]
    if kind.endswith("signed zeros"):  # -0 - +0 is the one -0 among differences
        zero = random.random(shape) < (0.5 if kind == "signed zeros" else 0.08)
        found[0][zero], found[1][zero] = random.choice(np.array([0, 0x8000], np.uint16), (2, zero.sum()))
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for part, data in expected.items():
        assert found[part].dtype == data.dtype
        assert found[part].shape == data.shape
        assert (found[part] == data).all(), (part, np.argwhere(found[part] != data)[0])


@SHAPED
@VALUED
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_from_stored_bits(bits, kind, shape):
    """Groups of one entry, with and without a tail, longer than the row; rows that begin inside a block of draws."""
    expert, base = pair(kind, shape)
    for group in (64, 128) if expert.size > 1000 else (1, 7, 64, 200):
        codec = parse_codec(f"int{bits}", group)
        for row in (0, 3):
            found = codec.encode_expert(expert, base, "BF16", KEY, row)
            assert_same(found, DeltaCodec.encode_expert(codec, expert, base, "BF16", KEY, row))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_byte_is_written(bits):
    """Whatever stood in the output before, and also past a row's codes."""
    expert, base = pair("few zeros", (5, 61))
    packed, scales = np.full((5, code_bytes(61, bits)), 0xAA, np.uint8), np.full((5, 8), 0x7FC0, np.uint16)
    if bits > 2:
        assert ints.encode_stored(expert, base, bits, 8, packed, scales)
    else:
        assert ints.encode_stored_signs(expert, base, np.uint64(KEY), 0, bits, 8, packed, scales)
    expected = DeltaCodec.encode_expert(parse_codec(f"int{bits}", 8), expert, base, "BF16", KEY, 0)
    assert_same({"codes": packed, "scale": scales}, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["columns first", "every second column", "read-only"])
def test_integers_from_any_layout(bits, layout):
    expert, base = pair("few zeros", (6, 66))
    codec = parse_codec(f"int{bits}", 32)
    if layout == "columns first":
        given = np.asfortranarray(expert), np.asfortranarray(base)
    elif layout == "every second column":
        given = expert[:, ::2], base[:, ::2]
    else:
        given = expert.copy(), base.copy()
        for array in given:
            array.flags.writeable = False
    expected = DeltaCodec.encode_expert(codec, *map(np.ascontiguousarray, given), "BF16", KEY, 1)
    assert_same(codec.encode_expert(*given, "BF16", KEY, 1), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("bad", [0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80])
@pytest.mark.parametrize("place", [(0, 0), (2, 60), (4, 33)])
def test_what_is_not_finite_is_named(bits, bad, place):
    """Each NaN and infinity, in an expert or its base; and finite weights whose difference passes the range."""
    codec, (expert, base) = parse_codec(f"int{bits}", 16), pair("half zeros", (5, 61))
    for bits_of in (expert, base):
        kept = bits_of[place]
        bits_of[place] = bad
        with pytest.raises(NonFiniteError) as error:
            codec.encode_expert(expert, base, "BF16", KEY, 100)
        assert (error.value.row, error.value.column) == (100 + place[0], place[1])
        bits_of[place] = kept
    expert[place], base[place] = 0x7F7F, 0xFF7F
    with pytest.raises(NonFiniteError) as error:
        codec.encode_expert(expert, base, "BF16", KEY, 100)
    assert (error.value.row, error.value.column) == (100 + place[0], place[1])


@pytest.mark.parametrize("bits", [1, 2])
def test_zeros_get_their_own_draws(bits):
    """Of one row in blocks, and of rows that hold 0 to all zeros, so that both ways of drawing run."""
    shape = (40, 250)
    random = np.random.default_rng(1)
    base = floats.narrow(random.standard_normal(shape).astype(np.float32), "BF16")
    expert = np.where(random.random(shape) < np.linspace(0, 1, 40)[:, None] ** 3, base, base + np.uint16(3))
    codec = parse_codec(f"int{bits}", 128)
    whole = codec.encode_expert(expert, base, "BF16", KEY, 7)
    assert_same(whole, DeltaCodec.encode_expert(codec, expert, base, "BF16", KEY, 7))
    parts = [codec.encode_expert(expert[i : i + 3], base[i : i + 3], "BF16", KEY, 7 + i) for i in range(0, 40, 3)]
    assert_same(whole, {part: np.concatenate([p[part] for p in parts]) for part in whole})


@pytest.mark.parametrize("first", [0, 1, 126, 127, 128, 2**34 - 129, 2**34 - 5, 2**34 * 5 + 7])
def test_long_draws_equal_reference(first):
    """More than one step of 128, over the end of the counter's first word too."""
    for count in (1, 127, 128, 129, 300):
        assert draw(KEY, first, count).tolist() == reference.draws(KEY, first, count).tolist()


@pytest.mark.parametrize("first", [0, 4, 2**34 - 64, 2**34 * 5 + 8])
def test_draws_of_single_blocks(first):
    numbers = np.random.default_rng(0).integers(0, 100, 64).astype(np.uint32)
    found, every = np.zeros(256, np.uint32), np.empty(400, np.uint32)
    fill_blocks(np.uint64(KEY), np.uint64(first), numbers, found)
    fill(np.uint64(KEY), np.uint64(first), every)
    assert (found.reshape(-1, 4) == every.reshape(-1, 4)[numbers]).all()


def by_numpy(experts):
    """The mean as its definition has it."""
    total = floats.widen(experts[0], "BF16").copy()
    with np.errstate(all="ignore"):
        for expert in experts[1:]:
            total += floats.widen(expert, "BF16")
        total *= np.float32(1 / len(experts))
    return floats.narrow(total, "BF16")


@SHAPED
@VALUED
def test_mean(kind, shape):
    experts = [np.roll(pair(kind, shape)[0], i, axis=1) ^ np.uint16(i * 37) for i in range(7)]
    for count in range(1, 8):
        expected = by_numpy(experts[:count])
        assert (mean(experts[:count], "BF16") == expected).all()
        assert (mean(np.stack(experts[:count]), "BF16") == expected).all()
        assert means.mean(experts[:count]) is not None
        assert (means.mean(experts[:count]) == expected).all()


def test_mean_of_ties_and_overflow():
    """Sums that end halfway go to the even pattern; past the largest bf16 is infinity; -0 stays."""
    a = np.array([0x3F80, 0x3F81, 0x8000, 0x7F7F, 0xFF7F, 0x7F80, 0x0001, 0x8001], np.uint16)
    b = np.array([0x3F81, 0x3F82, 0x8000, 0x7F7F, 0xFF7F, 0x4000, 0x0000, 0x8000], np.uint16)
    expected = [0x3F80, 0x3F82, 0x8000, 0x7F80, 0xFF80, 0x7F80, 0x0000, 0x8000]
    assert mean([a, b], "BF16").tolist() == by_numpy([a, b]).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_mean_of_any_pattern(seed):
    """NaNs of every kind among them, and one at a time: their bits are those of numpy's sums."""
    experts = list(np.random.default_rng(seed).integers(0, 1 << 16, (5, 3, 2051), dtype=np.uint16))
    assert means.mean(experts) is None
    assert (mean(experts, "BF16") == by_numpy(experts)).all()
    for place in (0, 2047, 2048, 6152):
        one = [expert & np.uint16(0xBFFF) for expert in experts]
        one[place % 5].flat[place] = 0xFF81
        assert (mean(one, "BF16") == by_numpy(one)).all()
        assert mean(one, "BF16").flat[place] == 0xFFC1


def test_mean_of_rows_that_are_not_side_by_side():
    packed = np.random.default_rng(0).integers(0, 0x7F00, (20, 3, 30), dtype=np.uint16)
    experts = [packed[:, i, ::2] for i in range(3)]
    assert (mean(experts, "BF16") == by_numpy(experts)).all()


@SHAPED
@VALUED
def test_error_sums(kind, shape):
    """fp64 sums of n terms in two orders differ by at most n 2^-52 of the sum of the terms' sizes; the maximum is exact."""
    original, base = pair(kind, shape)
    coded = np.roll(original, 1, axis=1)
    found, worst = np.full((shape[0], 6), np.nan), np.full(shape[0], np.nan, np.float32)
    sums.differences_bf16(original, coded, base, found, worst)
    wide = [floats.widen(x, "BF16") for x in (original, coded, base)]
    expected, most = np.full((shape[0], 6), np.nan), np.full(shape[0], np.nan, np.float32)
    sums.differences(*wide, expected, most)
    assert (worst == most).all()
    w, c, b = (x.astype(np.float64) for x in wide)
    sizes = np.stack([expected[:, 0], expected[:, 1], expected[:, 2], *expected.T[3:]], axis=1)
    sizes[:, 3], sizes[:, 4] = (abs(c - b) * abs(w - b)).sum(axis=1) * 1.001, (abs(c) * abs(w)).sum(axis=1)
    assert (abs(found - expected) <= shape[1] * 2.0**-52 * sizes).all()


@pytest.mark.parametrize("bad", [0x7FC0, 0xFFC1, 0x7F80, 0xFF80])
@pytest.mark.parametrize("which", range(3))
def test_error_sums_show_what_is_not_finite(bad, which):
    """In the first, a middle and the last column; other rows stay."""
    arrays = [*pair("gaussian", (4, 61)), pair("outlier", (4, 61))[0]]
    for row, column in enumerate((0, 33, 60)):
        arrays[which][row, column] = bad
    found, expected = np.full((4, 6), 7.0), np.full((4, 6), 7.0)
    worst, most = np.full(4, 7, np.float32), np.full(4, 7, np.float32)
    sums.differences_bf16(*arrays, found, worst)
    sums.differences(*(floats.widen(x, "BF16") for x in arrays), expected, most)
    assert (np.isfinite(found) == np.isfinite(expected)).all()
    assert (np.isfinite(worst) == np.isfinite(most)).all()
    assert np.isfinite(found).all(axis=1).tolist() == [False, False, False, True]


def test_error_sums_of_a_row_do_not_depend_on_the_block():
    original, base = pair("half zeros", (61, 250))
    coded = np.roll(original, 1, axis=1)
    whole, worst, part = np.empty((61, 6)), np.empty(61, np.float32), np.empty((4, 6))
    sums.differences_bf16(original, coded, base, whole, worst)
    sums.differences_bf16(original[30:34], coded[30:34], base[30:34], part, worst[:4])
    assert (part == whole[30:34]).all()
