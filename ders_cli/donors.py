"""Where the experts of an upcycled model come from: fine-tunes of the dense model, or adapters (LoRA) on its FFN.

A donor gives the FFN matrices of one expert. A fine-tune's other weights are not an expert's and stay behind: what
they differ in is counted, so that nobody is surprised. An adapter is a low-rank delta already, W = base + scale * B @ A, and
is taken as one, exactly: `left` = scale * B, `right` = A.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ders_kernels.cpu_ops import floats

from .checkpoint.files import Stamp, open_regular, read_at
from .checkpoint.reader import MAX_CONFIG_BYTES, NOT_FINITE, CheckpointReader, header_of, read_json, read_view
from .checkpoint.tensor import FLOATS, STORAGE, TensorSpec
from .errors import CheckpointError, DersError, UnsupportedError, UsageError
from .layouts import MatrixView

ADAPTER, FACTORS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK = 1024  # or the matrix's longer side: an adapter is held in memory
# A stranger's regular expression may take longer than anybody lives: one with repeated or doubled groups, or many repeats.
MOST_PATTERN, SLOW = 200, re.compile(r"\)[*+{]|\\[0-9]|\(\?|([*+{?].*){4}|(\|.*){4}")
LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# settings that change what an adapter computes, and the values with which it is plain LoRA (peft 0.21's LoraConfig)
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # others, such as pissa, olora, loftq, take a part of the weights out of the base first
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias"), (None, False)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "alora_invocation_tokens"), (None, [])),
    **dict.fromkeys(("arrow_config", "use_bdlora", "kasa_config", "monteclora_config"), (None,)),
}


class FineTune:
    """A dense checkpoint with the ancestor's names, shapes and dtypes."""

    def __init__(self, folder: Path, ancestor: CheckpointReader):
        self.folder, self.reader, self._ancestor = folder, CheckpointReader(folder), ancestor
        for name, spec in ancestor.tensors.items():
            if (found := self.reader.tensors.get(name)) != spec:
                state = f"{found.dtype} {list(found.shape)}" if found else "nothing"
                self.reader.close()
                raise CheckpointError(
                    f"{folder}: {name}: expected {spec.dtype} {list(spec.shape)} as in {ancestor.folder}, found {state}; "
                    "is it a fine-tune of this model?"
                )
        if extra := next((name for name in self.reader.tensors if name not in ancestor.tensors), None):
            self.reader.close()
            raise CheckpointError(f"{folder}: {extra}: not in {ancestor.folder}; is it a fine-tune of this model?")

    def read(self, view: MatrixView, rows: slice) -> np.ndarray:
        """Stored bits [rows, in] of one of the ancestor's matrices, as this fine-tune has it."""
        return read_view(self.reader, view.tensor, view.offset, (view.row_stride, view.column_stride), view.shape, rows)

    def check_unchanged(self) -> None:
        self.reader.check_unchanged()

    def close(self) -> None:
        self.reader.close()


@dataclass(frozen=True)
class Factors:
    """One matrix of an adapter: its delta is left [out, r] @ right [r, in], fp32, the scale in `left`."""

    left: np.ndarray
    right: np.ndarray


class Adapter:
    """A PEFT LoRA adapter on FFN projections, all in memory (it is small)."""

    def __init__(self, folder: Path, ancestor: CheckpointReader, matrices: dict[str, MatrixView]):
        self.folder = folder
        self._stamps = {path: Stamp.of(path.stat()) for name in (ADAPTER, FACTORS) if (path := folder / name).is_file()}
        config = read_json(folder / ADAPTER, "an adapter's settings", MAX_CONFIG_BYTES, NOT_FINITE)
        for key, plain in PLAIN.items():
            if config.get(key, plain[0]) not in plain:
                raise UnsupportedError(
                    f"{folder / ADAPTER}: {key} is {config[key]!r:.40}; only plain LoRA is taken as an expert"
                )
        self._factors = _read_factors(folder, config, matrices)

    def check_unchanged(self) -> None:
        """Raise DersError if its files are not those that were read."""
        for path, stamp in self._stamps.items():
            if not path.is_file() or stamp.difference(Stamp.of(path.stat())):
                raise DersError(f"{path}: was changed after it was read; run again when it stands still")

    def factors(self, tensor: str) -> Factors | None:
        """Of one of the ancestor's matrices, by its tensor's name; None where the adapter changes nothing."""
        return self._factors.get(tensor)


def is_adapter(folder: Path) -> bool:
    return os.path.lexists(folder / ADAPTER)


def open_donor(folder: Path, ancestor: CheckpointReader, matrices: dict[str, MatrixView]) -> FineTune | Adapter:
    """The fine-tune or adapter in a folder. `matrices`: the ancestor's FFN matrices by their tensors' names."""
    if not folder.is_dir():
        raise UsageError(f"--expert-from {folder}: no such folder")
    return Adapter(folder, ancestor, matrices) if is_adapter(folder) else FineTune(folder, ancestor)


def _read_factors(folder: Path, config: dict[str, Any], matrices: dict[str, MatrixView]) -> dict[str, Factors]:
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, spec, read in _adapter_tensors(folder):
        match = LORA.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"{folder}: {name}: no LoRA factor; only plain LoRA on the FFN is taken as an expert"
            )
        tensor = f"{match[1]}.weight"
        if tensor not in matrices:
            raise UnsupportedError(
                f"{folder}: {name}: changes {match[1]}, which is no FFN projection; an expert cannot hold that. "
                "Merge this adapter into a fine-tune, or train one on the FFN alone"
            )
        shape, most = matrices[tensor].shape, max(MOST_RANK, *matrices[tensor].shape)
        side, rank = (shape[1], 0) if match[2] == "A" else (shape[0], 1)
        if len(spec.shape) != 2 or not spec.size or spec.shape[1 - rank] != side or spec.shape[rank] > most:
            form = f"[r, {side}]" if match[2] == "A" else f"[{side}, r]"
            raise CheckpointError(
                f"{folder}: {name}: expected a matrix {form} of a rank r of at most {most}, found {list(spec.shape)!r:.80}"
            )
        pairs.setdefault(tensor, {})[match[2]] = read()
    factors = {}
    for tensor, found in pairs.items():
        shape, a, b = matrices[tensor].shape, found.get("A"), found.get("B")
        if a is None or b is None or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            sizes = {which: list(values.shape) for which, values in found.items()}
            raise CheckpointError(
                f"{folder}: {tensor}: expected factors [{shape[0]}, r] and [r, {shape[1]}], found {sizes}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            left = b * np.float32(_scale(config, tensor.removesuffix(".weight"), a.shape[0], folder))
        if not (np.isfinite(left).all() and np.isfinite(a).all()):
            raise CheckpointError(f"{folder}: {tensor}: a factor times its scale is not finite")
        factors[tensor] = Factors(left, a)
    if not factors:
        raise CheckpointError(f"{folder}: has no LoRA factors")
    return factors


def _scale(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); patterns match the end of a module's path, as in peft."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    try:
        if bad := next((p for p in patterns.keys() if len(p) > MOST_PATTERN or SLOW.search(p)), None):
            raise UnsupportedError(
                f"{folder / ADAPTER}: alpha_pattern: {bad!r:.80} could take for ever; write the name out"
            )
        alpha = next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), alpha)
    except (AttributeError, re.error) as error:
        raise CheckpointError(f"{folder / ADAPTER}: alpha_pattern: expected names and numbers ({error})") from None
    if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
        raise CheckpointError(f"{folder / ADAPTER}: lora_alpha: expected a number, found {alpha!r:.40}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _adapter_tensors(folder: Path) -> Iterator[tuple[str, TensorSpec, Callable[[], np.ndarray]]]:
    """Names and specs of adapter_model.safetensors, each with what reads its fp32 values."""
    path = folder / FACTORS
    if not os.path.lexists(path):
        raise UnsupportedError(
            f"{folder}: no {path.name}; ders reads no pickles (.bin): save the adapter as safetensors"
        )
    handle, stamp = open_regular(path, "an adapter's weights")

    def read(name: str, spec: TensorSpec, begin: int) -> np.ndarray:
        data = read_at(handle, path, begin, spec.nbytes)
        if len(data) != spec.nbytes:
            raise CheckpointError(f"{path}: ends inside {name}; it shrank while being read")
        return floats.widen(np.frombuffer(data, STORAGE[spec.dtype]).reshape(spec.shape), spec.dtype)

    try:
        header = header_of(handle, path, stamp.size)
        for name, spec in header.tensors.items():
            if spec.dtype not in FLOATS:
                raise UnsupportedError(f"{path}: {name}: expected {', '.join(FLOATS)}, found {spec.dtype}")
            yield name, spec, partial(read, name, spec, header.begins[name])
    finally:
        os.close(handle)
