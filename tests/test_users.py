"""Tensors are let go with the last expert that they hold, and work is foretold as far ahead as there are threads."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import toy
from command import done

from ders_cli.checkpoint.reader import CheckpointReader
from ders_cli.engines import local
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.plain import _pieces
from ders_cli.source import open_source
from ders_cli.users import Users


def _group(name: str, *tensors: str) -> ExpertGroup:
    members = tuple((str(i), MatrixView(tensor, (2, 3), 0, 3, 1)) for i, tensor in enumerate(tensors))
    return ExpertGroup(name, 0, name, "BF16", members)


def _tensors(group: ExpertGroup) -> list[str]:
    return list(dict.fromkeys(view.tensor for _, view in group.members))


def test_a_tensor_goes_with_its_last_group() -> None:
    gate, up, down = _group("gate", "fused", "fused"), _group("up", "fused", "fused"), _group("down", "a", "b")
    users = Users([gate, up, down], _tensors)
    for _ in range(2):  # a second run counts from the start
        assert users.done(gate, [0, 1]) == []
        assert users.done(down, [1]) == []
        assert users.done(down, [0]) == ["a", "b"]
        assert users.done(up, [1]) == []
        assert users.done(up, [0]) == ["fused"]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_ahead_by_as_many_as_run(jobs: int) -> None:
    events: list[int | str] = []
    tasks = [partial(events.append, number) for number in range(4)]
    local.run(tasks, jobs, lambda number: events.append(f"soon {number}"))
    assert sorted(e for e in events if isinstance(e, int)) == [0, 1, 2, 3]
    assert sorted(e for e in events if isinstance(e, str)) == [f"soon {number}" for number in range(jobs, 4)]
    if jobs == 1:
        assert events == ["soon 1", 0, "soon 2", 1, "soon 3", 2, 3]


def test_a_conversion_lets_every_tensor_go_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, gone = tmp_path / "source", []
    toy.make("mixtral", source, dtype=torch.bfloat16)
    monkeypatch.setattr(CheckpointReader, "done", lambda self, name: gone.append((self.folder.name, name)))
    done("compress", source, "-o", tmp_path / "packed", "-q", "-j", 2, "--max-shard-size", "30kB")
    with CheckpointReader(source) as reader:
        assert sorted(gone) == sorted((source.name, name) for name in reader.tensors)
    gone.clear()
    done("restore", tmp_path / "packed", "-o", tmp_path / "plain", "-q")
    with CheckpointReader(tmp_path / "packed") as reader:
        guards = {name for name, spec in reader.tensors.items() if spec.dtype == "U8" and ".delta." not in name}
        assert sorted(gone) == sorted(("packed", name) for name in reader.tensors if name not in guards)


@pytest.mark.parametrize(
    "name, jobs, tasks", [("mixtral", 1, 6), ("mixtral", 7, 12), ("mixtral", 99, 18), ("fused", 99, 4)]
)
def test_tasks_of_a_restored_file(tmp_path: Path, name: str, jobs: int, tasks: int) -> None:
    """Whole groups, or parts where there are more threads; matrices of one tensor stay together, and none is left out."""
    toy.make("mixtral" if name == "mixtral" else "gpt_oss", tmp_path / "source", dtype=torch.bfloat16)
    with open_source(tmp_path / "source") as source:
        held = defaultdict(list)
        for group in source.groups:
            for member, (_, view) in enumerate(group.members):
                held[view.tensor].append((group, member))
        pieces = _pieces(source.reader.tensors, held, jobs)
        assert len(pieces) == tasks
        found = [(group.name, member) for piece in pieces for group, members in piece.values() for member in members]
        assert sorted(found) == sorted((group.name, i) for group in source.groups for i in range(len(group.members)))
        tensors = [{g.members[m][1].tensor for g, members in piece.values() for m in members} for piece in pieces]
        assert sum(map(len, tensors)) == len(set().union(*tensors))  # no tensor is in two tasks


def test_done_from_many_threads() -> None:
    group = _group("gate", *map(str, range(400)))
    for _ in range(20):
        users = Users([group], _tensors)
        with ThreadPoolExecutor(8) as pool:
            gone = list(pool.map(lambda member, users=users: users.done(group, [member]), range(400)))
        assert [names for names in gone if names] and all(set(names) == set(_tensors(group)) for names in gone if names)
