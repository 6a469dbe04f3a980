"""Fuzz one target, or all, for some minutes of processor time: python tests/fuzz/run.py TARGET [--minutes 10] [--corpus DIR]

Needs atheris (pip install 'ders-cli[fuzz]'). New inputs go to --corpus (default: a temporary folder), findings to --findings. Kernels run
as Python under the fuzzer's eyes (--kernels python) or compiled with bounds checked (--kernels checked). Exit code 1: a finding.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.targets import Target

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT / folder) for folder in (".", "kernels", "tests")]
KERNELS = {"python": {"NUMBA_DISABLE_JIT": "1"}, "checked": {"NUMBA_BOUNDSCHECK": "1"}}
RSS_MB, SECONDS_AN_INPUT = 1024, 60
STATUS = re.compile(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--all", action="store_true", help="every target in turn")
    parser.add_argument("--minutes", type=float, default=10, help="of processor time, for each target")
    parser.add_argument("--corpus", type=Path, help="folder that new inputs are kept in, one below it for each target")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir(), "fuzz-findings"))
    parser.add_argument("--kernels", choices=KERNELS, help="default: python, for manifest checked")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return _fuzz(given.target, Path(given.child[0]), Path(given.child[1]), given.minutes, given.kernels)
    sys.path[:0] = PATHS
    from fuzz.targets import TARGETS

    if given.all == bool(given.target) or (given.target and given.target not in TARGETS):
        parser.error(f"expected --all or one of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        names = TARGETS if given.all else [given.target]
        results = [_run(name, given, Path(folder), TARGETS[name]) for name in names]
    return max(results)


def _run(name: str, given: argparse.Namespace, folder: Path, target: "Target") -> int:
    """One target in a process of its own; prints a line and returns 0, or 1 where it ended in any other way than by its time."""
    corpus, seeds = (given.corpus or folder / "new") / name, folder / name
    for made in (corpus, seeds, given.findings):
        made.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (seeds / f"seed{number:03}").write_bytes(seed)
    kernels = given.kernels or target.kernels
    log = given.findings / f"{name}.log"
    command = [sys.executable, __file__, name, "--minutes", str(given.minutes), "--kernels", kernels]
    command += ["--findings", str(given.findings), "--child", str(corpus), str(seeds)]
    before, (cov, features, kept) = resource.getrusage(resource.RUSAGE_CHILDREN), (0, 0, 0)
    first_cov, executions = 0, "?"
    with log.open("w") as written:
        child = subprocess.Popen(
            command, env=os.environ | KERNELS[kernels], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        for line in child.stdout:
            written.write(line)
            if found := STATUS.match(line):
                cov, features, kept = map(int, found.groups())
                first_cov = cov if "INITED" in line else first_cov
            elif line.startswith("executions: "):
                executions = line.split()[1]
        code = child.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    whole = code == 0 and executions != "?" and seconds > 59 * given.minutes
    print(
        f"{name}, kernels {kernels}: {executions} executions, cov {first_cov} -> {cov}, features {features}, corpus {kept}, "
        f"peak {after.ru_maxrss / 1024:.0f} MB, {seconds:.0f} CPU-s: "
        f"{'no finding' if whole else f'FINDING or early end (exit {code}), see {log}'}",
        flush=True,
    )
    return 0 if whole else 1


def _fuzz(name: str, corpus: Path, seeds: Path, minutes: float, kernels: str) -> int:
    """In the child: libFuzzer's loop, which does not return."""
    import atheris

    sys.path[:0] = PATHS
    seen = ["ders_cli", "yaml", "json"] + ["ders_kernels"] * (kernels == "python")  # what is compiled cannot be counted
    with atheris.instrument_imports(include=seen):
        if kernels == "python":
            from fuzz import python_kernels

            python_kernels.install()
        from fuzz.targets import TARGETS, finds

        import ders_cli.integrity
        import ders_cli.restore  # noqa: F401
    target, done, end = TARGETS[name], 0, 60 * minutes

    def one(data: bytes) -> None:
        nonlocal done
        if found := finds(target, data):
            raise found
        done += 1
        if done % 16 == 0 and time.process_time() > end:
            print(f"executions: {done}", flush=True)
            os._exit(0)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < (0.3 if target.words else 0.6):
            return target.mutate(data, rng)[:longest]
        return atheris.Mutate(data, longest)

    findings = next(Path(sys.argv[i + 1]) for i, word in enumerate(sys.argv) if word == "--findings")
    options = [f"-rss_limit_mb={RSS_MB}", f"-timeout={SECONDS_AN_INPUT}", f"-max_len={target.longest}"]
    options += [f"-artifact_prefix={findings}/{name}-", "-use_value_profile=1"]
    if target.words:
        words = seeds.with_suffix(".dict")
        quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in target.words)
        words.write_text("".join(f'"{word}"\n' for word in quoted))
        options.append(f"-dict={words}")
    folders = [corpus, seeds] + [HERE / "corpus" / name] * (HERE / "corpus" / name).is_dir()
    atheris.Setup([sys.argv[0], *options, *map(str, folders)], one, custom_mutator=mutate)
    atheris.Fuzz()
    return 1


if __name__ == "__main__":
    sys.exit(main())
