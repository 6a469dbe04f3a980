"""A file of activations, read as a stranger's; and the one that collect makes, held against the model itself."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from ders_kernels.cpu_ops import floats
from safetensors.torch import load_file, save_file

from ders_cli.activations import Activations, write_activations
from ders_cli.errors import CheckpointError, DersError, UnsupportedError, UsageError
from ders_cli.source import open_source

P = "model.layers.0.mlp.experts"
LABELS = ["0", "1", "2"]


def write(path: Path, **parts: torch.Tensor) -> Path:
    save_file({f"{P}.{name}": tensor for name, tensor in parts.items()}, path)
    return path


def whole(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    parts = {
        "states": torch.randn(5, toy.HIDDEN, generator=random),
        "chosen": torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1], [2, 0]], dtype=torch.int32),
        "gates": torch.tensor([[0.5, 0.25], [1.0, 0.125], [0.75, 0.25], [0.5, 0.5], [0.25, 2.0]]),
    }
    return {name: tensor for name, tensor in (parts | changed).items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_an_expert(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = whole(states=whole()["states"].to(dtype), chosen=whole()["chosen"].long())
    with Activations(write(tmp_path / "a", **parts)) as found:
        assert found.prefixes == (P,) and found.tokens(P) == 5
        layer = found.layer(P, LABELS)
        states, gates = layer.of("1")
        assert np.array_equal(states, parts["states"].float().numpy()[[0, 2, 3]]) and states.dtype == np.float32
        assert gates.tolist() == [0.25, 0.75, 0.5] and layer.count("1") == 3
        states, gates = layer.of("shared")
        assert len(states) == layer.count("shared") == 5 and gates.tolist() == [1] * 5
        assert found.importance(P, "1") == (3 / 5, 1.5 / 5) and found.importance(P, "shared") == (1, 1)
        # a fine-grained slice has the tokens of its layer; the numbers of other slices' experts are none of its
        assert len(found.layer(f"{P}.slice1", ["1"]).of("2")[0]) == 2


def test_routing_is_optional(tmp_path: Path) -> None:
    with Activations(write(tmp_path / "a", **whole(chosen=None, gates=None))) as found:
        states, gates = found.layer(P, LABELS).of("1")
        assert len(states) == 5 and gates.tolist() == [1] * 5 and found.importance(P, "1") == (1, 1)
    with Activations(write(tmp_path / "b", **whole(gates=None))) as found:
        assert found.layer(P, LABELS).of("2")[1].tolist() == [1, 1] and found.importance(P, "2") == (2 / 5, 2 / 5)


BROKEN = {
    "one axis": (whole(states=torch.zeros(5)), "expected [tokens, hidden]"),
    "no tokens": (whole(states=torch.zeros(0, 4), chosen=None, gates=None), "expected [tokens, hidden]"),
    "integer states": (whole(states=torch.zeros(5, 4, dtype=torch.int32)), "I32 [5, 4]"),
    "float chosen": (whole(chosen=torch.zeros(5, 2)), "I32 or I64"),
    "half gates": (whole(gates=torch.zeros(5, 2).half()), "of F32"),
    "gates of another shape": (whole(gates=torch.zeros(5, 3)), "same shape"),
    "gates alone": (whole(chosen=None), "same shape"),
    "tokens differ": (whole(states=torch.zeros(4, 8)), "5 tokens, and 4 states"),
    "no states": (whole(states=None), "no tensor LAYER.states"),
    "expert too high": (whole(chosen=torch.full((5, 2), 3, dtype=torch.int32)), "expert 3; the layer has 0 ... 2"),
    "expert below 0": (whole(chosen=torch.full((5, 2), -1)), "expert -1; the layer has 0 ... 2"),
    "a NaN": (whole(states=torch.full((5, 4), float("nan"))), "nan at [0, 0]"),
    "an infinite gate": (whole(gates=torch.full((5, 2), float("inf"))), "inf at [0, 0]"),
    "a gate below 0": (whole(gates=torch.full((5, 2), -0.5)), "-0.5; expected shares of the outputs"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case: str, tmp_path: Path) -> None:
    parts, said = BROKEN[case]
    with pytest.raises(CheckpointError) as error, Activations(write(tmp_path / "a", **parts)) as found:
        found.layer(P, LABELS)
    assert said in str(error.value) and "\n" not in str(error.value) and str(tmp_path / "a") in str(error.value)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello")
    for path in (tmp_path / "text", tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError):
            Activations(path)
    path = write(tmp_path / "a", **whole())
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="Is the file complete"):
        Activations(path)


def test_of_another_model(tmp_path: Path) -> None:
    toy.make("qwen3_moe", tmp_path / "m", num_hidden_layers=1)
    with open_source(tmp_path / "m") as source:
        with Activations(write(tmp_path / "a", **whole())) as found:
            found.check(source.groups)
            with pytest.raises(UsageError, match="no model.layers.7.mlp.experts.states"):
                found.layer("model.layers.7.mlp.experts", LABELS)
        with Activations(write(tmp_path / "b", **whole(states=torch.zeros(5, 41)))) as found:
            with pytest.raises(UsageError, match=r"expected \[tokens, 40\], found \[5, 41\]"):
                found.check(source.groups)
    toy.make("qwen3_moe", tmp_path / "n", num_hidden_layers=2)
    with open_source(tmp_path / "n") as source, Activations(tmp_path / "a") as found:
        with pytest.raises(UsageError, match="no model.layers.1.mlp.experts.states"):
            found.check(source.groups)


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    parts = whole()
    bits = {f"{P}.states": (floats.narrow(parts["states"].numpy(), "BF16"), "BF16")}
    write_activations(tmp_path / "a", bits | {f"{P}.chosen": (parts["chosen"].numpy(), "I32")})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded[f"{P}.states"], parts["states"].bfloat16())
    assert torch.equal(loaded[f"{P}.chosen"], parts["chosen"])


def test_another_process_opens_it_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a", **whole())
    with Activations(path) as found:
        copy = pickle.dumps(found)
    shutil.copy2(path, tmp_path / "b").replace(path)  # as another node may number its files
    with pickle.loads(copy) as again:
        assert len(again.layer(P, LABELS).states) == 5
        again.check_unchanged()
    write(path, **whole(gates=None))
    with pytest.raises(DersError, match="went from"):
        pickle.loads(copy)


# --- collecting


class Words:
    """A tokenizer for tests: a byte is a token, behind token 1."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + byte % 50 for byte in text.encode()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    from ders_cli.hf import collect

    monkeypatch.setattr(collect, "_load_tokenizer", lambda folder: Words())


def collected(folder: Path, text: Path, tokens: int, out: Path, seed: int = 0) -> int:
    from ders_cli.hf.collect import collect

    with open_source(folder) as source:
        return collect(source, text, tokens, seed, out)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path / "text"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "dbrx"])
def test_what_is_recorded_is_what_the_experts_get(name: str, words, text: Path, tmp_path: Path) -> None:
    """The states, run by hand through the experts that were chosen, give what the module gave."""
    from transformers import AutoModelForCausalLM

    from ders_cli.hf.stock import locate

    toy.make(name, tmp_path / "m")
    assert collected(tmp_path / "m", text, 10**6, tmp_path / "a") == 1800 + 4  # each piece has a first token
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", experts_implementation="eager")
    with open_source(tmp_path / "m") as source, Activations(tmp_path / "a") as found:
        found.check(source.groups)
        prefix = found.prefixes[-1]
        labels = [label for label, _ in source.groups[-1].members]
        layer = found.layer(prefix, labels)
    module, given = locate(model, prefix)[1], []
    module.register_forward_hook(lambda module, inputs, output: given.append((inputs[0], output)))
    ids = Words()(text.read_text(), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        for begin in range(0, len(ids), 512):
            model.base_model(input_ids=torch.tensor([[1, *ids[begin : begin + 512]]]), use_cache=False)
        again = module(*(torch.from_numpy(part) for part in (layer.states, layer.chosen, layer.gates)))
    states, outputs = (torch.cat([each.flatten(0, -2) for each in parts]) for parts in zip(*given[:4]))
    assert torch.equal(torch.from_numpy(layer.states), states)
    torch.testing.assert_close(again.flatten(0, -2), outputs, rtol=1e-5, atol=1e-6)  # sums of other batches


def test_tokens_are_drawn_by_the_seed(words, text: Path, tmp_path: Path) -> None:
    toy.make("mixtral", tmp_path / "m", dtype=torch.bfloat16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert collected(tmp_path / "m", text, 37, tmp_path / name, seed) == 37
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c
    found = load_file(tmp_path / "a")
    assert found[f"{P}.states"].dtype == torch.bfloat16 and found[f"{P}.states"].shape == (37, toy.HIDDEN)
    collected(tmp_path / "m", text, 10**6, tmp_path / "all")
    rows = {row.numpy().tobytes() for row in load_file(tmp_path / "all")[f"{P}.states"].view(torch.int16)}
    assert {row.numpy().tobytes() for row in found[f"{P}.states"].view(torch.int16)} <= rows


def test_pieces_are_drawn_by_the_seed() -> None:
    from ders_cli.hf.collect import PIECE, _drawn_pieces

    ids = list(range(4 * PIECE - 7))
    assert sum(_drawn_pieces(ids, 10**6, 0), []) == ids
    drawn = [_drawn_pieces(ids, PIECE + 1, seed) for seed in range(20)]
    assert all(sum(map(len, pieces)) > PIECE and pieces == sorted(pieces) for pieces in drawn)
    assert {piece[0] // PIECE for pieces in drawn for piece in pieces} == {0, 1, 2, 3}


def test_a_ders_checkpoint_runs_dequantised(words, text: Path, tmp_path: Path) -> None:
    from command import done

    toy.make("qwen3_moe", tmp_path / "m", dtype=torch.bfloat16)
    done("compress", tmp_path / "m", "--delta", "exact", "-o", tmp_path / "x")
    for name in ("m", "x"):
        collected(tmp_path / name, text, 60, tmp_path / f"{name}.a")
    assert (tmp_path / "m.a").read_bytes() == (tmp_path / "x.a").read_bytes()


@pytest.mark.parametrize("name", ["jetmoe", "llama4_text"])
def test_experts_that_are_called_otherwise(name: str, words, text: Path, tmp_path: Path) -> None:
    toy.make(name, tmp_path / "m")
    with pytest.raises(UnsupportedError, match=r"is called with .*--activations FILE"):
        collected(tmp_path / "m", text, 40, tmp_path / "a")


def test_texts_that_do_not_serve(words, tmp_path: Path) -> None:
    toy.make("mixtral", tmp_path / "m")
    for content, said in ((b"", "no tokens"), (b"a\xff", "UTF-8, found byte 0xff at 1")):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(UsageError, match=said):
            collected(tmp_path / "m", tmp_path / "t", 40, tmp_path / "a")
    with pytest.raises(UsageError, match="no such file"):
        collected(tmp_path / "m", tmp_path / "none", 40, tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe"]
)  # transformers raises for one, makes an empty one for the other
def test_a_model_without_tokenizer(name: str, text: Path, tmp_path: Path) -> None:
    toy.make(name, tmp_path / "m")
    with pytest.raises(UsageError, match="no tokenizer") as error:
        collected(tmp_path / "m", text, 40, tmp_path / "a")
    assert "\n" not in str(error.value)


def test_models_that_transformers_does_not_run(words, text: Path, tmp_path: Path) -> None:
    toy.moe_llava(tmp_path / "llava")
    with pytest.raises(UnsupportedError, match="does not load it"):
        collected(tmp_path / "llava", text, 40, tmp_path / "a")
    toy.make("mixtral", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="no model.norm.weight in it"):
        collected(tmp_path / "m", text, 40, tmp_path / "a")
    toy.make("mixtral", tmp_path / "n", vocab_size=20)
    with pytest.raises(CheckpointError, match="the model has 0 ... 19"):
        collected(tmp_path / "n", text, 40, tmp_path / "a")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(DersError):  # no code of the folder is run, nobody is asked
        collected(tmp_path / "m", text, 40, tmp_path / "a")
