"""What each part of a conversion's work costs alone: CPU seconds for 1e9 bytes of experts, on one thread.

The first layer's groups, block by block as a plain walk does it, each stage by the function that defines it, timed
call by call on this thread's CPU clock:

    read     every expert's rows from the file
    base     the mean of the experts
    encode   expert and base -> parts (delta included)
    decode   parts and base -> the expert as it will be restored
    sums     the error sums of the two
    hash     BLAKE3 of the expert, of what it decodes to, and of what is written
    write    base and parts into a file that was sized beforehand

An exact conversion neither decodes nor sums: its decode is what a restore pays. A walk that fuses stages costs less than
their sum; that is what it is for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from blake3 import blake3
from ders_kernels.counter_rng import make_key
from threadpoolctl import threadpool_limits

from .base import mean
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter
from .codecs import DeltaCodec
from .differences import Differences
from .layouts import ExpertGroup
from .recipe import Recipe
from .source import BLOCK_WEIGHTS, Source, row_blocks

STAGES = ("read", "base", "encode", "decode", "sums", "hash", "write")


class Clock:
    """CPU seconds of this thread by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, call: Callable[..., Any], *args: Any) -> Any:
        begin = time.thread_time()
        result = call(*args)
        self.seconds[stage] += time.thread_time() - begin
        return result


def stages(source: Source, recipe: Recipe, scratch: Path) -> dict[str, float]:
    """CPU seconds for 1e9 bytes, by stage. Writes into a new folder in `scratch`, which is removed."""
    clock, done = Clock(), 0
    groups = [group for group in source.groups if group.layer == source.groups[0].layer]
    with threadpool_limits(1, "blas"):
        for group in groups:
            with TemporaryDirectory(dir=scratch) as folder:
                path = Path(folder) / "stages.safetensors"
                done += _group(source, group, recipe.codecs(group)[0], recipe.seed, path, clock)
    return {stage: seconds / done * 1e9 for stage, seconds in clock.seconds.items()}


def _group(source: Source, group: ExpertGroup, codec: DeltaCodec, seed: int, path: Path, clock: Clock) -> int:
    """One group through every stage; its bytes."""
    size, at = TensorSpec(group.shape, group.dtype).nbytes * len(group.members), 0
    writer = ShardWriter(path, {"bytes": TensorSpec((3 * size + (1 << 20),), "U8")})
    keys = [make_key(seed, group.name, label) for label, _ in group.members]
    try:
        for rows in row_blocks(group.shape, codec.block_rows(group.shape) or _block_rows(group)):
            experts = [clock("read", source.read, group, i, rows) for i in range(len(group.members))]
            base = clock("base", _mean, experts, group)
            written = [base]
            for expert, key in zip(experts, keys, strict=True):
                parts = clock("encode", codec.encode_expert, expert, base, group.dtype, key, rows.start)
                written += parts.values()
                decoded = clock("decode", codec.decode_expert, parts, base, group.dtype, key, rows.start)
                clock("hash", _hash, expert)
                if not codec.lossless:
                    clock("hash", _hash, decoded)
                    clock("sums", Differences().add, expert, decoded, base, group.dtype)
            for data in written:
                clock("hash", _hash, data)
                clock("write", writer.write, "bytes", at, data)
                at += data.nbytes
    finally:
        writer.abandon()
    return size


def _block_rows(group: ExpertGroup) -> int:
    return max(1, BLOCK_WEIGHTS // group.shape[1])


def _mean(experts: list[np.ndarray], group: ExpertGroup) -> np.ndarray:
    """In blocks that a core's cache holds, whatever the codec's own are."""
    pieces = row_blocks(experts[0].shape, _block_rows(group))
    return np.concatenate([mean([expert[rows] for expert in experts], group.dtype) for rows in pieces])


def _hash(data: np.ndarray) -> None:
    blake3(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).digest()
