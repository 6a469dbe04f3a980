"""Headers are hostile until proven: each lie is refused with the file, the tensor and exit code 4."""

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ders_cli.checkpoint import json_text
from ders_cli.checkpoint.links import refuse_stray_links
from ders_cli.checkpoint.reader import CheckpointReader, parse_header, read_view
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter, header_text
from ders_cli.errors import CheckpointError, DersError


def _folder(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(begin: int, end: int, shape: list, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "empty file": (None, b"", None, "truncated"),
    "length past the end": (b"{}", b"", 99, "announced"),
    "huge length": (b"{}", b"", 2**63, "announced"),
    "not JSON": (b"{]", b"", None, "not JSON"),
    "not an object": (b"[]", b"", None, "expected a JSON object"),
    "twice the same name": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", None, "twice"),
    "deep nesting": (b"[" * 100_000, b"", None, "not JSON"),
    "hole": ({"a": _entry(0, 1, [1]), "b": _entry(2, 3, [1])}, b"123", None, "hole"),
    "overlap": ({"a": _entry(0, 2, [2]), "b": _entry(1, 3, [2])}, b"123", None, "overlap"),
    "past the end": ({"a": _entry(0, 9, [9])}, b"123", None, "complete"),
    "trailing bytes": ({"a": _entry(0, 1, [1])}, b"123", None, "complete"),
    "wrong size": ({"a": _entry(0, 3, [4])}, b"123", None, "takes 4 bytes"),
    "shape overflows": ({"a": _entry(0, 3, [2**62, 2**62])}, b"123", None, "takes"),
    "negative shape": ({"a": _entry(0, 3, [-3])}, b"123", None, "whole numbers"),
    "true as a number": ({"a": _entry(0, 1, [True])}, b"1", None, "whole numbers"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1", None, "[begin, end]"),
    "unknown dtype": ({"a": _entry(0, 1, [1], "U9")}, b"1", None, "unknown dtype"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(tmp_path: Path, lie: str) -> None:
    header, data, length, said = LIES[lie]
    if header is None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(data)
    else:
        _folder(tmp_path, header, data, length)
    with pytest.raises(CheckpointError) as refused:
        CheckpointReader(tmp_path)
    assert said in str(refused.value) and refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../model.safetensors"}, "file name"),
        ({"a": "/etc/passwd"}, "file name"),
        ({"a": 3}, "file name"),
        ({"a": "b\0.safetensors"}, "file name"),
        ({}, "weight_map"),
        ({"a": "none.safetensors"}, "missing"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "b: missing"),
        ({"b": "x.safetensors"}, "missing"),
    ],
)
def test_index_lies(tmp_path: Path, weight_map: dict, said: str) -> None:
    _folder(tmp_path, {"a": _entry(0, 1, [1])}, b"1")
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(tmp_path)


def test_model_beside_an_index_is_refused(tmp_path: Path) -> None:
    """transformers would silently load it instead of the shards."""
    _folder(tmp_path, {"a": _entry(0, 1, [1])}, b"1")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="transformers would load it"):
        CheckpointReader(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(data)
    try:
        CheckpointReader(folder).close()
    except DersError as error:
        assert "model.safetensors" in str(error)


def test_the_official_reader_agrees(tmp_path: Path) -> None:
    """What the writer writes, safetensors reads; the header is the one that safetensors would write."""
    from safetensors.numpy import load_file, save_file

    tensors = {
        "b": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "a": np.arange(4, dtype=np.int64),
        "none": np.zeros((0, 3), np.uint8),
    }
    dtypes = {"b": "U8", "a": "I64", "none": "U8"}
    specs = {name: TensorSpec(tensor.shape, dtypes[name]) for name, tensor in tensors.items()}
    writer = ShardWriter(tmp_path / "x.safetensors", {n: s for n, s in specs.items() if n != "none"}, ["none"])
    writer.write("a", 16, tensors["a"][2:])
    writer.write("b", 0, tensors["b"])
    writer.write("a", 0, tensors["a"][:2])
    writer.append("none", specs["none"], [])
    assert writer.close() == (tmp_path / "x.safetensors").stat().st_size
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert np.array_equal(tensor, tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "theirs.safetensors").read_bytes()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.safetensors").unlink()
    with CheckpointReader(tmp_path) as reader:
        header = reader.headers["theirs.safetensors"]
        assert header_text(header.tensors, header.metadata) == header.text == data[8 : 8 + len(header.text)]


def test_hashes_in_any_order(tmp_path: Path) -> None:
    """What comes in order is hashed on the way, the rest is read back; both are the hashes of the bytes that stand there."""
    data = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    orders = {
        "whole": [(0, 24)],
        "ordered": [(0, 3), (12, 17), (3, 6), (6, 12), (17, 18), (18, 24)],  # slices by turns, each from its front
        "across": [(0, 8), (8, 24)],
        "disordered": [(3, 6), (0, 3), (6, 12), (12, 18), (21, 24), (18, 21)],
        "gap": [(0, 2), (3, 6), (2, 3), (6, 24)],
    }
    specs = {name: TensorSpec(data.shape, "U8") for name in orders} | {"empty": TensorSpec((2, 0), "U8")}
    read_back = []

    class Spied(ShardWriter):
        def read_back(self, name: str, begin: int, out: np.ndarray) -> None:
            read_back.append((name, begin))
            super().read_back(name, begin, out)

    writer = Spied(tmp_path / "x.safetensors", specs, ["tail"], slices=dict.fromkeys(orders, 4) | {"empty": 2})
    for name, parts in orders.items():
        for begin, end in parts:
            writer.write(name, begin, data.reshape(-1)[begin:end])
    writer.append("tail", TensorSpec((24,), "U8"), [data[0], data[1:].reshape(-1)])
    hashes = writer.hashes()
    writer.close()
    assert all(hashes[name] == [blake3(row.tobytes()).hexdigest() for row in data] for name in orders)
    assert hashes["tail"] == [blake3(data.tobytes()).hexdigest()] and hashes["empty"] == [blake3().hexdigest()] * 2
    assert read_back == [("disordered", 0), ("disordered", 18), ("gap", 0)]


@pytest.mark.parametrize("strides", ["contiguous", "interleaved", "transposed", "transposed interleaved"])
def test_views_read_and_write(tmp_path: Path, strides: str) -> None:
    """read_view and write_view against numpy's own strides, any rows."""
    out, width = 7, 5
    row, column, offset = {
        "contiguous": (width, 1, 3),
        "interleaved": (2 * width, 1, width),
        "transposed": (1, out, 0),
        "transposed interleaved": (2, 2 * out, 1),
    }[strides]
    size = offset + (out - 1) * row + (width - 1) * column + 1
    flat = np.arange(size, dtype=np.uint16)
    expected = np.lib.stride_tricks.as_strided(flat[offset:], (out, width), (2 * row, 2 * column))
    spec = {"t": TensorSpec((size,), "BF16")}
    writer = ShardWriter(tmp_path / "model.safetensors", spec)
    writer.write("t", 0, flat)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        writer.write_view(
            "t", offset, (row, column), rows.start, np.ascontiguousarray(expected[rows]) + np.uint16(1000)
        )
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader(tmp_path) as reader:
        for rows in (slice(0, 7), slice(2, 5), slice(6, 7)):
            assert np.array_equal(
                read_view(reader, "t", offset, (row, column), (out, width), rows), expected[rows] + 1000
            )
        outside = reader.read("t")
    mask = np.ones(size, bool)
    np.lib.stride_tricks.as_strided(mask[offset:], (out, width), (row, column))[:] = False
    assert np.array_equal(outside[mask], flat[mask])  # what lies between is untouched


# --- files that change, that are no files, that lead away


def _whole(path: Path) -> Path:
    """A folder with two shards, an index and something that stands for ders.json."""
    path.mkdir()
    for name in ("a", "b"):
        _folder(path, {name: _entry(0, 4, [4])}, b"1234")
        (path / "model.safetensors").rename(path / f"{name}.safetensors")
    placed = {"a": "a.safetensors", "b": "b.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (path / "ders.json").write_text("{}")
    return path


WATCHED = ("a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json", "ders.json")


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def _touch(path: Path) -> None:
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))


def _swap(path: Path) -> None:
    """Another file of the same bytes and times."""
    shutil.copy2(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


CHANGES = {"vanished": Path.unlink, "bytes to": _grow, "was written to": _touch, "replaced by another": _swap}
SMALL = WATCHED[2:]  # not held open: their inodes say nothing, see the next test


@pytest.mark.parametrize(
    ("file", "said"), [(f, s) for f in WATCHED for s in CHANGES if f not in SMALL or s != "replaced by another"]
)
def test_a_change_while_reading_is_noticed(tmp_path: Path, file: str, said: str) -> None:
    folder = _whole(tmp_path / "m")
    with CheckpointReader(folder) as reader:
        reader.check_unchanged()
        CHANGES[said](folder / file)
        with pytest.raises(DersError, match=f"{file}: .*{said}.* since .*run again") as refused:
            reader.check_unchanged()
        assert refused.value.exit_code == 1
        assert (
            file.startswith(("a", "b")) is False or reader.read("b").size == 4
        )  # the open files are read all the same


@pytest.mark.parametrize("file", SMALL)
def test_a_file_that_is_not_open_may_get_another_inode(tmp_path: Path, file: str) -> None:
    """Some FUSE file systems number a file anew at each look."""
    folder = _whole(tmp_path / "m")
    with CheckpointReader(folder) as reader:
        _swap(folder / file)
        reader.check_unchanged()


def test_a_file_that_is_written_to_under_another_name(tmp_path: Path) -> None:
    folder = _whole(tmp_path / "m")
    with CheckpointReader(folder) as reader:
        os.link(folder / "a.safetensors", tmp_path / "other name")
        _grow(tmp_path / "other name")
        with pytest.raises(DersError, match="bytes to"):
            reader.check_unchanged()


@pytest.mark.parametrize("file", WATCHED)
@pytest.mark.parametrize("change", [_grow, _touch, Path.unlink])
def test_another_process_refuses_another_file(tmp_path: Path, file: str, change: Callable) -> None:
    folder = _whole(tmp_path / "m")
    with CheckpointReader(folder) as reader:
        sent = pickle.dumps(reader)
    pickle.loads(sent).close()
    _swap(folder / file)  # another inode, as on another node: that is no other file
    pickle.loads(sent).close()
    change(folder / file)
    with pytest.raises(DersError, match=f"{file}: "):
        pickle.loads(sent)


def test_another_node_numbers_files_and_disks_otherwise(tmp_path: Path) -> None:
    """An NFS export has another st_dev on every node. What the files are there is what they are compared with later."""
    with CheckpointReader(_whole(tmp_path / "m")) as reader:
        here = dict(reader._stamps)
        reader._stamps = {
            file: replace(stamp, inode=stamp.inode + 1, device=stamp.device + 1) for file, stamp in here.items()
        }
        sent = pickle.dumps(reader)
    with pickle.loads(sent) as there:
        assert there._stamps == here
        there.check_unchanged()


def test_a_weight_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes the name after its header was read is not what is read."""
    folder, opened = _whole(tmp_path / "m"), []

    def spied(path: Path, *flags: int) -> int:
        opened.append(Path(path).name)
        return plain(path, *flags)

    plain = os.open
    monkeypatch.setattr(os, "open", spied)
    with CheckpointReader(folder) as reader:
        assert sorted(opened) == sorted(WATCHED)
        (folder / "new").write_bytes((folder / "a.safetensors").read_bytes().replace(b"1234", b"5678"))
        os.replace(folder / "new", folder / "a.safetensors")
        assert reader.read("a").tobytes() == b"1234"


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with CheckpointReader(_whole(tmp_path / "m")) as reader:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match="Input/output error") as failed:
            reader.read("a")
        assert failed.value.filename == str(tmp_path / "m" / "a.safetensors")
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match="Input/output error") as failed:
        CheckpointReader(tmp_path / "m")
    assert failed.value.filename == str(tmp_path / "m" / "config.json")


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    folder = _whole(tmp_path / "m")
    (folder / "b.safetensors").write_bytes(b"")
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            CheckpointReader(folder)
    assert len(os.listdir("/dev/fd")) == before


def test_links_lead_to_the_weights_or_nowhere(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "m"
    (store / "sub").mkdir(parents=True)
    folder.mkdir()
    for name in ("w", "x", "sub/y"):
        (store / name).write_text("")
    (tmp_path / "secret").write_text("")
    (folder / "w.safetensors").symlink_to(store / "w")
    (folder / "x").symlink_to("../store/x")  # as in a model cache
    (folder / "own").symlink_to("x")
    (folder / "real").write_text("")
    (folder / "to real").symlink_to("real")
    (tmp_path / "m2").mkdir()
    (tmp_path / "m2" / "secret").write_text("")
    (folder / ".hidden").symlink_to(tmp_path / "secret")
    (folder / "nothing").symlink_to(tmp_path / "nothing")
    (folder / "folder").symlink_to(tmp_path)
    refuse_stray_links(folder, ["w.safetensors"])
    with pytest.raises(CheckpointError, match="m/own: a link to .*store/x.*copy the file there"):
        refuse_stray_links(folder, [])  # the weights do not stand there
    for name, to in {
        "secret": "../secret",
        "around": "../m/../secret",
        "deep": "../store/sub/y",
        "sibling": "../m2/secret",
    }.items():
        (folder / name).symlink_to(to)
        with pytest.raises(CheckpointError, match=f"m/{name}: a link to"):
            refuse_stray_links(folder, ["w.safetensors"], [name])


def test_an_honest_header_of_any_size_is_no_bomb() -> None:
    """70,000 tensors of short names, the densest JSON that a checkpoint of so many can have."""
    entries = {f"l{number:x}": _entry(2 * number, 2 * number + 2, [2]) for number in range(70_000)}
    header, size = parse_header(json.dumps(entries, separators=(",", ":")).encode(), Path("x"))
    assert len(header.tensors) == 70_000 and size == 140_000 and len(header.text) > json_text.LENIENT_BYTES


@pytest.mark.parametrize("depth", [0, 1, json_text.MOST_DEPTH - 1, json_text.MOST_DEPTH, 900])
@pytest.mark.parametrize("kind", [list, dict])
def test_depth(depth: int, kind: type) -> None:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    outer = {"x": value}  # one more
    if depth < json_text.MOST_DEPTH:
        json_text.refuse_depth(outer)
    else:
        with pytest.raises(ValueError, match="deep"):
            json_text.refuse_depth(outer)
