"""Size of the exact form of a MoE, beside general compressors of the same weight files.

    python docs/measure/exact_size.py MODEL SCRATCH --base DENSE --base mean --base expert:0

Converts with `--delta exact` over each base, restores, compares every restored file with the original's SHA-256, and
prints bits per delta weight (tables and extents counted), the whole folder's share, and times; then zstd -19 and zipnn of
the same weight files.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def ders(*arguments: str) -> tuple[str, float]:
    """stdout and seconds of one command."""
    began = time.time()
    done = subprocess.run([sys.executable, "-m", "ders_cli", *arguments], check=True, capture_output=True, text=True)
    return done.stdout, time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--base", action="append", default=[])
    parser.add_argument("--no-others", action="store_true")
    args = parser.parse_args()
    before, source = digests(args.model), sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    for base in args.base:
        packed, plain = args.scratch / "packed", args.scratch / "plain"
        out, packing = ders(
            "compress", str(args.model), "--delta", "exact", "--base", base, "-o", str(packed), "--json"
        )
        _, restoring = ders("restore", str(packed), "-o", str(plain), "-q")
        report, same = json.loads(out), digests(plain) == before
        weights = report["bytes"]["weights"]
        print(
            f"exact, base {report['recipe']['base']:12s} {report['bytes']['bits_per_delta_weight']:.4f} bits per delta weight; weight files "
            f"{weights:,} of {source:,} = {weights / source:.4f}; {packing:.1f} s, restore {restoring:.1f} s; "
            f"restored files {'identical (SHA-256)' if same else 'DIFFER'}",
            flush=True,
        )
        shutil.rmtree(packed)
        shutil.rmtree(plain)
    if args.no_others:
        return
    files = sorted(args.model.glob("*.safetensors"))
    import zipnn

    total, began = 0, time.time()
    for file in files:
        total += len(
            zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte").compress(bytearray(file.read_bytes()))
        )
    print(
        f"zipnn {zipnn.__version__ if hasattr(zipnn, '__version__') else ''} of the same files: {total:,} = {total / source:.4f}; {time.time() - began:.1f} s",
        flush=True,
    )
    import zstandard

    total, began = 0, time.time()
    for file in files:
        total += len(zstandard.ZstdCompressor(level=19, threads=-1).compress(file.read_bytes()))
    print(f"zstd -19 of the same files: {total:,} = {total / source:.4f}; {time.time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
