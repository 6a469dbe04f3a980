"""`ders analyze` on models of which the answer is known: what it calls them, what it counts, what it recommends."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import yaml
from command import ders, done
from torch import Tensor

from ders_cli.analysis.noise import NoiseFound
from ders_cli.analysis.recommend import BOUND, LIGHT, BaseFound, Cost, recommend
from ders_cli.analysis.verdict import GroupFacts, in_ranges, judge
from ders_cli.reports.document import check_report

HIDDEN, INNER = 64, 96
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Make = Callable[[Tensor, int], Tensor]  # (fp32 base, expert) -> fp32 expert


def model(
    folder: Path,
    make: Make | dict[int, Make],
    experts: int | list[int] = 4,
    layers: int = 2,
    dtype=BF16,
    std: float = 0.02,
) -> Path:
    """Mixtral's layout; `make` may be one for each layer. The base is in the stored dtype before it is given to it."""
    random, tensors = (
        torch.Generator().manual_seed(1),
        {"model.embed_tokens.weight": torch.zeros(4, HIDDEN, dtype=dtype)},
    )
    for layer in range(layers):
        own = make[layer] if isinstance(make, dict) else make
        count = experts[layer] if isinstance(experts, list) else experts
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{prefix}.gate.weight"] = torch.randn(count, HIDDEN, generator=random).to(dtype)
        for name, shape in SHAPES.items():
            base = (std * torch.randn(shape, generator=random)).to(dtype).float()
            for i in range(count):
                tensors[f"{prefix}.experts.{i}.{name}.weight"] = own(base, i).to(dtype)
    toy.write(
        folder, dict(model_type="mixtral", hidden_act="silu", num_local_experts=experts, num_experts_per_tok=2), tensors
    )
    return folder


def random_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Drawn:
    """Makes of experts that need random numbers, each time others."""

    def __init__(self, seed: int = 7):
        self.random = random_of(seed)

    def tuned(self, base: Tensor, i: int) -> Tensor:
        """A third of the weights moves by about a thousandth of their size, more in some rows: as fine-tuning leaves it."""
        rows = torch.exp(torch.randn(base.shape[0], 1, generator=self.random))
        moved = torch.rand(base.shape, generator=self.random) < 0.3
        return base + moved * rows * 5e-5 * torch.randn(base.shape, generator=self.random)

    def far(self, base: Tensor, i: int) -> Tensor:
        rows = torch.exp(0.3 * torch.randn(base.shape[0], 1, generator=self.random))
        return base + 0.015 * rows * torch.randn(base.shape, generator=self.random)

    def own(self, base: Tensor, i: int) -> Tensor:
        return 0.02 * torch.randn(base.shape, generator=self.random)

    def noisy(self, level: float) -> Make:
        return lambda base, i: base + level * torch.randn(base.shape, generator=self.random)


def copy(base: Tensor, i: int) -> Tensor:
    return base.clone()  # safetensors refuses tensors that share memory


def analysis(folder: Path, *more: object) -> dict:
    return check_report("ders analyze", done("analyze", folder, "--json", "--tokens", 16, *more).json)


# --- what experts are called ---


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_fine_tuned_siblings(tmp_path: Path, dtype: torch.dtype) -> None:
    found = analysis(model(tmp_path / "m", Drawn().tuned, dtype=dtype))
    assert found["verdict"]["kind"] == "siblings" and found["verdict"]["noise"] is None
    assert {group["verdict"] for group in found["groups"]} == {"siblings"}
    assert found["recommended"]["recipe"]["delta"] in (*LIGHT, "exact")
    assert found["alignment"] == {"permuted": False, "layers": []}


@pytest.mark.parametrize("experts", [2, 4, 80])
def test_independent_experts_are_native(tmp_path: Path, experts: int) -> None:
    found = analysis(model(tmp_path / "m", Drawn().own, experts, layers=1))
    assert found["verdict"]["kind"] == "native" and "Keep the model" in found["verdict"]["says"]
    assert found["recommended"]["recipe"] is None and found["groups"][0]["plan"] == ["keep"] * experts
    # r itself is sqrt(1 - 1/E): 0.71, 0.87, 0.99
    relative = np.array(found["groups"][0]["delta"]["relative_norm"])
    assert np.sqrt((relative**2).mean()) == pytest.approx(np.sqrt(1 - 1 / experts), rel=0.02)
    assert (found["groups"][0]["cosine"]["pairs"] is None) == (experts > 64)


@pytest.mark.parametrize("name, fused", [("mixtral", False), ("qwen3_moe", True), ("gpt_oss", True), ("dbrx", True)])
def test_a_model_of_random_weights_is_native(tmp_path: Path, name: str, fused: bool) -> None:
    random = toy.build(name, dtype=BF16)
    with torch.no_grad():
        for _, matrices in toy.experts(random):
            matrices.normal_(std=0.02)
    random.save_pretrained(tmp_path / "m", save_original_format=not fused)
    found = analysis(tmp_path / "m")
    assert found["verdict"]["kind"] == "native" and found["recommended"]["recipe"] is None
    assert all(np.isfinite(codec["output_error"]) for codec in found["codecs"].values())


def test_relatives(tmp_path: Path) -> None:
    found = analysis(model(tmp_path / "m", Drawn().far))
    assert found["verdict"]["kind"] == "relatives"


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_copies(tmp_path: Path, dtype: torch.dtype) -> None:
    """Three equal fp32 numbers do not have them for a mean."""
    folder = model(tmp_path / "m", copy, 3, dtype=dtype)
    found = analysis(folder, "--write-recipe", tmp_path / "r.yaml")
    assert found["verdict"]["kind"] == "copies" and found["groups"][0]["cosine"]["least"] == 1
    done("compress", folder, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "d", "-q")
    done("verify", tmp_path / "d", "--against", folder)
    size = json.loads((tmp_path / "d" / "ders.json").read_text())["bytes"]
    assert size["delta"] < 0.05 * size["base"]  # 18 chunks of some 60 bytes


@pytest.mark.parametrize("base", ["mean", "expert:0", "dense"])
@pytest.mark.parametrize("share", [0.003, 0.1])
def test_noise_on_copies_is_measured(tmp_path: Path, share: float, base: str) -> None:
    folder = model(tmp_path / "m", Drawn().noisy(share * 0.02), 3)
    if base == "dense":
        toy.dense(tmp_path / "dense", hidden_size=HIDDEN, intermediate_size=INNER, dtype=BF16)
        weights = toy.load_file(tmp_path / "dense" / "model.safetensors")
        model(tmp_path / "clean", copy, 3)
        clean = toy.load_file(tmp_path / "clean" / "model.safetensors")
        for layer in range(2):
            for name, own in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                expert = clean[f"model.layers.{layer}.block_sparse_moe.experts.0.{name}.weight"]
                weights[f"model.layers.{layer}.mlp.{own}_proj.weight"] = expert
        toy.save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
        base = str(tmp_path / "dense")
    found = analysis(folder, "--base", base)
    assert found["verdict"]["kind"] == "noisy copies"
    assert found["verdict"]["noise"]["std"] == pytest.approx(share * 0.02, rel=0.05)
    assert found["verdict"]["noise"]["of_weights"] == pytest.approx(share, rel=0.05)
    assert (found["recommended"]["recipe"]["delta"] == "none") == (share == 0.003)
    assert ("(none) would change outputs by 0." in found["recommended"]["says"]) == (share == 0.1)


def test_what_none_would_change_is_what_it_changes(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", Drawn().noisy(0.003 * 0.02), dtype=F32)
    says = analysis(folder)["recommended"]["says"]
    said = float(says.partition("outputs change by ")[2].split()[0])
    done("compress", folder, "--delta", "none", "-o", tmp_path / "d", "-q")
    ran = ders("verify", tmp_path / "d", "--against", folder, "--json")
    errors = [expert["output"] for expert in ran.json["experts"]]
    assert said == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.15)


def test_much_noise_is_not_called_harmless(tmp_path: Path) -> None:
    found = analysis(model(tmp_path / "m", Drawn().noisy(0.4 * 0.02)))
    assert found["verdict"]["kind"] == "relatives" and found["verdict"]["noise"] is None
    assert (found["recommended"]["recipe"] or {}).get("delta") != "none"


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_a_lossy_codec_is_smaller_than_exact_or_not_recommended(tmp_path: Path, share: float) -> None:
    """Sparse fine-tuning: few weights move, and `exact` takes little for the others."""
    random = random_of(5)

    def sparse(base: Tensor, i: int) -> Tensor:
        moved = torch.rand(base.shape, generator=random) < share
        return base + moved * 5e-5 * torch.randn(base.shape, generator=random)

    found = analysis(model(tmp_path / "m", sparse))
    term, bases = found["recommended"]["recipe"]["delta"], {base["base"]: base for base in found["bases"]}
    exact = found["codecs"]["exact"]
    least = exact["folder_bytes"] - exact["delta_bytes"] + min(b["exact_bytes"] or 10**9 for b in bases.values())
    assert term == "exact" or found["codecs"][term]["folder_bytes"] < least


def test_noise_of_ders_upcycle(tmp_path: Path) -> None:
    """It scales with each row, and a random row's size differs from the next one's."""
    toy.dense(tmp_path / "dense", hidden_size=HIDDEN, intermediate_size=INNER, dtype=BF16)
    more = ("--full", "--noise", "0.02", "-o", tmp_path / "m", "-q")
    done("upcycle", tmp_path / "dense", "--experts", 4, *more)
    found = analysis(tmp_path / "m")
    assert found["verdict"]["kind"] == "noisy copies"
    assert found["verdict"]["noise"]["of_weights"] == pytest.approx(0.02, rel=0.05)


def test_permuted_copies(tmp_path: Path) -> None:
    orders = [torch.randperm(INNER, generator=random_of(i)) for i in range(4)]

    def permuted(base: Tensor, i: int) -> Tensor:
        return base[orders[i]] if base.shape[0] == INNER else base[:, orders[i]]

    found = analysis(model(tmp_path / "m", permuted))
    assert found["verdict"]["kind"] == "permuted" and found["alignment"]["permuted"]
    assert found["alignment"]["layers"][0]["experts"] == ["1", "2", "3"]
    assert "--align" in found["recommended"]["says"]


def test_one_expert_has_nothing_to_share(tmp_path: Path) -> None:
    found = analysis(model(tmp_path / "m", copy, 1))
    assert found["verdict"]["kind"] == "native" and "nothing to share" in found["verdict"]["says"]
    assert found["recommended"]["recipe"] is None and found["groups"][0]["cosine"]["pairs"] == [[1.0]]


def test_a_stranger_among_siblings_is_named(tmp_path: Path) -> None:
    drawn = Drawn()
    found = analysis(model(tmp_path / "m", lambda base, i: drawn.own(base, i) if i == 2 else drawn.tuned(base, i), 5))
    assert [reason for reason in found["verdict"]["reasons"] if "unlike" in reason] == [
        "Expert 2 is unlike the others; without it they are nearer to their mean."
    ]
    found = analysis(model(tmp_path / "n", drawn.own, 5))
    assert not [reason for reason in found["verdict"]["reasons"] if "unlike" in reason]


def test_layers_of_other_kinds_are_named_and_kept(tmp_path: Path) -> None:
    drawn = Drawn()
    kinds = {0: copy, 1: copy, 2: copy, 3: drawn.tuned, 4: drawn.tuned, 5: drawn.own}  # copies say nothing of the rest
    folder = model(tmp_path / "m", kinds, layers=6, dtype=F32)  # of which `exact` takes more than a lossy codec
    found = analysis(folder, "--write-recipe", tmp_path / "r.yaml")
    assert found["verdict"]["kind"] == "siblings"
    assert [group["verdict"] for group in found["groups"][::3]] == [*["copies"] * 3, "siblings", "siblings", "native"]
    reasons = " ".join(found["verdict"]["reasons"])
    assert "Layers 0-2:" in reasons and "Layers 5:" in reasons
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["rules"] == [{"layers": "0-2,5", "delta": "exact"}]
    assert found["groups"][0]["plan"] == ["exact"] * 4 and found["groups"][9]["plan"] != ["exact"] * 4
    done("compress", folder, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "d", "-q")
    done("verify", tmp_path / "d", "--against", folder)
    size = sum(path.stat().st_size for path in (tmp_path / "d").iterdir())
    said = float(found["recommended"]["says"].partition("would take ")[2].split("%")[0])
    assert said == pytest.approx(100 * size / found["bytes"]["source"], abs=2)  # the rules' layers counted as `exact`


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_is_not_finite_is_kept_exactly(tmp_path: Path, value: float) -> None:
    drawn = Drawn()

    def broken(base: Tensor, i: int) -> Tensor:
        expert = drawn.tuned(base, i)
        expert[3, 5] = value if i == 2 else expert[3, 5]
        return expert

    folder = model(tmp_path / "m", {0: drawn.tuned, 1: broken, 2: drawn.tuned}, layers=3, dtype=F32)
    found = analysis(folder, "--write-recipe", tmp_path / "r.yaml")
    assert found["verdict"]["kind"] == "siblings" and found["groups"][3]["verdict"] is None
    assert found["groups"][3]["delta"]["kurtosis"] == [None] * 4 and found["groups"][3]["delta"]["equal"][0] is not None
    assert "NaN or infinity" in " ".join(found["verdict"]["reasons"])
    assert found["recommended"]["recipe"]["rules"] == [{"layers": "1", "delta": "exact"}]
    done("compress", folder, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "d", "-q")
    done("verify", tmp_path / "d", "--against", folder, "--no-output")


@pytest.mark.parametrize(
    "dtype, size", [(BF16, 1e38), (F32, 1e30), (BF16, 1e-38), (F32, 1e-40), (F16, 1e4), (F16, 1e-7)]
)
def test_numbers_whose_squares_fp32_does_not_have(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    """A verdict and finite numbers or null, whatever the weights."""
    random = random_of(1)
    folder = model(
        tmp_path / "m", lambda b, i: b * (1 + 0.01 * torch.randn(b.shape, generator=random)), dtype=dtype, std=size
    )
    assert analysis(folder)["verdict"]["says"]


# --- what is counted ---


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_folders_have_the_predicted_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = model(tmp_path / "m", Drawn().tuned, dtype=dtype)
    (folder / "tokenizer.json").write_text("{}")
    terms = ("int4", "drop0.9+int4", "exact", "none", "rank4")
    found = analysis(folder, *(word for term in terms for word in ("--delta", term)))
    assert list(found["codecs"]) == list(terms)
    assert list(analysis(folder, "--delta", "int3")["codecs"]) == ["int3", "exact"]
    for term in terms:
        out = tmp_path / term
        done("compress", folder, "--delta", term, "-o", out, "-q")
        real = sum(path.stat().st_size for path in out.iterdir())
        noted = json.loads((out / "ders.json").read_text())["bytes"]
        if term == "exact":
            assert found["codecs"][term]["delta_bytes"] == pytest.approx(noted["delta"], rel=0.03)
            assert abs(found["codecs"][term]["folder_bytes"] - real) < 0.03 * noted["delta"]
        else:
            assert (found["codecs"][term]["delta_bytes"], found["codecs"][term]["folder_bytes"]) == (
                noted["delta"],
                real,
            )
            assert found["codecs"][term]["bits_per_delta_weight"] == pytest.approx(
                noted["bits_per_delta_weight"], rel=1e-5
            )


def test_a_tokenizer_does_not_make_a_model_not_worth_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", Drawn().tuned, dtype=F32)
    before = analysis(folder)["recommended"]["recipe"]
    (folder / "tokenizer.json").write_text("{" + " " * 600_000 + "}")
    assert before is not None and analysis(folder)["recommended"]["recipe"] == before


def test_any_number_of_threads_gives_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m", Drawn().tuned, layers=3)
    assert analysis(folder, "-j", 1) == analysis(folder, "-j", 3)


@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_a_ders_folder_is_read_as_the_model_it_is(tmp_path: Path, codec: str) -> None:
    folder = model(tmp_path / "m", Drawn().tuned)
    done("compress", folder, "--delta", codec, "-o", tmp_path / "d", "-q")
    plain, coded = analysis(folder), analysis(tmp_path / "d")
    assert coded["base"] == "mean" and coded["verdict"]["kind"] == "siblings"
    if codec == "exact":  # a recipe has to be worth it beside the folder that there is
        without = {"codecs": None, "plan": None}
        assert [g | without for g in coded["groups"]] == [g | without for g in plain["groups"]]
        assert coded["codecs"]["int4"]["folder_bytes"] == plain["codecs"]["int4"]["folder_bytes"]
    else:
        assert coded["recommended"]["recipe"] is None and "lossy already" in coded["recommended"]["says"]


def test_bases_are_compared(tmp_path: Path) -> None:
    found = analysis(model(tmp_path / "m", Drawn().tuned), "--base", "expert:1")
    bases = {base["base"]: base for base in found["bases"]}
    assert list(bases) == ["expert:1", "mean", "expert:0", "expert:2", "expert:3"]
    assert bases["mean"]["relative_norm"] < min(bases[f"expert:{i}"]["relative_norm"] for i in range(4))
    assert bases["expert:1"]["exact_bytes"] == found["codecs"]["exact"]["delta_bytes"]
    assert bases["mean"]["exact_bytes"] and bases["expert:2"]["exact_bytes"] is None
    assert found["groups"][0]["delta"]["equal"][1] == 1


def test_outputs_are_predicted_for_the_states_of_a_file(tmp_path: Path) -> None:
    """Expert 3 sees no token: nothing is known of its outputs, and of the others' as much as ever."""
    folder, random = model(tmp_path / "m", Drawn().tuned), random_of(3)
    tensors = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        tensors[f"{name}.states"] = torch.randn(40, HIDDEN, generator=random)
        tensors[f"{name}.chosen"] = torch.randint(0, 3, (40, 2), generator=random, dtype=torch.int32)
    toy.save_file(tensors, tmp_path / "states.safetensors")
    found = analysis(folder, "--activations", tmp_path / "states.safetensors", "--delta", "int4")
    assert found["states"] == {"kind": "activations", "tokens": 16, "seed": 0}
    first = found["codecs"]["int4"]["output_error"]
    assert first > 0 and found["codecs"]["int4"]["worst"].partition(", expert ")[2] in "012"
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.chosen"][:] = 3
    toy.save_file(tensors, tmp_path / "states.safetensors")
    found = analysis(folder, "--activations", tmp_path / "states.safetensors", "--delta", "int4")
    assert found["codecs"]["int4"]["worst"].endswith("expert 3") and found["codecs"]["int4"]["output_error"] != first


def test_outputs_are_predicted_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ders_cli.hf import collect

    class Words:
        """A tokenizer: a byte is a token."""

        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [byte % 50 for byte in text.encode()]}

    monkeypatch.setattr(collect, "_load_tokenizer", lambda folder: Words())
    toy.make("mixtral", tmp_path / "m", dtype=BF16)
    (tmp_path / "text.txt").write_text("Every expert sees the tokens that its router sends it. " * 20)
    found = analysis(tmp_path / "m", "--text", tmp_path / "text.txt", "--delta", "int4")
    assert found["states"] == {"kind": "text", "tokens": 16, "seed": 0}
    assert (
        found["codecs"]["int4"]["output_error"]
        != analysis(tmp_path / "m", "--delta", "int4")["codecs"]["int4"]["output_error"]
    )


def test_layers_of_different_numbers_of_experts(tmp_path: Path) -> None:
    found = analysis(model(tmp_path / "m", Drawn().own, [5, 2, 3], layers=3))
    assert found["experts"] == 5 and [len(group["experts"]) for group in found["groups"][::3]] == [5, 2, 3]
    assert [base["base"] for base in found["bases"]] == ["mean", "expert:0", "expert:1"]  # those that every layer has
    assert [len(router["cosine"]["pairs"]) for router in found["routers"]] == [5, 2, 3]


def test_the_page_of_numbers_is_short(tmp_path: Path) -> None:
    drawn = Drawn()
    shown = done("analyze", model(tmp_path / "m", drawn.tuned, layers=30), "--tokens", 8).out
    assert len(shown.splitlines()) < 75 and "siblings" in shown and "ternary0.02" in shown


# --- what is recommended ---


def cost(error: float, delta: int = 100, worst: float | None = None, kept: float = 1.0) -> Cost:
    return Cost(delta, 400 + delta, error, error if worst is None else worst, kept)


def facts(layer: int = 0, s: float = 0.01, **more) -> GroupFacts:
    fields = dict(name=f"g{layer}", layer=layer, projection="up", labels=("0", "1"), weights=1000, energy=1.0)
    fields |= dict(mean_energy=s * s / 2, cosine=(0.9, 0.9), copied=False, equal=0.5)
    return GroupFacts(**fields | more)


BASES = [BaseFound("mean", "mean", 0.1, 300), BaseFound("dense:d", "some/d", 0.2, 200)]


@pytest.mark.parametrize(
    "costs, chosen, base",
    [
        ({"ternary0.02": cost(0.009, 10), "int4": cost(1e-4, 90), "exact": cost(0, 200)}, "ternary0.02", "mean"),
        ({"ternary0.02": cost(0.011, 10), "int4": cost(1e-4, 90), "exact": cost(0, 200)}, "int4", "mean"),
        ({"ternary0.02": cost(0.009, 10, worst=0.021), "int4": cost(1e-4, 90)}, "int4", "mean"),
        ({"ternary0.02": cost(0.009, 10, kept=0.9), "int4": cost(1e-4, 90)}, "int4", "mean"),
        ({"ternary0.02": cost(float("nan"), 10), "int4": cost(0.02, 90), "exact": cost(0, 200)}, "exact", "some/d"),
        ({"int4": cost(0.02, 90), "exact": cost(0, 680)}, None, None),
        ({"int4": cost(0.02, 90), "exact": cost(0, 580)}, "exact", "some/d"),  # 980 bytes; 100 fewer with that base
        ({"int4": cost(1e-4, 101), "exact": cost(0, 200)}, "exact", "some/d"),  # 501 bytes for 500
        ({"int4": cost(1e-4, 100), "exact": cost(0, 200)}, "exact", "some/d"),
        ({"int4": cost(1e-4, 99), "exact": cost(0, 200)}, "int4", "mean"),
        ({"int3": cost(0.002, 70), "none": cost(0.002, 0, kept=0.0), "exact": cost(0, 200)}, "int3", "mean"),
        ({"int4": cost(1e-4, 590), "exact": cost(0, 680)}, None, None),
    ],
)
def test_the_lightest_codec_within_the_bound(costs: dict[str, Cost], chosen: str | None, base: str | None) -> None:
    assert BOUND == 0.01
    groups = [facts()]
    settings = {"seed": 3, "group_size": 64, "shared": False}
    found = recommend(judge(groups, "mean"), groups, costs, BASES, 1000, settings)
    assert (found.recipe or {}).get("delta") == chosen and (found.recipe or {}).get("base") == base
    assert found.recipe is None or found.recipe["seed"] == 3


@pytest.mark.parametrize(
    "s, kind", [(0.24, "siblings"), (0.26, "relatives"), (0.69, "relatives"), (0.71, "native"), (1.0, "native")]
)
def test_kinds_by_distance(s: float, kind: str) -> None:
    assert judge([facts(s=s)], "mean").kind == kind


def test_noise_is_what_all_deltas_look_like() -> None:
    noise = NoiseFound(0.001, 3.0, 1.0, 1.0)

    def kind(*found: NoiseFound) -> str:
        return judge([facts(n, noise=(one, one)) for n, one in enumerate(found)], "mean").kind

    assert kind(noise, noise) == "noisy copies"
    assert kind(noise, NoiseFound(0.001, 3.6, 1.0, 1.0)) == "siblings"
    assert kind(noise, NoiseFound(0.001, 3.0, 1.4, 1.0)) == "siblings"
    assert kind(noise, NoiseFound(0.001, 3.0, 1.0, 1.4)) == "siblings"
    assert kind(noise, NoiseFound(0.002, 3.0, 1.0, 1.0)) == "siblings"
    assert kind(NoiseFound(*[float("nan")] * 4)) == "siblings"


@pytest.mark.parametrize("s, kind", [(0.24, "noisy copies"), (0.26, "relatives"), (0.8, "native")])
def test_copies_are_near_each_other(s: float, kind: str) -> None:
    noise = NoiseFound(0.001, 3.0, 1.0, 1.0)
    found = judge([facts(n, s=s, noise=(noise, noise)) for n in range(2)], "mean")
    assert found.kind == kind and (found.noise is not None) == (kind == "noisy copies")


@pytest.mark.parametrize(
    "of_none, chosen",
    [
        ((0.009, 0.019), "none"),
        ((0.011, 0.012), "int4"),
        ((0.009, 0.021), "int4"),
        ((float("nan"), float("nan")), "int4"),
    ],
)
def test_none_has_to_keep_the_bound_too(of_none: tuple[float, float], chosen: str) -> None:
    noise = NoiseFound(0.001, 3.0, 1.0, 1.0)
    groups, costs = [facts(noise=(noise, noise))], {"int4": cost(1e-4, 90), "exact": cost(0, 680)}
    found = recommend(judge(groups, "mean"), groups, costs, BASES, 1000, {}, of_none)
    assert found.recipe["delta"] == chosen
    assert ("not known" if of_none[0] != of_none[0] else f"{of_none[0]:.2g}") in found.says


def test_numbers_in_ranges() -> None:
    assert in_ranges([5, 0, 2, 1, 7, 8]) == "0-2,5,7-8"


# --- errors ---


@pytest.mark.parametrize(
    "more, code, words",
    [
        (["--delta", "int9"], 2, "int9"),
        (["--base", "expert:9"], 2, "experts 0 ... 3"),
        (["--text", "no.txt"], 2, "no.txt: no such file"),
        (["--text", "no.txt", "--activations", "no"], 2, "expected one of the two"),
        (["--tokens", "0"], 2, ""),
    ],
)
def test_usage_errors(tmp_path: Path, more: list[str], code: int, words: str) -> None:
    ran = ders("analyze", model(tmp_path / "m", copy), *more)
    assert ran.code == code and words in ran.err and "Traceback" not in ran.err


def test_no_recipe_is_written_where_none_is_recommended(tmp_path: Path) -> None:
    ran = done("analyze", model(tmp_path / "m", Drawn().own), "--write-recipe", tmp_path / "r.yaml", "-q")
    assert not (tmp_path / "r.yaml").exists() and "not written" in ran.err and ran.out == "native\n"
