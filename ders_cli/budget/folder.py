"""A budget for the whole output folder: what stands beside the deltas depends on the plan, so plans are laid out until one fits.

Beside the deltas there are base, copied tensors, headers, tokenizer and ders.json, whose recipe, hashes and codecs take the more the
more a plan mixes. A plan that takes too much is solved again with as much less capacity.
"""

from collections.abc import Callable

from ..errors import UsageError
from ..report import human_bytes
from .choice import Choice


def within_folder(most: int, fewest: int, solve: Callable[[int], Choice], folder: Callable[[Choice], int]) -> Choice:
    """The best choice whose folder takes at most `most` bytes.

    fewest: delta bytes of the choice with fewest; solve: the best within so many delta bytes; folder: bytes of a choice's whole
    output. Raises UsageError where that of the smallest deltas does not fit.
    """
    smallest = solve(fewest)
    least = folder(smallest)
    if least > most:
        raise UsageError(
            f"--budget {human_bytes(most)}: the plan of the smallest deltas takes {least:,} bytes, all files of the output together; "
            "give it that or more"
        )
    capacity = fewest + most - least
    while capacity > fewest:
        choice = solve(capacity)
        excess = folder(choice) - most
        if excess <= 0:
            return choice
        capacity = min(capacity, choice.bytes) - excess
    return smallest
