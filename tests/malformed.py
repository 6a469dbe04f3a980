"""Checkpoints that lie: some hundred small inputs, each a tiny model with one thing changed, and what `ders` has to answer.

A case starts from one of the folders that `originals` makes once (a MoE in one file and in two, its dense relative, an
adapter, a DeRS form for every codec), changes it in place, and names the commands to run, each with its exit code and a
distinctive part of its one line on stderr. An input that is odd but legal has code 0 and the reason.

No case needs torch or transformers: all files are made here, byte for byte.
"""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ders_cli.checkpoint.manifest import manifest_text

HIDDEN, INNER, VOCAB, EXPERTS = 8, 6, 16, 3
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
MOE = COMMON | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
DENSE = COMMON | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 4}
LAYER = "model.layers.0"
EXPERT = f"{LAYER}.block_sparse_moe.experts.0.w1.weight"
GROUP = f"{LAYER}.mlp.experts"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ADAPTER = "adapter_model.safetensors"
# a DeRS form for each kind of part
DELTAS = {
    "exact": "exact",
    "int4": "int4",
    "int1": "int1",
    "drop": "drop0.5",
    "sparse": "sparse0.5",
    "top": "top0.3",
    "bitmap": "2:4",
    "ternary": "ternary0.3",
    "rank": "rank2",
    "chain": "drop0.5+int4",
}

COMPRESS = "compress {m} --delta int4 -o {out} -q -j 1"
VERIFY = "verify {m} -q -j 1"
RESTORE = "restore {m} -o {out} -q -j 1"
UPCYCLE = "upcycle {m} --experts 2 --top-k 1 --full -o {out} -q"
DONOR = "upcycle {dense} --expert-from {m} --expert-from {m} --top-k 1 --full -o {out} -q"
RECIPE = "compress {plain} --recipe {m}/recipe.yaml -o {out} -q -j 1"
QUANTIZE = "quantize {m} --bits 4 -o {out} -q -j 1"


@dataclass(frozen=True)
class Run:
    """One command of a case. `said`: what its message must hold; of a finding of verify (3), on stdout."""

    command: str
    code: int = 4
    said: str = ""


@dataclass(frozen=True)
class Case:
    """`make(folder)` turns a copy of the original `of` into the lie. `why`: where a code is 0, the reason."""

    kind: str
    name: str
    of: str
    make: Callable[[Path], None]
    runs: tuple[Run, ...]
    why: str = ""
    bomb: bool = field(default=False, compare=False)  # worth watching the memory

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


# --- the originals ---


def _bits(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """bf16 bits of small numbers."""
    values = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _around() -> dict[str, np.ndarray]:
    """What stands around a FFN."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        f"{LAYER}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{LAYER}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{LAYER}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{LAYER}.input_layernorm.weight": (HIDDEN,),
        f"{LAYER}.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    return {name: _bits(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def moe_tensors() -> dict[str, np.ndarray]:
    tensors = _around() | {f"{LAYER}.block_sparse_moe.gate.weight": _bits((EXPERTS, HIDDEN), 50)}
    for e in range(EXPERTS):
        for n, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
            tensors[f"{LAYER}.block_sparse_moe.experts.{e}.{n}.weight"] = _bits(shape, 60 + e)
    return tensors


def dense_tensors() -> dict[str, np.ndarray]:
    ffn = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return _around() | {f"{LAYER}.mlp.{name}_proj.weight": _bits(shape, 60) for name, shape in ffn.items()}


def entries_of(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Header and data of bf16 tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, bits in tensors.items():
        where = [len(data), len(data) + bits.nbytes]
        entries[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": where}
        data += bits.tobytes()
    return entries, data


def framed(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `header` as JSON, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parted(file: Path) -> tuple[dict[str, Any], bytes]:
    """The inverse of `framed`."""
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8:end]), whole[end:]


def _save(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: tuple[str, ...] = (MODEL,)) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"model": "tiny"}')
    names, placed = list(tensors), {}
    for number, file in enumerate(shards):
        part = names[number * len(names) // len(shards) : (number + 1) * len(names) // len(shards)]
        (folder / file).write_bytes(framed(*entries_of({name: tensors[name] for name in part})))
        placed |= dict.fromkeys(part, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index))


def _save_adapter(folder: Path) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{LAYER}.mlp.up_proj.lora_"
    factors = {f"{name}A.weight": _bits((2, HIDDEN), 90), f"{name}B.weight": _bits((INNER, 2), 91)}
    (folder / ADAPTER).write_bytes(framed(*entries_of(factors)))


def originals(root: Path, done: Callable[..., Any]) -> None:
    """Every folder that a case starts from. `done(*arguments)` runs a command that must succeed."""
    _save(root / "plain", MOE, moe_tensors())
    _save(root / "sharded", MOE, moe_tensors(), SHARDS)
    _save(root / "dense", DENSE, dense_tensors())
    _save_adapter(root / "adapter")
    (root / "recipe").mkdir()
    (root / "recipe" / "recipe.yaml").write_text("delta: int4\n")
    for name, delta in DELTAS.items():
        done("compress", root / "plain", "--delta", delta, "-o", root / name, "-q", "-j", 1)
    done("compress", root / "sharded", "--delta", "exact", "-o", root / "ofshards", "-q", "-j", 1)


def copy_of(root: Path, case: Case, to: Path) -> Path:
    """The case's folder, made."""
    shutil.copytree(root / case.of, to)
    case.make(to)
    return to


# --- ways to change one ---


def _header(change: Callable[[dict], Any], file: str = MODEL) -> Callable[[Path], None]:
    """`change` the header, in place or by returning another (or its bytes); the data stay."""

    def make(folder: Path) -> None:
        entries, data = parted(folder / file)
        found = change(entries)
        (folder / file).write_bytes(framed(entries if found is None else found, data))

    return make


def _file(change: Callable[[bytes], bytes], file: str = MODEL) -> Callable[[Path], None]:
    """`change` a whole file's bytes."""

    def make(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return make


def _text(old: str, new: str, file: str = MODEL) -> Callable[[Path], None]:
    """Replace a piece of the header's own text, once: what Python's json would not write."""

    def make(folder: Path) -> None:
        entries, data = parted(folder / file)
        text = json.dumps(entries, separators=(",", ":"))
        assert old in text, (old, text[:500])
        (folder / file).write_bytes(framed(text.replace(old, new, 1).encode("utf-8", "surrogatepass"), data))

    return make


def _json(change: Callable[[Any], Any], file: str) -> Callable[[Path], None]:
    """`change` a JSON file, in place or by returning another."""

    def make(folder: Path) -> None:
        value = json.loads((folder / file).read_bytes())
        found = change(value)
        (folder / file).write_text(json.dumps(value if found is None else found))

    return make


def _manifest(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """`change` ders.json in place, and give it the checksum of what it says now."""

    def make(folder: Path) -> None:
        value = json.loads((folder / "ders.json").read_bytes())
        change(value)
        (folder / "ders.json").write_bytes(manifest_text(value))

    return make


def _add(tensors: dict[str, tuple[str, list[int], bytes]], file: str = MODEL) -> Callable[[Path], None]:
    """Append tensors: name -> (dtype, shape, bytes)."""

    def make(folder: Path) -> None:
        entries, data = parted(folder / file)
        for name, (dtype, shape, raw) in tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        (folder / file).write_bytes(framed(entries, data))

    return make


def _retensor(change: Callable[[dict[str, Any]], None], file: str = MODEL) -> Callable[[Path], None]:
    """`change` {name: [dtype, shape, bytes]}; the file is laid out anew, without holes."""

    def make(folder: Path) -> None:
        entries, data = parted(folder / file)
        metadata = entries.pop("__metadata__", None)
        tensors = {
            name: [entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]]
            for name, entry in entries.items()
        }
        change(tensors)
        (folder / file).write_bytes(framed({"__metadata__": metadata} if metadata else {}, b""))
        _add({name: tuple(one) for name, one in tensors.items()}, file)(folder)

    return make


def _put(path: tuple, value: Any) -> Callable[[Any], None]:
    """Set what stands at a path of keys; `...` stands for the first key or entry. DELETE takes it away."""

    def change(node: Any) -> None:
        for key in path[:-1]:
            node = node[_key(node, key)]
        last = _key(node, path[-1])
        if value is DELETE:
            del node[last]
        else:
            node[last] = value

    return change


def _key(node: Any, key: Any) -> Any:
    return (next(iter(node)) if isinstance(node, dict) else 0) if key is ... else key


DELETE = object()


def _refused(said: str, *commands: str, code: int = 4) -> tuple[Run, ...]:
    return tuple(Run(command, code, said) for command in commands or (COMPRESS,))


def _fine(*commands: str) -> tuple[Run, ...]:
    return tuple(Run(command, 0) for command in commands or (COMPRESS,))


# --- classes of lies ---


def _framing() -> Iterator[Case]:
    """The eight bytes in front, and where the file ends."""

    def case(name: str, change: Callable[[bytes], bytes], said: str) -> Case:
        return Case("framing", name, "plain", _file(change), _refused(said, COMPRESS, VERIFY))

    for name, length in {
        "2^63": 2**63,
        "2^64-1": 2**64 - 1,
        "2^32": 2**32,
        "one above safetensors' limit": 100_000_001,
        "just safetensors' limit": 100_000_000,
    }.items():
        yield case(
            f"header of {name} bytes", lambda raw, n=length: struct.pack("<Q", n) + raw[8:], "announced in a file of"
        )
    for by in (-1, 1, -8, 8):
        yield case(
            f"header length off by {by}",
            lambda raw, by=by: struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] + by) + raw[8:],
            "header is not JSON" if by != -1 and by != -8 else "model.safetensors",
        )
    yield case("header length 0", lambda raw: bytes(8) + raw[8:], "header is not JSON")
    yield case("header length 1", lambda raw: struct.pack("<Q", 1) + raw[8:], "header is not JSON")
    yield case("header length big-endian", lambda raw: raw[:8][::-1] + raw[8:], "announced in a file of")
    for size in (0, 1, 7):
        yield case(f"file of {size} bytes", lambda raw, n=size: raw[:n], "announced in a file of")
    yield case("file of 8 zero bytes", lambda raw: bytes(8), "header is not JSON")
    yield case("file of zeros", lambda raw: bytes(len(raw)), "header is not JSON")
    yield case("no data", lambda raw: raw[: 8 + struct.unpack("<Q", raw[:8])[0]], "Is the file complete?")
    yield case("half of it", lambda raw: raw[: len(raw) // 2], "model.safetensors")
    yield case("last byte missing", lambda raw: raw[:-1], "Is the file complete?")
    yield case("a byte after the end", lambda raw: raw + b"\0", "Is the file complete?")
    yield case("eight zeros after the end", lambda raw: raw + bytes(8), "Is the file complete?")
    yield case("the file twice", lambda raw: raw + raw, "Is the file complete?")
    yield case("a pickle", lambda raw: b"\x80\x04\x95" + raw, "announced in a file of")
    yield case("a zip", lambda raw: b"PK\x03\x04" + raw, "announced in a file of")
    yield case("gzip", lambda raw: b"\x1f\x8b\x08\x00" + raw, "announced in a file of")
    yield case(
        "a Git LFS pointer", lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "announced in a file of"
    )
    yield case("HTML of a login page", lambda raw: b"<!DOCTYPE html><html>" + raw, "announced in a file of")


def _header_text() -> Iterator[Case]:
    """The header's text as JSON."""

    def raw(name: str, change: Callable[[bytes], bytes], said: str = "header is not JSON", bomb: bool = False) -> Case:
        def make(folder: Path) -> None:
            entries, data = parted(folder / MODEL)
            text = json.dumps(entries, separators=(",", ":")).encode()
            (folder / MODEL).write_bytes(framed(change(text), data))

        return Case("header text", name, "plain", make, _refused(said), bomb=bomb)

    for name, text in {
        "empty": b"",
        "spaces": b"        ",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"x"',
        "a number": b"1",
        "true": b"true",
        "an open brace": b"{",
        "braces the wrong way": b"}{",
        "cut in a string": b'{"a',
        "a comment": b'{/* */"a":1}',
        "single quotes": b"{'a':1}",
        "no quotes": b"{a:1}",
        "YAML": b"a: 1",
        "a NUL": b"\0",
    }.items():
        yield raw(name, lambda _, text=text: text)
    yield raw("no tensors", lambda _: b"{}", "Is the file complete?")
    yield raw("a comma at the end", lambda text: text[:-1] + b",}")
    yield raw("two objects", lambda text: text + b"{}")
    yield raw("garbage behind it", lambda text: text + b"x")
    yield raw("NULs behind it", lambda text: text + bytes(8))
    yield raw("a space in front", lambda text: b" " + text)
    yield raw("a line end in front", lambda text: b"\n" + text)
    yield raw("a byte order mark", lambda text: b"\xef\xbb\xbf" + text)
    yield raw("UTF-16", lambda text: text.decode().encode("utf-16"))
    yield raw("UTF-16 without a mark", lambda text: text.decode().encode("utf-16-le"))
    yield raw("UTF-32", lambda text: text.decode().encode("utf-32"))
    yield raw("Latin-1", lambda text: text.replace(b"model.norm", b"mod\xe9l.norm"))
    yield raw("an overlong slash", lambda text: text.replace(b"model.norm", b"model\xc0\xafnorm"))
    yield raw("a surrogate in UTF-8", lambda text: text.replace(b"model.norm", b"model\xed\xa0\x80norm"))
    yield raw("a raw line end in a name", lambda text: text.replace(b"model.norm", b"model\nnorm"))
    yield raw("a raw escape in a name", lambda text: text.replace(b"model.norm", b"model\x1bnorm"))
    yield raw("a bad escape", lambda text: text.replace(b"model.norm", b"model\\xnorm"))
    for name, escape in {"high": b"\\ud800", "low": b"\\uDC00", "reversed": b"\\udc00\\ud800"}.items():
        yield raw(f"a lone surrogate, {name}, in a name", lambda text, e=escape: text.replace(b"model.norm", b"m" + e))
    yield raw("a lone surrogate in metadata", lambda text: text.replace(b'"pt"', b'"\\uDBFF"'))
    yield raw("a lone surrogate as a key", lambda text: text.replace(b'"format"', b'"\\udFFF"'))
    yield Case(
        "header text",
        "a surrogate pair",
        "plain",
        _text('"pt"', '"\\ud83d\\ude00"'),
        _fine(),
        "is one character, as JSON writes those above U+FFFF",
    )
    yield Case(
        "header text",
        "white space anywhere",
        "plain",
        _header(lambda entries: json.dumps(entries, indent=3).encode() + b"\n\t "),
        _fine(),
        "JSON allows it, safetensors reads it, and ders.json keeps the header's text",
    )
    for name, opening in {
        "lists": b"[",
        "objects": b'{"a":',
        "a tensor's value": b'{"a":[',
        "in lists": b'{"a":[[',
    }.items():
        yield raw(f"deep nesting, {name}", lambda _, o=opening: o * 100_000)
    for name, unit in {
        "empty lists": b"[],",
        "empty objects": b"{},",
        "small objects": b'{"a":0},',
        "lists of lists": b"[[]],",
        "numbers": b"0,",
        "short strings": b'"ab",',
        "floats": b"1.5,",
    }.items():
        yield raw(
            f"bomb of {name}, 20 MB", lambda _, u=unit: b'{"a":[' + u * (20_000_000 // len(u)) + b"0]}", bomb=True
        )
    yield raw(
        "bomb of keys, 20 MB",
        lambda _: b"{" + b"".join(b'"%x":0,' % n for n in range(2_000_000)) + b'"x":0}',
        bomb=True,
    )
    yield raw(
        "bomb below the lenient size", lambda _: b'{"a":[' + b"[]," * 1_000_000 + b"0]}", "expected an object", True
    )


def _duplicates() -> Iterator[Case]:
    name = "model.norm.weight"
    for what, old, new in (
        ("a tensor", f'"{name}":', '"lm_head.weight":'),
        ("a tensor by an escape", f'"{name}":', '"lm_he\\u0061d.weight":'),
        ("metadata", '{"__metadata__":{', '{"__metadata__":{},"__metadata__":{'),
        ("a key of metadata", '"format":"pt"', '"format":"pt","format":"tf"'),
        ("dtype", '"dtype":"BF16"', '"dtype":"BF16","dtype":"F16"'),
        ("the same dtype", '"dtype":"BF16"', '"dtype":"BF16","dtype":"BF16"'),
        ("shape", '"shape":', '"shape":[1],"shape":'),
        ("data_offsets", '"data_offsets":', '"data_offsets":[0,0],"data_offsets":'),
    ):
        yield Case("duplicate keys", what, "plain", _text(old, new), _refused("stands twice"))
    for what, file, of in (("config.json", "config.json", "plain"), ("the index", INDEX, "sharded")):
        change = _file(lambda raw: raw.rstrip()[:-1] + b',"x":1,"x":2}', file)
        yield Case("duplicate keys", what, of, change, _refused("stands twice"))
    deep = _file(lambda raw: raw.rstrip()[:-1] + b',"x":{"y":[{"z":1,"z":1}]}}', "config.json")
    yield Case("duplicate keys", "deep in config.json", "plain", deep, _refused("stands twice"))
    double = _file(
        lambda raw: raw.replace(b'"weight_map": {', b'"weight_map": {"lm_head.weight": "x.safetensors",'), INDEX
    )
    yield Case("duplicate keys", "a name in the index", "sharded", double, _refused("stands twice"))
    twice = _file(lambda raw: raw.replace(b'"format"', b'"format": 1, "format"', 1), "ders.json")
    yield Case("duplicate keys", "ders.json", "int4", twice, _refused("stands twice", VERIFY, RESTORE))


NUMBERS = {  # as JSON text, where a whole number belongs
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "a float": "8.0",
    "1e1": "1e1",
    "true": "true",
    "false": "false",
    "null": "null",
    "a string": '"8"',
    "a list": "[8]",
    "an object": "{}",
    "negative": "-8",
    "2^63": str(2**63),
    "2^64": str(2**64),
    "5,000 digits": "9" * 5000,
    "a leading zero": "08",
    "a plus": "+8",
    "hexadecimal": "0x8",
}


def _numbers() -> Iterator[Case]:
    """Not a whole number where one belongs. model.norm.weight is [8], its bytes stand in the middle."""
    entries, _ = entries_of(moe_tensors())
    begin, end = entries["model.norm.weight"]["data_offsets"]
    norm = '"model.norm.weight":{"dtype":"BF16",'
    for name, text in NUMBERS.items():
        for where, old, new in (
            ("shape", f'{norm}"shape":[8]', f'{norm}"shape":[{text}]'),
            ("begin", f'"data_offsets":[{begin},{end}]', f'"data_offsets":[{text},{end}]'),
            ("end", f'"data_offsets":[{begin},{end}]', f'"data_offsets":[{begin},{text}]'),
        ):
            yield Case("numbers", f"{where}: {name}", "plain", _text(old, new), _refused("model.safetensors: "))


def _entries() -> Iterator[Case]:
    """What a tensor's entry says."""
    norm = "model.norm.weight"

    def case(name: str, change: Callable[[dict], Any], said: str) -> Case:
        return Case("entries", name, "plain", _header(change), _refused(said))

    for name, value in {"a list": [], "null": None, "a string": "BF16", "a number": 3, "true": True}.items():
        yield case(f"an entry is {name}", _put((norm,), value), "expected an object")
    yield case("an entry is empty", _put((norm,), {}), "expected whole numbers")
    for key, said in (
        ("dtype", "unknown dtype"),
        ("shape", "shape: expected"),
        ("data_offsets", "data_offsets: expected"),
    ):
        yield case(f"no {key}", _put((norm, key), DELETE), said)
    for dtype in ("bf16", "Bf16", "BFLOAT16", "torch.bfloat16", "", "F128", "BF16 ", "I4", "BF16\0"):
        yield case(f"dtype {dtype!r}", _put((norm, "dtype"), dtype), "unknown dtype")
    for name, value in {"null": None, "a number": 5, "a list": ["BF16"], "an object": {}, "true": True}.items():
        yield case(f"dtype is {name}", _put((norm, "dtype"), value), "unknown dtype")
    for dtype in ("F32", "U8", "F64", "F8_E4M3", "F4", "C64"):
        yield case(f"dtype {dtype} of another size", _put((norm, "dtype"), dtype), "data_offsets give")
    for name, value in {
        "null": None,
        "a number": 8,
        "a string": "8",
        "an object": {"0": 8},
        "nested": [[8]],
    }.items():
        yield case(f"shape is {name}", _put((norm, "shape"), value), "shape: expected whole numbers")
    for shape in (
        [],
        [7],
        [9],
        [8, 8],
        [0],
        [8, 0],
        [2**32, 2**32],
        [2**62, 4],
        [2**31, 2**31, 2**2],
        [1] * 2000 + [9],
    ):
        label = str(shape) if len(shape) < 9 else "of 2,001 axes"
        yield case(f"shape {label}", _put((norm, "shape"), shape), "data_offsets give")
    for name, value in {"none": [], "one": [0], "three": [0, 8, 16]}.items():
        yield case(f"{name} of the two offsets", _put((norm, "data_offsets"), value), "expected [begin, end]")
    for name, value in {"null": None, "a number": 0, "an object": {}, "a string": "0,16"}.items():
        yield case(f"offsets are {name}", _put((norm, "data_offsets"), value), "data_offsets: expected whole numbers")
    many = {f"a{n}": n for n in range(5)}
    yield Case(
        "entries",
        "an unknown key in an entry",
        "plain",
        _header(_put((norm, "more"), many)),
        _fine(),
        "safetensors reads such files; ders.json keeps the header's text",
    )


def _offsets() -> Iterator[Case]:
    entries, data = entries_of(moe_tensors())
    names = [name for name in entries if name != "__metadata__"]
    first, second, last = names[0], names[1], names[-1]

    def shift(*which: str, begin: int = 0, end: int = 0) -> Callable[[dict], None]:
        def change(found: dict) -> None:
            for name in which:
                a, b = found[name]["data_offsets"]
                found[name]["data_offsets"] = [a + begin, b + end]

        return change

    def swapped(found: dict) -> None:
        found[second]["data_offsets"].reverse()

    def case(name: str, change: Callable[[dict], Any], said: str) -> Case:
        return Case("offsets", name, "plain", _header(change), _refused(said, COMPRESS, VERIFY))

    yield case("begin behind end", swapped, "data_offsets give -")
    yield case("two tensors in one place", lambda e: _put((second, "data_offsets"), [0, 128])(e), "hole or an overlap")
    yield case("all in the first's place", shift(*names[1:2], begin=-2, end=-2), "hole or an overlap")
    yield case("one byte early", shift(second, begin=-1, end=-1), "hole or an overlap")
    yield case("one byte late", shift(second, begin=1, end=1), "hole or an overlap")
    yield case("the last past the end", shift(last, begin=96, end=96), "hole or an overlap")
    yield case("one longer, into the next", shift(first, end=1), "data_offsets give")
    yield case("empty, with a shape", shift(first, end=-256), "data_offsets give")
    for power in (2**31, 2**32, 2**62, 2**63 - 600):
        yield case(f"at {power}", shift(second, begin=power, end=power), "hole or an overlap")

    def hole(at: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            found, raw = parted(folder / MODEL)
            here = 0 if at == "front" else found[second]["data_offsets"][0] if at == "middle" else len(raw)
            for name in names:
                a, b = found[name]["data_offsets"]
                if a >= here:
                    found[name]["data_offsets"] = [a + 8, b + 8]
            (folder / MODEL).write_bytes(framed(found, raw[:here] + bytes(8) + raw[here:]))

        return make

    for at in ("front", "middle"):
        yield Case("offsets", f"a hole of 8 bytes, {at}", "plain", hole(at), _refused("hole or an overlap"))
    yield Case("offsets", "a hole of 8 bytes, end", "plain", hole("end"), _refused("Is the file complete?"))
    yield Case(
        "offsets",
        "names in another order than their bytes",
        "plain",
        _header(lambda e: dict(reversed(e.items()))),
        _fine(COMPRESS, VERIFY),
        "the format orders bytes, not names",
    )
    huge = {"dtype": "U8", "shape": [2**62, 2**62], "data_offsets": [len(data), len(data)]}
    yield case("a product of 2^124", _put(("x",), huge), "data_offsets give")
    wraps = {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [len(data), len(data)]}
    yield case("a product that is 0 modulo 2^64", _put(("x",), wraps), "data_offsets give")
    wraps = {"dtype": "U8", "shape": [2**63, 2], "data_offsets": [len(data), len(data)]}
    yield case("2^63 in a shape", _put(("x",), wraps), "shape: expected whole numbers")


def _empty() -> Iterator[Case]:
    """Tensors of no elements, and of no axes: legal."""
    said = "copied as they are: the format allows them"
    for name, shape, raw in (
        ("of shape [0]", [0], b""),
        ("of shape [0, 8]", [0, 8], b""),
        ("of shape [8, 0]", [8, 0], b""),
        ("of shape [0, 2^62]", [0, 2**62], b""),
        ("a scalar", [], b"\0\0"),
    ):
        yield Case("empty tensors", name, "plain", _add({"extra": ("BF16", shape, raw)}), _fine(COMPRESS, VERIFY), said)

    def become(which: str, shape: list[int], raw: bytes) -> Callable[[Path], None]:
        def change(tensors: dict[str, Any]) -> None:
            tensors[which] = ["BF16", shape, raw]

        return _retensor(change)

    for name, shape, raw in (("no rows", [0, HIDDEN], b""), ("no columns", [INNER, 0], b""), ("no axes", [], b"\0\0")):
        yield Case(
            "empty tensors", f"an expert of {name}", "plain", become(EXPERT, shape, raw), _refused("packed or empty")
        )
    for name, shape in (("three axes", [1, INNER, HIDDEN]), ("one axis", [INNER * HIDDEN])):
        raw = bytes(2 * INNER * HIDDEN)
        yield Case(
            "empty tensors", f"an expert of {name}", "plain", become(EXPERT, shape, raw), _refused("expected 2 axes")
        )
    yield Case(
        "empty tensors",
        "a router of no rows",
        "plain",
        become(f"{LAYER}.block_sparse_moe.gate.weight", [0, HIDDEN], b""),
        _fine(),
        "a router is copied, never looked at; the model's own loader refuses it before and after",
    )
    for name in ("F4", "F6_E2M3", "F6_E3M2"):
        bits = {"F4": 4}.get(name, 6)
        yield Case(
            "empty tensors",
            f"{name}, whole bytes",
            "plain",
            _add({"extra": (name, [8], bytes(bits))}),
            _fine(),
            "copied as bytes",
        )
        yield Case(
            "empty tensors",
            f"{name}, no whole bytes",
            "plain",
            _add({"extra": (name, [1], b"\0")}),
            _refused("data_offsets"),
        )


def _names() -> Iterator[Case]:
    """Names of tensors. They are never paths; they are shown to people."""
    harmless = "a name is data: no path is made of it, and what is shown of it is escaped"
    for name, text in {
        "..": "..",
        "a way out": "../../etc/passwd",
        "an absolute path": "/etc/passwd",
        "a NUL": "a\0b",
        "a line end": "a\nders: all well",
        "an escape sequence": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
        "writing turned round": "a\u202egnp.exe",
        "markup": "[red]a[/red] [/nothing]",
        "empty": "",
        "a space": " ",
        "a power": "model.layers.1²",
        "Arabic digits": "model.layers.\u0661.x",
        "a layer of 900 digits": "model.layers." + "9" * 900 + ".x",
        "999 letters": "x" * 999,
        "format characters": "{m}%s{0}",
        "of a guard's kind": "model.layers.0.mlp.experts.gate_up_proj.x",
    }.items():
        yield Case("names", name, "plain", _add({text: ("BF16", [1], b"\0\0")}), _fine(COMPRESS, VERIFY), harmless)
    for size in (1001, 1_000_000):
        yield Case("names", f"{size:,} letters", "plain", _add({"x" * size: ("U8", [1], b"\0")}), _refused("letters"))
    for ending in ("gate_proj.base", "gate_proj.delta.codes"):
        yield Case(
            "names",
            f"as DeRS would name its own: {ending}",
            "plain",
            _add({f"{GROUP}.{ending}": ("U8", [1], b"\0")}),
            _refused("name that the DeRS format would give"),
        )
    for name, value in {
        "a list": [],
        "a string": "x",
        "null": None,
        "a number": 1,
        "a number in it": {"a": 1},
        "null in it": {"a": None},
        "an object in it": {"a": {}},
        "a list in it": {"a": []},
    }.items():
        yield Case(
            "names", f"__metadata__: {name}", "plain", _header(_put(("__metadata__",), value)), _refused("__metadata__")
        )
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    yield Case(
        "names", "__metadata__: a tensor", "plain", _header(_put(("__metadata__",), entry)), _refused("__metadata__")
    )
    evil = {"\x1b[31m\n": ["BF16"]}
    yield Case(
        "names", "an escape sequence, refused", "plain", _header(lambda e: e | evil), _refused("expected an object")
    )
    yield Case(
        "names",
        "a million letters, refused",
        "plain",
        _header(lambda e: e | {"x" * 1_000_000: ["BF16"]}),
        _refused("letters"),
    )


def _index() -> Iterator[Case]:
    def case(name: str, change: Callable[[Any], Any], said: str) -> Case:
        return Case("index", name, "sharded", _json(change, INDEX), _refused(said, COMPRESS, VERIFY))

    for name, value in {"a list": [], "null": None, "a string": "x", "a number": 3, "empty": {}, "true": True}.items():
        yield case(f"weight_map is {name}", _put(("weight_map",), value), "weight_map: expected")
    yield case("no weight_map", _put(("weight_map",), DELETE), "weight_map: expected")
    for name, value in {"a list": [], "a string": "x", "null": None, "a number": 1}.items():
        yield case(f"is {name}", lambda index, v=value: v if v is not None else "null", "expected a JSON object")
    for name, value in {"a list": ["x"], "a string": "x", "a number": 3}.items():
        yield case(f"metadata is {name}", _put(("metadata",), value), "metadata: expected")
    for name, file in {
        "a way out": "../plain/model.safetensors",
        "an absolute path": "/etc/passwd",
        "an absolute weight file": "/elsewhere/x.safetensors",
        "a folder's file": "sub/model.safetensors",
        "a dot in front": "./" + SHARDS[0],
        "..": "..",
        "empty": "",
        "a NUL": "a\0.safetensors",
        "a line end": "a\n.safetensors",
        "an escape sequence": "\x1b[2J.safetensors",
        "a backslash": "..\\x.safetensors",
        "a pickle": "pytorch_model.bin",
        "config.json": "config.json",
        "an URL": "https://x.org/model.safetensors",
        "hidden": ".x.safetensors",
        "300 letters": "x" * 300 + ".safetensors",
        "a number": 3,
        "null": None,
        "a list": [SHARDS[0]],
        "an object": {},
    }.items():
        yield case(f"a file: {name}", _put(("weight_map", ...), file), "expected a file name in this folder")
    yield case("a file that is missing", _put(("weight_map", ...), "x.safetensors"), "x.safetensors: missing")
    yield case("a tensor in another file", _put(("weight_map", ...), SHARDS[1]), "places it in")
    yield case("a tensor that is nowhere", _put(("weight_map", "x"), SHARDS[1]), "x: missing")
    yield case("a tensor not listed", _put(("weight_map", ...), DELETE), "but not in")
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"a": deep}
    yield case("500 deep", _put(("metadata",), deep), "nested more than")
    for name, text in {
        "empty": b"",
        "cut": b'{"weight_map": {',
        "NaN": b'{"metadata": {"total_size": NaN}, "weight_map": {}}',
        "UTF-16": '{"weight_map": {}}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "a lone surrogate": b'{"weight_map": {"\\ud800": "x.safetensors"}}',
    }.items():
        yield Case("index", name, "sharded", _file(lambda raw, t=text: t, INDEX), _refused("the shard index as JSON"))

    def bomb(folder: Path) -> None:
        (folder / INDEX).write_bytes(b'{"weight_map": [' + b"[]," * 7_000_000 + b"0]}")

    yield Case("index", "a bomb of 21 MB", "sharded", bomb, _refused("which no checkpoint needs"), bomb=True)

    def beside(folder: Path) -> None:
        shutil.copy(folder / SHARDS[0], folder / MODEL)

    yield Case("index", "model.safetensors beside it", "sharded", beside, _refused("transformers would load it"))
    away = lambda folder: (folder / INDEX).unlink()  # noqa: E731
    yield Case("index", "none beside two files", "sharded", away, _refused("which are the model?"))

    def both(folder: Path) -> None:
        shutil.copy(folder / SHARDS[0], folder / SHARDS[1])

    yield Case("index", "one shard for the other", "sharded", both, _refused("expected once"))

    def hundred(folder: Path) -> None:
        for n in range(100):
            (folder / f"x{n}.safetensors").symlink_to(SHARDS[0])
        placed = {f"t{n}": f"x{n}.safetensors" for n in range(100)}
        (folder / INDEX).write_text(json.dumps({"weight_map": placed}))

    yield Case("index", "a hundred names of one file", "sharded", hundred, _refused("expected once"))


def _replace(name: str, by: str) -> Callable[[Path], None]:
    """Something that is no file in a file's place."""

    def make(folder: Path) -> None:
        path = folder / name
        path.unlink()
        match by:
            case "a FIFO":
                os.mkfifo(path)
            case "a folder":
                path.mkdir()
            case "a socket":
                here = os.getcwd()
                os.chdir(folder)  # a socket's path may have 108 bytes
                try:
                    with socket.socket(socket.AF_UNIX) as one:
                        one.bind(name)
                finally:
                    os.chdir(here)
            case "a link to nothing":
                path.symlink_to("nothing")
            case "a link to itself":
                path.symlink_to(name)
            case "a link to /dev/zero":
                path.symlink_to("/dev/zero")
            case "a link to a FIFO":
                os.mkfifo(folder / "fifo")
                path.symlink_to("fifo")
            case "a link to its folder":
                path.symlink_to(".")
            case "nothing":
                pass
            case "a sparse file of 1 GB":
                with path.open("wb") as file:
                    file.truncate(1 << 30)

    return make


NODES = {
    "a FIFO": "found a FIFO",
    "a folder": "found a folder",
    "a socket": "found a socket",
    "a link to nothing": "where nothing is",
    "a link to itself": "leads back to itself",
    "a link to /dev/zero": "found a device",
    "a link to a FIFO": "found a FIFO",
    "a link to its folder": "found a folder",
}


def _nodes() -> Iterator[Case]:
    for file, of, commands in (
        ("config.json", "plain", (COMPRESS, VERIFY)),
        (MODEL, "plain", (COMPRESS, VERIFY)),
        (SHARDS[1], "sharded", (COMPRESS,)),
        (INDEX, "sharded", (COMPRESS,)),
        ("ders.json", "int4", (VERIFY, RESTORE)),
        (MODEL, "int4", (VERIFY, RESTORE)),
    ):
        for by, said in NODES.items():
            yield Case("no files", f"{file} of {of}: {by}", of, _replace(file, by), _refused(said, *commands))
    for file, of, said in (
        ("config.json", "plain", "config.json: missing"),
        (SHARDS[1], "sharded", f"{SHARDS[1]}: missing"),
        (MODEL, "plain", "no *.safetensors"),
        (MODEL, "int4", "no *.safetensors"),
    ):
        command = VERIFY if of == "int4" else COMPRESS
        yield Case("no files", f"{file} of {of}: nothing", of, _replace(file, "nothing"), _refused(said, command))
    sparse = "a sparse file of 1 GB"
    for file, of, said in (
        ("config.json", "plain", "expected at most 16000000"),
        (INDEX, "sharded", "expected at most 256000000"),
        ("ders.json", "int4", "expected at most 256000000"),
        (MODEL, "plain", "header is not JSON"),
    ):
        yield Case("no files", f"{file}: {sparse}", of, _replace(file, sparse), _refused(said, VERIFY), bomb=True)
    for file, by, said in (
        ("adapter_config.json", "a FIFO", "found a FIFO"),
        (ADAPTER, "a FIFO", "found a FIFO"),
        (ADAPTER, "nothing", "no adapter_model.safetensors"),
    ):
        yield Case("no files", f"{file}: {by}", "adapter", _replace(file, by), _refused(said, DONOR))


def _links() -> Iterator[Case]:
    def stray(name: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            outside = folder.parent / "secret" / name
            outside.parent.mkdir()
            (folder / name).rename(outside)
            (folder / name).symlink_to(outside)

        return make

    for file, of, commands in (
        ("config.json", "plain", (COMPRESS, VERIFY)),
        (INDEX, "sharded", (COMPRESS, VERIFY)),
        ("ders.json", "int4", (VERIFY, RESTORE)),
        ("tokenizer.json", "plain", (COMPRESS,)),
        ("tokenizer.json", "int4", (RESTORE,)),
        ("tokenizer.json", "dense", (UPCYCLE,)),
    ):
        yield Case(
            "links", f"{file} of {of}, away", of, stray(file), _refused("away from the model's weights", *commands)
        )

    def cache(folder: Path) -> None:
        blobs = folder.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / f"{number:064}")
            path.symlink_to(os.path.join("..", "blobs", f"{number:064}"))

    yield Case("links", "a model cache", "sharded", cache, _fine(COMPRESS), "each leads to where the weights stand")

    def inside(folder: Path) -> None:
        (folder / "tokenizer.json").rename(folder / "real.json")
        (folder / "tokenizer.json").symlink_to("real.json")

    yield Case("links", "within the folder", "plain", inside, _fine(COMPRESS), "it leads nowhere else")


NOT_FINITE = (float("nan"), float("inf"))
VALUES: dict[str, Any] = {
    "null": None,
    "-1": -1,
    "a float": 1.5,
    "true": True,
    "a word": "x",
    "a list": [],
    "an object": {},
    "a list of lists": [[1]],
    "10^30": 10**30,
    "NaN": NOT_FINITE[0],
}


def _config() -> Iterator[Case]:
    for name, text in {
        "empty": b"",
        "cut": b'{"model_type": ',
        "a list": b"[]",
        "null": b"null",
        "a byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": "{}".encode("utf-16"),
        "Latin-1": b'{"a": "\xe9"}',
        "a lone surrogate": b'{"model_type": "\\ud800"}',
        "deep nesting": b"[" * 100_000,
        "500 deep": b'{"text_config":' * 500 + b"1" + b"}" * 500,
        "5,000 digits": b'{"num_local_experts": ' + b"9" * 5000 + b"}",
        "17 MB": b'{"a": "' + b"x" * 17_000_000 + b'"}',
        "a bomb of 15 MB": b'{"a": [' + b"[]," * 5_000_000 + b"0]}",
    }.items():
        make = _file(lambda raw, t=text: t, "config.json")
        yield Case("config.json", name, "plain", make, _refused("config.json: "), bomb="MB" in name)
    named = ("null", "-1", "a float", "true", "a list", "an object", "a list of lists", "10^30", "NaN")
    refused = {("model_type", name): _refused("expected the name of a dense model", UPCYCLE) for name in named}
    refused["model_type", "a word"] = _refused("cannot be upcycled", UPCYCLE)
    refused["architectures", "a list of lists"] = _refused("is no language model", UPCYCLE)
    odd = {  # what is refused; all else is taken, since nothing of it decides anything
        ("num_local_experts", "10^30"): _refused("expected 1000000000000000000000000000000 experts"),
    }
    for key in ("model_type", "num_local_experts", "hidden_act", "text_config", "experts_per_layer", "architectures"):
        for name, value in VALUES.items():
            runs = odd.get((key, name)) or _fine()
            make = _json(_put((key,), value), "config.json")
            yield Case("config.json", f"{key}: {name}", "plain", make, runs, "nothing that ders computes depends on it")
    for key in ("model_type", "architectures", "rope_scaling", "num_key_value_heads", "head_dim", "layer_types"):
        for name, value in VALUES.items():
            make = _json(_put((key,), value), "config.json")
            runs = refused.get((key, name)) or _fine(UPCYCLE)
            yield Case(
                "config.json",
                f"dense {key}: {name}",
                "dense",
                make,
                runs,
                "the MoE's config repeats what the dense one's says",
            )
    for name, value in (
        VALUES | {"a method": {"quant_method": "gptq"}, "a list for a method": {"quant_method": []}}
    ).items():
        make = _json(_put(("quantization_config",), value), "config.json")
        runs = _fine() if value in (None, {}) else _refused("quantised by")
        yield Case("config.json", f"quantization_config: {name}", "plain", make, runs, "says that it is not quantised")


def _experts() -> Iterator[Case]:
    """Experts that are not what config.json or each other say."""
    where = f"{LAYER}.block_sparse_moe.experts"

    def case(name: str, change: Callable[[dict[str, Any]], Any], said: str) -> Case:
        return Case("experts", name, "plain", _retensor(change), _refused(said, COMPRESS, VERIFY))

    def without(*names: str) -> Callable[[dict], None]:
        return lambda tensors: [tensors.pop(name) for name in names]

    def renamed(old: str, new: str) -> Callable[[dict], None]:
        return lambda tensors: tensors.update({new: tensors.pop(old)})

    def copied(old: str, new: str) -> Callable[[dict], None]:
        return lambda tensors: tensors.update({new: tensors[old]})

    def whole(number: int) -> list[str]:
        return [f"{where}.{number}.{n}.weight" for n in ("w1", "w2", "w3")]

    yield case("a matrix missing", without(EXPERT), "Is the checkpoint complete?")
    yield case("the last expert missing", without(*whole(2)), "expected 3 experts")
    yield case("the first expert missing", without(*whole(0)), "Is the checkpoint complete?")
    yield case("a hole in the numbers", without(*whole(1)), "Is the checkpoint complete?")
    yield case("no gates", without(*(f"{where}.{n}.w1.weight" for n in range(3))), "w1.weight")
    yield case("no ups", without(*(f"{where}.{n}.w3.weight" for n in range(3))), "w3.weight")
    yield case("no downs", without(*(f"{where}.{n}.w2.weight" for n in range(3))), "w2.weight")
    yield case("no experts at all", without(*whole(0), *whole(1), *whole(2)), "has no experts")
    yield case("an extra expert", lambda t: [copied(a, b)(t) for a, b in zip(whole(0), whole(3))], "expected 3 experts")
    yield case("an extra matrix", copied(EXPERT, whole(3)[0]), "missing")
    yield case("number 999,999,999", renamed(EXPERT, f"{where}.999999999.w1.weight"), "missing")
    yield case("number 10^12", renamed(EXPERT, f"{where}.1000000000000.w1.weight"), "missing")
    zero = _retensor(renamed(EXPERT, f"{where}.00.w1.weight"))
    yield Case("experts", "number 00", "plain", zero, _fine(COMPRESS, VERIFY), "is 0, and gets its own name back")
    yield case("number 0 and 00", copied(EXPERT, f"{where}.00.w1.weight"), "which one is meant?")
    yield case("number -1", renamed(EXPERT, f"{where}.-1.w1.weight"), "missing")
    stacked = ["BF16", [EXPERTS, INNER, HIDDEN], bytes(2 * EXPERTS * INNER * HIDDEN)]
    yield case(
        "stacked beside single",
        lambda t: t.update({f"{where}.gate_up_proj": ["BF16", [3, 12, 8], bytes(576)]}),
        "which one is meant?",
    )
    yield case("stacked under a single one's name", lambda t: t.update({EXPERT: stacked}), "expected 2 axes")
    for name, dtype, raw in (("F32", "F32", 4), ("F16", "F16", 2)):
        yield case(
            f"one of {name}",
            lambda t, d=dtype, n=raw: t.update({EXPERT: [d, [INNER, HIDDEN], bytes(n * INNER * HIDDEN)]}),
            "to go with",
        )
    for dtype, size in {"I8": 1, "U8": 1, "F8_E4M3": 1, "F64": 8, "I32": 4, "BOOL": 1}.items():
        yield case(
            f"one of {dtype}",
            lambda t, d=dtype, n=size: t.update({EXPERT: [d, [INNER, HIDDEN], bytes(n * INNER * HIDDEN)]}),
            "expected expert weights in",
        )
    for shape in ([HIDDEN, INNER], [INNER, HIDDEN + 1], [INNER - 1, HIDDEN], [1, 1]):
        size = 2 * shape[0] * shape[1]
        yield case(
            f"one of shape {shape}", lambda t, s=shape, n=size: t.update({EXPERT: ["BF16", s, bytes(n)]}), "to go with"
        )
    yield case("packed beside them", lambda t: t.update({f"{EXPERT}_packed": ["I32", [6, 1], bytes(24)]}), "dequantise")
    for name, bits in {"NaN": 0x7FC0, "infinity": 0x7F80}.items():

        def spoiled(tensors: dict, bits: int = bits) -> None:
            raw = bytearray(tensors[EXPERT][2])
            raw[10:12] = struct.pack("<H", bits)
            tensors[EXPERT][2] = bytes(raw)

        yield Case(
            "experts",
            f"a {name}",
            "plain",
            _retensor(spoiled),
            (Run(COMPRESS, 4, "only --delta exact keeps such values"), Run(VERIFY, 3, "at [0, 5]")),
        )

    def swarm(experts: int, declared: bool) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            names = (f"{where}.gate_up_proj", f"{where}.down_proj")
            shapes = ([experts, 2, 1], [experts, 1, 1])
            entries, at = {}, 0
            for name, shape in zip(names, shapes, strict=True):
                size = 2 * shape[0] * shape[1]
                entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + size]}
            head = framed(entries, b"")
            (folder / MODEL).write_bytes(head)
            os.truncate(folder / MODEL, len(head) + at)  # sparse: it takes no room
            (folder / "config.json").write_text(json.dumps(MOE | {"num_local_experts": experts if declared else 2}))

        return make

    for declared in (False, True):
        name = f"2^25 stacked ones in a sparse file, {'as' if declared else 'not as'} config.json says"
        said = "more than 1000000 matrices"
        yield Case("experts", name, "plain", swarm(1 << 25, declared), _refused(said, COMPRESS, VERIFY), bomb=True)
    zeros = _retensor(lambda t: t.update({EXPERT: ["BF16", [INNER, HIDDEN], bytes(2 * INNER * HIDDEN)]}))
    yield Case(
        "experts",
        "one of zeros",
        "plain",
        zeros,
        (Run(COMPRESS, 0), Run(VERIFY, 3, "is all zeros")),
        "dead, not broken",
    )
    yield Case(
        "experts",
        "one of zeros, with an infinite relative error in ders.json",
        "plain",
        zeros,
        (Run(COMPRESS, 0), Run("verify {out} -q -j 1", 0)),
        "Python writes Infinity, and reads it",
    )


def _fields() -> Iterator[Case]:
    """ders.json with a right checksum and one field changed."""
    member = ("groups", 0, "members", 0)

    def case(name: str, change: Callable[[Any], Any], said: str, *commands: str, of: str = "int4") -> Case:
        return Case("ders.json", name, of, _manifest(change), _refused(said, *(commands or (VERIFY, RESTORE))))

    for name, text in {
        "empty": b"",
        "a list": b"[]",
        "null": b"null",
        "cut": b'{"format": 1,',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": "{}".encode("utf-16"),
        "NaN": b'{"format": NaN}',
        "a lone surrogate": b'{"format": 1, "\\ud800": 1}',
        "deep nesting": b"[" * 100_000,
        "a bomb of 21 MB": b'{"groups": [' + b"{}," * 7_000_000 + b"{}]}",
        "no format": b"{}",
    }.items():
        make = _file(lambda raw, t=text: t, "ders.json")
        yield Case("ders.json", name, "int4", make, _refused("ders.json: ", VERIFY, RESTORE), bomb="MB" in name)
    for name, value in {"2": 2, "0": 0, "a word": "1", "a float": 1.5, "null": None}.items():
        yield case(f"format {name}", _put(("format",), value), "this ders reads format 1")
    wrong = _file(lambda raw: raw.replace(b'"layer": 0', b'"layer": 1', 1), "ders.json")
    yield Case("ders.json", "another layer, old checksum", "int4", wrong, _refused("its checksum", VERIFY, RESTORE))
    deep: Any = {}
    for _ in range(500):
        deep = {"a": deep}
    yield case("500 deep", _put(("more",), deep), "nested more than")
    for key in ("tool", "recipe", "source", "groups", "guards", "tensors", "files", "bytes"):
        yield case(f"{key}: missing", _put((key,), DELETE), f"ders.json: {key}: ")
        yield case(f"{key}: a number", _put((key,), 3), f"ders.json: {key}: ")
        yield case(f"{key}: null", _put((key,), None), f"ders.json: {key}: ")
    for key in ("name", "layer", "projection", "shape", "dtype", "codec", "members"):
        yield case(f"a group's {key}: missing", _put(("groups", 0, key), DELETE), f"groups.0.{key}: ")
        yield case(f"a group's {key}: a list of null", _put(("groups", 0, key), [None]), f"groups.0.{key}")
    for key in ("label", "tensor", "offset", "strides", "source_hash", "restored_hash", "error"):
        yield case(f"a member's {key}: missing", _put((*member, key), DELETE), f"members.0.{key}: ")
        yield case(f"a member's {key}: a list of null", _put((*member, key), [None]), f"members.0.{key}")
    for key in ("layout", "activation", "aliases", "config", "files", "index"):
        yield case(f"source.{key}: missing", _put(("source", key), DELETE), f"source.{key}: ")
        yield case(f"source.{key}: a number", _put(("source", key), 3), f"source.{key}: ")
    for key in ("base", "seed", "shared"):
        yield case(f"recipe.{key}: missing", _put(("recipe", key), DELETE), f"recipe.{key}: ")
    for name, seed in {
        "negative": -1,
        "2^63": 2**63,
        "a float": 1.5,
        "true": True,
        "a word": "0",
        "null": None,
    }.items():
        yield case(f"seed: {name}", _put(("recipe", "seed"), seed), "recipe.seed: ")
    for seed in (2**62, 2**63 - 1):
        odd = _manifest(_put(("recipe", "seed"), seed))
        yield Case("ders.json", f"seed: {seed}", "exact", odd, _fine(VERIFY, RESTORE), "a recipe's seed is below 2^63")
    for name, value in {
        "negative": -1,
        "2^62": 2**62,
        "10^30": 10**30,
        "a float": 0.0,
        "true": True,
        "a word": "0",
    }.items():
        yield case(f"offset: {name}", _put((*member, "offset"), value), "offset: ")
    for name, value in {"1": 1, "2^61": 2**61, "one matrix on": INNER * HIDDEN}.items():
        yield case(f"offset: {name}", _put((*member, "offset"), value), "has no place in")
    for name, value in {
        "0": [0, 1],
        "negative": [-8, 1],
        "one": [8],
        "three": [8, 1, 1],
        "2^62": [2**62, 1],
        "a float": [8.0, 1],
        "words": ["8", "1"],
    }.items():
        yield case(f"strides: {name}", _put((*member, "strides"), value), "strides")
    for name, value in {"2^61": [2**61, 1], "one too wide": [7, 1]}.items():
        yield case(f"strides: {name}", _put((*member, "strides"), value), "has no place in")
    for name, value in {"all rows in one": [1, 1], "rows overlap": [5, 1]}.items():
        yield case(f"strides: {name}", _put((*member, "strides"), value), "overlap")
    yield Case(
        "ders.json",
        "strides: turned",
        "int4",
        _manifest(_put((*member, "strides"), [1, HIDDEN])),
        (Run(VERIFY, 3, "its source's layout elsewhere"), Run(RESTORE, 0)),
        "restoring needs no knowledge of layouts and does as ders.json says; verify has it",
    )
    for name, value in {
        "0 rows": [0, 8],
        "0 columns": [6, 0],
        "negative": [-6, 8],
        "one axis": [48],
        "2^62": [2**62, 8],
    }.items():
        yield case(f"shape: {name}", _put(("groups", 0, "shape"), value), "shape")
    for name, value in {
        "one row more": [9, 6],
        "turned": [6, 8],
        "2^61": [2**61, 2**61],
        "2^40 rows": [2**40, 8],
    }.items():
        yield case(f"shape: {name}", _put(("groups", 0, "shape"), value), ".base: expected")
        yield case(f"shape of exact: {name}", _put(("groups", 0, "shape"), value), ".base: expected", of="exact")
    for name, value in {"F32": "F32", "F16": "F16"}.items():
        yield case(f"dtype: {name}", _put(("groups", 0, "dtype"), value), ".base: expected")
    for name, value in {"I8": "I8", "small letters": "bf16", "null": None}.items():
        yield case(f"dtype: {name}", _put(("groups", 0, "dtype"), value), "groups.0.dtype: ")
    for name, value in {"a word": "1", "true": True, "null": None, "a float": 0.5}.items():
        yield case(f"layer: {name}", _put(("groups", 0, "layer"), value), "groups.0.layer: ")
    yield case("projection: router", _put(("groups", 0, "projection"), "router"), "groups.0.projection: ")
    for name, digest in {
        "empty": "",
        "63 letters": "0" * 63,
        "65 letters": "0" * 65,
        "capitals": "A" * 64,
        "no hexadecimal": "g" * 64,
        "a line end": "0" * 64 + "\n",
        "a number": 0,
        "full-width digits": "\uff10" * 64,
    }.items():
        yield case(f"a hash: {name}", _put((*member, "restored_hash"), digest), "restored_hash: ")
    yield case("tensors: no hashes", _put(("tensors", ...), []), "tensors.")
    yield case(
        "tensors: two hashes for one",
        lambda m: m["tensors"]["model.norm.weight"].append("0" * 64),
        "2 hashes, expected 1",
    )
    yield case(
        "tensors: a hash too few", lambda m: m["tensors"][f"{GROUP}.down_proj.delta.codes"].pop(), "hashes, expected 3"
    )
    yield case("tensors: one not there", _put(("tensors", "x"), ["0" * 64]), "x: missing; ders.json lists it")
    yield case("tensors: one not listed", _put(("tensors", "model.norm.weight"), DELETE), "but not in ders.json")
    yield case("a group twice", lambda m: m["groups"].append(m["groups"][0]), "stands twice")
    yield case("a label twice", _put((*member[:3], 1, "label"), "0"), "stands twice")
    yield case("a member less", lambda m: m["groups"][0]["members"].pop(), "from ders.json, found")
    yield case(
        "a member more",
        lambda m: m["groups"][0]["members"].append(m["groups"][0]["members"][0] | {"label": "x"}),
        "found",
    )
    yield case("a group less", lambda m: m["groups"].pop(), "ders.json")
    yield case("no members", _put(("groups", 0, "members"), []), "groups.0.members")
    yield case(
        "two members in one place",
        lambda m: m["groups"][0]["members"][1].update(tensor=m["groups"][0]["members"][0]["tensor"]),
        "of which experts fill",
    )
    yield case("a member in a copied tensor", _put((*member, "tensor"), "lm_head.weight"), "ders.json: ")
    yield case("a member in no tensor", _put((*member, "tensor"), "x"), "has no place in")
    yield case("errors: words", _put((*member, "error", "weight"), "x"), "error.weight: ")
    yield case("bytes: a word", _put(("bytes", "base"), "x"), "bytes.base: ")
    for name, text in {
        "empty": "",
        "no JSON": "{",
        "a list": "[]",
        "a bomb": "[" * 100_000,
        "a byte order mark": "\ufeff{}",
        "a key twice": '{"a":1,"a":1}',
    }.items():
        yield case(f"source.config: {name}", _put(("source", "config"), text), "source.config as JSON")
    file = ("source", "files", MODEL)
    for name, to in {
        "a way out": "../x.safetensors",
        "absolute": "/elsewhere/x.safetensors",
        "a folder's": "a/x.safetensors",
        "a NUL": "a\0.safetensors",
        "a line end": "a\n.safetensors",
        "an escape sequence": "\x1b[31m.safetensors",
        "hidden": ".ders-plan.safetensors",
        "no weight file": "config.json",
        "empty": "",
        "a backslash": "..\\x.safetensors",
        "300 letters": "x" * 300 + ".safetensors",
    }.items():
        yield case(
            f"source.files: {name}",
            lambda m, to=to: m["source"]["files"].update({to: m["source"]["files"].pop(MODEL)}),
            "is not the name of a weight file",
        )
    yield case("source.files: none", _put(("source", "files"), {}), "has no place in")
    for name, row in {
        "of two": ["x", "BF16"],
        "a number's name": [1, "BF16", [1]],
        "unknown dtype": ["x", "B16", [1]],
        "a list for a dtype": ["x", ["BF16"], [1]],
        "negative": ["x", "BF16", [-1]],
        "a float": ["x", "BF16", [1.5]],
        "true": ["x", "BF16", [True]],
        "2^62": ["x", "BF16", [2**62]],
        "a number": 3,
    }.items():
        yield case(
            f"source.files: a row {name}", _put((*file, "tensors", 0), row), "source.files.model.safetensors.tensors"
        )
    yield case(
        "source.files: a tensor twice",
        lambda m: m["source"]["files"][MODEL]["tensors"].append(m["source"]["files"][MODEL]["tensors"][0]),
        "a tensor stands twice",
    )
    yield case(
        "source.files: a tensor less", lambda m: m["source"]["files"][MODEL]["tensors"].clear(), "has no place in"
    )
    yield case(
        "source.files: a tensor more",
        lambda m: m["source"]["files"][MODEL]["tensors"].append(["x", "BF16", [1]]),
        "not here as such",
    )
    yield case(
        "source.files: another shape",
        lambda m: m["source"]["files"][MODEL]["tensors"][0].__setitem__(2, [1]),
        "ders.json",
    )
    yield case(
        "source.files: a tensor in two",
        lambda m: m["source"]["files"].update({"x.safetensors": m["source"]["files"][MODEL]}),
        "stands in two files",
    )
    yield case("source.files: metadata of numbers", _put((*file, "metadata"), {"a": 1}), "metadata")
    other, data = entries_of({"x": _bits((4,), 0)})
    for name, text in {
        "no JSON": "{",
        "empty": " ",
        "of other tensors": json.dumps(other),
        "of none": "{}",
        "null": None,
        "a number": 3,
        "in another order": None,
    }.items():
        if name == "in another order":
            continue
        yield case(f"source.files: a header {name}", _put((*file, "header"), text), "header")
    index = {"metadata": {}, "text": "{}"}
    yield case(
        "source.index: a text of nothing", _put(("source", "index"), index), "its text places tensors in other files"
    )
    yield case(
        "source.index: a text that is no JSON", _put(("source", "index"), index | {"text": "["}), "source.index as JSON"
    )
    yield case("source.index: text null", _put(("source", "index"), index | {"text": None}), "source.index")
    yield case("source.index: metadata a list", _put(("source", "index"), {"metadata": []}), "source.index.metadata")
    for name in ("../../x", "/etc/passwd", "/proc/self/pagemap", "a\0b", "", "..", ".", ".x", "a/b", "y" * 256):
        yield Case(
            "ders.json",
            f"files: {name!r:.60}",
            "int4",
            _manifest(_put(("files", name), "0" * 64)),
            _refused("ders.json: files: ", VERIFY, RESTORE),  # what it says of another place: nothing
        )
    for name in ("missing.json", "\x1b[31m", "x" * 255):
        yield Case(
            "ders.json",
            f"files: {name!r:.60}",
            "int4",
            _manifest(_put(("files", name), "0" * 64)),
            (Run(VERIFY, 3, "missing; ders.json lists it"), Run(RESTORE, 0, "is missing; ders.json lists it")),
            "restore gives what there is, and says what is not",
        )
    yield Case(
        "ders.json",
        "aliases to anywhere",
        "int4",
        _manifest(_put(("source", "aliases"), {"x": "../../y"})),
        _fine(VERIFY, RESTORE),
        "names for transformers, never paths; of a tensor that is not there, nothing is done",
    )


CODECS: dict[str, dict[str, Any]] = {
    "int4": {
        "bits": [0, -1, 7, 9, 16, 2**40, 4.0, True, "4", None],
        "group_size": [0, -1, 2**40, 2**62, 1.5, None, "8"],
    },
    "int1": {"group_size": [0, -1, 2**62, None]},
    "drop": {"rate": [1, 1.0, -0.1, 1.5, 10**30, "0.5", None, True, [0.5]]},
    "sparse": {"rate": [1, -0.1, 2, 10**30, "0.5", None]},
    "top": {"density": [0, 0.0, -1, 1.5, 10**30, "0.1", None, True]},
    "bitmap": {"n": [0, -1, 5, 2**40, 2.0, None], "m": [0, -1, 1, 2**40, None, "4"]},
    "ternary": {"density": [0, -1, 1.5, 10**30, "x", None, True]},
    "rank": {"rank": [0, -1, 1, 2**62, 2.0, "2", None, True], "dtype": ["U8", "bf16", "F32", None, ["BF16"]]},
}


def _codecs() -> Iterator[Case]:
    """The codec of a group, by its configuration."""

    def case(name: str, of: str, change: Callable[[Any], Any], said: str = "codec", bomb: bool = False) -> Case:
        return Case("codecs", name, of, _manifest(change), _refused(said, VERIFY, RESTORE), bomb=bomb)

    codec = ("groups", 0, "codec")
    for name, value in {"a name": "int4", "a list": [], "null": None, "empty": {}}.items():
        yield case(f"is {name}", "int4", _put(codec, value))
    for name in ("int5000", "Integers", "", "../x", "\x1b[31m", "__class__", None, 3, ["int"], {"codec": "int"}):
        yield case(f"named {name!r}", "int4", _put((*codec, "codec"), name))
    yield case("a field more", "int4", _put((*codec, "more"), 1))
    for of, fields in CODECS.items():
        for key, values in fields.items():
            for value in values:
                yield case(f"{of}: {key} {value!r:.20}", of, _put((*codec, key), value), "")
            if key != "dtype":
                yield case(f"{of}: no {key}", of, _put((*codec, key), DELETE), "")
    yield case("another codec's", "int4", _put(codec, {"codec": "none"}), "")
    for name, value in {"null": None, "a number": 3, "empty": {}, "exact": {"codec": "exact"}}.items():
        yield case(f"a chain's first is {name}", "chain", _put((*codec, "first"), value), "")
        yield case(f"a chain's second is {name}", "chain", _put((*codec, "then"), value), "")

    def chained(depth: int) -> Callable[[Any], None]:
        def change(manifest: Any) -> None:
            own = manifest["groups"][0]["codec"]
            for _ in range(depth):
                own = {"codec": "chain", "first": own["first"] if "first" in own else own, "then": own}
            manifest["groups"][0]["codec"] = own

        return change

    yield case("a chain of 30 chains", "chain", chained(30), "")
    yield case("a chain of 100 chains", "chain", chained(100), "nested more than")


def _parts() -> Iterator[Case]:
    """The tensors that stand for deltas: other shapes and dtypes (4), other bytes (3 by verify, 4 by restore)."""

    def part_of(entries: dict, ending: str) -> str:
        return next(name for name in entries if name.startswith(GROUP) and name.endswith(ending))

    def reshaped(ending: str, change: Callable[[list], None]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            def retensor(tensors: dict[str, Any]) -> None:
                change(tensors[part_of(tensors, ending)])

            _retensor(retensor)(folder)

        return make

    def row_more(one: list) -> None:
        one[1] = [one[1][0] + 1, *one[1][1:]]
        one[2] += bytes(len(one[2]) // (one[1][0] - 1))

    def other_dtype(one: list) -> None:
        one[0] = {"BF16": "F16", "U8": "I8", "I8": "U8", "I16": "U16", "I64": "U64", "I32": "U32"}[one[0]]

    def flat(one: list) -> None:
        size = 1
        for n in one[1]:
            size *= n
        one[1] = [size]

    endings = {
        "int4": (".codes", ".scale"),
        "drop": (".values",),
        "top": (".values", ".base"),
        "ternary": (".base",),
        "rank": (".left", ".right"),
        "exact": (".extents", ".base"),
    }
    for of, several in endings.items():
        for ending in several:
            for name, change in (("a row more", row_more), ("another dtype", other_dtype), ("flat", flat)):
                if ending == ".base" and name == "flat":
                    continue
                yield Case(
                    "parts",
                    f"{of}{ending}: {name}",
                    of,
                    reshaped(ending, change),
                    _refused("from ders.json, found", VERIFY, RESTORE),
                )
    stream = reshaped(".stream", lambda one: one.__setitem__(1, [1, *one[1]]))
    yield Case("parts", "exact.stream: two axes", "exact", stream, _refused("from ders.json, found", VERIFY, RESTORE))

    damaged = (Run(VERIFY, 3, "damaged"), Run(RESTORE, 4, ""), Run(QUANTIZE, 4, ""))
    lossy = damaged[:2]

    def bytes_of(ending: str, change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
        def one(tensor: list) -> None:
            raw = bytearray(tensor[2])
            change(raw)
            tensor[2] = bytes(raw)

        return reshaped(ending, one)

    def numbers(*values: int) -> Callable[[bytearray], None]:
        def change(raw: bytearray) -> None:
            raw[: 8 * len(values)] = struct.pack(f"<{len(values)}q", *values)

        return change

    for name, values in {
        "negative": (-1, 5),
        "both negative": (-8, -1),
        "descending": (50, 10),
        "past the end": (0, 10**6),
        "2^62": (2**62, 2**62 + 9),
        "2^63-1": (0, 2**63 - 1),
        "the smallest": (-(2**63), 10),
        "empty": (0, 0),
        "one byte": (0, 1),
        "another's": (20, 60),
    }.items():
        yield Case("parts", f"extents: {name}", "exact", bytes_of(".extents", numbers(*values)), damaged)

    def flip(at: int) -> Callable[[bytearray], None]:
        def change(raw: bytearray) -> None:
            raw[at % len(raw)] ^= 0x80

        return change

    for at in (*range(0, 24), 40, 60, 80, -1, -2):
        yield Case("parts", f"a bit of a stream, byte {at}", "exact", bytes_of(".stream", flip(at)), damaged)
    for name, change in {
        "zeros": lambda raw: raw.__setitem__(slice(None), bytes(len(raw))),
        "ones": lambda raw: raw.__setitem__(slice(None), b"\xff" * len(raw)),
        "turned round": lambda raw: raw.reverse(),
    }.items():
        yield Case("parts", f"a stream of {name}", "exact", bytes_of(".stream", change), damaged)

    def everything(folder: Path) -> None:
        """A stream of much more than the chunks, all of it in each one's extents."""

        def retensor(tensors: dict[str, Any]) -> None:
            size = 100_000
            tensors[part_of(tensors, ".stream")][1:] = [[size], bytes(size)]
            extents = tensors[part_of(tensors, ".extents")]
            extents[2] = struct.pack("<2q", 0, size) * (len(extents[2]) // 16)

        _retensor(retensor)(folder)

    said = "100000 bytes; a chunk takes at most 97"
    long = tuple(Run(run.command, run.code, said) for run in damaged)
    yield Case("parts", "extents: all of a long stream", "exact", everything, long)
    shorter = reshaped(
        ".stream", lambda one: one.__setitem__(slice(1, 3), [[len(one[2]) // 2], one[2][: len(one[2]) // 2]])
    )
    yield Case("parts", "half a stream", "exact", shorter, damaged)
    none = reshaped(".stream", lambda one: one.__setitem__(slice(1, 3), [[0], b""]))
    yield Case("parts", "an empty stream", "exact", none, damaged)

    ones = lambda raw: raw.__setitem__(slice(None), b"\xff" * len(raw))  # noqa: E731
    zeros = lambda raw: raw.__setitem__(slice(None), bytes(len(raw)))  # noqa: E731
    nan = lambda raw: raw.__setitem__(slice(0, 2), struct.pack("<H", 0x7FC0))  # noqa: E731
    infinite = lambda raw: raw.__setitem__(slice(0, 2), struct.pack("<H", 0xFF80))  # noqa: E731
    for of in DELTAS:
        if of != "exact":
            yield Case("parts", f"{of}: base of NaNs", of, bytes_of(".base", ones), lossy)
    for of, ending in (
        ("int4", ".scale"),
        ("int1", ".scale"),
        ("drop", ".values"),
        ("sparse", ".values"),
        ("top", ".values"),
        ("bitmap", ".values"),
        ("rank", ".left"),
        ("rank", ".right"),
    ):
        for name, change in (("NaN", nan), ("-infinity", infinite)):
            yield Case("parts", f"{of}{ending}: {name}", of, bytes_of(ending, change), lossy)
    for of in ("top", "bitmap", "ternary", "sparse", "int4", "chain"):
        for name, change in (("zeros", zeros), ("ones", ones)):

            def every(folder: Path, change: Callable = change) -> None:
                def retensor(tensors: dict[str, Any]) -> None:
                    for tensor, one in tensors.items():
                        if ".delta." in tensor:
                            raw = bytearray(one[2])
                            change(raw)
                            one[2] = bytes(raw)

                _retensor(retensor)(folder)

            yield Case("parts", f"{of}: all parts {name}", of, every, lossy)
    for name, tensor in (("a copied tensor", "lm_head.weight"), ("a router", f"{LAYER}.block_sparse_moe.gate.weight")):

        def copied(tensors: dict[str, Any], tensor: str = tensor) -> None:
            tensors[tensor][2] = b"\1" + tensors[tensor][2][1:]

        yield Case("parts", f"{name} changed", "exact", _retensor(copied), damaged)
    changed = _file(lambda raw: raw.replace(b"tiny", b"tony"), "tokenizer.json")
    runs = (Run(VERIFY, 3, "changed"), Run(RESTORE, 0, "tokenizer.json was changed"))
    yield Case(
        "parts", "a carried file changed", "int4", changed, runs, "people edit them: it goes along, with a warning"
    )
    config = _file(lambda raw: raw.replace(b'"vocab_size": 16', b'"vocab_size": 17'), "config.json")
    runs = (Run(VERIFY, 3, "changed"), Run(QUANTIZE, 0), Run(RESTORE, 0))
    yield Case(
        "parts", "config.json changed", "exact", config, runs, "people edit it; restoring takes ders.json's own text"
    )


def _recipes() -> Iterator[Case]:
    def case(name: str, text: str | bytes, said: str = "recipe.yaml") -> Case:
        raw = text if isinstance(text, bytes) else text.encode()
        make = _file(lambda _: raw, "recipe.yaml")
        return Case("recipes", name, "recipe", make, _refused(said, RECIPE, code=2))

    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for name, text in {
        "empty": "",
        "a list": "- int4",
        "a word": "int4",
        "a number": "3",
        "null": "~",
        "a tab": "delta:\n\t- int4",
        "two documents": "delta: int4\n---\ndelta: int8",
        "a key twice": "delta: int4\ndelta: int8",
        "a key twice in a rule": "delta: int4\nrules:\n  - layers: all\n    layers: odd\n    delta: int8",
        "aliases": laughs,
        "an alias to itself": "a: &a\n  b: *a",
        "merge keys": "base: &b {delta: int4}\n<<: *b",
        "a Python object": "delta: !!python/object:os.system {}",
        "a Python call": "delta: !!python/object/apply:os.system ['true']",
        "a Python name": "delta: !!python/name:os.system",
        "binary": "delta: !!binary aW50NA==",
        "a time": "delta: 2001-01-01",
        "an unknown tag": "delta: !x int4",
        "NUL": b"delta: int4\0",
        "Latin-1": b"delta: \xe9",
        "UTF-16": "delta: int4".encode("utf-16-le"),
        "an escape sequence": b"delta: \x1b[31m",
        "an escaped escape": 'delta: "\\e[31m\\n"',
        "a lone surrogate": 'delta: "\\ud800"',
        "deep lists": "[" * 100_000,
        "deep maps": "{a: " * 5_000,
        "deep blocks": "".join(" " * n + "a:\n" for n in range(1_200)),
        "2 MB": "#" * 2_000_000,
        "keys that are lists": "? [a]\n: b",
        "keys that are numbers": "1: 2",
        "delta missing": "seed: 1",
        "delta null": "delta:",
        "delta a list": "delta: [int4]",
        "delta unknown": "delta: int9",
        "delta long": "delta: " + "int4+" * 30_000 + "int4",
        "delta of 2,000 terms": "delta: " + "int4+" * 2_000 + "int4",
        "an unknown key": "delta: int4\nextra: 1",
        "seed negative": "delta: int4\nseed: -1",
        "seed 2^64": f"delta: int4\nseed: {2**64}",
        "seed a word": "delta: int4\nseed: one",
        "seed true": "delta: int4\nseed: true",
        "seed infinite": "delta: int4\nseed: .inf",
        "seed of 5,000 digits": "delta: int4\nseed: " + "9" * 5000,
        "group_size 0": "delta: int4\ngroup_size: 0",
        "group_size 2^70": f"delta: int4\ngroup_size: {2**70}",
        "group_size NaN": "delta: int4\ngroup_size: .nan",
        "shared a word": "delta: int4\nshared: perhaps",
        "base a number": "delta: int4\nbase: 3",
        "base expert:x": "delta: int4\nbase: expert:x",
        "base expert:²": "delta: int4\nbase: expert:²",
        "rules a word": "delta: int4\nrules: all",
        "rules of words": "delta: int4\nrules: [all]",
        "a rule without delta": "delta: int4\nrules: [{layers: all}]",
        "layers to 10^12": "delta: int4\nrules: [{layers: 0-1000000000000, delta: int8}]",
        "layers of 5,000 digits": "delta: int4\nrules: [{layers: '" + "9" * 5000 + "', delta: int8}]",
        "layers ²": "delta: int4\nrules: [{layers: '²', delta: int8}]",
        "layers turned": "delta: int4\nrules: [{layers: a-b, delta: int8}]",
        "projections unknown": "delta: int4\nrules: [{projections: [gates], delta: int8}]",
    }.items():
        yield case(name, text)
    for by in ("a FIFO", "a folder", "a socket", "a link to nothing", "a link to itself", "a link to /dev/zero"):
        yield Case("recipes", by, "recipe", _replace("recipe.yaml", by), _refused("recipe.yaml", RECIPE, code=2))


def _adapters() -> Iterator[Case]:
    """A LoRA adapter as an expert of an upcycled model."""
    for key, values in {
        "peft_type": ["IA3", None, 3, []],
        "bias": ["all", 3],
        "lora_alpha": [None, "x", True, *NOT_FINITE, 10**400, [], {}],
        "alpha_pattern": [[1], {"(": 1}, {"([a-z0-9_.]+)*!": 1}, {"(.|.)" * 30 + "!": 1}, {".*" * 30 + "!": 1}, "x", 3],
        "use_dora": [True, "yes"],
        "modules_to_save": [["lm_head"], "x"],
        "init_lora_weights": ["pissa", [], 3],
    }.items():
        for value in values:
            make = _json(_put((key,), value), "adapter_config.json")
            yield Case("adapters", f"{key}: {value!r:.30}", "adapter", make, _refused(key, DONOR))
    for name, text in {"empty": b"", "a list": b"[]", "deep": b"[" * 100_000, "a key twice": b'{"r":1,"r":1}'}.items():
        make = _file(lambda raw, t=text: t, "adapter_config.json")
        yield Case("adapters", f"settings: {name}", "adapter", make, _refused("adapter_config.json", DONOR))
    up = f"base_model.model.{LAYER}.mlp.up_proj.lora_"

    def tensors(name: str, change: Callable[[dict], Any], said: str) -> Case:
        return Case("adapters", name, "adapter", _retensor(change, ADAPTER), _refused(said, DONOR))

    yield tensors("no factors", lambda t: t.clear(), "has no LoRA factors")
    yield tensors("only A", lambda t: t.pop(f"{up}B.weight"), "expected factors")
    yield tensors("only B", lambda t: t.pop(f"{up}A.weight"), "expected factors")
    yield tensors("an unknown tensor", lambda t: t.update(x=["BF16", [1], b"\0\0"]), "no LoRA factor")
    yield tensors(
        "of attention",
        lambda t: t.update({f"base_model.model.{LAYER}.self_attn.q_proj.lora_A.weight": ["BF16", [1, 8], bytes(16)]}),
        "no FFN projection",
    )
    yield tensors(
        "ranks differ", lambda t: t.update({f"{up}A.weight": ["BF16", [3, HIDDEN], bytes(48)]}), "expected factors"
    )
    yield tensors("one axis", lambda t: t.update({f"{up}A.weight": ["BF16", [16], bytes(32)]}), "expected a matrix")
    yield tensors(
        "integers", lambda t: t.update({f"{up}A.weight": ["I16", [2, HIDDEN], bytes(32)]}), "expected BF16, F16, F32"
    )
    yield tensors("NaN", lambda t: t.update({f"{up}A.weight": ["BF16", [2, HIDDEN], b"\xc0\x7f" * 16]}), "not finite")
    yield tensors(
        "rank 0",
        lambda t: t.update({f"{up}A.weight": ["BF16", [0, HIDDEN], b""], f"{up}B.weight": ["BF16", [INNER, 0], b""]}),
        "expected a matrix",
    )

    def giant(folder: Path) -> None:
        rows = 1 << 28
        a, b = 2 * rows * HIDDEN, 2 * rows * INNER
        entries = {
            f"{up}A.weight": {"dtype": "BF16", "shape": [rows, HIDDEN], "data_offsets": [0, a]},
            f"{up}B.weight": {"dtype": "BF16", "shape": [INNER, rows], "data_offsets": [a, a + b]},
        }
        head = framed(entries, b"")
        (folder / ADAPTER).write_bytes(head)
        os.truncate(folder / ADAPTER, len(head) + a + b)

    yield Case("adapters", "rank 2^28, sparse, 7 GB", "adapter", giant, _refused("rank", DONOR), bomb=True)
    yield Case(
        "adapters", "cut", "adapter", _file(lambda raw: raw[:-1], ADAPTER), _refused("Is the file complete?", DONOR)
    )


def cases() -> list[Case]:
    """All of them, in the order of the classes."""
    found: list[Case] = []
    for family in (
        _framing,
        _header_text,
        _duplicates,
        _numbers,
        _entries,
        _offsets,
        _empty,
        _names,
        _index,
        _nodes,
        _links,
        _config,
        _experts,
        _fields,
        _codecs,
        _parts,
        _recipes,
        _adapters,
    ):
        found += family()
    return found
