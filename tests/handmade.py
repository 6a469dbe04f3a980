"""MoE checkpoints written by hand from stored bits: any shape, dtype and value; neither torch nor transformers.

Bits are uint16 (BF16, F16) or uint32 (F32) as in ders_cli/checkpoint/tensor.py. Layers may differ in shape, dtype and number of
experts: the layout asks only that the matrices of one layer go together.
"""

import json
from pathlib import Path

import numpy as np

# (dtype, bits), of any shape; a matrix of an expert is [out, in]
Tensor = tuple[str, np.ndarray]
QWEN = {"model_type": "qwen3_moe", "hidden_act": "silu"}


def save(folder: Path, tensors: dict[str, Tensor], config: dict = QWEN, files: int = 1) -> Path:
    """A folder with config.json and the tensors, in `files` files of consecutive ones and an index where these are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names, weight_map = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        part = names[number * len(names) // files : (number + 1) * len(names) // files]
        write_file(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, its tensors in the order given."""
    entries, position = {}, 0
    for name, (dtype, bits) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(bits.shape),
            "data_offsets": [position, position := position + bits.nbytes],
        }
    text = json.dumps(entries).encode()
    data = b"".join(bits.tobytes() for _, bits in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_file(path: Path) -> dict[str, Tensor]:
    """The inverse of write_file, of whichever header."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header, found = json.loads(data[8:begin]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            kind = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}.get(entry["dtype"], "u1")
            bits = np.frombuffer(data[begin + first : begin + last], kind)
            found[name] = entry["dtype"], bits.reshape(entry["shape"]) if kind != "u1" else bits
    return found


def layer(number: int, dtype: str, experts: np.ndarray) -> dict[str, Tensor]:
    """A layer whose expert i has experts[i] [out, in] as gate, turned upside down as up, and transposed as down."""
    where, found = f"model.layers.{number}.mlp", {}
    for i, matrix in enumerate(experts):
        for name, bits in (("gate", matrix), ("up", matrix[::-1]), ("down", matrix.T)):
            found[f"{where}.experts.{i}.{name}_proj.weight"] = dtype, np.ascontiguousarray(bits)
    found[f"{where}.gate.weight"] = dtype, np.ones((len(experts), 3), experts.dtype)
    return found
