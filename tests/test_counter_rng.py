"""The counter generator: published known answers, the same words wherever a draw begins."""

import independent_reader
import numpy as np
import pytest
import torch
from ders_kernels import reference
from ders_kernels.counter_rng import draw, make_key
from hypothesis import example, given
from hypothesis import strategies as st

PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
# key, element, draw: our own known answers
DRAWS = [
    (0x0, 0, 0x6627E8D5),
    (0x0, 3, 0x9B00DBD8),
    (0x1, 4, 0xAC08141B),
    (0x7, 60, 0x05C502BF),
    (0xFFFFFFFF, 61, 0x94AF24DD),
    (0x100000000, 1022, 0xD92EF1CB),
    (0x8000000000000000, 5, 0x2903D316),
    (0x800000000000000B, 4095, 0xFA20A598),
    (0xFFFFFFFFFFFFFFFF, 2, 0x9F41B01F),
    (0x299F31D0A4093822, 99999, 0x96FAD8A3),
]
KEYS = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x299F31D0A4093822]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, words):
    """Random123, tests/kat_vectors, philox 4x32 10: counter and key words lowest first."""
    assert " ".join(f"{word:08x}" for word in reference.philox_block(counter, key)) == words


def test_known_answer_of_the_compiled_form():
    assert [f"{word:08x}" for word in draw(0, 0, 4)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize(("key", "element", "drawn"), DRAWS)
def test_our_known_answers(key, element, drawn):
    """In plain torch, compiled, and in the numpy of a reader that was written from docs/format.md."""
    assert int(reference.draws(key, element, 1)) == drawn
    assert int(draw(key, element, 1)[0]) == drawn
    assert int(independent_reader.draw(element + 1, key)[element]) == drawn


def by_triton(key: int, rows: int, width: int, aligned: bool, device: str) -> torch.Tensor:
    """Draws of a matrix, in tiles of 32 columns: int64 [rows, width]."""
    draws = pytest.importorskip("ders_kernels.triton_ops.draws")
    out = torch.full((rows, width), -1, device=device)
    keys = torch.tensor([key - (key >> 63 << 64)], device=device)
    draws.fill[(rows, -(-width // 32))](keys, out, width, COLUMNS=32, ALIGNED=aligned)
    return out.cpu()


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("key", "element", "drawn"), [known for known in DRAWS if known[1] < 100])
def test_our_known_answers_by_triton(key, element, drawn, aligned, device):
    assert int(by_triton(key, 1, 64, aligned, device)[0, element]) == drawn


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 32, 61, 64, 68])
def test_triton_equals_reference(key, width, device):
    """A row begins within a block of four where the width is no multiple of 4; else the four are taken at once."""
    expected = reference.draws(key, 0, 5 * width).reshape(5, width)
    for aligned in [False] + [True] * (width % 4 == 0):
        assert torch.equal(by_triton(key, 5, width, aligned, device), expected)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 61, 2**34 - 5, 2**34 * 5 + 7, 2**63 - 3])
def test_compiled_equals_reference(key, first):
    """2^34 elements are 2^32 blocks: from there on the counter's second word is in use."""
    for count in (0, 1, 2, 3, 4, 5, 11):
        drawn = draw(key, first, count)
        assert drawn.dtype == np.uint32
        assert drawn.tolist() == reference.draws(key, first, count).tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 40), st.integers(0, 40))
@example(0, 0, 3, 5)
def test_a_draw_does_not_depend_on_where_it_begins(key, first, skipped, count):
    assert (draw(key, first, skipped + count)[skipped:] == draw(key, first + skipped, count)).all()


def test_draws_are_uniform():
    """2^16 draws: mean and each bit's share of ones within 5 standard deviations of a half."""
    drawn = draw(make_key(0, "group", "0"), 0, 1 << 16)
    assert abs((drawn * 2.0**-32).mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 2**8
    ones = np.array([(drawn >> np.uint32(bit) & np.uint32(1)).mean() for bit in range(32)])
    assert abs(ones - 0.5).max() < 5 * 0.5 / 2**8


def test_make_key():
    """printf 7/model.layers.0.mlp.gate_proj/3 | sha256sum, its first 8 bytes, lowest first."""
    assert make_key(7, "model.layers.0.mlp.gate_proj", "3") == 0x649ED3CA477A1BFA
    keys = {make_key(seed, group, label) for seed in (0, 1) for group in ("a", "b") for label in ("0", "1", "10")}
    assert len(keys) == 12
