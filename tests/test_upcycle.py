"""ders upcycle: every pair computes what its dense model computes, whatever form the experts have."""

import json
from pathlib import Path

import pytest
import torch
from command import contents, ders, done
from transformers import AutoConfig, AutoModelForCausalLM

import ders_cli.hf  # noqa: F401
from ders_cli.pairs import PAIRS, REFUSED, find_pair, stated

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# name -> (model_type, config); values that differ from every default on purpose: a config made anew would not have them
DENSE = {
    "llama": ("llama", dict(rms_norm_eps=3e-4, rope_parameters=dict(rope_type="default", rope_theta=77.0))),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-rope": ("llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "mistral": ("mistral", dict(sliding_window=8, rms_norm_eps=3e-4)),
    "qwen2": ("qwen2", dict(rms_norm_eps=3e-4)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16, rms_norm_eps=3e-4)),
    "qwen3-tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, attention_bias=True)),
    "olmo2": ("olmo2", dict(rms_norm_eps=3e-4, rope_parameters=dict(rope_type="default", rope_theta=77.0))),
    "granite": (
        "granite",
        dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.1),
    ),
    "ernie4_5": ("ernie4_5", dict(head_dim=8, rms_norm_eps=3e-4)),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=8, rms_norm_eps=3e-4)),
    "cohere2": ("cohere2", SLIDING | dict(layer_norm_eps=3e-4)),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, norm_eps=3e-4)),
    "qwen3_5": (
        "qwen3_5_text",
        dict(
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            rms_norm_eps=3e-4,
        ),
    ),
}
FORMS = {
    "full": ("--full",),
    "rank": ("--rank", 4),
    "sparse": ("--sparse", 0.9),
    "split": ("--split", 2, "--full"),
    "split-rank": ("--split", 2, "--rank", 4),
}
# of the largest logit, or of 1 where that is more; lfm2's router divides by the gates' sum + 1e-6, so its gates sum to 1 - 1e-6 (its own logits
# are 1.9e-5 off at a scale of 3)
TOLERANCE = dict.fromkeys(DENSE, 1e-5) | {"lfm2": 1e-4}


def make_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings):
    model_type, config = DENSE[name]
    config = config | settings
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=DENSE)
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    return request.param, make_dense(request.param, folder), folder


def logits(model) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(3, 128, (2, 24))).logits


def load_quietly(folder: Path):
    """With nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_dense_models(dense, form, tmp_path):
    """To 1e-5 in fp32 at the start, loaded by stock transformers; DeRS forms packed, and by way of restore."""
    name, model, folder = dense
    expected = logits(model)
    scale = min(1, expected.abs().max())
    assert scale > 0.01
    done("upcycle", folder, *FORMS[form], "--experts", 3, "-o", tmp_path / "moe", "-q")
    plain = tmp_path / "moe"
    if "--full" not in FORMS[form]:
        done("verify", tmp_path / "moe", "-q")
        plain = tmp_path / "plain"
        done("restore", tmp_path / "moe", "-o", plain, "-q")
        full = tuple(option for option in FORMS[form] if option in ("--split", 2))
        done("upcycle", folder, *full, "--full", "--experts", 3, "-o", tmp_path / "full", "-q")
        assert contents(plain) == contents(tmp_path / "full")
        assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() < TOLERANCE[name] * scale
    assert (logits(load_quietly(plain)) - expected).abs().max() < TOLERANCE[name] * scale


# --- settings that change the model's own numbers ---

EXTREMES = {
    "one expert": ("--experts", 1),
    "top-k 1": ("--experts", 3, "--top-k", 1),
    "top-k E": ("--experts", 3, "--top-k", 3),
    "equal gates": ("--experts", 4, "--router", "zero"),
    "odd split": ("--experts", 4, "--split", 3),
    "finest split": ("--experts", 2, "--split", 12, "--top-k", 1),
}


@pytest.mark.parametrize("name", ["llama", "granite", "qwen3", "lfm2"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(name, extreme, tmp_path) -> None:
    expected = logits(make_dense(name, tmp_path / "dense"))
    done("upcycle", tmp_path / "dense", "--full", *EXTREMES[extreme], "-o", tmp_path / "moe", "-q")
    difference = logits(load_quietly(tmp_path / "moe")) - expected
    assert difference.abs().max() < TOLERANCE[name] * min(1, expected.abs().max())


@pytest.mark.parametrize("name", DENSE)
def test_bf16(name, tmp_path) -> None:
    """A single expert's gate is 1, so the logits are equal, bit for bit. Of two, where the class keeps gates in fp32; classes
    that round each gate to bf16 have a sum of up to 2^-8 off, which two layers bring to 1 % of the largest logit here."""
    make_dense(name, tmp_path / "dense", torch.bfloat16)
    expected = logits(load_quietly(tmp_path / "dense"))  # not the model that was saved: its rope is bf16 too
    done("upcycle", tmp_path / "dense", "--rank", 2, "--experts", 3, "--top-k", 1, "-o", tmp_path / "one", "-q")
    done("restore", tmp_path / "one", "-o", tmp_path / "plain", "-q")
    assert torch.equal(logits(load_quietly(tmp_path / "plain")), expected)
    done("upcycle", tmp_path / "dense", "--full", "--experts", 3, "-o", tmp_path / "two", "-q")
    difference = (logits(load_quietly(tmp_path / "two")) - expected).float().abs().max()
    exact = DENSE[name][0] in ("llama", "mistral", "hunyuan_v1_dense")
    assert difference == 0 if exact else difference < 0.02 * expected.abs().max()


def test_bf16_split_by_three(tmp_path) -> None:
    """3 * down is rounded to bf16, and three slices are summed: 2^-8 of an FFN's output, twice."""
    make_dense("llama", tmp_path / "dense", torch.bfloat16)
    expected = logits(load_quietly(tmp_path / "dense"))
    done("upcycle", tmp_path / "dense", "--full", "--experts", 2, "--split", 3, "-o", tmp_path / "moe", "-q")
    assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() < 0.02 * expected.abs().max()


# --- traps ---


def edit(folder: Path, *without: str, **config: object) -> dict:
    """Change config.json; returns what it now says."""
    found = {
        key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in without
    }
    (folder / "config.json").write_text(json.dumps(found | config))
    return found | config


def full(dense: Path, out: Path) -> dict:
    done("upcycle", dense, "--full", "--experts", 3, "-o", out, "-q")
    return json.loads((out / "config.json").read_text())


NEEDED = {  # what a row sets -> what undoes it
    "qwen2": dict(norm_topk_prob=False),
    "qwen3": dict(norm_topk_prob=False),
    "olmo2": dict(norm_topk_prob=False),
    "cohere2": dict(norm_topk_prob=False, expert_selection_fn="sigmoid"),
    "lfm2": dict(routed_scaling_factor=2.0),
    "llama": dict(rms_norm_eps=1e-2),
    "mistral": dict(sliding_window=2),
    "granite": dict(residual_multiplier=1.0),
    "ernie4_5": dict(rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_a_row_sets_is_needed(name, tmp_path) -> None:
    """The parity above would see each of these settings missing: logits move by more than 100 times its tolerance."""
    expected = logits(make_dense(name, tmp_path / "dense"))
    full(tmp_path / "dense", tmp_path / "moe")
    edit(tmp_path / "moe", **NEEDED[name])
    scale = min(1, expected.abs().max())
    assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() > 100 * TOLERANCE[name] * scale


SIZE_KEYS = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "layer_types",
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.dense)
def test_defaults_stay_the_dense_classes(pair) -> None:
    """From an empty config.json both classes make the same of every key that both have, but for sizes."""
    empty = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    dense = AutoConfig.for_model(pair.dense, **empty).to_dict()
    moe = AutoConfig.for_model(pair.moe, **stated(pair, empty) | dict(pair.settings)).to_dict()
    own = {
        "model_type",
        "transformers_version",
        "sliding_window",
        *pair.experts,
        pair.top_k,
        *pair.settings,
        *SIZE_KEYS,
    }
    differing = {key: (dense[key], moe[key]) for key in dense.keys() & moe.keys() - own if dense[key] != moe[key]}
    if differing.get("head_dim") == (16, None):  # the MoE's class divides, too
        del differing["head_dim"]
    assert not differing
    assert moe.get("head_dim") or "head_dim" not in pair.defaults


ROPE_10000 = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))
LEFT_OUT = {
    "llama": (dict(num_key_value_heads=4), ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim"), {}),
    "llama-old": (dict(), ("rope_parameters",), dict(rope_theta=77.0, rope_scaling=None)),
    "llama-linear": (dict(), ("rope_parameters",), dict(rope_scaling=dict(type="linear", factor=2.0))),
    "llama-null": (dict(num_key_value_heads=4), (), dict(num_key_value_heads=None, head_dim=None)),
    "mistral": (ROPE_10000, ("rope_parameters", "rms_norm_eps", "sliding_window"), {}),
    "olmo2": ({}, ("rope_parameters", "rms_norm_eps"), {}),
    "cohere2": ({}, ("head_dim",), {}),
    "qwen3": (dict(head_dim=128), ("head_dim", "rope_parameters"), {}),
    "ernie4_5": (dict(head_dim=128), ("head_dim", "num_key_value_heads"), {}),
    "lfm2": ({}, ("layer_types",), dict(full_attn_idxs=[1])),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_config_that_leaves_keys_out(case, tmp_path) -> None:
    """As files on the hub do: Llama 2's has no rope_theta, which Mixtral takes for a million."""
    name = case.partition("-")[0]
    settings, without, config = LEFT_OUT[case]
    make_dense(name, tmp_path / "dense", **settings)
    edit(tmp_path / "dense", *without, **config)
    expected = logits(load_quietly(tmp_path / "dense"))
    full(tmp_path / "dense", tmp_path / "moe")
    assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() < TOLERANCE[name]


BIASED = {
    "qwen3": "attention_bias",
    "olmo2": "attention_bias",
    "granite": "attention_bias",
    "hunyuan": "attention_bias",
}


@pytest.mark.parametrize("name", [*BIASED, "lfm2"])
def test_biases_with_a_place(name, tmp_path) -> None:
    expected = logits(make_dense(name, tmp_path / "dense", **{BIASED.get(name, "conv_bias"): True}))
    full(tmp_path / "dense", tmp_path / "moe")
    assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() < TOLERANCE[name]


@pytest.mark.parametrize(
    ("name", "settings", "tensor"),
    [
        ("llama", dict(attention_bias=True), "self_attn.k_proj.bias"),
        ("llama", dict(mlp_bias=True), "mlp.down_proj.bias"),
        ("granite", dict(mlp_bias=True), "mlp.down_proj.bias"),
        ("cohere2", dict(attention_bias=True), "self_attn.k_proj.bias"),
        ("ernie4_5", dict(use_bias=True), "mlp.down_proj.bias"),
        ("qwen3_5", dict(attention_bias=True), "self_attn.k_proj.bias"),
    ],
)
def test_biases_without_a_place(name, settings, tensor, tmp_path) -> None:
    make_dense(name, tmp_path / "dense", **settings)
    ran = ders("upcycle", tmp_path / "dense", "--full", "-o", tmp_path / "moe")
    assert ran.code == 4 and f"{tensor}: " in ran.err and "has no place for this bias" in ran.err


def test_windows_in_some_layers(tmp_path) -> None:
    """qwen3_moe has no layer_types; qwen2_moe does."""
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    make_dense("qwen3", tmp_path / "qwen3", **window)
    ran = ders("upcycle", tmp_path / "qwen3", "--full", "-o", tmp_path / "moe")
    assert ran.code == 4 and "use_sliding_window" in ran.err
    expected = logits(make_dense("qwen2", tmp_path / "qwen2", **window))
    full(tmp_path / "qwen2", tmp_path / "moe")
    assert (logits(load_quietly(tmp_path / "moe")) - expected).abs().max() < TOLERANCE["qwen2"]


LOCAL, GLOBAL = "num_local_experts", "num_experts"
COUNT_KEYS = {"qwen2": {GLOBAL}, "granite": {LOCAL}, "llama": {LOCAL}, "qwen3": {GLOBAL, LOCAL}}


@pytest.mark.parametrize("name", COUNT_KEYS)
def test_key_of_the_number_of_experts(name, tmp_path) -> None:
    """The one that the class reads; the rest of the config is the dense model's, word for word."""
    make_dense(name, tmp_path / "dense")
    dense = edit(tmp_path / "dense", auto_map={"AutoModel": "x.Y"}, note="kept")
    moe = full(tmp_path / "dense", tmp_path / "moe")
    assert {key for key in ("num_experts", "num_local_experts") if moe.get(key) == 3} == COUNT_KEYS[name]
    pair = find_pair(dense)
    overridden = {"model_type", "architectures", "auto_map", *pair.experts, pair.top_k, pair.inner, *pair.settings}
    assert {k: moe.get(k) for k in dense if k not in overridden} == {
        k: v for k, v in dense.items() if k not in overridden
    }
    assert not moe.keys() - dense.keys() - overridden
    assert moe["note"] == "kept" and "auto_map" not in moe
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert getattr(config, pair.experts[0]) == 3


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type, tmp_path) -> None:
    make_dense("llama", tmp_path / "dense")
    edit(tmp_path / "dense", model_type=model_type)
    ran = ders("upcycle", tmp_path / "dense", "--full", "-o", tmp_path / "moe")
    assert ran.code == 4 and REFUSED[model_type] in ran.err and ran.err.count("\n") == 1
