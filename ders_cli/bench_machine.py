"""What a measurement ran on: the processor's name, and versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """Its name in /proc/cpuinfo; elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*names: str) -> dict[str, str | None]:
    """Python's, and those of installed packages; None for one that isn't."""
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
