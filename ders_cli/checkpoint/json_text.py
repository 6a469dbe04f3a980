"""JSON from strangers: what serde_json takes, and no more memory than an honest file of its size.

Python's parser is more lenient than the one safetensors has (UTF-16, byte order marks, lone surrogates, keys that stand
twice, NaN), and makes up to 30 bytes of objects from one byte of `[[],[],[],`. Both are settled before, and while, parsing.
"""

import json
import re
from collections import Counter
from typing import Any

LENIENT_BYTES = 4_000_000  # below, nothing can be made that hurts
# In honest texts above that: a safetensors header of 5-letter names has a bracket for 25 bytes and a separator for 8;
# ders.json and an index have fewer.
BYTES_PER_BRACKET, BYTES_PER_SEPARATOR = 20, 7
MOST_DEPTH = 40  # real configurations stay below 10; Python's own functions end at about 1,000
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: bytes, constants: tuple[str, ...] = ()) -> dict[str, Any]:
    """The object that a UTF-8 text holds. `constants`: of NaN, Infinity and -Infinity, those that are taken.

    Raises ValueError or RecursionError, which say what is wrong.
    """
    _refuse_bomb(text)

    def constant(name: str) -> float:
        if name not in constants:
            raise ValueError(f"{name} is no number in JSON")
        return float(name)

    found = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=constant)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    if SURROGATE.search(text):
        json.dumps(
            found, ensure_ascii=False
        ).encode()  # raises UnicodeEncodeError, a ValueError, where one stands alone
    return found


def refuse_depth(value: Any) -> None:
    """Raise ValueError for JSON that is nested deeper than whatever will handle it can go."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if type(child) in (dict, list)]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEPTH} deep")


def _refuse_bomb(text: bytes) -> None:
    if len(text) <= LENIENT_BYTES:
        return
    brackets = text.count(b"[") + text.count(b"{")
    separators = text.count(b",") + text.count(b":")
    if brackets * BYTES_PER_BRACKET > len(text) or separators * BYTES_PER_SEPARATOR > len(text):
        raise ValueError(
            f"{brackets} lists and objects and {separators} separators in {len(text)} bytes, which no checkpoint needs"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"key {twice!r:.100} stands twice")
    return keys
