"""Dense models and the stock MoE class that computes the same when every expert is the dense FFN: rows of data.

The rule behind every row: copy the dense config.json verbatim, override the row's keys, copy all other tensors by name.
(Defaults differ between twins: mixtral's rms_norm_eps is 1e-5 where llama's is 1e-6. A config made anew is wrong by 3 %
of the logits, which nobody sees.) Each row was checked by logits against transformers 5.23 (tests/test_upcycle.py).
"""

import re
from collections.abc import Mapping
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


SHARED = tuple(
    (f"mlp.shared_expert.{p}_proj.weight", s) for p, s in (("gate", (0, "H")), ("up", (0, "H")), ("down", ("H", 0)))
)
SHARED_GATE = ("mlp.shared_expert_gate.weight", (1, "H"))
HUNYUAN_SHARED = tuple(
    (f"mlp.shared_mlp.{p}_proj.weight", s) for p, s in (("gate", ("I", "H")), ("up", ("I", "H")), ("down", ("H", "I")))
)
NORM = {"norm_topk_prob": True}  # without it the chosen gates do not sum to 1, and the logits are off by 0.3 and more
QWEN = NORM | {"decoder_sparse_step": 1, "mlp_only_layers": []}

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
    ),
    Pair(
        "mistral",
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe.gate.weight",
        ("num_local_experts",),
        "num_experts_per_tok",
        "intermediate_size",
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
    ),
)

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
    for pair in PAIRS:
        if pair.dense == name:
            return pair
    why = (
        REFUSED.get(name, "no row of ders_cli/pairs.py says which MoE it becomes")
        if isinstance(name, str)
        else "not a name"
    )
    raise UnsupportedError(
        f"config.json: model_type {name!r:.60} cannot be upcycled: {why}; it can be done for {', '.join(p.dense for p in PAIRS)}"
    )


def refuse_biases(pair: Pair, tensors: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a bias that the MoE has no place for: without it, it would compute something else."""
    for name in tensors:
        found = re.fullmatch(r".*\.layers\.\d+\.(.*\bbias)", name)
        if found and not (pair.biases and re.fullmatch(pair.biases, found[1])):
            raise UnsupportedError(
                f"{name}: {pair.architecture} has no place for this bias, so the MoE would not compute the same"
            )
