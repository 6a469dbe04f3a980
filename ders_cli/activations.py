"""What a model's experts see: the hidden states that go into them, layer by layer, in one safetensors file.

For every MoE layer P ("model.layers.3.mlp.experts", the front of its groups' names) the file holds

    P.states   [T, hidden] F32 | BF16 | F16   inputs of the experts
    P.chosen   [T, k] I32 | I64               numbers of the experts that the router chose     (optional)
    P.gates    [T, k] F32                     their gates; 1 where the file has none           (optional)

Other tensors are left alone. `ders_cli.hf.collect` makes such a file of a text; any other tool can. Headers are read and
checked at once, as a stranger's; data one layer at a time: T x hidden numbers of fp32 stand in memory.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from ders_kernels.cpu_ops import floats

from .checkpoint.files import Stamp, named, of_file, open_regular, read_at
from .checkpoint.reader import header_of
from .checkpoint.tensor import FLOATS, STORAGE, TensorSpec
from .checkpoint.writer import header_text
from .errors import CheckpointError, DersError, UsageError
from .layouts import ExpertGroup, unsliced

WHAT = "a file of activations"
DTYPES = {"states": FLOATS, "chosen": ("I32", "I64"), "gates": ("F32",)}


@dataclass(frozen=True)
class LayerActivations:
    """One layer's tokens: states fp32 [T, hidden]; chosen int64 [T, k] and gates fp32 [T, k], or None."""

    states: np.ndarray
    chosen: np.ndarray | None
    gates: np.ndarray | None

    def of(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are routed to an expert: states fp32 [t, hidden], gates fp32 [t].

        All tokens with a gate of 1 where routing is unknown, and for a shared expert, whose label is no number.
        """
        if self.chosen is None or not label.isdecimal():
            return self.states, np.ones(len(self.states), np.float32)
        mine = self.chosen == int(label)  # [T, k]
        tokens = mine.any(axis=1)
        gates = np.ones(self.chosen.shape, np.float32) if self.gates is None else self.gates
        return self.states[tokens], np.where(mine, gates, np.float32(0))[tokens].sum(axis=1, dtype=np.float32)

    def count(self, label: str) -> int:
        """How many tokens `of` gives."""
        if self.chosen is None or not label.isdecimal():
            return len(self.states)
        return int((self.chosen == int(label)).any(axis=1).sum())


class Activations:
    """A file of activations, opened by its header. `close` it, or use `with`; safe to read from several threads.

    Raises CheckpointError where the file contradicts its format.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._handle, self._stamp = open_regular(self.path, WHAT)
        try:
            header = header_of(self._handle, self.path, self._stamp.size)
            self._tensors, self._begins = header.tensors, header.begins
            self.prefixes = tuple(name.removesuffix(".states") for name in self._tensors if name.endswith(".states"))
            if not self.prefixes:
                raise CheckpointError(f"{self.path}: no tensor LAYER.states; expected {WHAT} (docs/calibration.md)")
            for prefix in self.prefixes:
                self._check_layer(prefix)
        except BaseException:
            self.close()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the file anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises DersError where the file is not there, or not the one that was opened."""
        self.__dict__.update(state)
        began = self._stamp
        self._handle, self._stamp = open_regular(self.path, f"{WHAT} that other machines open too")
        if what := began.difference(self._stamp, same_node=False):
            self.close()
            raise DersError(f"{self.path}: {what} since it was opened")

    def _check_layer(self, prefix: str) -> None:
        specs = {part: self._tensors[name] for part in DTYPES if (name := f"{prefix}.{part}") in self._tensors}
        for part, spec in specs.items():
            if spec.dtype not in DTYPES[part] or len(spec.shape) != 2 or 0 in spec.shape:
                raise CheckpointError(
                    f"{self.path}: {prefix}.{part}: expected [tokens, {'hidden' if part == 'states' else 'k'}] of "
                    f"{' or '.join(DTYPES[part])}, found {spec.dtype} {list(spec.shape)!r:.80}"
                )
        if "gates" in specs and specs["gates"].shape != specs.get("chosen", specs["states"]).shape:
            raise CheckpointError(f"{self.path}: {prefix}.gates: expected {prefix}.chosen of the same shape beside it")
        if "chosen" in specs and specs["chosen"].shape[0] != specs["states"].shape[0]:
            raise CheckpointError(
                f"{self.path}: {prefix}.chosen: {specs['chosen'].shape[0]} tokens, and {specs['states'].shape[0]} states"
            )

    def tokens(self, prefix: str) -> int:
        """T of a layer that the file has."""
        return self._tensors[f"{_whole(prefix)}.states"].shape[0]

    def check(self, groups: Iterable[ExpertGroup]) -> None:
        """Raise UsageError, from headers alone, unless every layer of these groups is here and as wide as its experts."""
        for group in groups:
            prefix = _whole(group.name.rpartition(".")[0])
            hidden = group.shape[0] if group.projection == "down" else group.shape[1]
            found = self._tensors.get(f"{prefix}.states")
            if found is None:
                raise UsageError(
                    f"{self.path}: no {prefix}.states; the file has {self.prefixes[0]} ...; of another model?"
                )
            if found.shape[1] != hidden:
                raise UsageError(
                    f"{self.path}: {prefix}.states: expected [tokens, {hidden}], found {list(found.shape)}; of another model?"
                )

    def layer(self, prefix: str, experts: Sequence[str]) -> LayerActivations:
        """One layer, checked; `experts`: the labels of its experts, to which `chosen` must refer.

        A fine-grained slice ("...experts.slice1") has the tokens of its layer; its labels are some of the layer's numbers.
        Raises UsageError where the file has no such layer, CheckpointError on a number that is not finite or no expert's.
        """
        whole = _whole(prefix)
        of_slice, prefix = whole != prefix, whole
        if f"{prefix}.states" not in self._tensors:
            raise UsageError(f"{self.path}: no {prefix}.states; the file has {self.prefixes[0]} ...; of another model?")
        states, gates = self._floats(f"{prefix}.states"), None
        chosen = self._read(f"{prefix}.chosen")
        if chosen is not None:
            self._check_chosen(prefix, chosen, sum(label.isdecimal() for label in experts), of_slice)
            chosen, gates = chosen.astype(np.int64), self._gates(prefix)
        return LayerActivations(states, chosen, gates)

    def _check_chosen(self, prefix: str, chosen: np.ndarray, count: int, of_slice: bool) -> None:
        least, most = chosen.min(), chosen.max()
        if least < 0 or (most >= count and not of_slice):
            raise CheckpointError(
                f"{self.path}: {prefix}.chosen: expert {least if least < 0 else most}; the layer has 0 ... {count - 1}"
            )

    def check_unchanged(self) -> None:
        """Raise DersError if the file is not what it was when it was opened."""
        try:
            what = self._stamp.difference(Stamp.of(self.path.stat()))
        except FileNotFoundError:
            what = "vanished"
        if what:
            raise DersError(f"{self.path}: {what} since it was opened; run again (--overwrite) when it stands still")

    def hash(self) -> str:
        """BLAKE3 of the whole file."""
        digest, at = blake3(), 0
        while chunk := read_at(self._handle, self.path, at, 4 << 20):
            digest.update(chunk)
            at += len(chunk)
        return digest.hexdigest()

    def importance(self, prefix: str, label: str) -> tuple[float, float]:
        """(share of the tokens that are routed to an expert, sum of its gates over all tokens); 1 and 1 where unknown."""
        prefix = _whole(prefix)
        if f"{prefix}.chosen" not in self._tensors or not label.isdecimal():
            return 1.0, 1.0
        mine = self._read(f"{prefix}.chosen") == int(label)
        gates = self._gates(prefix)
        weight = mine.any(axis=1) if gates is None else np.where(mine, gates, np.float32(0)).sum(axis=1)
        return float(mine.any(axis=1).mean()), float(np.mean(weight, dtype=np.float64))

    def _read(self, name: str) -> np.ndarray | None:
        """Stored bits, None where there is no such tensor."""
        if (spec := self._tensors.get(name)) is None:
            return None
        out = np.empty(spec.shape, STORAGE[spec.dtype])
        view, at = memoryview(out.reshape(-1).view(np.uint8)), self._begins[name]
        while len(view):
            try:
                got = os.preadv(self._handle, [view], at)
            except OSError as error:
                raise named(error, self.path) from None
            if got == 0:
                raise CheckpointError(f"{self.path}: ends inside {name}; it shrank while being read")
            view, at = view[got:], at + got
        return out

    def _gates(self, prefix: str) -> np.ndarray | None:
        """fp32 [T, k], none of them negative."""
        gates = self._floats(f"{prefix}.gates")
        if gates is not None and (least := gates.min()) < 0:
            raise CheckpointError(f"{self.path}: {prefix}.gates: {least}; expected shares of the outputs, 0 or more")
        return gates

    def _floats(self, name: str) -> np.ndarray | None:
        """fp32 values, all of them finite."""
        if (bits := self._read(name)) is None:
            return None
        values = floats.widen(bits, self._tensors[name].dtype)
        if (bad := floats.first_nonfinite(values)) >= 0:
            row, column = divmod(bad, values.shape[1])
            raise CheckpointError(f"{self.path}: {name}: {values[row, column]} at [{row}, {column}]; expected numbers")
        return values

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "Activations":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_activations(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write a file of activations: name -> (bits, dtype), such as "P.states" -> (uint16 [T, hidden], "BF16")."""
    specs = {name: TensorSpec(bits.shape, dtype) for name, (bits, dtype) in tensors.items()}
    text = header_text(specs, {"format": "ders-activations"})
    with of_file(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits, _ in tensors.values():
            file.write(np.ascontiguousarray(bits).data)


def _whole(prefix: str) -> str:
    """The layer that a fine-grained slice of experts is of; other prefixes as they are."""
    return unsliced(f"{prefix}.up_proj").removesuffix(".up_proj")
