"""ders upcycle: every pair computes what its dense model computes, whatever form the experts have."""

import json
from pathlib import Path

import pytest
import torch
from command import contents, ders, done
from transformers import AutoConfig, AutoModelForCausalLM

from ders_cli.pairs import PAIRS, REFUSED

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


def make_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32):
    model_type, config = DENSE[name]
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


def load_stock(folder: Path):
    """By transformers alone, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_dense_models(dense, form, tmp_path):
    """To 1e-5 in fp32 at the start, loaded by stock transformers; DeRS forms by way of restore."""
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
    assert (logits(load_stock(plain)) - expected).abs().max() < TOLERANCE[name] * scale
