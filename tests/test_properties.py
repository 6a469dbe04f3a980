"""What holds for any model, recipe and way of running, on examples that Hypothesis makes up.

A few of them, always the same, in CI. Many, and other ones each time: `HYPOTHESIS_PROFILE=long pytest tests/test_properties.py`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import handmade
import numpy as np
from command import contents, done
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from independent_reader import narrow, read_experts, widen

from ders_cli.architectures import ARCHITECTURES, Architecture, Storage
from ders_cli.codecs import parse_codec
from ders_cli.recipe import load_recipe

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def examples(few: int, many: int) -> settings:
    """Few, always the same, or many, other ones each time."""
    return settings(
        max_examples=many if LONG else few,
        derandomize=not LONG,
        database=None,
        print_blob=LONG,
        phases=list(Phase) if LONG else [Phase.explicit, Phase.generate],  # making a failure smaller takes minutes
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SETTINGS, COMMANDS = examples(25, 5000), examples(12, 500)
ROWS = [(row, storage) for row in ARCHITECTURES for storage in row.storages]
KINDS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
sides = st.integers(1, 70)


# --- models: a row of architectures.py, and what the file of such a model holds ---


@dataclass(frozen=True)
class Model:
    """Sizes and contents of a checkpoint."""

    row: Architecture = field(repr=False)
    storage: Storage
    dtype: str
    experts: int
    hidden: int
    inner: int
    layers: int
    files: int
    seed: int
    wild: bool  # any bits at all, else experts that are alike

    def matrices(self) -> list[dict[str, np.ndarray]]:
        """Of each layer {projection: bits [E, out, in]}."""
        random, up, down = np.random.default_rng(self.seed), (self.inner, self.hidden), (self.hidden, self.inner)
        shapes = {"gate": up, "up": up, "down": down}
        return [{p: self._matrices(random, shapes[p]) for p in self.storage.names()} for _ in range(self.layers)]

    def save(self, folder: Path) -> Path:
        tensors = {}
        for layer, matrices in enumerate(self.matrices()):
            for name, bits in stored(self.storage, matrices).items():
                tensors[f"model.layers.{layer}.{name}"] = self.dtype, np.ascontiguousarray(bits)
            tensors[f"model.layers.{layer}.norm.weight"] = "F32", np.full(self.hidden, layer, np.uint32)
        config: dict = {"model_type": self.row.model_types[0]}
        for key in self.row.counts[-1:]:  # "moe.num_experts" is {"moe": {"num_experts": ...}}
            *outer, last = key.split(".")
            inner = {last: self.experts + self.storage.first}
            config |= {outer[0]: inner} if outer else inner
        return handmade.save(folder, tensors, config, min(self.files, len(tensors)))

    def _matrices(self, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        whole = (self.experts + self.storage.first, *shape)
        if self.wild:
            return random.integers(0, 2 ** (8 * KINDS[self.dtype]().itemsize), whole, KINDS[self.dtype])
        base, own = random.standard_normal(shape), random.standard_normal(whole) * (random.random(whole) < 0.7)
        return narrow((base + own / 30).astype(np.float32), self.dtype)


def stored(storage: Storage, matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{projection: [E, out, in]} -> {name in the layer: what the file has}, as `Storage` describes it."""
    names = storage.names()
    if storage.fusion == "concatenated":
        matrices = {"up": np.concatenate((matrices["gate"], matrices["up"]), axis=1), "down": matrices["down"]}
    elif storage.fusion == "interleaved":
        pairs = np.stack((matrices["gate"], matrices["up"]), axis=2)
        matrices = {"up": pairs.reshape(len(pairs), -1, pairs.shape[-1]), "down": matrices["down"]}
    found = {}
    for projection, own in matrices.items():
        own = own.transpose(0, 2, 1) if projection in storage.transposed else own
        if "{}" in names[projection]:
            found |= {names[projection].format(i): matrix for i, matrix in enumerate(own)}
        else:
            found[names[projection]] = own.reshape(-1, own.shape[-1]) if storage.flattened else own
    return found


@st.composite
def models(draw: st.DrawFn, wild: bool) -> Model:
    row, storage = draw(st.sampled_from(ROWS))
    numbers = draw(st.integers(1, 6)), draw(sides), draw(sides), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return Model(row, storage, draw(st.sampled_from(list(KINDS))), *numbers, draw(st.integers(0, 2**32)), wild)


# --- recipes and ways of running ---

shares = st.integers(0, 99).map(lambda n: f"{n / 100:g}")
positive = st.integers(1, 100).map(lambda n: f"{n / 100:g}")
kept_of = st.tuples(st.integers(2, 64), st.integers(1, 63)).map(lambda pair: f"{min(pair[1], pair[0] - 1)}:{pair[0]}")
terms = st.one_of(
    st.integers(1, 8).map("int{}".format),
    shares.map("drop{}".format),
    shares.map("sparse{}".format),
    positive.map("top{}".format),
    st.integers(1, 50).map(lambda n: f"ternary{n / 100:g}"),
    kept_of,
    st.integers(1, 9).map("rank{}".format),
    st.just("none"),
)
chains = st.lists(terms, min_size=1, max_size=3).map("+".join)


@st.composite
def recipes(draw: st.DrawFn, experts: int, deltas: st.SearchStrategy[str]) -> dict:
    """The keys of a recipe, with up to two rules."""
    rule = {"layers": st.sampled_from(["all", "even", "odd", "0", "1-2"]), "delta": deltas}
    optional = {
        "projections": st.lists(st.sampled_from(["gate", "up", "down"]), min_size=1, unique=True),
        "group_size": st.integers(1, 80),
    }
    return {
        "delta": draw(deltas),
        "base": draw(st.one_of(st.just("mean"), st.integers(0, experts - 1).map("expert:{}".format))),
        "group_size": draw(st.integers(1, 80)),
        "seed": draw(st.sampled_from([0, 1, 2**63 - 1])),
        "rules": draw(st.lists(st.fixed_dictionaries(rule, optional=optional), max_size=2)),
    }


ways = st.tuples(st.integers(1, 4), st.sampled_from(["1B", "300B", "2kB", "40kB", "5GB"])).map(
    lambda way: ("-j", way[0], "--max-shard-size", way[1], "-q")
)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one example."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@COMMANDS
@given(st.data())
def test_exact_gives_every_file_back(data: st.DataObject) -> None:
    """Of any bits in any layout, by any way of running."""
    model = data.draw(models(wild=data.draw(st.booleans())))
    base = data.draw(st.one_of(st.just("mean"), st.integers(0, model.experts - 1).map("expert:{}".format)))
    with scratch() as folder:
        source = model.save(folder / "source")
        done("decompose", source, "--base", base, "-o", folder / "exact", *data.draw(ways))
        done("verify", folder / "exact", "--against", source, "-q")
        done("restore", folder / "exact", "-o", folder / "plain", *data.draw(ways)[:2], "-q")
        assert contents(folder / "plain") == contents(source)


@COMMANDS
@given(st.data())
def test_lossy_is_what_it_says(data: st.DataObject) -> None:
    """The plan's bytes are those written; verify finds what was noted; restored is what an independent reader decodes; and of the
    decomposed model comes the same as of the model."""
    model = data.draw(models(wild=False))
    fields = data.draw(recipes(model.experts, chains))
    with scratch() as folder:
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(fields))
        source, packed, flags = model.save(folder / "source"), folder / "packed", data.draw(ways)
        command = ("compress", source, "--recipe", recipe, "-o", packed, *flags)
        plan = done(*command, "--dry-run", "--json").json["plan"]
        done(*command)
        assert plan["exact"] and written(packed) == plan["output_bytes"]
        done("verify", packed, "-q")
        done("verify", packed, "--against", source, "-q")
        done("restore", packed, "-o", folder / "plain", *flags[:2], "-q")
        assert written(folder / "plain") == written(source)
        with np.errstate(all="ignore"):
            expected = read_experts(packed)
        assert experts_of(folder / "plain") == {name: bits.tobytes() for name, bits in expected.items()}
        done("decompose", source, "--base", fields["base"], "-o", folder / "exact", "-q")
        done("compress", folder / "exact", "--recipe", recipe, "-o", folder / "again", *flags)
        assert contents(folder / "again") == contents(packed)


def experts_of(folder: Path) -> dict[tuple[str, str], bytes]:
    """Every expert of a plain checkpoint, row by row."""
    from ders_cli.source import open_source

    with open_source(folder) as source:
        return {
            (group.name, label): source.read(group, i, slice(0, group.shape[0])).tobytes()
            for group in source.groups
            for i, (label, _) in enumerate(group.members)
        }


def test_recipes_of_the_property_are_recipes(tmp_path: Path) -> None:
    """What `recipes` makes is read as it is meant: the first rule that fits decides."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"delta": "int4", "rules": [{"layers": "odd", "delta": "top0.1+int2", "group_size": 3}]})
    )
    assert load_recipe(str(path), {}).rules[0].group_size == 3


# --- one codec, one matrix ---


@st.composite
def deltas(draw: st.DrawFn) -> np.ndarray:
    """fp32 [rows, in] of one size or of many, some rows and groups nothing but zeros."""
    random, shape = np.random.default_rng(draw(st.integers(0, 2**32))), (draw(st.integers(1, 5)), draw(sides))
    d = random.standard_normal(shape) * 10.0 ** draw(st.integers(-20, 20))
    d *= 10.0 ** random.integers(-draw(st.integers(0, 3)), 1, shape)
    d *= random.random(shape) < draw(st.sampled_from([0.1, 0.7, 1.0]))
    return d.astype(np.float32)


@SETTINGS
@given(deltas(), st.integers(3, 8), st.integers(1, 80), st.integers(0, 2**64 - 1))
def test_integers_are_near(d: np.ndarray, bits: int, group: int, key: int) -> None:
    """Within half a step, a step being the group's largest / (2^(b-1) - 1) but for bf16's 2^-8; and encoding what was decoded
    changes nothing."""
    codec = parse_codec(f"int{bits}", group)
    parts = codec.encode(d, key, 0)
    found, top = codec.decode(parts, d.shape, key, 0), 2 ** (bits - 1) - 1
    for begin in range(0, d.shape[1], group):
        own, its = d[:, begin : begin + group].astype(np.float64), found[:, begin : begin + group]
        step = abs(own).max(axis=1, keepdims=True) / top
        assert (abs(its - own) <= (0.5 + 2.0**-8 * top) * step).all() if bits == 8 else True
        assert (abs(its - own) <= (0.5 * (1 + 2.0**-8) + 2.0**-20) * step * (1 if bits < 8 else 1.01)).all()
    same(codec.encode(found, key, 0), parts)


@SETTINGS
@given(deltas(), st.sampled_from([1, 2]), st.integers(1, 80), st.integers(0, 2**64 - 1))
def test_signs_are_kept(d: np.ndarray, bits: int, group: int, key: int) -> None:
    """Of what is no 0 the sign is; the size along the delta is; and encoding what was decoded changes nothing."""
    codec = parse_codec(f"int{bits}", group)
    parts = codec.encode(d, key, 0)
    found = codec.decode(parts, d.shape, key, 0)
    assert (np.sign(found)[d != 0] == np.sign(d)[d != 0]).all()
    for begin in range(0, d.shape[1], group):
        own, its = (a[:, begin : begin + group].astype(np.float64) for a in (d, found))
        energy = (own**2).sum(axis=1)
        assert (abs((own * its).sum(axis=1) - energy) <= 2.0**-8 * energy).all()
        if not own.any():
            assert not its.any()
    if (found != 0).all():
        same(codec.encode(found, key, 0), parts)


@SETTINGS
@given(deltas(), st.one_of(positive.map("top{}".format), kept_of), st.integers(0, 2**64 - 1))
def test_the_largest_are_kept(d: np.ndarray, term: str, key: int) -> None:
    """No fewer than the codec says, none smaller than one that is left out, all gained alike; and encoding what was decoded changes
    nothing: all of its energy is in the kept ones, so its gain is 1."""
    codec = parse_codec(term, 128)
    parts = codec.encode(d, key, 0)
    found = codec.decode(parts, d.shape, key, 0)
    every = d.shape[1] if term.startswith("top") else codec.m
    for row, its in zip(d, found, strict=True):
        for begin in range(0, d.shape[1], every):
            own, kept = abs(row[begin : begin + every]), its[begin : begin + every] != 0
            count = codec.kept(every) if every == d.shape[1] else min(codec.n, own.size)
            assert kept.sum() == min(count, np.count_nonzero(own))
            assert not kept.any() or kept.all() or own[kept].min() >= own[~kept].max()
        held = its != 0
        if held.any():
            gain = (row.astype(np.float64) ** 2).sum() / (row[held].astype(np.float64) ** 2).sum()
            assert (abs(its[held] / row[held].astype(np.float64) / gain - 1) <= 2.0**-8 + 2.0**-20).all()
    same(codec.encode(found, key, 0), parts)


@SETTINGS
@given(deltas(), st.sampled_from(["drop", "sparse"]), shares, st.integers(0, 2**64 - 1))
def test_a_share_is_drawn(d: np.ndarray, name: str, rate: str, key: int) -> None:
    """What is kept becomes d / P(kept), whatever d is. So this is no projection: encoded again, it is divided again."""
    codec = parse_codec(f"{name}{rate}", 128)
    ones = codec.decode(codec.encode(np.ones_like(d), key, 0), d.shape, key, 0)
    held, factor = ones != 0, d.shape[1] / codec.kept(d.shape[1]) if name == "drop" else 1 / (1 - codec.rate)
    found = codec.decode(codec.encode(d, key, 0), d.shape, key, 0)
    assert not found[~held].any() and (held.sum(axis=1) == codec.kept(d.shape[1])).all() if name == "drop" else True
    expected = d.astype(np.float64) * factor
    assert (abs(found - expected)[held] <= (2.0**-8 + 2.0**-20) * abs(expected)[held]).all()
    twice = codec.decode(codec.encode(found, key, 0), d.shape, key, 0)
    assert (abs(twice - found * factor) <= (2.0**-8 + 2.0**-20) * abs(found * factor)).all()


@SETTINGS
@given(deltas(), st.integers(1, 50), st.integers(0, 2**64 - 1))
def test_ternary_has_one_size(d: np.ndarray, density: int, key: int) -> None:
    """One size a row, no more entries than slots, the delta's signs, nothing where the delta is 0; and as the sample is drawn
    anew, encoding it again may choose otherwise, but from its entries alone."""
    codec = parse_codec(f"ternary{density / 100:g}", 128)
    found = codec.decode(codec.encode(d, key, 0), d.shape, key, 0)
    again = codec.decode(codec.encode(found, key, 0), d.shape, key, 0)
    for row, its, others in zip(d, found, again, strict=True):
        held = its != 0
        assert held.sum() <= codec.slots(d.shape[1]) and len(set(abs(its[held]).tolist())) <= 1
        assert (np.sign(its[held]) == np.sign(row[held])).all() and not others[~held].any()


@SETTINGS
@given(deltas(), st.integers(1, 9), st.integers(0, 2**64 - 1))
def test_low_rank_is_near_the_best(d: np.ndarray, rank: int, key: int) -> None:
    """Within a tenth of the error that the singular vectors leave, and bf16's steps of the factors; the same again, but for those."""
    codec = parse_codec(f"rank{rank}", 128)
    found = codec.decode(codec.encode(d, key, 0), d.shape, key, 0).astype(np.float64)
    least, size = np.linalg.norm(np.linalg.svd(d.astype(np.float64))[1][rank:]), np.linalg.norm(d.astype(np.float64))
    assert np.linalg.norm(found - d) <= 1.1 * least + 2.0**-6 * size
    again = codec.decode(codec.encode(found.astype(np.float32), key, 0), d.shape, key, 0)
    assert np.linalg.norm(again - found) <= 2.0**-6 * size


@SETTINGS
@given(st.data(), st.sampled_from(list(KINDS)), chains, st.integers(0, 2**64 - 1))
def test_rows_are_coded_alone(data: st.DataObject, dtype: str, term: str, key: int) -> None:
    """Rows a ... b of stored bits have the parts that they have in the whole, and decode to what they decode to in it."""
    codec, d = parse_codec(term, data.draw(st.integers(1, 80))), data.draw(deltas())
    assume(abs(d).max() < 1e3 and codec.block_rows(d.shape) is None)
    a = data.draw(st.integers(0, d.shape[0] - 1))
    b = data.draw(st.integers(a + 1, d.shape[0]))
    base = narrow(np.random.default_rng(0).standard_normal(d.shape).astype(np.float32), dtype)
    expert = narrow(widen(base, dtype) + d, dtype)
    whole = codec.encode_expert(expert, base, dtype, key, 0)
    some = codec.encode_expert(expert[a:b], base[a:b], dtype, key, a)
    same(some, {part: data[a:b] for part, data in whole.items()})
    bits = codec.decode_expert(whole, base, dtype, key, 0)
    assert codec.decode_expert(some, base[a:b], dtype, key, a).tobytes() == bits[a:b].tobytes()


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for part, data in expected.items():
        assert found[part].tobytes() == data.tobytes(), part


def test_every_row_of_architectures_is_made_right(tmp_path: Path) -> None:
    """So that no row is left out of the properties in silence, and an expert is the matrix that it was before it was stored."""
    for number, (row, storage) in enumerate(ROWS):
        model = Model(row, storage, "BF16", 2, 3, 5, 1, 1, 0, False)
        found = experts_of(model.save(tmp_path / f"{number}"))
        for (group, label), bits in found.items():
            projection = group.rpartition(".")[2].removesuffix("_proj")
            expected = model.matrices()[0][projection][int(label) + storage.first]
            assert bits == expected.tobytes(), (row.model_types[0], group, label)
        assert len(found) == 2 * len(storage.names()), row.model_types[0]
