"""ders restore"""

import json

from .. import options as o

SCHEMA = 1


def restore(
    model: o.MODEL,
    output: o.OUTPUT = None,
    jobs: o.JOBS = None,
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
    from ..output import Options
    from ..plain import planned_plain
    from ..source import open_source

    out = (output or model.absolute().with_name(f"{model.absolute().name}-restored")).resolve()
    options = Options(jobs or o.default_jobs(), overwrite=overwrite, resume=resume, quiet=quiet)
    with open_source(model) as source:
        ders = action.require_ders(source, model)
        plan = planned_plain(ders) if dry_run else action.restore(ders, out, options)
    document = {"schema": SCHEMA, "command": "restore", "output": str(out), "dry_run": dry_run, "plan": plan}
    if as_json:
        print(json.dumps(document, indent=1))
    elif dry_run:
        print(f"would write {out}: {plan['output_bytes']:,} bytes in {plan['shards']} weight file(s)")
    else:
        print(out)


COMMAND = restore
