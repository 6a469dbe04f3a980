import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ders_cli.architectures import ARCHITECTURES
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.errors import CheckpointError, UnsupportedError
from ders_cli.layouts import ExpertGroup, Layout, MatrixView, find_dense, find_layout

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in tensors.items()}


def lay_out(folder: Path, **more) -> tuple[Layout, dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    return find_layout(specs(tensors), json.loads((folder / "config.json").read_text()), **more), tensors


def read(tensors: dict[str, torch.Tensor], view: MatrixView) -> torch.Tensor:
    """The matrix a view shows, by the definition of its fields."""
    tensor = tensors[view.tensor]
    offset = tensor.storage_offset() + view.offset
    return torch.as_strided(tensor, view.shape, (view.row_stride, view.column_stride), offset)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name, fused) -> (folder, model), made once."""

    @cache
    def make(name: str, fused: bool = False):
        folder = tmp_path_factory.mktemp(name)
        return folder, toy.make(name, folder, fused=fused)

    return make


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Layouts without a transformers class: {name: folder}."""
    folder = tmp_path_factory.mktemp("by-hand")
    toy.moe_llava(folder / "moe-llava")
    toy.moe_llava(folder / "moe-llava-phi", "phi")
    toy.moe_llava(folder / "med-moe", meta=True)
    toy.moe_llava(folder / "med-moe-phi", "phi", meta=True)
    toy.xft(folder / "xft")
    toy.mixed(folder / "mixed")
    return {path.name: path for path in folder.iterdir()}


BY_HAND = ("moe-llava", "moe-llava-phi", "med-moe", "med-moe-phi", "xft", "mixed")
both_forms = pytest.mark.parametrize("fused", [False, True], ids=["original", "fused"])
every_model = pytest.mark.parametrize("name", toy.MODELS)


# --- what is found is what the model computes with ---


@every_model
@both_forms
def test_views_show_the_matrices_of_the_model(saved, name, fused):
    folder, model = saved(name, fused)
    layout, tensors = lay_out(folder)
    truth = dict(toy.experts(model))
    assert layout.name == name
    assert {group.name for group in layout.groups} == set(truth)
    for group in layout.groups:
        assert [label for label, _ in group.members] == [str(i) for i in range(len(truth[group.name]))]
        for (_, view), matrix in zip(group.members, truth[group.name], strict=True):
            assert view.shape == group.shape == matrix.shape
            assert torch.equal(read(tensors, view), matrix)
        assert f".{group.layer}." in group.name and group.name.endswith(f".{group.projection}_proj")
        assert group.dtype == "F32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_files(tmp_path, dtype):
    model = toy.make("gpt_oss", tmp_path, dtype=dtype)
    layout, tensors = lay_out(tmp_path)
    truth = dict(toy.experts(model))
    for group in layout.groups:
        assert group.dtype == DTYPES[dtype]
        assert torch.equal(read(tensors, group.members[-1][1]), truth[group.name][-1])


def assert_views_tile(layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
    seen = defaultdict(list)
    for group in layout.groups:
        for _, view in group.members:
            rows, columns = (np.arange(n) for n in view.shape)
            places = view.offset + np.add.outer(rows * view.row_stride, columns * view.column_stride)
            seen[view.tensor].append(places.ravel())
    for tensor, places in seen.items():
        assert np.array_equal(np.sort(np.concatenate(places)), np.arange(tensors[tensor].numel())), tensor


@every_model
@both_forms
def test_views_cover_each_stored_element_once(saved, name, fused):
    assert_views_tile(*lay_out(saved(name, fused)[0]))


@pytest.mark.parametrize("name", BY_HAND)
def test_views_cover_each_stored_element_once_by_hand(by_hand, name):
    assert_views_tile(*lay_out(by_hand[name]))


@every_model
def test_both_forms_have_the_same_names(saved, name):
    original, original_tensors = lay_out(saved(name)[0])
    fused, fused_tensors = lay_out(saved(name, True)[0])
    assert [group.name for group in original.groups] == [group.name for group in fused.groups]
    canonical = []
    for layout, tensors in ((original, original_tensors), (fused, fused_tensors)):
        used = {view.tensor for group in layout.groups for _, view in group.members}
        canonical.append({layout.aliases.get(other, other): tensors[other] for other in tensors if other not in used})
    assert canonical[0].keys() == canonical[1].keys()
    assert all(torch.equal(tensor, canonical[1][other]) for other, tensor in canonical[0].items())


@every_model
@both_forms
def test_a_guard_makes_stock_loading_raise(saved, tmp_path, name, fused):
    from transformers import AutoModelForCausalLM

    folder, _ = saved(name, fused)
    layout, tensors = lay_out(folder)
    experts = {view.tensor for group in layout.groups for _, view in group.members}
    rest = {other: tensor for other, tensor in tensors.items() if other not in experts}
    assert len(layout.guards) == len({group.name.rpartition(".")[0] for group in layout.groups})
    guarded = rest | {layout.guards[-1]: torch.zeros(25, dtype=torch.uint8)}
    assert len(guarded) == len(rest) + 1
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(guarded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- the same by computation: one orientation each ---


def run_one_expert(name: str, model, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, hidden] through one expert of transformers' own module."""
    if name == "jetmoe":
        moe = model.model.layers[layer].mlp
        outputs = []
        for token in x:  # the router is made to choose the expert for this very token
            moe.router.layer.weight.zero_()[expert] = token
            outputs.append(moe(token[None, None])[0, 0] - moe.bias)
        return torch.stack(outputs)
    layers = model.transformer.blocks if name == "dbrx" else model.model.layers
    experts = next(m for n, m in layers[layer].named_modules() if n.endswith("experts") and "shared" not in n)
    if name == "llama4_text":  # takes tokens sorted by expert, equally many for each
        return experts(x.repeat(experts.num_experts, 1)).view(experts.num_experts, *x.shape)[expert]
    if name == "dbrx":
        x = x[None]
    chosen = torch.full((x.shape[-2], 1), expert)
    return experts(x, chosen, torch.ones(chosen.shape)).reshape(-1, x.shape[-1])


@torch.no_grad()
@both_forms
@pytest.mark.parametrize(
    "name", ["mixtral", "jamba", "granitemoe", "jetmoe", "gemma4_text", "gpt_oss", "llama4_text", "dbrx", "nemotron_h"]
)
def test_the_ffn_through_the_views_is_the_models(tmp_path, name, fused):
    from transformers.activations import ACT2FN

    more = {"num_experts_per_tok": 1} if name == "jetmoe" else {}
    model = toy.make(name, tmp_path, fused=fused, **more)
    if hasattr(model, "set_experts_implementation") and name not in ("jetmoe", "llama4_text", "dbrx"):
        model.set_experts_implementation("eager")
    layout, tensors = lay_out(tmp_path)
    layer, expert = layout.groups[-1].layer, 1
    weight = {g.projection: read(tensors, g.members[expert][1]) for g in layout.groups if g.layer == layer}
    x = torch.randn(5, toy.HIDDEN, generator=torch.Generator().manual_seed(1))
    if layout.activation == "gpt_oss":
        bias = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"][expert]
        gate = (x @ weight["gate"].T + bias[::2]).clamp(max=7.0)
        up = (x @ weight["up"].T + bias[1::2]).clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        y = hidden @ weight["down"].T + tensors[f"model.layers.{layer}.mlp.experts.down_proj_bias"][expert]
    elif "gate" in weight:
        y = (ACT2FN[layout.activation](x @ weight["gate"].T) * (x @ weight["up"].T)) @ weight["down"].T
    else:
        y = ACT2FN[layout.activation](x @ weight["up"].T) @ weight["down"].T
    # fp32 sums of 43 terms of size 1 in two orders; gate and up swapped would be off by 1
    torch.testing.assert_close(run_one_expert(name, model, layer, expert, x), y, atol=2e-5, rtol=1e-5)


# --- the rows themselves ---


@pytest.mark.parametrize("config, activation", [
    ({"model_type": "qwen3_moe", "hidden_act": "relu"}, "relu"), ({"model_type": "qwen3_moe"}, "silu"),
    ({"model_type": "x", "text_config": {"model_type": "qwen3_moe", "hidden_act": "gelu"}}, "gelu"),
])  # fmt: skip
def test_activation_is_the_configs(config, activation):
    assert find_layout(linear_specs(), config).activation == activation


@pytest.mark.parametrize("name, config, activation", [
    ("gemma4_text", {}, "gelu_pytorch_tanh"), ("gemma4_text", {"hidden_activation": "relu"}, "relu"),
    ("jetmoe", {"activation_function": "gelu"}, "gelu"), ("nemotron_h", {"mlp_hidden_act": "silu"}, "silu"),
    ("dbrx", {"ffn_config": {"moe_num_experts": 3, "ffn_act_fn": {"name": "gelu"}}}, "gelu"),
    ("gpt_oss", {"hidden_act": "silu"}, "gpt_oss"), ("lfm2_moe", {"hidden_act": "gelu"}, "silu"),
])  # fmt: skip
def test_activation_has_several_keys(saved, name, config, activation):
    tensors = load_file(saved(name)[0] / "model.safetensors")
    assert find_layout(specs(tensors), {"model_type": name} | config).activation == activation


def test_experts_and_layers_are_in_numeric_order():
    tensors = dict(sorted(linear_specs(layers=11, count=11).items(), reverse=True))
    layout = find_layout(tensors, {"model_type": "qwen3_moe"})
    assert [group.layer for group in layout.groups[::3]] == list(range(11))
    assert [group.projection for group in layout.groups[:3]] == ["gate", "up", "down"]
    for group in layout.groups:
        assert [label for label, _ in group.members] == [str(i) for i in range(11)]
        assert all(f".experts.{label}." in view.tensor for label, view in group.members)


def test_rows_are_sourced_and_no_model_type_is_twice():
    types = [model_type for row in ARCHITECTURES for model_type in row.model_types]
    assert len(types) == len(set(types))
    assert all(row.source for row in ARCHITECTURES)


@pytest.mark.parametrize("row", [r for r in ARCHITECTURES if "conversion_mapping" in r.source], ids=lambda r: r.source)
def test_rows_agree_with_how_transformers_converts(row):
    """Each stock model_type of the row stacks what the row says into what the row guards."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in row.model_types:
        mapping = get_checkpoint_conversion_mapping(model_type)
        if mapping is None:  # a remote class (kimi_k2), or the multimodal shell of a text model
            assert model_type not in CONFIG_MAPPING or hasattr(CONFIG_MAPPING[model_type], "sub_configs"), model_type
            continue
        targets = {t.lstrip(".") for rule in mapping for t in rule.target_patterns}
        sources = {s.replace("\\", "").lstrip(".") for rule in mapping for s in rule.source_patterns}
        # Mixtral's rules leave the module out: ".experts.*.w1.weight"
        names = {name.replace("{}", "*") for s in row.storages for name in s.names().values()} | {row.guard}
        names |= {name.split(".", 1)[1] for name in names}
        assert targets & names and sources & names, model_type


# --- layouts without a transformers class ---


@pytest.mark.parametrize("name, projections", [("moe-llava", "gate up down"), ("moe-llava-phi", "up down")])
def test_moe_llava(by_hand, name, projections):
    layout, tensors = lay_out(by_hand[name])
    moe = "mlp.deepspeed_moe.experts.deepspeed_experts"
    expected = [f"model.layers.{layer}.{moe}.{p}_proj" for layer in (0, 2) for p in projections.split()]
    assert [group.name for group in layout.groups] == expected
    stored = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    stored = {"up": "fc1", "down": "fc2"} if name.endswith("phi") else stored
    for group in layout.groups:
        for i, (label, view) in enumerate(group.members):
            tensor = f"model.layers.{group.layer}.{moe}.{i}.{stored[group.projection]}.weight"
            assert (label, view.tensor) == (str(i), tensor)
            assert torch.equal(read(tensors, view), tensors[view.tensor])
    assert layout.activation == ("gelu_new" if name.endswith("phi") else "silu")
    assert layout.guards == tuple(f"model.layers.{n}.{moe}.0.{next(iter(stored.values()))}.weight" for n in (0, 2))


def test_the_first_qwens_w1_is_up(tmp_path):
    names = dict(gate="w2", up="w1", down="c_proj")
    shapes = dict(gate=(6, 4), up=(6, 4), down=(4, 6))
    moe = "transformer.h.3.mlp.deepspeed_moe.experts.deepspeed_experts"
    tensors = {f"{moe}.{i}.{names[p]}.weight": TensorSpec(shapes[p], "BF16") for i in range(2) for p in names}
    layout = find_layout(tensors, {"model_type": "moe_llava_qwen", "moe": {"num_experts": [2]}})
    assert {g.projection: g.members[1][1].tensor for g in layout.groups} == {
        p: f"{moe}.1.{names[p]}.weight" for p in names
    }


def test_xft_leaves_the_universal_expert_alone(by_hand):
    layout, tensors = lay_out(by_hand["xft"])
    assert len(layout.groups) == 6
    for group in layout.groups:
        prefix = f"model.layers.{group.layer}.mlp.calculator.experts.weight_{group.projection}"
        stored = [(label, view.tensor) for label, view in group.members]
        assert stored == [(str(i), f"{prefix}.{i + 1}.weight") for i in range(3)]
        assert torch.equal(read(tensors, group.members[0][1]), tensors[f"{prefix}.1.weight"])
    # not expert 0's: that tensor stays, and the guard would have its name
    assert layout.guards == tuple(f"model.layers.{n}.mlp.calculator.experts.weight_gate.1.weight" for n in range(2))


def test_mixed_forms_and_stems(by_hand):
    layout, tensors = lay_out(by_hand["mixed"])
    stems = [f"{stem}.mlp.experts" for stem in ("model.layers.0", "model.layers.1", "mtp.layers.0")]
    assert [g.name for g in layout.groups] == [f"{s}.{p}_proj" for s in stems for p in ("gate", "up", "down")]
    assert layout.guards == tuple(f"{s}.gate_up_proj" for s in stems)
    stacked = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(read(tensors, layout.groups[4].members[2][1]), stacked[2, toy.INNER :])


# --- shared experts ---

SHARED = {
    "qwen2_moe": "mlp.shared_expert.{}_proj.weight",
    "deepseek_v3": "mlp.shared_experts.{}_proj.weight",
    "hunyuan_v1_moe": "mlp.shared_mlp.{}_proj.weight",
    "llama4_text": "feed_forward.shared_expert.{}_proj.weight",
    "nemotron_h": "mixer.shared_experts.{}_proj.weight",
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_expert_is_left_alone_or_the_last_member(saved, name):
    folder, _ = saved(name)
    without, tensors = lay_out(folder)
    layout, _ = lay_out(folder, include_shared=True)
    for group, plain in zip(layout.groups, without.groups, strict=True):
        assert group.members[:-1] == plain.members
        label, view = group.members[-1]
        assert label == "shared" and view.tensor.endswith(SHARED[name].format(group.projection))
        assert torch.equal(read(tensors, view), tensors[view.tensor])
    assert_views_tile(layout, tensors)


def test_shared_expert_of_granite_is_fused(saved):
    folder, model = saved("granitemoeshared")
    layout, tensors = lay_out(folder, include_shared=True)
    gate, up = model.model.layers[1].shared_mlp.input_linear.weight.chunk(2)
    shared = {g.projection: read(tensors, g.members[-1][1]) for g in layout.groups if g.layer == 1}
    assert torch.equal(shared["gate"], gate) and torch.equal(shared["up"], up)
    assert torch.equal(shared["down"], model.model.layers[1].shared_mlp.output_linear.weight)
    assert_views_tile(layout, tensors)


@pytest.mark.parametrize("name, tensor", [
    ("med-moe", "mlp.meta_moe.{}_proj.weight"), ("med-moe-phi", "mlp.meta_moe.fc"),
    ("xft", "mlp.calculator.experts.weight_{}.0.weight"),
])  # fmt: skip
def test_universal_expert_can_be_included(by_hand, name, tensor):
    layout, tensors = lay_out(by_hand[name], include_shared=True)
    for group in layout.groups:
        assert [label for label, _ in group.members] == ["0", "1", "2", "shared"]
        assert tensor.format(group.projection) in group.members[-1][1].tensor
    assert_views_tile(layout, tensors)


# --- other tools' names, other orientations, unknown models ---


def config_of(folder: Path, **more) -> dict:
    return json.loads((folder / "config.json").read_text()) | more


def test_mixtral_under_the_names_of_other_tools(saved):
    folder, _ = saved("mixtral")
    layout, tensors = lay_out(folder)
    for names in ({".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}, {}):
        renamed = {}
        for name, tensor in tensors.items():
            for old, new in (names | {"block_sparse_moe.": "mlp."}).items():
                name = name.replace(old, new)
            renamed[name] = tensor
        other = find_layout(specs(renamed), config_of(folder))
        assert [group.name for group in other.groups] == [group.name for group in layout.groups]
        for group, same in zip(other.groups, layout.groups, strict=True):
            assert torch.equal(read(renamed, group.members[2][1]), read(tensors, same.members[2][1]))


@pytest.mark.parametrize("transposed", [True, False])
def test_qwen3_vl_is_stored_both_ways(saved, transposed):
    folder, model = saved("qwen3_moe", True)
    tensors = load_file(folder / "model.safetensors")
    if transposed:
        tensors = {name: t.mT.contiguous() if t.ndim == 3 else t for name, t in tensors.items()}
    tensors = {name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()}
    text = config_of(folder, model_type="qwen3_vl_moe_text")
    layout = find_layout(specs(tensors), {"model_type": "qwen3_vl_moe", "text_config": text})
    assert layout.name == "qwen3_vl_moe"
    truth = dict(toy.experts(model))
    for group in layout.groups:
        matrices = truth[group.name.replace("language_model.", "")]
        assert all(torch.equal(read(tensors, view), m) for (_, view), m in zip(group.members, matrices, strict=True))


def test_a_model_type_may_stand_in_the_text_config_only(saved):
    folder, _ = saved("mixtral")
    tensors = {f"language_model.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
    config = {"model_type": "some_vl", "text_config": config_of(folder, hidden_act="gelu"), "hidden_size": 7}
    layout = find_layout(specs(tensors), config)
    assert (layout.name, layout.activation) == ("mixtral", "gelu")
    assert layout.groups[0].name == "language_model.model.layers.0.mlp.experts.gate_proj"


@pytest.mark.parametrize("name, module", [
    ("mixtral", "block_sparse_moe.experts"), ("qwen3_moe", "mlp.experts"), ("jamba", "feed_forward.experts"),
    ("nemotron_h", "mixer.experts"),
])  # fmt: skip
def test_linear_experts_of_an_unknown_model(saved, name, module):
    folder, model = saved(name)
    tensors = load_file(folder / "model.safetensors")
    layout = find_layout(specs(tensors), config_of(folder, model_type="brand_new"))
    assert {g.name.split(".", 3)[3].rpartition(".")[0] for g in layout.groups} == {module}
    for group, (_, matrices) in zip(layout.groups, toy.experts(model), strict=True):
        assert torch.equal(read(tensors, group.members[1][1]), matrices[1])
    assert layout.guards[0] == layout.groups[0].members[0][1].tensor


# --- errors: one line, an exit code, the tensor's name ---


def fails(error: type, tensors: dict, config: dict, *texts: str, **more) -> None:
    with pytest.raises(error) as caught:
        find_layout(tensors, config, **more)
    message = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in message
    for text in texts:
        assert text in message, message


def linear_specs(layers: int = 2, count: int = 4) -> dict[str, TensorSpec]:
    shapes = dict(gate=(6, 4), up=(6, 4), down=(4, 6))
    return {
        f"model.layers.{layer}.mlp.experts.{i}.{p}_proj.weight": TensorSpec(shape, "BF16")
        for layer in range(layers) for i in range(count) for p, shape in shapes.items()
    }  # fmt: skip


def stacked_specs(count: int = 4) -> dict[str, TensorSpec]:
    experts = "model.layers.0.mlp.experts"
    return {
        f"{experts}.gate_up_proj": TensorSpec((count, 12, 4), "BF16"),
        f"{experts}.down_proj": TensorSpec((count, 4, 6), "BF16"),
    }


QWEN3 = {"model_type": "qwen3_moe", "num_experts": 4}
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def without(tensors: dict, *parts: str) -> dict:
    return {name: spec for name, spec in tensors.items() if not any(part in name for part in parts)}


def test_missing_tensors():
    tensors, stacked = linear_specs(), stacked_specs()
    fails(CheckpointError, without(tensors, UP), QWEN3, f"{UP}: missing; layer 1 has experts 0..3 otherwise")
    gone = "model.layers.1.mlp.experts.2.gate_proj.weight: missing; layer 1 has experts 0..3"
    fails(CheckpointError, without(tensors, "1.mlp.experts.2."), QWEN3, gone)
    gone = "model.layers.0.mlp.experts.0.down_proj.weight: missing"
    fails(CheckpointError, without(tensors, "0.mlp.experts.0.down", "0.mlp.experts.1.down"), QWEN3, gone)
    gone = "model.layers.1.mlp.experts.0.gate_proj.weight: missing"
    fails(CheckpointError, without(tensors, *(f"1.mlp.experts.{i}.gate" for i in range(4))), QWEN3, gone)
    gone = "model.layers.0.mlp.experts.down_proj: missing; layer 0 has experts 0..3"
    fails(CheckpointError, without(stacked, "down"), QWEN3, gone)
    short = stacked | {"model.layers.0.mlp.experts.down_proj": TensorSpec((3, 4, 6), "BF16")}
    fails(CheckpointError, short, QWEN3, "model.layers.0.mlp.experts.down_proj: has only 3;")
    # no model_type to go by, but another layer has gates
    no_gates = without(tensors, *(f"1.mlp.experts.{i}.gate" for i in range(4)))
    fails(CheckpointError, no_gates, {}, "model.layers.1.mlp.experts.0.gate_proj.weight: missing")
    universal = "model.layers.0.mlp.calculator.experts.weight_{}.0.weight"
    xft = {universal.format(p): TensorSpec((4, 4), "F16") for p in ("gate", "up", "down")}
    fails(CheckpointError, xft, {"model_type": "llama_moe_upscaling"}, "weight_gate.1.weight: missing")


def test_the_last_expert_is_missed_by_the_configs_count():
    last = "model.layers.0.mlp.experts.2.up_proj.weight"
    fails(CheckpointError, linear_specs(count=3), QWEN3, last, "4 experts", "num_experts", "got 3")
    text = {"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 4}}
    fails(CheckpointError, stacked_specs(3), text, "model.layers.0.mlp.experts.gate_up_proj", "4 experts", "got 3")
    find_layout(linear_specs(count=3), {"model_type": "qwen3_moe"})


def test_wrong_shapes():
    for shape, text in [((6, 5), "expected gate or up [6, 4]"), ((4, 6, 4), "expected 2 axes, got shape [4, 6, 4]"),
                        ((24,), "expected 2 axes"), ((0, 4), "empty")]:  # fmt: skip
        fails(CheckpointError, linear_specs() | {UP: TensorSpec(shape, "BF16")}, QWEN3, f"{UP}: ", text)
    down = UP.replace("up", "down")
    turned = linear_specs() | {down: TensorSpec((6, 4), "BF16")}
    fails(CheckpointError, turned, QWEN3, f"{down}: expected down [4, 6]")
    gate_up = "model.layers.0.mlp.experts.gate_up_proj"
    odd = stacked_specs() | {gate_up: TensorSpec((4, 11, 4), "BF16")}
    fails(CheckpointError, odd, QWEN3, f"{gate_up}: expected gate and up side by side, got an odd 11")
    flat = stacked_specs() | {gate_up: TensorSpec((48, 4), "BF16")}
    fails(CheckpointError, flat, QWEN3, f"{gate_up}: expected 3 axes, got shape [48, 4]")


def test_a_stacked_file_turned_round_is_refused():
    """Hub files of Llama 4 are [E, in, out]; one stored [E, out, in] must not be read as if it were."""
    turned = {name.replace("mlp", "feed_forward"): spec for name, spec in stacked_specs().items()}
    down = "model.layers.0.feed_forward.experts.down_proj"
    fails(CheckpointError, turned, {"model_type": "llama4_text"}, f"{down}: expected")
    neither = stacked_specs() | {"model.layers.0.mlp.experts.down_proj": TensorSpec((4, 5, 7), "BF16")}
    fails(CheckpointError, neither, {"model_type": "qwen3_vl_moe"}, "model.layers.0.mlp.experts.down_proj: expected")


def test_an_expert_stored_twice():
    twice = linear_specs() | stacked_specs()
    fails(CheckpointError, twice, QWEN3, "model.layers.0.mlp.experts.gate_up_proj: expert 0 is also in "
          "model.layers.0.mlp.experts.0.gate_proj.weight")  # fmt: skip


def test_dbrx_needs_its_count():
    mlp = "transformer.blocks.0.ffn.experts.mlp"
    tensors = {f"{mlp}.{w}": TensorSpec((12, 5), "BF16") for w in ("w1", "v1", "w2")}
    fails(CheckpointError, tensors, {"model_type": "dbrx"}, f"{mlp}.w1: 12 rows", "None experts")
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 5}}
    fails(CheckpointError, tensors, config, f"{mlp}.w1: 12 rows", "5 experts")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "brand_new"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8", "F64"])
def test_experts_of_other_dtypes(model_type, dtype):
    tensors = linear_specs() | {UP: TensorSpec((6, 4), dtype)}
    fails(UnsupportedError, tensors, {"model_type": model_type}, f"{UP}: ", dtype, "dequantise")


def test_packed_experts():
    experts = "model.layers.0.mlp.experts"
    mxfp4 = {
        f"{experts}.{p}_{part}": TensorSpec(shape, "U8")
        for p in ("gate_up_proj", "down_proj") for part, shape in (("blocks", (4, 12, 1, 16)), ("scales", (4, 12, 1)))
    } | {f"{experts}.gate_up_proj_bias": TensorSpec((4, 12), "BF16")}  # fmt: skip
    fails(UnsupportedError, mxfp4, {"model_type": "gpt_oss"}, f"{experts}.gate_up_proj_blocks: ", "U8", "dequantise")
    for model_type in ("qwen3_moe", "brand_new"):
        for ending, dtype in ((".weight_packed", "I32"), (".qweight", "I32")):
            packed = {name.replace(".weight", ending): TensorSpec((4, 4), dtype) for name in linear_specs()}
            name = f"{experts}.0.gate_proj{ending}: "
            fails(UnsupportedError, packed, {"model_type": model_type}, name, dtype, "dequantise")


def test_experts_of_two_dtypes():
    fails(CheckpointError, linear_specs() | {UP: TensorSpec((6, 4), "F32")}, QWEN3, UP, "F32", "BF16")


def test_stacked_experts_of_an_unknown_model():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    fails(UnsupportedError, stacked_specs(), {"model_type": "brand_new"}, name, "brand_new", "[4, 12, 4]")


def test_dense_models(tmp_path):
    toy.dense(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fails(UnsupportedError, specs(tensors), config_of(tmp_path), "'llama' has no experts", "dense")
    fails(UnsupportedError, specs(tensors), config_of(tmp_path, model_type="mixtral"), "'mixtral' has no experts")
    fails(UnsupportedError, {}, {}, "'unknown' has no experts")


def test_shared_experts_that_cannot_be_included(saved, tmp_path):
    shared = "model.layers.0.mlp.shared_expert"
    tensors = linear_specs(1) | {f"{shared}.{p}_proj.weight": TensorSpec((12, 4), "BF16") for p in ("gate", "up")}
    complete = tensors | {f"{shared}.down_proj.weight": TensorSpec((4, 12), "BF16")}
    expert = "model.layers.0.mlp.experts.0.up_proj.weight"
    texts = f"{shared}.gate_proj.weight", expert, "[12, 4]", "[6, 4]"
    fails(UnsupportedError, complete, QWEN3, *texts, include_shared=True)
    fails(CheckpointError, tensors, QWEN3, f"{shared}.down_proj.weight: missing", include_shared=True)
    fails(UnsupportedError, linear_specs(1), QWEN3, "model.layers.0.mlp", "no shared expert", include_shared=True)
    find_layout(tensors, QWEN3)


# --- the dense model that was upcycled ---


@pytest.mark.parametrize("moe, name, more", [
    ("mixtral", "llama", {}), ("qwen3_moe", "qwen3", dict(head_dim=10, num_hidden_layers=3)), ("mixtral", "phi3", {}),
    ("lfm2_moe", "lfm2", dict(block_auto_adjust_ff_dim=False)), ("granitemoe", "granite", {}),
])  # fmt: skip
def test_find_dense(saved, tmp_path, moe, name, more):
    model = toy.dense(tmp_path, name, **more)
    tensors, config = load_file(tmp_path / "model.safetensors"), config_of(tmp_path)
    for group in lay_out(saved(moe)[0])[0].groups:
        layer = model.model.layers[group.layer]
        mlp = layer.feed_forward if name == "lfm2" else layer.mlp
        if name == "phi3":
            gate, up = mlp.gate_up_proj.weight.chunk(2)
            truth = dict(gate=gate, up=up, down=mlp.down_proj.weight)
        elif name == "lfm2":
            truth = dict(gate=mlp.w1.weight, up=mlp.w3.weight, down=mlp.w2.weight)
        else:
            truth = dict(gate=mlp.gate_proj.weight, up=mlp.up_proj.weight, down=mlp.down_proj.weight)
        assert torch.equal(read(tensors, find_dense(group, specs(tensors), config)), truth[group.projection])


def test_find_dense_phi(by_hand, tmp_path):
    model = toy.dense(tmp_path, "phi", num_hidden_layers=3)
    tensors, config = load_file(tmp_path / "model.safetensors"), config_of(tmp_path)
    for group in lay_out(by_hand["moe-llava-phi"])[0].groups:
        mlp = model.model.layers[group.layer].mlp
        truth = {"up": mlp.fc1.weight, "down": mlp.fc2.weight}[group.projection]
        assert torch.equal(read(tensors, find_dense(group, specs(tensors), config)), truth)


def group_of(name: str, shape: tuple[int, int] = (6, 4)) -> ExpertGroup:
    view = MatrixView(name.replace("up_proj", "0.up_proj.weight"), shape, 0, shape[1], 1)
    return ExpertGroup(name, int(name.split(".layers.")[1].split(".")[0]), "up", "BF16", (("0", view),))


def test_find_dense_by_other_stems():
    group = group_of("model.layers.1.mlp.experts.up_proj")
    for stem in ("model.layers", "model.language_model.layers", "language_model.model.layers"):
        tensors = {f"{stem}.{n}.mlp.up_proj.weight": TensorSpec((6, 4), "BF16") for n in range(2)}
        assert find_dense(group, tensors, {}).tensor == f"{stem}.1.mlp.up_proj.weight"
    # the layer for multi-token prediction isn't the decoder's layer of that number
    with pytest.raises(CheckpointError, match=r"^mtp\.layers\.1\.mlp\.up_proj\.weight: missing"):
        find_dense(group_of("mtp.layers.1.mlp.experts.up_proj"), tensors, {})


@pytest.mark.parametrize("tensors, error, text", [
    ({}, CheckpointError, "missing"),
    ({"model.layers.1.mlp.up_proj.weight": TensorSpec((7, 4), "BF16")}, CheckpointError, "expected [6, 4]"),
    ({"model.layers.1.mlp.up_proj.weight": TensorSpec((24,), "BF16")}, CheckpointError, "expected 2 axes"),
    ({"model.layers.1.mlp.up_proj.weight": TensorSpec((6, 4), "U8")}, UnsupportedError, "U8"),
])  # fmt: skip
def test_find_dense_errors(tensors, error, text):
    with pytest.raises(error) as caught:
        find_dense(group_of("model.layers.1.mlp.experts.up_proj"), tensors, {"model_type": "llama"})
    assert "model.layers.1.mlp.up_proj.weight: " in str(caught.value) and text in str(caught.value)
    if error is CheckpointError and "axes" not in text:
        assert "model.layers.1.mlp.experts.0.up_proj.weight" in str(caught.value)


# --- the toys ---


def test_resharding_keeps_every_tensor(tmp_path):
    model = toy.make("mixtral", tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    toy.reshard(tmp_path, 3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert not (tmp_path / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), before[name])
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


def test_toy_experts_are_upcycled(saved):
    for _, matrices in toy.experts(saved("mixtral")[1]):
        similar = torch.cosine_similarity(matrices[0].flatten(), matrices[1].flatten(), dim=0)
        assert 0.99 < similar < 0.9999
