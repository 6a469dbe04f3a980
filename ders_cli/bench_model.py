"""A synthetic upcycled MoE of any size, made as fast as a disk takes it: what conversions are timed on.

Mixtral's names and layout, bf16. Every expert is one random base whose bit patterns have moved by a few steps, as
fine-tuning moves them: of a real upcycled model's weights 57 to 68 % are the base's bits, 23 % one step off, and 4 %
more than four (docs/results.md, "Real models"). A codec's time depends on how many deltas are zero; its errors here
say nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter

# A random byte picks the step: 175 of 256 are 0, and so on.
STEPS = np.repeat(
    np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6, 9, -9, 14, -14, 20, -20, 28], np.int16),
    [175, 27, 27, 6, 6, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
)
SHIFTS = 1 << 22


@dataclass(frozen=True)
class Shape:
    """One MoE layer: three matrices of inner x hidden for each expert."""

    experts: int = 8
    hidden: int = 2048
    inner: int = 5632

    @property
    def layer_bytes(self) -> int:
        """Of a layer's experts, in bf16."""
        return 3 * self.hidden * self.inner * self.experts * 2


def make_model(folder: Path, gigabytes: float, shape: Shape = Shape()) -> int:  # noqa: B008 (it is frozen)
    """Write a checkpoint of about so many 1e9 bytes, one layer at least; returns its layers. Same bytes every time."""
    layers = max(1, round(gigabytes * 1e9 / shape.layer_bytes))
    folder.mkdir(parents=True)
    specs = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        specs[f"{prefix}.gate.weight"] = TensorSpec((shape.experts, shape.hidden), "BF16")
        up, down = (shape.inner, shape.hidden), (shape.hidden, shape.inner)
        for expert in range(shape.experts):
            for name, matrix in (("w1", up), ("w2", down), ("w3", up)):
                specs[f"{prefix}.experts.{expert}.{name}.weight"] = TensorSpec(matrix, "BF16")
    random = np.random.default_rng(0)
    normal = random.standard_normal(shape.hidden * max(shape.inner, shape.experts), np.float32) * np.float32(0.02)
    away = normal + np.copysign(np.float32(1e-4), normal)  # from 0: its last bits can move
    base = (away.view(np.uint32) >> 16).astype(np.uint16)
    picks = np.frombuffer(random.bytes(base.size + SHIFTS), np.uint8)
    steps = STEPS.view(np.uint16)[picks]  # drawn once: each tensor takes them from a place of its own
    writer = ShardWriter(folder / "model.safetensors", specs)
    for name, spec in specs.items():
        first = random.integers(SHIFTS)
        writer.write(
            name, 0, base[: spec.size] + steps[first : first + spec.size]
        )  # modulo 2^16: steps may be negative
    writer.close()
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "num_local_experts": shape.experts,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers
