"""Loss of a MoE whose experts went through each codec: stock transformers, real weights, held-out text.

    python docs/measure/loss.py MODEL TOKENS.json OUT.jsonl --base DENSE --delta exact --delta int4 ...

Converts MODEL with each --delta, restores it, loads the restored folder with stock AutoModelForCausalLM in fp32 and
prints, per domain of TOKENS.json ({"domain": [[token, ...], ...]}), the mean next-token loss above the original's in
nats. `--delta rtn4` is the plain alternative: whole experts rounded to int4 by compressed-tensors, group 128, no base.
Results are appended to OUT.jsonl; a codec that stands there already is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def losses(folder: Path, tokens: dict[str, list[list[int]]]) -> dict[str, float]:
    """Mean next-token loss per domain, in nats, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    with torch.inference_mode():
        for domain, sequences in tokens.items():
            total, count = 0.0, 0
            for begin in range(0, len(sequences), 4):
                ids = torch.tensor(sequences[begin : begin + 4])
                logits = model(ids).logits[:, :-1]
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                ).item()
                count += ids[:, 1:].numel()
            found[domain] = total / count
    return found


def round_whole_experts(model: Path, out: Path, bits: int) -> float:
    """Experts rounded to nearest by compressed-tensors, symmetric, group 128, written back as bf16; bits per weight."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    groups = weights = 0
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if ".experts." not in name:
                continue
            size = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
            grouped = weight.float().unflatten(1, (-1, size))
            args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=size)
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            coded = quantize(weight.float(), scale, zero, args)
            tensors[name] = dequantize(coded, scale, zero, args).to(weight.dtype)
            groups, weights = groups + scale.numel(), weights + weight.numel()
        save_file(tensors, file, metadata={"format": "pt"})
    return bits + 16 * groups / weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="mean")
    parser.add_argument("--delta", action="append", default=[])
    args = parser.parse_args()
    tokens = json.loads(args.tokens.read_text())
    tokens = tokens.get("domains", tokens)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    original = next((row["loss"] for row in done if row["delta"] == "original"), None)
    if original is None:
        original = losses(args.model, tokens)
        _append(args.out, {"delta": "original", "base": "", "bits": 16.0, "loss": original})
    for delta in args.delta:
        if any(row["delta"] == delta and row["base"] == Path(args.base).name for row in done):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            began, row = time.time(), {"delta": delta, "base": Path(args.base).name}
            packed, plain = Path(scratch, "packed"), Path(scratch, "plain")
            if delta.startswith("rtn"):
                row |= {"base": "", "bits": round_whole_experts(args.model, plain, int(delta[3:]))}
            else:
                ders = [sys.executable, "-m", "ders_cli"]
                command = [
                    *ders,
                    "compress",
                    str(args.model),
                    "--delta",
                    delta,
                    "--base",
                    args.base,
                    "-o",
                    str(packed),
                    "--json",
                ]
                report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                row |= {
                    "bits": report["bytes"]["bits_per_delta_weight"],
                    "share": report["output_bytes"] / report["plan"]["source_bytes"],
                }
                subprocess.run([*ders, "restore", str(packed), "-o", str(plain), "-q"], check=True, capture_output=True)
            row["loss"] = losses(plain, tokens)
        above = {domain: row["loss"][domain] - original[domain] for domain in original}
        row |= {"above": above, "worst": max(above.values())}
        _append(args.out, row)
        print(
            f"{delta:16s} {row['bits']:7.3f} bits  worst {row['worst']:+.4f}  mean {sum(above.values()) / len(above):+.4f}  ({time.time() - began:.0f} s)",
            flush=True,
        )


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
