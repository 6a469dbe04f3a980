"""Every compiled kernel against its definition in reference.py, at awkward shapes and values.

Bit for bit where integers or rounded floats come out; a tolerance has its reason beside it. Whatever a kernel writes
into holds something else before: NaN, 0xFF, -1.
"""

import numpy as np
import pytest
import torch
from ders_kernels import reference
from ders_kernels.counter_rng import draw
from ders_kernels.cpu_ops import floats, ints, lowrank, select, sums, ternary
from ders_kernels.packing import code_bytes

from ders_cli.base import mean
from ders_cli.codecs.base import gain
from ders_cli.codecs.rank import RankCodec

SHAPES = [(1, 1), (1, 61), (3, 7), (5, 128), (4, 129), (61, 64), (2, 1536)]
KINDS = ["gaussian", "half zeros", "zeros", "negative zeros", "subnormal", "bf16 subnormal", "huge", "outlier", "equal"]
NAN = 0x7FC0
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)
VALUED = pytest.mark.parametrize("kind", KINDS)
DTYPED = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])


def matrix(kind, shape):
    """fp32 deltas. The largest fp32 is 3.4e38, the smallest normal 1.2e-38, the smallest bf16 9.2e-41."""
    random = np.random.default_rng(shape[0] * 10_000 + shape[1])
    d = random.standard_normal(shape)
    scale = {"subnormal": 1e-43, "bf16 subnormal": 1e-39, "huge": 5e37, "zeros": 0, "negative zeros": -0.0}.get(
        kind, 0.02
    )
    d = np.clip(d, -3, 3) * scale
    if kind == "half zeros":
        d[random.random(shape) < 0.5] = 0
    if kind == "negative zeros":
        d = -abs(d)
    if kind == "outlier":
        d[:, random.integers(shape[1])] = -7
    if kind == "equal":
        d = np.sign(d) * 0.3
    return d.astype(np.float32)


def bits_of(tensor):
    """A tensor's bit patterns as numpy keeps them: uint16 or uint32."""
    return tensor.contiguous().view(torch.uint16 if tensor.element_size() == 2 else torch.uint32).numpy()


def stored(bits, dtype):
    return torch.from_numpy(np.ascontiguousarray(bits)).view(TORCH[dtype])


def same(found, expected):
    """Equal shapes and bit patterns, except that any NaN is as good as another."""
    expected = expected.numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    differ = (found != expected) & ~(np.isnan(found) & np.isnan(expected))
    differ |= (found == 0) & (expected == 0) & (np.signbit(found) != np.signbit(expected))
    assert not differ.any(), (np.argwhere(differ)[0], found[differ][0], expected[differ][0])


def patterns(dtype, shape, seed):
    """Random bits, so NaNs, infinities and subnormals, half of them with exponents in the middle; or random weights."""
    random = np.random.default_rng(seed)
    width = 32 if dtype == "F32" else 16
    bits = random.integers(0, 1 << width, shape, dtype=f"uint{width}")
    weights = bits_of(torch.from_numpy(random.standard_normal(shape)).to(TORCH[dtype]))
    return np.where(random.random(shape) < 0.5, bits, weights)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widen_every_pattern(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).reshape(64, -1)
    same(floats.widen(every, dtype), reference.widen(stored(every, dtype)))
    finite = ~np.isnan(floats.widen(every, dtype))
    assert (floats.narrow(floats.widen(every, dtype), dtype) == every)[finite].all()


@DTYPED
def test_narrow_rounds_to_nearest_even(dtype):
    """Every bf16 (fp16) number, the midpoints above them, and their fp32 neighbours on both sides; then random bits."""
    every = reference.widen(stored(np.arange(1 << 16, dtype=np.uint16), "F16" if dtype == "F16" else "BF16")).numpy()
    step = np.uint32(1 << (12 if dtype == "F16" else 15))
    middles = every.view(np.uint32) + step
    bits = np.concatenate([m + np.uint32(o) for m in (every.view(np.uint32), middles) for o in (0, 1, 2**32 - 1)])
    bits = np.concatenate([bits, np.random.default_rng(0).integers(0, 1 << 32, 50_000, dtype=np.uint32)])
    values = bits.view(np.float32)
    narrowed = floats.narrow(values, dtype)
    same(stored(narrowed, dtype).float().numpy(), reference.narrow(torch.from_numpy(values), TORCH[dtype]).float())
    # a NaN stays a quiet one of its sign
    assert (np.signbit(floats.widen(narrowed, dtype)) == np.signbit(values)).all()
    if dtype == "BF16":
        assert (narrowed[np.isnan(values)] & 0x7FC0 == 0x7FC0).all()


@SHAPED
@DTYPED
def test_delta_and_synthesis(shape, dtype):
    expert, base = patterns(dtype, shape, 1), patterns(dtype, shape, 2)
    delta = floats.delta(expert, base, dtype)
    same(delta, reference.delta(stored(expert, dtype), stored(base, dtype)))
    with np.errstate(over="ignore"):  # of random bits some pass the range
        change = delta * np.float32(1.37)
    found = stored(floats.synthesize(base, change, dtype), dtype).float().numpy()
    same(found, reference.synthesize(stored(base, dtype), torch.from_numpy(change)).float())


@DTYPED
@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_mean(dtype, experts):
    read = [patterns(dtype, (3, 61), seed) for seed in range(experts)]
    found = stored(mean(read, dtype), dtype).float().numpy()
    same(found, reference.mean([stored(bits, dtype) for bits in read]).float())


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_first_nonfinite(bad):
    values = matrix("huge", (5, 129))
    assert floats.first_nonfinite(values) == -1
    values[4, 128] = bad
    assert floats.first_nonfinite(values) == 4 * 129 + 128
    values[2, 5] = bad
    assert floats.first_nonfinite(values) == 2 * 129 + 5
    assert floats.first_nonfinite(np.asfortranarray(values)) == 2 * 129 + 5


@SHAPED
@VALUED
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers(bits, kind, shape):
    """Groups of one entry, with and without a tail, and longer than the row.

    The scale of 1 and 2 bits comes from fp64 sums, in another order here: they agree to about 1e-13, which a scale
    rounded to 8 bits shows only next to a tie, and these data (fixed) have none.
    """
    d = matrix(kind, shape)
    draws = draw(bits, 0, d.size).reshape(shape)
    for group in (64,) if d.size > 1000 else (1, 7, 64, 200):
        packed = np.full((shape[0], code_bytes(shape[1], bits)), 0xFF, np.uint8)
        scales = np.full((shape[0], -(-shape[1] // group)), NAN, np.uint16)
        ints.encode(d, draws, bits, group, packed, scales)
        codes, expected = reference.encode_int(
            torch.from_numpy(d), torch.from_numpy(draws.astype(np.int64)), bits, group
        )
        assert (packed == reference.pack_codes(codes, bits).numpy()).all()
        assert (scales == bits_of(expected)).all()
        out = np.full(shape, np.nan, np.float32)
        ints.decode(packed, scales, bits, group, out)
        same(out, reference.decode_int(codes, expected, bits, group))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_decode_every_code(bits):
    """Codes that no encoder here writes, such as -128; scales up to the largest bf16, which 1 bit has to stand."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (4, 61), dtype=np.uint8)
    scales = np.array([[0x0000, 0x0001], [0x3F80, 0xBF80], [0x7F7F, 0x0080], [0x7EFF, 0x1234]], np.uint16)
    packed = reference.pack_codes(torch.from_numpy(codes), bits).numpy()
    out = np.full(codes.shape, np.nan, np.float32)
    ints.decode(packed, scales, bits, 32, out)
    same(out, reference.decode_int(torch.from_numpy(codes), stored(scales, "BF16"), bits, 32))
    assert bits > 1 or np.isfinite(out).all()


@SHAPED
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_synthesize(bits, shape):
    """In one pass the bits of two: bases with NaN, infinities and subnormals, every code, scales of any size."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, shape, dtype=np.uint8)
    packed, base = reference.pack_codes(torch.from_numpy(codes), bits).numpy(), patterns("BF16", shape, bits)
    for group in (1, 7, 64, 200):
        scales = random.integers(0, 0x7F80, (shape[0], -(-shape[1] // group)), dtype=np.uint16)
        change = reference.decode_int(torch.from_numpy(codes), stored(scales, "BF16"), bits, group)
        out = np.full(shape, NAN, np.uint16)
        ints.synthesize(packed, scales, bits, group, base, out)
        same(floats.widen(out, "BF16"), reference.synthesize(stored(base, "BF16"), change).float())


@pytest.mark.parametrize("bits", range(3, 9))
def test_integers_halfway(bits):
    """With a scale of just 1, halves go to the even code; -max|d| is a code of its own, not clipped."""
    top = (1 << bits - 1) - 1
    d = np.arange(-top, top + 0.5, 0.5, dtype=np.float32)[None]
    packed, scales = np.full((1, code_bytes(d.size, bits)), 0xFF, np.uint8), np.full((1, 1), NAN, np.uint16)
    ints.encode(d, np.empty((0, d.size), np.uint32), bits, d.size, packed, scales)
    codes, scale = reference.encode_int(torch.from_numpy(d), torch.zeros(d.shape), bits, d.size)
    assert scales.item() == bits_of(scale).item() == 0x3F80
    assert (packed == reference.pack_codes(codes, bits).numpy()).all()
    assert codes[0].tolist() == [round(value) + top + 1 for value in d[0].tolist()]


def keys_of(kind, shape):
    d = matrix(kind, shape)
    return select.magnitudes(d), torch.from_numpy(d).abs()


@SHAPED
@VALUED
def test_largest(kind, shape):
    keys, expected = keys_of(kind, shape)
    for k in sorted({1, min(2, shape[1]), (shape[1] + 1) // 2, max(1, shape[1] - 1), shape[1]}):
        columns = np.full((shape[0], k), -1, np.int32)
        select.largest(keys, columns)
        assert (columns == reference.largest_columns(expected, k).numpy()).all()


@pytest.mark.parametrize("width", [1, 5, 61, 1000])
def test_largest_drawn(width):
    """Rows that keep none, one, some and all of their columns, in the middle of a matrix."""
    counts = [0, 1, width // 2, width, 0]
    starts = np.cumsum([7, *counts])
    columns = np.full(sum(counts), -1, np.int64)
    select.largest_drawn(np.uint64(2**64 - 5), 3, width, starts, columns)
    assert (columns == reference.largest_drawn(2**64 - 5, 3, width, starts.tolist()).numpy()).all()


@pytest.mark.parametrize("steps", [1, 1 << 10, 1 << 21, (1 << 21) + (1 << 10) + 1])
def test_largest_of_keys_that_differ_in_few_bits(steps):
    """The threshold takes passes of 11, 11 and 10 bits: keys that differ in the lowest, the middle, the highest, in all."""
    keys = (np.random.default_rng(1).integers(0, 1000, (6, 200)) * steps).astype(np.uint32)
    keys[1] = draw(3, 0, 200)
    keys[2, :100] = 0xFFFFFFFF
    for k in (1, 17, 100, 101, 200):
        columns = np.full((6, k), -1, np.int32)
        select.largest(keys, columns)
        assert (columns == reference.largest_columns(torch.from_numpy(keys.astype(np.int64)), k).numpy()).all()


@SHAPED
@VALUED
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (1, 2), (7, 8), (3, 64)])
def test_largest_of_blocks(kind, shape, n, m):
    keys, expected = keys_of(kind, shape)
    columns = np.full((shape[0], shape[1] // m * n + min(n, shape[1] % m)), -1, np.int32)
    select.largest_of_blocks(keys, n, m, columns)
    assert (columns == reference.n_of_m_columns(expected, n, m).numpy()).all()


@SHAPED
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (7, 8), (3, 64)])
def test_columns_of_blocks(shape, n, m):
    """From the bitmap again; a column that moves to the next block is seen, and so is one that is not there."""
    (rows, width), keys = shape, keys_of("gaussian", shape)[0]
    columns = np.full((rows, width // m * n + min(n, width % m)), -1, np.int32)
    select.largest_of_blocks(keys, n, m, columns)
    bitmap = reference.pack_bitmap(torch.from_numpy(columns).long(), width).numpy()
    found = np.full_like(columns, -1)
    assert select.columns_of_blocks(bitmap, width, n, m, found) == -1
    assert (found == columns).all()
    row = rows - 1
    damaged = {"one less": columns[row, 1:]}
    if free := sorted(set(range(min(m, width))) - set(columns[row].tolist())):
        damaged["one more"] = np.append(columns[row], free[0])
        if width > m:
            damaged["in an earlier block"] = np.append(columns[row, :-1], free[0])
            last = (width - 1) // m * m
            if more := sorted(set(range(last, width)) - set(columns[row].tolist())):
                damaged["in a later block"] = np.append(columns[row, 1:], more[0])
    for name, kept in damaged.items():
        bits = bitmap.copy()
        bits[row] = reference.pack_bitmap(torch.from_numpy(np.sort(kept))[None].long(), width).numpy()
        assert select.columns_of_blocks(bits, width, n, m, found) == row, name
    if width % 8:
        bitmap[row, -1] |= 0x80  # past the last column
        assert select.columns_of_blocks(bitmap, width, n, m, found) == row


@SHAPED
def test_scatter(shape):
    (rows, width), random = shape, np.random.default_rng(0)
    kept = (width + 1) // 2
    columns = np.stack([np.sort(random.permutation(width + 1)[:kept]) for _ in range(rows)]).astype(np.int32)
    columns[0, -1] = width  # none
    values = random.standard_normal((rows, kept)).astype(np.float32)
    out = np.full(shape, np.nan, np.float32)
    select.scatter(columns, values, out)
    wide = torch.zeros(rows, width + 1).scatter(1, torch.from_numpy(columns).long(), torch.from_numpy(values))
    same(out, wide[:, :width])


@SHAPED
@VALUED
def test_gain(kind, shape):
    """Within one fp32 step: the fp64 sums of the two differ in their order."""
    d = matrix(kind, shape)
    kept = d[:, : (shape[1] + 1) // 2].copy()
    found, expected = gain(d, kept), reference.gain(torch.from_numpy(d), torch.from_numpy(kept)).numpy()
    assert found.shape == (shape[0], 1)
    np.testing.assert_allclose(found, expected, rtol=2.0**-23, atol=0)


@SHAPED
@VALUED
@pytest.mark.parametrize("density", [0.01, 0.05, 0.3, 0.5])
def test_ternary(kind, shape, density):
    d = matrix(kind, shape)
    draws = draw(5, 0, shape[0])
    draws[0] = 0xFFFFFFFF
    n = max(1, round(density * shape[1]))
    columns, negative = np.full((shape[0], n), -1, np.int32), np.full((shape[0], n), 0xFF, np.uint8)
    scales = np.full(shape[0], NAN, np.uint16)
    clipped = ternary.encode(d, draws, columns, negative, scales)
    expected = reference.encode_ternary(torch.from_numpy(d), torch.from_numpy(draws.astype(np.int64)), n)
    assert (columns == expected[0].numpy()).all()
    assert (negative == expected[1].numpy()).all()
    assert (scales == bits_of(expected[2])).all()
    assert clipped == expected[3]
    out = np.full(shape, np.nan, np.float32)
    ternary.decode(columns, negative, scales, out)
    same(out, reference.decode_ternary(*expected[:3], shape[1]))


def test_ternary_clips_outliers():
    """One entry of 7 among 0.06 at most: it is kept for sure, and counted."""
    d = matrix("outlier", (4, 129))
    columns, negative = np.empty((4, 13), np.int32), np.empty((4, 13), np.uint8)
    scales = np.empty(4, np.uint16)
    assert ternary.encode(d, draw(5, 0, 4), columns, negative, scales) == 4
    assert ((columns == abs(d).argmax(axis=1)[:, None]) & (negative == 1)).any(axis=1).all()


@SHAPED
def test_low_rank_decode(shape):
    """The codec's own decode: rank by rank in fp32, so the same bits from any block of rows."""
    r = min(4, *shape)
    left, right = patterns("BF16", (shape[0], r), 1) & 0xBFFF, patterns("BF16", (r, shape[1]), 2) & 0xBFFF
    out = RankCodec(4).decode({"left": left, "right": right}, shape, 0, 0)
    same(out, reference.decode_low_rank(stored(left, "BF16"), stored(right, "BF16")))


@SHAPED
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_low_rank_factors(shape, rank):
    """Against the whole SVD, of noise with a decaying spectrum added.

    Two power iterations and 8 more probes leave at most 2 % on top of the least error possible (Halko, Martinsson and
    Tropp, section 10.4, bound it far above; measured below 1 %); where the rank is all there is, fp32 rounding is left.
    """
    r = min(rank, *shape)
    random = np.random.default_rng(7)
    decay = 0.5 ** np.arange(min(shape))
    d = random.standard_normal((shape[0], len(decay))) * decay @ random.standard_normal((len(decay), shape[1]))
    d = (d + 0.01 * random.standard_normal(shape)).astype(np.float32)
    left, right = lowrank.factors(d, r, key=3)
    assert left.shape == (shape[0], r)
    assert right.shape == (r, shape[1])
    assert left.dtype == right.dtype == np.float32
    singular = torch.linalg.svdvals(torch.from_numpy(d).double()).numpy()
    least = np.sqrt((singular[r:] ** 2).sum())
    found = np.linalg.norm(d - left.astype(np.float64) @ right.astype(np.float64))
    assert found <= 1.02 * least + 1e-5 * singular[0]
    np.testing.assert_allclose((left**2).sum(axis=0), (right**2).sum(axis=1), rtol=1e-3, atol=1e-5 * singular[0])


@SHAPED
@VALUED
def test_error_sums(kind, shape):
    """fp64 sums of n terms in two orders differ by at most n 2^-52 of the sum of the terms' sizes; the maximum is exact."""
    base = matrix("gaussian", shape)
    change, coded = matrix(kind, shape), matrix(kind, shape[::-1]).T * np.float32(0.9)
    original, coded = base + change, np.ascontiguousarray(base + coded)
    found, worst = np.full((shape[0], 6), np.nan), np.full(shape[0], np.nan, np.float32)
    sums.differences(original, coded, base, found, worst)
    rows = tuple(torch.from_numpy(x) for x in (original, coded, base))
    expected, most = reference.error_sums(*rows)
    same(worst, most)
    weight, delta, error, _, _, own = expected.T.numpy()
    kept_size = (abs(original - base).astype(np.float64) * abs(coded - base)).sum(axis=1)
    cross_size = (abs(original).astype(np.float64) * abs(coded)).sum(axis=1)
    sizes = np.stack([weight, delta, error, kept_size, cross_size, own], axis=1)
    assert (abs(found - expected.numpy()) <= shape[1] * 2.0**-52 * sizes).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_error_sums_show_what_is_not_finite(bad):
    """In the first, a middle and the last column: the row's maximum is inf or NaN, and its sums are; other rows stay."""
    original, coded, base = (matrix(kind, (4, 61)) for kind in ("gaussian", "half zeros", "outlier"))
    for row, column in enumerate((0, 33, 60)):
        coded[row, column] = bad
    found, worst = np.full((4, 6), np.nan), np.full(4, np.nan, np.float32)
    sums.differences(original, coded, base, found, worst)
    same(worst, reference.error_sums(*(torch.from_numpy(x) for x in (original, coded, base)))[1])
    assert np.isfinite(worst).tolist() == np.isfinite(found[:, 2]).tolist() == [False, False, False, True]


def test_error_sums_of_a_row_do_not_depend_on_the_block():
    original, coded, base = (matrix(kind, (61, 64)) for kind in ("gaussian", "half zeros", "outlier"))
    whole, worst = np.empty((61, 6)), np.empty(61, np.float32)
    sums.differences(original, coded, base, whole, worst)
    part = np.empty((4, 6))
    sums.differences(original[30:34], coded[30:34], base[30:34], part, worst[:4])
    assert (part == whole[30:34]).all()


@VALUED
def test_gain_of_a_row_does_not_depend_on_the_block(kind):
    d = matrix(kind, (61, 64))
    kept = np.ascontiguousarray(d[:, ::3])
    alone = np.concatenate([gain(d[row : row + 1], kept[row : row + 1]) for row in range(61)])
    assert (gain(d, kept) == alone).all()
