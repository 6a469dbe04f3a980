"""Space is taken beforehand where the file system can, refused in words where there is none, and given back."""

import os
import sys
from pathlib import Path

import pytest

from ders_cli.checkpoint import disk
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter


@pytest.fixture
def handle(tmp_path: Path):
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


@pytest.mark.parametrize("size", [0, 1, 4095, 3 << 20])
def test_allocated(handle: int, size: int) -> None:
    disk.allocate(handle, size)
    found = os.fstat(handle)
    assert found.st_size == size
    assert found.st_blocks * 512 >= size or sys.platform != "linux"


def test_a_file_system_without_the_call(handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_function", lambda: None)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("would write into every block"))
    disk.allocate(handle, 3 << 20)
    assert os.fstat(handle).st_size == 3 << 20 and not disk.punch(handle, 0, 4096)


def test_given_back(handle: int) -> None:
    data = os.urandom(1 << 20)
    os.pwrite(handle, data, 0)
    os.fsync(handle)
    before = os.fstat(handle).st_blocks
    if sys.platform == "linux":
        assert disk.punch(handle, 64 << 10, 512 << 10) and os.fstat(handle).st_blocks < before
        data = data[: 64 << 10] + bytes(512 << 10) + data[576 << 10 :]
    assert os.pread(handle, 2 << 20, 0) == data


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "_fallocate", lambda *_: True)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as raised:
        ShardWriter(tmp_path / "x.safetensors", {"a": TensorSpec((4,), "U8")})
    assert "x.safetensors" in raised.value.filename
