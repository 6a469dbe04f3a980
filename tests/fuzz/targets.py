"""What is fuzzed: for each input that may come from a stranger, a way in that may raise nothing but a DersError.

`one` takes the bytes of one input. Whatever else it raises, a crash, a hang, and more than a gigabyte of memory are findings.
`seeds` are valid inputs, made by ders itself; `mutate` changes one and keeps its form.

    header     a safetensors file                        index     model.safetensors.index.json beside two shards
    config     names, shapes and config.json as JSON     manifest  ders.json, after a byte that says beside which weights;
    recipe     a recipe's YAML                                     its checksum is made right
    the codecs: memory.py
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import handmade
import numpy as np
from fuzz import memory, mutations

from ders_cli.checkpoint.manifest import manifest_text
from ders_cli.checkpoint.reader import INDEX, CheckpointReader, read_header
from ders_cli.checkpoint.tensor import BITS, TensorSpec
from ders_cli.errors import DersError, UsageError
from ders_cli.layouts import find_layout
from ders_cli.recipe import load_recipe

LARGEST_FILE = 1 << 28  # bytes; such a file is easily made
Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """One way in. `one` raises DersError at most; `words` help a mutator that works on bytes."""

    one: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate
    words: tuple[str, ...] = ()
    longest: int = 8192  # bytes of an input
    kernels: str = "python"  # or "checked": compiled, with bounds checked; for what codes experts too


def finds(target: Target, data: bytes) -> BaseException | None:
    """What `one` raised, if it is not what a user may be told."""
    try:
        target.one(data)
    except DersError as error:
        assert str(error), "an error without a word"
    except Exception as error:
        return error
    return None


@cache
def _scratch() -> Path:
    """A folder in memory where there is such a thing, removed at exit."""
    import atexit

    memory_disk = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="ders-fuzz-", dir=memory_disk if os.access(memory_disk, os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# --- a plain checkpoint: the smallest that there is ---


def _experts(dtype: str = "BF16") -> dict[str, handmade.Tensor]:
    """One layer, two experts of [3, 4], a router."""
    rng = np.random.default_rng(0)
    kind, one = ("<u4", 0x3F800000) if dtype == "F32" else ("<u2", 0x3F80 if dtype == "BF16" else 0x3C00)
    tensors = {"model.layers.0.mlp.gate.weight": (dtype, np.full((2, 4), one, kind))}
    for expert in range(2):
        for name, shape in {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}.items():
            bits = (one + rng.integers(0, 50, shape)).astype(kind)
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = (dtype, bits)
    return tensors


@cache
def _plain(files: int) -> Path:
    return handmade.save(_scratch() / f"plain{files}", _experts(), files=files)


# --- header ---


def _header(data: bytes) -> None:
    path = _scratch() / "header.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    for name, spec in header.tensors.items():
        assert 8 <= header.begins[name] and header.begins[name] + spec.nbytes <= len(data), name


def _headers() -> Iterable[bytes]:
    yield (_plain(1) / "model.safetensors").read_bytes()
    yield (8).to_bytes(8, "little") + b"{}      "
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    yield _file(
        {"__metadata__": {"format": "pt"}, "é": entry, "b": entry | {"shape": [3], "data_offsets": [0, 3]}}, b"abc"
    )
    yield _file({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"a")


def _file(entries: Any, stored: bytes) -> bytes:
    text = mutations.dump(entries)
    return len(text).to_bytes(8, "little") + text + stored


def _mutated_header(data: bytes, rng: Random) -> bytes:
    """The JSON's tree, its length made right; or bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3 or length > len(data) - 8:
        return mutations.raw(data, rng)
    text = mutations.json_text(data[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# --- index ---


def _index(data: bytes) -> None:
    folder = _plain(2)
    (folder / INDEX).write_bytes(data)
    with CheckpointReader(folder) as reader:
        assert set(reader.tensors) == set(reader.index["weight_map"]), "not what the index lists"


def _indices() -> Iterable[bytes]:
    shards = [sorted(read_header(path).tensors) for path in sorted(_plain(2).glob("*.safetensors"))]
    names = [path.name for path in sorted(_plain(2).glob("*.safetensors"))]
    weight_map = {tensor: file for file, tensors in zip(names, shards, strict=True) for tensor in tensors}
    yield mutations.dump({"metadata": {"total_size": 9}, "weight_map": weight_map})
    yield mutations.dump({"weight_map": weight_map})


# --- config ---


def _config(data: bytes) -> None:
    """{"config": {...}, "tensors": {name: [dtype, shape]}, "shared": false}; tensors as a header may list them."""
    try:
        given = json.loads(data)
        config, shared = given["config"], bool(given.get("shared"))
        tensors = {
            name: TensorSpec(tuple(shape), dtype)
            for name, (dtype, shape) in given["tensors"].items()
            if dtype in BITS and all(type(n) is int and 0 <= n < 2**63 for n in shape)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if not isinstance(config, dict) or sum(spec.nbytes for spec in tensors.values()) > LARGEST_FILE:
        return  # the reader has seen to that: a header's tensors fill its file
    layout = find_layout(tensors, config, include_shared=shared)
    for group in layout.groups:
        for label, view in group.members:
            rows, columns = view.shape
            last = view.offset + (rows - 1) * view.row_stride + (columns - 1) * view.column_stride
            assert rows > 0 < columns and 0 <= view.offset <= last < tensors[view.tensor].size, (group.name, label)


def _configs() -> Iterable[bytes]:
    def layer(**tensors: list) -> dict[str, Any]:
        return {f"model.layers.0.{name.replace('__', '.')}": ["BF16", shape] for name, shape in tensors.items()}

    listed = {name: [dtype, list(bits.shape)] for name, (dtype, bits) in _experts().items()}
    yield mutations.dump({"config": {"model_type": "qwen3_moe", "num_experts": 2}, "tensors": listed})
    yield mutations.dump({"config": {"model_type": "unheard", "text_config": {"num_experts": 2}}, "tensors": listed})
    stacked = layer(mlp__experts__gate_up_proj=[2, 6, 4], mlp__experts__down_proj=[2, 4, 3])
    yield mutations.dump({"config": {"model_type": "qwen3_moe", "num_experts": 2}, "tensors": stacked})
    stacked = layer(mlp__experts__gate_up_proj=[2, 4, 6], mlp__experts__down_proj=[2, 3, 4])
    yield mutations.dump({"config": {"model_type": "gpt_oss", "num_local_experts": 2}, "tensors": stacked})
    flat = {
        f"transformer.blocks.0.ffn.experts.mlp.{name}": ["BF16", [6, 4]] for name in ("w1", "v1", "w2")
    }  # two experts of [3, 4]
    yield mutations.dump({"config": {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 2}}, "tensors": flat})
    short = {
        name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2"): v
        for name, v in listed.items()
    }
    short = {name.replace("mlp", "block_sparse_moe"): value for name, value in short.items()}
    yield mutations.dump({"config": {"model_type": "mixtral", "num_local_experts": 2}, "tensors": short})
    shared = listed | layer(
        mlp__shared_expert__gate_proj__weight=[3, 4],
        mlp__shared_expert__up_proj__weight=[3, 4],
        mlp__shared_expert__down_proj__weight=[4, 3],
    )
    yield mutations.dump({"config": {"model_type": "qwen2_moe", "num_experts": 2}, "tensors": shared, "shared": True})


# --- manifest ---

PACKED = ("exact", "int4", "drop0.5+int2", "top0.3", "none")


@cache
def _packed() -> list[Path]:
    """The plain checkpoint in several codecs."""
    from command import done

    plain = handmade.save(_scratch() / "source", _experts())
    for number, delta in enumerate(PACKED):
        done("compress", plain, "--delta", delta, "-o", _scratch() / f"packed{number}", "-q")
    return [_scratch() / f"packed{number}" for number in range(len(PACKED))]


def _manifest(data: bytes) -> None:
    """Opened, verified, and if it opens restored: nothing but the output may appear."""
    from ders_cli.findings import Report
    from ders_cli.integrity import intact
    from ders_cli.output import Options
    from ders_cli.report import Progress
    from ders_cli.restore import check_places, restore
    from ders_cli.source import DersSource

    if not data:
        return
    folder = _packed()[data[0] % len(PACKED)]
    whole = _original(folder)
    try:
        found = json.loads(data[1:])
        text = manifest_text(found) if isinstance(found, dict) else data[1:]
    except (ValueError, RecursionError):
        text = data[1:]
    (folder / "ders.json").write_bytes(text)
    out = _scratch() / "deep" / "restored"
    try:
        with DersSource(folder) as source:
            check_places(source)
            intact(source, Report("", None), set(), 1, Progress())
            out.parent.mkdir(exist_ok=True)
            before = set(os.listdir(_scratch()))
            try:
                restore(source, out, Options())
            finally:
                assert set(os.listdir(_scratch())) == before, "written outside of the output"
                assert all(name.startswith(("restored", ".restored")) for name in os.listdir(out.parent))
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)
        (folder / "ders.json").write_bytes(whole)


@cache
def _original(folder: Path) -> bytes:
    return (folder / "ders.json").read_bytes()


def _manifests() -> Iterable[bytes]:
    for number, folder in enumerate(_packed()):
        yield bytes([number]) + json.dumps(json.loads(_original(folder)), separators=(",", ":")).encode()


def _mutated_manifest(data: bytes, rng: Random) -> bytes:
    return data[:1] + mutations.json_text(data[1:], rng)


# --- recipe ---


def _recipe(data: bytes) -> None:
    path = _scratch() / "recipe.yaml"
    path.write_bytes(data)
    recipe = load_recipe(str(path), {})
    for shape in ((3, 4), (64, 129)):
        for codec in {recipe.delta, *(rule.delta for rule in recipe.rules)}:
            assert isinstance(codec, str)
        _plan(recipe, shape)


def _plan(recipe: Any, shape: tuple[int, int]) -> None:
    """What a conversion asks of a recipe first: each group's codec, its parts, its text in ders.json."""
    from ders_cli.codecs import group_codec_from_config
    from ders_cli.codecs.mixed import families, mixed
    from ders_cli.layouts import ExpertGroup, MatrixView

    members = tuple((label, MatrixView("w", shape, 0, shape[1], 1)) for label in ("0", "1", "shared"))
    for layer in range(2):
        for projection in ("gate", "down"):
            codec = mixed(recipe.codecs(ExpertGroup("g", layer, projection, "BF16", members)))
            again = group_codec_from_config(json.loads(json.dumps(codec.config)), len(members))
            assert again == codec, f"{codec} is noted as {codec.config}"
            for one, other in zip(families(codec, len(members)), families(again, len(members)), strict=True):
                assert one.codec.spec(shape) == other.codec.spec(shape)


def _recipes() -> Iterable[bytes]:
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        yield path.read_bytes()
    yield b"base: expert:1\ndelta: drop0.9+int4\ngroup_size: 32\nseed: 7\nshared: true\nrules:\n  - {layers: '0-3,31', delta: '2:4'}\n"
    yield b"delta: int4\nrules:\n- {experts: [0, 4-7, shared], delta: exact}\n- {experts: '1,3', layers: odd, delta: int8}\n"
    yield b"delta: exact\nrules:\n- layers: even\n  projections: [down]\n  delta: int1+rank2\n  group_size: 64\n- {layers: 1, delta: none}\n"


# --- codecs: one input is a group in memory ---

CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "exact": ({"codec": "exact"},),
    "integers": tuple(
        {"codec": "int", "bits": b, "group_size": g} for b, g in zip(range(1, 9), (3, 8, 5, 16, 7, 64, 4, 128))
    ),
    "drop": ({"codec": "drop", "rate": 0.9}, {"codec": "drop", "rate": 0.5}, {"codec": "drop", "rate": 0}),
    "sparse": (
        {"codec": "sparse", "rate": 0.99, "dtype": "F32"},
        {"codec": "sparse", "rate": 0.4},
        {"codec": "sparse", "rate": 0},
    ),
    "ternary": ({"codec": "ternary", "density": 0.02}, {"codec": "ternary", "density": 0.3}),
    "top": ({"codec": "top", "density": 0.01}, {"codec": "top", "density": 0.1}, {"codec": "top", "density": 0.5}),
    "n_of_m": ({"codec": "n:m", "n": 2, "m": 4}, {"codec": "n:m", "n": 3, "m": 7}, {"codec": "n:m", "n": 8, "m": 64}),
    "rank": (
        {"codec": "rank", "rank": 2},
        {"codec": "rank", "rank": 5, "dtype": "F16"},
        {"codec": "rank", "rank": 99, "dtype": "F32"},
    ),
    "none": ({"codec": "none"},),
}
CONFIGS["chain"] = tuple(
    {"codec": "chain", "first": first, "then": then}
    for first, then in (
        (CONFIGS["drop"][1], CONFIGS["integers"][3]),
        (CONFIGS["top"][1], CONFIGS["integers"][1]),
        (CONFIGS["n_of_m"][0], CONFIGS["rank"][0]),
        (CONFIGS["integers"][0], CONFIGS["rank"][0]),
        (CONFIGS["integers"][1], CONFIGS["sparse"][1]),
        (CONFIGS["ternary"][0], {"codec": "chain", "first": CONFIGS["drop"][1], "then": CONFIGS["top"][2]}),
    )
)  # fmt: skip
SHAPES = (((3, 40), "BF16"), ((5, 13), "F16"), ((2, 9), "F32"), ((1, 300), "BF16"))


def _examples(configs: tuple[dict[str, Any], ...]) -> Iterable[bytes]:
    for config in configs:
        for number, (shape, dtype) in enumerate(SHAPES):
            yield memory.example(config, shape, dtype, seed=number)
    if configs == CONFIGS["exact"]:
        for far, (shape, dtype) in enumerate(SHAPES[:3]):
            yield memory.example(configs[0], shape, dtype, far=far)
        for far, shape in ((1, (2, 120)), (2, (2, 7)), (0, (1, 1100))):  # no base, kept as they are, more than a block
            yield memory.example(configs[0], shape, "BF16", far=far)


def _mutated_group(data: bytes, rng: Random) -> bytes:
    head, line, stored = data.partition(b"\n")
    if rng.random() < 0.35:
        return mutations.json_text(head, rng) + line + stored
    return head + line + mutations.raw(stored, rng)


HEADER_WORDS = ("dtype", "shape", "data_offsets", "__metadata__", *BITS)
YAML_WORDS = (
    "base: ", "delta: ", "group_size: ", "seed: ", "shared: ", "rules:", "layers: ", "projections: ", "mean", "expert:0", "drop0.9",
    "+", "int4", "top0.1", "2:4", "rank16", "exact", "none", "sparse0.9", "ternary0.1", "even", "odd", "all", "0-3", "gate", "down",
    "!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!bool ", "!!null ", "!!pairs ", "&a ", "*a", "<<: ",
    "? ", "- ", "---\n", "...\n", "%YAML 1.1\n", "2001-02-03", "1:2:3", "0x1", "0b1", "1e3", ".inf", ".nan", "|\n ", ">\n ", "\\x41",
)  # fmt: skip
TARGETS: dict[str, Target] = {
    name: Target(memory.decode, partial(_examples, configs), _mutated_group) for name, configs in CONFIGS.items()
} | {
    "recipe": Target(_recipe, _recipes, mutations.raw, YAML_WORDS, longest=1000),
    "header": Target(_header, _headers, _mutated_header, HEADER_WORDS),
    "index": Target(_index, _indices, mutations.json_text),
    "config": Target(_config, _configs, mutations.json_text),
    "manifest": Target(_manifest, _manifests, _mutated_manifest, kernels="checked"),
}

__all__ = ["TARGETS", "Target", "UsageError", "finds"]
