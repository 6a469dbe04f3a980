"""Who still needs a stored tensor: it is let go when the last expert that it holds has been worked on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from .layouts import ExpertGroup


class Users:
    """Counts groups of experts off. Threads may call `done` at once: nothing is lost, and letting go twice is no harm."""

    def __init__(self, groups: Sequence[ExpertGroup], tensors_of: Callable[[ExpertGroup], list[str]]):
        self._tensors_of = tensors_of
        self._groups: dict[str, set[str]] = defaultdict(set)  # tensor -> names of the groups that it holds
        for group in groups:
            for name in tensors_of(group):
                self._groups[name].add(group.name)
        self._members: dict[str, set[int]] = defaultdict(set)  # group -> its experts that are finished
        self._finished: dict[str, set[str]] = defaultdict(set)  # tensor -> its groups that are finished

    def done(self, group: ExpertGroup, members: Iterable[int]) -> list[str]:
        """Some experts of a group are finished for this run. The tensors that nobody needs any more."""
        self._members[group.name].update(members)
        if len(self._members[group.name]) < len(group.members):
            return []
        self._members[group.name].clear()  # the next run counts from the start
        free = []
        for name in self._tensors_of(group):
            self._finished[name].add(group.name)
            if self._finished[name] == self._groups[name]:
                self._finished[name].clear()
                free.append(name)
        return free
