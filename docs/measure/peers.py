"""Conversions beside other tools' on the same bytes: time, memory, output.

    python docs/measure/peers.py SCRATCH --peers PYTHON                       a MoE made for it, 0.76 GB
    python docs/measure/peers.py SCRATCH --peers PYTHON --model DIR           a real one (a tensor for each expert's matrix)
    python docs/measure/peers.py SCRATCH --peers PYTHON --layers 1 --experts 4 --rounds 1        a test, 0.1 GB

PYTHON is another environment's interpreter, as the peers pin other versions than ours:

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install torch==2.13.0 llmcompressor mergekit hqq torchao zipnn zstandard scikit-learn

Every job (peers_jobs.py says how each tool is called) is a process of its own, one at a time, all of them in turn, for
each number of threads, `--rounds` times; before that once with a tiny model, so that compiled kernels and imports are
cached, and what fails there is left out. Input comes from the page cache. Ours is the real command, and for `work` the
command's function in another process; a peer's process is one for both, less its conversion of the tiny model.

whole      the process: wall seconds, CPU seconds of it and its children, peak of resident memory (ru_maxrss)
work       without imports and what a first conversion loads: a process that has converted a tiny model, by its own clocks
anonymous  peak of RssAnon, sampled every 5 ms: memory that is no mapped file

Medians; in brackets how many times ours. Linux only.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
OURS = "a base for each group of experts (their mean) and for each expert "
ALSO = "; experts hashed, errors measured, fsync"
# a section: ours first, then the peers that it is compared with, and what each computes
SECTIONS = {
    "4 bits": {
        "ders int4": OURS + "int4 of the delta" + ALSO,
        "llm-compressor": "model_free_ptq: int4 of the experts themselves, no base",
        "compressed-tensors": "calculate_qparams, quantize, pack_to_int32: int4 of the experts themselves, no base",
        "hqq": "Quantizer.quantize, optimize=False: 4 bits and a zero point, of the experts themselves, no base",
        "hqq optimised": "the same with optimize=True, which searches for better zero points",
        "torchao": "IntxWeightOnlyConfig int4: codes of the experts themselves in a byte each, not packed, no base",
    },
    "1 bit": {
        "ders int1": OURS + "signs of the delta, a scale for each group" + ALSO,
        "bitdelta": "BitDelta's form in plain torch: base, signs of the delta, a scale for each matrix",
    },
    "Random drop, and merges": {
        "ders drop0.9": OURS + "a random tenth of the delta, rescaled" + ALSO,
        "mergekit dare_linear": "reads base and model, drops nine tenths of the difference, adds: dense bf16",
        "mergekit linear": "reads two models, writes their mean: dense bf16",
        "mergekit passthrough": "reads and writes: a copy",
    },
    "Exact": {
        "ders exact": OURS + "the difference, entropy-coded" + ALSO,
        "zipnn": "experts' bytes, each matrix for itself, no base",
        "zstd -1": "the same with zstandard",
        "zstd -3": "the same with zstandard",
        "zstd -19": "the same with zstandard",
    },
    "Rank 16": {
        "ders rank16": OURS + "16 directions of the delta" + ALSO,
        "svd_lowrank": "base, torch.svd_lowrank(delta, 24, niter=2): the same number of products",
        "randomized_svd": "base, scikit-learn's randomized_svd(delta, 16, n_iter=2)",
        "full svd": "base, torch.linalg.svd(delta), the first 16",
    },
}
SCALED = ("wall", "cpu", "work_wall", "work_cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--peers", required=True, help="python of the environment that has the peers")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of a made one")
    parser.add_argument("--layers", type=int, default=4, help="of the made one: 176 MB each with 8 experts")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=128, help="must divide the rows; 64 for the real MoE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="jobs whose names have this regular expression, and ours beside them"
    )
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory, for peers")
    args = parser.parse_args()
    args.scratch = args.scratch.resolve()  # mergekit takes a relative path for a name on the hub
    args.model = args.model and args.model.resolve()

    args.scratch.mkdir(parents=True, exist_ok=True)
    tiny, model, plain, out = (args.scratch / name for name in ("tiny", "model", "plain", "out"))
    for folder in (tiny, model, plain, out, args.scratch / "tiny-plain"):
        shutil.rmtree(folder, ignore_errors=True)
    prepare("make", tiny, 1, 2, 256, 512)
    prepare("plain", args.scratch / "tiny-plain", tiny)
    if not args.model:
        prepare("make", model, args.layers, args.experts, 1024, 3584)
    model = args.model or model
    prepare("plain", plain, model)

    jobs, failed, versions = [], {}, {}
    for section in SECTIONS.values():
        chosen = [name for name in list(section)[1:] if re.search(args.only, name)]
        jobs += [next(iter(section)), *chosen] if chosen or re.search(args.only, next(iter(section))) else []
    for name in list(jobs):
        result = convert(name, args, tiny, args.scratch / "tiny-plain", out, args.threads[-1])
        if "failed" in result:
            failed[name] = result["failed"]
            jobs.remove(name)
        versions |= dict.fromkeys(result.get("versions", []))
        print(f"tiny model, {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    results, began, load = defaultdict(list), time.time(), os.getloadavg()[0]
    for turn in range(args.rounds):
        for path in (path for folder in (model, plain) for path in folder.iterdir()):
            path.read_bytes()  # into the page cache
        for threads in args.threads:
            for name in jobs[turn % len(jobs) :] + jobs[: turn % len(jobs)]:
                result = convert(name, args, model, plain, out, threads)
                if "failed" in result:
                    failed[name] = result["failed"]
                else:
                    results[name, threads].append(result)
                print(f"round {turn + 1}, {threads} threads, {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(
        f"{model.name}: {size / 1e9:.2f} GB. {processor}, {os.cpu_count()} cores, Python {platform.python_version()}. ",
        end="",
    )
    print(
        f"Medians of {args.rounds} rounds, {time.time() - began:.0f} s; load {load:.1f} before. {', '.join(sorted(versions))}."
    )
    if args.keep_memory:
        print("Peers with glibc told to keep freed memory (--keep-memory).")
    print_jobs(jobs, results, args.threads[0], size)
    for threads in args.threads:
        print_times(jobs, results, threads)
    for name, why in failed.items():
        print(f"\n{name}: failed: {why}")
    for folder in (tiny, args.scratch / "tiny-plain", args.scratch / "model", plain):
        shutil.rmtree(folder, ignore_errors=True)


def prepare(*arguments: object) -> None:
    """In a process of its own: a child's ru_maxrss begins with what its parent had."""
    subprocess.run([sys.executable, HERE / "peers_model.py", *map(str, arguments)], check=True)


def convert(name: str, args: argparse.Namespace, model: Path, plain: Path, out: Path, threads: int) -> dict:
    """One job's numbers, times scaled up to all experts where it did some, or {"failed": why}."""
    job = [HERE / "peers_jobs.py", name, model, plain, out, threads, args.group_size, args.scratch / "tiny"]
    ours = name.startswith("ders ")
    work = run(sys.executable if ours else args.peers, job, out, args.keep_memory and not ours)
    if ours and "failed" not in work:
        options = ["--delta", name.removeprefix("ders "), "--group-size", args.group_size, "-j", threads, "-q"]
        whole = run(sys.executable, ["-m", "ders_cli", "compress", model, "-o", out, *options], out)
        if "failed" in whole:
            return whole
    if "failed" in work:
        return work
    told = json.loads(work["printed"].splitlines()[-1])
    more = 1 / told["share"] - 1
    if not ours:
        whole = work | {key: work[key] - told[f"first_{key}"] for key in ("wall", "cpu")}
    return {
        "wall": whole["wall"] + told["wall"] * more,
        "cpu": whole["cpu"] + told["cpu"] * more,
        "work_wall": told["wall"] / told["share"],
        "work_cpu": told["cpu"] / told["share"],
        "resident": whole["resident"],
        "anonymous": whole["anonymous"],
        "output": told.get("output", whole["output"]),
        "share": told["share"],
        "error": told.get("error"),
        "versions": told["versions"],
    }


def run(python: str, arguments: list, out: Path, keep_memory: bool = False) -> dict:
    """One process: wall and CPU seconds, MB of memory, bytes written, what it printed; or {"failed": why}."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # the jobs set threads on their own; a pool whose threads each have several of OpenMP's would be slower
    environment = os.environ | quiet | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    if keep_memory:
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # nobody pays for writing out what the one before wrote
    logs = [out.with_name(out.name + end) for end in (".stdout", ".stderr")]
    with open(logs[0], "w") as stdout, open(logs[1], "w") as stderr:
        began, anonymous, ended = time.perf_counter(), 0, 0
        process = subprocess.Popen([python, *map(str, arguments)], stdout=stdout, stderr=stderr, env=environment)
        while not ended:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            anonymous = max(anonymous, int(found[1]) if found else 0)
            time.sleep(0.005)
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(code)
    printed, complained = (log.read_text(errors="replace") for log in logs)
    if process.returncode:
        lines = complained.strip().splitlines() or [f"exit {process.returncode}"]
        return {"failed": lines[-1]}
    result = {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "printed": printed}
    result |= {"resident": usage.ru_maxrss * 1024 / 1e6, "anonymous": anonymous * 1024 / 1e6}
    result["output"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for log in logs:
        log.unlink()
    shutil.rmtree(out)
    return result


def median(results: list[dict], what: str) -> float | None:
    values = [result[what] for result in results if result[what] is not None]
    return statistics.median(values) if values else None


def print_jobs(jobs: list[str], results: dict, threads: int, size: int) -> None:
    print("\n| job | what it computes | output / input | error of the delta |\n|---|---|---|---|")
    for section in SECTIONS.values():
        for name, what in section.items():
            if name in jobs and results[name, threads]:
                output, error = (median(results[name, threads], column) for column in ("output", "error"))
                share = results[name, threads][0]["share"]
                some = "" if share == 1 else f"; done for {share:.1%} of the experts, its times are scaled"
                cells = ["" if output is None else f"{output / size:.3f}", "" if error is None else f"{error:.3f}"]
                print(f"| {name} | {what}{some} | {' | '.join(cells)} |")


def print_times(jobs: list[str], results: dict, threads: int) -> None:
    columns = {
        "wall": "whole, wall s",
        "cpu": "whole, CPU-s",
        "work_wall": "work, wall s",
        "work_cpu": "work, CPU-s",
        "resident": "peak resident, MB",
        "anonymous": "anonymous, MB",
    }
    print(
        f"\n{threads} thread{'s' if threads > 1 else ''}:\n\n| job | {' | '.join(columns.values())} |\n|---|{'---|' * len(columns)}"
    )
    for section in SECTIONS.values():
        first = results[next(iter(section)), threads]
        for name in section:
            found, cells = results[name, threads], []
            if name not in jobs or not found:
                continue
            for column in columns:
                value = median(found, column)
                number = f"{value:.3g}" if value < 100 else f"{value:.0f}"
                if column not in SCALED and found[0]["share"] < 1:
                    cells.append("")  # of some experts: says nothing of all
                elif name.startswith("ders ") or not first:
                    cells.append(number)
                else:
                    cells.append(f"{number} ({value / median(first, column):.2g})")
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
