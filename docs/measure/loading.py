"""Memory and time of loading a checkpoint in transformers: stock, packed, and dequantised while loading.

    python docs/measure/loading.py STOCK DERS --rounds 5

Each load is a process of its own, the ways in turn, `--rounds` times; the table has medians. Anonymous memory is
`Anonymous` of /proc/self/smaps_rollup, less that of the process when its imports are done and a small model has run:
what is only mapped from the checkpoint's files is no part of it. First token: the prompt's pass, cold; next: the median
of the 31 that follow, greedily. Files are read once before, so they come from the page cache. Linux only.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, TOKENS = 16, 32


def anonymous() -> float:
    """MB."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024 / 1e6


def load_once(folder: str) -> dict[str, float]:
    """Load, pass a prompt, go on for some tokens."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    import ders_cli.hf  # noqa: F401 (registers the format)

    transformers.utils.logging.disable_progress_bar()
    _warm(transformers)
    idle, began = anonymous(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {"load": time.perf_counter() - began, "memory": anonymous() - idle}
    with torch.inference_mode():
        token, cache, seconds = torch.arange(5, 5 + PROMPT)[None], None, []
        for _ in range(TOKENS):
            began = time.perf_counter()
            output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            seconds.append(time.perf_counter() - began)
    found |= {"first": seconds[0], "next": statistics.median(seconds[1:]), "after": anonymous() - idle}
    return found


def _warm(transformers) -> None:
    """Run a model of a few kB, so that its class, and torch's own buffers, are no part of what is measured."""
    import torch

    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.MixtralForCausalLM(config).bfloat16()(torch.arange(8)[None], use_cache=True)


def in_own_process(folder: Path, dequantize: bool) -> dict[str, float]:
    environment = os.environ | {"DERS_DEQUANTIZE": "1" if dequantize else "0"}
    command = [sys.executable, __file__, "--one", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stock", type=Path, nargs="?")
    parser.add_argument("ders", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help="(for the processes that this one starts)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load_once(args.one)))
        return
    ways = {"stock": (args.stock, False), "packed": (args.ders, False), "dequantised": (args.ders, True)}
    files = {way: [p.read_bytes() for p in folder.glob("*.safetensors")] for way, (folder, _) in ways.items()}
    sizes = {way: sum(map(len, data)) / 1e6 for way, data in files.items()}
    del files
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, (folder, dequantize) in ways.items():
            found[way].append(in_own_process(folder, dequantize))
    print("| | weight files MB | anonymous MB, loaded | after 32 tokens | load s | first token s | next token s |")
    print("|---|---|---|---|---|---|---|")
    for way, runs in found.items():
        m = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {way} | {sizes[way]:.0f} | {m['memory']:.0f} | {m['after']:.0f} | {m['load']:.2f} | "
            f"{m['first']:.3f} | {m['next']:.4f} |"
        )


if __name__ == "__main__":
    main()
