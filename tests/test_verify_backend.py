"""`ders verify --backend`: outputs by kernels, held to the decoded experts; wrong kernels are found."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import ROOT, ders, done
from ders_kernels import dispatch

from ders_cli import verify as verification
from ders_cli.compare import random_states
from ders_cli.source import open_source

DELTAS = {"int4": "int4", "rank": "rank3", "drop": "drop0.5", "ternary": "ternary0.1", "chain": "int1+rank2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backends")
    toy.make("mixtral", root / "source", dtype=torch.bfloat16, hidden_size=40, intermediate_size=48)
    (root / "mixed.yaml").write_text("delta: int4\nrules:\n  - {projections: [gate], delta: exact}\n")
    for name, delta in (DELTAS | {"exact": "exact"}).items():
        done("compress", root / "source", "--delta", delta, "-o", root / name, "-q")
    done("compress", root / "source", "--recipe", root / "mixed.yaml", "-o", root / "mixed", "-q")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each has to run here, triton in its interpreter; but there is no triton off Linux."""
    if request.param == "triton" and sys.platform != "linux":
        pytest.skip("triton is for Linux")
    return request.param


@pytest.mark.parametrize("name", [*DELTAS, "mixed"])
def test_clean(folders, backend, name):
    plain = done("verify", folders[name], folders["source"], "--json").json
    report = done("verify", folders[name], folders["source"], "--backend", backend, "--json").json
    kernels = report["kernels"]
    assert kernels["backend"] == backend and len(kernels["experts"]) == 6
    # 48 products of fp32 in another order, relative; a GPU's tf32 would be 2^-11 of what a delta adds, here 5 % of y
    assert max(e["distance"] for e in kernels["experts"]) < (1e-6 if backend != "triton" else 5e-5)
    for here, there in zip(report["experts"], plain["experts"], strict=True):
        assert {k: v for k, v in here.items() if not k.startswith("output")} == {
            k: v for k, v in there.items() if not k.startswith("output")
        }
        # the same error, but for the rounding of W to bf16: 2^-9.2 of y, where the error is above 5e-3 of y. `mixed` is
        # nearer to y, and the decoded side has rounded gates in both
        assert here["output"] == pytest.approx(there["output"], rel=0.5)


def test_outputs_by_hand(folders, backend):
    """The reported output error is that of base + decoded delta, not rounded to bf16."""
    report = done("verify", folders["int4"], "--against", folders["source"], "--backend", backend, "--json").json
    x = random_states(0, 1, 16, 40).astype(np.float64)
    with open_source(folders["int4"]) as tested, open_source(folders["source"]) as original:

        def whole(source, group, member):
            return np.concatenate([_wide(source.read(group, member, rows)) for rows in source.blocks(group)])

        def apart(source, group, member):
            codec, rows = source.codecs[group.name], slice(0, group.shape[0])
            parts = source._parts(group, codec, member, rows)
            return _wide(source.read_base(group, rows)) + codec.decode(parts, group.shape, 0, 0)

        y, rounded, expected = (
            _ffn(x, {g.projection: make(s, g, 2) for g in s.groups if g.layer == 1})
            for make, s in ((apart, tested), (whole, tested), (whole, original))
        )
    found = next(e["output"] for e in report["experts"] if e["layer"] == 1 and e["expert"] == "2")
    near = 1e-4 if backend != "triton" else 1e-2  # fp32; tf32 moves an error by 2^-11 of the delta it is an error of
    assert found == pytest.approx(np.linalg.norm(y - expected) / np.linalg.norm(expected), rel=near)
    assert found != pytest.approx(np.linalg.norm(rounded - expected) / np.linalg.norm(expected), rel=1e-3)


def _wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _ffn(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    gate, up = x @ w["gate"].T, x @ w["up"].T
    return gate / (1 + np.exp(-gate)) * up @ w["down"].T


def test_alone_and_without_a_gate(folders, backend, tmp_path):
    """No reference is needed; relu2 without a gate; a layer's experts that all agree."""
    toy.make("nemotron_h", tmp_path / "source", dtype=torch.bfloat16)
    done("compress", tmp_path / "source", "--delta", "int8", "-o", tmp_path / "out", "-q")
    report = done("verify", tmp_path / "out", "--backend", backend, "--json").json
    assert len(report["kernels"]["experts"]) == 3 and report["experts"] == []
    assert all(0 < e["distance"] <= e["allowed"] < 1e-3 for e in report["kernels"]["experts"])


def test_what_has_no_kernels_is_decoded_and_named(folders, backend):
    ran = done("verify", folders["mixed"], "--backend", backend)
    assert "2 groups: exact: deltas are counted in steps" in ran.out and "6 experts' outputs" in ran.out
    decoded = done("verify", folders["mixed"], "--backend", backend, "--json").json["kernels"]["decoded"]
    assert list(decoded) == [f"model.layers.{layer}.mlp.experts.gate_proj" for layer in (0, 1)]
    kernels = done("verify", folders["exact"], folders["source"], "--backend", backend, "--json").json["kernels"]
    assert kernels["experts"] == [] and len(kernels["decoded"]) == 6


def _narrowed(bits: int):
    """x rounded to so many bits, the first not stored: 8 is bf16, 11 tf32."""

    def change(x, delta, expert):
        unit = 2 ** (torch.frexp(x).exponent - bits).double()
        return (x.double() / unit).round().mul(unit).float(), delta, expert

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x, delta, expert: (x, delta, (expert + 1) % 3), True),
        (lambda x, delta, expert: (x * 1.003, delta, expert), True),  # less than bf16's rounding of W does
        (_narrowed(8), True),
        (_narrowed(11), False),
    ],
    ids=["another expert's delta", "a delta 0.3 % too large", "bf16 states", "tf32 states"],
)
def test_wrong_kernels_are_found(folders, monkeypatch, change, found):
    right = dispatch.delta_matmul
    monkeypatch.setattr(
        dispatch, "delta_matmul", lambda x, delta, expert, backend: right(*change(x, delta, expert), backend=backend)
    )
    for reference in ([], [folders["source"]]):
        ran = ders("verify", folders["int4"], *reference, "--backend", "reference", "--json")
        problems = [f["problem"] for f in ran.json["findings"]]
        assert ran.code == (3 if found else 0), ran
        assert len(problems) == (6 if found else 0)
        assert all("kernels (reference) differ from the decoded expert: " in problem for problem in problems)


def test_one_wrong_expert_is_named(folders, monkeypatch):
    right = dispatch.delta_matmul
    monkeypatch.setattr(
        dispatch, "delta_matmul", lambda x, delta, expert, backend: right(x, delta, expert, backend) * (expert != 1)
    )
    ran = ders("verify", folders["int4"], "--backend", "reference", "--json")
    assert [f["where"] for f in ran.json["findings"]] == [f"model.layers.{i}.mlp.experts, expert 1" for i in (0, 1)]


def test_an_output_that_is_no_number(folders, monkeypatch):
    right = dispatch.delta_matmul
    monkeypatch.setattr(
        dispatch, "delta_matmul", lambda x, delta, expert, backend: right(x, delta, expert, backend) * float("nan")
    )
    ran = ders("verify", folders["int4"], "--backend", "reference")
    assert ran.code == 3 and "kernels (reference) differ" in ran.out


def test_bounds_are_on_the_kernels_outputs(folders, monkeypatch):
    arguments = ("verify", folders["int4"], folders["source"], "--max-output-error", 0.04, "--backend", "reference")
    done(*arguments)
    right = dispatch.delta_matmul
    monkeypatch.setattr(dispatch, "delta_matmul", lambda x, delta, expert, backend: -right(x, delta, expert, backend))
    assert "output error" in ders(*arguments).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("source", "--backend", "reference"), "plain checkpoint, which has nothing packed"),
        (("int4", "--backend", "cpu"), "backend cpu: not on this day"),
        (("int4", "--backend", "reference", "--no-output"), "--no-output"),
        (("int4", "--backend", "gpu"), "gpu"),
    ],
)
def test_usage_is_2_before_any_work(folders, monkeypatch, arguments, said):
    monkeypatch.setattr(verification, "intact", lambda *_: pytest.fail("worked"))
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", "refusing")
    monkeypatch.setitem(sys.modules, "refusing", importlib.import_module("types").ModuleType("refusing"))
    sys.modules["refusing"].refuses = lambda op, x, deltas: "not on this day"
    ran = ders("verify", folders[arguments[0]], *arguments[1:])
    assert ran.code == 2 and said in ran.err, ran


def test_hidden_states_without_a_reference(folders, tmp_path):
    toy.save_file({"hidden_states": torch.randn(5, 41)}, tmp_path / "h.safetensors")
    ran = ders("verify", folders["int4"], "--backend", "reference", "--hidden", tmp_path / "h.safetensors")
    assert ran.code == 2 and "expected width 40" in ran.err


def test_auto_says_what_it_took(folders, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", {"reference": dispatch.BACKENDS["reference"]})
    monkeypatch.setattr(dispatch, "_said", set())
    ran = done("verify", folders["int4"], "--backend", "auto")
    assert ran.err.count("ders: delta_matmul on") == 1 and "reference │ 6 experts' outputs" in ran.out


def test_without_it_no_torch(folders):
    code = "import sys; from ders_cli.app import main; sys.argv = ['ders', *sys.argv[1:]]\ntry: main()\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, "verify", str(folders["int4"]), str(folders["source"]), "-q"],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "False" and "all well" in ran.stdout, ran
