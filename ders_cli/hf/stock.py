"""Where a stock experts module of transformers keeps its matrices, and where such modules stand in a model.

Nearly all are of one kind, made by `use_experts_implementation`: stacked tensors, and flags that say how. Those run
packed. DbrxExperts, JetMoeMoE and Llama4TextExperts are called in ways of their own; they can only be filled.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, UnsupportedError
from ..layouts import ExpertGroup

FLAGS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")
STACKED = ("gate_up_proj", "up_proj", "down_proj")


def locate(model: PreTrainedModel, path: str) -> tuple[str, nn.Module] | None:
    """The module that a checkpoint calls `path`, and its path in `model`: with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for name in (path, path.removeprefix(prefix), prefix + path):
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    return None


def is_common(module: nn.Module) -> bool:
    """Whether DersExperts can stand in for the module: forward(hidden, top_k_index, top_k_weights), and no more."""
    return all(hasattr(module, flag) for flag in FLAGS) and not getattr(module, "has_post_expert_norm", False)


def weight_parameters(path: str, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of the parameters that hold expert matrices. Raises UnsupportedError on an unknown module."""
    match type(module).__name__:
        case "DbrxExperts":
            return [(module.mlp, name) for name in ("w1", "v1", "w2")]
        case "JetMoeMoE":
            return [(module.input_linear, "weight"), (module.output_linear, "weight")]
        case "Llama4TextExperts":
            return [(module, "gate_up_proj"), (module, "down_proj")]
    if not is_common(module):
        raise UnsupportedError(
            f"{path}: {type(module).__name__} keeps its experts in a way that ders does not know; "
            "`ders restore` gives a checkpoint that stock transformers loads"
        )
    return [(module, name) for name in STACKED if name in module._parameters]


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """{projection: view [E, out, in]} of the parameters that `weight_parameters` names."""
    match type(module).__name__:
        case "DbrxExperts":
            shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
            gate, up, down = (getattr(module.mlp, name).detach().view(shape) for name in ("w1", "v1", "w2"))
            return {"gate": gate, "up": up, "down": down.mT}
        case "JetMoeMoE":
            return _split(module.input_linear.weight, module.output_linear.weight, False, True)
        case "Llama4TextExperts":
            return _split(module.gate_up_proj, module.down_proj, True, True)
    if not module.has_gate:
        up, down = module.up_proj.detach(), module.down_proj.detach()
        return {"up": up.mT, "down": down.mT} if module.is_transposed else {"up": up, "down": down}
    return _split(module.gate_up_proj, module.down_proj, module.is_transposed, module.is_concatenated)


def _split(gate_up: Tensor, down: Tensor, transposed: bool, concatenated: bool) -> dict[str, Tensor]:
    gate_up, down = (t.detach().mT if transposed else t.detach() for t in (gate_up, down))
    gate, up = gate_up.chunk(2, dim=1) if concatenated else (gate_up[:, ::2], gate_up[:, 1::2])
    return {"gate": gate, "up": up, "down": down}


def check_shapes(path: str, module: nn.Module, groups: list[ExpertGroup]) -> None:
    """Raise CheckpointError unless the groups are just the experts that the model has room for."""
    for projection, view in matrices(module).items():
        own = [group for group in groups if group.projection == projection]
        found = sorted(int(label) for group in own for label, _ in group.members if label.isdecimal())
        shapes = {group.shape for group in own}
        if found != list(range(view.shape[0])) or shapes != {tuple(view.shape[1:])}:
            raise CheckpointError(
                f"{path}: expected {view.shape[0]} experts with {projection} matrices {list(view.shape[1:])} "
                f"(config.json), ders.json has {len(found)} of {', '.join(str(list(s)) for s in sorted(shapes))}"
            )
