"""Take a MoE's experts apart into dense fine-tunes, upcycle them again, and compare with the MoE, bit for bit.

    python docs/measure/expert_from.py DENSE MOE WORK

Writes WORK/expert-0 ... (the dense model with expert e as its FFN), WORK/ders (`ders upcycle DENSE --expert-from ...
--delta exact`) and WORK/restored. Every tensor of WORK/restored but the routers has to be MOE's.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from ders_cli.checkpoint.reader import CheckpointReader
from ders_cli.checkpoint.writer import ShardWriter
from ders_cli.layouts import find_dense
from ders_cli.source import PlainSource


def take_apart(dense: Path, moe: Path, work: Path) -> list[Path]:
    """One dense checkpoint per expert."""
    folders = []
    with CheckpointReader(dense) as ancestor, PlainSource(moe) as source:
        for e in range(len(source.groups[0].members)):
            folder = work / f"expert-{e}"
            folder.mkdir(parents=True)
            shutil.copy(dense / "config.json", folder)
            writer = ShardWriter(folder / "model.safetensors", ancestor.tensors)
            replaced = {}
            for group in source.groups:
                view = find_dense(group, ancestor.tensors, ancestor.config)
                replaced[view.tensor] = group, view
            for name in ancestor.tensors:
                if name in replaced:
                    group, view = replaced[name]
                    rows = source.read(group, e, slice(0, group.shape[0]))
                    writer.write_view(name, view.offset, (view.row_stride, view.column_stride), 0, rows)
                else:
                    writer.write(name, 0, ancestor.read(name))
            writer.close()
            folders.append(folder)
    return folders


def main() -> None:
    dense, moe, work = map(Path, sys.argv[1:])
    folders = take_apart(dense, moe, work)
    ders = [sys.executable, "-m", "ders_cli"]
    asked = [argument for folder in folders for argument in ("--expert-from", str(folder))]
    subprocess.run([*ders, "upcycle", dense, *asked, "--delta", "exact", "-o", work / "ders", "-j", "2"], check=True)
    subprocess.run([*ders, "restore", work / "ders", "-o", work / "restored", "-q"], check=True)
    equal, different, routers = 0, [], 0
    with CheckpointReader(work / "restored") as mine, CheckpointReader(moe) as theirs:
        assert mine.tensors.keys() == theirs.tensors.keys(), mine.tensors.keys() ^ theirs.tensors.keys()
        for name in theirs.tensors:
            if name.endswith("gate.weight"):
                routers += 1
            elif np.array_equal(mine.read(name), theirs.read(name)):
                equal += 1
            else:
                different.append(name)
    print(
        f"{equal} tensors equal bit for bit, {len(different)} different {different[:5]}, {routers} routers not compared"
    )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
