"""Synthesised weights that are kept, the least recently used going first: one bound for all layers that share it."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

CACHE_BYTES = 1 << 30  # of DersExperts, unless the user says otherwise


class WeightCache:
    """{(module, member): weight}, at most `limit` bytes together. Entries of a module go when it goes.

    Each entry has a mark of the parameters that it was made from; another mark makes it anew.
    """

    def __init__(self, limit: int):
        self._limit, self.held = limit, 0
        self._entries: OrderedDict[tuple[weakref.ref, int], tuple[object, Tensor]] = OrderedDict()
        self._expected: dict[weakref.ref, int] = {}  # bytes that all weights of each module would take, and their sum
        self._wanted = 0
        self._lock = threading.RLock()

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._shrink()

    def get(self, module: nn.Module, member: int, mark: object, make: Callable[[], Tensor]) -> Tensor:
        """The weight of a member, made if it isn't here; kept if it is no larger than the limit."""
        at = (weakref.ref(module, self._gone), member)
        with self._lock:
            if (entry := self._entries.get(at)) is not None and entry[0] == mark:
                self._entries.move_to_end(at)
                return entry[1]
        weight = make()
        with self._lock:
            self._remove(at)
            if weight.nbytes <= self._limit:
                self._entries[at] = (mark, weight)
                self.held += weight.nbytes
                self._shrink()
        return weight

    def has_room(self, module: nn.Module, expected: int) -> bool:
        """Whether all weights of all modules that have asked would fit together; `expected` bytes are this one's."""
        with self._lock:
            ref = weakref.ref(module, self._gone)
            self._wanted += expected - self._expected.get(ref, 0)
            self._expected[ref] = expected
            return self._wanted <= self._limit

    def forget(self, module: nn.Module) -> None:
        """Free what is held of a module."""
        ref = weakref.ref(module)
        with self._lock:
            for at in [at for at in self._entries if at[0] == ref]:
                self._remove(at)

    def _gone(self, ref: weakref.ref) -> None:
        with self._lock:
            self._wanted -= self._expected.pop(ref, 0)
            for at in [at for at in self._entries if at[0] == ref]:
                self._remove(at)

    def _remove(self, at: tuple[weakref.ref, int]) -> None:
        if (entry := self._entries.pop(at, None)) is not None:
            self.held -= entry[1].nbytes

    def _shrink(self) -> None:
        while self.held > self._limit:
            self._remove(next(iter(self._entries)))
