"""`ders upcycle` from parsed options to a printed report."""

import hashlib
import re
from pathlib import Path
from typing import Any

from .errors import UsageError
from .options import RunOptions
from .report import human_bytes, print_json, print_table, say

SCHEMA = 1


def upcycle_command(
    dense: str,
    output: str | None,
    experts: int | None,
    per_layer: str | None,
    rank: int | None,
    sparse: float | None,
    full: bool,
    donors: list[Path],
    delta: str | None,
    top_k: int | None,
    layers: str,
    split: int,
    router: str,
    noise: float,
    average: bool,
    group_size: int | None,
    seed: int,
    run: RunOptions,
) -> None:
    from . import convert, upcycle
    from .blueprint import Upcycling
    from .codecs import parse_codec
    from .donors import is_adapter
    from .output import left_behind, output_bytes, place_output, refuse_within
    from .remote.address import is_remote, normal
    from .remote.reader import open_reader
    from .upcycled import UpcycledSource

    term = _form(rank, sparse, full, delta, donors)
    adapters = bool(donors) and term is None and not full and all(is_adapter(path) for path in donors)
    term = term or ("full" if full else "adapters" if adapters else "exact")
    if donors and experts not in (None, len(donors)):
        raise UsageError(f"--experts {experts}: there are {len(donors)} --expert-from, and each is one expert")
    if noise and not (full and not donors):
        raise UsageError("--noise goes with --full, without --expert-from: deltas that are trained start at 0")
    if average and (not donors or any(is_adapter(path) for path in donors)):
        raise UsageError("--average-others goes with fine-tunes as --expert-from: nothing else has other weights")
    kind, prompts = _router(router)
    parts = _parts(per_layer, full, donors, experts, prompts)
    count = experts or len(donors) or max(parts, default=4)
    names = tuple(path.resolve().name for path in donors)
    how = Upcycling(count, top_k or min(2, count), layers, split, kind, prompts, noise, average, names, parts)
    start = parse_codec(term, 128) if rank or sparse is not None else None
    if prompts and is_remote(dense):
        raise UsageError(
            f"--router {router}: runs the dense model, so it has to be here; download {normal(dense)} first"
        )
    ending = f"-moe{per_layer or count}-{term.replace(':', 'of')}"
    out, options = place_output(output, dense, ending, run.options())
    if prompts:
        refuse_within(out, Path(router))
    reader = open_reader(dense, run.scratch)
    with UpcycledSource(reader, how, donors, seed, options.max_shard_bytes, start, adapters) as source:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "command": "upcycle",
            "output": options.target.shown(out),
            "dry_run": run.dry_run,
        }
        document["model_type"] = source.config["model_type"]
        if full:
            conversion = None
            document["plan"] = upcycle.prepare_full(source, out, options)
            document["parameters"] = upcycle.counts(source, None)
        else:
            conversion = upcycle.prepare_deltas(
                source, None if adapters else term, 128 if group_size is None else group_size, out, options
            )
            document["plan"] = conversion.totals()
            codecs = {unit.group.name: unit.codec for unit in conversion.plan.units}
            document["parameters"] = upcycle.counts(source, codecs)
        document["fine_tunes"], document["averaged"] = upcycle.left_out(source, run.quiet), average
        document["router_agreement"] = None
        if not run.dry_run:
            if prompts:
                source.fitted, document["router_agreement"] = _fit(source.reader.folder, router, how.experts)
            if conversion:
                document["bytes"] = convert.run(conversion)["bytes"]
            else:
                upcycle.write_full(source, out, options)
            document["output_bytes"] = output_bytes(out, options)
        document["left_behind"] = left_behind(source.reader.folder)
    _print(document, run)


def _form(rank: int | None, sparse: float | None, full: bool, delta: str | None, donors: list[Path]) -> str | None:
    """The codec term of the form that was asked for; None: --full, or what suits the donors."""
    from .codecs.sparse import SparseCodec

    asked = {
        "--rank": rank is not None,
        "--sparse": sparse is not None,
        "--full": full,
        "--delta": delta is not None,
    }
    if sum(asked.values()) > 1:
        raise UsageError(f"{' and '.join(name for name, on in asked.items() if on)}: expected one of them")
    if donors and (asked["--rank"] or asked["--sparse"]):
        raise UsageError(
            "--expert-from brings its own deltas: expected --delta (such as exact or rank16) or --full with it"
        )
    if delta == "":
        raise UsageError("--delta: expected a codec such as int4, found an empty text")
    if delta is not None and not donors:
        raise UsageError(
            "--delta says how the deltas of --expert-from are stored; without it expected --rank, --sparse or --full"
        )
    if not donors and not any(asked.values()):
        raise UsageError("expected --rank R, --sparse P or --full: what each expert has of its own")
    if rank is not None:
        return f"rank{rank}"
    return SparseCodec(sparse).term if sparse is not None else delta


def _parts(
    per_layer: str | None, full: bool, donors: list[Path], experts: int | None, prompts: str | None
) -> tuple[int, ...]:
    """--experts-per-layer as numbers."""
    if per_layer is None:
        return ()
    others = {"--experts": experts, "--full": full, "--expert-from": donors, "--router with prompts": prompts}
    if other := next((name for name, given in others.items() if given), None):
        why = "no stock class has layers with different numbers" if other == "--full" else "it says how many by itself"
        raise UsageError(f"--experts-per-layer and {other}: expected one of them; {why}")
    if not re.fullmatch(r"[1-9][0-9]{0,3}(-[1-9][0-9]{0,3})+", per_layer):
        raise UsageError(
            f"--experts-per-layer {per_layer!r:.60}: expected numbers for parts of the depth, such as 2-4-6-8"
        )
    return tuple(int(part) for part in per_layer.split("-"))


def _router(router: str) -> tuple[str, str | None]:
    """normal, zero or prompts; and of these the SHA-256."""
    if router in ("normal", "zero"):
        return router, None
    if not Path(router).is_file():
        raise UsageError(f"--router {router}: expected normal, zero or a YAML file with prompts; no such file")
    with Path(router).open("rb") as file:
        return "prompts", hashlib.file_digest(file, "sha256").hexdigest()


def _fit(dense: Path, router: str, experts: int) -> Any:
    from .router_fit import fit_routers

    return fit_routers(dense, Path(router), experts)


def _print(document: dict[str, Any], run: RunOptions) -> None:
    if document["left_behind"] and not run.dry_run:
        say(f"note: not carried along: {', '.join(document['left_behind'])}")
    if run.as_json:
        print_json(document)
        return
    if run.quiet:
        print(document["output"])
        return
    plan, parameters = document["plan"], document["parameters"]
    print(f"would write {document['output']}" if run.dry_run else document["output"])
    written = human_bytes(document.get("output_bytes", plan["output_bytes"]))
    bound = "" if plan["exact"] or not run.dry_run else "at most "
    rows = [["bytes", human_bytes(plan["source_bytes"]), "", bound + written]]
    if parameters["added"] is not None:
        dense, added = parameters["dense"], parameters["added"]
        rows.insert(0, ["parameters", f"{dense:,}", f"{added:,}", f"{dense + added:,}"])
    print_table(document["model_type"], ["", "dense", "added", "MoE"], rows)
    for entry in document["fine_tunes"]:
        differ = f"{entry['tensors']} of its {entry['of']} tensors outside the FFN differ from the dense model's"
        size = f", by {entry['relative']:.2e} of their size" if entry["relative"] else ""
        fate = "the MoE has the fine-tunes' mean" if document["averaged"] else "an expert does not hold them"
        print(f"{entry['donor']}: {differ}{size}{f'; {fate}' if entry['tensors'] else ''}")
    if document["router_agreement"] is not None:
        print(
            f"router: puts a prompt's own expert first for {document['router_agreement']:.1%} of its tokens, the prompt left out of the fit"
        )
