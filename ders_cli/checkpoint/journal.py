"""What is finished of an output file that is not: a line of JSON for each part, so that a killed run goes on in its middle.

The lines say that bytes were handed to the kernel, not that they are on the disk, and cost no fsync. A killed process loses
none of them; a machine that goes down may. So a journal holds for one boot of one machine, and a file is begun anew in any other.
"""

import json
import os
import platform
import secrets
from pathlib import Path
from threading import Lock
from typing import Any

from .files import pwrite_all
from .lock import take

BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The parts of one output file that are finished, by their keys. `add` may be called from any thread."""

    def __init__(self, path: Path, resume: bool):
        """`resume`: go on with the journal that stands at `path`, if it holds; else begin a new one in its place."""
        self.path, self._lock, self._handle = path, Lock(), -1
        self.token = ""  # names the unfinished file that belongs to this journal
        self.done: dict[str, Any] = {}  # key -> what was noted of a finished part
        if not (resume and self._go_on()):
            self.begin()

    def _go_on(self) -> bool:
        """Take an earlier run's journal, up to its last whole line; False if there is none that holds."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            if not take(handle):
                raise ValueError("its writer lives")
            text = b"".join(iter(lambda: os.read(handle, 1 << 20), b""))
            whole = text[: text.rfind(b"\n") + 1]
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            if not first["boot"] or first["boot"] != _boot():
                raise ValueError("of another boot")
            self.token, self.done = first["token"], {line["key"]: line["noted"] for line in lines}
            self._end = len(whole)
            os.ftruncate(handle, self._end)
        except (OSError, ValueError, KeyError, TypeError):
            os.close(handle)
            return False
        self._handle = handle
        return True

    def begin(self) -> None:
        """An empty journal in a new file: whoever still writes the old one writes into a file without a name."""
        self.token, self.done = secrets.token_hex(4), {}
        fresh = self.path.with_name(f"{self.path.name}.{self.token}")
        self._handle, self._end = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), 0
        try:
            take(self._handle)
            self._write({"boot": _boot(), "token": self.token})
            os.replace(fresh, self.path)
        except BaseException:
            self.close()
            raise

    def add(self, key: str, noted: Any) -> None:
        """Note that a part is finished; its bytes have been written before."""
        with self._lock:
            self._write({"key": key, "noted": noted})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        pwrite_all(self._handle, text, self._end)
        self._end += len(text)

    def close(self) -> None:
        """Let it go; nothing happens where it is closed."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)

    def remove(self) -> None:
        """Nothing that it says holds any more."""
        self.path.unlink(missing_ok=True)
        self.close()


def _boot() -> str:
    """What names this boot of this machine; "" where the system doesn't say."""
    try:
        return f"{BOOT.read_text().strip()} {platform.node()}"
    except OSError:
        return ""
