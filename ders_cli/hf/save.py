"""save_pretrained of a packed model: a valid DeRS folder of the model as it is now, trained or not.

    state dict -> stored dtypes -> shards -> ders.json -> every expert decoded and hashed -> the folder

Everything is written into a folder of its own first and moved when it is complete, ders.json last: a folder with a
ders.json is whole, and what stood there before stays until then. Memory is a tensor, not a second model.

What is stored how. A base is stored in the dtype that it has in memory, so one trained in fp32 becomes F32, and its
group with it; only the base of an `exact` group goes back to the dtype from whose bits its deltas are counted. Factors
of `rank` and values of `sparse` keep the dtype that they came in as long as it holds them, then get the one in memory.
The float parts of other codecs are BF16 on disk: going back is exact for what was loaded, and rounds to nearest what was
trained (values of drop, top, N:M), with a warning.

Tensors that are no experts have the names of the original files, and `source` in ders.json describes the original's
files with the new dtypes, so `ders restore` writes a stock checkpoint. A group that is still what was loaded keeps its
errors and source hashes; any other is its own source: the deltas are the model, nothing is lost between the two.
"""

import dataclasses
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from blake3 import blake3
from ders_kernels.cpu_ops import floats
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from .. import __version__
from ..checkpoint.manifest import FORMAT, MANIFEST, index_text, manifest_text, write_file
from ..checkpoint.reader import INDEX
from ..checkpoint.tensor import FLOATS, TensorSpec
from ..checkpoint.writer import ShardWriter, fsync_folder
from ..codecs import DeltaCodec
from ..codecs.mixed import GroupCodec, MixedCodec, families, family_of
from ..describe import BLANK, file_hash, group_entry
from ..differences import Differences
from ..engines import local
from ..errors import CheckpointError, UnsupportedError, UsageError
from ..layouts import ExpertGroup
from ..options import parse_bytes
from ..output import OWN
from ..plan import GUARD_TEXT, ShardPlan, Unit, fill_shards, natural
from ..runtime.dtypes import NAME, TORCH
from ..runtime.group import split_name
from ..source import DersSource, stored_parts

if TYPE_CHECKING:
    from .load import Packed

logger = logging.get_logger("transformers.ders")

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# dtypes that tensors beside the experts may have; those of the experts are in runtime.dtypes
OTHER_DTYPES = {torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.float64: "F64"} | {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    save_original_format: bool = True,
    variant: str | None = None,
    distributed_checkpoint: bool = False,
    **others: Any,
) -> None:
    """Stands in for the model's own save_pretrained, with its arguments; call it on every rank of a sharded model.

    `max_shard_size` defaults to that of the commands, so a model that was only loaded gets the same weight files.
    Raises UsageError on arguments that a DeRS folder has no room for, CheckpointError on experts that are not finite.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter alone is saved: nothing of ours
        return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **others)
    if variant or distributed_checkpoint or not save_original_format or others.pop("push_to_hub", False):
        raise UsageError(
            f"{save_directory}: a packed model is saved to a folder, whole and under its original names; variant, "
            "distributed_checkpoint, save_original_format=False and push_to_hub are not for it"
        )
    if Path(save_directory).is_file():
        raise UsageError(f"{save_directory}: a file stands here; expected a folder to write")
    writes = model.should_save_on_this_rank(is_main_process)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    distributed = getattr(model.config, "distributed_config", None)
    state = model.gather_sharded_state_dict_for_save(model, state, distributed, save_on_this_rank=writes)
    # DTensors are gathered by all ranks together
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    if not writes:
        return None
    packed: Packed = model.hf_quantizer.packed
    experts = _take_experts(packed, state)
    units = [_unit(group, packed.codecs[group.name], experts) for group in packed.groups]
    rest = _original_names(model, state)
    folder = Path(save_directory) / f"{OWN}saving"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write(model, packed, units, experts, rest, folder, _bytes_of(max_shard_size))
        _publish(folder, Path(save_directory))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _bytes_of(size: int | str) -> int:
    return size if isinstance(size, int) else parse_bytes(size, "max_shard_size")


# --- what is stored


def _take_experts(packed: "Packed", state: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name on disk: tensor} of all DeRS tensors, removed from the state dict."""
    found = {}
    for group in packed.groups:
        path = split_name(group.name)[0]
        for name in stored_parts(group, packed.codecs[group.name]):
            key = packed.paths[path] + name[len(path) :]
            if key not in state:
                raise UsageError(f"state_dict: {key} is missing; expected every tensor of the model")
            found[name] = state.pop(key)
    return found


def _unit(group: ExpertGroup, codec: GroupCodec, experts: dict[str, Tensor]) -> Unit:
    """A group and its codecs with the dtypes that they will be stored in."""
    base = experts[f"{group.name}.base"]
    if NAME.get(base.dtype) not in FLOATS:
        raise UnsupportedError(f"{group.name}.base: is {base.dtype}; expected bfloat16, float16 or float32")
    if not codec.lossless:
        group = dataclasses.replace(group, dtype=NAME[base.dtype])
    own = families(codec, len(group.members))
    kept = [_in_stored_dtype(group, family.codec, family.prefix, experts) for family in own]
    codec = MixedCodec(tuple(kept), codec.of) if isinstance(codec, MixedCodec) else kept[0]
    return Unit(group, codec, stored_parts(group, codec))


def _in_stored_dtype(group: ExpertGroup, codec: DeltaCodec, prefix: str, experts: dict[str, Tensor]) -> DeltaCodec:
    """A codec that says the dtype of its parts, with one that holds what they are now."""
    if not any(field.name == "dtype" for field in dataclasses.fields(codec)):
        return codec
    parts = [experts[f"{group.name}.{prefix}{part}"] for part in codec.spec(group.shape)]
    if all(_fits(part, TORCH[codec.dtype]) for part in parts):
        return codec
    return dataclasses.replace(codec, dtype=NAME[max((p.dtype for p in parts), key=lambda d: d.itemsize)])


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every value of a tensor."""
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _original_names(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is no expert, under the names that it was loaded by; tied weights once."""
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = NAME.get(tensor.dtype) or OTHER_DTYPES.get(tensor.dtype)
    if dtype is None or tensor.is_meta:
        what = "is offloaded" if tensor.is_meta else f"is {tensor.dtype}, which ders does not store"
        raise UnsupportedError(f"{name}: {what}; a packed model is saved from memory")
    return TensorSpec(tuple(tensor.shape), dtype)


def _bytes(name: str, tensor: Tensor, spec: TensorSpec, exact: bool) -> np.ndarray:
    """uint8: the tensor in its stored dtype. Raises CheckpointError if it must keep its value and does not."""
    stored = tensor.detach().cpu()
    if spec.dtype in TORCH and not _fits(stored, TORCH[spec.dtype]):
        if exact:
            raise CheckpointError(f"{name}: was changed, but exact deltas are counted from the bits that it had")
        logger.warning_once("ders: trained values are rounded to BF16 where the codec stores them so (drop, top, N:M)")
    stored = stored.to(TORCH.get(spec.dtype, stored.dtype))
    return stored.contiguous().reshape(-1).view(torch.uint8).numpy()


# --- the folder


def _write(
    model: PreTrainedModel,
    packed: "Packed",
    units: list[Unit],
    experts: dict[str, Tensor],
    rest: dict[str, Tensor],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """A complete DeRS folder."""
    guard = TensorSpec((len(GUARD_TEXT),), "U8")
    guards = packed.manifest["guards"]
    items: list[tuple[str, Any]] = [(unit.group.name, unit) for unit in units]
    items += [(name, ("guard", name, guard)) for name in guards]
    copied = rest | packed.orders
    items += [(name, ("copied", name, _spec(name, tensor))) for name, tensor in copied.items()]
    shards = fill_shards([item for _, item in sorted(items, key=lambda pair: natural(pair[0]))], max_shard_bytes)
    hashes: dict[str, list[str]] = {}
    files, sizes = {}, 0
    for shard in shards:
        written, size = _write_shard(folder / shard.file, shard, experts, copied)
        hashes, sizes = hashes | written, sizes + size
        files |= dict.fromkeys(written, shard.file)
    if len(shards) > 1:
        write_file(folder / INDEX, index_text(files, {"total_size": sizes}))
    config = _write_configs(model, folder)
    manifest = _manifest(packed, units, experts, guards, rest, hashes, sizes, config)
    manifest["files"] = {
        path.name: file_hash(path) for path in folder.iterdir() if not WEIGHT_FILE.fullmatch(path.name)
    }
    write_file(folder / MANIFEST, manifest_text(manifest))
    with DersSource(folder) as source:  # decoding it proves that it can be read, and gives the hashes
        tasks = [partial(_decoded_hash, source, g, i) for g in source.groups for i in range(len(g.members))]
        restored = iter(local.run(tasks, torch.get_num_threads()))
        found = {g.name: [next(restored) for _ in g.members] for g in source.groups}
    before = {entry["name"]: entry for entry in packed.manifest["groups"]}
    manifest["groups"] = [
        before[unit.group.name]
        if all(hashes[name] == packed.manifest["tensors"].get(name) for name in unit.parts)
        else _entry(unit, found[unit.group.name])
        for unit in units
    ]
    write_file(folder / MANIFEST, manifest_text(manifest))


def _write_shard(
    path: Path, shard: ShardPlan, experts: dict[str, Tensor], rest: dict[str, Tensor]
) -> tuple[dict[str, list[str]], int]:
    """One weight file; the hashes of its tensors, and its bytes."""
    exact = {name for unit in shard.units for name in _kept_exactly(unit)}
    writer = ShardWriter(path, shard.fixed, shard.appended, slices=shard.slices)
    try:
        for name, spec in shard.fixed.items():
            tensor = experts[name] if name in experts else rest.get(name)
            data = np.frombuffer(GUARD_TEXT, np.uint8) if tensor is None else _bytes(name, tensor, spec, name in exact)
            writer.write(name, 0, data)
        for name in shard.appended:
            spec = _spec(name, experts[name])
            writer.append(name, spec, [_bytes(name, experts[name], spec, True)])
        return writer.hashes(), writer.close()
    except BaseException:
        writer.abandon()
        raise


def _kept_exactly(unit: Unit) -> list[str]:
    """The tensors that lossless deltas are made of, the base included."""
    lossless = [f for f in families(unit.codec, len(unit.group.members)) if f.codec.lossless]
    own = [f"{unit.group.name}.{f.prefix}{part}" for f in lossless for part in f.codec.spec(unit.group.shape)]
    return [f"{unit.group.name}.base", *own] if lossless else []


def _write_configs(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """config.json, and generation_config.json if the model has one, as transformers writes them; the config's content."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def _decoded_hash(source: DersSource, group: ExpertGroup, member: int) -> str:
    """BLAKE3 of an expert as it decodes. Raises CheckpointError if it is not finite."""
    digest = blake3()
    for rows in source.blocks(group):
        bits = source.read(group, member, rows)
        digest.update(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))
        bad = floats.first_nonfinite(floats.widen(bits, group.dtype))
        if bad >= 0 and not family_of(source.codecs[group.name], len(group.members), member)[0].codec.lossless:
            raise CheckpointError(
                f"{group.name}, expert {group.members[member][0]}: NaN or infinity at "
                f"[{rows.start + bad // group.shape[1]}, {bad % group.shape[1]}]; did training diverge?"
            )
    return digest.hexdigest()


def _publish(folder: Path, out: Path) -> None:
    """Move a complete folder's files into `out`, ders.json first away and last back, and remove older weights."""
    new = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.iterdir():
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in new:
            path.unlink()
    for name in (*new, MANIFEST):
        os.replace(folder / name, out / name)
    fsync_folder(out)


# --- ders.json


def _manifest(
    packed: "Packed",
    units: list[Unit],
    experts: dict[str, Tensor],
    guards: list[str],
    rest: dict[str, Tensor],
    hashes: dict[str, list[str]],
    weight_bytes: int,
    config: dict[str, Any],
) -> dict[str, Any]:
    """ders.json, with blanks for what decoding will say."""
    base = sum(TensorSpec(unit.group.shape, unit.group.dtype).nbytes for unit in units)
    plain = sum(TensorSpec(u.group.shape, u.group.dtype).nbytes * len(u.group.members) for u in units)
    parts = [(spec or _spec(name, experts[name])).nbytes for u in units for name, spec in u.parts.items()]
    weights = sum(u.group.shape[0] * u.group.shape[1] * len(u.group.members) for u in units)
    return packed.manifest | {
        "format": FORMAT,
        "tool": f"ders-cli {__version__}",
        "source": _source(packed.manifest["source"], units, rest, config),
        "groups": [_entry(unit, [BLANK] * len(unit.group.members)) for unit in units],
        "guards": guards,
        **({"aligned": list(packed.orders)} if "aligned" in packed.manifest else {}),
        "tensors": hashes,
        "bytes": {
            "experts": plain,
            "base": base,
            "delta": sum(parts) - base,
            "weights": weight_bytes,
            "bits_per_delta_weight": float(f"{8 * (sum(parts) - base) / weights:.5e}"),
        },
    }


def _entry(unit: Unit, restored: list[str]) -> dict[str, Any]:
    """A group whose experts are what it decodes to: no error."""
    n = len(restored)
    return group_entry(unit, restored, restored, [Differences().errors()] * n)


def _source(
    source: dict[str, Any], units: list[Unit], rest: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Any]:
    """The original's files as they would be with the model's dtypes and shapes; a new tensor goes into the last file."""
    dtypes = {view.tensor: unit.group.dtype for unit in units for _, view in unit.group.members}
    listed = {name for entry in source["files"].values() for name, _, _ in entry["tensors"]}
    files = {}
    for file, entry in source["files"].items():
        tensors = []
        for name, _, shape in entry["tensors"]:
            if name in dtypes:
                tensors.append([name, dtypes[name], shape])
            elif name in rest:
                tensors.append(_row(name, rest[name]))
        files[file] = {"tensors": tensors, "metadata": entry["metadata"]}
    files[file]["tensors"] += [_row(name, tensor) for name, tensor in rest.items() if name not in listed]
    same = all(files[file]["tensors"] == entry["tensors"] for file, entry in source["files"].items())
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return source | {
        "aliases": {name: other for name, other in source["aliases"].items() if name in rest},
        "files": source["files"] if same else files,
        "index": source["index"] if same else _index(source["index"], files),
        "config": json.dumps(plain, indent=2, sort_keys=True) + "\n",
    }


def _row(name: str, tensor: Tensor) -> list[Any]:
    spec = _spec(name, tensor)
    return [name, spec.dtype, list(spec.shape)]


def _index(index: dict[str, Any] | None, files: dict[str, Any]) -> dict[str, Any] | None:
    """The index of files whose tensors have other dtypes now: only its total changes."""
    if index is None:
        return None
    rows = [row for entry in files.values() for row in entry["tensors"]]
    total = sum(TensorSpec(tuple(shape), dtype).nbytes for _, dtype, shape in rows)
    return {"metadata": index["metadata"] | {"total_size": total}}
