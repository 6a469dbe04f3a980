"""Logits of a MoE through the transformers plug-in, packed, beside those of what `ders restore` gives to stock transformers.

    python docs/measure/plugin.py MODEL WORK --base DENSE

For each codec, in bf16 as stored and in fp32: the largest and the root mean square difference of a logit, relative to the
logits' root mean square, over 4 sequences of 64 random tokens. Stock runs its experts eagerly. Two columns say what to
expect: `stock` is stock bf16 against stock fp32, what the arithmetic itself costs; in fp32 the packed model adds base and
delta without rounding the sum to bf16 as the restored weights are, so only `exact` can be equal there.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import ders_cli.hf  # noqa: F401

DELTAS = ("exact", "int4", "int1", "drop0.9", "ternary0.02", "rank16", "2:4")


def logits(folder: Path, dtype: torch.dtype, **how) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits.double()


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    error, size = found - expected, expected.square().mean().sqrt()
    return f"{error.abs().max() / size:.1e} / {error.square().mean().sqrt() / size:.1e}"


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", default="mean")
    args = parser.parse_args()
    print("| codec | packed bf16 | stock bf16, of its fp32 | packed fp32 |\n|---|---|---|---|")
    for delta in DELTAS:
        packed, plain = args.work / "packed", args.work / "plain"
        for made in (packed, plain):
            shutil.rmtree(made, ignore_errors=True)
        ders = [sys.executable, "-m", "ders_cli"]
        compress = [*ders, "compress", args.model, "--delta", delta, "--base", args.base, "-o", packed, "-q"]
        subprocess.run(compress, check=True, capture_output=True)
        subprocess.run([*ders, "restore", packed, "-o", plain, "-q"], check=True, capture_output=True)
        narrow = logits(plain, torch.bfloat16, experts_implementation="eager")
        wide = logits(plain, torch.float32, experts_implementation="eager")
        row = [
            difference(logits(packed, torch.bfloat16), narrow),
            difference(narrow, wide),
            difference(logits(packed, torch.float32), wide),
        ]
        print(f"| {delta} | {' | '.join(row)} |", flush=True)
    shutil.rmtree(packed)
    shutil.rmtree(plain)


if __name__ == "__main__":
    main()
