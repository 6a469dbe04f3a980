"""Compile every Triton kernel for GPUs that need not be here, and refuse what would not run well there.

    python docs/measure/aot.py                            the table; exit 1 if a case fails
    python docs/measure/aot.py --write docs/kernels.md    put it between the page's two markers
    python docs/measure/aot.py --check docs/kernels.md    exit 1 if the page has other cases or other verdicts

A case (config.Case) is one kernel as it is launched. For each case and each target:

- it compiles;
- a case that multiplies matrices has matrix instructions: v_mfma on gfx942; on sm_90a wgmma where W's tile has the 64
  rows and the program the 4 warps that it takes; mma.sync elsewhere;
- nothing is spilled from registers to memory: no spill on NVIDIA; on AMD no vector register and no scratch. Scalar
  registers that AMD's compiler puts into lanes of vector registers stay in the processor; the table shows how many;
- shared memory is within what a block may have, which the compiler itself doesn't look at.

A kernel without a case fails too. Numbers are of the triton that is installed: registers differ between versions.
Needs neither a GPU nor a driver: triton's wheel carries ptxas and AMD's linker.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("TRITON_INTERPRET is set: kernels are then Python for the interpreter and can't be compiled; unset it")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BEGIN, END = "<!-- aot.py: begin -->", "<!-- aot.py: end -->"
PROCESSES = 2
# Arguments that are multiples of 16 in every model met so far: Triton then loads 16 bytes at once. Others may be any.
MULTIPLES_OF_16 = ("out", "width", "inner", "row_bytes", "row_words", "plane_width", "split_stride")


@dataclass(frozen=True)
class Target:
    """What a block may have. CUDA: C++ Programming Guide, "Technical Specifications per Compute Capability" (registers
    of a thread; shared memory of a block). AMD: "CDNA3 ISA", section 3.6 (VGPRs, the accumulation ones among them) and
    11 (LDS)."""

    gpu: GPUTarget
    registers: int
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 255, 163 << 10),  # A100
    "sm_90a": Target(GPUTarget("cuda", 90, 32), 255, 227 << 10),  # H100, H200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 512, 64 << 10),  # MI300X
}


@dataclass
class Compiled:
    """One case for one target; `wrong` says what the gate has against it."""

    matrix: str = ""  # which matrix instruction, "" if none
    count: int = 0  # of it in the program's text
    registers: int = 0
    scalars: int = 0  # AMD's, kept in lanes of vector registers
    shared: int = 0
    wrong: list[str] = field(default_factory=list)

    def cell(self) -> str:
        """For the table: matrix instructions, registers of a thread, bytes of shared memory."""
        if self.wrong:
            return "**fails: " + "; ".join(self.wrong) + "**"
        matrix = f"{self.count} {self.matrix}, " if self.matrix else ""
        scalars = f" (+{self.scalars} scalar)" if self.scalars else ""
        return f"ok: {matrix}{self.registers} r{scalars}, {self.shared:,} B"


def modules(package: str) -> list[ModuleType]:
    """Every module right in a package."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)]


def kernels(among: list[ModuleType]) -> list[JITFunction]:
    """Those that are launched: Triton functions of these modules that no other one calls."""
    own = {
        id(one): one
        for module in among
        for one in vars(module).values()
        if isinstance(one, JITFunction) and one.fn.__module__ == module.__name__
    }
    called = set()
    for one in own.values():
        for node in ast.walk(ast.parse(one.src)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(id(one.fn.__globals__.get(node.func.id)))
    return [one for number, one in own.items() if number not in called]


def source(case) -> ASTSource:
    """A case as the compiler takes it."""
    signature, constants, hints = {}, {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name], constants[(place,)] = "constexpr", case.constants[name]
            continue
        signature[name] = "*" + case.pointers[name] if name in case.pointers else "i32"
        if name in case.pointers or name in MULTIPLES_OF_16:
            hints[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=hints)


def compiled(case, name: str) -> Compiled:
    """Compile one case for one target and judge it."""
    target, found = TARGETS[name], Compiled()
    amd = target.gpu.backend == "hip"
    options = {"num_warps": case.config.warps, "num_stages": case.config.pipelined(amd)}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):  # where Triton prints ptxas's account
            binary = triton.compile(source(case), target=target.gpu, options=options)
    except Exception as error:  # whatever stops the compiler is a finding about the case
        lines = str(error).strip().splitlines() or [""]
        found.wrong.append(f"does not compile, {type(error).__name__}: {lines[0]} {lines[-1]}"[:300])
        return found
    if amd:
        _read_amd(binary.asm["amdgcn"], found)
    else:
        _read_nvidia(binary.asm["ptx"], log.getvalue(), found)
    found.shared = max(found.shared, binary.metadata.shared)
    if found.registers > target.registers:
        found.wrong.append(f"{found.registers} registers of {target.registers}")
    if found.shared > target.shared:
        found.wrong.append(f"{found.shared:,} bytes of shared memory of {target.shared:,}")
    if case.dots and found.matrix != (wanted := matrix_instruction(case.config, name)):
        found.wrong.append(f"{found.matrix or 'no matrix instructions'} where {wanted} is expected")
    return found


def matrix_instruction(config, target: str) -> str:
    """Which one the tile allows."""
    if target == "gfx942":
        return "mfma"
    return "wgmma" if target == "sm_90a" and config.rows >= 64 and config.warps % 4 == 0 else "mma"


def _read_nvidia(ptx: str, log: str, found: Compiled) -> None:
    """Fill in what PTX and the log of `ptxas -v` say of it."""
    for name, spelled in (("wgmma", r"wgmma\.mma_async"), ("mma", r"mma\.sync")):
        if count := len(re.findall(rf"^\s*(?:@!?%p\d+\s+)?{spelled}", ptx, re.MULTILINE)):
            found.matrix, found.count = name, count
            break
    stored, loaded = _number(r"(\d+) bytes spill stores", log), _number(r"(\d+) bytes spill loads", log)
    found.registers = _number(r"Used (\d+) registers", log)
    if stored or loaded:
        found.wrong.append(f"spills {stored} bytes, reloads {loaded}")


def _read_amd(text: str, found: Compiled) -> None:
    """The same from AMD's assembly, whose metadata end the file."""
    if count := len(re.findall(r"^\s*v_mfma", text, re.MULTILINE)):
        found.matrix, found.count = "mfma", count
    found.registers = _number(r"\.vgpr_count:\s*(\d+)", text)  # with the accumulation registers
    found.shared = _number(r"\.group_segment_fixed_size:\s*(\d+)", text)
    vectors, found.scalars = (_number(rf"\.{kind}gpr_spill_count:\s*(\d+)", text) for kind in "vs")
    scratch = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    if vectors:
        found.wrong.append(f"spills {vectors} vector registers")
    if scratch or re.search(r"^\s*scratch_", text, re.MULTILINE):
        found.wrong.append(f"{scratch} bytes of scratch")


def _number(pattern: str, text: str) -> int:
    """The one number that must be there: a compiler that words it otherwise must not pass for 0."""
    found = re.search(pattern, text)
    if not found:
        raise LookupError(f"no {pattern!r} in what the compiler says; has triton {triton.__version__} changed it?")
    return int(found[1])


_cases: list = []  # a worker is a fork of this process and finds them here; kernels can't be sent


def _job(job: tuple[int, str]) -> Compiled:
    return compiled(_cases[job[0]], job[1])


def compile_all(cases: list) -> list[dict[str, Compiled]]:
    """Every case by target, in order; compiled now, whatever is in Triton's cache."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    _cases[:] = cases
    jobs = [(number, target) for number in range(len(cases)) for target in TARGETS]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        found = iter(pool.map(_job, jobs))
        return [{target: next(found) for target in TARGETS} for _ in cases]


def table(cases: list, found: list[dict[str, Compiled]]) -> str:
    """Markdown; a column for each target, with its limits."""
    limits = [f"{name}: of {t.registers} r, {t.shared:,} B" for name, t in TARGETS.items()]
    lines = ["| case | tile | " + " | ".join(limits) + " |", "|---" * (2 + len(TARGETS)) + "|"]
    for case, by_target in zip(cases, found):
        cells = [_title(case), tile(case.config), *(one.cell() for one in by_target.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _title(case) -> str:
    return case.name if case.name.startswith(case.kernel.__name__) else f"{case.kernel.__name__}: {case.name}"


def tile(config) -> str:
    """Tokens x rows x columns, warps, stages, programs that share the columns; 0 for what a kernel has no tile of."""
    splits = f" /{config.splits}" if config.splits > 1 else ""
    return f"{config.tokens}x{config.rows}x{config.columns} w{config.warps} s{config.stages}{splits}"


def verdicts(text: str) -> list[str]:
    """Of a page or a table: each row's case and tile, and by target `ok` or `fails` and the matrix instruction."""
    if BEGIN in text:
        text = text.split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [" | ".join([*row[:2], *map(_verdict, row[2:])]) for row in rows[2:]]


def _verdict(cell: str) -> str:
    matrix = re.search(r"\d+ (wgmma|mma|mfma)", cell)
    return "fails" if "fails" in cell else "ok " + matrix[1] if matrix else "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="ders_kernels.triton_ops", help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in their name or their kernel's")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--write", type=Path, metavar="PAGE", help="replace the table between the page's markers")
    does.add_argument("--check", type=Path, metavar="PAGE", help="compare with the page's table")
    given = parser.parse_args()
    began, among = time.time(), modules(given.package)
    cases = [case for module in among for case in getattr(module, "CASES", ())]
    uncovered = {id(one): one for one in kernels(among)}
    for case in cases:
        uncovered.pop(id(case.kernel), None)
    cases = [case for case in cases if (given.only or "") in _title(case)]
    found = compile_all(cases)
    made = table(cases, found)

    wrong = [f"{one.fn.__module__}.{one.__name__}: no case in CASES" for one in uncovered.values()]
    for case, by_target in zip(cases, found):
        for name, one in by_target.items():
            wrong += [f"{_title(case)} {tile(case.config)} {name}: {reason}" for reason in one.wrong]
    if not cases:
        wrong.append(f"no case in {given.package}" + f" with {given.only!r} in its name" * bool(given.only))
    if given.check:
        page = verdicts(given.check.read_text())
        if given.only:
            page = [row for row in page if given.only in row.split(" | ")[0]]
        changes = difflib.unified_diff(page, verdicts(made), str(given.check), "compiled now", lineterm="", n=0)
        wrong += [f"page: {line}" for line in changes]
    elif given.write:
        text = given.write.read_text()
        if BEGIN not in text or END not in text:
            sys.exit(f"{given.write}: expected the lines {BEGIN} and {END} around the table; found none")
        given.write.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{made}\n{END}{text.split(END)[1]}")
    else:
        print(made)
    print(
        f"{len(cases)} cases x {len(TARGETS)} targets in {time.time() - began:.0f} s, {PROCESSES} processes, "
        f"triton {triton.__version__}",
        file=sys.stderr,
    )
    for line in wrong:
        print("FAIL", line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
