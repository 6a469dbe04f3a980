"""Remote sources and outputs: the bytes of local runs, each byte fetched once, every fault survived or told in one line.

All servers run on this machine's loopback: a web server that misbehaves on request, a Hub, an S3 (moto).
"""

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import servers
import torch
import toy
from command import ROOT, contents, ders, done
from servers import Bucket, Web

from ders_cli.errors import CheckpointError, DersError, Interrupted
from ders_cli.remote import mirror as remote_mirror
from ders_cli.remote import reader as remote_reader
from ders_cli.remote import store as remote_store
from ders_cli.remote.address import normal, open_store
from ders_cli.remote.reader import RemoteReader

INT4 = ("--delta", "int4", "-q", "-j", 2)
FLAGS = (*INT4, "--max-shard-size", "40kB")  # several output shards
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """org/source: shards and what stands beside them; org/fused: two groups share a tensor; org/moe and org/dense: its base."""
    root = tmp_path_factory.mktemp("remote")
    toy.make("qwen3_moe", root / "org" / "source", dtype=torch.bfloat16)
    toy.reshard(root / "org" / "source", 3)
    toy.make("mixtral", root / "org" / "fused", dtype=torch.bfloat16, fused=True)
    toy.make("mixtral", root / "org" / "moe", dtype=torch.bfloat16)
    toy.dense(root / "org" / "dense", "mistral", dtype=torch.bfloat16)
    (root / "org" / "source" / "tokenizer.json").write_text('{"model": "tiny"}')
    (root / "org" / "source" / "a b+ü.txt").write_text("a name to be quoted")
    (root / "org" / "source" / "empty.txt").write_text("")
    (root / "org" / "source" / ".hidden").write_text("not carried")
    (root / "org" / "source" / "pytorch_model.bin").write_bytes(bytes(10_000))
    for name, flags in (("source", FLAGS), ("fused", INT4)):
        done("compress", root / "org" / name, *flags, "-o", root / f"{name}-int4")
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, short waits."""
    monkeypatch.setattr(remote_reader, "PIECE", 10_000)
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "LONGEST_WAIT", 0.05)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that has to be empty in the end."""
    yield tmp_path / "scratch"
    assert not list((tmp_path / "scratch").glob("*"))


@pytest.fixture
def web(root: Path) -> Iterator[Web]:
    with servers.web_server(root / "org") as web:
        yield web


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with servers.hub_server(root) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


@pytest.fixture(scope="module")
def one_bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        with servers.bucket_server() as bucket:
            patch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
            yield bucket


@pytest.fixture
def bucket(one_bucket: Bucket) -> Iterator[Bucket]:
    """The module's bucket, emptied."""
    listed = one_bucket.client.list_objects_v2(Bucket=one_bucket.name).get("Contents", ())
    for one in listed:
        one_bucket.client.delete_object(Bucket=one_bucket.name, Key=one["Key"])
    one_bucket.requests.clear()
    yield one_bucket
    one_bucket.fault = lambda method, key, number, wanted: ""


def _weights(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def _served(web: Web, prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): size for name, size in web.served.items() if name.startswith(prefix)}


# --- the same bytes, each fetched once


@pytest.mark.parametrize("model", ["source", "fused"])
def test_web_source(root: Path, web: Web, tmp_path: Path, scratch: Path, model: str) -> None:
    flags = FLAGS if model == "source" else INT4
    done("compress", f"{web.url}/{model}", *flags, "-o", tmp_path / "out", "--scratch", scratch)
    assert contents(tmp_path / "out") == contents(root / f"{model}-int4")
    served = _served(web, f"{model}/")
    sizes = {path.name: path.stat().st_size for path in (root / "org" / model).iterdir()}
    left = (".bin", ".hidden")
    assert served == {name: size for name, size in sizes.items() if not name.endswith(left) and size}
    assert max(web.requests.count(one) for one in web.requests) == 1


def test_web_without_listing(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    """The names come from the index, and from what a checkpoint usually has."""
    web.lists = False
    done("compress", f"{web.url}/source/", *FLAGS, "-o", tmp_path / "out", "--scratch", scratch)
    expected = contents(root / "source-int4")
    odd = {"a b+ü.txt", "empty.txt", "ders.json"}  # nobody can know of the first two; the last lists them
    assert set(expected) - set(contents(tmp_path / "out")) == odd - {"ders.json"}
    assert all(data == expected[name] for name, data in contents(tmp_path / "out").items() if name not in odd)


def test_hub_source(root: Path, hub: Web, tmp_path: Path, scratch: Path) -> None:
    done("compress", "hf://org/source@refs/pr/1", *FLAGS, "-o", tmp_path / "out", "--scratch", scratch)
    assert contents(tmp_path / "out") == contents(root / "source-int4")
    listed = [one for one in hub.requests if one[0] == "LIST"]
    assert listed == [("LIST", "org/source", "refs/pr/1")]  # the revision is looked up once, then it is a commit
    assert sum(_served(hub, "org/source/").values()) <= 1.02 * sum(
        path.stat().st_size for path in (root / "org" / "source").iterdir() if path.suffix != ".bin"
    )
    assert ("cdn", None) in hub.authorized and ("hub", "Bearer hf_secret") in hub.authorized
    assert not {("cdn", "Bearer hf_secret"), ("hub", None)} & hub.authorized
    for wrong in ("hf://org/none", "hf://org/source@nowhere"):
        ran = ders("compress", wrong, *INT4, "-o", tmp_path / "other")
        assert ran.code == 4 and re.fullmatch(rf"ders: {wrong}: HTTP 404; .*hf auth login.*\n", ran.err)


def test_bucket_to_bucket(root: Path, bucket: Bucket, tmp_path: Path, scratch: Path) -> None:
    address = bucket.upload(root / "org" / "source", "in/source")
    ran = done("compress", address, *FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)
    assert ran.out == "s3://models/out/small\n"
    assert bucket.files("out/small") == contents(root / "source-int4")
    sent = [key.removeprefix("out/small/") for method, key, _ in bucket.requests if method == "PUT" and "out/" in key]
    assert sent[0] == ".ders-plan.json" and sent[-3:] == ["model.safetensors.index.json", "ders.json", "config.json"]
    assert len(sent) == len(set(sent)) == len(bucket.files("out/small")) + 1
    # everything again from there: restored into a bucket, verified against the original
    done("restore", "s3://models/out/small", "-o", "s3://models/out/plain", "-q", "--scratch", scratch)
    done("restore", root / "source-int4", "-o", tmp_path / "plain", "-q")
    assert bucket.files("out/plain") == contents(tmp_path / "plain")
    report = done("verify", "s3://models/out/small", "--against", address, "--json", "--scratch", scratch).json
    assert report["source"] == "s3://models/out/small" and report["against"] == address and report["ok"]
    expected = done("verify", root / "source-int4", "--against", root / "org" / "source", "--json").json
    assert report["experts"] == expected["experts"] and report["checks"] == expected["checks"]


def test_base_from_the_web(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    """A base that stands elsewhere has the same label in ders.json; only its FFN is fetched."""
    flags = ("--delta", "int4", "-q", "--scratch", scratch)
    done("compress", root / "org" / "moe", *flags, "--base", root / "org" / "dense", "-o", tmp_path / "local")
    done("compress", root / "org" / "moe", *flags, "--base", f"{web.url}/dense", "-o", tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert web.served["dense/model.safetensors"] < 0.8 * _weights(root / "org" / "dense")["model.safetensors"]


def test_upcycle_from_the_web(root: Path, web: Web, tmp_path: Path, scratch: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--experts", 3, "--sparse", 0.5, "-q", "--scratch", scratch)
    done("upcycle", root / "org" / "dense", *flags, "-o", tmp_path / "local")
    done("upcycle", f"{web.url}/dense", *flags)  # no -o: here, named after the model
    (made,) = tmp_path.glob("dense-moe3-*")
    assert contents(made) == contents(tmp_path / "local")


def test_dry_run_reads_headers_only(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    flags = ("--delta", "int4", "--dry-run", "--json", "--scratch", scratch)
    plan = done("compress", f"{web.url}/source", *flags, "-o", tmp_path / "out").json["plan"]
    assert plan == done("compress", root / "org" / "source", *flags, "-o", tmp_path / "out").json["plan"]
    with RemoteReader(open_store(f"{web.url}/source"), scratch) as reader:
        headers = {f"source/{file}": 8 + len(header.text) for file, header in reader.headers.items()}
    served = {name: size for name, size in web.served.items() if name.endswith(".safetensors")}
    assert served == {name: 2 * size for name, size in headers.items()}  # by the command, and just now


def test_left_behind_is_told(root: Path, hub: Web, tmp_path: Path) -> None:
    expected = done("compress", root / "org" / "source", "--delta", "int4", "-o", tmp_path / "a", "--json").json
    found = done("compress", "hf://org/source", "--delta", "int4", "-o", tmp_path / "b", "--json").json
    assert found["left_behind"] == expected["left_behind"] == ["pytorch_model.bin"]


# --- faults


FAULTS = ["503", "reset", "midway", "short", "stall", "slow"]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_survived(root: Path, web: Web, tmp_path: Path, scratch: Path, fault: str, monkeypatch) -> None:
    """Every third request to every file goes wrong."""
    if fault == "stall":
        monkeypatch.setattr(remote_store, "STALL", 0.3)
    if fault == "slow":
        monkeypatch.setattr(remote_store, "SLOWEST", 0.1)
    web.stall, met = 0.6, []

    def misbehave(method: str, name: str, number: int) -> str:
        met.append(number % 3 == 0 and name.endswith((".safetensors", ".json")))
        return fault if met[-1] else ""

    web.fault = misbehave
    done("compress", f"{web.url}/source", *FLAGS, "-o", tmp_path / "out", "--scratch", scratch)
    assert contents(tmp_path / "out") == contents(root / "source-int4")
    assert sum(met) > 10


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_without_end(web: Web, tmp_path: Path, scratch: Path, fault: str, monkeypatch) -> None:
    if fault == "stall":  # of one file and without end: other answers come in time on a busy machine, too
        monkeypatch.setattr(remote_store, "STALL", 1.0)
    if fault == "slow":
        monkeypatch.setattr(remote_store, "SLOWEST", 1.0)
    monkeypatch.setattr(remote_store, "TRIES", 3)
    web.stall = {"stall": 600, "slow": 4}.get(fault, 0)
    web.fault = lambda method, name, number: fault if name.endswith("2-of-00003.safetensors") and number > 2 else ""
    ran = ders("compress", f"{web.url}/source", *FLAGS, "-o", tmp_path / "out", "--scratch", scratch)
    where = re.escape(f"{web.url}/source/model-00002-of-00003.safetensors: bytes ")
    assert ran.code == 1 and not (tmp_path / "out").exists()
    assert re.fullmatch(rf"ders: {where}\d+-\d+: .+; gave up after 3 tries\n", ran.err), ran.err
    said = {"503": "HTTP 503", "slow": "seconds", "stall": "timed out"}.get(fault, "")
    assert said in ran.err


def test_server_without_ranges(web: Web, tmp_path: Path, scratch: Path) -> None:
    web.ranges = False
    ran = ders("compress", f"{web.url}/source", *INT4, "-o", tmp_path / "out", "--scratch", scratch)
    assert ran.code == 4 and ran.err.count("\n") == 1 and "gives whole files only" in ran.err
    asked = [name for _, name, wanted in web.requests if wanted and name.endswith(".safetensors")]
    assert len(asked) == len(set(asked))  # it stops at the first answer's head


def test_bucket_faults(root: Path, bucket: Bucket, tmp_path: Path, scratch: Path) -> None:
    """503 and cut bodies on reads, 503 on writes."""
    address = bucket.upload(root / "org" / "source", "in/source")
    bucket.requests.clear()
    kinds = {"GET": ["503", "cut", ""], "PUT": ["503", ""], "HEAD": [""], "DELETE": ["503", ""]}

    def fault(method: str, key: str, number: int, wanted: str) -> str:
        """By the attempt at these very bytes: by the file's, threads in step could meet nothing but faults."""
        attempt = bucket.requests.count((method, key, wanted)) - 1
        return kinds[method][attempt % len(kinds[method])] if "/" in key else ""

    bucket.fault = fault
    done("compress", address, *FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)
    assert bucket.requests.count(("PUT", "out/small/ders.json", "")) == 2
    bucket.fault = lambda method, key, number, wanted: ""
    assert bucket.files("out/small") == contents(root / "source-int4")


def test_bucket_read_without_end(
    root: Path, bucket: Bucket, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "TRIES", 3)
    address = bucket.upload(root / "org" / "source", "in/source")
    bucket.fault = lambda method, key, number, wanted: (
        "503" if key.endswith("2-of-00003.safetensors") and number > 3 else ""
    )
    ran = ders("compress", address, *INT4, "-o", tmp_path / "out", "--scratch", scratch)
    assert ran.code == 1 and re.fullmatch(r"ders: s3://\S+: bytes \d+-\d+: .*; gave up after 3 tries\n", ran.err)


@pytest.mark.parametrize(
    "fault, code, says",
    [
        ("unplaced", 4, "expected Content-Range: bytes 0-7/"),
        ("displaced", 1, r"bytes 0-7 asked for, 0-6 came; gave up"),
        ("zipped", 4, "comes as gzip"),
    ],
)
def test_answers_that_may_be_other_bytes(
    web: Web, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, fault: str, code: int, says: str
) -> None:
    monkeypatch.setattr(remote_store, "TRIES", 2)
    web.fault = lambda method, name, number: (
        fault if method == "GET" and name.endswith("2-of-00003.safetensors") else ""
    )
    ran = ders("compress", f"{web.url}/source", *INT4, "-o", tmp_path / "out", "--scratch", scratch)
    assert ran.code == code and f"{web.url}/source/model-00002-of-00003.safetensors: " in ran.err and says in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_that_grew(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    """A server without marks that answers with the whole file, which is longer than when it was listed."""
    shutil.copytree(root / "org" / "fused", tmp_path / "grows")
    (tmp_path / "grows" / "tokenizer.json").write_text("{}")
    web.root, web.tags = tmp_path, lambda path: ""

    def grow(method: str, name: str, number: int) -> str:
        if method == "GET" and name.endswith("tokenizer.json"):
            (tmp_path / "grows" / "tokenizer.json").write_text('{"longer": 1}')
        return "whole"

    web.fault = grow
    with pytest.raises(CheckpointError, match="tokenizer.json: changed while it was being read"):
        RemoteReader(open_store(f"{web.url}/grows"), scratch)


def test_bucket_that_knows_no_conditions(
    root: Path, bucket: Bucket, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compatible servers may leave If-Match aside, and Range."""
    monkeypatch.setattr(remote_store, "TRIES", 2)
    address = bucket.upload(root / "org" / "fused", "in/fused")
    data = (root / "org" / "fused" / "model.safetensors").read_bytes()
    with RemoteReader(open_store(address), scratch) as reader:
        store, entry = reader.store, reader.listing["model.safetensors"]
        bucket.fault = lambda method, key, number, wanted: "whole"
        with pytest.raises(DersError, match="100 bytes asked for, 101 came; gave up"):
            remote_store.fetch(store, "model.safetensors", 500, 600, entry)
        assert remote_store.fetch(store, "model.safetensors", 0, len(data), entry) == data
        bucket.client.put_object(Bucket="models", Key="in/fused/model.safetensors", Body=bytes(len(data)))
        bucket.fault = lambda method, key, number, wanted: "lax"
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            reader.read(list(reader.tensors)[-1])


# --- the source changes underneath


def test_web_file_changes(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        name = next(iter(reader.tensors))
        web.tags = lambda path: '"another"'
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            reader.read(name)


def test_bucket_file_changes(root: Path, bucket: Bucket, scratch: Path) -> None:
    address = bucket.upload(root / "org" / "fused", "in/fused")
    with RemoteReader(open_store(address), scratch) as reader:
        data = bytearray((root / "org" / "fused" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        bucket.client.put_object(Bucket="models", Key="in/fused/model.safetensors", Body=bytes(data))
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            reader.read(list(reader.tensors)[-1])
        bucket.client.delete_object(Bucket="models", Key="in/fused/model.safetensors")
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            reader.read(list(reader.tensors)[0])


# --- the reader


def _local(root: Path, model: str) -> dict[str, bytes]:
    """Every tensor's bytes."""
    from ders_cli.checkpoint.reader import CheckpointReader

    with CheckpointReader(root / "org" / model) as reader:
        return {name: b"".join(chunk.tobytes() for chunk in reader.chunks(name)) for name in reader.tensors}


def _bytes(reader: RemoteReader, name: str) -> bytes:
    return b"".join(chunk.tobytes() for chunk in reader.chunks(name, chunk_bytes=777))


@pytest.mark.parametrize("piece", [100, 1000, 10_000, 1 << 20])
def test_pieces_tile_the_file(root: Path, web: Web, scratch: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(remote_reader, "PIECE", piece)
    with RemoteReader(open_store(f"{web.url}/source"), scratch) as reader:
        for file, pieces in reader._pieces.items():
            begins, ends = [p.begin for p in pieces], [p.end for p in pieces]
            assert begins[0] == 8 + len(reader.headers[file].text) and begins[1:] == ends[:-1]
            assert ends[-1] == _weights(root / "org" / "source")[file]
            for one in pieces:
                assert one.size <= piece
                inside = [n for n, place in reader.places.items() if place.file == file and reader.tensors[n].nbytes]
                spans = {n: (reader.places[n].begin, reader.places[n].begin + reader.tensors[n].nbytes) for n in inside}
                assert one.users == {n for n, (begin, end) in spans.items() if begin < one.end and end > one.begin}


def test_threads_fetch_a_tensor_once(root: Path, web: Web, scratch: Path) -> None:
    expected = _local(root, "fused")
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        found: list[bool] = []

        def read() -> None:
            found.extend(_bytes(reader, name) == data for name, data in expected.items())

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6 * len(expected) and all(found)
        assert (
            reader.fetched
            == sum(web.served.values())
            == sum(path.stat().st_size for path in (root / "org" / "fused").iterdir())
        )


def test_let_go_and_read_again(root: Path, web: Web, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was let go takes no room, is fetched again, and never reads as zeros."""
    monkeypatch.setattr(remote_reader, "PIECE", 32 << 10)
    expected = _local(root, "fused")
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        path = reader.folder / "model.safetensors"
        empty = path.stat().st_blocks
        for name, data in expected.items():
            assert _bytes(reader, name) == data
        full, fetched = path.stat().st_blocks, reader.fetched
        assert reader.held == sum(map(len, expected.values()))
        for name in expected:
            reader.done(name)
        assert reader.held == 0
        if sys.platform == "linux":  # blocks that two pieces share stay
            assert 512 * (path.stat().st_blocks - empty) < 0.5 * 512 * (full - empty)
        for name, data in expected.items():
            assert _bytes(reader, name) == data
        assert reader.fetched == fetched + sum(map(len, expected.values()))


def test_let_go_while_others_read(root: Path, web: Web, scratch: Path) -> None:
    """A `done` that comes too early costs a fetch, and gives no zeros."""
    expected = _local(root, "fused")
    name = max(expected, key=lambda name: len(expected[name]))
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        stop, wrong = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                if _bytes(reader, name) != expected[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            reader.done(name)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong and reader.fetched > 3 * len(expected[name])


def test_expected_is_fetched_ahead(root: Path, web: Web, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, up to AHEAD bytes; what is let go makes room for more."""
    expected = _local(root, "fused")
    large = [name for name, data in expected.items() if len(data) > 10_000]
    monkeypatch.setattr(remote_reader, "AHEAD", 25_000)
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        for name in large:
            reader.expect(name)
        _wait_for(lambda: reader._flying == 0)
        assert 15_000 < reader.held <= 25_000
        asked = len(web.requests)
        first = np.empty(5000, np.uint8)
        reader.read_bytes(large[0], 0, first)
        assert first.tobytes() == expected[large[0]][:5000] and len(web.requests) == asked
        reader.done(large[0])
        _wait_for(lambda: reader._flying == 0)
        assert len(web.requests) > asked and reader.most_held <= 25_000
        for name in expected:
            assert _bytes(reader, name) == expected[name]


def _wait_for(holds) -> None:
    until = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_pickles(root: Path, web: Web, bucket: Bucket, hub: Web, scratch: Path) -> None:
    """Where it arrives it has a mirror of its own, of just the files that were opened."""
    expected = _local(root, "source")
    for address in (f"{web.url}/source", bucket.upload(root / "org" / "source", "in/source"), "hf://org/source@v1"):
        with RemoteReader(open_store(address), scratch) as reader:
            with pickle.loads(pickle.dumps(reader)) as other:
                assert other.folder != reader.folder and other.places == reader.places
                assert {name: _bytes(other, name) for name in other.tensors} == expected
    with RemoteReader(open_store(f"{web.url}/source"), scratch) as reader:
        sent = pickle.dumps(reader)
        web.tags = lambda path: '"another"'
        with pytest.raises(CheckpointError, match="changed"):
            pickle.loads(sent)


def test_source_works_in_another_process(root: Path, web: Web, tmp_path: Path) -> None:
    """A pickled source, as an engine sends it to its workers."""
    from ders_cli.source import open_source

    with open_source(f"{web.url}/source", scratch=tmp_path / "s") as source:
        (tmp_path / "pickle").write_bytes(pickle.dumps(source))
        group = source.groups[0]
        expected = source.read(group, 1, slice(0, 9)).tobytes().hex()
        program = (
            "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb'));"
            "print(source.read(source.groups[0], 1, slice(0, 9)).tobytes().hex())"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        ran = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "pickle"], capture_output=True, text=True, env=environment
        )
        assert ran.stdout.strip() == expected, ran.stderr
        assert len(list((tmp_path / "s").iterdir())) == 1  # that of this process; the other has removed its own


def test_scratch_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion of 25 MB in 12 layers holds what two groups need; nothing at the end."""
    from ders_cli import convert
    from ders_cli.output import Options
    from ders_cli.recipe import make_recipe
    from ders_cli.source import open_source

    monkeypatch.setattr(remote_reader, "PIECE", 64 << 10)
    monkeypatch.setattr(remote_reader, "AHEAD", 1 << 20)
    _large(tmp_path / "org" / "large", layers=12)
    size = (tmp_path / "org" / "large" / "model.safetensors").stat().st_size
    with servers.web_server(tmp_path / "org") as web, open_source(f"{web.url}/large", scratch=tmp_path / "s") as source:
        reader = source.reader
        path, seen = reader.folder / "model.safetensors", [0]
        assert reader.folder.parent.stat().st_mode & 0o777 == 0o700
        empty = path.stat().st_blocks
        fill = remote_reader.fill
        monkeypatch.setattr(
            remote_reader, "fill", lambda *given: (fill(*given), seen.append(512 * (path.stat().st_blocks - empty)))
        )
        options = Options(jobs=1)
        convert.run(convert.prepare(source, make_recipe({"delta": "int4"}), tmp_path / "remote", options))
        group = 8 * 2 * 256 * 170
        assert size > 24e6 and max(seen) <= 2 * group + (2 << 20), (max(seen), group)
        assert reader.most_held <= 2 * group + (1 << 20) and reader.held == 0
        assert 512 * (path.stat().st_blocks - empty) < 3e6  # pages of 4 KB that two pieces of 64 KB share
        assert sum(web.served.values()) <= 1.02 * size
    assert not list((tmp_path / "s").iterdir())
    done("compress", tmp_path / "org" / "large", *INT4, "-o", tmp_path / "local")
    assert contents(tmp_path / "local") == contents(tmp_path / "remote")


def _large(folder: Path, layers: int) -> None:
    random, tensors = torch.Generator().manual_seed(0), {"model.embed_tokens.weight": torch.ones(61, 256)}
    shapes = {"w1": (170, 256), "w2": (256, 170), "w3": (170, 256)}
    for layer in range(layers):
        stem = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{stem}.gate.weight"] = torch.ones(8, 256)
        for name, shape in shapes.items():
            base = torch.randn(shape, generator=random)
            for i in range(8):
                tensors[f"{stem}.experts.{i}.{name}.weight"] = base + 0.01 * torch.randn(shape, generator=random)
    config = dict(
        model_type="mixtral",
        hidden_size=256,
        intermediate_size=170,
        num_hidden_layers=layers,
        num_local_experts=8,
        hidden_act="silu",
    )
    toy.write(folder, config, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_closes_at_once(web: Web, scratch: Path) -> None:
    """While a download stalls, closing does not wait for it."""
    stalls = threading.Event()
    web.fault = lambda method, name, number: (
        stalls.set() or "stall" if method == "GET" and name.endswith(".safetensors") and number > 1 else ""
    )
    web.stall = 600
    reader = RemoteReader(open_store(f"{web.url}/fused"), scratch)
    for name in reader.tensors:
        reader.expect(name)
    assert stalls.wait(60)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < remote_store.STALL / 2 and not list(scratch.iterdir())


def test_an_error_at_opening_waits_for_nobody(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One header is refused while another stalls."""
    monkeypatch.setattr(remote_store, "TRIES", 2)
    faults = {"source/model-00001-of-00003.safetensors": "stall", "source/model-00002-of-00003.safetensors": "503"}
    web.stall, web.fault = 600, lambda method, name, number: faults.get(name, "") if method == "GET" else ""
    began = time.monotonic()
    with pytest.raises(DersError, match="00002-of-00003.safetensors: bytes 0-7: HTTP 503; gave up"):
        RemoteReader(open_store(f"{web.url}/source"), tmp_path / "scratch")
    assert time.monotonic() - began < remote_store.STALL / 2


def test_a_failed_download_is_counted_once(web: Web, scratch: Path) -> None:
    """Between the end of a download and its callback others may look at the piece, and ask for it again."""
    with RemoteReader(open_store(f"{web.url}/fused"), scratch) as reader:
        piece = reader._pieces["model.safetensors"][0]
        failed, newer = Future(), Future()
        failed.set_exception(DersError("no"))
        piece.users.clear()
        piece.future, reader.held, reader._flying = failed, piece.size, 1
        reader._let_go_if_unused(piece)
        assert piece.future is failed and reader.held == piece.size
        piece.future = newer
        reader._landed(piece, failed)
        assert piece.future is newer and reader.held == piece.size and reader._flying == 0


def test_small_files_and_headers_come_in_pieces(
    root: Path, web: Web, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the memory is that of eight pieces, however large a tokenizer or a header is."""
    monkeypatch.setattr(remote_mirror, "PIECE", 1000)
    shutil.copytree(root / "org" / "fused", tmp_path / "large")
    (tmp_path / "large" / "tokenizer.json").write_bytes(np.random.default_rng(0).bytes(4321))
    web.root = tmp_path
    with RemoteReader(open_store(f"{web.url}/large"), scratch) as reader:
        assert (reader.folder / "tokenizer.json").read_bytes() == (tmp_path / "large" / "tokenizer.json").read_bytes()
        spans = [tuple(map(int, asked[6:].split("-"))) for _, _, asked in web.requests if asked]
        assert max(end + 1 - begin for begin, end in spans) == 1000
        assert len(reader.headers["model.safetensors"].text) > 1000
        assert {name: _bytes(reader, name) for name in reader.tensors} == _local(root, "fused")


# --- resuming, and outputs in a bucket


def _stop_at(monkeypatch: pytest.MonkeyPatch, target: object, name: str, holds) -> None:
    """Interrupt at the first call that `holds`."""
    real = getattr(target, name)

    def stops(*given):
        if holds(*given):
            raise Interrupted
        return real(*given)

    monkeypatch.setattr(target, name, stops)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))


def test_resume_from_the_web(root: Path, web: Web, tmp_path: Path, scratch: Path, monkeypatch) -> None:
    """A new mirror of the same files has the fingerprint of the last one; one of other files has not."""
    from ders_cli import convert

    flags = (*FLAGS, "-o", tmp_path / "out", "--scratch", scratch)
    with monkeypatch.context() as patch:
        _stop_at(patch, convert, "_shard", lambda *given: given[3] == 2)
        assert ders("compress", f"{web.url}/source", *flags).code == 130
    tags = web.tags
    web.tags = lambda path: '"another"'
    ran = ders("compress", f"{web.url}/source", *flags, "--resume")
    assert ran.code == 2 and "was begun with another source" in ran.err
    web.tags = tags
    web.served.clear()
    done("compress", f"{web.url}/source", *flags, "--resume")
    assert contents(tmp_path / "out") == contents(root / "source-int4")
    assert sum(web.served.values()) < 0.9 * sum(_weights(root / "org" / "source").values())


@pytest.mark.parametrize("place", ["shard", "others", "index", "ders.json", "config.json"])
def test_interrupted_upload(root: Path, bucket: Bucket, tmp_path: Path, scratch: Path, place: str, monkeypatch) -> None:
    """Nothing there can be taken for a checkpoint; --resume sends the rest and ends at the same bytes."""
    from ders_cli.remote.bucket import S3Store

    expected = contents(root / "source-int4")
    stop = {"shard": sorted(expected)[-3], "others": "tokenizer.json", "index": "model.safetensors.index.json"}
    flags = (*FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)
    with monkeypatch.context() as patch:
        _stop_at(patch, S3Store, "put", lambda store, path, name: name == stop.get(place, place))
        assert ders("compress", root / "org" / "source", *flags).code == 130
    there = bucket.files("out/small")
    assert "config.json" not in there
    if place in ("shard", "others", "index"):
        assert not {"ders.json", "model.safetensors.index.json"} & there.keys()
    sent = {name for name in there if name.endswith(".safetensors")}
    assert sent == {
        name for name in expected if name.endswith(".safetensors") and (place != "shard" or name < stop[place])
    }
    ran = ders("compress", "s3://models/out/small", *INT4, "-o", tmp_path / "x", "--scratch", scratch)
    assert ran.code == 4 and "config.json: missing" in ran.err
    ran = ders("compress", root / "org" / "source", *flags)
    assert ran.code == 2 and "s3://models/out/small: an unfinished run stands here" in ran.err
    bucket.requests.clear()
    done("compress", root / "org" / "source", *flags, "--resume")
    assert bucket.files("out/small") == expected
    assert not [key for method, key, _ in bucket.requests if method == "PUT" and key.rsplit("/", 1)[-1] in sent]


def test_resume_sends_again_what_is_gone(root: Path, bucket: Bucket, scratch: Path, monkeypatch) -> None:
    """A shard that has left the bucket since, or has another size there, is not taken for done."""
    from ders_cli.remote.bucket import S3Store

    for deltas, model in ((FLAGS, "source"), (("-q",), "source-int4")):
        where = root / "org" / model if model == "source" else root / model
        command = "compress" if model == "source" else "restore"
        flags = (*deltas, "-o", "s3://models/out/x", "--scratch", scratch, "--overwrite")
        with monkeypatch.context() as patch:
            _stop_at(patch, S3Store, "put", lambda store, path, name: name == "tokenizer.json")
            assert ders(command, where, *flags).code == 130
        shards = sorted(name for name in bucket.files("out/x") if name.endswith(".safetensors"))
        bucket.client.delete_object(Bucket="models", Key=f"out/x/{shards[0]}")
        bucket.client.put_object(Bucket="models", Key=f"out/x/{shards[1]}", Body=b"short")
        done(command, where, *flags[:-1], "--resume")
        done(command, where, *deltas, "-o", scratch.parent / model)
        assert bucket.files("out/x") == contents(scratch.parent / model)


def test_another_hand_in_the_output(root: Path, bucket: Bucket, scratch: Path, monkeypatch) -> None:
    """Shards of the same size, as another fine-tune's are: sent again by --resume, and never published among ours."""
    from ders_cli.remote.bucket import S3Store

    expected = contents(root / "source-int4")
    shard = sorted(name for name in expected if name.endswith(".safetensors"))[1]
    flags = (*FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)

    def replace() -> None:
        bucket.client.put_object(Bucket="models", Key=f"out/small/{shard}", Body=bytes(len(expected[shard])))

    def remove() -> None:
        bucket.client.delete_object(Bucket="models", Key=f"out/small/{shard}")

    with monkeypatch.context() as patch:
        _stop_at(patch, S3Store, "put", lambda store, path, name: name == "tokenizer.json")
        assert ders("compress", root / "org" / "source", *flags).code == 130
    replace()
    put = S3Store.put
    for meddle, at, word in (
        (replace, "tokenizer.json", "replaced"),
        (remove, "tokenizer.json", "gone"),
        (replace, "ders.json", "replaced"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                S3Store, "put", lambda *given, meddle=meddle, at=at: given[2] == at and meddle() or put(*given)
            )
            ran = ders("compress", root / "org" / "source", *flags, "--resume")
        assert ran.code == 1 and f"s3://models/out/small/{shard}: {word} since it was sent" in ran.err
        assert "config.json" not in bucket.files("out/small")
        assert at == "ders.json" or "model.safetensors.index.json" not in bucket.files("out/small")
    done("compress", root / "org" / "source", *flags, "--resume")
    assert bucket.files("out/small") == expected


@pytest.mark.parametrize("again", ["--resume", "--overwrite"])
@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_while_making_room(root: Path, bucket: Bucket, scratch: Path, monkeypatch, call, again) -> None:
    """Before or after config.json is gone: the next run goes on, and nothing of the old checkpoint stays."""
    from ders_cli.remote.bucket import S3Store

    bucket.upload(root / "org" / "source", "out/small")
    flags = (*INT4, "-o", "s3://models/out/small", "--scratch", scratch)
    calls: list[object] = []
    with monkeypatch.context() as patch:
        _stop_at(patch, S3Store, "remove", lambda *given: calls.append(given) or len(calls) == call)
        assert ders("compress", root / "org" / "fused", *flags, "--overwrite").code == 130
    assert ("config.json" in bucket.files("out/small")) == (call == 1)
    done("compress", root / "org" / "fused", *flags, again)
    assert bucket.files("out/small") == contents(root / "fused-int4")


def test_an_output_in_place_of_the_input(root: Path, bucket: Bucket, scratch: Path) -> None:
    """However the two are written."""
    bucket.upload(root / "org" / "fused", "in/fused")
    before = bucket.files("in/fused")
    for model, out in (("S3://models/in/fused", "s3://models/in/fused"), ("s3://models/in/fused", "s3://models//in/")):
        ran = ders("compress", model, *INT4, "-o", out, "--overwrite", "--scratch", scratch)
        assert ran.code == 2 and "the input s3://models/in/fused stands there" in ran.err
    assert bucket.files("in/fused") == before


def test_a_whole_bucket_is_no_output(root: Path, bucket: Bucket) -> None:
    for out in ("s3://models", "s3://models/", "gs://models//"):
        ran = ders("compress", root / "org" / "fused", *INT4, "-o", out, "--overwrite")
        assert ran.code == 2 and "is a whole bucket; expected a folder in it" in ran.err
    assert not bucket.requests


def test_resume_without_the_last_runs_notes(root: Path, bucket: Bucket, scratch: Path, monkeypatch) -> None:
    """As on another machine: everything is made again, and stale files go."""
    from ders_cli.remote.bucket import S3Store

    flags = (*FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)
    with monkeypatch.context() as patch:
        _stop_at(patch, S3Store, "put", lambda store, path, name: name == "tokenizer.json")
        assert ders("compress", root / "org" / "source", *flags).code == 130
    shutil.rmtree(scratch)
    bucket.client.put_object(Bucket="models", Key="out/small/model-00077-of-00078.safetensors", Body=b"stale")
    done("compress", root / "org" / "source", *flags, "--resume")
    assert bucket.files("out/small") == contents(root / "source-int4")


def test_occupied_bucket(root: Path, bucket: Bucket, scratch: Path) -> None:
    """Refused without --overwrite, and with it where no checkpoint stands; replaced, first of all its config.json."""
    flags = (*INT4, "-o", "s3://models/out/small", "--scratch", scratch)
    bucket.client.put_object(Bucket="models", Key="out/small/thesis.tex", Body=b"years of work")
    ran = ders("compress", root / "org" / "source", *flags)
    assert ran.code == 2 and "s3://models/out/small: exists and is not empty" in ran.err
    ran = ders("compress", root / "org" / "source", *flags, "--overwrite")
    assert ran.code == 2 and "does not take it for a checkpoint" in ran.err
    assert bucket.files("out/small") == {"thesis.tex": b"years of work"}
    bucket.client.put_object(Bucket="models", Key="out/small/config.json", Body=b"{}")
    bucket.client.put_object(Bucket="models", Key="out/small/ders.json", Body=b"{}")
    bucket.client.put_object(Bucket="models", Key="out/smaller/config.json", Body=b"a neighbour")
    bucket.client.put_object(Bucket="models", Key="out/small/below/file", Body=b"not ours")
    bucket.requests.clear()
    done("compress", root / "org" / "fused", *flags, "--overwrite")
    found = bucket.files("out/small")
    assert found.pop("below/file") == b"not ours" and found == contents(root / "fused-int4")
    assert bucket.files("out/smaller") == {"config.json": b"a neighbour"}
    changes = [(method, key.rsplit("/", 1)[-1]) for method, key, _ in bucket.requests if method in ("PUT", "DELETE")]
    assert changes[:3] == [("PUT", ".ders-plan.json"), ("DELETE", "config.json"), ("DELETE", "ders.json")]
    ran = ders("compress", "s3://models/out/small", *flags, "--overwrite")  # its deltas are lossy, too
    assert ran.code in (2, 4) and bucket.files("out/small")["config.json"] == found["config.json"]
    ran = ders("restore", "s3://models/out/small", "-o", "s3://models/out", "--overwrite", "--scratch", scratch)
    assert ran.code == 2 and "the input s3://models/out/small stands there" in ran.err


def test_upload_fails_for_good(root: Path, bucket: Bucket, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "TRIES", 3)
    bucket.fault = lambda method, key, number, wanted: "503" if method == "PUT" and "00002-of" in key else ""
    flags = (*FLAGS, "-o", "s3://models/out/small", "--scratch", scratch)
    ran = ders("compress", root / "org" / "source", *flags)
    assert ran.code == 1 and re.fullmatch(
        r"ders: s3://\S+00002-of\S+: sending it: .*; gave up after 3 tries\n", ran.err
    )
    assert "config.json" not in bucket.files("out/small")
    bucket.fault = lambda method, key, number, wanted: ""
    done("compress", root / "org" / "source", *flags, "--resume")
    assert bucket.files("out/small") == contents(root / "source-int4")


def test_large_files_go_in_parts(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a broken upload has left behind is dropped."""
    from ders_cli.remote import bucket as remote_bucket

    monkeypatch.setattr(remote_bucket, "PIECE", 5 << 20)  # the least that S3 takes
    data = np.random.default_rng(0).bytes(12 << 20)
    (tmp_path / "file").write_bytes(data)
    store = open_store("s3://models/parts")
    store.put(tmp_path / "file", "file")
    assert bucket.files("parts")["file"] == data
    parts = [key for method, key, _ in bucket.requests if method == "PUT"]
    assert len(parts) == 3
    bucket.fault = lambda method, key, number, wanted: "503" if method == "PUT" and number == 1 else ""
    with pytest.raises(remote_store.Passing):
        store.put(tmp_path / "file", "broken")
    keys = ("parts/killed", "partsofother/x", "parts/below/x", "x")
    begun = {key: bucket.client.create_multipart_upload(Bucket="models", Key=key)["UploadId"] for key in keys}
    store.abort_unfinished()
    open_now = bucket.client.list_multipart_uploads(Bucket="models").get("Uploads", ())
    for one in open_now:
        bucket.client.abort_multipart_upload(Bucket="models", Key=one["Key"], UploadId=one["UploadId"])
    assert {one["UploadId"] for one in open_now} == {begun[key] for key in keys[1:]}


def test_google_bucket(root: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From gs:// to gs://, the same bytes; a replaced file is noticed by its generation."""
    with servers.google_server() as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        for path in (root / "org" / "source").iterdir():
            google.put(f"in/source/{path.name}", path.read_bytes())
        done("compress", "gs://models/in/source", *FLAGS, "-o", "gs://models/out/small", "--scratch", scratch)
        assert google.files("out/small") == contents(root / "source-int4")
        sent = [name for method, name, _ in google.requests if method == "DELETE"]
        assert sent == ["out/small/.ders-plan.json"]
        with RemoteReader(open_store("gs://models/in/source"), scratch) as reader:
            name = list(reader.tensors)[-1]
            file = f"in/source/{reader.places[name].file}"
            google.put(file, google.objects[file][1])
            with pytest.raises(CheckpointError, match="changed while it was being read"):
                reader.read(name)


def test_google_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence ends, refusals are told in a line."""
    monkeypatch.setattr(remote_store, "SLOWEST", 0.3)
    with servers.google_server() as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        google.fault = "stall"
        with pytest.raises(remote_store.Passing):
            open_store("gs://models/in").listing()
        monkeypatch.setattr(remote_store, "SLOWEST", 60)
        for said in ("Bucket is a requester pays bucket", "the name is invalid"):
            google.fault = said
            with pytest.raises(DersError, match=f"gs://models/in: .*{said.split()[-3]}"):
                open_store("gs://models/in").listing()
    assert logging.getLogger("gcsfs").hasHandlers() and any(
        isinstance(handler, logging.NullHandler) for handler in logging.getLogger("gcsfs").handlers
    )  # else Python prints its tracebacks


# --- addresses


def test_local_addresses(root: Path, tmp_path: Path) -> None:
    done("compress", (root / "org" / "fused").as_uri(), *INT4, "-o", f"file://{tmp_path}/out")
    assert contents(tmp_path / "out") == contents(root / "fused-int4")
    assert ders("compress", "file://elsewhere/model", *INT4).code == 2


@pytest.mark.parametrize(
    "address, says",
    [
        ("ftp://host/model", "expected a folder, or an address"),
        ("hf://datasets/org/model", "expected hf://organisation/model"),
        ("hf://", "expected hf://organisation/model"),
        ("s3://", "expected s3://bucket/folder"),
        ("s3://bucket/a/../b", "expected s3://bucket/folder"),
        ("https://host/model?token=secret", "https://host/model: expected a folder's address, without ? and #"),
        ("https://host/model#secret", "https://host/model: expected a folder's address, without ? and #"),
        ("https://user:secret@host/model", "https://host/model: expected an address without user and password"),
        ("https://secret@host/model", "https://host/model: expected an address without user and password"),
        ("s3://key:secret@bucket/model", "s3://bucket/model: expected an address without user and password"),
        ("s3://bucket/model?versionId=secret", "s3://bucket/model: expected a folder's address"),
        ("hf://user:secret@org/model", "hf://org/model: expected an address without user and password"),
        ("ftp://user:secret@host/model?secret", "ftp://host/model: expected a folder, or an address"),
        ("https://huggingface.co/org/model/tree/main", "is hf://org/model"),
    ],
)
def test_wrong_addresses(tmp_path: Path, address: str, says: str) -> None:
    ran = ders("compress", address, *INT4, "-o", tmp_path / "out")
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1 and "secret" not in ran.err
    for place in (("--base", address), ("-o", address)):
        ran = ders("compress", tmp_path, *INT4, *place, "--json")
        assert ran.code != 0 and "secret" not in ran.out + ran.err
    (tmp_path / "list").write_text(f"'{address}' out\n")
    ran = ders("compress", "--batch", tmp_path / "list", *INT4, "--json")
    assert ran.code == 2 and "secret" not in ran.out + ran.err


@pytest.mark.parametrize(
    "address, expected",
    [
        ("S3://b//m/", "s3://b/m"),
        ("s3://Bucket/M", "s3://Bucket/M"),
        ("HTTPS://Host:8080/A/b//", "https://host:8080/A/b"),
        ("hf://gpt2@v1", "hf://gpt2@v1"),
        ("hf://org/model@refs/pr/1/", "hf://org/model@refs/pr/1"),
        ("file:///a/../b", "/b"),
        ("/a//b/", "/a/b"),
    ],
)
def test_normal_addresses(address: str, expected: str) -> None:
    assert normal(address) == expected


def test_odd_links(root: Path, web: Web, tmp_path: Path, scratch: Path) -> None:
    """What an index page links to beside the files does no harm; a weight file without a size does."""
    web.links = ("..", ".", "../other", "?sort=size", "a%1Bb", "search")
    faults = {"source/pytorch_model.bin": "405", "source/empty.txt": "unsized"}
    web.fault = lambda method, name, number: faults.get(name, "") if method == "HEAD" else ""
    listing = open_store(f"{web.url}/source").listing()
    assert set(listing) == {path.name for path in (root / "org" / "source").iterdir()} - {
        "pytorch_model.bin",
        "empty.txt",
    }
    asked = {name.removeprefix("source/") for method, name, _ in web.requests if method == "HEAD"}
    assert asked == set(listing) | {"pytorch_model.bin", "empty.txt", "search"}
    for name in ("config.json", "model-00002-of-00003.safetensors"):
        faults[f"source/{name}"] = "405"
        with pytest.raises(DersError, match=f"source/{name}: expected its size, found HTTP 405"):
            open_store(f"{web.url}/source").listing()
        faults.pop(f"source/{name}")


def test_hostile_answers(web: Web, tmp_path: Path) -> None:
    """Half characters in an index's names, and numbers that are none."""
    from ders_cli.remote.web import HubStore, _number

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    index = '{"weight_map": {"a": "\\ud800.safetensors", "b": "\\u001b[31m.safetensors"}}'
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    web.root, web.lists = tmp_path, False
    assert set(open_store(f"{web.url}/model").listing()) == {"config.json", "model.safetensors.index.json"}
    assert [_number(text) for text in ("12", "²", "-1", "", "9" * 5000)] == [12, None, None, None, None]
    assert remote_store.line("a\n b\x1b[31m https://h/x?sig=secret\ud800") == "a b[31m https://h/x"
    store = HubStore("hf://org/model", "org/model", "main", web.url)
    store._ask_hub = lambda: {"sha": "c0", "siblings": [{"rfilename": "a", "size": 3, "lfs": "b"}]}
    assert store.listing() == {"a": remote_store.Entry(3, "c0")}


def test_read_only_outputs(root: Path) -> None:
    for address in ("hf://org/model", "http://127.0.0.1:9/model"):
        ran = ders("compress", root / "org" / "fused", *INT4, "-o", address)
        assert ran.code == 2 and "can be read, not written" in ran.err
    assert "hf upload" in ders("restore", root / "fused-int4", "-o", "hf://org/model").err


def test_nothing_there(web: Web, bucket: Bucket, tmp_path: Path, scratch: Path) -> None:
    for address in (f"{web.url}/nothing", "s3://models/nothing", "s3://nobucket/nothing"):
        ran = ders("compress", address, *INT4, "-o", tmp_path / "out", "--scratch", scratch)
        assert ran.code == 2 and ran.err == f"ders: {address}: nothing there; expected a checkpoint's folder\n"
    ran = ders("compress", "http://127.0.0.1:9/model", *INT4, "-o", tmp_path / "out", "--scratch", scratch)
    assert ran.code == 1 and "refused" in ran.err.lower() and ran.err.count("\n") == 1


def test_no_credentials(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    ran = ders("compress", "s3://models/source", *INT4, "-o", tmp_path / "out")
    assert ran.code == 1 and "expected credentials" in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "address, module",
    [("hf://org/model", "huggingface_hub"), ("s3://a/b", "s3fs"), ("gs://a/b", "gcsfs"), ("http://a/b", "requests")],
)
def test_extra_is_missing(monkeypatch: pytest.MonkeyPatch, address: str, module: str) -> None:
    from ders_cli.remote import address as addresses

    monkeypatch.setattr(addresses, "find_spec", lambda name: None if name == module else object())
    ran = ders("compress", address, *INT4)
    assert ran.code == 2 and f"needs {module}: pip install 'ders-cli[remote]'" in ran.err


def test_local_runs_import_nothing_of_it() -> None:
    program = (
        "import sys, ders_cli.source, ders_cli.output, ders_cli.convert;"
        "print([m for m in ('requests', 'fsspec', 's3fs', 'gcsfs', 'aiohttp', 'botocore', 'huggingface_hub') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_hostile_listing(root: Path, scratch: Path) -> None:
    """Names that would leave the mirror are not taken; sizes that cannot be are refused before anything is fetched."""
    from ders_cli.remote.store import Entry, Store

    class Hostile(Store):
        address, name = "s3://evil/model", "model"
        more: dict = {}

        def listing(self):
            folder = root / "org" / "fused"
            return {path.name: Entry(path.stat().st_size, "1") for path in folder.iterdir()} | self.more

        def get(self, name, begin, end, entry):
            return (root / "org" / "fused" / name).read_bytes()[begin:end]

    store = Hostile()
    store.more = {
        name: Entry(3, "1") for name in ("..", ".", "", "../up", "a/b", "nul\0", "x" * 300, "\x1b[31m", "\ud800")
    }
    with RemoteReader(store, scratch) as reader:
        assert {path.name for path in reader.folder.iterdir()} == {
            path.name for path in (root / "org" / "fused").iterdir()
        }
        assert [path.name for path in scratch.iterdir()] == [reader.folder.parent.name]
    calls = []
    store.get = lambda name, begin, end, entry: (
        calls.append(name) or Hostile.get(store, name, begin, end, entry)[calls.count(name) % 2 :]
    )  # every other answer lacks a byte
    store.more = {}
    with RemoteReader(store, scratch) as reader:
        name = max(reader.tensors, key=lambda name: reader.tensors[name].nbytes)
        assert _bytes(reader, name) == _local(root, "fused")[name]
    del store.get
    store.more = {"video.mp4": Entry(10**12, "1")}
    with pytest.raises(DersError, match="video.mp4: 1000000000000"):
        RemoteReader(store, scratch)
    store.more = {"config.json": Entry(10**12, "1")}
    with pytest.raises(CheckpointError, match="s3://evil/model/config.json: 1000000000000 bytes"):
        RemoteReader(store, scratch)
