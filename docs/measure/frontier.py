"""Planning for models of the largest kind: header-only checkpoints, and `ders compress --dry-run` on them.

    python docs/measure/frontier.py SCRATCH                  # writes the models, plans each with every recipe
    python docs/measure/frontier.py SCRATCH --model kimi-k2 --delta int4
    python docs/measure/frontier.py --rate 0.9               # only the table of estimated conversion times

Every model has the names, shapes and dtypes of the published one, in as many shards; a file is its true header and a
hole of the true size, so 2 TB take megabytes of disk. Nothing but headers is read by a plan. Deltas, base and copied
tensors are summed up here a second time, from the model's dimensions alone, and held against what the plan states.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Tensors = Iterator[tuple[str, tuple[int, ...], str]]
SIZE = {"BF16": 2, "F32": 4}
GROUP = 128  # inputs that share a scale: the default of --group-size
DELTAS = ("int4", "ternary0.02", "exact")
RATE = 1.1  # CPU-s for each GB of int4, as docs/results.md, section 3, has it
LINK = 3.0  # GB/s that one node gets of shared storage: 25 Gbit/s


@dataclass(frozen=True)
class Model:
    """A published MoE by its dimensions."""

    name: str
    model_type: str
    shards: int
    layers: int
    hidden: int
    inner: int  # of an expert
    experts: int
    vocab: int
    heads: int
    kv_heads: int = 0  # 0: multi-head latent attention
    dense: int = 0  # layers without experts, the first ones
    dense_inner: int = 0
    mtp: bool = False  # one more MoE layer that predicts the token after next
    count_key: str = "n_routed_experts"
    more: dict[str, object] = field(default_factory=dict)  # of config.json

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense + self.mtp

    def tensors(self) -> Tensors:
        """(name, shape, dtype) of every tensor, layer by layer."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden), "BF16"
        for layer in range(self.layers + self.mtp):
            yield from self._layer(f"model.layers.{layer}", layer)
        yield "model.norm.weight", (self.hidden,), "BF16"
        yield "lm_head.weight", (self.vocab, self.hidden), "BF16"

    def _layer(self, at: str, layer: int) -> Tensors:
        hidden = self.hidden
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", (hidden,), "BF16"
        attention = self._grouped() if self.kv_heads else self._latent()
        for name, shape in attention.items():
            yield f"{at}.self_attn.{name}.weight", shape, "BF16"
        if layer < self.dense:
            yield from _ffn(f"{at}.mlp", hidden, self.dense_inner)
            return
        module = "block_sparse_moe" if self.model_type == "mixtral" else "mlp"
        yield f"{at}.{module}.gate.weight", (self.experts, hidden), "BF16"
        names = ("w1", "w3", "w2") if module != "mlp" else ("gate_proj", "up_proj", "down_proj")
        for expert in range(self.experts):
            yield from _ffn(f"{at}.{module}.experts.{expert}", hidden, self.inner, names)
        if not self.kv_heads:
            yield f"{at}.mlp.gate.e_score_correction_bias", (self.experts,), "F32"
            yield from _ffn(f"{at}.mlp.shared_experts", hidden, self.inner)
        if layer == self.layers:
            yield f"{at}.embed_tokens.weight", (self.vocab, hidden), "BF16"
            yield f"{at}.eh_proj.weight", (hidden, 2 * hidden), "BF16"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{at}.{norm}.weight", (hidden,), "BF16"
            yield f"{at}.shared_head.head.weight", (self.vocab, hidden), "BF16"

    def _grouped(self) -> dict[str, tuple[int, ...]]:
        query, key = 128 * self.heads, 128 * self.kv_heads
        found = {"q_proj": (query, self.hidden), "k_proj": (key, self.hidden), "v_proj": (key, self.hidden)}
        normed = {"q_norm": (128,), "k_norm": (128,)} if self.model_type == "qwen3_moe" else {}
        return found | {"o_proj": (self.hidden, query)} | normed

    def _latent(self) -> dict[str, tuple[int, ...]]:
        """q by rank 1536, k and v by rank 512; heads of 128 + 64 rotary for q and k, 128 for v."""
        return {
            "q_a_proj": (1536, self.hidden),
            "q_a_layernorm": (1536,),
            "q_b_proj": (192 * self.heads, 1536),
            "kv_a_proj_with_mqa": (512 + 64, self.hidden),
            "kv_a_layernorm": (512,),
            "kv_b_proj": (256 * self.heads, 512),
            "o_proj": (self.hidden, 128 * self.heads),
        }


def _ffn(at: str, hidden: int, inner: int, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Tensors:
    gate, up, down = names
    yield f"{at}.{gate}.weight", (inner, hidden), "BF16"
    yield f"{at}.{up}.weight", (inner, hidden), "BF16"
    yield f"{at}.{down}.weight", (hidden, inner), "BF16"


LATENT = dict(model_type="deepseek_v3", hidden=7168, inner=2048, layers=61, dense_inner=18432)
MODELS = (
    Model("mixtral-8x22b", "mixtral", 59, 56, 6144, 16384, 8, 32000, 48, 8, count_key="num_local_experts"),
    Model("qwen3-235b-a22b", "qwen3_moe", 118, 94, 4096, 1536, 128, 151936, 64, 4, count_key="num_experts"),
    # the bf16 form of DeepSeek's own fp8_cast_bf16.py: the published FP8 file's weight_scale_inv tensors are gone
    Model("deepseek-v3", shards=163, experts=256, vocab=129280, heads=128, dense=3, mtp=True, **LATENT),
    Model("kimi-k2", shards=61, experts=384, vocab=163840, heads=64, dense=1, **LATENT | {"model_type": "kimi_k2"}),
)


def write(model: Model, folder: Path) -> None:
    """The model's files: true headers, config.json and index; the weights are holes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(model.tensors())
    room = -(-sum(map(nbytes, tensors)) // model.shards)
    shards: list[list] = [[] for _ in range(model.shards)]
    held = 0
    for tensor in tensors:
        shards[min(held // room, model.shards - 1)].append(tensor)
        held += nbytes(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{model.shards:05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, _, _ in shard), file)
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, dtype in sorted(shard, key=lambda t: (-SIZE[t[2]], t[0])):  # as safetensors' writer sorts
            end = position + nbytes((name, shape, dtype))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + position)
    index = {"metadata": {"total_size": held}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = {"model_type": model.model_type, "hidden_act": "silu", model.count_key: model.experts, **model.more}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": model.layers}, indent=2) + "\n")


def nbytes(tensor: tuple[str, tuple[int, ...], str]) -> int:
    size = SIZE[tensor[2]]
    for length in tensor[1]:
        size *= length
    return size


def expected(model: Model, delta: str) -> dict[str, int]:
    """Bytes by the model's dimensions: all `tensors`, the `experts`; for int4 `out`: base, deltas and copied tensors."""
    whole, matrix = sum(map(nbytes, model.tensors())), 2 * model.hidden * model.inner
    experts = 3 * matrix * model.experts * model.moe_layers
    known = {"tensors": whole, "experts": experts}
    if delta == "int4":  # half a byte for each entry, a bf16 scale for each group of a row
        gate = model.inner * (model.hidden // 2 + 2 * (model.hidden // GROUP))
        down = model.hidden * (model.inner // 2 + 2 * (model.inner // GROUP))
        deltas = model.experts * (2 * gate + down) * model.moe_layers
        known["out"] = whole - experts + 3 * matrix * model.moe_layers + deltas
    return known


def plan(folder: Path, delta: str) -> dict:
    """`ders compress FOLDER --delta DELTA --dry-run --json`: its plan, seconds, CPU seconds and peaks of memory."""
    command = [sys.executable, "-m", "ders_cli", "compress", str(folder), "--delta", delta, "--dry-run", "--json"]
    begin, anon = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anon = max(anon, int((re.search(r"RssAnon:\s+(\d+)", status) or [0, 0])[1]))
        time.sleep(0.01)
    text = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    return json.loads(text)["plan"] | {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "anonymous_bytes": anon * 1024,
    }


def check(model: Model, delta: str, stated: dict) -> None:
    """Hold the plan against the sums made here; headers, index and ders.json are what may stand above them."""
    known = expected(model, delta)
    assert stated["expert_bytes"] == known["experts"], (stated, known)
    assert 0 < stated["source_bytes"] - known["tensors"] < 1e8, (stated, known)
    if "out" in known:
        tensors = sum(1 for _ in model.tensors())
        assert 0 < stated["output_bytes"] - known["out"] < 3000 * tensors + 1e6, (stated, known)


def estimate(rate: float, read: float, written: float, bandwidth: float, cores: int) -> float:
    """Seconds to convert: what the storage needs or what the cores need, whichever is more; they work at the same time.

    read, written: GB; bandwidth: GB/s; rate: CPU seconds per GB read; cores: of all nodes.
    """
    return max((read + written) / bandwidth, rate * read / cores)


def print_estimates(rate: float, cores: int) -> None:
    """The table of docs/scale.md, with int4's sizes."""
    ways = [("own", 1, 1), ("own", 3, 1), ("own", 7, 1)]
    ways += [("shared", storage, nodes) for storage in (5, 20) for nodes in (1, 4, 16)]
    print(f"| storage | nodes of {cores} cores | {' | '.join(model.name for model in MODELS)} |")
    print(f"|---|---|{'---|' * len(MODELS)}")
    for kind, storage, nodes in ways:
        bandwidth, cells = storage if kind == "own" else min(storage, nodes * LINK), []
        for model in MODELS:
            known = expected(model, "int4")
            read, written = known["tensors"] / 1e9, known["out"] / 1e9
            seconds = estimate(rate, read, written, bandwidth, nodes * cores)
            cells.append(
                f"{seconds / 60:.1f} min ({'storage' if seconds == (read + written) / bandwidth else 'cores'})"
            )
        print(f"| {kind}, {storage} GB/s | {nodes} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, nargs="?")
    parser.add_argument("--model", action="append", choices=[model.name for model in MODELS])
    parser.add_argument("--delta", action="append")
    parser.add_argument("--rate", type=float, default=RATE, help="CPU seconds per GB read, of the estimates")
    parser.add_argument("--cores", type=int, default=16, help="of each node, of the estimates")
    asked = parser.parse_args()
    if asked.scratch is None:
        return print_estimates(asked.rate, asked.cores)
    print("| model | tensors | shards | delta | bytes in | bytes out | s | CPU s | peak RSS, MB | anonymous, MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        if asked.model and model.name not in asked.model:
            continue
        write(model, asked.scratch / model.name)
        for delta in asked.delta or DELTAS:
            found = plan(asked.scratch / model.name, delta)
            check(model, delta, found)
            cells = [
                model.name,
                f"{sum(1 for _ in model.tensors()):,}",
                model.shards,
                delta,
                f"{found['source_bytes']:,}",
            ]
            cells += [("" if found["exact"] else "at most ") + f"{found['output_bytes']:,}"]
            cells += [f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}"]
            cells += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['anonymous_bytes'] / 1e6:.0f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
