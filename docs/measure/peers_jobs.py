"""One job of peers.py, in a process of its own: some tool that reads the same bytes and writes OUT.

    python docs/measure/peers_jobs.py JOB MODEL PLAIN OUT THREADS GROUP_SIZE TINY

A job imports what it needs, then works inside `clock`: once on the checkpoint TINY, as compiled kernels and lazy imports are
loaded then, and once on MODEL. The last line on stdout is JSON: wall and CPU seconds of the work, those of the first one,
the share of the expert bytes that was done (the slow ones do some), and what else is to be noted.

Libraries that offer a function for a tensor and no converter get the plainest converter there is: mapped tensors in, a
dict, safetensors' save_file. Their threads are torch's own inside each operation, or one matrix on each, whichever was
faster: inside for compressed-tensors (3.7 s against 4.1), hqq (1.1, 1.9) and torchao, apart for the others.
"""

import json
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
RANK = 16


class Clock:
    """Wall and CPU seconds (all threads and children) of a `with` block."""

    def __enter__(self) -> None:
        self.cpu, self.wall = -self._cpu(), -time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = self.wall + time.perf_counter(), self.cpu + self._cpu()

    @staticmethod
    def _cpu() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


model, plain, out = map(Path, sys.argv[2:5])
threads, group_size = map(int, sys.argv[5:7])
clock, notes = Clock(), {"share": 1.0}


# ours: the command's own function


def ours(delta: str) -> None:
    from ders_cli import app, conversion_command, convert, recipe  # noqa: F401 (imports before the clock)

    recipe.make_recipe({"delta": delta})  # loads the codecs
    sys.argv[1:] = ["compress", str(model), "--delta", delta, "--group-size", str(group_size), "-o", str(out), "-q"]
    sys.argv += ["-j", str(threads), "--overwrite"]
    with clock:
        try:
            app.main()
        except SystemExit as stop:
            if stop.code:
                raise
    groups = json.loads((out / "ders.json").read_text())["groups"]
    errors = [member["error"]["delta"] for group in groups for member in group["members"]]
    notes["error"] = sum(errors) / len(errors)


# int4 of whole experts


def llm_compressor() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import model_free_ptq

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)  # W4A16, for any group size
    ignore = ["lm_head", "re:.*embed_tokens", "re:.*self_attn.*", "re:.*gate$"]  # experts only, as in ours
    with clock:
        model_free_ptq(model, out, scheme=scheme, ignore=ignore, max_workers=threads, device="cpu")
    notes["versions"] = ["llmcompressor", "torch"]


def compressed_tensors() -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)

    def work(weight):
        low, high = weight.view(weight.shape[0], -1, group_size).aminmax(dim=-1)
        scale, zero = calculate_qparams(low, high, args)
        return {"packed": pack_to_int32(quantize(weight, scale, zero, args, torch.int8), 4), "scale": scale}

    over_matrices(work, inside=True)
    notes["versions"] = ["compressed-tensors"]


def hqq(optimize: bool, megabytes: float | None = None) -> None:
    import torch
    from hqq.core.quantize import Quantizer

    settings = {"nbits": 4, "group_size": group_size, "axis": 1, "device": "cpu", "compute_dtype": torch.bfloat16}

    def work(weight):
        packed, meta = Quantizer.quantize(weight, optimize=optimize, **settings)
        return {"packed": packed, "scale": meta["scale"].bfloat16(), "zero": meta["zero"].bfloat16()}

    over_matrices(work, megabytes, inside=True)
    notes["versions"] = ["hqq"]


def torchao() -> None:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))

    def work(weight):
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config)
        return {"codes": linear.weight.qdata, "scale": linear.weight.scale}  # a byte for each code

    over_matrices(work, inside=True)
    notes["versions"] = ["torchao"]


# one bit of deltas


def bitdelta() -> None:
    """BitDelta (arXiv 2402.10193) before its training: sign and mean |delta| of each matrix, on our deltas."""
    import torch

    gather = 0x0102040810204080  # 8 bytes of 0 or 1 times this: their bits in the top byte

    def work(delta):
        signs = (delta > 0).view(-1, 8).view(torch.int64).mul_(gather).view(torch.uint8)[:, 7]
        return {"signs": signs.contiguous(), "scale": delta.abs_().mean()}

    def restore(parts, shape):
        bits = parts["signs"][:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return (bits.float() * 2 - 1).view(shape) * parts["scale"]

    over_deltas(work, restore)
    notes["versions"] = ["torch"]


# merges


def mergekit(method: str) -> None:
    """Small shards: less memory, no more time. async_write: the documented faster way."""
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    merges = {
        "passthrough": {"models": [{"model": str(model)}]},
        "linear": {"models": [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (model, plain)]},
        "dare_linear": {
            "models": [{"model": str(model), "parameters": {"weight": 1.0, "density": 0.1}}],
            "base_model": str(plain),
        },
    }
    text = yaml.safe_dump({"merge_method": method, "dtype": "bfloat16"} | merges[method])
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(
        copy_tokenizer=False, quiet=True, random_seed=0, out_shard_size=100_000_000, async_write=True
    )
    torch.set_num_threads(threads)  # what its --num-threads does
    with clock:
        run_merge(config, str(out), options)
    notes["versions"] = ["mergekit", "transformers"]


# exact


def zipnn() -> None:
    import torch
    from zipnn import ZipNN

    def work(weight):
        compressor = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
        packed = compressor.compress(bytearray(weight.view(torch.uint8).numpy()))
        return {"zipnn": torch.frombuffer(packed, dtype=torch.uint8)}

    over_matrices(work)
    notes["versions"] = ["zipnn"]


def zstd(level: int, megabytes: float | None = None) -> None:
    import torch
    from zstandard import ZstdCompressor

    def work(weight):
        packed = ZstdCompressor(level).compress(weight.view(torch.uint8).numpy())
        return {"zstd": torch.frombuffer(packed, dtype=torch.uint8)}

    over_matrices(work, megabytes)
    notes["versions"] = ["zstandard"]


# rank 16 of deltas


def low_rank(way: str, megabytes: float | None = None) -> None:
    import torch

    def work(delta):
        if way == "torch.svd_lowrank":  # the probes and iterations that ours has
            left, values, right = torch.svd_lowrank(delta, RANK + 8, niter=2)
            right = right.T
        elif way == "torch.linalg.svd":
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
        else:  # chuk-lazarus' setting
            parts = randomized_svd(delta.numpy(), RANK, n_iter=2, random_state=0)
            left, values, right = map(torch.from_numpy, parts)
        root = values[:RANK].sqrt()
        return {
            "left": (left[:, :RANK] * root).bfloat16().contiguous(),
            "right": (root[:, None] * right[:RANK]).bfloat16().contiguous(),
        }

    notes["versions"] = ["torch"]
    if way == "randomized_svd":
        from sklearn.utils.extmath import randomized_svd

        notes["versions"] = ["scikit-learn"]
    over_deltas(work, lambda parts, shape: parts["left"].float() @ parts["right"].float(), megabytes)


# the plainest converters


def tensors() -> Iterator[tuple[str, Any]]:
    """Every tensor, mapped: read when it is touched."""
    from safetensors import safe_open

    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def each(work: Callable[[Any], dict], items: Iterable[Any], inside: bool = False) -> dict:
    """`work` of every item, with so many threads `inside` each or an item on each; their results as one dict."""
    import torch

    def quietly(item: Any) -> dict:
        with torch.inference_mode():  # holds for one thread
            return work(item)

    torch.set_num_threads(threads if inside else 1)
    done = {}
    with ThreadPoolExecutor(1 if inside else threads) as pool:
        for result in pool.map(quietly, items):
            done |= result
    return done


def over_matrices(work: Callable[[Any], dict], megabytes: float | None = None, inside: bool = False) -> None:
    """Convert with `work`: an expert's matrix [out, in] bf16 -> tensors by the ends of their names.

    `megabytes`: only the first matrices of about that many, and nothing else.
    """
    from safetensors.torch import save_file

    def convert(item: tuple[str, Any]) -> dict:
        return {f"{item[0]}.{end}": tensor for end, tensor in work(item[1]).items()}

    with clock:
        everything = list(tensors())
        matrices = [item for item in everything if EXPERT.search(item[0])]
        rest = {name: tensor for name, tensor in everything if not EXPERT.search(name)}
        kept = sum(tensor.nbytes for tensor in rest.values())
        if megabytes:
            rest, whole = {}, len(matrices)
            matrices = matrices[: max(threads, round(megabytes * 1e6 / matrices[0][1].nbytes))]
            notes["share"] = len(matrices) / whole
        save_file(rest | each(convert, matrices, inside), out / "model.safetensors")
    if megabytes:
        notes["output"] = (out / "model.safetensors").stat().st_size / notes["share"] + kept


def over_deltas(
    work: Callable[[Any], dict], restore: Callable[[dict, Any], Any], megabytes: float | None = None
) -> None:
    """Convert with `work`: a delta [out, in] fp32 from the experts' mean -> tensors by the ends of their names.

    `restore`: these and the delta's shape -> the delta that they stand for. Gives notes["error"], of one matrix.
    `megabytes`: only some deltas of the first two groups, of about that many of bf16 weights, and nothing else.
    """
    from safetensors.torch import save_file

    def mean(experts: list) -> Any:
        total = experts[0].float()
        for expert in experts[1:]:
            total += expert
        return total.div_(len(experts)).bfloat16()

    def convert(item: tuple[str, list]) -> dict:
        key, experts = item
        base = mean(experts)
        result, wide = {key: base}, base.float()
        for number, expert in enumerate(experts[:most]):
            parts = work(expert.float().sub_(wide))
            result |= {f"{key}.{number}.{end}": tensor for end, tensor in parts.items()}
        return result

    with clock:
        groups, rest, most = {}, {}, None
        for name, tensor in tensors():
            if EXPERT.search(name):
                groups.setdefault(EXPERT.sub("*", name), []).append(tensor)
            else:
                rest[name] = tensor
        key, first = next(iter(groups.items()))
        if megabytes:
            rest, whole = {}, sum(map(len, groups.values()))
            groups = dict(list(groups.items())[:2])
            most = min(len(first), max(1, round(megabytes * 1e6 / 2 / first[0].nbytes)))
            notes["share"], notes["output"] = len(groups) * most / whole, None
        results = each(convert, groups.items())
        save_file(rest | results, out / "model.safetensors")
    delta = first[0].float() - results[key].float()
    head = f"{key}.0."
    parts = {name.removeprefix(head): tensor for name, tensor in results.items() if name.startswith(head)}
    notes["error"] = float((restore(parts, delta.shape) - delta).norm() / delta.norm())


JOBS = {
    **{f"ders {delta}": (ours, delta) for delta in ("int4", "int1", "drop0.9", "exact", "rank16")},
    "llm-compressor": (llm_compressor,),
    "compressed-tensors": (compressed_tensors,),
    "hqq": (hqq, False),
    "hqq optimised": (hqq, True, 30),
    "torchao": (torchao,),
    "bitdelta": (bitdelta,),
    "mergekit passthrough": (mergekit, "passthrough"),
    "mergekit linear": (mergekit, "linear"),
    "mergekit dare_linear": (mergekit, "dare_linear"),
    "zipnn": (zipnn,),
    "zstd -1": (zstd, 1),
    "zstd -3": (zstd, 3),
    "zstd -19": (zstd, 19, 7),
    "svd_lowrank": (low_rank, "torch.svd_lowrank"),
    "randomized_svd": (low_rank, "randomized_svd", 60),
    "full svd": (low_rank, "torch.linalg.svd", 15),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, of tensors over read-only bytes
    work, *arguments = JOBS[sys.argv[1]]
    place, model, plain = (model, plain), Path(sys.argv[7]), Path(sys.argv[7] + "-plain")
    out.mkdir(exist_ok=True)
    work(*arguments)
    first = {"first_wall": clock.wall, "first_cpu": clock.cpu}
    shutil.rmtree(out)
    (model, plain), notes = place, {"share": 1.0}
    out.mkdir()
    work(*arguments)
    notes["versions"] = [f"{name} {version(name)}" for name in notes.get("versions", [])]
    print("\n" + json.dumps(notes | first | {"wall": clock.wall, "cpu": clock.cpu}))
