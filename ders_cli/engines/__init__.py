"""Where the jobs of output shards run: in this process (local.py), or on the nodes of a Ray cluster (ray.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import UsageError


def find_engine(name: str, address: str | None, cores: int, asked: bool) -> Callable[..., Any]:
    """The `run_shards` of an engine, as local.py has it. Nothing is started yet.

    `address`: a Ray cluster's; None starts one here, of `cores` CPUs. `asked`: the user said how many threads a job has.
    Raises UsageError for another name, an address that doesn't fit, and where Ray is not installed.
    """
    if name == "local":
        if address is not None:
            raise UsageError(f"--address {address}: goes with --engine ray")
        from . import local

        return local.run_shards
    if name != "ray":
        raise UsageError(f"--engine {name!r:.40}: expected local or ray")
    from . import ray

    ray.require_ray()
    return partial(ray.run_shards, ray.checked_address(address), cores, asked)
