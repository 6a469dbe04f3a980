"""Changes that keep enough of an input's form to get past its parser: of a JSON tree, of text, of bytes."""

import copy
import json
import math
from random import Random
from typing import Any

ODD = (
    None, True, False, -1, 0, 1, 2, 3, 7, 8, 9, 64, 255, 256, 2**16, 2**20, 2**31 - 1, 2**31, 2**53 + 1, 2**62 - 1, 2**62,
    2**63, 2**64, 10**30, 0.5, 1.5, -0.0, 1e-9, 1e-300, 1e300, 0.9999999999, math.inf, math.nan, "", "x", "é", "\0", "\n",
    "\ud800", "../x", "a" * 300, "0", "BF16", "F32", "F16", "F4", "U8", "I64", "int", "top", "drop", "n:m", "rank", "sparse",
    "chain", "exact", "none", [], {}, [0], [0, 0], [-1, 1], [2**62, 2**62], {"": 0}, [[[]]],
)  # fmt: skip


def tree(value: Any, rng: Random) -> Any:
    """A JSON value with one to three of its nodes replaced, removed, doubled, swapped or nudged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        holder, key = rng.choice(places)
        _change(holder, key, places, rng)
    return value


def _places(node: Any) -> Any:
    """Every (holder, key) of the tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield node, key
        yield from _places(item)


def _change(holder: Any, key: Any, places: list, rng: Random) -> None:
    how, old = rng.randrange(8), holder[key]
    if how == 0:
        del holder[key]
    elif how == 1:  # another node's value
        other, place = rng.choice(places)
        if isinstance(other, dict) and place in other or isinstance(other, list) and place < len(other):
            holder[key] = copy.deepcopy(other[place])
    elif how == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    elif how == 2:
        holder[rng.choice(("x", f"{key}x", key[:-1], "then.codes", key.upper()))] = copy.deepcopy(old)
    elif how == 3:
        holder[key] = [copy.deepcopy(old)] if rng.random() < 0.5 else {"codec": "chain", "first": old, "then": old}
    elif how in (4, 5) and type(old) in (int, float) and abs(old) < 2**200:
        by = (old + 1, old - 1, -old, old * 2, old // 2, old + rng.uniform(-1, 1), float(old), rng.randrange(70))
        holder[key] = rng.choice(by)
    elif how in (4, 5) and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        holder[key] = (
            old[:at] + rng.choice(("", "x", "0", "9", ".", "/", "\0", "é", old)) + old[at + rng.randrange(2) :]
        )
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def json_text(data: bytes, rng: Random) -> bytes:
    """JSON text -> a changed tree as text; what is no JSON is changed as bytes."""
    try:
        return dump(tree(json.loads(data), rng))
    except (ValueError, RecursionError):
        return raw(data, rng)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def raw(data: bytes, rng: Random) -> bytes:
    """One to four changes, mostly in place: a bit flipped, bytes replaced; else a piece cut out, repeated or moved, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 1, 2, 4, 8, 16))
        how = rng.choice(("flip", "flip", "add", "fill", "fill", "cut", "repeat", "move", "end"))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == "add" and at < len(data):
            data[at] = (data[at] + rng.randrange(-4, 5)) % 256
        elif how == "fill":
            data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f", rng.randbytes(1))) * size
        elif how == "cut":
            del data[at : at + size]
        elif how == "repeat":
            data[at:at] = data[at : at + size]
        elif how == "move":
            other = rng.randrange(len(data) + 1)
            data[at : at + size] = data[other : other + size]
        elif how == "end" and rng.random() < 0.3:
            del data[at:]
    return bytes(data)
