"""from_pretrained on a DeRS folder: packed, one tensor on disk being one parameter, mapped and not copied; or dequantised.

ders.json says which modules `model.layers.N.mlp.experts` there are. Their names are those that transformers has in
memory, so the names of the DeRS tensors are the keys of the state dict, and transformers' own loader does the rest.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..aligned import ORDER, layer_of, order_of
from ..checkpoint.manifest import FORMAT, MANIFEST
from ..codecs.mixed import GroupCodec
from ..errors import CheckpointError, UnsupportedError, UsageError
from ..layouts import PER_LAYER, ExpertGroup
from ..runtime.dtypes import TORCH
from ..runtime.group import runtime_groups, split_name
from ..runtime.mixed import MixedProjection
from ..runtime.projection import DersProjection
from ..source import DersSource
from .blocks import fit_block
from .dequantize import Taken, put_back, take_out
from .experts import HfExperts
from .save import save_pretrained
from .stock import STACKED, check_shapes, is_common, locate

OTHERWISE = 'set "dequantize": true in config.json\'s quantization_config (or DERS_DEQUANTIZE=1), or `ders restore` it'


@dataclass(frozen=True)
class Packed:
    """What a packed model keeps of the folder it came from, to be saved again."""

    manifest: dict[str, Any]
    groups: tuple[ExpertGroup, ...]
    codecs: dict[str, GroupCodec]
    paths: dict[str, str]  # path of an experts module in ders.json -> in the model
    orders: dict[str, torch.Tensor]  # name on disk -> I32 [E, inner]: the order of experts' neurons (aligned.py)


@register_quantization_config("ders")
class DersConfig(QuantizationConfigMixin):
    """`quantization_config` of a DeRS folder. `dequantize`: load as a stock model; also by DERS_DEQUANTIZE=1."""

    def __init__(self, format: int = FORMAT, dequantize: bool = False, **_: Any):
        self.quant_method, self.format = "ders", format
        self.dequantize = dequantize or os.environ.get("DERS_DEQUANTIZE", "0") == "1"

    def to_dict(self) -> dict[str, Any]:
        asked = {"dequantize": True} if self.dequantize else {}
        return {"quant_method": self.quant_method, "format": self.format} | asked


@register_quantizer("ders")
class DersQuantizer(HfQuantizer):
    """The hooks that from_pretrained calls before and after it loads the weights."""

    requires_calibration = True  # a plain model is no DeRS model because a config says so: `ders compress` makes one
    # Trainer asks whether what is trained is what is stored: base, factors and kept values are plain float parameters
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self._folder = _folder_of(model, checkpoint_files)
        with DersSource(self._folder) as source:
            modules = _expert_modules(model, source)
            if self.quantization_config.dequantize:
                if hasattr(model.config, PER_LAYER):
                    raise UnsupportedError(
                        f"{self._folder}: has layers with different numbers of experts, which no stock class has"
                    )
                self._taken: Taken = take_out(model, {path: module for path, (_, module) in modules.items()}, source)
            else:
                self.packed = _pack(model, source, modules)
                self._frozen = [
                    (name, own)
                    for name in self.packed.paths.values()
                    for own, parameter in model.get_submodule(name).named_parameters()
                    if not parameter.requires_grad
                ]
        _ignore_on_load(model, source, modules, self.quantization_config.dequantize)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            with DersSource(self._folder) as source:
                modules = {path: module for path, (_, module) in _expert_modules(model, source).items()}
                put_back(model, self._taken, modules, source)
            model._weight_conversions = None  # saved in the form that is usual for the architecture
            del self._taken
            return model
        for path, name in self._frozen:  # the loader takes every float for trainable
            model.get_submodule(path).get_parameter(name).requires_grad_(False)
        model.save_pretrained = MethodType(save_pretrained, model)
        model.register_load_state_dict_pre_hook(_from_names_on_disk)
        return model


def freeze_base(model: nn.Module) -> None:
    """Train deltas alone: the bases, which all experts of a layer share, get no gradients."""
    for module in model.modules():
        if isinstance(module, DersProjection | MixedProjection):
            module.base.requires_grad_(False)


def _from_names_on_disk(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let load_state_dict take what a saved file holds: Trainer resumes so, and would miss a router of another name."""
    own, packed = model.state_dict(), model.hf_quantizer.packed
    unused = {*packed.manifest["guards"], *packed.orders}
    renamings = [one for one in model._weight_conversions or () if isinstance(one, WeightRenaming)]
    for key in [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in own]:
        name, tensor = key[len(prefix) :], state_dict.pop(key)
        if name not in unused:
            state_dict[prefix + rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]] = tensor


def _folder_of(model: PreTrainedModel, checkpoint_files: list[str] | None) -> Path:
    """The folder of the weights, with ders.json in it; from the hub it is fetched beside them."""
    if not checkpoint_files:
        raise UsageError(
            "ders: from_pretrained was given a state_dict; expected a DeRS folder, whose ders.json says what is in it"
        )
    folder, name = Path(checkpoint_files[0]).parent, model.config._name_or_path
    if not (folder / MANIFEST).exists() and not Path(name).exists():  # CACHE/models--owner--name/snapshots/COMMIT
        place = dict(cache_dir=folder.parents[2], revision=folder.name)
        cached_file(name, MANIFEST, **place, _raise_exceptions_for_missing_entries=False)
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder / MANIFEST}: missing, and config.json says quant_method ders. Is the folder complete, "
            "or a save that was broken off?"
        )
    return folder


def _expert_modules(model: PreTrainedModel, source: DersSource) -> dict[str, tuple[str, nn.Module]]:
    """{path in ders.json: (path in the model, module)}; without those that the model's class never loads (mtp.*)."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    modules = {}
    for group in source.groups:
        path = split_name(group.name)[0]
        if path in modules:
            continue
        if (found := locate(model, path)) is not None:
            modules[path] = found
        elif not any(pattern.search(group.name) for pattern in ignored):
            raise UnsupportedError(
                f"{path}: {type(model).__name__} has no such module; load the folder with the class that its "
                "config.json names, or `ders restore` it"
            )
    return modules


def _pack(model: PreTrainedModel, source: DersSource, modules: dict[str, tuple[str, nn.Module]]) -> Packed:
    """Put a packed module, on the meta device, in the place of each stock one."""
    if source.shared:
        raise UnsupportedError(
            f"{source.reader.folder}: a shared expert is in its groups, and those do not run packed: {OTHERWISE}"
        )
    own, by_path = runtime_groups(source), defaultdict(list)
    for group in source.groups:
        by_path[split_name(group.name)[0]].append(group)
    for path, (name, stock) in modules.items():
        if not is_common(stock):
            raise UnsupportedError(f"{path}: {type(stock).__name__} does not run packed: {OTHERWISE}")
        if hasattr(model.config, PER_LAYER):
            if getattr(model.config, "output_router_logits", False):
                raise UnsupportedError(
                    f"{source.reader.folder}: its layers have different numbers of experts, and transformers' load-balancing "
                    "loss wants one number; set output_router_logits to false"
                )
            fit_block(
                model,
                source,
                path,
                name,
                sum(group.projection == "up" for group in by_path[path] for _ in group.members),
            )
        check_shapes(path, stock, by_path[path])
        wanted = model.config.dtype  # fp32 is asked for to train: then bf16 factors beside an fp32 base are widened too
        as_stored = wanted != torch.float32 and all(TORCH[group.dtype] == wanted for group in own[path])
        model.set_submodule(name, HfExperts(stock, own[path], None if as_stored else wanted))
    kept = tuple(group for group in source.groups if split_name(group.name)[0] in modules)
    paths = {path: name for path, (name, _) in modules.items()}
    tables = ((group, order_of(source, group)) for group in kept)
    orders = {f"{layer_of(group)}{ORDER}": torch.from_numpy(table) for group, table in tables if table is not None}
    return Packed(source.manifest, kept, {group.name: source.codecs[group.name] for group in kept}, paths, orders)


def _ignore_on_load(
    model: PreTrainedModel, source: DersSource, modules: dict[str, tuple[str, nn.Module]], dequantize: bool
) -> None:
    """Keep the loading report free of what has no place in the model on purpose: guards, orders of neurons, and if dequantised
    all DeRS tensors."""
    stacked, patterns = "|".join(STACKED), {f"^{re.escape(guard)}$" for guard in source.manifest["guards"]}
    for path, (name, _) in modules.items():
        for here in {path, name}:
            patterns.add(rf"^{re.escape(here)}\.({stacked})$")  # a guard as stock loading renames it
            if source.aligned:
                patterns.add(rf"^{re.escape(here)}\.(slice\d+\.)?order$")
            if dequantize:
                patterns.add(rf"^{re.escape(here)}\.(slice\d+\.)?(gate|up|down)_proj\.(base$|delta\.)")
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns
