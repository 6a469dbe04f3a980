"""Bytes that the Triton kernels move for a few tokens, counted load by load, beside the least that could be moved.

    python docs/measure/traffic.py                            tables of products and layers, and an estimate of times
    python docs/measure/traffic.py --write docs/kernels.md    put them between the page's two markers

The real launches run in Triton's interpreter, whose loads and stores are watched:

    requested   sum over all tile loads and stores: the bytes of the lanes that are on, each byte once in one load; the
                same byte loaded by two programs, or in two steps of a loop, is two
    distinct    each byte once in a launch: what memory delivers if the cache holds all that is read again
    least       a product: the expert's parts as they are stored, x, y.  A layer: three bases, the stored parts of the
                experts that have tokens, x and y, and h of every pair written once and read once

Row blocks of a product load the same amounts, so only the first ROWS rows of each expert are run and their bytes
multiplied; tests/test_traffic.py checks that against all rows. torch's own operations (the bases' products, copies) are
not watched inside: they count as their inputs and outputs, once. What is made before the first token isn't counted.
"""

import argparse
import os
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import numpy as np
import torch
from ders_kernels import dispatch
from ders_kernels.deltas import Delta, Projection
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from ders_cli.codecs import parse_codec
from ders_cli.runtime.deltas import packed_delta
from ders_cli.runtime.dtypes import TORCH

# values of rows that are not run are anything, also infinite
warnings.filterwarnings("ignore", category=RuntimeWarning)

BEGIN, END = "<!-- traffic.py: begin -->", "<!-- traffic.py: end -->"
ROWS = 64  # of an expert that are run
READ_BY_EVERY_ROW_BLOCK = ("x", "x_planes", "inner", "pairs", "block_expert", "block_first", "block_end", "keys")
BEFORE_THE_FIRST_TOKEN = ("drop_threshold", "kept_columns", "elias_fano_columns")
SHAPES = {"5632x2048": (5632, 2048), "14336x4096": (14336, 4096)}  # inner, hidden: TinyLlama's, Mixtral's
CODECS = ("int4", "int1", "2:4+int4", "drop0.9", "ternary0.02", "rank16")
EXPERTS, TOKENS, TOP_K = 8, (1, 4, 16), (2, 8)
# bytes a second, published: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM) and "A100 Tensor Core GPU" (80GB SXM),
# AMD's "Instinct MI300X Accelerator"
BANDWIDTH = {"H100 SXM": 3.35e12, "A100 80GB SXM": 2.039e12, "MI300X": 5.3e12}


@dataclass
class Launch:
    """What one launch moved, by argument, in bytes; loads and stores together."""

    kernel: str
    programs: tuple[int, ...] = ()
    requested: Counter = field(default_factory=Counter)
    distinct: Counter = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """Within it, `launches` has every kernel launch and every torch operation that moves data.

    rows: how many rows of W a launch of a product runs; None runs all.
    """

    def __init__(self, rows: int | None = ROWS):
        super().__init__()
        self.rows, self.launches = rows, []
        self._ranges: list[tuple[int, str, np.ndarray]] = []  # address, argument, which of its bytes were touched
        self._now: Launch | None = None  # the launch that is running

    def __enter__(self):
        run = InterpretedFunction.run
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        self._real = run, load, store

        def watched_load(builder, pointers, mask, *others):
            self._seen(pointers, mask)
            return load(builder, pointers, mask, *others)

        def watched_store(builder, pointers, value, mask, *others):
            self._seen(pointers, mask)
            return store(builder, pointers, value, mask, *others)

        InterpretedFunction.run = lambda kernel, *arguments, **named: self._launched(run, kernel, arguments, named)
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = watched_load, watched_store
        return super().__enter__()

    def __exit__(self, *error):
        InterpretedFunction.run, *own = self._real
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = own
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        if self._now is None and not operation.is_view and "empty" not in str(operation):
            tensors = [one for one in (*arguments, result) if isinstance(one, torch.Tensor)]
            moved = {f"{place}": one.nbytes for place, one in enumerate(tensors)}
            name = f"torch {operation.overloadpacket.__name__}"
            self.launches.append(Launch(name, (), Counter(moved), Counter(moved)))
        return result

    def _launched(self, run, kernel, arguments, named) -> None:
        """Run some of a launch and note down what all of it moves."""
        factor, grid = 1.0, named["grid"]
        rows = named.get("ROWS")
        product = rows and ("block_first" in kernel.arg_names or kernel.__name__ in BEFORE_THE_FIRST_TOKEN)
        given = dict(zip(kernel.arg_names, arguments))
        if self.rows and product and (blocks := max(1, self.rows // rows)) < grid[1]:
            factor = grid[1] / blocks
            named["grid"] = grid[0], blocks, *grid[2:]
        self._now = Launch(kernel.__name__, tuple(grid))
        self._ranges = [
            (one.data_ptr(), name, np.zeros(one.nbytes, dtype=bool))
            for name, one in given.items()
            if isinstance(one, torch.Tensor)
        ]
        run(kernel, *arguments, **named)
        done, self._now = self._now, None
        for _, name, touched in self._ranges:
            again = name in READ_BY_EVERY_ROW_BLOCK
            done.requested[name] = round(done.requested[name] * factor)
            done.distinct[name] = min(round(np.count_nonzero(touched) * (1 if again else factor)), touched.size)
        self.launches.append(done)

    def _seen(self, pointers, mask) -> None:
        """One tile load or store."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.unique(pointers.data[mask.data.astype(bool)]).astype(np.int64)  # masks made with & are integers
        if not addresses.size:
            return
        for start, name, touched in self._ranges:
            if start <= addresses[0] and addresses[-1] + size <= start + touched.size:
                self._now.requested[name] += addresses.size * size
                for byte in range(size):
                    touched[addresses - start + byte] = True
                return
        raise IndexError(f"{self._now.kernel}: address {addresses[0]} is in none of its tensors")

    def moved(self, how: str) -> int:
        """Bytes of all launches that every token needs."""
        return sum(sum(getattr(one, how).values()) for one in self.launches if one.kernel not in BEFORE_THE_FIRST_TOKEN)


def packed(codec: str, out: int, width: int) -> tuple[Delta, int]:
    """A delta of EXPERTS random experts, with the same ROWS rows over and over; bytes of one expert's stored parts."""
    coder, random, few = parse_codec(codec, 128), np.random.default_rng(0), min(ROWS, out)
    each = [coder.encode(random.standard_normal((few, width)).astype(np.float32), key, 0) for key in range(EXPERTS)]
    parts, size = {}, 0
    for name, spec in coder.spec((out, width)).items():
        part = torch.from_numpy(np.stack([own[name] for own in each])).view(TORCH[spec.dtype])
        part = part.repeat(1, spec.shape[0] // part.shape[1], *[1] * (part.ndim - 2))
        parts[name], size = part, size + part[0].nbytes
    return packed_delta(coder, parts, width, tuple(range(EXPERTS))), size


def of_product(delta: Delta, size: int, tokens: int) -> tuple[str, Watch, int]:
    """delta_matmul of one expert: the kernels that ran, what was moved, the least."""
    _, out, width = delta.shape
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    with Watch() as watch:
        dispatch.delta_matmul(x, delta, 1, backend="triton")
    watch.launches = [one for one in watch.launches if not one.kernel.startswith("torch")]
    names = dict.fromkeys(one.kernel for one in watch.launches if one.kernel not in BEFORE_THE_FIRST_TOKEN)
    return ", ".join(names), watch, size + x.nbytes + tokens * out * 4  # y is fp32 there


def of_layer(deltas: list[Delta], sizes: list[int], tokens: int, k: int) -> tuple[Watch, int, int]:
    """moe_forward with deltas of gate, up and down: what was moved, the least, and the least of stock experts."""
    gate, up, down = deltas
    _, inner, hidden = up.shape
    torch.manual_seed(tokens)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    index = torch.rand(tokens, EXPERTS).topk(k).indices
    gates = torch.rand(tokens, k, dtype=torch.bfloat16)
    wide, tall = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((inner, hidden), (hidden, inner)))
    layer = Projection(wide, gate), Projection(wide, up), Projection(tall, down)
    with Watch() as watch:
        dispatch.moe_forward(x, index, gates, *layer, backend="triton")
    busy, activations = index.unique().numel(), 2 * x.nbytes + 2 * tokens * k * inner * 2
    bases = sum(one.base.nbytes for one in layer)
    return watch, bases + busy * sum(sizes) + activations, busy * bases + activations


def measure(job: tuple[str, str]) -> tuple[list, list]:
    """One codec at one shape: rows of both tables."""
    codec, shape = job
    inner, hidden = SHAPES[shape]
    deltas, sizes = zip(*(packed(codec, *s) for s in ((inner, hidden), (inner, hidden), (hidden, inner))))
    products, layers = [], []
    for tokens in TOKENS:
        names, watch, least = of_product(deltas[1], sizes[1], tokens)
        again = Counter()
        for one in watch.launches:
            again.update(one.requested - one.distinct)
        products.append((shape, codec, tokens, names, watch.moved("requested"), watch.moved("distinct"), least, again))
        for k in TOP_K:
            watch, least, stock = of_layer(deltas, sizes, tokens, k)
            layers.append((shape, codec, tokens, k, watch.moved("requested"), watch.moved("distinct"), least, stock))
    return products, layers


def products_table(rows: list) -> str:
    """requested / least of each product; what is read again, where that is over 1.15."""
    lines = [
        "| out x in | codec | tokens | kernel | requested | distinct | least | requested / least | distinct / least "
    ]
    lines[0] += "| most read again |"
    lines.append("|---" * 10 + "|")
    for shape, codec, tokens, names, requested, distinct, least, again in rows:
        most = (
            ", ".join(f"{name} {size:,} B" for name, size in again.most_common(1)) if requested > 1.15 * least else ""
        )
        lines.append(
            f"| {shape} | {codec} | {tokens} | {names} | {requested:,} | {distinct:,} | {least:,} "
            f"| {requested / least:.2f} | {distinct / least:.2f} | {most} |"
        )
    return "\n".join(lines)


def layers_table(rows: list) -> str:
    """requested / least and distinct / least of each layer, a column for tokens and top-k."""
    kinds = [(tokens, k) for tokens in TOKENS for k in TOP_K]
    lines = ["| inner x hidden | codec | " + " | ".join(f"{t} token{'s' * (t > 1)}, top-{k}" for t, k in kinds) + " |"]
    lines.append("|---" * (2 + len(kinds)) + "|")
    for shape in dict.fromkeys(row[0] for row in rows):
        for codec in dict.fromkeys(row[1] for row in rows):
            own = {row[2:4]: row for row in rows if row[:2] == (shape, codec)}
            cells = [f"{own[kind][4] / own[kind][6]:.3f} ({own[kind][5] / own[kind][6]:.3f})" for kind in kinds]
            lines.append(f"| {shape} | {codec} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def estimate_table(rows: list) -> str:
    """Microseconds of a layer if memory is all that takes time: stock experts, and ours by requested bytes."""
    heads = " | ".join(f"{name}: stock, ours (us)" for name in BANDWIDTH)
    lines = [f"| inner x hidden | codec | tokens | top-k | stock MB | ours MB | times fewer | {heads} |"]
    lines.append("|---" * (7 + len(BANDWIDTH)) + "|")
    for shape, codec, tokens, k, requested, _, _, stock in rows:
        if tokens in (TOKENS[0], TOKENS[-1]):
            times = [f"{stock / speed * 1e6:.0f}, {requested / speed * 1e6:.0f}" for speed in BANDWIDTH.values()]
            cells = [
                shape,
                codec,
                tokens,
                k,
                f"{stock / 1e6:.0f}",
                f"{requested / 1e6:.0f}",
                f"{stock / requested:.2f}",
            ]
            lines.append("| " + " | ".join(map(str, [*cells, *times])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="inner x hidden (default: all)")
    parser.add_argument("--codec", action="append", help=f"default: {', '.join(CODECS)}")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace what is between the page's markers")
    given = parser.parse_args()
    jobs = [(codec, shape) for shape in given.shape or SHAPES for codec in given.codec or CODECS]
    products, layers = [], []
    with ProcessPoolExecutor(2) as pool:
        for some_products, some_layers in pool.map(measure, jobs):
            products += some_products
            layers += some_layers
    sections = (
        ("A product, `delta_matmul` of one expert:", products_table(products)),
        (
            f"A layer, `moe_forward` with {EXPERTS} experts: requested / least, and (distinct / least):",
            layers_table(layers),
        ),
        ("**Estimate**, nothing was timed: bytes over the published bandwidth.", estimate_table(layers)),
    )
    made = "\n\n".join(f"{title}\n\n{table}" for title, table in sections)
    if not given.write:
        print(made)
        return
    text = given.write.read_text()
    given.write.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{made}\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
