"""docs/measure/traffic.py counts what is counted here by hand; in its own process, whose kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def count(folder: Path, code: str) -> str:
    """Run some code after `import traffic`; what it prints."""
    script = folder / "counted.py"  # Triton reads a kernel's source from its file
    script.write_text("import traffic, torch, triton\nimport triton.language as tl\n" + code)
    paths = [ROOT, ROOT / "kernels", ROOT / "docs" / "measure"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_and_stores_by_hand(tmp_path):
    """3 programs; each loads 4 of x twice, in one load, and 3 of 4 lanes of its own; and stores 4."""
    printed = count(
        tmp_path,
        """
@triton.jit
def three(x, own, y):
    lane = tl.arange(0, 4)
    twice = tl.load(x + (tl.arange(0, 8) % 4))
    some = tl.load(own + tl.program_id(0) * 4 + lane, mask=(lane < 4) & (lane > 0), other=0)
    tl.store(y + tl.program_id(0) * 4 + lane, some.to(tl.float32) + tl.sum(twice))

x, own, y = torch.ones(4), torch.ones(12, dtype=torch.bfloat16), torch.empty(12)
with traffic.Watch() as watch:
    three[(3,)](x, own, y)
    y + x[:1]
    y.view(3, 4), y.T, torch.empty(5)
for one in watch.launches:
    print(one.kernel, dict(one.requested), dict(one.distinct))
print(watch.moved("requested"), watch.moved("distinct"), y.tolist()[:2])
""",
    )
    lines = printed.splitlines()
    # fp32 x: 4 values a program; bf16 own: 3 lanes; fp32 y: 4
    requested, distinct = "{'x': 48, 'own': 18, 'y': 48}", "{'x': 16, 'own': 18, 'y': 48}"
    assert lines[0] == f"three {requested} {distinct}"
    assert lines[1].startswith("torch add {'0': 48, '1': 4, '2': 48}") and len(lines) == 3  # views move nothing
    assert lines[2] == "214 182 [8.0, 9.0]"


def test_a_product_and_its_parts(tmp_path):
    """int4 [128, 256] bf16, 1 token: each stored byte once, x once for every row block, y once for every split."""
    printed = count(
        tmp_path,
        """
delta, size = traffic.packed("int4", 128, 256)
names, watch, least = traffic.of_product(delta, size, 1)
(one,) = watch.launches
blocks, rows, splits = (*one.programs, 1)[:3]
print(one.requested["codes"] + one.requested["words"], one.requested["scale"], one.requested["y"] / splits, size, least)
print(blocks, sum(n for name, n in one.requested.items() if name.startswith("x")) / rows)
""",
    )
    codes, scale, x, y = 128 * 128, 128 * 2 * 2, 256 * 2, 128 * 4
    assert printed.splitlines()[0] == f"{codes} {scale} {float(y)} {codes + scale} {codes + scale + x + y}"
    assert printed.splitlines()[1] == f"1 {float(x)}"


@pytest.mark.parametrize("codec", ["int4", "2:4", "drop0.5", "ternary0.1", "rank4"])
def test_some_rows_stand_for_all(tmp_path, codec):
    """A layer of which 64 rows are run moves what it moves with all rows; by one and by five tokens of an expert."""
    printed = count(
        tmp_path,
        f"""
traffic.EXPERTS, inner, hidden, moved = 2, 256, 128, []
for rows in (64, None):
    traffic.Watch.__init__.__defaults__ = (rows,)
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    layer, sizes = zip(*(traffic.packed({codec!r}, *shape) for shape in shapes))
    for tokens in (1, 5):
        watch, least, stock = traffic.of_layer(layer, sizes, tokens, 2)
        moved.append([one for one in watch.launches if one.kernel not in traffic.BEFORE_THE_FIRST_TOKEN])
        assert least < watch.moved("distinct") <= watch.moved("requested")
for some, every in zip(moved[:2], moved[2:]):
    assert [one.kernel for one in some] == [one.kernel for one in every]
    for one, all_of_it in zip(some, every):
        for name, size in all_of_it.requested.items():
            print(size, one.requested[name], all_of_it.distinct[name], one.distinct[name], one.kernel, name)
""",
    )
    for line in printed.splitlines():
        requested, ours, distinct, our_distinct = map(int, line.split()[:4])
        # drop0.5 draws other columns in other rows: lanes of a load that hit one element are a few more or fewer
        off = 0.01 if codec == "drop0.5" else 0
        assert ours == pytest.approx(requested, rel=off) and our_distinct == pytest.approx(distinct, rel=off), line
    assert len(printed.splitlines()) > 50
