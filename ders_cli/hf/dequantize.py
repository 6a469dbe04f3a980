"""A stock model from a DeRS folder: every expert synthesised into the place that the stock module has for it.

The parameters for expert matrices are taken out of the model while transformers loads all others (else it would miss
them, and take the guards for them), and come back filled. Memory is the stock model and a block of rows a thread. The
bits are those of `ders restore`, checked by the same hashes.
"""

from functools import partial

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..engines import local
from ..errors import CheckpointError, UnsupportedError
from ..layouts import ExpertGroup
from ..runtime.dtypes import TORCH, from_bits
from ..source import DersSource
from .stock import locate, matrices, weight_parameters

Taken = list[tuple[nn.Module, str, nn.Parameter]]  # (owner, name, the parameter on the meta device)


def take_out(model: PreTrainedModel, modules: dict[str, nn.Module], source: DersSource) -> Taken:
    """Remove the expert matrices' parameters from the modules {path: module}, and those of shared experts in groups."""
    places = [place for path, module in modules.items() for place in weight_parameters(path, module)]
    for group in source.groups:
        shared = [view.tensor for label, view in group.members if not label.isdecimal()]
        places += [_shared_parameter(model, group, tensor) for tensor in shared]
    for module in modules.values():
        module._is_hf_initialized = True  # transformers would look for what is gone
    taken = []
    for owner, name in dict.fromkeys(places):  # gate and up may be one
        taken.append((owner, name, owner._parameters.pop(name)))
        owner._is_hf_initialized = True
    return taken


def put_back(model: PreTrainedModel, taken: Taken, modules: dict[str, nn.Module], source: DersSource) -> None:
    """Fill and return the parameters. Raises CheckpointError where an expert is not what ders.json noted."""
    device = model.device
    for owner, name, parameter in taken:
        with torch.inference_mode(False):  # the threads below write into it, and the caller's mode isn't theirs
            filled = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
        filled._is_hf_initialized = True
        owner.register_parameter(name, filled)
    views = {path: matrices(module) for path, module in modules.items()}
    tasks = []
    for group in source.groups:
        path = next((path for path in modules if group.name.startswith(path + ".")), None)
        if path is None:
            continue
        for member, (label, view) in enumerate(group.members):
            if label.isdecimal():
                place = views[path][group.projection][int(label)]
            else:  # such a parameter has the file's own form, so the file's strides hold
                owner, name = _shared_parameter(model, group, view.tensor)
                strides = (view.row_stride, view.column_stride)
                place = getattr(owner, name).detach().as_strided(group.shape, strides, view.offset)
            tasks.append(partial(_fill, source, group, member, place))
    local.run(tasks, torch.get_num_threads())


def _shared_parameter(model: PreTrainedModel, group: ExpertGroup, tensor: str) -> tuple[nn.Module, str]:
    """(owner, name) of the parameter that a shared expert's tensor is in the model."""
    path, _, name = tensor.rpartition(".")
    found = locate(model, path)
    if found is None or name not in found[1]._parameters:
        raise UnsupportedError(
            f"{group.name}: {type(model).__name__} has no {tensor} for the shared expert; `ders restore` gives a "
            "checkpoint that stock transformers loads"
        )
    return found[1], name


def _fill(source: DersSource, group: ExpertGroup, member: int, place: Tensor) -> None:
    """Synthesise one expert, block by block of rows, into a view [out, in] of any dtype and strides."""
    digest = blake3()
    for rows in source.blocks(group):
        bits = np.ascontiguousarray(source.read(group, member, rows))
        digest.update(bits.reshape(-1).view(np.uint8))
        place[rows].copy_(from_bits(bits, TORCH[group.dtype]))
    if digest.hexdigest() != source.entry(group)["members"][member]["restored_hash"]:
        raise CheckpointError(
            f"{group.name}, expert {group.members[member][0]}: does not decode to what was stored; "
            "the checkpoint is damaged (`ders verify` says where)"
        )
