"""What calibration gains: loss and output errors of deltas coded plainly, and fitted to a text (docs/calibration.md).

    python docs/measure/calibrated.py MODEL TOKENS.json OUT.jsonl --base DENSE --delta int3 --delta rank16 ... --loss int3 ...

The text is made of what stands on the machine: Python's standard library, French manual pages, C headers, and English manual
pages and licences, 60,000 characters of each drawn with seed 0; a file with 60 characters of a held-out sequence in it is left
out. For every --delta, coded plainly and fitted, on the held-out text's hidden states in five layers: the error of every matrix'
outputs relative to what its delta adds to them (root mean square), and the share of the delta that is kept in them,
<x D', x D> / |x D|^2 (mean). For every --loss also a conversion both ways, restored and loaded by stock transformers in fp32: mean
next-token loss above the original's on the held-out TOKENS.json (loss.py). Results are appended to OUT.jsonl; losses that stand
there are not run again.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from ders_kernels.cpu_ops import floats
from loss import losses
from transformers import AutoTokenizer

from ders_cli.activations import Activations
from ders_cli.analysis.blocks import layers_of
from ders_cli.base import Base, make_base
from ders_cli.calibration import make_encoder
from ders_cli.hf.collect import collect
from ders_cli.recipe import Recipe, make_recipe
from ders_cli.source import Source, open_source

SOURCES = {
    "python": (sysconfig.get_path("stdlib"), "[a-z]*.py"),
    "french": ("/usr/share/man/fr", "**/*.gz"),
    "c": ("/usr/include", "**/*.h"),
    "english": ("/usr/share", "man/man1/*.gz"),
    "licences": ("/usr/share/common-licenses", "*"),
}
CHARACTERS, OF_A_FILE, WINDOW = 60_000, 6_000, 60
SAMPLED = (0.0, 0.25, 0.5, 0.75, 1.0)  # layers whose outputs are measured, by depth


def calibration_text(held_out: list[str]) -> str:
    """Files in a drawn order, none of which holds 60 characters of what is held out."""
    windows = {text[i : i + WINDOW] for text in held_out for i in range(0, len(text) - WINDOW, WINDOW)}
    found = []
    for kind, (folder, pattern) in SOURCES.items():
        paths = [path for path in sorted(Path(folder).glob(pattern)) if path.is_file()]
        random.Random(0).shuffle(paths)
        size = used = left_out = 0
        for path in paths:
            data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
            text = data.decode(errors="replace")
            if any(window in text for window in windows):
                left_out += 1
            elif size < CHARACTERS:
                found.append(text[:OF_A_FILE])
                size, used = size + len(found[-1]), used + 1
            if size >= CHARACTERS:
                break
        print(f"{kind}: {used} files, {size} characters; {left_out} left out", flush=True)
    return "\n\n".join(found)


def output_errors(source: Source, base: Base, recipe: Recipe, seen: Activations, held: Activations) -> dict[str, dict]:
    """{"plain" and "calibrated": {"error": root mean square of |x D' - x D| / |x D|, "kept": mean of <x D', x D> / |x D|^2}}."""
    layers = list(layers_of(source).values())
    fitted, unseen = make_encoder(source, recipe, seen, quiet=True), make_encoder(source, recipe, held, quiet=True)
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "calibrated": []}
    for group in (group for depth in SAMPLED for group in layers[round(depth * (len(layers) - 1))].values()):
        rows = slice(0, group.shape[0])
        bits = base.rows(group, rows, partial(source.read, group))
        for member, (label, _) in enumerate(group.members):
            expert, codec = source.read(group, member, rows), recipe.codecs(group)[member]
            delta, states, key = floats.delta(expert, bits, group.dtype), unseen._inputs(group, label), member
            plain = codec.encode_expert(expert, bits, group.dtype, key, 0)
            calibrated = fitted.encode(group, member, codec, expert, bits, key, 0)
            y = states @ delta.T
            for how, parts in (("plain", plain), ("calibrated", calibrated or plain)):
                coded = states @ codec.decode(parts, group.shape, key, 0).T
                kept = float((coded * y).sum() / (y * y).sum())
                found[how].append((float(np.linalg.norm(coded - y) / np.linalg.norm(y)), kept))
    pairs = {how: np.array(each) for how, each in found.items()}
    return {
        how: {"error": float(np.sqrt(np.mean(p[:, 0] ** 2))), "kept": float(p[:, 1].mean())} for how, p in pairs.items()
    }


def loss_above(
    args: argparse.Namespace, delta: str, seen: Path | None, held_out: dict, reference: dict
) -> dict[str, float]:
    """Convert, restore, load: the loss above the original's in nats, by domain. `seen` None: plain."""
    ders = [sys.executable, "-m", "ders_cli"]
    fitted = ["--activations", seen] if seen else []
    with tempfile.TemporaryDirectory() as scratch:
        packed, plain = Path(scratch, "packed"), Path(scratch, "plain")
        command = [*ders, "compress", args.model, "--delta", delta, "--base", args.base, "-o", packed, "-q", *fitted]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([*ders, "restore", packed, "-o", plain, "-q"], check=True, capture_output=True)
        return {kind: loss - reference[kind] for kind, loss in losses(plain, held_out).items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="mean")
    parser.add_argument("--delta", action="append", default=[])
    parser.add_argument("--loss", action="append", default=[], help="a --delta whose loss is wanted, such as int3")
    parser.add_argument("--count", type=int, default=16384, help="tokens of the calibration text")
    args = parser.parse_args()
    held_out = json.loads(args.tokens.read_text())
    held_out = held_out.get("domains", held_out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.decode(sequence) for sequences in held_out.values() for sequence in sequences]
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as scratch, open_source(args.model) as source:
        text, seen, held = Path(scratch, "text"), Path(scratch, "seen"), Path(scratch, "held")
        text.write_text(calibration_text(texts))
        print(f"{collect(source, text, args.count, 0, seen)} tokens of calibration", flush=True)
        text.write_text("\n\n".join(texts))
        collect(source, text, 4096, 0, held)
        with Activations(seen) as calibration, Activations(held) as unseen:
            for delta in args.delta:
                recipe = make_recipe({"delta": delta})
                for how, row in output_errors(source, make_base(args.base), recipe, calibration, unseen).items():
                    print(f"{delta:8s} {how:10s} error {row['error']:.4f} kept {row['kept']:.4f}", flush=True)
                    _append(args.out, {"delta": delta, "how": how} | row)
        reference = next((row["loss"] for row in done if row["delta"] == "original"), None)
        if args.loss and reference is None:
            reference = losses(args.model, held_out)
            _append(args.out, {"delta": "original", "loss": reference})
        for delta in args.loss:
            for how, file in (("calibrated", seen), ("plain", None)):
                if any(row["delta"] == delta and row.get("how") == how and "above" in row for row in done):
                    continue
                above = loss_above(args, delta, file, held_out, reference)
                print(f"{delta:8s} {how:10s}", *(f"{kind} {loss:+.4f}" for kind, loss in above.items()), flush=True)
                _append(args.out, {"delta": delta, "how": how, "above": above})


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
