"""Whether experts overlap in a tensor, by their strides alone, against a count of every element."""

import itertools

import numpy as np
import pytest

from ders_cli.layouts import MatrixView
from ders_cli.restore import _comb, _disjoint

E, I, H = 3, 5, 4


def _elements(view: MatrixView) -> list[int]:
    rows, columns = np.indices(view.shape)
    return (view.offset + rows * view.row_stride + columns * view.column_stride).reshape(-1).tolist()


def _view(offset: int, rows: int, columns: int, shape: tuple[int, int] = (I, H)) -> MatrixView:
    return MatrixView("t", shape, offset, rows, columns)


TILINGS = {
    "stacked": [_view(e * I * H, H, 1) for e in range(E)],
    "stacked transposed": [_view(e * I * H, 1, I) for e in range(E)],
    "fused": [_view((2 * e + up) * I * H, H, 1) for e in range(E) for up in (0, 1)],
    "fused transposed": [_view(2 * e * I * H + up * I, 1, 2 * I) for e in range(E) for up in (0, 1)],
    "interleaved": [_view(2 * e * I * H + up * H, 2 * H, 1) for e in range(E) for up in (0, 1)],
    "interleaved transposed": [_view(2 * e * I * H + up, 2, 2 * I) for e in range(E) for up in (0, 1)],
    "one row": [_view(e * H, H, 1, (1, H)) for e in range(E)],
    "one column": [_view(e * I, 1, 1, (I, 1)) for e in range(E)],
    "one element": [_view(e, 1, 1, (1, 1)) for e in range(E)],
    "interleaved elements of a row": [_view(up, 2, 2, (1, H)) for up in (0, 1)],
}


@pytest.mark.parametrize("form", TILINGS)
def test_every_layout_is_a_tiling(form: str) -> None:
    views = TILINGS[form]
    assert sorted(n for view in views for n in _elements(view)) == list(
        range(sum(v.shape[0] * v.shape[1] for v in views))
    )
    assert _disjoint([_comb(view) for view in views])
    for one in views:  # and one twice is not
        assert not _disjoint([_comb(view) for view in [*views, one]])


def test_no_overlap_is_missed() -> None:
    """All pairs of small matrices: what is called disjoint is disjoint."""
    forms = [
        _view(o, r, c, shape)
        for o in range(7)
        for r in (1, 2, 3, 4, 6)
        for c in (1, 2, 3)
        for shape in ((2, 3), (3, 2))
    ]
    found = 0
    for a, b in itertools.product(forms, repeat=2):
        if _disjoint([_comb(a), _comb(b)]):
            both = _elements(a) + _elements(b)
            assert len(set(both)) == len(both), (a, b)
            found += 1
    assert found > 100
