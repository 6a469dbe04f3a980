"""Train one upcycled model in every form: same dense model, text, seed, tokens and steps; compare what they reach and cost.

    python docs/measure/training.py DENSE WORK [--steps 60] [--only lm16] [--only lm16+frozen --rate 1e-3]

Forms: vanilla (`--full`, stock transformers), DeRS-LM (`--rank` 4 and 16), DeRS-SM (`--sparse` .99 and .9999), the last four with
the base trained and frozen. Trained are the FFN weights and the routers; attention, norms and embeddings stay. Every step
has one sequence of each of four kinds of text (the demo's: they come with Python, numpy and torch). Parameters are fp32,
products bf16 (autocast), AdamW at the demo's rate, without decay. Each form is a process of its own, one after the other.

Prints a line of JSON for each, then a table: held-out loss in fp32 (nats per token), trained parameters, bytes of the saved
folder (bf16 for all), peak resident memory (libraries and mapped files included), median seconds of a step.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORMS = {
    "vanilla": ("--full",),
    "lm4": ("--rank", "4"),
    "lm16": ("--rank", "16"),
    "sm.99": ("--sparse", "0.99"),
    "sm.9999": ("--sparse", "0.9999"),
}
SEED = 0


def train(dense: Path, folder: Path, form: str, frozen: bool, steps: int, rate: float | None) -> dict:
    """Train one form; its row."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    import ders_cli.hf
    from ders_cli import demo

    demo.import_transformers()
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if frozen:
        ders_cli.hf.freeze_base(model)
    for name, parameter in model.named_parameters():
        if ".experts." not in name and not name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate or demo.LEARNING_RATE, weight_decay=0)
    streams = demo.token_streams(dense)
    generator = torch.Generator().manual_seed(SEED)
    batches = torch.stack([demo.random_batches(text, steps, generator)[:, 0] for text, _ in streams.values()], dim=1)
    seconds, losses = [], []
    for step in range(steps):
        began = time.monotonic()
        ids = batches[step]  # [4, 256]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - began)
        losses.append(round(loss.item(), 4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.eval()
    with torch.no_grad():
        held_out = {kind: demo.mean_loss(model, ids) for kind, ids in demo.held_out(dense).items()}
    model.to(torch.bfloat16).save_pretrained(folder.with_name("trained"))
    return {
        "form": form,
        "base": "-" if form == "vanilla" else "frozen" if frozen else "trained",
        "held_out": sum(held_out.values()) / len(held_out),
        "by_kind": held_out,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "bytes": sum(path.stat().st_size for path in folder.with_name("trained").iterdir()),
        "peak_memory": peak,
        "seconds": statistics.median(seconds),
        "first_and_last_losses": [losses[0], losses[-1]],
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, help="learning rate (default: the demo's)")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--run", help="train this one form here, and print its row")
    args = parser.parse_args()
    if args.run:
        form, _, frozen = args.run.partition("+")
        print(json.dumps(train(args.dense, args.work / "model", form, bool(frozen), args.steps, args.rate)))
        return
    rows = []
    for name, options in FORMS.items():
        for run in [name] if name == "vanilla" else [name, f"{name}+frozen"]:
            if args.only and run not in args.only:
                continue
            for made in (args.work / "model", args.work / "trained"):
                shutil.rmtree(made, ignore_errors=True)
            ders = [sys.executable, "-m", "ders_cli", "upcycle", args.dense, *options]
            subprocess.run([*ders, "--experts", "4", "-o", args.work / "model", "-q"], check=True, capture_output=True)
            command = [sys.executable, __file__, args.dense, args.work, "--run", run, "--steps", str(args.steps)]
            command += ["--rate", str(args.rate)] if args.rate else []
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print("\n| form | base | held-out loss | above vanilla | trained parameters | bytes | peak memory | s a step |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        above = f"{row['held_out'] - rows[0]['held_out']:+.4f}" if rows[0]["form"] == "vanilla" else ""
        print(
            f"| {row['form']} | {row['base']} | {row['held_out']:.4f} | {above} | {row['trained_parameters']:,} | {row['bytes']:,} | "
            f"{row['peak_memory'] / 1e9:.2f} GB | {row['seconds']:.2f} |"
        )


if __name__ == "__main__":
    main()
