"""The gate of docs/measure/aot.py: every kernel passes it, and planted bad ones fail, each with its reason.

The kernels of this process may be the interpreter's, so the script always runs in its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

SHARED = """
import triton
import triton.language as tl
from ders_kernels.triton_ops.config import Case, Config


def case(name, kernel, config, dots=True, **constants):
    pointers = {"x": "bf16", "weight": "bf16", "y": "fp32"}
    tile = {"TOKENS": config.tokens, "ROWS": config.rows, "COLUMNS": config.columns}
    constants |= {name: size for name, size in tile.items() if name in kernel.arg_names}
    return Case(name, kernel, config, {k: v for k, v in pointers.items() if k in kernel.arg_names}, constants, dots)


@triton.jit
def product(x, weight, y, width, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token, row, column = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, COLUMNS):
        values = tl.load(weight + row[:, None] * width + first + column[None, :])
        acc = tl.dot(values, tl.load(x + token[None, :] * width + first + column[:, None]), acc)
    tl.store(y + token[None, :] * ROWS + row[:, None], acc)


@triton.jit
def grown(value, times):
    positive = value > 0
    for _ in range(times):
        value = tl.where(positive, value * value + value, value * 3)
    return value


@triton.jit
def lanes(y, times, COLUMNS: tl.constexpr):
    at = y + tl.arange(0, COLUMNS)
    tl.store(at, grown(tl.load(at), times))
"""
GOOD = """
CASES = (
    case("16 rows", product, Config(16, 16, 64, 4, 3)),
    case("64 rows", product, Config(16, 64, 64, 4, 3)),
    case("no product", lanes, Config(0, 0, 1024, 4, 1), dots=False),
)
"""
BAD = """
@triton.jit
def forgotten(y):
    tl.store(y, 0.0)


@triton.jit
def by_lanes(x, weight, y, width, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token, row, column = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(weight + row[:, None] * width + column[None, :]).to(tl.float32)
    inputs = tl.load(x + token[:, None] * width + column[None, :]).to(tl.float32)
    tl.store(y + token[None, :] * ROWS + row[:, None], tl.sum(values[:, None, :] * inputs[None, :, :], axis=2))


@triton.jit
def misspelled(y):
    tl.store(y, no_such_name)


CASES = (
    case("many live values", lanes, Config(0, 0, 1 << 15, 1, 1), dots=False),
    case("long columns", product, Config(64, 64, 512, 4, 4)),
    case("lane by lane", by_lanes, Config(16, 16, 16, 4, 1)),
    case("misspelled", misspelled, Config(0, 0, 0, 4, 1), dots=False),
)
"""


def gate(*arguments: str, path: Path | None = None, interpret: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT / "kernels", *([path] if path else [])]))
    if interpret:
        found["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(ROOT / "docs" / "measure" / "aot.py"), *arguments]
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def plant(folder: Path, name: str, code: str) -> Path:
    """A package of one module."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (folder / name / "planted.py").write_text(SHARED + code)
    return folder


def test_every_kernel_passes_and_the_page_says_so():
    code, _, said = gate("--check", str(ROOT / "docs" / "kernels.md"))
    assert code == 0, said


def test_good_kernels_and_their_page(tmp_path):
    """Matrix instructions are those that the tile allows; --check sees a page that says something else."""
    plant(tmp_path, "good", GOOD)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- aot.py: begin -->\nold\n<!-- aot.py: end -->\nafter\n")
    code, _, said = gate("--package", "good", "--write", str(page), path=tmp_path)
    assert code == 0, said
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    small, large, none = [line.split("|")[3:6] for line in text.splitlines() if "w4" in line]
    assert [cell.split()[2].strip(",") for cell in small] == ["mma", "mma", "mfma"]
    assert [cell.split()[2].strip(",") for cell in large] == ["mma", "wgmma", "mfma"]
    assert all(cell.strip().startswith("ok") and "mma" not in cell and "mfma" not in cell for cell in none)

    page.write_text(text.replace("64 rows", "65 rows"))
    code, _, said = gate("--package", "good", "--check", str(page), path=tmp_path)
    assert code == 1 and "page: -product: 65 rows" in said and "page: +product: 64 rows" in said

    page.write_text(text.replace(" mma,", " wgmma,", 1))
    code, _, said = gate("--package", "good", "--check", str(page), "--only", "16 rows", path=tmp_path)
    assert code == 1 and "page: -product: 16 rows" in said and "65 rows" not in said


@pytest.mark.slow
def test_bad_kernels(tmp_path):
    """Each fails, with its reason, on each target that it is bad for."""
    code, _, said = gate("--package", "bad", path=plant(tmp_path, "bad", BAD))
    assert code == 1

    def wrong(case: str) -> dict[str, str]:
        lines = [line for line in said.splitlines() if line.startswith("FAIL") and case in line]
        return {target: line for line in lines for target in ("sm_80", "sm_90a", "gfx942") if f" {target}:" in line}

    assert "bad.planted.forgotten: no case in CASES" in said and "grown" not in said
    spilled = wrong("many live values")
    assert all("spills" in spilled[target] for target in ("sm_80", "sm_90a")), spilled
    assert "bytes of scratch" in spilled["gfx942"] or "vector registers" in spilled["gfx942"], spilled
    large = wrong("long columns")
    assert "of shared memory of 166,912" in large["sm_80"]
    assert "of shared memory of 232,448" in large["sm_90a"]
    assert "of shared memory of 65,536" in large["gfx942"]
    lanes = wrong("lane by lane")
    assert "no matrix instructions where mma is expected" in lanes["sm_80"] and "mma" in lanes["sm_90a"]
    assert "no matrix instructions where mfma is expected" in lanes["gfx942"]
    assert all("no_such_name" in line for line in wrong("misspelled").values()) and len(wrong("misspelled")) == 3


def test_refuses_the_interpreter():
    code, _, said = gate(interpret=True)
    assert code == 1 and "unset it" in said


def test_nothing_to_compile_is_no_pass(tmp_path):
    code, _, said = gate("--package", "good", "--only", "no such case", path=plant(tmp_path, "good", GOOD))
    assert code == 1 and "no case in good with 'no such case'" in said
