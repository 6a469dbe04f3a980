"""Energies of low ranks against the full decomposition, and codecs of whole matrices against the long way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ders_kernels.cpu_ops import floats
from test_prediction import SEED, assert_alike, codecs_of, make, predict, reference, shown, synthetic

from ders_cli.analysis import blocks, spectra
from ders_cli.analysis.blocks import layers_of
from ders_cli.analysis.spectra import RANKS, LayerSpectra, WholePrediction, rank_energy, rotating
from ders_cli.base import MeanBase
from ders_cli.compare import random_states
from ders_cli.errors import UsageError
from ders_cli.source import open_source

SHAPES = [(1, 1), (5, 3), (3, 5), (43, 40), (1, 9)]


def shares(delta: np.ndarray) -> np.ndarray:
    """fp64: of |D|^2 in the best rank 1, 2, ..."""
    squares = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    return np.cumsum(squares) / squares.sum()


def decaying(out: int, width: int, power: float) -> np.ndarray:
    """fp32 with singular values 1, 2^-power, 3^-power, ..."""
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.standard_normal((out, min(out, width))))
    right, _ = np.linalg.qr(random.standard_normal((width, min(out, width))))
    return ((left * np.arange(1, min(out, width) + 1) ** -power) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1, 1e-30, 1e30])
def test_small_matrices_exactly(shape: tuple[int, int], scale: float) -> None:
    delta = (scale * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    true = shares(delta)
    found = rank_energy(delta.copy(), "7", RANKS, 0)
    assert (found.expert, found.ranks, found.error) == ("7", RANKS, (0,) * len(RANKS))
    assert found.energy == pytest.approx([true[min(rank, true.size) - 1] for rank in RANKS], rel=1e-5)  # fp32 D^T D
    assert (found.rank90, found.rank99) == tuple(int((true < share).sum()) + 1 for share in (0.9, 0.99))


@pytest.mark.parametrize("power", [0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(300, 190), (190, 300)], ids=str)
def test_large_matrices_within_the_error(power: float, shape: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(spectra, "EXACT_WIDTH", 0)
    ranks = (1, 2, 4, 8, 16)
    delta = decaying(*shape, power) if power else np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    true = shares(delta)[np.array(ranks) - 1]
    found = rank_energy(delta, "0", ranks, 1)
    assert (np.abs(np.array(found.energy) - true) <= np.array(found.error) + 1e-6).all()
    assert (np.array(found.error) < 0.25 * true + 1e-6).all()  # the flattest spectrum: .02 of .19
    assert found.rank99 is None


def test_a_low_rank_is_found(monkeypatch) -> None:
    monkeypatch.setattr(spectra, "EXACT_WIDTH", 0)
    random = np.random.default_rng(0)
    delta = (random.standard_normal((90, 3)) @ random.standard_normal((3, 80))).astype(np.float32)
    found = rank_energy(delta, "0", (1, 2, 3, 4), 1)
    assert found.energy[2:] == pytest.approx((1, 1), abs=1e-6) and found.rank99 == 3 and found.energy[1] < 0.99


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_no_energy_no_shares(value: float) -> None:
    delta = np.zeros((4, 5), np.float32)
    delta[1, 2] = value
    assert rank_energy(delta, "0", RANKS, 0) is None


def test_one_expert_of_a_layer_is_held(monkeypatch) -> None:
    monkeypatch.setattr(spectra, "EXACT_WIDTH", 0)
    groups, bits = synthetic(43, 40, 3, np.random.default_rng(0))
    found = [shown(LayerSpectra(groups, 5, (1, 4)), groups, bits, step) for step in (7, 43)]
    assert found[0] == found[1]  # the same bits, however the blocks came
    for projection, (experts, base) in bits.items():
        true = shares(floats.delta(experts[2], base, "BF16"))  # (layer 0 + seed 5) mod 3
        one = found[0][projection]
        assert one.expert == "2" and abs(one.energy[1] - true[3]) <= one.error[1] + 1e-6
    assert {rotating(groups, seed) for seed in range(3)} == {0, 1, 2}


@pytest.mark.parametrize(("name", "dtype"), [("mixed", torch.bfloat16), ("nemotron_h", torch.float32)], ids=str)
def test_codecs_of_whole_matrices_are_predicted_truly(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 400)
    codecs = codecs_of(["rank4", "int1+rank2", "rank2+int4", "int4"])
    with open_source(make(name, dtype, tmp_path)) as source:
        groups = list(layers_of(source).values())[-1]
        states = random_states(1, 0, 9, groups["up"].shape[1])
        expected = reference(source, groups, MeanBase(), {"1": states}, codecs, SEED)
        prediction = WholePrediction(groups, source.activation, states, codecs, SEED, label="1")
        assert_alike(predict(source, groups, MeanBase(), prediction), expected)
        turn = WholePrediction(groups, source.activation, {str(i): states for i in range(3)}, codecs, SEED)
        label = groups["up"].members[rotating(groups, SEED)][0]
        found = predict(source, groups, MeanBase(), turn)
        assert_alike(found, reference(source, groups, MeanBase(), {label: states}, codecs, SEED))


def test_sampled_neurons_of_a_whole_matrix() -> None:
    random = np.random.default_rng(0)
    groups, bits = synthetic(600, 320, 1, random)
    bits = {
        p: (experts, floats.narrow(0.99 * floats.widen(base, "BF16"), "BF16")) for p, (experts, base) in bits.items()
    }
    states = random.standard_normal((16, 320), np.float32)
    true, found = (
        shown(WholePrediction(groups, "silu", states, codecs_of(["rank8"]), 0, rows), groups, bits, 100)
        for rows in (600, 128)
    )
    for projection in groups:
        one, other = true[projection]["0"]["rank8"], found[projection]["0"]["rank8"]
        assert one != other and other.output_error == pytest.approx(one.output_error, rel=0.25)  # 1 / sqrt(128), twice


def test_sparse_is_refused() -> None:
    groups, _ = synthetic(20, 16, 2, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"sparse0\.9: a form to train"):
        WholePrediction(groups, "silu", None, codecs_of(["sparse0.9"]), 0)
