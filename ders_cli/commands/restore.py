"""ders restore"""

from .. import options as o

SCHEMA = 1


def restore(
    model: o.MODEL,
    output: o.OUTPUT = None,
    jobs: o.JOBS = None,
    engine: o.ENGINE = "local",
    address: o.ADDRESS = None,
    scratch: o.SCRATCH = None,
    dry_run: o.DRY_RUN = False,
    overwrite: o.OVERWRITE = False,
    resume: o.RESUME = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Write the plain MoE checkpoint again, in the original's own layout and shards.

    After an exact conversion the files are the original's, byte for byte.

    Examples:

        ders restore mixtral-ders-int4 -o mixtral-again
    """
    from .. import restore as action
    from ..carried import changed
    from ..output import place_output
    from ..plain import planned_plain
    from ..report import print_json, say
    from ..source import open_source

    run = o.RunOptions(jobs, None, "5GB", dry_run, overwrite, resume, quiet, as_json, engine, address, scratch)
    out, options = place_output(output, model, "-restored", run.options())
    shown = options.target.shown(out)
    with open_source(model, scratch=scratch) as source:
        ders = action.require_ders(source, model)
        plan = planned_plain(ders) if dry_run else action.restore(ders, out, options)
        warnings = changed(ders)
    for warning in warnings:
        say(f"warning: {warning}")
    document = {
        "schema": SCHEMA,
        "command": "restore",
        "output": shown,
        "dry_run": dry_run,
        "plan": plan,
        "warnings": warnings,
    }
    if as_json:
        print_json(document)
    elif dry_run:
        print(f"would write {shown}: {plan['output_bytes']:,} bytes in {plan['shards']} weight file(s)")
    else:
        print(shown)


COMMAND = restore
