"""Packed codes and positions: the compiled forms against the definitions, round trips, sizes, damage."""

import math

import numpy as np
import pytest
import torch
from ders_kernels import reference
from ders_kernels.packing import (
    code_bytes,
    low_bits,
    pack_positions,
    pack_row,
    position_bytes,
    unpack_positions,
    unpack_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

WIDTHS = [1, 2, 3, 7, 8, 9, 31, 32, 61, 128, 129]


@njit
def pack(codes, bits, packed):
    for row in range(codes.shape[0]):
        pack_row(codes[row], bits, packed[row])


@njit
def unpack(packed, bits, codes):
    for row in range(codes.shape[0]):
        unpack_row(packed[row], bits, codes[row])


def packed_codes(codes, bits):
    """uint8 [rows, n] -> uint8 [rows, bytes], into bytes that hold something else."""
    packed = np.full((codes.shape[0], code_bytes(codes.shape[1], bits)), 0xFF, np.uint8)
    pack(codes, bits, packed)
    return packed


def random_codes(rows, width, bits):
    return np.random.default_rng(width * 8 + bits).integers(0, 1 << bits, (rows, width), dtype=np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_equal_reference(bits):
    for width in WIDTHS:
        codes = random_codes(3, width, bits)
        packed = packed_codes(codes, bits)
        assert packed.shape[1] == math.ceil(width * bits / 8)
        assert packed.tolist() == reference.pack_codes(torch.from_numpy(codes), bits).tolist()
        out = np.full_like(codes, 0xFF)
        unpack(packed, bits, out)
        assert out.tolist() == codes.tolist() == reference.unpack_codes(torch.from_numpy(packed), bits, width).tolist()


def test_golden_codes():
    """Code i takes bits i*b ... of the row: 1, 2, 3 at 3 bits are 0b011_010_001."""
    assert packed_codes(np.array([[1, 2, 3]], np.uint8), 3).tolist() == [[0b11010001, 0]]
    assert packed_codes(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert packed_codes(np.array([[1, 0, 0, 1, 0, 0, 0, 0, 1]], np.uint8), 1).tolist() == [[0b1001, 1]]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
@settings(max_examples=60, deadline=None)
def test_codes_round_trip(bits, values):
    codes = np.array([values], np.uint8) & np.uint8((1 << bits) - 1)
    out = np.full_like(codes, 0xFF)
    unpack(packed_codes(codes, bits), bits, out)
    assert (out == codes).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_those_of_compressed_tensors(bits):
    """Where a row fills whole 32-bit words: `weight_packed` of the pack-quantized format, codes less their offset."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for words in (1, 2, 5):
        codes = random_codes(3, words * 32 // math.gcd(32, bits), bits)
        assert codes.shape[1] * bits % 32 == 0
        signed = (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8)
        theirs = helpers.pack_to_int32(torch.from_numpy(signed), bits)
        assert packed_codes(codes, bits).tobytes() == theirs.numpy().astype("<i4").tobytes()


def random_columns(n, m, unused, rows=3):
    """int32 [rows, n], ascending; with `unused`, row 0 uses every slot it can, row 1 none, the others some."""
    draw = np.random.default_rng(n * 1000 + m)
    columns = np.stack([np.sort(draw.permutation(m)[:n]) if n <= m else np.r_[:m, [m] * (n - m)] for _ in range(rows)])
    if unused:
        columns[1] = m
        columns[2, n // 2 :] = m
    return columns.astype(np.int32)


POSITIONS = [
    (n, m, unused)
    for n, m in [(1, 1), (1, 2), (1, 61), (3, 7), (13, 128), (61, 61), (6, 129), (64, 129), (1, 4096), (40, 4096)]
    for unused in (False, True)
]


@pytest.mark.parametrize(("n", "m", "unused"), POSITIONS)
def test_positions_equal_reference(n, m, unused):
    columns = random_columns(n, m, unused)
    parts = pack_positions(columns, m, unused)
    expected = reference.pack_positions(torch.from_numpy(columns).long(), m, unused)
    assert {part: data.tolist() for part, data in parts.items()} == {
        part: data.tolist() for part, data in expected.items()
    }
    assert {part: data.shape[1] for part, data in parts.items()} == position_bytes(n, m, unused)
    assert (unpack_positions(parts, n, m, unused) == columns).all()


def test_golden_positions():
    """Columns 1, 2, 9 of 16: l = 2, low 01 10 01, high has bits (0 + 0), (0 + 1), (2 + 2) of 8 bits."""
    columns = np.array([[1, 2, 9]], np.int32)
    assert pack_positions(columns, 16, False)["bitmap"].tolist() == [[0b00000110, 0b00000010]]
    parts = pack_positions(columns, 16, True)
    assert {part: data.tolist() for part, data in parts.items()} == {"low": [[0b011001]], "high": [[0b10011]]}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_positions_round_trip(data):
    m = data.draw(st.integers(1, 300))
    columns = sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1)))
    idle = data.draw(st.integers(0, 5))
    n = len(columns) + idle
    columns = np.array([columns + [m] * idle], np.int32)
    parts = pack_positions(columns, m, idle > 0)
    assert (unpack_positions(parts, n, m, idle > 0) == columns).all()


def test_positions_are_small():
    """n log2(m / n) + 2 n bits, where n log2(m / n) + 1.44 n are the least for sparse sets; and the roundings to bytes."""
    for n, m in [(1, 61), (10, 1000), (77, 1536), (154, 1536), (41, 4096)]:
        least = math.log2(math.comb(m, n))
        assert 8 * sum(position_bytes(n, m, False).values()) < least + 0.6 * n + 2 * 8 + math.log2(m)


@pytest.mark.parametrize("unused", [False, True])
def test_damaged_high_bits(unused):
    """Any one flipped bit of high leaves n - 1 or n + 1 positions."""
    columns = np.array([[1, 2, 30], [4, 5, 39], [0, 20, 21]], np.int32)
    size = position_bytes(3, 40, unused)["high"]
    for bit in range(8 * size):
        parts = pack_positions(columns, 40, unused)
        parts["high"][1, bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="^row 11: positions are not 3 ascending columns"):
            unpack_positions(parts, 3, 40, unused, first_row=10)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        pytest.param([4, 4, 39], False, id="twice"),
        pytest.param([4, 4, 39], True, id="twice, unused slots allowed"),
        pytest.param([5, 4, 39], True, id="descending"),
        pytest.param([4, 5, 41], False, id="m, no unused slots allowed"),
        pytest.param([4, 5, 42], True, id="above m"),
        pytest.param([4, 41, 40], True, id="after an unused slot"),
    ],
)
def test_positions_that_are_no_set(row, unused):
    columns = np.array([[1, 2, 30], row, [0, 20, 21]])
    low, high = reference.pack_elias_fano(torch.from_numpy(columns), 41, low_bits=low_bits(3, 41))
    with pytest.raises(ValueError, match="^row 1: positions are not 3 ascending columns of 0"):
        unpack_positions({"low": low.numpy(), "high": high.numpy()}, 3, 41, unused)


@pytest.mark.parametrize(
    "bits", [[0], [3], [61], [0, 63]], ids=["too few", "too many", "beyond the row", "moved there"]
)
def test_damaged_bitmap(bits):
    columns = np.tile(np.arange(0, 61, 2, dtype=np.int32), (3, 1))
    parts = pack_positions(columns, 61, False)
    for bit in bits:
        parts["bitmap"][2, bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="^row 7: bitmap has"):
        unpack_positions(parts, 31, 61, False, first_row=5)
