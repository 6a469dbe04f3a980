"""Dense models and the stock MoE class that computes the same when every expert is the dense FFN: rows of data.

The rule behind every row: copy the dense config.json verbatim, override the row's keys, copy all other tensors by name.
(Defaults differ between twins: mixtral's rms_norm_eps is 1e-5 where llama's is 1e-6. A config made anew is wrong by 3 %
of the logits, which nobody sees.) What a config.json leaves to the dense class's defaults is written out where the
MoE's class has another. Each row was checked by logits against transformers 5.23 (tests/test_upcycle.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UnsupportedError

Shape = tuple[str | int, ...]  # of E (experts), H (hidden), I (an expert's inner size), or numbers


@dataclass(frozen=True)
class Pair:
    """A dense model_type and the MoE that it becomes. Tensor names are relative to the layer."""

    dense: str
    moe: str
    architecture: str
    router: str
    experts: tuple[str, ...]  # keys of config.json that say how many experts
    top_k: str
    inner: str  # the key that says an expert's inner size
    settings: Mapping[str, Any] = field(default_factory=dict)
    zeros: tuple[tuple[str, Shape], ...] = ()  # tensors that the MoE has besides, and that must not add anything
    dense_layers: str | None = None  # the key that lists layers without experts; None: the class has no such layers
    last_layer: str | None = None  # the key that says the last layer with experts
    biases: str | None = None  # pattern of the biases that the MoE has a place for too
    # the dense class's defaults where the MoE's class has others; a function makes one of the config
    defaults: Mapping[str, Any | Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)  # settings that must not be on, and why


SHARED = tuple(
    (f"mlp.shared_expert.{p}_proj.weight", s) for p, s in (("gate", (0, "H")), ("up", (0, "H")), ("down", ("H", 0)))
)
SHARED_GATE = ("mlp.shared_expert_gate.weight", (1, "H"))
HUNYUAN_SHARED = tuple(
    (f"mlp.shared_mlp.{p}_proj.weight", s) for p, s in (("gate", ("I", "H")), ("up", ("I", "H")), ("down", ("H", "I")))
)
NORM = {"norm_topk_prob": True}  # without it the chosen gates do not sum to 1, and the logits are off by 0.3 and more
QWEN = NORM | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _lfm2_layers(config: Mapping[str, Any]) -> list[str]:
    """Lfm2Config's layer_types where config.json has none: from full_attn_idxs, which lfm2_moe does not know."""
    full, count = config.get("full_attn_idxs"), config.get("num_hidden_layers", 32)
    if not isinstance(full, list | None) or type(count) is not int:
        raise UnsupportedError("config.json: layer_types: missing, and no list in full_attn_idxs to make it of")
    return ["full_attention" if full is None or n in full else "conv" for n in range(count)]


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """What classes without a head_dim of their own take: hidden_size by heads."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None


LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}

PAIRS: tuple[Pair, ...] = (
    Pair(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe.gate.weight",
        ("num_local_experts",),
        "num_experts_per_tok",
        "intermediate_size",
        {"sliding_window": None},
        defaults=LLAMA | {"num_key_value_heads": None, "max_position_embeddings": 2048},
    ),
    Pair(
        "mistral",
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe.gate.weight",
        ("num_local_experts",),
        "num_experts_per_tok",
        "intermediate_size",
        defaults=LLAMA | {"sliding_window": 4096},
    ),
    Pair(
        "qwen2",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "mlp.gate.weight",
        ("num_experts",),
        "num_experts_per_tok",
        "moe_intermediate_size",
        QWEN | {"shared_expert_intermediate_size": 0},
        (*SHARED, SHARED_GATE),
        defaults={"num_key_value_heads": 32},
        dense_layers="mlp_only_layers",
        biases=r"self_attn\.[qkv]_proj\.bias",
    ),
    Pair(
        "qwen3",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "mlp.gate.weight",
        ("num_experts", "num_local_experts"),
        "num_experts_per_tok",
        "moe_intermediate_size",
        QWEN,
        defaults={"head_dim": 128, "num_key_value_heads": 32},
        unlike={"use_sliding_window": "qwen3_moe has the window in every layer, qwen3 in some"},
        dense_layers="mlp_only_layers",
        biases=r"self_attn\.[qkvo]_proj\.bias",
    ),
    Pair(
        "olmo2",
        "flex_olmo",
        "FlexOlmoForCausalLM",
        "mlp.gate.weight",
        ("num_experts",),
        "num_experts_per_tok",
        "intermediate_size",
        NORM,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048}
        | {"eos_token_id": 50279, "pad_token_id": 1},
        biases=r"self_attn\.[qkvo]_proj\.bias",
    ),
    Pair(
        "granite",
        "granitemoe",
        "GraniteMoeForCausalLM",
        "block_sparse_moe.router.layer.weight",
        ("num_local_experts",),
        "num_experts_per_tok",
        "intermediate_size",
        biases=r"self_attn\.[qkvo]_proj\.bias",
    ),
    Pair(
        "ernie4_5",
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        "mlp.gate.weight",
        ("moe_num_experts",),
        "moe_k",
        "moe_intermediate_size",
        {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 1},
        (("mlp.moe_statics.e_score_correction_bias", (1, "E")),),
        defaults={"num_key_value_heads": 2, "head_dim": 128},
        last_layer="moe_layer_end_index",
    ),
    Pair(
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        "mlp.gate.wg.weight",
        ("num_experts",),
        "moe_topk",
        "intermediate_size",
        zeros=HUNYUAN_SHARED,
        biases=r"self_attn\.[qkvo]_proj\.bias",
    ),
    Pair(
        "cohere2",
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        "mlp.gate.weight",
        ("num_experts",),
        "num_experts_per_tok",
        "intermediate_size",
        NORM,
        defaults={"head_dim": _head_dim},
    ),
    Pair(
        "lfm2",
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "feed_forward.gate.weight",
        ("num_experts",),
        "num_experts_per_tok",
        "moe_intermediate_size",
        NORM | {"num_dense_layers": 0, "routed_scaling_factor": 1.0},
        (("feed_forward.expert_bias", ("E",)),),
        defaults={"layer_types": _lfm2_layers},
        biases=r"conv\..*bias",
    ),
    Pair(
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        "mlp.gate.weight",
        ("num_experts",),
        "num_experts_per_tok",
        "moe_intermediate_size",
        {"shared_expert_intermediate_size": 0},
        (*SHARED, SHARED_GATE),
        defaults={"num_key_value_heads": 4},
    ),
)

ROPE = ("rope_parameters", "rope_scaling")  # where a config may keep rope_theta, too
NO_TWIN = "transformers has no MoE class that computes what this model computes"
REFUSED = {
    "olmo": "olmoe normalises queries and keys, olmo does not",
    "phi3": "phimoe has LayerNorm with biases where phi3 has RMSNorm, and its gates do not sum to 1",
    "exaone4": "exaone_moe places its norms differently",
    "gpt2": NO_TWIN,
    "bert": NO_TWIN,
    "opt": NO_TWIN,
    "falcon": NO_TWIN,
    "gemma2": NO_TWIN,
    "gemma3": NO_TWIN,
    "gemma3_text": NO_TWIN,
    "phi": NO_TWIN,
}


def find_pair(config: Mapping[str, Any]) -> Pair:
    """The row of a dense config.json. Raises UnsupportedError with the reason if there is none."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise UnsupportedError(f"config.json: model_type: expected the name of a dense model, found {name!r:.60}")
    if pair := next((pair for pair in PAIRS if pair.dense == name), None):
        return pair
    why = REFUSED.get(name, "no row of ders_cli/pairs.py says which MoE it becomes")
    raise UnsupportedError(
        f"config.json: model_type {name!r:.60} cannot be upcycled: {why}; it can be done for {', '.join(p.dense for p in PAIRS)}"
    )


def stated(pair: Pair, config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense config with what it leaves to defaults written out, where these differ.

    Raises UnsupportedError for a model that the MoE's class would not compute.
    """
    heads = config.get("architectures")
    if isinstance(heads, list) and heads and not any(str(name).endswith("ForCausalLM") for name in heads):
        raise UnsupportedError(
            f"config.json: architectures: {heads[0]!r:.60} is no language model; only ...ForCausalLM is upcycled"
        )
    for key, why in pair.unlike.items():
        if config.get(key):
            raise UnsupportedError(f"config.json: {key} is on: {why}, so the MoE would not compute the same")
    given = set(config)
    if any(isinstance(rope := config.get(key), dict) and "rope_theta" in rope for key in ROPE):
        given.add("rope_theta")
    made = {
        key: value(config) if callable(value) else value for key, value in pair.defaults.items() if key not in given
    }
    found = made | dict(config)
    if found.get("num_key_value_heads", 1) is None:  # as many as heads, which not every MoE class takes
        found["num_key_value_heads"] = found.get("num_attention_heads")
    return found


def refuse_biases(pair: Pair, tensors: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a bias that the MoE has no place for: without it, it would compute something else."""
    for name in tensors:
        found = re.fullmatch(r".*\.layers\.\d+\.(.*\bbias)", name)
        if found and not (pair.biases and re.fullmatch(pair.biases, found[1])):
            raise UnsupportedError(
                f"{name}: {pair.architecture} has no place for this bias, so the MoE would not compute the same"
            )
