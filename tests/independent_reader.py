"""A reader of DeRS checkpoints, format 1, written from docs/format.md alone, to show that the page is enough.

numpy, json and hashlib; nothing of the project. Section numbers are the page's. A float tensor is held as its bits
(uint16, of F32 uint32) until `widen` makes it fp32; a delta's float parts are BF16 but where its codec has a dtype.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

STORED = {"U8": "u1", "I64": "<i8", "BF16": "<u2", "F16": "<u2", "F32": "<u4"}
MANTISSA = {"BF16": 7, "F16": 10, "F32": 23}  # bits of the field
KEEPING = ("drop", "top", "n:m")  # after these, a chain's second codec codes the values


def read_experts(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """(name of the group, label) -> the expert's bits [out, in], uint16 or, of F32, uint32."""
    about, tensors, experts = json.loads((folder / "ders.json").read_text()), read_tensors(folder), {}
    assert about["format"] == 1, about["format"]
    for group in about["groups"]:
        name, dtype = group["name"], group["dtype"]
        base = tensors[f"{name}.base"]
        for number, member in enumerate(group["members"]):
            codec, i, prefix = codec_of(group["codec"], number)
            prefix = f"{name}.{prefix}"
            parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if codec["codec"] == "exact":
                bits = read_exact(parts["extents"][i], parts["stream"], base, dtype)
            else:
                digest = hashlib.sha256(f"{about['recipe']['seed']}/{name}/{member['label']}".encode()).digest()
                key = int.from_bytes(digest[:8], "little")
                own = {part: read_part(codec, part, t[i]) for part, t in parts.items()}
                bits = narrow(widen(base, dtype) + read_delta(codec, own, base.shape, key), dtype)
            experts[name, member["label"]] = bits
    return experts


def codec_of(codec: dict, member: int) -> tuple[dict, int, str]:
    """Section 3: a member's codec, the member's place in its parts, and how these are called behind the group's name."""
    if codec["codec"] != "mixed":
        return codec, member, "delta."
    k = codec["of"][member]
    return codec["codecs"][k], codec["of"][:member].count(k), f"delta.{k}."


def read_part(codec: dict, part: str, stored: np.ndarray) -> np.ndarray:
    """A part as it is, or, of a float one, its fp32 values."""
    while codec["codec"] == "chain":
        codec, part = (codec["then"], part[5:]) if part.startswith("then.") else (codec["first"], part)
    return stored if stored.dtype == np.uint8 else widen(stored, codec.get("dtype", "BF16"))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index, tensors = folder / "model.safetensors.index.json", {}
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for data in (np.fromfile(folder / file, np.uint8) for file in files):
        start = 8 + int(data[:8].view("<u8")[0])
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__" and entry["dtype"] in STORED:
                first, end = entry["data_offsets"]
                stored = data[start + first : start + end].tobytes()
                tensors[name] = np.frombuffer(stored, STORED[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def widen(bits: np.ndarray, dtype: str = "BF16") -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def narrow(weights: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of fp32 weights, rounded to nearest even."""
    bits = weights.view(np.uint32)
    if dtype == "BF16":
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return weights.astype(np.float16).view(np.uint16) if dtype == "F16" else bits


def read_delta(codec: dict, parts: dict[str, np.ndarray], shape: tuple[int, int], key: int) -> np.ndarray:
    """Section 3: the parts of one expert -> D, fp32 [out, in]."""
    kind, (rows, columns) = codec["codec"], shape
    if kind == "chain":
        first = codec["first"]
        then = {part.removeprefix("then."): t for part, t in parts.items() if part.startswith("then.")}
        kept = find_kept(first, parts, shape, key).shape if first["codec"] in KEEPING else shape
        second = read_delta(codec["then"], then, kept, (key + 1) % 2**64)
        if first["codec"] in KEEPING:
            return read_delta(first, parts | {"values": second}, shape, key)
        return read_delta(first, parts, shape, key) + second
    if kind == "int":
        factor, zero = {1: (2, 1), 2: (1, 1.5)}.get(codec["bits"], (1, 2 ** codec["bits"] // 2))
        codes = unpack(parts["codes"], columns, codec["bits"]).astype(np.float32)
        return (factor * codes - np.float32(zero)) * parts["scale"].repeat(codec["group_size"], axis=1)[:, :columns]
    if kind == "none":
        return np.zeros(shape, np.float32)
    if kind == "sparse":
        c, draws = (1 - codec["rate"]) * columns, draw(rows * columns, key).reshape(shape)
        delta, starts = np.zeros(shape, np.float32), np.floor(np.arange(rows + 1) * c + (key >> 48) / 65536).astype(int)
        for row, (a, b) in enumerate(zip(starts, starts[1:])):
            delta[row, np.sort(np.argsort(-draws[row], kind="stable")[: b - a])] = parts["values"][a:b]
        return delta
    delta = np.zeros((rows, columns + 1), np.float32)  # the last column takes ternary's unused slots
    if kind == "rank":
        for left, right in zip(parts["left"].T, parts["right"]):
            delta[:, :-1] += left[:, None] * right
    else:
        kept = find_kept(codec, parts, shape, key)
        values = parts.get("values")
        if kind == "ternary":
            values = np.where(unpack(parts["negative"], kept.shape[1], 1), -parts["scale"], parts["scale"])
        np.put_along_axis(delta, kept, values, axis=1)
    return delta[:, :-1]


def find_kept(codec: dict, parts: dict[str, np.ndarray], shape: tuple[int, int], key: int) -> np.ndarray:
    """The columns [out, k] that a row keeps, ascending."""
    rows, columns = shape
    if "bitmap" in parts:
        return unpack(parts["bitmap"], columns, 1).nonzero()[1].reshape(rows, -1)
    k = max(1, round((1 - codec["rate"] if codec["codec"] == "drop" else codec["density"]) * columns))
    if codec["codec"] == "drop":
        return np.sort(np.argsort(-draw(rows * columns, key).reshape(shape), axis=1, kind="stable")[:, :k])
    width = min(range(64), key=lambda width: k * width + k + (columns >> width) + 1)  # Elias-Fano's l
    set_bits = np.unpackbits(parts["high"], axis=1, bitorder="little").nonzero()[1].reshape(rows, k)
    return (set_bits - np.arange(k) << width) + (unpack(parts["low"], k, width) if width else 0)


def unpack(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """`count` codes of `width` bits from every row of bytes, int64 [rows, count]."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * width]
    return (bits.reshape(-1, count, width).astype(np.int64) << np.arange(width)).sum(axis=2)


def draw(count: int, key: int) -> np.ndarray:
    """Section 4: the first `count` numbers of Philox4x32-10, int64."""
    block, low = np.arange((count + 3) // 4, dtype=np.uint64), 0xFFFFFFFF
    c0, c1, c2, c3, k0, k1 = block & low, block >> 32, block * 0, block * 0, key & low, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low, p0 >> 32 ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return np.stack((c0, c1, c2, c3), axis=1).ravel()[:count].astype(np.int64)


def read_exact(extents: np.ndarray, stream: np.ndarray, base: np.ndarray, dtype: str) -> np.ndarray:
    """Section 5: one expert's chunks -> its bits [out, in]."""
    step = max(1, 2**20 // base.shape[1])
    chunks = zip(range(0, len(base), step), extents.tolist())
    rows = [read_chunk(stream[a:b].tobytes(), base[row : row + step].ravel(), dtype) for row, (a, b) in chunks]
    return np.concatenate(rows).reshape(base.shape)


def read_chunk(data: bytes, base: np.ndarray, dtype: str) -> np.ndarray:
    mode, contexts, at = data[0], data[1], 2
    if mode == 0:
        return np.frombuffer(data[1:], STORED[dtype])
    edges, tables = [], []  # by context: first exponent; tokens of the slots 0..4095, {token: (f, first slot)}
    for _ in range(contexts):
        (edge, first, last), at, slots, owned = data[at : at + 3], at + 3, [], {}
        for token in range(first, last + 1):
            f, at = (data[at], at + 1) if data[at] < 128 else (data[at] % 128 * 256 + data[at + 1], at + 2)
            owned[token] = f, len(slots)
            slots += [token] * f
        edges.append(edge)
        tables.append((slots, owned))
    states, count = np.frombuffer(data, "<u4", 8, at).tolist(), int.from_bytes(data[at + 32 : at + 36], "little")
    words, at = iter(np.frombuffer(data, "<u2", count, at + 36).tolist()), 8 * (at + 36 + 2 * count)  # now in bits

    magnitude = base.dtype.type(2 ** (8 * base.itemsize - 1) - 1)  # mask: all but the sign bit
    exponents, values = (base & magnitude) >> MANTISSA[dtype], np.empty_like(base)
    for i, context in enumerate((np.searchsorted(edges, exponents, "right") - 1).tolist()):
        slots, owned = tables[context]
        above, slot = divmod(states[i % 8], 4096)
        token = slots[slot]
        f, first = owned[token]
        x = f * above + slot - first
        states[i % 8] = x if x >= 65536 else x * 65536 + next(words)
        if mode == 2:
            width, lead = MANTISSA[dtype] + 1, token
        else:
            width, lead = (0, token) if token < 16 else (token // 4 - 2, 4 + token % 4)
        raw = int.from_bytes(data[at // 8 : at // 8 + 5], "little") >> at % 8
        values[i], at = lead << width | raw % 2**width, at + width
    assert states == [65536] * 8 and next(words, None) is None and (at + 7) // 8 == len(data)

    def flip(bits):  # a pattern's key, and a key's pattern
        return np.where(bits > magnitude, bits ^ magnitude, bits)

    # Unsigned numbers wrap around: the page's "modulo".
    differences = np.where(values & 1, ~(values >> 1), values >> 1)
    return flip(differences + flip(base) if mode == 1 else differences)
