"""Deltas fitted to what the experts of a model see: an encoder that the walk asks before the codecs (convert.py).

For every expert matrix D [out, in] the inputs that reach it are gathered, and their second moment H = X'X / t decides what
an error costs: the hidden states routed to the expert for gate and up; for down what the *original* expert makes of these,
act(x Wg') * (x Wu'), biases aside as in compare.py. Integers are then chosen by GPTQ, low rank is whitened
(calibrated/); other codecs stay as they are, and so do experts that fewer than LEAST tokens are routed to.

Memory: one matrix at a time in each thread, 24 bytes for each pair of inputs: 0.4 GB at 4,096 inputs, 5 GB at 14,336.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ders_kernels.cpu_ops import floats

from . import calibrated
from .activations import Activations, LayerActivations
from .calibrated import gptq, whitened
from .codecs import DeltaCodec
from .codecs.base import NonFiniteError, Parts
from .codecs.integers import IntCodec
from .codecs.rank import RankCodec
from .compare import gated, layer_name
from .errors import CheckpointError, UnsupportedError, UsageError
from .layouts import ExpertGroup
from .recipe import Recipe
from .report import say
from .source import Source

LEAST = 16  # tokens that an expert must see
FITTED = (IntCodec, RankCodec)


class CalibratedEncoder:
    """`convert_group.Encoder`: parts fitted to a file of activations. Threads may call it at once."""

    def __init__(self, source: Source, activations: Activations, label: dict[str, Any]):
        self.label = label
        self._source, self._activations = source, activations
        self._plain = {layer: set(labels) for layer, labels in label["plain"].items()}
        self._layers: dict[str, dict[str, ExpertGroup]] = {}
        for group in source.groups:
            self._layers.setdefault(layer_name(group), {})[group.projection] = group
        self._held: tuple[str, LayerActivations] | None = None  # of the layer that was asked for last

    def block_rows(self, codec: DeltaCodec, shape: tuple[int, int]) -> int | None:
        """All rows of a matrix at once: H and its factor are made once for them. None: the codec is not fitted."""
        return shape[0] if isinstance(codec, FITTED) else None

    def memory(self, codec: DeltaCodec, group: ExpertGroup) -> int:
        """Bytes that fitting one matrix takes at once: its rows and what is made of them, H, and the tokens' states."""
        if not isinstance(codec, FITTED):
            return 0
        (out, in_), tokens = group.shape, self._activations.tokens(layer_name(group))
        states = 12 * tokens * (in_ + out) if group.projection == "down" else 12 * tokens * in_
        return 48 * out * in_ + 24 * in_**2 + states

    def check_unchanged(self) -> None:
        """Raise DersError if the file of activations is not what it was when it was opened."""
        self._activations.check_unchanged()

    def encode(
        self,
        group: ExpertGroup,
        member: int,
        codec: DeltaCodec,
        expert: np.ndarray,
        base: np.ndarray,
        key: int,
        row: int,
    ) -> Parts | None:
        """Stored bits [out, in] of a whole expert matrix and its base -> parts, or None: as the codec chooses them."""
        label = group.members[member][0]
        if not isinstance(codec, FITTED) or label in self._plain.get(layer_name(group), ()):
            return None
        assert expert.shape == group.shape, "a matrix that is fitted comes as a whole"
        delta = floats.delta(expert, base, group.dtype)
        if (bad := floats.first_nonfinite(delta)) >= 0:
            raise NonFiniteError(bad // delta.shape[1], bad % delta.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            inputs = self._inputs(group, label)
            if floats.first_nonfinite(inputs) >= 0:  # of weights near the largest, hidden states are infinite
                return None
            fit = gptq if isinstance(codec, IntCodec) else whitened
            try:
                return fit.encode(codec, delta, calibrated.moment(inputs), key)
            except np.linalg.LinAlgError:  # products passed fp32's range
                return None

    def _inputs(self, group: ExpertGroup, label: str) -> np.ndarray:
        """fp32 [t, in]: what the model multiplies this matrix with."""
        groups = self._layers[layer_name(group)]
        states, _ = self._layer(group).of(label)
        if group.projection != "down":
            return states
        gate = self._product(groups["gate"], label, states) if "gate" in groups else None
        return gated(gate, self._product(groups["up"], label, states), self._source.activation)

    def _product(self, group: ExpertGroup, label: str, states: np.ndarray) -> np.ndarray:
        """fp32 [t, in] -> [t, out], by the original expert, in blocks of its rows."""
        member = [name for name, _ in group.members].index(label)
        rows = self._source.blocks(group)
        weights = (floats.widen(self._source.read(group, member, block), group.dtype) for block in rows)
        return np.concatenate([states @ weight.T for weight in weights], axis=1)

    def _layer(self, group: ExpertGroup) -> LayerActivations:
        name, held = layer_name(group), self._held
        if held is None or held[0] != name:
            held = (name, self._activations.layer(name, [label for label, _ in group.members]))
            self._held = held
        return held[1]


def fits(source: Source, recipe: Recipe) -> bool:
    """Whether anything in the recipe can be fitted."""
    return any(isinstance(codec, FITTED) for group in source.groups for codec in recipe.codecs(group))


def _not_fitted(source: Source, recipe: Recipe) -> list[str]:
    codecs = dict.fromkeys(codec for group in source.groups for codec in recipe.codecs(group))
    return list(dict.fromkeys(codec.term for codec in codecs if not isinstance(codec, FITTED)))


def check_fits(source: Source, recipe: Recipe) -> None:
    """Raise UsageError where the model is a remote one, or nothing in the recipe can be fitted."""
    if source.reader.address != str(source.reader.folder):
        raise UsageError(f"{source.reader.address}: calibration reads experts several times; copy the model here first")
    if not fits(source, recipe):
        others = ", ".join(_not_fitted(source, recipe))
        raise UsageError(f"calibration fits int8 ... int1 and rankR; the recipe has {others}")


def make_encoder(source: Source, recipe: Recipe, activations: Activations, quiet: bool = False) -> CalibratedEncoder:
    """The encoder for a recipe, after all of `activations` has been read and checked once.

    `activations` stay open until the conversion is done. On stderr goes what stays plain. Raises UsageError where nothing
    in the recipe can be fitted, or the model is a remote one; UnsupportedError where its activation is unknown; CheckpointError
    where the file is broken.
    """
    check_fits(source, recipe)
    others = _not_fitted(source, recipe)
    one = np.zeros((1, 1), np.float32)
    try:
        gated(one, one, source.activation)
    except CheckpointError:
        raise UnsupportedError(
            f"config.json: activation {source.activation!r:.80}: calibration needs what goes into down, and knows silu, gelu, relu "
            "and their like; convert without it"
        ) from None
    plain = _unseen(source.groups, activations)
    if not quiet:
        _say_plain(source.groups, plain, others)
    label = {
        "activations": activations.hash(),
        "tokens": max(activations.tokens(layer_name(group)) for group in source.groups),
        "damping": calibrated.DAMPING,
        "plain": plain,
    }
    return CalibratedEncoder(source, activations, label)


def _unseen(groups: Iterable[ExpertGroup], activations: Activations) -> dict[str, list[str]]:
    """{layer: labels of its experts that fewer than LEAST tokens are routed to}; every layer of the file is checked."""
    found = {}
    for name, group in {layer_name(group): group for group in groups}.items():
        labels = [label for label, _ in group.members]
        layer = activations.layer(name, labels)
        if few := [label for label in labels if layer.count(label) < LEAST]:
            found[name] = few
    return found


def _say_plain(groups: Iterable[ExpertGroup], plain: Mapping[str, list[str]], terms: list[str]) -> None:
    experts = sum(len(group.members) for group in groups if group.projection == "down")
    if plain:
        layer, labels = next(iter(plain.items()))
        say(
            f"note: {sum(map(len, plain.values()))} of {experts} experts are coded plain: fewer than {LEAST} tokens were routed "
            f"to them, such as expert {labels[0]} of {layer}; more --tokens reach more of them"
        )
    if terms:
        say(f"note: {', '.join(terms)} are coded as ever: calibration fits int8 ... int1 and rankR")
