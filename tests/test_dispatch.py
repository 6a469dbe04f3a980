"""Who runs an operation: refusals with their reasons, what `auto` passes by, and that it says so once."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from ders_kernels import dispatch
from ders_kernels.deltas import Ints, LowRank, Projection

from ders_cli.backends import Backend, choices_shown

X = torch.ones(1, 3)
DELTA = LowRank(torch.ones(1, 2, 1), torch.ones(1, 1, 3))  # D is [2, 3], all ones


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Backends `first` and `second`; what each says to refuse. Their products are full of 1 and of 2."""
    reasons = {"first": "", "second": ""}
    for number, name in enumerate(reasons, 1):
        module = ModuleType(f"fake_{name}")
        module.refuses = lambda op, x, deltas, name=name: reasons[name]
        module.delta_matmul = lambda x, delta, expert, number=number: torch.full((1, 2), float(number))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "BACKENDS", {name: f"fake_{name}" for name in reasons})
    monkeypatch.setattr(dispatch, "_said", set())
    return reasons


def _ran(backend: str = "auto") -> int:
    return int(dispatch.delta_matmul(X, DELTA, 0, backend=backend)[0, 0])


def test_unknown(fakes):
    with pytest.raises(dispatch.Refused, match="'cuda': expected auto, first, second"):
        _ran("cuda")


def test_one_asked_for_runs_or_says_why(fakes):
    assert _ran("second") == 2
    fakes["second"] = "no such luck"
    with pytest.raises(dispatch.Refused, match="delta_matmul: backend second: no such luck"):
        _ran("second")  # and doesn't fall back to `first`


def test_auto_takes_the_first_that_runs(fakes):
    assert _ran() == 1
    fakes["first"] = "not today"
    assert _ran() == 2
    fakes["second"] = "nor I"
    with pytest.raises(dispatch.Refused, match="no backend runs this; first: not today; second: nor I"):
        _ran()


def test_auto_says_once_what_it_took_and_why(fakes, caplog):
    caplog.set_level(logging.INFO, "ders_kernels.dispatch")
    fakes["first"] = "not today"
    _ran(), _ran()
    assert caplog.messages == ["delta_matmul on cpu: second (first: not today)"]
    _ran("second")  # asked for: nothing to say
    fakes["first"] = ""
    _ran()
    assert caplog.messages[1:] == ["delta_matmul on cpu: first"]


def test_on_stderr(fakes, capsys):
    for quiet, lines in ((True, ""), (False, "ders: delta_matmul on cpu: first\n")):
        dispatch._said.clear()
        with choices_shown(quiet):
            _ran(), _ran()
        assert capsys.readouterr().err == lines and not logging.getLogger(dispatch.__name__).handlers
    dispatch._said.clear()
    _ran()
    assert not capsys.readouterr().err  # a library stays silent


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # its import fails
    with pytest.raises(dispatch.Refused, match="needs triton, which there is for Linux; pip install"):
        _ran("triton")


def test_choose_names_the_module_that_runs(fakes):
    assert dispatch.choose("delta_matmul", "auto", X, DELTA).__name__ == "fake_first"


def test_the_command_lines_choices():
    assert list(Backend) == ["auto", *dispatch.BACKENDS]


def test_reference_takes_anything():
    assert dispatch.delta_matmul(X, DELTA, 0, backend="reference").tolist() == [[3, 3]]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_what_does_not_fit_is_said_before_any_backend_runs(backend):
    x, base, index, gates = torch.ones(2, 8), torch.ones(4, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    delta = Ints(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 1, dtype=torch.bfloat16), 4, 8, 8)
    for expert in (-1, 2):
        with pytest.raises(IndexError, match=r"expected 0 \.\.\. 1"):
            dispatch.delta_matmul(x, delta, expert, backend=backend)
    with pytest.raises(ValueError, match=r"x: expected \[2, 8\], found \[2, 7\]"):
        dispatch.delta_matmul(x[:, :7], delta, 0, backend=backend)
    with pytest.raises(ValueError, match=r"base: expected \[4, 8\], found \[3, 8\]"):
        dispatch.synthesize(base[:3], delta, 0, backend=backend)
    up, down = Projection(base, delta), Projection(base.T.contiguous(), None)
    with pytest.raises(ValueError, match="activation 'tanh': expected silu"):
        dispatch.moe_forward(x, index, gates, None, up, down, "tanh", backend=backend)
    with pytest.raises(ValueError, match=r"down's base: expected \[8, 4\], found \[4, 8\]"):
        dispatch.moe_forward(x, index, gates, None, up, up, backend=backend)
    with pytest.raises(ValueError, match=r"gates: expected \[2, 1\], found \[2, 2\]"):
        dispatch.moe_forward(x, index, gates.repeat(1, 2), None, up, down, backend=backend)


def test_gradients_are_the_references():
    """The compiled backends have none: named, they refuse; auto passes them by."""
    left, right = torch.ones(1, 4, 2, requires_grad=True), torch.ones(1, 2, 8)
    delta, x = LowRank(left, right), torch.ones(2, 8)
    with pytest.raises(dispatch.Refused, match="needs a gradient"):
        dispatch.delta_matmul(x, delta, 0, backend="cpu")
    dispatch.delta_matmul(x, delta, 0).sum().backward()
    assert left.grad is not None
    with torch.no_grad():
        assert dispatch.choose("delta_matmul", "cpu", x, delta).__name__ == dispatch.BACKENDS["cpu"]
