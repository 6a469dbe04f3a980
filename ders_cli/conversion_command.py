"""What compress, decompose, sparsify and quantize have in common: from parsed options to a written report."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choosing import NOTHING, Choosing, chosen
from .errors import UsageError
from .options import RunOptions
from .report import human_bytes, print_json, print_table, say

if TYPE_CHECKING:  # nothing heavy is imported until a command runs
    from .budget.spend import Spent
    from .convert import Conversion
    from .output import Options
    from .recipe import Recipe

SCHEMA = 1
UNLIKE = 0.5  # |delta| / |weight|: below 0.2 for experts of one ancestor, sqrt(1 - 1/E) for independent ones


def convert_command(
    command: str,
    model: str,
    output: str | None,
    fields: dict[str, Any],
    recipe_file: str | None,
    run: RunOptions,
    choosing: Choosing = NOTHING,
) -> None:
    """Plan and run one conversion, and print it. `fields`: the recipe's keys that flags gave; None means: not given."""
    from .output import place_output, refuse_within

    choosing.check()
    recipe, ending = choose_recipe(fields, recipe_file)
    out, options = place_output(output, model, choosing.ending(ending), run.options())
    refuse_within(out, *choosing.inputs(), *([Path(recipe_file)] if recipe_file and Path(recipe_file).exists() else []))
    document = convert_model(command, model, out, options, recipe, run, choosing)
    if run.as_json:
        print_json(document)
    elif run.dry_run:
        _print_plan(document)
    elif not run.quiet:
        _print_summary(document)
    else:
        print(document["output"])


def choose_recipe(fields: dict[str, Any], recipe_file: str | None) -> "tuple[Recipe, str]":
    """The recipe that flags and file give, and what it adds to a model's name. Raises UsageError."""
    from .recipe import load_recipe, make_recipe

    if fields.get("delta") == "":
        raise UsageError("--delta: expected a codec such as int4, found an empty text")
    given = {key: value for key, value in fields.items() if value is not None and value is not False}
    recipe = load_recipe(recipe_file, given) if recipe_file else make_recipe(given)
    name = Path(recipe_file).stem if recipe_file and "delta" not in given else recipe.delta
    return recipe, f"-ders-{name.replace(':', 'of')}"


def convert_model(
    command: str,
    model: str,
    out: Path,
    options: "Options",
    recipe: "Recipe",
    run: RunOptions,
    choosing: Choosing = NOTHING,
) -> dict[str, Any]:
    """Plan one conversion and, unless `run` is dry, run it; the document that --json prints."""
    from . import convert
    from .source import open_source

    with (
        open_source(model, recipe.shared, run.scratch) as source,
        chosen(source, recipe, out, options, choosing, run.dry_run) as (conversion, spent),
    ):
        if run.dry_run:
            return _planned(command, conversion) | _bought(spent)
        document = finished(command, conversion, convert.run(conversion)) | _bought(spent)
    for warning in document["warnings"]:
        say(f"warning: {warning}")
    if document["left_behind"]:
        say(f"note: not carried along: {', '.join(document['left_behind'])}")
    return document


def _planned(command: str, conversion: "Conversion", dry_run: bool = True) -> dict[str, Any]:
    shown = conversion.options.target.shown(conversion.out)
    return {"schema": SCHEMA, "command": command, "output": shown, "dry_run": dry_run, "plan": conversion.totals()}


def _bought(spent: "Spent | None") -> dict[str, Any]:
    return {} if spent is None else {"budget": spent.document()}


def finished(command: str, conversion: "Conversion", manifest: dict[str, Any]) -> dict[str, Any]:
    """The document of a conversion whose output stands there; `manifest`: its ders.json."""
    from .carried import changed
    from .output import left_behind, output_bytes

    return _planned(command, conversion, dry_run=False) | {
        "recipe": manifest["recipe"],
        "bytes": manifest["bytes"],
        "errors": _worst_errors(manifest),
        "output_bytes": output_bytes(conversion.out, conversion.options),
        "warnings": [*changed(conversion.source), *_warnings(manifest)],
        "left_behind": left_behind(conversion.source.reader.folder),
    }


def _errors_of(bought: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in bought["predicted"].items() if name.endswith("_error")]


def _worst_errors(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per projection the mean and the worst relative error, over all experts and layers."""
    found: dict[str, dict[str, float]] = {}
    for projection in dict.fromkeys(entry["projection"] for entry in manifest["groups"]):
        entries = [entry for entry in manifest["groups"] if entry["projection"] == projection]
        errors = [_numbers(member["error"]) for entry in entries for member in entry["members"]]
        weight = [error["weight"] for error in errors]
        found[projection] = {
            "weight_mean": sum(weight) / len(weight),
            "weight_worst": max(weight),
            "delta_worst": max(error["delta"] for error in errors),
            "max_abs": max(error["max_abs"] for error in errors),
        }
    return found


def _numbers(error: dict[str, float | None]) -> dict[str, float]:
    """An expert's errors; ders.json has null for one that is infinite: relative to an expert of zeros."""
    return {name: math.inf if value is None else value for name, value in error.items()}


def _warnings(manifest: dict[str, Any]) -> list[str]:
    """What the numbers say against this conversion: experts that are not alike."""
    members = [_numbers(member["error"]) for entry in manifest["groups"] for member in entry["members"]]
    measured = [error for error in members if error["delta"] > 0 and math.isfinite(error["weight"])]
    sizes = [error["weight"] / error["delta"] for error in measured]  # |D| / |W|
    if sizes and sum(sizes) / len(sizes) > UNLIKE:
        share = f"{sum(sizes) / len(sizes):.0%}"
        return [
            f"these experts are not alike: their deltas are {share} as large as the weights. Lossy deltas ruin such a model; "
            "it was hardly upcycled from one dense model. Keep the original"
        ]
    bits, width = manifest["bytes"]["bits_per_delta_weight"], 32 if manifest["groups"][0]["dtype"] == "F32" else 16
    if not sizes and bits > width / 2:
        return [
            f"these experts are not alike: {bits:.1f} of {width} bits per weight are left of their deltas. Exact saves little here"
        ]
    return []


def _print_plan(document: dict[str, Any]) -> None:
    plan = document["plan"]
    bound = "" if plan["exact"] else "at most "
    print(f"would write {document['output']}")
    print(f"  in      {plan['source_bytes']:>16,} bytes, of which experts {plan['expert_bytes']:,}")
    print(
        f"  out     {bound}{plan['output_bytes']:>16,} bytes in {plan['shards']} weight file(s), ders.json and all others included"
    )
    if not plan["exact"]:
        print("          (an exact stream's size is known only after encoding)")
    print(f"  memory  about {human_bytes(plan['peak_memory_bytes'])} above an idle process")
    if "budget" in document:
        from .budget.spent import print_curve

        print_curve(document["budget"])


def _print_summary(document: dict[str, Any]) -> None:
    size, source, kept = document["bytes"], document["plan"]["source_bytes"], document["output_bytes"]
    stored = size["base"] + size["delta"]
    print(document["output"])
    rows = [
        ["whole folder", human_bytes(source), human_bytes(kept), f"{kept / source:.1%}"],
        ["experts", human_bytes(size["experts"]), human_bytes(stored), f"{stored / size['experts']:.1%}"],
        ["  base", "", human_bytes(size["base"]), ""],
        ["  deltas", "", human_bytes(size["delta"]), f"{size['bits_per_delta_weight']:.3f} bits/weight"],
    ]
    print_table("", ["", "before", "after", "share"], rows)
    if "budget" in document:
        predicted = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in _errors_of(document["budget"]))
        print(f"Codecs chosen for {document['budget']['budget']}; predicted {predicted}.")
    errors = document["errors"]
    if all(error["weight_worst"] == 0 for error in errors.values()):
        print("Exact: every expert restores byte for byte (proof: ders verify).")
        if stored >= 0.98 * size["experts"]:
            print("Base and deltas are about as large as the experts were: this saves nothing. Keep the original.")
        return
    rows = [
        [name, f"{e['weight_mean']:.2e}", f"{e['weight_worst']:.2e}", f"{e['max_abs']:.2e}"]
        for name, e in errors.items()
    ]
    print_table("relative weight error", ["projection", "mean", "worst", "largest abs"], rows)
