"""Loss of plans that a budget chose, beside every codec alone: stock transformers, real weights, held-out text.

    python docs/measure/budget.py MODEL TOKENS.json OUT.jsonl --base DENSE --plan 0.2bpw --plan ternary0.02 --plan RECIPE.yaml ...

A plan is a budget, a codec for all matrices, or a recipe file. MODEL is converted so and restored, the restored folder is run by stock
AutoModelForCausalLM in fp32, and printed are, of TOKENS.json ({"domain": [[token, ...], ...]}), the mean next-token loss of each
domain above the original's, in nats, and the mean divergence KL(original || plan) per token of the first sequences of
each domain, which has far less noise than a difference of losses. `--sequences` takes fewer of each domain. Results are
appended to OUT.jsonl; a plan that stands there already is not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from ders_cli import convert
from ders_cli.base import make_base
from ders_cli.budget.limits import parse_budget
from ders_cli.budget.spend import spend
from ders_cli.errors import UsageError
from ders_cli.output import Options
from ders_cli.recipe import load_recipe, make_recipe
from ders_cli.restore import restore
from ders_cli.source import open_source

COMPARED = 2  # sequences of each domain for the divergence: 256 tokens of 50,000 numbers each


class Judge:
    """The original's losses and log-probabilities, and what a converted folder does to them."""

    def __init__(self, model: Path, tokens: dict[str, list[list[int]]]):
        self.tokens, self.kept = tokens, {}
        self.loss, _ = self.of(model)

    def of(self, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss and mean divergence from the original, per domain. The first call is the original's."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loss, divergence = {}, {}
        with torch.inference_mode():
            for domain, sequences in self.tokens.items():
                total, count, apart = 0.0, 0, []
                for number, sequence in enumerate(sequences):
                    ids = torch.tensor([sequence])
                    logs = model(ids).logits[0, :-1].log_softmax(-1)  # [tokens, vocabulary]
                    total -= logs.gather(1, ids[0, 1:, None]).sum().item()
                    count += ids.shape[1] - 1
                    if number < COMPARED:
                        original = self.kept.setdefault((domain, number), logs)
                        apart.append((original.exp() * (original - logs)).sum(-1).mean().item())
                loss[domain], divergence[domain] = total / count, float(np.mean(apart))
        return loss, divergence


def converted(model: Path, base: str, plan: str, out: Path, plain: Path) -> dict:
    """Convert MODEL by a plan and restore it; what was predicted and what was written."""
    with open_source(model) as source:
        chosen_base, row = make_base(base), {}
        if plan.endswith(".yaml"):
            recipe = load_recipe(plan, {"base": base})
        else:
            recipe = make_recipe({"delta": "exact", "base": base})
            try:
                spent = spend(source, chosen_base, recipe, parse_budget(plan))
                recipe = spent.recipe
                (out.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json") | {"base": base}))
                recipe = load_recipe(str(out.parent / "recipe.yaml"), {})  # as a file would say it
                row = {"predicted": spent.predicted, "gap": spent.gap, "rules": len(recipe.rules)}
            except UsageError:
                recipe = make_recipe({"delta": plan, "base": base})
        manifest = convert.run(convert.prepare(source, recipe, out, Options(), chosen_base))
    with open_source(out) as packed:
        restore(packed, plain, Options())
    return row | {"bits": manifest["bytes"]["bits_per_delta_weight"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="mean")
    parser.add_argument("--plan", action="append", default=[])
    parser.add_argument("--sequences", type=int)
    args = parser.parse_args()
    tokens = json.loads(args.tokens.read_text())
    tokens = {domain: rows[: args.sequences] for domain, rows in tokens.get("domains", tokens).items()}
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    judge = Judge(args.model, tokens)
    for plan in args.plan:
        if any(row["plan"] == plan and row["base"] == Path(args.base).name for row in done):
            continue
        began, row = time.time(), {"plan": plan, "base": Path(args.base).name}
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch, "plain")
            row |= converted(args.model, args.base, plan, Path(scratch, "packed"), plain)
            loss, divergence = judge.of(plain)
        above = {domain: loss[domain] - judge.loss[domain] for domain in loss}
        row |= {"above": above, "mean": float(np.mean(list(above.values()))), "worst": max(above.values())}
        row |= {"divergence": divergence, "kl": float(np.mean(list(divergence.values())))}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{plan:16s} {row['bits']:7.4f} bits  mean {row['mean']:+.5f}  worst {row['worst']:+.5f}  KL {row['kl']:.6f}  "
            f"({time.time() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
