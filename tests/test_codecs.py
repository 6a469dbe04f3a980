"""The contract of codecs/base.py, held against every codec; what each promises of the mean and the size of a delta."""

import json

import numpy as np
import pytest
from ders_kernels.cpu_ops import floats
from ders_kernels.packing import pack_positions

from ders_cli.checkpoint.tensor import STORAGE
from ders_cli.codecs import CODECS, codec_from_config, parse_codec
from ders_cli.codecs.base import NonFiniteError
from ders_cli.codecs.rank import RankCodec
from ders_cli.codecs.sparse import SparseCodec
from ders_cli.errors import CheckpointError, UsageError

LOSSY = [
    "int8",
    "int4",
    "int3",
    "int2",
    "int1",
    "drop0.9",
    "drop0.5",
    "ternary0.05",
    "ternary0.3",
    "top0.1",
    "top0.5",
    "top1",
    "2:4",
    "1:3",
    "rank4",
    "sparse0.9",
    "sparse0.995",
    "none",
    "drop0.9+int4",
    "top0.1+int4",
    "2:4+int8",
    "int1+rank2",
    "rank2+top0.1",
    "int1+drop0.5+int2",
    "int1+sparse0.5",
]
TERMS = ["exact", *LOSSY]
SHAPES = [(1, 1), (1, 61), (3, 7), (5, 128), (9, 129)]
GROUP = 32
KEY = 0x0123456789ABCDEF
KEYS = 300
TERMED = pytest.mark.parametrize("term", LOSSY)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(shape, seed=0):
    """Deltas of which about half are 0, as fine-tuning in bf16 leaves them."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * (random.random(shape) < 0.5) * 0.01).astype(np.float32)


def even(shape, seed=0):
    """Deltas of sizes 0.002 ... 0.01: the largest is below 2 times the mean, so no ternary code clips one."""
    random = np.random.default_rng(seed)
    return (random.uniform(0.002, 0.01, shape) * random.choice([-1, 1], shape)).astype(np.float32)


def weights(shape, dtype, seed=0):
    """(expert, base): stored bits that differ in about half of the entries."""
    base = np.random.default_rng(seed + 1).standard_normal(shape).astype(np.float32)
    return floats.narrow(base + 8 * gaussian(shape, seed), dtype), floats.narrow(base, dtype)


def rows_of(codec, parts, rows):
    return {part: data if part in codec.whole else data[rows] for part, data in parts.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for part, data in expected.items():
        assert found[part].dtype == data.dtype
        assert found[part].shape == data.shape
        assert found[part].tobytes() == data.tobytes(), part


def decoded(codec, d, key=KEY):
    return codec.decode(codec.encode(d, key, 0), d.shape, key, 0).astype(np.float64)


def test_every_codec_is_tested():
    tested = {type(parse_codec(term, GROUP)) for term in TERMS}
    assert tested == set(CODECS.values())
    assert all(name == codec.name for name, codec in CODECS.items())


@TERMED
@SHAPED
def test_parts_are_as_specified(term, shape):
    codec, d = parse_codec(term, GROUP), gaussian(shape)
    before = d.copy()
    parts, spec = codec.encode(d, KEY, 0), codec.spec(shape)
    assert (d == before).all()
    assert parts.keys() == spec.keys()
    for part, expected in spec.items():
        assert parts[part].shape == expected.shape
        assert parts[part].dtype == STORAGE[expected.dtype]
        assert parts[part].nbytes == expected.nbytes
        assert part in codec.whole or expected.shape[0] == shape[0]
    out = codec.decode(parts, shape, KEY, 0)
    assert out.shape == shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


@TERMED
@SHAPED
def test_rows_alone_are_the_rows_of_the_whole(term, shape):
    codec, d = parse_codec(term, GROUP), gaussian(shape)
    parts = codec.encode(d, KEY, 0)
    out = codec.decode(parts, shape, KEY, 0)
    for a, b in {(0, 1), (shape[0] - 1, shape[0]), (shape[0] // 3, 1 + shape[0] * 2 // 3)}:
        some = rows_of(codec, parts, slice(a, b))
        assert codec.decode(some, (b - a, shape[1]), KEY, a).tobytes() == out[a:b].tobytes()
        if codec.block_rows(shape) is None:
            assert_same(codec.encode(d[a:b], KEY, a), some)
        else:
            assert codec.block_rows(shape) == shape[0]


@pytest.mark.parametrize("term", TERMS)
def test_config_comes_back_through_json(term):
    codec = parse_codec(term, GROUP)
    again = codec_from_config(json.loads(json.dumps(codec.config)))
    assert again == codec
    assert again.config == codec.config
    assert parse_codec(codec.term, GROUP) == codec


@TERMED
def test_bytes_are_a_function_of_the_key(term):
    codec, d = parse_codec(term, GROUP), gaussian((9, 129))
    parts = codec.encode(d, KEY, 0)
    assert_same(codec.encode(d, KEY, 0), parts)
    other = codec.encode(d, KEY + 2, 0)
    differ = any((other[part] != data).any() for part, data in parts.items())
    if any(name in term for name in ("drop", "ternary", "int1", "int2", "sparse0.9")):
        assert differ
    elif "rank" not in term:  # its probes are drawn, but what they find is nearly the same
        assert not differ


@TERMED
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_stored_bits(term, dtype):
    """encode_expert and decode_expert: subtract in fp32, code, add in fp32, round once."""
    codec, (expert, base) = parse_codec(term, GROUP), weights((5, 61), dtype)
    row = 0 if codec.block_rows(base.shape) else 3
    parts = codec.encode_expert(expert, base, dtype, KEY, row)
    assert_same(parts, codec.encode(floats.widen(expert, dtype) - floats.widen(base, dtype), KEY, row))
    found = codec.decode_expert(parts, base, dtype, KEY, row)
    assert found.dtype == base.dtype
    change = codec.decode(parts, base.shape, KEY, row)
    assert (found == floats.narrow(floats.widen(base, dtype) + change, dtype)).all()


@TERMED
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_found_where_it_is(term, bad):
    codec, (expert, base) = parse_codec(term, GROUP), weights((5, 61), "BF16")
    for bits in (expert, base):
        kept = bits[3, 60]
        bits[3, 60] = floats.narrow(np.float32([bad]), "BF16")[0]
        with pytest.raises(NonFiniteError) as error:
            codec.encode_expert(expert, base, "BF16", KEY, 100)
        assert (error.value.row, error.value.column) == (103, 60)
        bits[3, 60] = kept


@SHAPED
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_exact(shape, dtype):
    codec, (expert, base) = parse_codec("exact", GROUP), weights(shape, dtype)
    expert[0, 0] = floats.narrow(np.float32([np.nan]), dtype)[0]
    base[-1, -1] = floats.narrow(np.float32([np.inf]), dtype)[0]
    chunk = codec.block_rows(shape)
    spec = codec.spec(shape)
    assert spec.keys() == {"extents", "stream"}
    assert spec["extents"].shape == (-(-shape[0] // chunk), 2)
    assert spec["stream"] is None
    parts = codec.encode_expert(expert, base, dtype, KEY, 0)
    assert parts.keys() == {"stream"}
    assert parts["stream"].nbytes <= expert.nbytes + 1
    assert codec.decode_expert(parts, base, dtype, KEY, 0).tobytes() == expert.tobytes()
    with pytest.raises(CheckpointError, match=f"rows 4 ... {3 + shape[0]}: "):
        codec.decode_expert({"stream": parts["stream"][:-1]}, base, dtype, KEY, 4)


def test_exact_chunks_are_about_a_million_weights():
    codec = parse_codec("exact", GROUP)
    assert codec.block_rows((4096, 1024)) == 1024
    assert codec.block_rows((3, 1 << 21)) == 1
    assert codec.spec((4097, 1024))["extents"].shape == (5, 2)


@pytest.mark.parametrize("term", ["drop0.9", "drop0.5", "sparse0.9", "ternary0.05", "ternary0.3"])
def test_mean_over_keys_is_the_delta(term):
    """Entry by entry and along the delta, within 5 standard deviations of a mean over KEYS, and a bf16 rounding.

    A kept entry has the value v with v * P(kept) = d, so a variance of d^2 (1 / P - 1): P = k / in for drop, 1 - rate for sparse and |d| / s,
    s = mean|d| / density, for ternary. Along the delta the entries' variances, weighted by d^2, add up.
    """
    codec, d = parse_codec(term, GROUP), even((6, 64))
    found = np.mean([decoded(codec, d, key) for key in range(KEYS)], axis=0)
    size = abs(d).astype(np.float64)
    if term.startswith("drop"):
        kept = np.full(d.shape, codec.kept(64) / 64)
    elif term.startswith("sparse"):
        kept = np.full(d.shape, 1 - codec.rate)
    else:
        kept = size / (size.sum(axis=1, keepdims=True) / codec.slots(64) * (1 + 2.0**-7))
    variance = size**2 * (1 / kept - 1) / KEYS
    assert (abs(found - d) <= 5 * np.sqrt(variance) + 2.0**-8 * size).all()
    along = (found * d).sum() / (size**2).sum()
    assert abs(along - 1) <= 5 * np.sqrt((variance * size**2).sum()) / (size**2).sum() + 2.0**-8


@pytest.mark.parametrize("density", ["0.1", "0.3", "0.5"])
def test_clipped_ternary_keeps_the_size(density):
    """With an outlier a row, <decoded, D> has the mean |D|^2: within 5 standard deviations as seen, and a bf16 rounding."""
    codec, d = parse_codec("ternary" + density, GROUP), gaussian((6, 64))
    d[:, 5] = 0.2
    along = np.array([(decoded(codec, d, key) * d).sum() for key in range(KEYS)]) / (d.astype(np.float64) ** 2).sum()
    assert abs(along.mean() - 1) <= 5 * along.std() / KEYS**0.5 + 2.0**-8


@pytest.mark.parametrize("term", ["int1", "int2", "top0.1", "top0.5", "top1", "2:4", "1:3"])
@pytest.mark.parametrize("deltas", [gaussian, even])
def test_gain_keeps_the_size(term, deltas):
    """<decoded, D> = |D|^2 but for values rounded to bf16, by 2^-9 at most."""
    d = deltas((9, 129))
    ratio = (decoded(parse_codec(term, GROUP), d) * d).sum(axis=1) / (d.astype(np.float64) ** 2).sum(axis=1)
    assert abs(ratio - 1).max() < 2.0**-8


@pytest.mark.parametrize(("term", "level"), [("int2", 0.5), ("int1", 1)])
def test_zeros_decode_to_zero_in_the_mean(term, level):
    """A zero becomes +-level * s at random: its mean over KEYS is within 5 standard deviations, and so is that of all."""
    codec, d = parse_codec(term, GROUP), gaussian((9, 128))
    d[d == 0] *= -1  # -0.0 is a zero too
    zero = d == 0
    assert 0.4 < zero.mean() < 0.6
    runs = np.array([decoded(codec, d, key) for key in range(KEYS)])[:, zero]
    size = abs(runs[0])
    assert (size > 0).all()
    assert (abs(runs) == size).all()
    scale = floats.widen(codec.encode(d, KEY, 0)["scale"], "BF16").repeat(GROUP, axis=1)[zero]
    assert (size == level * scale).all()
    assert (abs(runs.mean(axis=0)) <= 5 * size / KEYS**0.5).all()
    assert abs((runs / size).mean()) <= 5 / runs.size**0.5


@pytest.mark.parametrize("bits", range(3, 9))
def test_integers_are_within_half_a_step(bits):
    """The step is a bf16, so 2^-9 off at most; at 8 bits that moves the largest delta by 127 * 2^-9, still below a half."""
    d = gaussian((9, 129))
    error = abs(decoded(parse_codec(f"int{bits}", 1000), d) - d)
    top = 2 ** (bits - 1) - 1
    step = abs(d).max(axis=1, keepdims=True) / top
    assert (error <= 0.5 * (1 + 2.0**-8) * step).all()


def test_kept_entries_are_where_they_should_be():
    d = even((9, 129))
    half = decoded(parse_codec("drop0.5", GROUP), d)
    assert (np.count_nonzero(half, axis=1) == round(0.5 * 129)).all()
    assert (half[0] != 0).tolist() != (half[1] != 0).tolist()
    top = decoded(parse_codec("top0.1", GROUP), d) != 0
    assert (top.sum(axis=1) == 13).all()
    assert all(abs(row[kept]).min() >= abs(row[~kept]).max() for row, kept in zip(d, top, strict=True))
    blocks = decoded(parse_codec("2:4", GROUP), d) != 0
    assert (blocks[:, :128].reshape(9, 32, 4).sum(axis=2) == 2).all()
    assert blocks[:, 128].all()


@pytest.mark.parametrize("shape", [(5, 61), (61, 5), (7, 1000), (1000, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("rate", [0, 0.3, 0.9, 0.9999])
def test_sparse_positions(shape, rate):
    """Unique, ascending, (1 - rate) * out * in of them to within one, and spread evenly over the rows."""
    codec, expected = SparseCodec(rate), (1 - rate) * shape[0] * shape[1]
    for key in (n * 2**59 + n for n in range(32)):
        flat = codec.flat_positions(shape, key)
        assert (np.diff(flat) > 0).all()
        assert abs(flat.size - expected) < 1.001
        assert flat.size <= codec.spec(shape)["values"].size <= flat.size + 1
        rows = np.bincount(flat // shape[1], minlength=shape[0])
        assert rows.max() - rows.min() <= 1
        d = codec.decode(codec.encode(np.ones(shape, np.float32), key, 0), shape, key, 0)
        assert (np.flatnonzero(d) == flat).all()


def test_sparse_positions_are_equally_likely():
    """Over keys every entry is kept as often as another: within 5 standard deviations of a binomial count."""
    codec, shape, runs = SparseCodec(0.95), (6, 8), 4000
    keys = np.random.default_rng(0).integers(0, 2**64, runs, np.uint64)
    counts = sum(np.bincount(codec.flat_positions(shape, int(key)), minlength=48) for key in keys)
    assert abs(counts - 0.05 * runs).max() <= 5 * (runs * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("codec", [RankCodec, SparseCodec])
def test_training_starts_from_the_base(codec, dtype):
    """The initial parts are of the codec's shapes and dtype, and decode to 0; low-rank's right factor is spread evenly."""
    codec, shape = codec(3 if codec is RankCodec else 0.9, dtype), (5, 4096)
    parts = codec.initial(shape, KEY)
    assert {part: (data.shape, data.dtype) for part, data in parts.items()} == {
        part: (spec.shape, STORAGE[spec.dtype]) for part, spec in codec.spec(shape).items()
    }
    assert not codec.decode(parts, shape, KEY, 0).any()
    if isinstance(codec, RankCodec):
        right = floats.widen(parts["right"], dtype)
        assert abs(right).max() <= 1 / 64
        assert abs(right.std() * 64 - 3**-0.5) < 0.02  # a standard deviation of 12288 draws is 0.003 off at most


@TERMED
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, 1e-39, 1e30], ids=str)
def test_odd_deltas(term, value):
    """Nothing but zeros, subnormals, numbers of 1e30: the result is finite, and 0 where the delta is nothing but zeros."""
    codec = parse_codec(term, GROUP)
    d = (np.random.default_rng(3).uniform(-1, 1, (5, 61)) * value).astype(np.float32)
    found = decoded(codec, d)
    assert np.isfinite(found).all()
    if value == 0:
        assert (found == 0).all()
    elif value > 1 and term != "none":
        assert (found * d).sum() > 0.05 * (d.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("term", [term for term in LOSSY if term.count("+") == 1])
def test_a_chain_is_its_two_codecs(term):
    """b codes a's kept values, or a's residual, under the next key; that makes the error smaller."""
    chain, d = parse_codec(term, GROUP), gaussian((5, 128))
    first, then = (parse_codec(one, GROUP) for one in term.split("+"))
    parts = chain.encode(d, 2**64 - 1, 0)
    own = first.encode(d, 2**64 - 1, 0)
    inner = {part.removeprefix("then."): data for part, data in parts.items() if part.startswith("then.")}
    if "values" in own:
        _, rest = first.select(d, 2**64 - 1, 0)
        own.pop("values")
    else:
        rest = d - first.decode(own, d.shape, 2**64 - 1, 0)
        before = np.linalg.norm(rest)
        assert np.linalg.norm(d - chain.decode(parts, d.shape, 2**64 - 1, 0)) < before
    assert_same({part: data for part, data in parts.items() if not part.startswith("then.")}, own)
    assert_same(inner, then.encode(rest, 0, 0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("int9", "int9"),
        ("int0", "int0"),
        ("drop1", "drop1"),
        ("ternary0", "ternary0"),
        ("ternary0.6", "ternary0.6"),
        ("top0", "top0"),
        ("top1.5", "top1.5"),
        ("4:2", "4:2"),
        ("0:4", "0:4"),
        ("1:65", "1:65"),
        ("rank0", "rank0"),
        ("exact+int4", "exact+int4"),
        ("int4+exact", "int4+exact"),
        ("foo", "'foo'"),
        ("drop0.9+foo", "'foo'"),
        ("", "no codec ''"),
        ("int4+", "no codec ''"),
        ("int", "'int'"),
        ("drop-1", "'drop-1'"),
        ("chain", "'chain'"),
    ],
)
def test_a_term_that_is_none(text, named):
    with pytest.raises(UsageError) as error:
        parse_codec(text, GROUP)
    assert named in str(error.value)


@pytest.mark.parametrize("group_size", [0, -1, 2**20 + 1])
def test_a_group_size_that_is_none(group_size):
    with pytest.raises(UsageError, match="group size"):
        parse_codec("int4", group_size)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"codec": "zip"},
        {"codec": "int", "bits": 4},
        {"codec": "int", "bits": 4, "group_size": 32, "zero": 1},
        {"codec": "int", "bits": 9, "group_size": 32},
        {"codec": "drop", "rate": "0.9"},
        {"codec": "top", "density": None},
        {"codec": "chain", "first": {"codec": "exact"}, "then": {"codec": "exact"}},
        {"codec": "chain", "first": 3},
    ],
    ids=str,
)
def test_a_config_that_no_version_wrote(config):
    with pytest.raises(CheckpointError, match=r"ders\.json: codec "):
        codec_from_config(config)


@pytest.mark.parametrize(
    ("term", "part", "bit"),
    [
        ("top0.5", "bitmap", 60),
        ("top0.5", "bitmap", 63),
        ("top0.1", "high", 0),
        ("top0.1+int4", "high", 0),
        ("2:4", "bitmap", 1),
        ("2:4", "bitmap", 63),
        ("2:4+int8", "bitmap", 5),
        ("1:3", "bitmap", 60),
        ("ternary0.3", "high", 1),
        ("ternary0.05", "high", 7),
    ],
)
def test_damaged_positions(term, part, bit):
    """One flipped bit in row 3 of a block that begins at row 100: among the columns, and beyond column 60."""
    codec, (expert, base) = parse_codec(term, GROUP), weights((5, 61), "BF16")
    parts = codec.encode_expert(expert, base, "BF16", KEY, 100)
    parts[part][3, bit // 8] ^= 1 << bit % 8
    with pytest.raises(CheckpointError, match="^row 103: "):
        codec.decode_expert(parts, base, "BF16", KEY, 100)


def test_2_of_4_needs_2_in_every_block():
    """A column moved to the next block keeps the row's count, yet not the format."""
    codec, (expert, base) = parse_codec("2:4", GROUP), weights((5, 61), "BF16")
    parts = codec.encode_expert(expert, base, "BF16", KEY, 0)
    assert parts["bitmap"][2, 0] & 0x0F
    parts["bitmap"][2, 0] = 0b0001_0111
    with pytest.raises(CheckpointError, match="^row 2: bitmap does not keep 2 of every 4"):
        codec.decode_expert(parts, base, "BF16", KEY, 0)


def test_a_column_beyond_the_row_is_damage():
    """Elias-Fano bits can say column `in`, which is an unused slot in ternary and nothing in top."""
    codec, (expert, base) = parse_codec("top0.1", GROUP), weights((2, 128), "BF16")
    parts = codec.encode_expert(expert, base, "BF16", KEY, 100)
    columns = codec.columns(parts, base.shape, KEY, 100)
    assert_same(pack_positions(columns, 128, unused=True), {part: parts[part] for part in ("low", "high")})
    columns[1, -1] = 128
    parts |= pack_positions(columns, 128, unused=True)
    with pytest.raises(CheckpointError, match="^row 101: positions are not 13 ascending columns of 0..127"):
        codec.decode_expert(parts, base, "BF16", KEY, 100)


def test_rank_sums_from_plus_zero():
    """docs/format.md: the sum starts at +0, so a product of -0 decodes to +0."""
    parts = {"left": np.array([[0x8000]], np.uint16), "right": np.array([[0x3F80]], np.uint16)}
    assert parse_codec("rank1", 128).decode(parts, (1, 1), 0, 0).view(np.uint32)[0, 0] == 0
