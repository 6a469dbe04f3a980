"""A budget is never passed, to the byte, whatever the model; and what was predicted is what is written."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy
import yaml
from command import contents, ders, done
from safetensors.torch import load_file, save_file

from ders_cli import convert
from ders_cli.activations import Activations
from ders_cli.base import make_base
from ders_cli.budget import measure as measuring
from ders_cli.budget.choice import Choice
from ders_cli.budget.folder import within_folder
from ders_cli.budget.limits import Limit, most_error, parse_budget
from ders_cli.budget.measure import Cell, measure
from ders_cli.budget.spend import CANDIDATES, spend, usable
from ders_cli.budget.spent import Spent
from ders_cli.checkpoint.manifest import read_manifest
from ders_cli.errors import UsageError
from ders_cli.output import Options, output_bytes
from ders_cli.recipe import load_recipe, make_recipe
from ders_cli.source import open_source

FEW = ("exact", "int8", "int4", "int1", "ternary0.05", "drop0.9+int1")
MODELS: dict[str, Callable[[Path], object]] = {
    "bf16": lambda folder: toy.make("qwen3_moe", folder, dtype=torch.bfloat16),
    "f32, stacked": lambda folder: toy.make("qwen3_moe", folder, fused=True),
    "f16": lambda folder: toy.make("mixtral", folder, dtype=torch.float16),
    "two projections": lambda folder: toy.moe_llava(folder, "phi"),
    "a shared expert": lambda folder: toy.make("qwen2_moe", folder, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in MODELS.items():
        made[name] = tmp_path_factory.mktemp("budget") / "model"
        make(made[name])
    return made


def _spend(folder: Path, limit: Limit, recipe: dict | None = None, **options) -> Spent:
    made = make_recipe({"delta": "int4", "shared": "shared" in folder.name} | (recipe or {}))
    with open_source(folder, made.shared) as source:
        base = make_base(made.base) if not (folder / "ders.json").exists() else None
        return spend(source, base, made, limit, **({"candidates": FEW} | options))


def _written(folder: Path, spent: Spent, out: Path) -> tuple[int, dict]:
    """Bytes of the whole output, and ders.json."""
    with open_source(folder, spent.recipe.shared) as source:
        convert.run(convert.prepare(source, spent.recipe, out, Options()))
    return output_bytes(out, Options()), read_manifest(out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [0.9, 3.0, 9.0])
def test_bits_are_not_passed(folders: dict[str, Path], tmp_path: Path, name: str, bits: float) -> None:
    shared = {"shared": True} if name == "a shared expert" else {}
    spent = _spend(folders[name], Limit("bits", bits), shared)
    size, manifest = _written(folders[name], spent, tmp_path / "out")
    assert manifest["bytes"]["bits_per_delta_weight"] <= bits
    assert manifest["bytes"]["delta"] == spent.predicted["delta_bytes"] and size == spent.predicted["folder_bytes"]
    assert spent.predicted["bits_per_delta_weight"] > 0.75 * min(bits, spent.curve[-1]["bits_per_delta_weight"])
    assert {label for entry in spent.plan for label in entry["experts"]} >= ({"shared"} if shared else {"0"})
    assert bits == 9 or len({term for entry in spent.plan for term in entry["experts"].values()}) > 1  # a mix


@pytest.mark.parametrize("shard", [5_000_000_000, 30_000])
def test_a_folder_is_not_passed(folders: dict[str, Path], tmp_path: Path, shard: int) -> None:
    """From the smallest plan on, a byte less than which is refused with its size, to one that nothing improves."""
    folder, options = folders["bf16"], Options(max_shard_bytes=shard)

    def bought(most: int) -> Spent:
        with open_source(folder) as source:
            base = make_base("mean")

            def prepare(recipe):
                return convert.prepare(source, recipe, tmp_path / f"out{most}", options, base)

            limit = Limit("folder", most)
            spent = spend(source, base, make_recipe({"delta": "int4"}), limit, FEW, prepare=prepare)
            convert.run(prepare(spent.recipe))
        size = output_bytes(tmp_path / f"out{most}", options)
        assert size == spent.predicted["folder_bytes"] <= most
        return spent

    with pytest.raises(UsageError, match="the plan of the smallest deltas takes") as refused:
        bought(1000)
    least = int(re.search(r"([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    with pytest.raises(UsageError, match="the plan of the smallest deltas takes"):
        bought(least - 1)
    errors = [bought(most).predicted["output_error"] for most in (least, least + 20000, least + 40000, 10**9)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[1] > errors[2] > errors[3] == 0


def test_less_is_spent_until_the_folder_fits() -> None:
    """What stands beside the deltas goes up and down with the plan, by up to 150 bytes here."""

    def solve(capacity: int) -> Choice:
        return Choice((), capacity - capacity % 7, 1.0, 1.0, False, 0.0)

    def folder(choice: Choice) -> int:
        return choice.bytes + 1000 + choice.bytes * 37 % 151

    for most in range(folder(solve(70)), 4000):
        assert most - 400 < folder(within_folder(most, 70, solve, folder)) <= most
    with pytest.raises(UsageError, match=f"takes {folder(solve(70)):,} bytes"):
        within_folder(folder(solve(70)) - 1, 70, solve, folder)


def test_most_error(folders: dict[str, Path]) -> None:
    """The smallest plan that keeps the error; a hair less takes more bytes, and a limit of 0 is exact."""
    last = None
    for most in (0.5, 0.01, 0.002, 0.0):
        spent = _spend(folders["bf16"], most_error(most))
        assert spent.predicted["output_error"] <= most and spent.choice.exact
        assert last is None or spent.predicted["delta_bytes"] >= last
        last = spent.predicted["delta_bytes"]
    assert {term for entry in spent.plan for term in entry["experts"].values()} == {"exact"}
    with pytest.raises(UsageError, match="add exact"):
        _spend(folders["bf16"], most_error(1e-9), candidates=("int4", "int1"))


def test_a_mix_is_never_worse_than_one_codec(folders: dict[str, Path]) -> None:
    """At each candidate's own size the best plan has at most its error; the curve falls."""
    spent = _spend(folders["bf16"], Limit("bits", 3.0))
    for term, point in spent.uniform.items():
        mix = _spend(folders["bf16"], Limit("bits", point["bits_per_delta_weight"] * (1 + 1e-9)))
        assert mix.predicted["output_error"] <= point["output_error"] * (1 + 1e-9), term
    errors, sizes = ([p[name] for p in spent.curve] for name in ("output_error", "delta_bytes"))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes) and len(errors) > 8


def test_the_same_with_any_number_of_threads(folders: dict[str, Path]) -> None:
    documents = [json.dumps(_spend(folders["bf16"], Limit("bits", 1.7), jobs=jobs).document()) for jobs in (1, 2, 5)]
    assert documents[0] == documents[1] == documents[2]
    assert "NaN" not in documents[0] and "Infinity" not in documents[0]


def test_the_sums_are_those_of_the_predictions(folders: dict[str, Path]) -> None:
    """The predicted error by its definition: root mean square over layers and experts, projections' energies added."""
    from ders_cli.analysis.blocks import layers_of, observe_layer
    from ders_cli.analysis.prediction import LayerPrediction
    from ders_cli.compare import random_states

    spent, squares, size = _spend(folders["bf16"], Limit("bits", 2.0)), {}, 0
    terms = {(e["group"], label): term for e in spent.plan for label, term in e["experts"].items()}
    with open_source(folders["bf16"]) as source:
        base = make_base("mean")
        for name, groups in layers_of(source).items():
            states = random_states(0, groups["up"].layer, measuring.TOKENS, groups["up"].shape[1])
            seen = LayerPrediction(
                groups, source.activation, states, usable(FEW, 128), 0, measuring.ROWS, exact_bytes=True
            )
            observe_layer(source, base, groups, [seen], lambda count: None)
            for projection, by_label in seen.found().items():
                for label, by_term in by_label.items():
                    chosen = by_term[terms[groups[projection].name, label]]
                    squares[name, label] = squares.get((name, label), 0) + chosen.output_error**2
                    size += chosen.bytes
    assert size == spent.predicted["delta_bytes"]
    assert spent.predicted["output_error"] == pytest.approx(math.sqrt(sum(squares.values()) / len(squares)))


def test_a_recipe_file_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    spent = _spend(folders["bf16"], Limit("bits", 1.5))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(spent.recipe.model_dump(mode="json")))
    assert load_recipe(str(tmp_path / "plan.yaml"), {}) == spent.recipe
    _written(folders["bf16"], spent, tmp_path / "a")
    done("compress", folders["bf16"], "--recipe", tmp_path / "plan.yaml", "-o", tmp_path / "b", "-q")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    done("verify", tmp_path / "b", "--against", folders["bf16"])


def _changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_experts_that_are_the_base_cost_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """Layer 0's experts are all alike, so their mean is each of them; but for one bit of one up projection."""

    def alike(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers.0.mlp.experts." in name:
                tensors[name] = tensors[re.sub(r"experts\.\d+", "experts.0", name)].clone()
        tensors["model.layers.0.mlp.experts.3.up_proj.weight"].view(torch.int16)[-1, -1] ^= 1

    folder = _changed(folders["bf16"], tmp_path / "model", alike)
    spent = _spend(folder, Limit("bits", 4.0))
    terms = {entry["group"]: set(entry["experts"].values()) for entry in spent.plan}
    assert terms["model.layers.0.mlp.experts.gate_proj"] == terms["model.layers.0.mlp.experts.down_proj"] == {"none"}
    assert "none" not in terms["model.layers.1.mlp.experts.gate_proj"]
    ups = next(e["experts"] for e in spent.plan if e["group"] == "model.layers.0.mlp.experts.up_proj")
    assert ups["3"] != "none"
    size, manifest = _written(folder, spent, tmp_path / "out")
    assert size == spent.predicted["folder_bytes"] and manifest["bytes"]["bits_per_delta_weight"] <= 4


def test_weights_that_are_not_finite_are_kept_exactly(folders: dict[str, Path], tmp_path: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][4, 5] = math.nan

    folder = _changed(folders["bf16"], tmp_path / "model", broken)
    with pytest.raises(UsageError, match=r"model.layers.1.mlp.experts.*only exact keeps"):
        _spend(folder, Limit("bits", 4.0), {"base": "expert:0"}, candidates=("int4", "int1"))
    spent = _spend(folder, Limit("bits", 6.0), {"base": "expert:0"})
    ups = next(e["experts"] for e in spent.plan if e["group"] == "model.layers.1.mlp.experts.up_proj")
    assert ups["2"] == "exact"
    size, manifest = _written(folder, spent, tmp_path / "out")
    assert size == spent.predicted["folder_bytes"] and manifest["bytes"]["bits_per_delta_weight"] <= 6


@pytest.mark.parametrize("base", ["mean", "expert:0"])
@pytest.mark.parametrize("row", [0, toy.HIDDEN - 1])  # one of the two is not among the sampled rows
def test_one_nan_leaves_its_group_to_exact(
    folders: dict[str, Path], tmp_path: Path, base: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In expert 0, and so in the base: no delta of these matrices is finite, not even where an expert is the base."""

    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.0.down_proj.weight"][row, 5] = math.nan

    monkeypatch.setattr(measuring, "ROWS", 4)
    folder = _changed(folders["bf16"], tmp_path / "model", broken)
    with pytest.raises(UsageError, match=r"layers.1.mlp.experts.*add exact"):
        _spend(folder, Limit("bits", 6.0), {"base": base}, candidates=("int4", "int1"))
    for limit in (Limit("bits", 6.0), most_error(0.05)):
        spent = _spend(folder, limit, {"base": base})
        terms = {entry["group"]: entry["experts"] for entry in spent.plan}
        assert set(terms["model.layers.1.mlp.experts.down_proj"].values()) == {"exact"}
        assert set(spent.uniform) == {"exact"}
    assert terms["model.layers.1.mlp.experts.up_proj"]["1"] != "exact"
    size, _ = _written(folder, spent, tmp_path / "out")
    done("restore", tmp_path / "out", "-o", tmp_path / "back", "-q")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "back"))
    downs = [name for name in before if "layers.1.mlp.experts" in name and "down" in name]
    assert size == spent.predicted["folder_bytes"] and len(downs) == len(terms["model.layers.1.mlp.experts.down_proj"])
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in downs)


def test_a_ders_checkpoint_as_source(folders: dict[str, Path], tmp_path: Path) -> None:
    done("decompose", folders["bf16"], "-o", tmp_path / "exact", "-q")
    ways = [_spend(folder, Limit("bits", 2.0)) for folder in (folders["bf16"], tmp_path / "exact")]
    plans = [{entry["group"]: entry["experts"] for entry in way.plan} for way in ways]
    assert plans[0] == plans[1] and ways[0].predicted["output_error"] == ways[1].predicted["output_error"]
    size, manifest = _written(tmp_path / "exact", ways[1], tmp_path / "out")
    assert size == ways[1].predicted["folder_bytes"] and manifest["bytes"]["bits_per_delta_weight"] <= 2


def test_importance_moves_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    """With activations that route nearly all tokens to expert 1 it gets more bytes than any other, and costs are phi w^1.5."""
    hidden = toy.HIDDEN
    path, tensors = tmp_path / "activations.safetensors", {}
    random = torch.Generator().manual_seed(0)
    for layer in range(3):
        chosen = torch.where(torch.arange(60)[:, None] % 10 == 0, torch.tensor([[0, 2]]), torch.tensor([[1, 3]])).int()
        tensors |= {
            f"model.layers.{layer}.mlp.experts.states": torch.randn(60, hidden, generator=random),
            f"model.layers.{layer}.mlp.experts.chosen": chosen.contiguous(),
            f"model.layers.{layer}.mlp.experts.gates": torch.tensor([[0.9, 0.1]]).repeat(60, 1),
        }
    save_file(tensors, path)
    with Activations(path) as activations:
        spent = _spend(folders["bf16"], Limit("bits", 2.0), activations=activations)
        with open_source(folders["bf16"]) as source:
            args = (source, make_base("mean"), usable(FEW, 128), 0)
            weighted = measure(*args, activations, 1, True)
    sizes = dict.fromkeys("01234", 0)
    for cell, k in zip(weighted, spent.choice.options, strict=True):
        sizes[cell.label] += list(cell.options.values())[k][0]
    assert max(sizes, key=sizes.get) == "1" and sizes["1"] > 2 * sizes["4"]
    assert measuring._weights(_Routed(), "x", "01") == pytest.approx({"0": 2 * 8 / (8 + 1), "1": 2 / (8 + 1)})
    assert measuring._weights(_Routed(), "x", "02")["2"] == measuring.LEAST_WEIGHT  # never chosen, yet an expert


class _Routed:
    """Shares of tokens .5, .5 and 0; of gates .8, .2 and 0: phi w^1.5 in ratio 8 : 1."""

    def importance(self, prefix: str, label: str) -> tuple[float, float]:
        return [(0.5, 0.8), (0.5, 0.2), (0.0, 0.0)][int(label)]


def test_what_pulls_all_layers_one_way_is_no_option() -> None:
    from ders_cli.analysis.prediction import Predicted

    def found(kept: float, error: float) -> dict:
        one = Predicted(10, 0.1, error, kept, 0.1, 0.1)
        return {label: {"int4": one, "exact": Predicted(99, 0.0, 0.0, 1.0, 0.0, 0.0)} for label in "01"}

    shape = (1000, 1000)  # 128 rows are sampled, of 2 experts: an error of 10 leaves a standard error of 0.02
    assert measuring._pulling(found(0.90, 0.1), shape) == {"int4"}
    assert measuring._pulling(found(1.15, 0.1), shape) == {"int4"}
    assert (
        measuring._pulling(found(0.90, 10.0), shape) == measuring._pulling(found(1.15, 10.0), shape) == set()
    )  # chance
    assert measuring._pulling(found(0.96, 0.1), shape) == measuring._pulling(found(math.nan, math.nan), shape) == set()


def test_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    for limit in (parse_budget("1.3bpw"), parse_budget("2.2bpw")):
        spent = _spend(folders["bf16"], limit, candidates=("rank",))
        size, manifest = _written(folders["bf16"], spent, tmp_path / str(limit.amount))
        assert manifest["bytes"]["bits_per_delta_weight"] <= limit.amount
        assert size == spent.predicted["folder_bytes"] and manifest["bytes"]["delta"] == spent.predicted["delta_bytes"]
        errors = [m["error"]["delta"] for g in manifest["groups"] for m in g["members"]]
        assert 0.8 < spent.predicted["delta_error"] / math.sqrt(sum(e**2 for e in errors) / len(errors)) < 1.25
    assert spent.uniform["rank1"]["delta_error"] > spent.uniform["rank2"]["delta_error"]
    most = Limit("folder", spent.predicted["folder_bytes"] - 500)
    assert _spend(folders["bf16"], most, candidates=("rank",)).predicted["folder_bytes"] <= most.amount
    with pytest.raises(UsageError, match="--max-loss"):
        _spend(folders["bf16"], most_error(0.1), candidates=("rank",))


def test_what_is_refused(folders: dict[str, Path]) -> None:
    for candidate in ("top0.1", "rank4", "2:4", "none", "int1+rank2"):
        with pytest.raises(UsageError, match="changes the size of deltas"):
            _spend(folders["bf16"], Limit("bits", 1.0), candidates=("int4", candidate))
    with pytest.raises(UsageError, match="the smallest plan takes .*bpw") as refused:
        _spend(folders["bf16"], Limit("bits", 0.01))
    least = float(re.search(r"takes ([\d.]+)bpw", str(refused.value))[1])
    assert _spend(folders["bf16"], Limit("bits", least)).predicted["bits_per_delta_weight"] <= least
    with pytest.raises(UsageError, match="leave the recipe's rules out"):
        _spend(folders["bf16"], Limit("bits", 1.0), {"rules": [{"layers": 0, "delta": "int8"}]})


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_near_the_largest(folders: dict[str, Path], tmp_path: Path) -> None:
    """numpy says nothing of products that pass fp32's range."""
    tensors = load_file(folders["f32, stacked"] / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    tensors[name][1, 3, 5] = 3e38
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["f32, stacked"] / "config.json").read_bytes())
    assert _spend(tmp_path, Limit("bits", 12.0)).predicted["bits_per_delta_weight"] <= 12


@pytest.mark.parametrize("text", ["", "bpw", "1.5", "-1bpw", "0GB", "x", "1.5 bits"])
def test_budgets_that_are_none(text: str) -> None:
    if text == "1.5":  # bytes
        assert parse_budget(text) == Limit("folder", 1)
        return
    with pytest.raises(UsageError, match="--budget"):
        parse_budget(text)


def test_budgets() -> None:
    assert parse_budget("1.5bpw") == parse_budget(" 1.5 BPW") == Limit("bits", 1.5)
    assert parse_budget("12GB") == Limit("folder", 12 * 10**9) and str(parse_budget("12GB")) == "12.00 GB"
    for amount in (math.nan, -1.0, math.inf):
        with pytest.raises(UsageError, match="--max-loss"):
            most_error(amount)


def test_cells_that_no_rule_tells_apart_are_one() -> None:
    a = Cell(0, "up", "1", 100, {"int4": (10, 1.0), "exact": (30, 0.0)}, 20, False)
    b = dataclasses.replace(a, found={"exact": (31, 0.0)}, stream=21, same=True)
    (both,) = measuring._joined([a, b])
    assert both == Cell(0, "up", "1", 200, {"exact": (61, 0.0)}, 41, False)
    assert measuring._joined([b])[0].options == {"none": (0, 0.0)}


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--budget", "1.5bpw", "--json", "-q")
    plan = done("compress", folders["bf16"], *flags, "-o", tmp_path / "out", "--dry-run").json["budget"]
    ran = done("compress", folders["bf16"], *flags, "-o", tmp_path / "out").json
    assert ran["budget"] == plan and ran["bytes"]["bits_per_delta_weight"] <= 1.5
    assert ran["output_bytes"] == plan["predicted"]["folder_bytes"]
    assert ders("compress", folders["bf16"], "--budget", "1kB", "-o", tmp_path / "no").code == 2
    assert set(plan["uniform"]) <= set(CANDIDATES)


@pytest.mark.parametrize(("flags", "measure"), [((), "output error"), (("--delta", "rank"), "delta error")])
def test_what_a_person_sees(folders: dict[str, Path], tmp_path: Path, flags: tuple[str, ...], measure: str) -> None:
    """--dry-run prints the curve, by size, with the chosen plan in it, then every candidate alone."""
    ran = done("compress", folders["bf16"], "--budget", "2bpw", *flags, "-o", tmp_path / "out", "--dry-run")
    lines = [line for line in ran.out.splitlines() if " │ " in line]
    bits = [float(line.split("│")[2]) for line in lines]
    chosen = next(number for number, line in enumerate(lines) if "chosen" in line)
    curve = next(number for number, line in enumerate(lines) if line.split("│")[1].strip() not in ("", "chosen"))
    assert measure in ran.out and bits[chosen] <= 2
    assert bits[:curve] == sorted(bits[:curve]) and 0 < chosen < curve < len(lines)
