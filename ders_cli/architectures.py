"""Where the experts of each known architecture lie: rows of data, each with the place its facts were read.

A row says how a layer's experts may be stored (several forms occur for one architecture: transformers saves one
matrix per expert and also reads its own stacked tensors, so hub files have either, or both), which projections share a
tensor, and which are kept transposed. Nothing here is worked out from shapes: an `[E, 64, 64]` tensor can be read two
ways, and both look right. (`either_way` is the one exception, and says why.) To support a new architecture, add a row.

Names are relative to the layer (`model.layers.3.` and so on); `{}` in a name stands for the number of an expert.
"""

from dataclasses import dataclass, replace

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class Storage:
    """One way to store the experts of a layer.

    With `{}` in the names there is one matrix per expert; without, one tensor [E, rows, columns] for all of them, or
    [E*rows, columns] if `flattened`. Gate and up under one name are fused along the out axis, as `fusion` says:
    "concatenated" has all of gate, then all of up; "interleaved" has g0, u0, g1, u1, ...
    """

    up: str
    down: str
    gate: str | None = None  # None: the FFN has no gate
    fusion: str | None = None
    transposed: tuple[str, ...] = ()  # the projections kept as [in, out]; the others are [out, in]
    flattened: bool = False
    either_way: bool = False  # files of both orientations are about; gate_up and down together fit only one
    first: int = 0  # the number of the first routed expert; those below it are shared

    def names(self) -> dict[str, str]:
        """{projection: name}, without the gate if there is none."""
        return {p: name for p in PROJECTIONS if (name := getattr(self, p)) is not None}


@dataclass(frozen=True)
class Architecture:
    """A family of model_types that keep their experts alike."""

    model_types: tuple[str, ...]
    module: str  # of the experts in a layer, as transformers 5.23 has it in memory; names of groups are made with it
    storages: tuple[Storage, ...]
    source: str
    guard: str | None = None  # the stacked tensor that stock loading looks for; None: there is no stock class
    shared: tuple[Storage, ...] = ()  # the first of these that a layer has is its shared expert
    renames: tuple[tuple[str, str], ...] = ()  # dotted parts of names on disk -> in memory
    counts: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    activation: str | None = "hidden_act"  # the config's key
    default_activation: str = "silu"


def linears(module: str, gate: str | None, up: str, down: str) -> Storage:
    """One Linear weight [out, in] per projection and, with `{}` in `module`, per expert."""

    def name(projection: str) -> str:
        return f"{module}.{projection}.weight"

    return Storage(gate=name(gate) if gate else None, up=name(up), down=name(down))


def stacked(module: str, **more) -> Storage:
    """`gate_up_proj` and `down_proj`, each [E, rows, columns]: what transformers has in memory."""
    gate_up = f"{module}.gate_up_proj"
    return Storage(gate=gate_up, up=gate_up, down=f"{module}.down_proj", fusion="concatenated", **more)


GLU = ("gate_proj", "up_proj", "down_proj")
W132 = ("w1", "w3", "w2")

QWEN = Architecture(
    model_types=(
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        "qwen4_exp",
        "qwen4_exp_text",
        "olmoe",
        "flex_olmo",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "kimi_k2",
        "kimi_k25",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm4v_moe_text",
        "glm_moe_dsa",
        "dots1",
        "cohere2_moe",
        "afmoe",
        "mellum",
        "solar_open",
        "mimo_v2_flash",
        "hunyuan_v1_moe",
        "axk1",
        "axk2",
        "flint",
    ),
    module="mlp.experts",
    # the stacked form is also what the hub has of Qwen3.5 and 3.6
    storages=(linears("mlp.experts.{}", *GLU), stacked("mlp.experts")),
    guard="mlp.experts.gate_up_proj",
    shared=(
        linears("mlp.shared_expert", *GLU),
        linears("mlp.shared_experts", *GLU),
        linears("mlp.shared_mlp", *GLU),
    ),
    source="transformers 5.23 conversion_mapping.py 'qwen2_moe'",
)
MIXTRAL = Architecture(
    model_types=("mixtral", "minimax", "minimax_m2"),
    module="mlp.experts",
    # block_sparse_moe: the original files. mlp: saved as transformers 5 has it in memory, or by other tools.
    storages=(
        linears("block_sparse_moe.experts.{}", *W132),
        linears("mlp.experts.{}", *W132),
        linears("mlp.experts.{}", *GLU),
        stacked("mlp.experts"),
        stacked("block_sparse_moe.experts"),
    ),
    guard="mlp.experts.gate_up_proj",
    renames=(("block_sparse_moe.", "mlp."),),
    source="transformers 5.23 conversion_mapping.py 'mixtral'",
)
GRANITE = Architecture(
    model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
    module="block_sparse_moe.experts",
    storages=(
        Storage(
            gate="block_sparse_moe.input_linear.weight",
            up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
            fusion="concatenated",
        ),
        stacked("block_sparse_moe.experts"),
    ),
    guard="block_sparse_moe.input_linear.weight",
    shared=(
        Storage(
            gate="shared_mlp.input_linear.weight",
            up="shared_mlp.input_linear.weight",
            down="shared_mlp.output_linear.weight",
            fusion="concatenated",
        ),
    ),
    renames=(("block_sparse_moe.router.layer.", "block_sparse_moe.router."),),
    source="transformers 5.23 conversion_mapping.py 'granitemoe'; GraniteMoeSharedMLP.forward",
)
DEEPSPEED = "mlp.deepspeed_moe.experts.deepspeed_experts"
CALCULATOR = "mlp.calculator.experts"

ARCHITECTURES: tuple[Architecture, ...] = (
    QWEN,
    replace(
        QWEN,
        model_types=("ernie4_5_moe",),
        renames=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
        source="transformers 5.23 conversion_mapping.py 'ernie4_5_moe'",
    ),
    replace(
        QWEN,
        model_types=("exaone_moe",),
        renames=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),
        source="transformers 5.23 conversion_mapping.py 'exaone_moe'",
    ),
    replace(
        QWEN,
        model_types=("bailing_hybrid",),
        renames=(("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),),
        source="transformers 5.23 conversion_mapping.py 'bailing_hybrid'",
    ),
    replace(
        QWEN,
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        # the hub has [E, in, out], transformers 5 saves [E, out, in], both under the same names
        storages=(linears("mlp.experts.{}", *GLU), stacked("mlp.experts", either_way=True)),
        source="transformers 5.23 conversion_mapping.py 'qwen3_vl_moe': Transpose(check_dims=True)",
    ),
    MIXTRAL,
    replace(
        MIXTRAL,
        model_types=("phimoe",),
        renames=(("block_sparse_moe.gate.", "mlp.router."),),
        source="transformers 5.23 conversion_mapping.py 'phimoe'",
    ),
    Architecture(
        model_types=("lfm2_moe",),
        module="feed_forward.experts",
        storages=(linears("feed_forward.experts.{}", *W132), stacked("feed_forward.experts")),
        guard="feed_forward.experts.gate_up_proj",
        activation=None,
        source="transformers 5.23 conversion_mapping.py 'lfm2_moe'; Lfm2MoeExperts: act_fn is silu, no key for it",
    ),
    Architecture(
        model_types=("jamba",),
        module="feed_forward.experts",
        storages=(linears("feed_forward.experts.{}", *GLU), stacked("feed_forward.experts")),
        guard="feed_forward.experts.gate_up_proj",
        source="transformers 5.23 conversion_mapping.py 'jamba'",
    ),
    GRANITE,
    Architecture(
        model_types=("jetmoe",),
        module="mlp",
        # self_attention.experts is a mixture of attention heads, no FFN: left alone
        storages=(
            Storage(
                gate="mlp.input_linear.weight",
                up="mlp.input_linear.weight",
                down="mlp.output_linear.weight",
                fusion="concatenated",
            ),
        ),
        guard="mlp.input_linear.weight",
        activation="activation_function",
        source="transformers 5.23 JetMoeMoE.forward",
    ),
    Architecture(
        model_types=("gemma4", "gemma4_text"),
        module="experts",
        storages=(stacked("experts"),),
        guard="experts.gate_up_proj",
        activation="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        source="transformers 5.23 Gemma4TextExperts",
    ),
    Architecture(
        model_types=("gpt_oss",),
        module="mlp.experts",
        storages=(replace(stacked("mlp.experts", transposed=PROJECTIONS), fusion="interleaved"),),
        guard="mlp.experts.gate_up_proj",
        # clamped, with (up + 1) and a slope of 1.702: none of the named ones, whatever hidden_act says
        activation=None,
        default_activation="gpt_oss",
        source="transformers 5.23 GptOssExperts._apply_gate",
    ),
    Architecture(
        model_types=("llama4", "llama4_text"),
        module="feed_forward.experts",
        storages=(stacked("feed_forward.experts", transposed=PROJECTIONS),),
        guard="feed_forward.experts.gate_up_proj",
        shared=(linears("feed_forward.shared_expert", *GLU),),
        source="transformers 5.23 Llama4TextExperts.forward",
    ),
    Architecture(
        model_types=("dbrx",),
        module="ffn.experts",
        storages=(
            Storage(
                gate="ffn.experts.mlp.w1",
                up="ffn.experts.mlp.v1",
                down="ffn.experts.mlp.w2",
                transposed=("down",),
                flattened=True,
            ),
        ),
        guard="ffn.experts.mlp.w1",
        counts=("ffn_config.moe_num_experts",),
        activation="ffn_config.ffn_act_fn.name",
        source="transformers 5.23 DbrxExpertGLU.forward: y = h @ w2",
    ),
    Architecture(
        model_types=("nemotron_h",),
        module="mixer.experts",
        storages=(
            linears("mixer.experts.{}", None, "up_proj", "down_proj"),
            Storage(up="mixer.experts.up_proj", down="mixer.experts.down_proj"),
        ),
        guard="mixer.experts.up_proj",
        shared=(linears("mixer.shared_experts", None, "up_proj", "down_proj"),),
        renames=(("backbone.", "model."),),
        activation="mlp_hidden_act",
        default_activation="relu2",
        source="transformers 5.23 conversion_mapping.py 'nemotron_h'",
    ),
    Architecture(
        # Med-MoE uses MoE-LLaVA's model_types
        model_types=(
            "moe_llava_stablelm",
            "moe_llava_phi",
            "moe_llava_qwen",
            "moe_llava_qwen1_5",
            "moe_llava_mistral",
            "moe_llava_minicpm",
            "moe_llava_llama",
        ),
        module=DEEPSPEED,
        storages=(
            linears(DEEPSPEED + ".{}", *GLU),
            linears(DEEPSPEED + ".{}", None, "fc1", "fc2"),  # Phi
            linears(DEEPSPEED + ".{}", "w2", "w1", "c_proj"),  # the first Qwen: y = c_proj(w1 x * silu(w2 x))
        ),
        # meta_moe: Med-MoE's; mlp: DeepSpeed's residual MoE
        shared=(
            linears("mlp.meta_moe", *GLU),
            linears("mlp.meta_moe", None, "fc1", "fc2"),
            linears("mlp.mlp", *GLU),
            linears("mlp.mlp", None, "fc1", "fc2"),
        ),
        counts=("moe.num_experts",),
        source="PKU-YuanGroup/MoE-LLaVA moellava/model/language_model/; jiangsongtao/Med-MoE moe/layer.py",
    ),
    Architecture(
        # gate_type TopKUniversal...: expert 0 sees every token, num_experts counts it
        model_types=("llama_moe_upscaling",),
        module=CALCULATOR,
        storages=(
            Storage(
                gate=CALCULATOR + ".weight_gate.{}.weight",
                up=CALCULATOR + ".weight_up.{}.weight",
                down=CALCULATOR + ".weight_down.{}.weight",
                first=1,
            ),
        ),
        source="ise-uiuc/xft src/magicoder/model/modeling_llama_moe_upscaling_hf.py",
    ),
)

# the FFN of a dense layer: the first of these that has the wanted projection is meant
DENSE: tuple[Storage, ...] = (
    linears("mlp", *GLU),  # llama, mistral, qwen, olmo, granite, ernie, hunyuan, cohere, stablelm
    linears("feed_forward", *W132),  # lfm2
    linears("feed_forward", *GLU),  # jamba
    Storage(  # phi3, glm4
        gate="mlp.gate_up_proj.weight",
        up="mlp.gate_up_proj.weight",
        down="mlp.down_proj.weight",
        fusion="concatenated",
    ),
    linears("mlp", None, "fc1", "fc2"),  # phi
    linears("mlp", "w2", "w1", "c_proj"),  # the first Qwen
    *GRANITE.shared,  # granitemoehybrid without experts
)
