"""Each statistic of `ders analyze` against its formula written out in fp64, on awkward shapes and all dtypes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command import done
from ders_kernels import exact_format
from ders_kernels.cpu_ops import floats, moments, steps
from toy import write

from ders_cli.analysis import blocks
from ders_cli.analysis.blocks import Block, layers_of, observe_layer
from ders_cli.analysis.gram import Gram
from ders_cli.analysis.moments import DENSITIES, Moments
from ders_cli.analysis.noise import Noise
from ders_cli.analysis.routers import find_routers
from ders_cli.analysis.steps import Steps
from ders_cli.base import ExpertBase, MeanBase
from ders_cli.codecs.exact import EXPONENT_SHIFT, ExactCodec
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.source import open_source

DTYPES = ("BF16", "F16", "F32")
SHAPES = ((1, 1), (3, 61), (61, 3), (40, 43), (129, 70))


def group_of(experts: int, shape: tuple[int, int], dtype: str) -> ExpertGroup:
    view = MatrixView("w", shape, 0, shape[1], 1)
    return ExpertGroup(
        "model.layers.0.mlp.experts.up_proj", 0, "up", dtype, tuple((str(i), view) for i in range(experts))
    )


def alike(experts: int, shape: tuple[int, int], dtype: str, apart: float = 0.01, seed: int = 0) -> list[np.ndarray]:
    """Stored bits of experts that differ from one matrix by `apart` of its size in a third of their weights."""
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape).astype(np.float32)
    moved = [np.where(random.random(shape) < 0.3, apart * random.standard_normal(shape), 0) for _ in range(experts)]
    return [floats.narrow((base + d).astype(np.float32), dtype) for d in moved]


def blocks_of(experts: list[np.ndarray], base: np.ndarray, dtype: str, step: int, others=None) -> list[Block]:
    group = group_of(len(experts), experts[0].shape, dtype)
    cuts = [slice(r, min(r + step, base.shape[0])) for r in range(0, base.shape[0], step)]
    return [
        Block(group, rows, [e[rows] for e in experts], base[rows], {n: b[rows] for n, b in (others or {}).items()})
        for rows in cuts
    ]


def seen(observer, experts, base, dtype, step=7, others=None):
    for block in blocks_of(experts, base, dtype, step, others):
        observer.add(block)
    return observer


def wide(bits: np.ndarray, dtype: str) -> np.ndarray:
    return floats.widen(bits, dtype).astype(np.float64)


# --- steps ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 4099])
def test_differences_are_counted_as_the_codec_codes_them(dtype: str, n: int) -> None:
    width, shift = 32 if dtype == "F32" else 16, EXPONENT_SHIFT[dtype]
    random = np.random.default_rng(n)
    kind = np.uint32 if width == 32 else np.uint16
    base, far = (random.integers(0, 2**width, n, dtype=np.uint64).astype(kind) for _ in range(2))
    expert = np.where(random.random(n) < 0.5, base + random.integers(0, 40, n).astype(kind), far)
    raw_bits = exact_format.difference_tokens(width)
    counts = np.zeros((2, 1 << (width - 1 - shift), raw_bits.size), np.uint32)
    steps.count_differences(expert, base, width - 1, shift, counts)

    model = exact_format._make_model(exact_format.DIFFERENCE, expert, base, shift)
    expected = np.zeros(counts.shape[1:], np.int64)
    np.add.at(expected, (model.symbols >> 8, model.symbols & 255), 1)
    np.testing.assert_array_equal(counts.sum(axis=0), expected)

    own = np.zeros((2, counts.shape[1]), np.uint32)
    steps.count_exponents(expert, shift, own)
    exponents = (expert >> kind(shift)) & kind(counts.shape[1] - 1)
    np.testing.assert_array_equal(own.sum(axis=0), np.bincount(exponents, minlength=counts.shape[1]))

    bits = 0.0
    for row in expected[expected.any(axis=1)]:
        there = row[row > 0]
        bits += float(-(there * np.log2(there / there.sum())).sum() + (row * raw_bits).sum())
    assert steps.conditional_bits(counts, raw_bits) == pytest.approx(bits, rel=1e-12)


def kinds_of_experts(dtype: str, shape: tuple[int, int]) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(5)
    kind = np.uint32 if dtype == "F32" else np.uint16
    bits = [random.integers(0, np.iinfo(kind).max, shape, dtype=kind) for _ in range(2)]
    own = [floats.narrow(0.02 * random.standard_normal(shape).astype(np.float32), dtype) for _ in range(3)]
    return {
        "siblings": alike(3, shape, dtype, 0.002),
        "far": alike(3, shape, dtype, 0.5),
        "independent": own,
        "copies": [own[0]] * 3,
        "random bits": bits,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["siblings", "far", "independent", "copies", "random bits"])
def test_the_exact_size_is_known_without_coding(monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str) -> None:
    monkeypatch.setattr(
        "ders_cli.codecs.exact.CHUNK_WEIGHTS", 20_000
    )  # several chunks of this matrix, the last one short
    shape = (250, 200)
    experts = kinds_of_experts(dtype, shape)[kind]
    base, codec = experts[-1], ExactCodec()
    found = seen(Steps(), experts, base, dtype, step=33).found("up")
    for expert, one in zip(experts, found, strict=True):
        real = 0
        for begin in range(0, shape[0], codec.block_rows(shape)):
            rows = slice(begin, begin + codec.block_rows(shape))
            real += 16 + codec.encode_expert(expert[rows], base[rows], dtype, 0, begin)["stream"].nbytes
        # the states' last words are not counted: 32 bytes a chunk, of 100 for a copy
        assert abs(one.bytes - real) <= 0.005 * real + 16 * 3, (one, real)
        assert one.equal == (expert == base).mean()
        assert one.copied == np.array_equal(expert, experts[0])


def test_a_base_that_is_only_compared_is_sampled() -> None:
    shape = (1000, 2100)  # two chunks of 499 rows, and one of two, of which no number is a multiple of 8
    experts = alike(2, shape, "BF16", 0.003)
    base, other = alike(2, shape, "BF16", 0.003, seed=0)[0], alike(1, shape, "BF16", 0.02, seed=0)[0]
    found = seen(Steps(), experts, base, "BF16", 100, {"other": other})
    whole = seen(Steps(), experts, other, "BF16", 100).found("up")
    for sampled, all_rows in zip(found.found("up", "other"), whole, strict=True):
        assert sampled.bytes != all_rows.bytes  # one row in 8
        # of 150,000 weights an entropy of some bits is known to a hundredth of one
        assert sampled.bytes == pytest.approx(all_rows.bytes, rel=0.01)


# --- gram ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experts", [1, 4, 30])
def test_gram(monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, int], experts: int) -> None:
    monkeypatch.setattr("ders_cli.analysis.gram.COLUMNS", 100)  # several pieces of a block, the last one short
    bits = alike(experts, shape, dtype, 0.003)
    base = ExpertBase(0).rows(group_of(experts, shape, dtype), slice(0, shape[0]), lambda i, rows: bits[i][rows])
    other = alike(1, shape, dtype, 0.1, seed=0)[0]
    found = seen(Gram(), bits, base, dtype, 7, {"other": other}).found("up")

    w, b, c = np.stack([wide(e, dtype).ravel() for e in bits]), wide(base, dtype).ravel(), wide(other, dtype).ravel()
    norms = np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)  # sums of fp32 products
    np.testing.assert_allclose(found.delta_norms, np.linalg.norm(w - b, axis=1), rtol=1e-5)
    # what matters is 1 - cosine, near 1e-6 here; <B, D> is an fp32 product of numbers of size 1 and 1e-3: 1e-10
    cosine = (w @ w.T) / np.outer(norms, norms)
    np.testing.assert_allclose(1 - found.cosine, 1 - cosine, rtol=1e-4, atol=2e-10)
    np.testing.assert_allclose(1 - found.to_base, 1 - w @ b / norms / np.linalg.norm(b), rtol=1e-4, atol=2e-10)
    energies = {"": b, "other": c, "mean": w.mean(axis=0)} | {f"expert:{i}": w[i] for i in range(experts)}
    for label, its in energies.items():
        expected = ((w - its) ** 2).sum()
        assert found.energy[label] == pytest.approx(expected, rel=1e-4, abs=1e-9 * (w**2).sum()), label


@pytest.mark.parametrize("shape", [(1, 1), (2, 1023), (5, 1024), (9, 2049)])
def test_products_of_all_pairs(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    out = np.full((shape[0], shape[0]), 3.0)
    moments.products(x, out)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    np.testing.assert_allclose(np.tril(out), np.tril(exact + 3), atol=1e-4)  # 1e-6 of |x|^2, as sums of fp32


# --- moments ---


def test_outlier_score_of_a_known_matrix() -> None:
    matrix = np.array([[1, 1], [1, 9], [1, 2]], np.float32)
    bits = floats.narrow(matrix, "BF16")
    (found,) = seen(Moments(), [bits], bits, "BF16", 2).found("up")
    assert found.outlier == 2.25


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 61), (40, 43), (129, 70)])
def test_moments(dtype: str, shape: tuple[int, int]) -> None:
    experts = alike(2, shape, dtype, 0.1)
    base = floats.narrow(np.full(shape, 0.01, np.float32), dtype)
    for expert, found in zip(experts, seen(Moments(), experts, base, dtype, 8).found("up"), strict=True):
        w = np.abs(wide(expert, dtype))
        d = floats.delta(expert, base, dtype).astype(np.float64)
        assert found.energy == pytest.approx((d * d).sum(), rel=1e-12)
        assert found.std == pytest.approx(d.std(), rel=1e-9)
        assert found.kurtosis == pytest.approx(((d - d.mean()) ** 4).mean() / d.var() ** 2, rel=1e-9)
        assert found.outlier == pytest.approx((w.max(axis=0) / w.mean(axis=0)).max(), rel=1e-5)  # fp32 sums of columns
        energies = np.sort((d * d).ravel())[::-1]
        held = np.concatenate([[0], energies.cumsum()]) / energies.sum()
        expected = np.interp([density * d.size for density in DENSITIES], np.arange(d.size + 1), held)
        # sizes are 3 % apart, energies 6 %: one weight's energy may stand half of that off
        np.testing.assert_allclose(found.density_energy, expected, rtol=0.035)


def test_not_finite_and_zero_deltas_are_nan() -> None:
    good, bad = alike(2, (20, 30), "BF16")
    bad[3, 4] = 0x7FC0
    zero, lost = seen(Moments(), [good, bad], good, "BF16").found("up")
    assert zero.std == 0 and np.isnan(zero.kurtosis) and np.isnan(zero.density_energy).all()
    assert np.isfinite(zero.outlier) and np.isnan([lost.energy, lost.std, lost.kurtosis, lost.outlier]).all()
    gram = seen(Gram(), [good, bad], good, "BF16").found("up")
    assert np.isfinite(gram.norms[0]) and np.isnan(gram.norms[1]) and np.isnan(gram.cosine[0, 1])


# --- noise ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_noise_looks_like_noise_and_fine_tuning_does_not(dtype: str, by_row: bool) -> None:
    random = np.random.default_rng(2)
    base = random.standard_normal((300, 100)).astype(np.float32) * np.exp(random.standard_normal((300, 1)))
    level = 0.01 * (np.sqrt((base**2).mean(axis=1, keepdims=True)) if by_row else 1)
    noise = level * random.standard_normal(base.shape)
    rows, columns = (np.exp(0.5 * random.standard_normal(s)) for s in ((300, 1), (1, 100)))
    students = 0.01 * random.standard_t(4, base.shape)
    experts = [
        floats.narrow((base + d).astype(np.float32), dtype) for d in (noise, noise * rows, noise * columns, students)
    ]
    found = seen(Noise(), experts, floats.narrow(base.astype(np.float32), dtype), dtype, 64).found("up")
    plain, by_rows, by_columns, tailed = found
    # 30,000 weights, or a quarter of them: kurtosis known to 0.1, a spread of 100 columns to 0.15
    assert abs(plain.kurtosis - 3) < 0.2 and plain.row_spread < 1.25 and plain.column_spread < 1.4
    if not by_row:
        assert plain.level == pytest.approx(0.01, rel=0.03)
    assert by_rows.row_spread > 2 and by_columns.column_spread > 2 and tailed.kurtosis > 4


def test_sums_over_fine_weights() -> None:
    random = np.random.default_rng(4)
    base, delta = (random.standard_normal((9, 61)).astype(np.float32) for _ in range(2))
    delta[3], delta[5, 7] = 0, np.inf
    rows, columns = np.full((9, 4), np.nan), np.ones((2, 61))
    moments.fine_weights(delta, base, 0.5, rows, columns)
    numbers, squares = np.ones(61), np.ones(61)
    for i in (0, 1, 2, 4, 6, 7, 8):
        d, mean = delta[i].astype(np.float64), (delta[i].astype(np.float64) ** 2).mean()
        fine = np.abs(base[i]) <= np.float32(0.5 * np.sqrt(mean))
        expected = [fine.sum(), (d[fine] ** 2).sum(), (d[fine] ** 4).sum(), (base[i].astype(np.float64) ** 2).mean()]
        np.testing.assert_allclose(rows[i], expected, rtol=1e-12)
        numbers += fine
        squares += fine * d**2 / mean
    assert not rows[[3, 5], :3].any()
    np.testing.assert_allclose(columns, [numbers, squares], rtol=1e-12)


# --- blocks and routers ---


def checkpoint(folder: Path, experts: int = 3) -> Path:
    random = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 40)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{prefix}.gate.weight"] = torch.randn(experts, 40, generator=random)
        tensors[f"model.layers.{layer}.attn.gate.weight"] = torch.randn(experts, 40, generator=random)
        for i in range(experts):
            for name, shape in (("w1", (43, 40)), ("w3", (43, 40)), ("w2", (40, 43))):
                tensors[f"{prefix}.experts.{i}.{name}.weight"] = torch.randn(shape, generator=random)
    write(folder, dict(model_type="mixtral", num_local_experts=experts), {k: v.bfloat16() for k, v in tensors.items()})
    return folder


class Kept:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.deltas: dict[str, list[np.ndarray]] = {}  # of expert 2, copied: they are gone with the next block

    def add(self, block: Block) -> None:
        assert block.delta(2) is block.delta(2)
        self.blocks.append(block)
        self.deltas.setdefault(block.group.projection, []).append(block.delta(2).copy())


def test_blocks_show_every_row_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done_bytes = checkpoint(tmp_path / "m"), []
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 400)
    with open_source(folder) as source:
        for groups in layers_of(source).values():
            kept = Kept()
            observe_layer(source, MeanBase(), groups, [kept], done_bytes.append, {"expert:1": ExpertBase(1)})
            assert list(dict.fromkeys(b.group.projection for b in kept.blocks)) == ["gate", "up", "down"]
            for group in groups.values():
                own = [b for b in kept.blocks if b.group is group]
                assert len(own) > 3
                assert [b.rows.start for b in own] == [0, *(b.rows.stop for b in own[:-1])]
                rows = slice(0, group.shape[0])
                for i in range(3):
                    bits = source.read(group, i, rows)
                    np.testing.assert_array_equal(np.concatenate([b.experts[i] for b in own]), bits)
                base = MeanBase().rows(group, rows, lambda i, rows, group=group: source.read(group, i, rows))
                np.testing.assert_array_equal(np.concatenate([b.base for b in own]), base)
                np.testing.assert_array_equal(
                    np.concatenate([b.others["expert:1"] for b in own]), source.read(group, 1, rows)
                )
                deltas = np.concatenate(kept.deltas[group.projection])
                np.testing.assert_array_equal(deltas, wide(source.read(group, 2, rows), "BF16") - wide(base, "BF16"))
        assert sum(done_bytes) == 2 * 3 * 3 * 40 * 43 * 2


@pytest.mark.parametrize("codec", ["int4", "exact"])
def test_blocks_of_a_ders_folder_have_its_own_base(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "m")
    done("compress", folder, "--delta", codec, "--base", "expert:2", "-o", tmp_path / "d", "-q")
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 400)
    with open_source(tmp_path / "d") as source, open_source(folder) as original:
        groups = next(iter(layers_of(source).values()))
        kept = Kept()
        observe_layer(source, None, groups, [kept], lambda n: None)
        own = [b for b in kept.blocks if b.group.projection == "down"]
        expected = original.read(next(g for g in original.groups if g.name == own[0].group.name), 2, slice(0, 40))
        assert len(own) > 3
        np.testing.assert_array_equal(np.concatenate([b.base for b in own]), expected)
        whole = source.read(own[0].group, 0, slice(0, 40))
        np.testing.assert_array_equal(np.concatenate([b.experts[0] for b in own]), whole)


def test_routers(tmp_path: Path) -> None:
    with open_source(checkpoint(tmp_path / "m")) as source:
        routers = find_routers(source, layers_of(source))
        assert [r.name for r in routers] == [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1)]
        bits = np.concatenate([np.frombuffer(c, np.uint8) for c in source.chunks(routers[1].name)]).view(np.uint16)
        rows = wide(bits.reshape(3, 40), "BF16")
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(routers[1].cosine, rows @ rows.T, atol=1e-12)
        assert routers[1].layer == 1
