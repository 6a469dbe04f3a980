"""The two checkpoints that peers.py converts: a MoE, and the same MoE with every expert replaced by expert 0.

    python docs/measure/peers_model.py make FOLDER LAYERS EXPERTS HIDDEN INNER
    python docs/measure/peers_model.py plain FOLDER MODEL      for merges, which want a base of the same shape

The MoE has all tensors that Mixtral has, bf16, a file for each layer (llm-compressor's and mergekit's unit of work). An
expert is one base of N(0, 0.02) plus a delta of 5 % of it, half of its energy in 16 directions.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter

VOCABULARY, HEAD, RANK = 4096, 64, 16
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def make(folder: Path, layers: int, experts: int, hidden: int, inner: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    files = {"outer": ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]}
    for layer in range(layers):
        parts = ["input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate"]
        parts += [f"self_attn.{letter}_proj" for letter in "qkvo"]
        parts += [f"block_sparse_moe.experts.{e}.{name}" for e in range(experts) for name in ("w1", "w2", "w3")]
        files[f"layer{layer}"] = [f"model.layers.{layer}.{part}.weight" for part in parts]
    shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden), "gate": (experts, hidden)}
    outer = {"embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
    for file, names in files.items():
        specs = {}
        for name in names:
            last = name.split(".")[-2]
            square = (hidden,) if last.endswith("norm") else (hidden, hidden)
            specs[name] = TensorSpec((shapes | outer).get(last, square), "BF16")
        writer, bases = ShardWriter(folder / f"{file}.safetensors", specs), {}
        for name, spec in specs.items():
            weights = _normal(random, spec.shape, 0.02)
            if EXPERT.search(name):
                out, inputs = spec.shape
                base = bases.setdefault(EXPERT.sub("", name), weights)
                directions = _normal(random, (out, RANK), 1) @ _normal(random, (RANK, inputs), RANK**-0.5)
                weights = base + np.float32(0.7e-3) * (directions + _normal(random, spec.shape, 1))
            writer.write(name, 0, (weights.view(np.uint32) >> 16).astype(np.uint16))
        writer.close()
    weight_map = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _normal(random: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return random.standard_normal(shape, np.float32) * np.float32(deviation)


def plain(folder: Path, model: Path) -> None:
    """Copy a checkpoint of one tensor for each expert's matrix, with expert 0's bytes for every expert."""
    folder.mkdir(parents=True)
    sources = {}
    for path in model.glob("*.safetensors"):
        header, data = _read(path)
        sources |= {name: (data, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
            continue
        copy = shutil.copy(path, folder)
        header, data = _read(path)
        with open(copy, "r+b") as file:
            for name, entry in header.items():
                if EXPERT.search(name):
                    first, begin, end = sources[EXPERT.sub("0", name)]
                    file.seek(path.stat().st_size - data.size + entry["data_offsets"][0])
                    file.write(first[begin:end])


def _read(path: Path) -> tuple[dict, np.ndarray]:
    """A file's header and its tensors' bytes."""
    data = np.memmap(path, np.uint8, "r")
    length = int(data[:8].view("<u8")[0])
    return json.loads(data[8 : 8 + length].tobytes()), data[8 + length :]


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        plain(*map(Path, sys.argv[2:]))
