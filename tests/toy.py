"""Tiny checkpoints for tests: real transformers models, and the layouts that transformers doesn't have.

Experts are as upcycling leaves them: one random matrix for all, and a little of each one's own on top. Sizes are odd on
purpose. transformers' default grouped_mm refuses odd sizes (16-byte strides), so load a toy with
`experts_implementation="eager"` to run it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, VOCAB = 40, 43, 61
DENSE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN = DENSE | dict(moe_intermediate_size=INNER, head_dim=10, num_experts_per_tok=2)
MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
DEEPSEEK = (
    DENSE
    | MLA
    | dict(
        num_key_value_heads=4,
        n_routed_experts=4,
        moe_intermediate_size=INNER,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
)
MODELS: dict[str, dict] = {
    "mixtral": DENSE | dict(num_local_experts=3),
    "phimoe": DENSE | dict(num_local_experts=3),
    "minimax": DENSE | dict(num_local_experts=3, layer_types=["full_attention", "linear_attention"], block_size=8),
    "minimax_m2": DENSE | dict(num_local_experts=3, num_experts_per_tok=2, head_dim=10, rotary_dim=10),
    "qwen2_moe": QWEN | dict(num_experts=3, shared_expert_intermediate_size=INNER),
    "qwen3_moe": QWEN | dict(num_experts=5, num_hidden_layers=3),
    "qwen3_next": QWEN
    | dict(
        num_experts=3,
        shared_expert_intermediate_size=INNER,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "olmoe": DENSE | dict(num_experts=3, num_experts_per_tok=2),
    "flex_olmo": DENSE | dict(num_experts=3, num_experts_per_tok=2),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": QWEN | dict(n_routed_experts=3, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4_5_moe": QWEN | dict(moe_num_experts=3, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "exaone_moe": QWEN
    | dict(
        num_experts=3,
        num_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "hunyuan_v1_moe": DENSE | dict(num_experts=3, moe_topk=2, head_dim=10),
    "cohere2_moe": DENSE | dict(num_experts=3, num_experts_per_tok=2),
    "afmoe": QWEN | dict(num_experts=3, num_dense_layers=1, num_shared_experts=1),
    "lfm2_moe": QWEN | dict(num_experts=3, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "jamba": DENSE
    | dict(
        num_experts=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "granitemoe": DENSE | dict(num_local_experts=3, num_experts_per_tok=2),
    "granitemoeshared": DENSE | dict(num_local_experts=3, num_experts_per_tok=2, shared_intermediate_size=INNER),
    "jetmoe": DENSE | dict(num_local_experts=3, num_experts_per_tok=2, kv_channels=10),
    "gemma4_text": QWEN
    | dict(
        enable_moe_block=True,
        num_experts=3,
        top_k_experts=2,
        global_head_dim=10,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    ),
    "gpt_oss": DENSE | dict(num_local_experts=3, num_experts_per_tok=2, head_dim=10),
    "llama4_text": DENSE
    | dict(
        num_local_experts=3,
        intermediate_size_mlp=48,
        head_dim=10,
        moe_layers=[1],
        interleave_moe_layer_step=2,
    ),
    "dbrx": dict(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=INNER, moe_num_experts=3, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "nemotron_h": {k: v for k, v in QWEN.items() if k != "num_hidden_layers"}
    | dict(
        layers_block_type=["mamba", "attention", "moe"],
        n_routed_experts=3,
        moe_shared_expert_intermediate_size=INNER,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        n_group=1,
        topk_group=1,
    ),
}


def make(
    name: str, folder: Path, *, fused: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
):
    """Save a tiny model of `name`, a key of MODELS, in `folder`; return it.

    fused: save the tensors as they are in memory, instead of under the original names.
    """
    model = build(name, dtype=dtype, seed=seed, **overrides)
    model.save_pretrained(folder, save_original_format=not fused)
    return model


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A tiny upcycled-like transformers model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name] | overrides))
    with torch.no_grad():
        for _, matrices in experts(model):
            base = 0.3 * torch.randn(matrices.shape[1:])
            matrices.copy_(base + 0.01 * torch.randn(matrices.shape))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_proj_bias"):  # gpt_oss: its own are zero
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def experts(model) -> Iterator[tuple[str, Tensor]]:
    """(name of the group, view [E, out, in]) of the experts of a transformers model, by what its modules compute."""
    for name, module in model.named_modules():
        if type(module).__name__ == "JetMoeMoE":
            yield from _split(name, module.input_linear.weight, module.output_linear.weight)
        elif type(module).__name__ == "DbrxExperts":
            for projection, weight in (("gate", module.mlp.w1), ("up", module.mlp.v1), ("down", module.mlp.w2)):
                matrices = weight.view(module.num_experts, -1, module.hidden_size)
                yield f"{name}.{projection}_proj", matrices.mT if projection == "down" else matrices
        elif type(module).__name__ == "NemotronHExperts":
            yield f"{name}.up_proj", module.up_proj
            yield f"{name}.down_proj", module.down_proj
        elif type(module).__name__ == "Llama4TextExperts":
            yield from _split(name, module.gate_up_proj.mT, module.down_proj.mT)
        elif hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            gate_up, down = module.gate_up_proj, module.down_proj
            if module.is_transposed:
                gate_up, down = gate_up.mT, down.mT
            yield from _split(name, gate_up, down, module.is_concatenated)


def _split(name: str, gate_up: Tensor, down: Tensor, concatenated: bool = True) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2, dim=1) if concatenated else (gate_up[:, ::2], gate_up[:, 1::2])
    yield from ((f"{name}.gate_proj", gate), (f"{name}.up_proj", up), (f"{name}.down_proj", down))


def dense(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """Save a tiny dense model (llama, qwen3, phi3, lfm2, ...) with the sizes of MODELS; return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **DENSE | overrides)).to(dtype).eval()
    model.save_pretrained(folder)
    return model


# --- layouts that transformers has no class for: config.json and one model.safetensors ---


def write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Save a checkpoint by hand; return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def moe_llava(folder: Path, style: str = "stablelm", *, meta: bool = False, dtype: torch.dtype = torch.bfloat16):
    """MoE-LLaVA, 3 experts in layers 0 and 2 of 3; style "stablelm" (gate, up, down) or "phi" (fc1, fc2, biases).

    meta: with Med-MoE's expert for every token, mlp.meta_moe.
    """
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    if style == "phi":
        shapes = {"fc1": (INNER, HIDDEN), "fc2": (HIDDEN, INNER)}
    random, tensors = torch.Generator().manual_seed(0), _frame(3)
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        moe = f"{mlp}.deepspeed_moe.experts.deepspeed_experts"
        holders = [f"{moe}.{i}" for i in range(3)] + [f"{mlp}.meta_moe"] * meta if layer % 2 == 0 else [mlp]
        for name, shape in shapes.items():
            tensors |= _upcycled([f"{holder}.{name}.weight" for holder in holders], shape, random)
            if style == "phi":
                tensors |= _upcycled([f"{holder}.{name}.bias" for holder in holders], shape[:1], random)
        if layer % 2 == 0:
            tensors[f"{mlp}.deepspeed_moe.gate.wg.weight"] = torch.randn(3, HIDDEN, generator=random)
    config = dict(
        model_type=f"moe_llava_{style}",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=3,
        hidden_act="gelu_new" if style == "phi" else "silu",
        moe=dict(moe_enable=True, moe_layers_idx=[0, 2], num_experts=[3, 3], top_k_experts=2, use_residual=False),
    )
    return write(folder, config, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def xft(folder: Path, dtype: torch.dtype = torch.bfloat16):
    """XFT, 2 layers of 4 experts, of which 0 sees every token."""
    random, tensors = torch.Generator().manual_seed(0), _frame(2)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        for name, shape in dict(gate=(INNER, HIDDEN), up=(INNER, HIDDEN), down=(HIDDEN, INNER)).items():
            names = [f"{mlp}.calculator.experts.weight_{name}.{i}.weight" for i in range(4)]
            tensors |= _upcycled(names, shape, random)
        tensors[f"{mlp}.gate.gate_network.0.weight"] = torch.randn(3, HIDDEN, generator=random)
    config = dict(
        model_type="llama_moe_upscaling",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        hidden_act="silu",
        num_experts=4,
        num_selects=2,
        gate_type="TopKUniversalBalancedNoisyGate",
    )
    return write(folder, config, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def mixed(folder: Path, dtype: torch.dtype = torch.bfloat16):
    """Qwen3-MoE with layer 0 stored per expert, layer 1 stacked, and a layer for multi-token prediction per expert."""
    random, tensors = torch.Generator().manual_seed(0), _frame(2)
    for layer in ("model.layers.0", "model.layers.1", "mtp.layers.0"):
        of_layer = {}
        for name, shape in dict(gate=(INNER, HIDDEN), up=(INNER, HIDDEN), down=(HIDDEN, INNER)).items():
            of_layer |= _upcycled([f"{layer}.mlp.experts.{i}.{name}_proj.weight" for i in range(3)], shape, random)
        if layer == "model.layers.1":
            matrices = list(of_layer.values())
            gate, up, down = (torch.stack(matrices[i : i + 3]) for i in (0, 3, 6))
            of_layer = {
                f"{layer}.mlp.experts.gate_up_proj": torch.cat((gate, up), dim=1),
                f"{layer}.mlp.experts.down_proj": down,
            }
        tensors |= of_layer | {f"{layer}.mlp.gate.weight": torch.randn(3, HIDDEN, generator=random)}
    config = dict(
        model_type="qwen3_moe",
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_hidden_layers=2,
        num_experts=3,
        hidden_act="silu",
    )
    return write(folder, config, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def _frame(layers: int) -> dict[str, Tensor]:
    """Something beside the experts, to be copied."""
    tensors = {"model.embed_tokens.weight": torch.ones(VOCAB, HIDDEN), "lm_head.weight": torch.ones(VOCAB, HIDDEN)}
    norms = {f"model.layers.{layer}.input_layernorm.weight": torch.ones(HIDDEN) for layer in range(layers)}
    return tensors | norms


def _upcycled(names: list[str], shape: tuple[int, ...], random: torch.Generator) -> dict[str, Tensor]:
    base = 0.3 * torch.randn(shape, generator=random)
    return {name: base + 0.01 * torch.randn(shape, generator=random) for name in names}


def reshard(folder: Path, count: int) -> None:
    """Turn a folder's model.safetensors into `count` shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
