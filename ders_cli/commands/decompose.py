"""ders decompose"""

from .. import options as o
from ..conversion_command import convert_command


def decompose(
    model: o.MODEL,
    output: o.OUTPUT = None,
    base: o.BASE = None,
    shared: o.SHARED = False,
    jobs: o.JOBS = None,
    max_memory: o.MAX_MEMORY = None,
    max_shard_size: o.SHARD_SIZE = "5GB",
    engine: o.ENGINE = "local",
    address: o.ADDRESS = None,
    scratch: o.SCRATCH = None,
    dry_run: o.DRY_RUN = False,
    overwrite: o.OVERWRITE = False,
    resume: o.RESUME = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Split a MoE into a base and exact deltas: smaller, and lossless to the bit.

    Examples:

        ders decompose mixtral

        ders decompose mixtral --base mistral-7b -o mixtral-exact
    """
    fields = {"delta": "exact", "base": base, "shared": shared}
    run = o.RunOptions(
        jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json, engine, address, scratch
    )
    convert_command("decompose", model, output, fields, None, run)


COMMAND = decompose
