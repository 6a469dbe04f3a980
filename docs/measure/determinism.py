"""Whether accidents of timing ever reach a byte: conversions under stress, many times over.

    python docs/measure/determinism.py --rounds 200

A small model with a layer for every codec and dtype (tests/test_determinism.py) is compressed, restored, sparsified, quantised and upcycled by
16 threads that change at every turn and sleep at random where they read, write, hash and let go, with blocks of another size
each time; and two conversions run at once from one open source. A round is each of them once, under one seed; the bytes are
compared with those of one thread. Prints how often each was equal, and ends with 1 if one was not, its seed named.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from command import contents, done
from test_determinism import NAMES, Place, stressed

import ders_cli.convert_group
import ders_cli.source
from ders_cli import convert
from ders_cli.output import Options
from ders_cli.recipe import load_recipe
from ders_cli.report import print_table

TWO = "two at once"


def equal(place: Place, name: str, out: Path) -> bool:
    """Run one of the commands, or two conversions at once; whether the bytes are those expected."""
    if name != TWO:
        done(*place.commands[name], "-o", out, "-q", "-j", 16)
        return contents(out) == place.expected[name]
    recipe = load_recipe(str(place.recipe), {})
    with ders_cli.source.open_source(place.moe) as source, ThreadPoolExecutor(2) as pool:
        planned = [convert.prepare(source, recipe, out / str(i), Options(8, 3000)) for i in range(2)]
        list(pool.map(convert.run, planned))
    return all(contents(out / str(i)) == place.expected["compress"] for i in range(2))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    table: dict[str, dict[str, Any]] = {name: {"equal": 0, "not": [], "seconds": 0.0} for name in (*NAMES, TWO)}
    folder = Path(tempfile.mkdtemp(prefix="determinism-"))
    place = Place(folder)
    with stressed() as seed:
        for number in range(args.rounds):
            dice = random.Random(number)
            ders_cli.convert_group.MEAN_BYTES = dice.choice((1, 333, 1 << 25))
            ders_cli.convert_group.BLOCK_WEIGHTS = ders_cli.source.BLOCK_WEIGHTS = dice.choice((1, 33, 1 << 18))
            for name, row in table.items():
                seed(number)
                began = time.perf_counter()
                same = equal(place, name, folder / "out")
                row["seconds"] += time.perf_counter() - began
                row["equal"] += same
                row["not"] += [] if same else [number]
                shutil.rmtree(folder / "out")
    shutil.rmtree(folder)
    rows = [
        [name, f"{row['equal']}", f"{len(row['not'])}", f"{row['seconds']:.0f}", ", ".join(map(str, row["not"][:5]))]
        for name, row in table.items()
    ]
    print_table(f"{args.rounds} rounds", ["", "equal", "not", "seconds", "seeds of those not"], rows)
    return 1 if any(row["not"] for row in table.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
