"""Imports go down only (docs/architecture.md); the kernels know nothing of checkpoints."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the roof down; a module imports from floors below its own
    {"__main__"},
    {"app"},
    {"commands"},
    {"batch"},
    {"conversion_command", "upcycle_command", "demonstration", "verify_report", "bench_report", "bench_convert_report"},
    {"choosing"},
    {"budget"},
    {"analysis"},
    {"bench_convert"},
    {"verify", "bench", "demo", "junit", "upcycle", "hf"},
    {"integrity"},
    {
        "convert",
        "calibration",
        "restore",
        "router_fit",
        "through_kernels",
        "bench_inputs",
        "bench_memory",
        "bench_stages",
    },
    {"compare", "convert_group", "plain", "upcycled", "runtime"},
    {"carried"},
    {"describe"},
    {"plan", "blueprint", "alignment"},
    {"recipe", "options", "backends", "aligned", "reports"},
    {"base", "source", "output", "donors"},
    {"engines", "users", "pictures"},
    {
        "report",
        "bench_clock",
        "bench_machine",
        "bench_model",
        "bench_traffic",
        "findings",
        "differences",
        "activations",
    },
    {"layouts", "calibrated"},
    {"architectures", "pairs", "codecs", "routers", "remote"},
    {"checkpoint"},
    {"errors", "registry"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def _imports(path: Path) -> list[str]:
    """Rooms of ders_cli that a file names, as first parts of dotted paths."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_imports_go_down() -> None:
    wrong = []
    for path in (ROOT / "ders_cli").rglob("*.py"):
        room = path.relative_to(ROOT / "ders_cli").parts[0].removesuffix(".py")
        for name in _imports(path):
            other = name.split(".")[1] if name.startswith("ders_cli.") else None
            if other in FLOOR and other != room and room != "__init__" and FLOOR[other] <= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.name.removesuffix(".py")
        for path in (ROOT / "ders_cli").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(FLOOR), rooms ^ set(FLOOR)


def test_every_package_is_installed() -> None:
    """setuptools is told the packages one by one; an editable install has them all, whatever the list says."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for top in ("ders_cli", "kernels") for path in (ROOT / top).rglob("__init__.py")]
    found = {".".join(path.relative_to(ROOT).parts).removeprefix("kernels.") for path in folders}
    assert set(listed) == found | {"ders_cli.recipes"}


def test_kernels_stand_alone() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [
            name for name in _imports(path) if name.split(".")[0] in ("ders_cli", "safetensors", "transformers")
        ], path
    assert not (ROOT / "kernels" / "__init__.py").exists()  # transformers would take it for Hugging Face's `kernels`


def test_docs_list_every_architecture_and_codec() -> None:
    from ders_cli.architectures import ARCHITECTURES
    from ders_cli.codecs import CODECS

    architectures, codecs = ((ROOT / "docs" / page).read_text() for page in ("architectures.md", "format.md"))
    assert not [m for a in ARCHITECTURES for m in a.model_types if f"`{m}`" not in architectures]
    assert not [name for name in CODECS if f'{{"codec": "{name}"' not in codecs]
