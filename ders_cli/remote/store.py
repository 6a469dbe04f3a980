"""What a remote folder can do: list its files, give ranges of bytes, take files. And: trying again."""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from ..errors import CheckpointError, DersError, UsageError

AT_ONCE = 8  # requests on the way
TRIES = 8  # waits of 0.5, 1, 2 ... 20 seconds, less up to half by chance: about 40 seconds in all
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
STALL = 30.0  # seconds without a byte after which a connection is given up
SLOWEST = 300.0  # seconds that one request of at most a part (reader.py) may take in all

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A remote file. `mark` changes when its content does (an ETag, a generation, a hash); "" where there is none."""

    size: int
    mark: str


class Passing(Exception):
    """A failure that may be over at the next try: a 503, a broken connection, too few bytes, silence.

    `wait`: seconds that the server asked for.
    """

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


class Store(ABC):
    """A remote folder. Safe to use from several threads; pickles as its address, without its connections."""

    address: str  # in its normal form (address.py), and as errors name it
    name: str  # of the checkpoint: the address's last part

    @abstractmethod
    def listing(self) -> dict[str, Entry | None]:
        """Files by name, and folders as None; empty if there is nothing at this address."""

    @abstractmethod
    def get(self, name: str, begin: int, end: int, entry: Entry) -> bytes:
        """Bytes begin ... end of a file, in one try. Raises Passing; CheckpointError if it is not the file listed."""

    def put(self, path: Path, name: str) -> Entry:
        """Store a file under a name, whole or not at all, in one try; as the listing has it then. Raises Passing."""
        raise UsageError(f"{self.address}: can be read, not written; expected a folder, s3://... or gs://...")

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that are there. Raises Passing."""
        raise UsageError(f"{self.address}: can be read, not written; expected a folder, s3://... or gs://...")

    def abort_unfinished(self) -> None:  # noqa: B027 (most have nothing like it)
        """Drop what interrupted uploads to this folder have left behind and is paid for though it is no file."""

    def where(self, name: str) -> str:
        """A file's own address."""
        return f"{self.address.rstrip('/')}/{name}"


def patiently(action: Callable[[], Result], what: str, stop: Event | None = None) -> Result:
    """action(), again after every Passing, each time later; then DersError with `what` and the last failure.

    `stop`, once set, ends the waiting.
    """
    stop, last = stop or Event(), None
    for attempt in range(TRIES):
        try:
            return action()
        except Passing as failure:
            last = failure
        wait = max(last.wait, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        if attempt + 1 < TRIES and stop.wait(min(wait, 4 * LONGEST_WAIT)):
            raise DersError(f"{what}: stopped")
    raise DersError(f"{what}: {last}; gave up after {TRIES} tries")


def fetch(store: Store, name: str, begin: int, end: int, entry: Entry, stop: Event | None = None) -> bytes:
    """Bytes begin ... end of a remote file, tried patiently."""

    def once() -> bytes:
        data = store.get(name, begin, end, entry)
        if len(data) != end - begin:
            raise Passing(f"{end - begin} bytes asked for, {len(data)} came")
        return data

    return patiently(once, f"{store.where(name)}: bytes {begin}-{end - 1}", stop) if end > begin else b""


def each(action: Callable[[str, Event], Result], names: Iterable[str]) -> list[Result]:
    """action(name, stop) of every name, AT_ONCE at a time. An error or an interruption stops the rest."""
    stop, pool = Event(), ThreadPoolExecutor(AT_ONCE, "open")
    try:
        futures = [pool.submit(action, name, stop) for name in names]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def is_plain(name: str) -> bool:
    """A file name that stays in its folder and can be printed: no control characters, no half characters."""
    return (
        name.isprintable() and name not in ("", ".", "..") and not set("/\\") & set(name) and len(name.encode()) <= 255
    )


def line(said: object) -> str:
    """What a server or a library says, in one line that can be printed, without the queries of its addresses."""
    text = re.sub(r"\?\S+", "", " ".join(str(said).split()))[:200]
    return "".join(letter for letter in text if letter.isprintable())


def changed(where: str, was: str, is_now: str) -> CheckpointError:
    """A file is not what it was when the checkpoint was opened."""
    return CheckpointError(f"{where}: changed while it was being read ({was} then, {is_now} now); start again")
