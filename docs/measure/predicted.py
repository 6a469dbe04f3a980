"""Predictions beside what conversions measure: bytes and output errors, all layers and experts of a model, codec by codec.

    python docs/measure/predicted.py MODEL SCRATCH --rows 256 --tokens 32 --plot predicted.png

Predicted: analysis/prediction.py, and spectra.py for codecs of whole matrices (of one expert a layer), combined over an expert's
projections. Measured: `ders compress MODEL --delta CODEC`, then `ders verify OUT --against MODEL` with the same hidden states: random ones, or
with --hidden those of a file as verify takes it (safetensors, `layers.N` fp32 [tokens, hidden]). Prints for each codec the correlation of the errors' logarithms, the slope of log predicted over log measured, and of the ratios predicted / measured
the median, the spread (deviation of the logarithm) and the worst; fails unless every predicted size is that of the written tensors.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ders_cli.analysis.blocks import layers_of, observe_layer
from ders_cli.analysis.prediction import LayerPrediction, Predicted, combined
from ders_cli.analysis.spectra import WholePrediction
from ders_cli.base import make_base
from ders_cli.checkpoint.reader import CheckpointReader
from ders_cli.codecs import DeltaCodec, parse_codec
from ders_cli.compare import random_states
from ders_cli.engines import local
from ders_cli.source import open_source

CODECS = (
    "int8 int4 int3 int2 int1 ternary0.05 ternary0.02 ternary0.01 drop0.9 drop0.99 drop0.9+int4 top0.1 2:4 rank16 none"
).split()
SEED = 0
GROUP_SIZE = 128

Place = tuple[str, str]  # group, expert
Found = dict[str, dict[Place, Predicted]]  # by codec
StatesOf = Callable[[int, int], np.ndarray]  # (layer, hidden) -> fp32 [tokens, hidden]


@dataclass(frozen=True)
class Pairs:
    """Of one codec, over layers and experts: errors of outputs with all projections coded."""

    predicted: np.ndarray
    measured: np.ndarray

    @property
    def row(self) -> list[str]:
        ratios = self.predicted / self.measured
        logs = np.log(self.predicted), np.log(self.measured)
        rms = [math.sqrt(float(np.mean(errors**2))) for errors in (self.predicted, self.measured)]
        numbers = [
            np.corrcoef(*logs)[0, 1],
            np.polyfit(logs[1], logs[0], 1)[0],
            np.median(ratios),
            np.log(ratios).std(),
            ratios.min(),
            ratios.max(),
        ]
        return [str(ratios.size), *(f"{error:.3g}" for error in rms), *(f"{number:.3f}" for number in numbers)]


def predict(model: Path, base: str, codecs: Sequence[DeltaCodec], rows: int, states_of: StatesOf) -> Found:
    """Every matrix's prediction by every codec."""
    found: Found = {codec.term: {} for codec in codecs}
    with open_source(model) as source:
        shared = make_base(base)

        def layer(groups) -> None:
            shape = groups["up"].shape
            states = states_of(groups["up"].layer, shape[1])
            apart = [codec for codec in codecs if codec.block_rows(shape) is None]
            whole = [codec for codec in codecs if codec.block_rows(shape) is not None]
            observers = [LayerPrediction(groups, source.activation, states, apart, SEED, rows)]
            observers += [WholePrediction(groups, source.activation, states, whole, SEED, rows)] if whole else []
            observe_layer(source, shared, groups, observers, lambda done: None)
            for observer in observers:
                for projection, labels in observer.found().items():
                    for label, terms in labels.items():
                        for term, one in terms.items():
                            found[term][groups[projection].name, label] = one

        local.run([lambda groups=groups: layer(groups) for groups in layers_of(source).values()], 1)
    return found


def convert(
    model: Path, base: str, term: str, states: Sequence[object], out: Path
) -> tuple[dict[Place, dict], dict[str, int]]:
    """({(group, expert): what verify says}, {group: bytes of its written delta parts}); `states`: verify's options."""
    shutil.rmtree(out, ignore_errors=True)
    options = ["--delta", term, "--base", base, "--group-size", GROUP_SIZE, "--seed", SEED, "-o", out, "-q"]
    _ders("compress", model, *options)
    text = _ders("verify", out, "--against", model, *states, "--seed", SEED, "--json", "-q")
    written: dict[str, int] = {}
    with CheckpointReader(out) as reader:
        for name, spec in reader.tensors.items():
            group, part, _ = name.partition(".delta.")
            if part:
                written[group] = written.get(group, 0) + spec.nbytes
    shutil.rmtree(out)
    return {(one["group"], one["expert"]): one for one in json.loads(text)["experts"]}, written


def _ders(*arguments: object) -> str:
    ran = subprocess.run([sys.executable, "-m", "ders_cli", *map(str, arguments)], capture_output=True, text=True)
    if ran.returncode not in (0, 3):  # 3: verify of `none` finds experts that equal their base
        sys.exit(f"ders {' '.join(map(str, arguments))}: exit {ran.returncode}\n{ran.stderr}")
    return ran.stdout


def pairs(predicted: dict[Place, Predicted], measured: dict[Place, dict]) -> Pairs:
    """Errors of every expert that was predicted, its projections combined."""
    layers: dict[Place, list[float]] = {}
    for (group, label), one in predicted.items():
        layers.setdefault((group.rpartition(".")[0], label), []).append(one.output_error)
    true = {(group.rpartition(".")[0], label): one["output"] for (group, label), one in measured.items()}
    return Pairs(
        np.array([combined(errors) for errors in layers.values()]), np.array([true[place] for place in layers])
    )


def check_bytes(term: str, predicted: dict[Place, Predicted], written: dict[str, int], experts: int) -> None:
    """Exit unless every group's bytes are as predicted; where one expert was, all take as many."""
    groups: dict[str, list[int]] = {}
    for (group, _), one in predicted.items():
        groups.setdefault(group, []).append(one.bytes)
    for group, sizes in groups.items():
        expected = sum(sizes) * experts // len(sizes)
        if written.get(group, 0) != expected:
            sys.exit(f"{term}, {group}: predicted {expected} bytes, written {written.get(group, 0)}")


def plot(found: dict[str, Pairs], file: Path) -> None:
    """A scatter of all experts, a colour a codec."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="measured |y' - y| / |y|", ylabel="predicted")
    for number, (term, one) in enumerate(found.items()):
        axes.plot(one.measured, one.predicted, "os^v"[number % 4], ms=4, alpha=0.6, label=term)
    ends = [min(one.measured.min() for one in found.values()), max(one.measured.max() for one in found.values())]
    axes.plot(ends, ends, "k-", lw=0.8)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path, help="folder for conversions; each is removed again")
    parser.add_argument("--base", default="mean")
    parser.add_argument("--delta", nargs="+", default=CODECS)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--hidden", type=Path, help="hidden states in place of random ones")
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    given = parser.parse_args()
    codecs = [parse_codec(term, GROUP_SIZE) for term in given.delta]
    options, states_of = (
        ["--tokens", given.tokens],
        lambda layer, hidden: random_states(SEED, layer, given.tokens, hidden),
    )
    if given.hidden:
        held = load_file(given.hidden)
        options, states_of = ["--hidden", given.hidden], lambda layer, hidden: held[f"layers.{layer}"]
    begin = time.process_time()
    predicted = predict(given.model, given.base, codecs, given.rows, states_of)
    with open_source(given.model) as source:
        size = sum(2 * math.prod(group.shape) * len(group.members) for group in source.groups) / 1e9
        experts = len(source.groups[0].members)
    print(f"predicted in {(time.process_time() - begin) / size:.1f} CPU-s/GB, start and compiling included\n")
    head = "codec experts predicted measured correlation slope median spread least most".split()
    print("|", " | ".join(head), "|\n|" + "---|" * len(head))
    found = {}
    given.scratch.mkdir(parents=True, exist_ok=True)
    for codec in codecs:
        measured, written = convert(given.model, given.base, codec.term, options, given.scratch / "predicted-out")
        check_bytes(codec.term, predicted[codec.term], written, experts)
        found[codec.term] = pairs(predicted[codec.term], measured)
        print("|", " | ".join([codec.term, *found[codec.term].row]), "|", flush=True)
    logs = [
        np.log(np.concatenate([getattr(one, name) for one in found.values()])) for name in ("predicted", "measured")
    ]
    print(
        f"\nall: correlation of logarithms {np.corrcoef(*logs)[0, 1]:.5f}, slope {np.polyfit(logs[1], logs[0], 1)[0]:.4f}"
    )
    print("bytes: every predicted size is that of the written tensors")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
