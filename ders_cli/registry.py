"""Finding what a folder of modules offers: one module, one offered object; a duplicate is an error.

A codec or a command arrives as one file in its folder. Nothing is listed by hand, so nothing can be forgotten.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def discover(package: ModuleType, attribute: str) -> dict[str, Any]:
    """Import each module of `package` that defines `attribute`; return {module name: object}, sorted by name.

    Raises RuntimeError if two modules offer the same object: one of them would never be reached.
    """
    offered: dict[str, Any] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if not hasattr(module, attribute):
            continue
        found = getattr(module, attribute)
        for other, seen in offered.items():
            if seen is found:
                raise RuntimeError(f"{package.__name__}: {other}.py and {info.name}.py both offer {found!r}")
        offered[info.name] = found
    return offered
