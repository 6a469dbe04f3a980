"""Several codecs in one group: an expert's bytes are those that it has where its codec is everybody's, all the way."""

import copy
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
import yaml
from command import contents, ders, done
from independent_reader import read_experts
from safetensors.torch import load_file

from ders_cli import convert
from ders_cli.checkpoint.manifest import manifest_text
from ders_cli.codecs import CODECS, parse_codec
from ders_cli.codecs.mixed import MixedCodec, families, mixed
from ders_cli.convert_group import Encoder
from ders_cli.errors import DersError, Interrupted, UsageError
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.output import Options
from ders_cli.recipe import Recipe, make_recipe
from ders_cli.source import open_source

# a term for every codec that there is, by its name
TERMS = {
    "exact": "exact",
    "int": "int4",
    "drop": "drop0.5",
    "top": "top0.1",
    "n:m": "2:4",
    "ternary": "ternary0.1",
    "sparse": "sparse0.9",
    "rank": "rank3",
    "none": "none",
    "chain": "drop0.5+int4",
}
EXPERTS = 12


def recipe_of(terms: list[str], **others: Any) -> dict[str, Any]:
    """Expert i by terms[i % len(terms)], in fewer rules than experts."""
    experts = {term: [i for i in range(EXPERTS) if terms[i % len(terms)] == term] for term in terms}
    return {"delta": terms[0], "rules": [{"experts": e, "delta": t} for t, e in experts.items()]} | others


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / f"recipe{len(list(folder.glob('recipe*')))}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def compress(source: Path, recipe: Path | str, out: Path, *flags: object) -> Path:
    chosen = ("--delta", recipe) if isinstance(recipe, str) else ("--recipe", recipe)
    done("compress", source, *chosen, "-o", out, "-q", *flags)
    return out


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ders.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def matrices(folder: Path, entry: dict[str, Any]) -> dict[str, bytes]:
    """Label -> bytes of the matrix, in a plain checkpoint."""
    tensors = tensors_of(folder)
    return {
        m["label"]: tensors[m["tensor"]]
        .flatten()
        .as_strided(entry["shape"], m["strides"], m["offset"])
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for m in entry["members"]
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "source"
    toy.make("mixtral", folder, dtype=torch.bfloat16, num_local_experts=EXPERTS, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    return compress(source, write_recipe(root, recipe_of(list(TERMS.values()))), root / "out")


# --- on disk


def test_every_codec_has_a_term() -> None:
    assert {name: type(parse_codec(term, 128)) for name, term in TERMS.items()} == CODECS


def test_an_experts_bytes_are_those_of_a_group_of_one_codec(source: Path, packed: Path, tmp_path: Path) -> None:
    """Part by part, expert by expert; of a stream chunk by chunk. And what ders.json says of the expert."""
    here, about = tensors_of(packed), manifest_of(packed)
    for term in TERMS.values():
        alone = compress(source, term, tmp_path / term.replace(":", "of"))
        there, entries = tensors_of(alone), {entry["name"]: entry for entry in manifest_of(alone)["groups"]}
        seen = 0
        for entry in about["groups"]:
            name, codec = entry["name"], entry["codec"]
            k = codec["codecs"].index(entries[name]["codec"])
            own = [i for i, number in enumerate(codec["of"]) if number == k]
            parts = {part for part in there if part.startswith(f"{name}.delta.")}
            assert {part.replace(".delta.", f".delta.{k}.") for part in parts} == {
                part for part in here if part.startswith(f"{name}.delta.{k}.")
            }
            for part in parts:
                a, b = here[part.replace(".delta.", f".delta.{k}.")], there[part]
                if part.endswith(".stream"):
                    continue
                if part.endswith(".extents"):
                    ends = [(a, here[f"{name}.delta.{k}.stream"]), (b[own], there[f"{name}.delta.stream"])]
                    found = [[stream[x:y].numpy().tobytes() for x, y in e.view(-1, 2).tolist()] for e, stream in ends]
                    assert found[0] == found[1] and len(found[0]) == len(own)
                else:
                    assert torch.equal(a.view(torch.uint8), b[own].view(torch.uint8)), part
            assert [entry["members"][i] for i in own] == [entries[name]["members"][i] for i in own]
            assert torch.equal(here[f"{name}.base"], there[f"{name}.base"])
            seen += len(own)
        assert seen == 3 * (2 if term in list(TERMS.values())[: EXPERTS - len(TERMS)] else 1)


LAYOUTS = [
    ("gpt_oss", torch.bfloat16, True, {"num_local_experts": EXPERTS}, ()),  # stacked, gate and up interleaved, biases
    ("nemotron_h", torch.float32, False, {"n_routed_experts": EXPERTS}, ()),  # no gate
    ("qwen2_moe", torch.float16, False, {"num_experts": EXPERTS}, ("--shared",)),  # the shared expert is a member
]


@pytest.mark.parametrize(("name", "dtype", "fused", "sizes", "flags"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_the_whole_road(
    tmp_path: Path, name: str, dtype: torch.dtype, fused: bool, sizes: dict[str, int], flags: tuple[str, ...]
) -> None:
    """Compressed, verified alone and against the source, restored; read by a reader that knows only docs/format.md."""
    toy.make(name, tmp_path / "source", dtype=dtype, fused=fused, **sizes)
    recipe = recipe_of(list(TERMS.values()))
    if flags:
        recipe["rules"].insert(0, {"experts": "shared, 0", "delta": "int8"})
    out = compress(tmp_path / "source", write_recipe(tmp_path, recipe), tmp_path / "out", *flags, "-j", 2)
    assert done("verify", out).out and done("verify", out, "--against", tmp_path / "source").out
    done("restore", out, "-o", tmp_path / "plain", "-q")
    read, counted = read_experts(out), 0
    for entry in manifest_of(out)["groups"]:
        plain, before = matrices(tmp_path / "plain", entry), matrices(tmp_path / "source", entry)
        for k, member in zip(entry["codec"]["of"], entry["members"], strict=True):
            label = member["label"]
            assert read[entry["name"], label].tobytes() == plain[label]
            if entry["codec"]["codecs"][k]["codec"] == "exact":
                assert plain[label] == before[label] and member["source_hash"] == member["restored_hash"]
                counted += 1
            else:
                assert plain[label] != before[label]
        assert (label == "shared") == bool(flags)
    assert counted >= 2


def test_same_bytes_whatever_the_threads_and_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rank takes the whole matrix, exact chunks of 5 rows, the others any; the stream's order is that of exact alone."""
    monkeypatch.setattr("ders_cli.codecs.exact.CHUNK_WEIGHTS", 200)
    recipe = write_recipe(tmp_path, recipe_of(["exact", "int4", "rank3", "drop0.5+int4", "ternary0.1"]))
    flags = ("--max-shard-size", "60kB")
    first = contents(compress(source, recipe, tmp_path / "first", *flags, "-j", 1))
    assert len(first) > 4  # several shards
    assert contents(compress(source, recipe, tmp_path / "j3", *flags, "-j", 3)) == first
    for weights in (40, 97, 1 << 30):
        monkeypatch.setattr("ders_cli.convert_group.BLOCK_WEIGHTS", weights)
        assert contents(compress(source, recipe, tmp_path / f"blocks{weights}", *flags)) == first
    monkeypatch.setattr("ders_cli.convert_group.MEAN_BYTES", 500)
    assert contents(compress(source, recipe, tmp_path / "steps", *flags)) == first
    done("verify", tmp_path / "first", "--against", source, "-q")

    without = compress(
        source, write_recipe(tmp_path, recipe_of(["exact", "int4", "int2", "none", "2:4"])), tmp_path / "w"
    )
    here, there = tensors_of(tmp_path / "first"), tensors_of(without)
    streams = [name for name in here if name.endswith(("stream", "extents"))]
    assert len(streams) == 6 and all(torch.equal(here[name], there[name]) for name in streams)
    assert here[streams[0].replace("stream", "extents")].shape[1] > 5  # chunks


@pytest.mark.parametrize("terms", [["exact", "int4"], ["rank3", "int4", "none"]], ids=str)
def test_the_plan_states_the_bytes(source: Path, tmp_path: Path, terms: list[str]) -> None:
    recipe = write_recipe(tmp_path, recipe_of(terms))
    flags = ("--recipe", recipe, "--max-shard-size", "100kB", "-o", tmp_path / "out")
    plan = done("compress", source, *flags, "--dry-run", "--json").json["plan"]
    done("compress", source, *flags, "-q")
    written = sum(len(data) for data in contents(tmp_path / "out").values())
    assert plan["exact"] == ("exact" not in terms)
    assert written == plan["output_bytes"] if plan["exact"] else 0 <= plan["output_bytes"] - written < 60_000
    exact_experts = manifest_of(tmp_path / "out")["bytes"]["experts"] * terms.count("exact") // len(terms)
    assert plan["exact"] or plan["output_bytes"] - written < exact_experts  # the bound is that of the exact ones alone


def test_a_stopped_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within a shard: finished groups are taken from the journal, their streams from their spools."""
    recipe = write_recipe(tmp_path, recipe_of(["exact", "int4", "rank3"]))
    whole = contents(compress(source, recipe, tmp_path / "whole"))
    real, done_before = convert.convert_group, []

    def stops(source, base, seed, unit, *others):
        if len(done_before) == 2:
            raise Interrupted
        done_before.append(unit.group.name)
        return real(source, base, seed, unit, *others)

    def counts(source, base, seed, unit, *others):
        done_after.append(unit.group.name)
        return real(source, base, seed, unit, *others)

    monkeypatch.setattr(convert, "convert_group", stops)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    flags = ("compress", source, "--recipe", recipe, "-o", tmp_path / "out", "-q", "-j", 1)
    assert ders(*flags).code == 130
    done_after: list[str] = []
    monkeypatch.setattr(convert, "convert_group", counts)
    done(*flags, "--resume")
    assert contents(tmp_path / "out") == whole
    assert len(done_after) == 1 and set(done_before) | set(done_after) == {
        entry["name"] for entry in manifest_of(tmp_path / "out")["groups"]
    }


def test_batch(source: Path, packed: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_of(list(TERMS.values())))
    (tmp_path / "list.txt").write_text(f"{source} {tmp_path / 'out'}\n")
    done("compress", "--batch", tmp_path / "list.txt", "--recipe", recipe, "-q")
    assert contents(tmp_path / "out") == contents(packed)


def test_an_exact_expert_of_less_than_the_group_may_keep_a_nan(source: Path, tmp_path: Path) -> None:
    """A NaN in an exact expert is kept; in any other it is refused, and named."""
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[name][3, 4] = torch.nan
    toy.write(broken, json.loads((broken / "config.json").read_text()), tensors)
    fine = write_recipe(tmp_path, {"base": "expert:0", "delta": "int4", "rules": [{"experts": 1, "delta": "exact"}]})
    out = compress(broken, fine, tmp_path / "out")
    done("restore", out, "-o", tmp_path / "plain", "-q")
    assert torch.equal(tensors_of(tmp_path / "plain")[name].view(torch.int16), tensors[name].view(torch.int16))
    bad = write_recipe(tmp_path, {"base": "expert:0", "delta": "exact", "rules": [{"experts": 1, "delta": "int4"}]})
    ran = ders("compress", broken, "--recipe", bad, "-o", tmp_path / "bad", "-q")
    assert ran.code == 4 and name in ran.err and "nan at [3, 4]" in ran.err


@pytest.mark.parametrize("held", [1 << 25, 500], ids=["held", "one by one"])
@pytest.mark.parametrize("target", ["int4", "rank3", "mixed", "exact"])
def test_converting_a_lossless_one_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, held: int
) -> None:
    """From a source of exact chunks: its own blocks are other ones, and every chunk is decoded once."""
    monkeypatch.setattr("ders_cli.codecs.exact.CHUNK_WEIGHTS", 280)  # 7 rows of 40
    monkeypatch.setattr("ders_cli.convert_group.BLOCK_WEIGHTS", 80)
    monkeypatch.setattr("ders_cli.convert_group.MEAN_BYTES", held)
    lossless = {"base": "expert:0", "delta": "exact", "rules": [{"experts": 0, "delta": "none"}]}
    first = compress(source, write_recipe(tmp_path, lossless), tmp_path / "first")
    groups = manifest_of(first)["groups"]
    assert all(m["source_hash"] == m["restored_hash"] for entry in groups for m in entry["members"])
    wanted = recipe_of(["exact", "rank3", "int4"]) if target == "mixed" else {"delta": target}
    asked = write_recipe(tmp_path, wanted | {"base": "expert:0"})
    decoded, real = [], CODECS["exact"].decode_expert

    def counts(codec, parts, base, dtype, key, row):
        decoded.append((key, row))
        return real(codec, parts, base, dtype, key, row)

    monkeypatch.setattr(CODECS["exact"], "decode_expert", counts)
    again = compress(first, asked, tmp_path / "again", "-j", 1)
    assert len(decoded) == len(set(decoded)) > 100
    monkeypatch.undo()
    monkeypatch.setattr("ders_cli.codecs.exact.CHUNK_WEIGHTS", 280)
    straight = compress(source, asked, tmp_path / "straight")
    assert contents(again)["model.safetensors"] == contents(straight)["model.safetensors"]
    assert manifest_of(again)["groups"] == manifest_of(straight)["groups"]


def test_part_of_a_chunk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rows of an exact expert can be read."""
    monkeypatch.setattr("ders_cli.codecs.exact.CHUNK_WEIGHTS", 280)
    out = compress(source, write_recipe(tmp_path, recipe_of(["int4", "exact"])), tmp_path / "out")
    with open_source(source) as plain, open_source(out) as stored:
        same = {group.name: group for group in stored.groups}
        for group in plain.groups:
            for rows in (
                slice(0, 7),
                slice(2, 3),
                slice(5, 9),
                slice(3, 30),
                slice(7, 21),
                slice(group.shape[0] - 1, group.shape[0]),
            ):
                assert np.array_equal(stored.read(same[group.name], 1, rows), plain.read(group, 1, rows)), rows


def test_golden(tmp_path: Path) -> None:
    """The bytes of the day of writing decode, and are still written."""
    golden = Path(__file__).parent / "golden" / "format1"
    done("verify", golden / "mixed", "--against", golden / "source", "-q")
    out = compress(golden / "source", golden / "mixed.yaml", tmp_path / "out")
    assert contents(out) == contents(golden / "mixed")


# --- recipes


def group_of(labels: list[str], layer: int = 0, projection: str = "up") -> ExpertGroup:
    members = tuple((label, MatrixView(f"w{label}", (3, 4), 0, 4, 1)) for label in labels)
    return ExpertGroup(f"model.layers.{layer}.mlp.experts.{projection}_proj", layer, projection, "BF16", members)


def terms_of(recipe: Recipe, *labels: str, **where: Any) -> list[str]:
    return [codec.term for codec in recipe.codecs(group_of(list(labels), **where))]


@pytest.mark.parametrize(
    ("experts", "chosen"),
    [
        ([0, 2], "0 2"),
        ("0,2", "0 2"),
        ("0-2, shared", "0 1 2 shared"),
        (["1-2", "shared"], "1 2 shared"),
        (3, "3"),
        ("shared", "shared"),
        (["0-0"], "0"),
        (None, "0 1 2 3 shared"),
    ],
    ids=str,
)
def test_which_experts_a_rule_means(experts: Any, chosen: str) -> None:
    rule = {"delta": "int8"} | ({"experts": experts} if experts is not None else {})
    recipe, labels = make_recipe({"delta": "int4", "rules": [rule]}), ["0", "1", "2", "3", "shared"]
    codecs = dict(zip(labels, terms_of(recipe, *labels), strict=True))
    assert " ".join(label for label, term in codecs.items() if term == "int8") == chosen
    again = make_recipe(json.loads(json.dumps(recipe.model_dump(mode="json"))))  # as ders.json has it
    assert terms_of(again, *labels) == list(codecs.values())


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        {"experts": [1], "layers": "even", "delta": "exact"},
        {"experts": [1, 2], "projections": ["up"], "delta": "int8", "group_size": 64},
        {"experts": "2-3", "delta": "int2"},
    ]
    recipe = make_recipe({"delta": "int4", "rules": rules})
    assert terms_of(recipe, "0", "1", "2", "3") == ["int4", "exact", "int8", "int2"]
    assert terms_of(recipe, "0", "1", "2", "3", layer=1) == ["int4", "int8", "int8", "int2"]
    assert terms_of(recipe, "0", "1", "2", "3", projection="down") == ["int4", "exact", "int2", "int2"]
    assert recipe.codecs(group_of(["2"]))[0].group_size == 64


def test_a_recipe_without_experts_is_written_as_ever() -> None:
    dumped = make_recipe({"delta": "int4", "rules": [{"delta": "int8", "layers": "0-3"}]}).model_dump(mode="json")
    assert set(dumped["rules"][0]) == {"delta", "layers", "projections", "group_size"}


@pytest.mark.parametrize(
    "experts",
    [[], "", [True], [-1], [1.5], {"a": 1}, [[1]], "0-", "-3", "0-1-2", "even", "all", "٣", ["1 2"], [10**7]],
    ids=str,
)
def test_what_is_no_expert_is_refused(experts: Any) -> None:
    with pytest.raises(
        UsageError, match=r"rules\[0\].experts: expected experts' numbers, ranges such as 4-7, or shared"
    ):
        make_recipe({"delta": "int4", "rules": [{"delta": "int8", "experts": experts}]})


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"experts": [12]},
            "rules[0].experts: no group of its layers and projections has an expert 12; they have experts 0 ... 11",
        ),
        ({"experts": "3,20-30"}, "has an expert 20-30"),
        ({"experts": "7-4"}, "has an expert 7-4"),
        ({"experts": ["shared"]}, "has an expert shared; they have experts 0 ... 11; shared: true (--shared) puts"),
        ({"experts": [0], "layers": "5"}, "rules[0].experts: no group is of the layers and projections of this rule"),
    ],
    ids=str,
)
def test_an_expert_that_no_group_has(source: Path, tmp_path: Path, rule: dict[str, Any], said: str) -> None:
    recipe = write_recipe(tmp_path, {"delta": "int4", "rules": [rule | {"delta": "int8"}]})
    ran = ders("compress", source, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1, ran


def test_experts_that_only_some_layers_have(tmp_path: Path) -> None:
    """A rule's expert is looked for in the groups that the rule is about."""
    groups = [group_of(["0", "1"]), group_of(["0", "1", "2"], layer=1)]
    make_recipe({"delta": "int4", "rules": [{"delta": "int8", "experts": [2]}]}).check_experts(groups)
    with pytest.raises(UsageError, match="has an expert 2; they have experts 0 ... 1"):
        make_recipe({"delta": "int4", "rules": [{"delta": "int8", "experts": [2], "layers": 0}]}).check_experts(groups)


def test_one_codec_is_no_mixture(source: Path, tmp_path: Path) -> None:
    """Rules that give every expert the same codec change nothing but the recipe that is noted."""
    recipe = write_recipe(tmp_path, {"delta": "int8", "rules": [{"experts": "0-11", "delta": "int4"}]})
    one, other = compress(source, "int4", tmp_path / "one"), compress(source, recipe, tmp_path / "other")
    assert contents(one)["model.safetensors"] == contents(other)["model.safetensors"]
    assert manifest_of(one)["groups"] == manifest_of(other)["groups"]


def test_codecs_are_counted_in_order_of_first_use() -> None:
    a, b, c = (parse_codec(term, 128) for term in ("int4", "exact", "none"))
    made = mixed([b, a, b, c, a])
    assert isinstance(made, MixedCodec) and made.codecs == (b, a, c) and made.of == (0, 1, 0, 2, 1)
    assert [(f.codec, f.prefix, list(f.members)) for f in families(made, 5)] == [
        (b, "delta.0.", [0, 2]),
        (a, "delta.1.", [1, 4]),
        (c, "delta.2.", [3]),
    ]
    assert mixed([a, a]) is a


# --- from a stranger


def remade(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    manifest = manifest_of(broken)
    change(manifest)
    (broken / "ders.json").write_bytes(manifest_text(manifest))
    return broken


INT4 = {"codec": "int", "bits": 4, "group_size": 128}
LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "too few numbers": lambda codec: codec["of"].pop(),
    "too many numbers": lambda codec: codec["of"].append(0),
    "a number past the end": lambda codec: codec["of"].__setitem__(-1, 10),
    "a negative number": lambda codec: codec["of"].__setitem__(-1, -1),
    "no whole number": lambda codec: codec["of"].__setitem__(-1, 1.0),
    "a truth": lambda codec: codec["of"].__setitem__(1, True),
    "a huge number": lambda codec: codec["of"].__setitem__(1, 10**30),
    "another order": lambda codec: codec["of"].__setitem__(slice(0, 2), [1, 0]),
    "an unused codec": lambda codec: codec["codecs"].append(INT4),
    "one codec": lambda codec: codec.update(codecs=[INT4], of=[0] * EXPERTS),
    "no codec": lambda codec: codec.update(codecs=[], of=[]),
    "mixed in mixed": lambda codec: codec["codecs"].__setitem__(0, copy.deepcopy(codec)),
    "mixed in a chain": lambda codec: codec["codecs"].__setitem__(
        0, {"codec": "chain", "first": INT4, "then": copy.deepcopy(codec)}
    ),
    "an unknown codec": lambda codec: codec["codecs"].__setitem__(0, {"codec": "zip"}),
    "a codec that is none": lambda codec: codec["codecs"].__setitem__(0, None),
    "codecs that are no list": lambda codec: codec.update(codecs={"0": INT4, "1": INT4}),
    "numbers that are no list": lambda codec: codec.update(of="0" * EXPERTS),
    "no numbers": lambda codec: codec.pop("of"),
    "something more": lambda codec: codec.update(bits=4),
    "another codec": lambda codec: codec["codecs"].__setitem__(1, {"codec": "int", "bits": 3, "group_size": 128}),
    "experts that change places": lambda codec: codec["of"].__setitem__(slice(10, 12), [0, 0]),
}


OF_OTHER_SIZES = ("another codec", "experts that change places")  # as the format has it, but not what the files hold


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_codecs(packed: Path, tmp_path: Path, lie: str) -> None:
    broken = remade(packed, tmp_path, lambda manifest: LIES[lie](manifest["groups"][0]["codec"]))
    for command in (["verify", broken], ["restore", broken, "-o", tmp_path / "out"]):
        ran = ders(*command)
        assert ran.code == 4 and len(ran.err.splitlines()) == 1 and not ran.out, (lie, ran)
        said = "from ders.json, found" if lie in OF_OTHER_SIZES else "ders.json: codec"
        assert said in ran.err, (lie, ran)


def test_a_missing_part_and_a_missing_hash(packed: Path, tmp_path: Path) -> None:
    def part_of(manifest: dict[str, Any]) -> str:
        return next(name for name in manifest["tensors"] if name.endswith(".delta.1.codes"))

    def without_part(manifest: dict[str, Any]) -> None:
        manifest["groups"][0]["codec"]["codecs"][1]["group_size"] = 3

    ran = ders("verify", remade(packed, tmp_path, without_part))
    assert ran.code == 4 and ".delta.1.scale: expected BF16" in ran.err
    shutil.rmtree(tmp_path / "broken")
    ran = ders("verify", remade(packed, tmp_path, lambda manifest: manifest["tensors"][part_of(manifest)].pop()))
    assert ran.code == 4 and "1 hashes, expected 2" in ran.err


def test_damage_names_the_expert(packed: Path, tmp_path: Path) -> None:
    """Of a part that only some experts have, by the label that they have in the group."""
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    name = "model.layers.0.mlp.experts.up_proj.delta.1.codes"  # of experts 1 and 11
    with open_source(broken) as opened:
        place = opened.reader.places[name]
        second = opened.reader.tensors[name].nbytes // 2
    with (broken / place.file).open("r+b") as file:
        file.seek(place.begin + second)
        byte = file.read(1)
        file.seek(place.begin + second)
        file.write(bytes([byte[0] ^ 1]))
    ran = ders("verify", broken)
    assert ran.code == 3 and f"{name}: expert 11: damaged" in ran.out
    assert "up_proj, expert 11: does not decode to the bits noted" in ran.out and "expert 1:" not in ran.out
    refused = ders("restore", broken, "-o", tmp_path / "plain", "-q")
    assert refused.code == 4 and "expert 11 of" in refused.err


# --- another encoder


class Forgetting:
    """Codes no delta at all of one expert, and leaves the others to their codecs."""

    def __init__(self, label: dict[str, Any]):
        self.label, self.asked = label, set()

    def encode(self, group, member, codec, expert, base, key, row):
        self.asked.add((group.name, member, codec.term))
        if member != 1:
            return None
        return codec.encode_expert(base, base, group.dtype, key, row)

    def block_rows(self, codec, shape):
        return None

    def memory(self, codec, group):
        return 0

    def check_unchanged(self):
        return None


def test_another_encoder_chooses_the_parts(source: Path, tmp_path: Path) -> None:
    encoder: Encoder = Forgetting({"method": "none at all", "from": "x" * 5000})  # more than a page of ders.json
    recipe = make_recipe(recipe_of(["int4", "int2"]))

    def converted(name: str, encoder: Encoder | None) -> dict[str, Any]:
        with open_source(source) as opened:
            made = convert.prepare(opened, recipe, tmp_path / name, Options(2), encoder=encoder)
            manifest = convert.run(made)
        assert made.totals()["output_bytes"] == sum(len(data) for data in contents(tmp_path / name).values())
        return manifest

    plain, other = converted("plain", None), converted("other", encoder)
    assert "calibration" not in plain and other["calibration"] == encoder.label
    assert {(member, term) for _, member, term in encoder.asked} == {
        (i, "int2" if i % 2 else "int4") for i in range(EXPERTS)
    }
    for a, b in zip(plain["groups"], other["groups"], strict=True):
        differ = [x["label"] for x, y in zip(a["members"], b["members"], strict=True) if x != y]
        assert differ == ["1"] and b["members"][1]["error"]["delta"] == 1
    done("verify", tmp_path / "other", "--against", source, "-q")

    (tmp_path / "other").rename(tmp_path / "third.partial")  # as a run that was stopped before it was published
    (tmp_path / "third.partial" / ".ders-plan.json").write_text("{}")
    with open_source(source) as opened:
        mark = convert.fingerprint(opened, recipe, Options())
        made = convert.prepare(opened, recipe, tmp_path / "third", Options(resume=True), encoder=encoder)
        (tmp_path / "third.partial" / ".ders-plan.json").write_text(json.dumps(mark | {"calibration": "null"}))
        with pytest.raises(DersError, match="another .*calibration"):
            convert.run(made)


# --- kernels and models


def test_outputs_by_kernels(source: Path, packed: Path) -> None:
    report = done("verify", packed, "--against", source, "--backend", "reference", "--json").json["kernels"]
    assert len(report["experts"]) == EXPERTS and all(0 <= e["distance"] <= e["allowed"] for e in report["experts"])
    assert sum(e["distance"] > 0 for e in report["experts"]) == 8  # of exact, sparse and none, all is decoded
    names = {where.partition(", ")[2] for where in report["decoded"]}
    assert names == {"expert 0, 10", "expert 6", "expert 8"} and len(report["decoded"]) == 9


def test_wrong_kernels_are_found(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's delta under another member's number: the first of a codec for the second."""
    from ders_cli.through_kernels import ThroughKernels

    real = ThroughKernels._delta_product
    monkeypatch.setattr(ThroughKernels, "_delta_product", lambda self, x, delta, member: real(self, x, delta, 0))
    ran = ders("verify", packed, "--backend", "reference")
    assert ran.code == 3 and "expert 11: kernels (reference) differ" in ran.out and "expert 1:" not in ran.out


TOKENS = torch.arange(1, 17).reshape(2, 8)
# fp32 sums in another order than the stock model's; measured 1e-7. Experts without their deltas: 1e-3 and more.
CLOSE = 1e-6
LOADED = [list(TERMS.values()), ["int4", "int8", "int2"], ["rank3", "top0.1", "none"]]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def load(folder: Path, **arguments):
    from transformers import AutoModelForCausalLM

    import ders_cli.hf  # noqa: F401 (from_pretrained takes DeRS folders from here on)

    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module")
def fp32_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp32") / "source"
    toy.make("mixtral", folder, num_local_experts=EXPERTS, num_hidden_layers=1)
    return folder


@pytest.mark.parametrize("terms", LOADED, ids=["all", "ints", "trained"])
def test_packed_is_the_dequantised_model(
    fp32_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: list[str]
) -> None:
    """Each way of each projection; saved untouched, the same bytes."""
    packed = compress(fp32_source, write_recipe(tmp_path, recipe_of(terms)), tmp_path / "packed", "--group-size", 32)
    model = load(packed)
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    want = logits(load(packed, experts_implementation="eager"))
    monkeypatch.delenv("DERS_DEQUANTIZE")
    layer = model.model.layers[0].mlp.experts
    for way in ("auto", "apart", "whole"):
        layer.way = way
        assert (logits(model) - want).abs().max() < CLOSE, way
    plain = compress(fp32_source, "none", tmp_path / "none")
    assert (logits(load(plain)) - want).abs().max() > 100 * CLOSE
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(packed)["model.safetensors"]
    assert manifest_of(tmp_path / "again")["groups"] == manifest_of(packed)["groups"]
    done("verify", tmp_path / "again", "-q")


def test_bf16_on_the_short_ways(source: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(packed)
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    want = logits(load(packed, experts_implementation="eager"))
    for way in ("apart", "whole"):
        model.model.layers[0].mlp.experts.way = way
        # of logits of up to 0.5, each of some 20 sums rounded to bf16: 0.5 * 2^-9 * sqrt(20)
        assert (logits(model) - want).abs().max() < 5e-3, way


def test_weights_are_those_of_restore(packed: Path, tmp_path: Path) -> None:
    done("restore", packed, "-o", tmp_path / "plain", "-q")
    model = load(packed)
    for entry in manifest_of(packed)["groups"]:
        restored = matrices(tmp_path / "plain", entry)
        projection = model.get_submodule(entry["name"])
        for expert in range(EXPERTS):
            weight = projection.weight(projection.member_of[expert])
            assert weight.contiguous().view(torch.uint8).numpy().tobytes() == restored[str(expert)], expert


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_training(fp32_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the base and of the parts that train are those of the weights that they make up."""
    recipe = write_recipe(tmp_path, recipe_of(["rank3", "int4", "none"]))
    packed = compress(fp32_source, recipe, tmp_path / "packed", "--group-size", 32)
    model = load(packed).train()
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    stock = load(packed, experts_implementation="eager").train()
    down = gradients(stock)["model.layers.0.mlp.experts.down_proj"]  # [E, out, in]
    for way in ("auto", "apart", "whole"):
        model.model.layers[0].mlp.experts.way = way
        found = gradients(model)
        name = "model.layers.0.mlp.experts.down_proj"
        # fp32 sums over 16 tokens and 12 experts, in another order
        assert torch.allclose(found[f"{name}.base"], down.sum(0), rtol=1e-4, atol=1e-7), way
        right = model.get_parameter(f"{name}.delta.0.right")
        own = [expert for expert in range(EXPERTS) if expert % 3 == 0]
        for place, expert in enumerate(own):
            expected = down[expert] @ right[place].T
            assert torch.allclose(found[f"{name}.delta.0.left"][place], expected, rtol=1e-4, atol=1e-7), way
        assert not any(".codes" in key or ".scale" in key for key in found)

    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.up_proj.base").add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    done("verify", tmp_path / "trained", "-q")
    monkeypatch.delenv("DERS_DEQUANTIZE")
    assert torch.equal(logits(load(tmp_path / "trained")), logits(model))


def test_an_exact_member_holds_the_base_still(packed: Path, tmp_path: Path) -> None:
    from ders_cli.errors import CheckpointError
    from ders_cli.hf import freeze_base

    model = load(packed)
    base = model.get_parameter("model.layers.0.mlp.experts.up_proj.base")
    assert not base.requires_grad
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    with torch.no_grad():
        copied.get_parameter("model.layers.0.mlp.experts.up_proj.base").add_(1)
    with pytest.raises(CheckpointError, match="up_proj, expert 0"):  # its families read its own base
        logits(copied)
    logits(model)
    with torch.no_grad():
        base.data = base.data.float() + 1e-9
    with pytest.raises(CheckpointError, match="up_proj.base: was changed, but exact deltas"):
        model.save_pretrained(tmp_path / "again")
    freeze_base(model)


def test_kept_weights_go_with_the_model(packed: Path) -> None:
    from ders_cli.runtime.projection import WEIGHTS

    gc.collect()
    before = WEIGHTS.held
    model = load(packed)
    model.model.layers[0].mlp.experts.way = "whole"
    logits(model)
    assert WEIGHTS.held > before
    model.train()
    assert WEIGHTS.held == before
    logits(model)
    del model
    gc.collect()
    assert WEIGHTS.held == before
