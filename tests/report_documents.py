"""Reports that no model was needed for: of any size, seeded, with whatever names a stranger may choose."""

import numpy as np

EVIL = "</script><script>alert(1)</script><b>\"'&amp;\u202e%{x}"
TERMS = {"none": 0.0, "drop0.9+int4": 0.55, "int2": 2.13, "int4": 4.13, "exact": 6.5}
RANKS, DENSITIES = [1, 2, 4, 8, 16, 32, 64], [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]


def analysis(
    layers: int, experts: int, *, seed: int = 0, name: str = "model", projections=("gate", "up", "down")
) -> dict:
    """An analysis with random numbers of a likely size. `name` stands wherever strangers write."""
    random = np.random.default_rng(seed)
    labels = [str(i) for i in range(experts - 1)] + ["shared"]
    groups = [
        _group(random, f"{name}.layers.{n}.mlp.experts.{p}_proj", n, p, labels)
        for n in range(layers)
        for p in projections
    ]
    codecs = {
        term: {
            "delta_bytes": int(1e6 * bits),
            "folder_bytes": int(2e6 + 1e6 * bits),
            "bits_per_delta_weight": bits,
            "output_error": 0.0 if term == "exact" else 0.2 * 2.0**-bits,
            "worst_output_error": 0.0 if term == "exact" else 0.3 * 2.0**-bits,
            "worst": f"{name}.layers.0.mlp.experts.down_proj, expert 0",
        }
        for term, bits in TERMS.items()
    }
    return {
        "schema": 1,
        "kind": "analysis",
        "command": "analyze",
        "tool": "ders-cli 0.1.0",
        "model": name,
        "architecture": "mixtral",
        "layers": layers,
        "experts": experts,
        "dtype": "BF16",
        "bytes": {"source": 9_000_000, "experts": 8_000_000},
        "weights": 4_000_000,
        "base": "mean",
        "states": {"kind": "random", "tokens": 256, "seed": 0},
        "groups": groups,
        "routers": [
            {"layer": n, "name": f"{name}.{n}.gate", "cosine": _cosine(random, experts)} for n in range(layers)
        ],
        "bases": [{"base": "mean", "relative_norm": 0.05, "exact_bytes": 5_000_000}],
        "alignment": {"permuted": True, "layers": [{"name": name, "experts": ["1"], "matched": 0.98}]},
        "codecs": codecs,
        "verdict": {
            "kind": "siblings",
            "says": f"The experts of {name} were upcycled from one dense model.",
            "reasons": ["Cosines between experts are 0.998 on average.", f"Seen in {name}."],
            "noise": {"std": 1e-4, "of_weights": 0.01},
        },
        "recommended": {"recipe": {"delta": "int4", "base": name}, "says": f"int4 for {name}."},
    }


def _cosine(random: np.random.Generator, experts: int) -> dict:
    pairs = 0.99 + 0.01 * random.random((experts, experts))
    pairs = (pairs + pairs.T) / 2
    np.fill_diagonal(pairs, 1.0)
    found = {"least": float(pairs.min()), "mean": float(pairs.mean()), "most": float(pairs.max())}
    return found | {"pairs": np.round(pairs, 6).tolist() if experts <= 64 else None}


def _group(random: np.random.Generator, name: str, layer: int, projection: str, labels: list[str]) -> dict:
    experts = len(labels)

    def numbers(middle: float) -> list[float]:
        return np.round(middle * (0.9 + 0.2 * random.random(experts)), 6).tolist()

    codecs = {
        term: dict.fromkeys(("weight_error", "delta_error", "kept", "output_error", "output_delta_error"), 0.01)
        | {"bytes": int(1000 * bits * experts)}
        for term, bits in TERMS.items()
    }
    return {
        "name": name,
        "layer": layer,
        "projection": projection,
        "shape": [96, 64],
        "dtype": "BF16",
        "experts": labels,
        "verdict": "siblings",
        "cosine": _cosine(random, experts),
        "delta": {
            "relative_norm": numbers(0.05 + 0.01 * np.sin(layer)),
            "cosine_to_base": numbers(0.9),
            "equal": numbers(0.1),
            "entropy": numbers(4),
            "kurtosis": numbers(3.2),
            "outlier": numbers(12),
            "std": numbers(1e-3),
        },
        "rank_energy": {
            "expert": labels[0],
            "ranks": RANKS,
            "energy": [1 - 0.9 * 0.9**r for r in RANKS],
            "error": [0.01] * len(RANKS),
            "rank90": 40,
            "rank99": None,
        },
        "density_energy": {"densities": DENSITIES, "energy": [q**0.4 for q in DENSITIES]},
        "plan": random.choice(list(TERMS), experts).tolist(),
        "codecs": codecs,
    }


def conversion(layers: int, experts: int, *, seed: int = 0, name: str = "model") -> dict:
    """A conversion with random numbers of a likely size."""
    random = np.random.default_rng(seed)
    groups = []
    for layer in range(layers):
        for projection in ("gate", "up", "down"):
            error = {
                field: (0.01 + 0.001 * random.random(experts)).round(7).tolist()
                for field in ("weight", "delta", "max_abs")
            }
            groups.append(
                {
                    "name": f"{name}.layers.{layer}.mlp.experts.{projection}_proj",
                    "layer": layer,
                    "projection": projection,
                    "shape": [96, 64],
                    "dtype": "BF16",
                    "experts": [str(i) for i in range(experts)],
                    "plan": random.choice(["int2", "int4"], experts).tolist(),
                    "bytes": 96 * 64 * experts // 2,
                    "error": error | {"kept": [1.0] * experts, "cosine": [0.9999] * experts},
                }
            )
    size = {
        "experts": 8_000_000,
        "base": 1_000_000,
        "delta": 2_000_000,
        "weights": 4_000_000,
        "bits_per_delta_weight": 4.1,
    }
    return {
        "schema": 1,
        "kind": "conversion",
        "command": "report",
        "tool": "ders-cli 0.1.0",
        "model": name,
        "architecture": "mixtral",
        "dtype": "BF16",
        "base": "mean",
        "bytes": size,
        "recipe": {"delta": "int4", "base": name, "seed": 0},
        "groups": groups,
    }
