"""Triton's kernels against the definitions: products, synthesis, routing, Gram; in its interpreter, or on a GPU (-m gpu)."""

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch
from ders_kernels import dispatch, reference
from ders_kernels.deltas import Bitmap, Delta, Drawn, Ints, Kept, LowRank, Sum
from ders_kernels.dispatch import Refused
from test_packed_delta import CODECS, packed

triton = pytest.importorskip("triton")
from ders_kernels.triton_ops import backend, gram, ints, kept, layer, pairs, products, weights  # noqa: E402
from ders_kernels.triton_ops.tiles import draw_tile  # noqa: E402
from triton import language as tl  # noqa: E402

pytestmark = pytest.mark.usefixtures("watched")
KEYS = (11, 2**64 - 1)
# Of |x| |D| / sqrt(in), the norm that random products have. fp32: the order of sums, and that codes ride on 1 + c / 2^b,
# so that 1.5 sum x is taken off again. Else roundings of an operand, of x @ right.T and of the result, half a unit each.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3 * 2**-12, torch.bfloat16: 3 * 2**-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cache
def made(codec: str, shape: tuple[int, int], group: int = 32, keys: tuple[int, ...] = KEYS) -> Delta:
    return packed(codec, shape, keys, group)[1]


def moved(part: Any, device: str) -> Any:
    """A packed delta, or a part of one, made anew with its tensors on a device."""
    if is_dataclass(part):
        return type(part)(*(moved(getattr(part, field.name), device) for field in fields(part) if field.init))
    return part.to(device) if isinstance(part, torch.Tensor) else part


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens of one expert take a product, too, and no whole D."""
    monkeypatch.setattr(layer, "many", lambda delta: float("inf"))


def assert_product(delta: Delta, tokens: int, dtype: torch.dtype, device: str, expert: int = -1) -> None:
    experts, _, width = delta.shape
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = dispatch.delta_matmul(x.to(device), moved(delta, device), expert % experts, backend="triton")
    assert y.dtype == dtype and y.device.type == device
    size = x.double().norm() * reference.decode(delta, expert % experts).double().norm() / width**0.5
    distance = (y.cpu().double() - reference.delta_matmul(x, delta, expert % experts)).norm() / size
    assert distance < TOLERANCE[dtype], distance  # not so if it is NaN


def took(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: str) -> list[dict]:
    """The named arguments of each launch of a kernel, or call of a function, from now on."""
    launches, right = [], getattr(module, kernel)

    class Seen:
        def __getitem__(self, grid):
            return lambda *given, **named: self(*given, run=right[grid], **named)

        def __call__(self, *given, run=right, **named):
            launches.append(named)
            return run(*given, **named)

    monkeypatch.setattr(module, kernel, Seen())
    return launches


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("codec", CODECS)
def test_product_over_several_tiles(codec, tokens, device, apart):
    """70 tokens are two blocks of any kernel, 300 columns several tiles, and so are these rows."""
    rows = (
        70 if codec.startswith(("int", "rank")) else 34 if tokens > 4 and codec[:7] not in ("top0.02", "ternary") else 6
    )
    assert_product(made(codec, (rows, 300)), tokens, torch.float32, device)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("codec", CODECS)
def test_product_of_61_columns(codec, tokens, dtype, device):
    """Rows of bytes that are no words, a width that is no multiple of 4, or of a group."""
    assert_product(made(codec, (3, 61)), tokens, dtype, device)


@pytest.mark.parametrize("shape", [(1, 1), (1, 61), (5, 1), (5, 64)], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_product_of_small_matrices(codec, shape, device):
    for tokens in (1, 5):
        assert_product(made(codec, shape), tokens, torch.float32, device)


@pytest.mark.parametrize("codec", ["int4", "drop0.7", "2:4+int3", "top0.02", "ternary0.1", "rank3", "int1+rank2"])
def test_each_expert(codec, device):
    for tokens in (1, 5, 20):
        assert_product(made(codec, (9, 61)), tokens, torch.float32, device, expert=0)
        assert_product(made(codec, (9, 61)), tokens, torch.float32, device, expert=1)
        assert_product(made(codec, (9, 61), keys=KEYS[:1]), tokens, torch.float32, device)


@DTYPES
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (7, 32), (6, 64), (5, 32), (4, 128), (3, 64), (2, 32), (1, 64)])
def test_one_token_by_lanes(bits, group, dtype, device, monkeypatch):
    """Whole groups of whole words."""
    launches = took(monkeypatch, ints, "int_token_product")
    assert_product(made(f"int{bits}", (18, 3 * group), group), 1, dtype, device)
    assert len(launches) == 1


@pytest.mark.parametrize("shape", [(300, 32), (5, 672)], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 1])
def test_one_token_and_its_programs(bits, shape, device, monkeypatch):
    """Rows of several; fewer groups than programs share, and more: some programs have two, one has less."""
    launches = took(monkeypatch, ints, "int_token_product")
    assert_product(made(f"int{bits}", shape, 32), 1, torch.float32, device)
    assert len(launches) == 1


@DTYPES
@pytest.mark.parametrize(
    ("bits", "group", "width"),
    [(8, 7, 63), (4, 7, 63), (4, 96, 192), (3, 32, 61), (1, 24, 48), (5, 96, 96), (2, 1000, 61), (4, 128, 200)],
)
def test_one_token_by_tiles(bits, group, width, dtype, device, monkeypatch):
    """Groups that are no words of codes, or a number of them that is no power of two; a tail."""
    launches = took(monkeypatch, ints, "int_product")
    assert_product(made(f"int{bits}", (5, width), group), 1, dtype, device)
    assert len(launches) == 1


@DTYPES
@pytest.mark.parametrize("group", [7, 64, 128, 1000, 1024])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_integer_groups(bits, group, dtype, device):
    """A tile is 128 columns: of one group if that is a multiple (its scale multiplies the sums), else of several."""
    assert_product(made(f"int{bits}", (5, 333), group), 3, dtype, device)


@pytest.mark.parametrize("tokens", [17, 70])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", [8, 3])
def test_integers_over_several_tiles(bits, group, tokens, device, apart):
    """More columns than four programs have a tile of, too."""
    assert_product(made(f"int{bits}", (66, 600), group), tokens, torch.float32, device)


@DTYPES
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_other_integers(bits, dtype, device):
    for tokens in (1, 3):
        assert_product(made(f"int{bits}", (5, 333), 128), tokens, dtype, device)
        assert_product(made(f"2:4+int{bits}", (5, 333), 32), tokens, dtype, device)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("rank", [1, 16, 20, 33])
def test_ranks(rank, tokens, device):
    """A tile is 16 of them."""
    assert_product(made(f"rank{rank}", (70, 90)), tokens, torch.float32, device)


@DTYPES
def test_fp32_factors(dtype, device):
    torch.manual_seed(0)
    delta = LowRank(torch.randn(2, 9, 3), torch.randn(2, 3, 61))
    assert_product(delta, 3, dtype, device)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("codec", ["drop0.7", "drop0.5+int4"])
@pytest.mark.parametrize("width", [60, 301])
def test_drawn_columns(codec, width, tokens, dtype, device):
    """Rows that begin within a block of four draws, and that don't."""
    assert_product(made(codec, (5, width)), tokens, dtype, device)


@pytest.mark.parametrize("codec", ["top0.5", "top0.02", "ternary0.5", "ternary0.02"])
def test_positions_of_each_density(codec, device):
    """A bitmap; Elias-Fano with and without low bits, and with many."""
    for tokens in (1, 5):
        assert_product(made(codec, (6, 500)), tokens, torch.float32, device)


def test_columns_past_int16(device):
    delta = made("top0.001", (2, 33000))
    assert products.listed_columns(moved(delta, device)).dtype == torch.int32
    assert_product(delta, 1, torch.float32, device)


@pytest.mark.parametrize(
    ("tokens", "kernel", "size"),
    [(1, "listed", 1), (4, "listed", 4), (5, "kept", 16), (16, "kept", 16), (17, "kept", 64), (65, "kept", 64)],
)
def test_tokens_choose_the_kernel(tokens, kernel, size, device, apart, monkeypatch):
    launches = took(monkeypatch, getattr(products, kernel), f"{kernel}_product")
    assert_product(made("2:4", (3, 61)), tokens, torch.float32, device)
    assert [launch["TOKENS"] for launch in launches] == [size]


@DTYPES
@pytest.mark.parametrize(
    ("codec", "many"), [("int4", 256), ("drop0.7", 64), ("ternary0.1", 64), ("rank3", None), ("int2+drop0.8", 64)]
)
def test_many_tokens_take_a_whole_delta(codec, many, dtype, device, monkeypatch):
    """Low rank never does."""
    launches = took(monkeypatch, weights, "synthesize")
    for tokens in ((many or 64) - 1, many or 70):
        assert_product(made(codec, (5, 61)), tokens, dtype, device)
        assert bool(launches) == (tokens == many)  # a chain takes one for each part


def test_no_tokens(device):
    y = dispatch.delta_matmul(torch.ones(0, 61, device=device), moved(made("int4", (3, 61)), device), 0, "triton")
    assert y.shape == (0, 3)


def test_strides_of_x(device):
    delta, x = made("int4", (3, 61)), torch.randn(61, 2)
    y = dispatch.delta_matmul(x.to(device).T, moved(delta, device), 1, backend="triton")
    assert torch.allclose(y.cpu().double(), reference.delta_matmul(x.T, delta, 1), atol=1e-5)


def test_the_same_call_gives_the_same_bits(device):
    for codec in ("int4", "drop0.7", "ternary0.1", "rank3"):
        delta, x = moved(made(codec, (9, 61)), device), torch.randn(17, 61, device=device)
        once, again = (dispatch.delta_matmul(x, delta, 1, backend="triton") for _ in range(2))
        assert torch.equal(once, again)


def assert_synthesis(delta: Delta, dtype: torch.dtype, device: str) -> None:
    for expert in range(delta.shape[0]):
        base = torch.randn(delta.shape[1:], generator=torch.Generator().manual_seed(expert)).to(dtype)
        base.view(-1)[::3] = -0.0  # the sign of a sum of zeros is one of the bits
        weight = dispatch.synthesize(base.to(device), moved(delta, device), expert, backend="triton").cpu()
        expected = reference.synthesize(base, reference.decode(delta, expert))
        assert weight.dtype == dtype
        bits = {2: torch.int16, 4: torch.int32}[base.itemsize]
        assert torch.equal(weight.view(bits), expected.view(bits))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (18, 61)], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_synthesis(codec, shape, dtype, device):
    """Bit for bit. A tile is 16 rows (Elias-Fano: 4)."""
    assert_synthesis(made(codec, shape), dtype, device)


@pytest.mark.parametrize("codec", CODECS)
def test_synthesis_over_several_tiles(codec, device):
    """Of 64 or 128 columns, or bits of Elias-Fano."""
    assert_synthesis(made(codec, (5, 501)), torch.bfloat16, device)


@pytest.mark.parametrize("group", [7, 64, 128, 1000, 1024])
@pytest.mark.parametrize("bits", range(1, 9))
def test_synthesis_of_integers(bits, group, device):
    assert_synthesis(made(f"int{bits}", (17, 140), group), torch.bfloat16, device)


@pytest.mark.parametrize("codec", ["top0.5", "ternary0.5", "ternary0.02", "2:4+int5", "rank20"])
def test_synthesis_of_each_density(codec, device):
    assert_synthesis(made(codec, (6, 500)), torch.bfloat16, device)


def test_synthesis_of_nothing(device):
    """Levels of 1 and 2 bits are never 0: with a scale of 0, half of them are -0, and so may be a sum with a base of -0."""
    for codec in ("int1", "int2", "int1+int1"):
        delta = made.__wrapped__(codec, (5, 61))
        for part in (delta.first, delta.then) if isinstance(delta, Sum) else (delta,):
            part.scale.zero_()
        assert_synthesis(delta, torch.bfloat16, device)


# rows of 1024 with two equal draws that are, in falling order, numbers k and k + 1: (key, k, lower and higher column)
TIES = [(5444, 533, 517, 968), (15530, 875, 949, 985)]


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(("key", "k", "lower", "higher"), TIES)
def test_thresholds_of_equal_draws(key, k, lower, higher, more, device):
    """Of two equal draws at the threshold, the lower column is kept; with one more entry, both."""
    drawn = reference.draws(key, 0, 1024)
    assert drawn[lower] == drawn[higher] == drawn.sort(descending=True).values[k - 1 : k + 1].unique()
    delta = Kept(Drawn((key,)), torch.ones(1, 1, k + more, dtype=torch.bfloat16), 1024)
    _, threshold = products.thresholds(moved(delta, device))
    assert threshold.cpu().tolist() == [[[int(drawn[lower].int()), (lower, higher)[more]]]]
    columns = products.listed_columns(moved(delta, device)).cpu().long()
    assert torch.equal(columns[0], reference.kept_columns(delta, 0))
    assert (higher in columns) == bool(more) and lower in columns
    assert_product(delta, 5, torch.float32, device)
    assert_synthesis(delta, torch.bfloat16, device)


@pytest.mark.parametrize("width", [1, 4, 16, 17, 61, 300])
def test_thresholds(width, device):
    """The k-th largest draw of every row of every expert, and its column."""
    rows, keys = 5, (3, 2**63 + 5)
    for k in {1, max(1, width // 3), width}:
        delta = Kept(Drawn(keys), torch.ones(2, rows, k, dtype=torch.bfloat16), width)
        _, threshold = products.thresholds(moved(delta, device))
        for expert, key in enumerate(keys):
            drawn = reference.draws(key, 0, rows * width).reshape(rows, width)
            least, column = drawn.sort(descending=True).values[:, k - 1], drawn.argsort(descending=True)[:, k - 1]
            assert torch.equal(threshold[expert, :, 0].cpu(), least.int())
            assert torch.equal(threshold[expert, :, 1].cpu().long(), column)


def test_a_threshold_is_a_draw_and_a_column(device):
    """Columns above it, and of those that equal it the ones up to the last: with the tie excluded, one is fewer."""
    drawn, width = reference.draws(7, 0, 4 * 61).reshape(4, 61), 61
    for row, k in ((0, 1), (1, 20), (2, 60), (3, 61)):
        least, at = drawn[row].sort(descending=True).values[k - 1], drawn[row].argsort(descending=True)[k - 1]
        for last, count in ((at - 1, k - 1), (at, k), (torch.tensor(60), k)):
            threshold = torch.tensor([int(least.int()), int(last)], dtype=torch.int32).repeat(1, 4, 1).contiguous()
            columns = torch.full((1, 4, width), -1, dtype=torch.int16)
            threshold, columns, keys = (t.to(device) for t in (threshold, columns, torch.tensor([7])))
            kept.kept_columns[(1, 1)](
                keys, keys, threshold, columns, 4, width, width, 0, ROWS=8, COLUMNS=128, DRAWN=True, ALIGNED=False
            )
            own = (drawn[row] > least).nonzero()[:, 0].tolist() + [int(at)] * (last >= at)
            assert columns[0, row].tolist() == sorted(own) + [-1] * (width - count)


def test_elias_fano_columns(device):
    for codec, width in (("top0.02", 300), ("ternary0.1", 61), ("ternary0.5", 61), ("ternary0.02", 4000)):
        delta = made(codec, (9, width))
        columns = products.listed_columns(moved(delta, device)).cpu().long()
        for expert in (0, 1):
            assert torch.equal(columns[expert], reference.kept_columns(delta, expert))


@triton.jit
def far_draws(place, out, width, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """place int64 [2]: a key and a row."""
    row = tl.load(place + 1) + tl.zeros((1,), tl.int64)
    column = tl.arange(0, COLUMNS)
    tl.store(out + column[None, :], draw_tile(tl.load(place), row, width, 0, COLUMNS, ALIGNED).to(tl.int64))


@pytest.mark.parametrize("row", [0, 2**14 - 1, 2**14, 2**33 + 7])
@pytest.mark.parametrize("aligned", [True, False])
def test_draws_past_32_bits(row, aligned, device):
    """From element 2^34 on, the counter's second word is in use."""
    width, place = 2**20, torch.tensor([11, row], device=device)
    out = torch.empty(16, dtype=torch.int64, device=device)
    far_draws[(1,)](place, out, width, COLUMNS=16, ALIGNED=aligned)
    assert torch.equal(out.cpu(), reference.draws(11, row * width, 16))


def grouped(index: torch.Tensor, experts: int) -> dict[int, list[int]]:
    groups = {}
    for pair, expert in enumerate(index.reshape(-1).tolist()):
        if 0 <= expert < experts:
            groups.setdefault(expert, []).append(pair)
    return groups


@pytest.mark.parametrize("few", [True, False], ids=["one program", "torch"])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "low", "high"),
    [
        (1, 1, 1, 0, 1),
        (1, 1, 4, -1, 0),  # nobody's
        (7, 2, 4, 0, 4),
        (7, 2, 4, -2, 6),  # some outside
        (20, 3, 4, 2, 3),  # all one expert's
        (20, 3, 256, 0, 256),
        (64, 2, 3, -1, 4),
    ],
)
def test_pairs_by_expert(tokens, k, experts, low, high, size, few, device, monkeypatch):
    if not few:
        monkeypatch.setattr(pairs, "FEW", 0)
    index = torch.randint(low, high, (tokens, k), generator=torch.Generator().manual_seed(tokens))
    blocks = pairs.by_expert(index.to(device), experts, size)
    expected, found, count = grouped(index, experts), {}, 0
    order = blocks.pairs.tolist()
    assert sorted(order) == list(range(tokens * k))
    for expert, first, end in zip(*(part.tolist() for part in blocks[1:]), strict=True):
        if first < end:
            found.setdefault(expert, []).extend(order[first : min(first + size, end)])
            count += 1
    assert found == expected
    assert count == sum(-(-len(own) // size) for own in expected.values())
    assert all(part.dtype == torch.int32 for part in blocks)


@DTYPES
@pytest.mark.parametrize(("experts", "width"), [(1, 1), (5, 61), (5, 700), (70, 700)])
def test_gram(experts, width, dtype, device, monkeypatch):
    """Inputs are exact, so it is the order of sums alone that differs. Chunks are made short: here are two."""
    monkeypatch.setattr(gram, "CHUNK", 512)
    w = torch.randn(experts, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = dispatch.expert_gram(w.to(device), backend="triton")
    assert sums.dtype == torch.float64 and sums.device.type == "cpu"
    assert (sums - reference.expert_gram(w)).abs().max() < 1e-6 * w.double().square().sum(1).max()


def test_gram_of_whole_chunks(device):
    w = torch.randn(2, gram.CHUNK + 5)
    distance = dispatch.expert_gram(w.T.contiguous().T.to(device), backend="triton") - reference.expert_gram(w)
    assert distance.abs().max() < 2e-6 * gram.CHUNK


def test_refusals(device):
    x, delta = torch.ones(1, 61, device=device), moved(made("int4", (3, 61)), device)
    with pytest.raises(Refused, match="x is torch.float64; expected torch.bfloat16"):
        dispatch.delta_matmul(x.double(), delta, 0, backend="triton")
    for width, said in ((kept.LONGEST, ""), (kept.LONGEST + 1, "drop with 32769 inputs; a program draws rows of")):
        drop = Kept(Drawn((1,)), torch.ones(1, 1, 2, dtype=torch.bfloat16), width)
        for one in (drop, Sum(delta, drop)):
            assert backend.refuses("delta_matmul", x, (delta, one)).startswith(said)
            assert bool(backend.refuses("delta_matmul", x, (delta, one))) == bool(said)


def test_a_compiled_kernel_refuses_the_cpu(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(Refused, match="x is on the cpu; Triton runs on a GPU, or, to check it, in its interpreter"):
        dispatch.delta_matmul(torch.ones(1, 61), made("int4", (3, 61)), 0, backend="triton")


def test_auto_takes_it_on_a_gpu_alone(device):
    delta: Ints = moved(made("int4", (3, 61)), device)
    chosen = dispatch.choose("delta_matmul", "auto", torch.ones(1, 61, device=device), delta)
    assert (chosen is backend) == (device == "cuda")


def test_parts_that_are_not_contiguous_are_refused(device):
    delta = moved(made("int4", (16, 256)), device)
    x = torch.ones(1, 128, device=device)
    with pytest.raises(Refused, match="not contiguous"):
        dispatch.delta_matmul(x, Ints(delta.codes[..., ::2], delta.scale, 4, 32, 128), 0, backend="triton")


def test_codes_at_an_odd_address(device):
    """Not where words are: a storage offset of a byte."""
    delta = made("int4", (16, 256))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), delta.codes.flatten()])[1:].view(delta.codes.shape)
    assert_product(Ints(shifted, delta.scale, 4, delta.group, 256), 1, torch.float32, device)


@pytest.mark.parametrize("bits", [0x00, 0xFF])
@pytest.mark.parametrize("tokens", [1, 17])
def test_a_bitmap_that_contradicts_itself_stays_in_its_memory(bits, tokens, device, watched):
    """It keeps none or all, and there are 8 values a row: what comes out is of no use, but nothing else is touched."""
    bitmap = torch.full((1, 4, 8), bits, dtype=torch.uint8, device=device)
    delta = Kept(Bitmap(bitmap), torch.ones(1, 4, 8, dtype=torch.bfloat16, device=device), 64)
    y = dispatch.delta_matmul(torch.ones(tokens, 64, device=device), delta, 0, backend="triton")
    assert (y == (0 if bits == 0 else 8)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_with_a_mean(bits, dtype, device):
    """What rides on a code besides its level is taken off the sums, of the size of the inputs' mean; after a relu there is one."""
    delta = made(f"int{bits}", (64, 1024), 128)
    x = (torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)) + 8).to(dtype)
    y = dispatch.delta_matmul(x.to(device), moved(delta, device), 0, backend="triton").cpu().double()
    size = x.double().norm() * reference.decode(delta, 0).double().norm() / 32
    # the result alone is rounded: it is no longer than the bound on a product by Cauchy and Schwarz, 32 of `size`
    assert (y - reference.delta_matmul(x, delta, 0)).norm() < TOLERANCE[dtype] * size
