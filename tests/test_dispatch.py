"""Who runs an operation: refusals with their reasons, what `auto` passes by, and that it says so once."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from ders_kernels import dispatch
from ders_kernels.deltas import LowRank

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
    with pytest.raises(dispatch.Refused, match="needs triton; pip install"):
        _ran("triton")


def test_choose_names_the_module_that_runs(fakes):
    assert dispatch.choose("delta_matmul", "auto", X, DELTA).__name__ == "fake_first"


def test_the_command_lines_choices():
    assert list(Backend) == ["auto", *dispatch.BACKENDS]


def test_reference_takes_anything():
    assert dispatch.delta_matmul(X, DELTA, 0, backend="reference").tolist() == [[3, 3]]
