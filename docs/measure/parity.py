"""Logits of a dense model and of everything `ders upcycle` makes of it, in fp32.

    python docs/measure/parity.py DENSE WORK

Loads each form as a user does (DeRS folders packed, `--full` by stock transformers) and prints the largest difference of
a logit beside the largest logit, over 4 sequences of 128 random tokens. What fp32 itself costs comes first: the dense
model against itself in fp64.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import ders_cli.hf  # noqa: F401

FORMS = (
    ("--full",),
    ("--rank", "16"),
    ("--sparse", "0.99"),
    ("--sparse", "0.9999"),
    ("--full", "--split", "2"),
    ("--rank", "16", "--split", "2"),
    ("--rank", "16", "--layers", "even"),
    ("--rank", "16", "--top-k", "4"),
)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


def main() -> None:
    logging.disable_progress_bar()
    dense, work = Path(sys.argv[1]), Path(sys.argv[2]) / "upcycled"
    expected = logits(dense)
    error = (expected.double() - logits(dense, torch.float64)).abs().max()
    print(f"dense: largest logit {expected.abs().max():.2f}, in fp32 off by {error:.1e} from fp64")
    for form in FORMS:
        shutil.rmtree(work, ignore_errors=True)
        command = [sys.executable, "-m", "ders_cli", "upcycle", dense, "--experts", "4", *form, "-o", work, "-q"]
        subprocess.run(command, check=True, capture_output=True)
        error = (logits(work) - expected).abs().max()
        print(
            f"{' '.join(form):28s} {error:.1e}, relative to the largest {error / expected.abs().max():.1e}", flush=True
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
