"""The parameter counts of DeRS (arXiv 2503.01359) from the codecs' own specs on the real models' shapes.

One copy of the FFNs that become experts has F parameters; with N experts in every other layer (Coder-MoE: in every one)

    vanilla    (N-1) F + router + (N-1) biases
    DeRS-SM    N (1-p) F + router + (N-1) biases        DeRS-LM    N r sum(in + out) + router + (N-1) biases
    extended   N + 1 for N: the universal FFN is one of the experts
    dropped    N (1-p) F            quantised to k bits    N k/16 F

No scales, no positions: what those take, `ders` reports in bytes. Rows that do not come out are in NOT_REPRODUCED.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import done

from ders_cli.codecs import parse_codec
from ders_cli.codecs.rank import RankCodec


@dataclass(frozen=True)
class Model:
    layers: int  # with experts
    hidden: int
    inner: int
    gate: bool = True
    biases: bool = False
    noisy: bool = False  # XFT's router: two linear maps with a tanh between, and one for the noise

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return [(self.inner, self.hidden)] * (1 + self.gate) + [(self.hidden, self.inner)]

    @property
    def copy(self) -> int:
        return self.layers * sum(math.prod(shape) for shape in self.matrices)

    def router(self, n: int) -> int:
        return self.layers * (2 * self.hidden * n + n * n if self.noisy else self.hidden * n)

    def bias_sets(self, n: int) -> int:
        return self.layers * (self.inner + self.hidden) * (n - 1) * self.biases

    def deltas(self, term: str, n: int) -> float:
        """Parameters of n deltas per matrix; codes of k bits count as k/16 of one."""
        total = 0.0
        for shape in self.matrices:
            for part, spec in parse_codec(term, 128).spec(shape).items():
                total += spec.nbytes / 2 if part == "codes" else spec.size if part != "scale" else 0
        return n * self.layers * total


PHI = Model(16, 2560, 10240, gate=False, biases=True)  # Phi-2, 32 layers
STABLELM = Model(12, 2048, 5632)  # StableLM-2-1.6B, 24 layers
QWEN = Model(12, 2048, 5504)  # Qwen-1.8B, 24 layers; its intermediate_size 11008 is that of gate and up together
CODER = Model(24, 2048, 5504, noisy=True)  # DeepSeek-Coder-1.3B
N = 4

# model, codec, experts with a delta, printed: Tables 1 to 4, S7, S8
ADDED = [
    (STABLELM, "sparse0.9999", N, "0.26M"),
    (STABLELM, "rank1", N, "1.20M"),
    (QWEN, "sparse0.9999", N, "0.26M"),
    (QWEN, "rank1", N, "1.19M"),
    (PHI, "sparse0.9999", N, "1.11M"),
    (PHI, "rank1", N, "2.42M"),
    (STABLELM, "sparse0.999", N + 1, "2.17M"),  # Med-MoE, extended
    (STABLELM, "rank4", N + 1, "5.63M"),
    (PHI, "sparse0.999", N + 1, "5.18M"),
    (PHI, "rank4", N + 1, "9.18M"),
    (CODER, "sparse0.9999", N, "0.72M"),
    (CODER, "sparse0.999", N, "3.64M"),
    (CODER, "sparse0.99", N, "32.9M"),
    (CODER, "sparse0.9", N, "325M"),
    (CODER, "rank1", N, "2.57M"),
    (CODER, "rank4", N, "9.09M"),
    (CODER, "rank16", N, "35.2M"),
    (CODER, "rank64", N, "140M"),
    (CODER, "sparse0.9", N + 1, "406M"),
    (CODER, "rank4", N + 1, "11.3M"),
]
TERMS = ("drop0.2", "drop0.4", "drop0.6", "drop0.8", "drop0.9", "drop0.99", "int8", "int4", "int2", "int1")
COMPRESSED = [  # Tables S13, S14
    (STABLELM, "1.33B 1.00B 0.66B 0.33B 0.17B 0.02B 0.83B 0.42B 0.21B 0.10B"),
    (QWEN, "1.30B 0.97B 0.65B 0.32B 0.16B 0.02B 0.81B 0.41B 0.20B 0.10B"),
    (PHI, "2.68B 2.01B 1.34B 0.67B 0.34B 0.03B 1.68B 0.84B 0.42B 0.21B"),
]
NOT_REPRODUCED = [
    (STABLELM, "sparse0.9999", N, "0.29M", 264_421),  # Med-MoE, Table 2; the same model is 0.26M in Table 1
    (PHI, "drop0.99", N + 1, "0.21B", 42_188_800),  # Med-MoE, extended, Table S11: 0.04B
]


def fits(count: float, printed: str) -> bool:
    """Whether a count, rounded as it is printed, is what is printed."""
    number, unit = printed[:-1], {"M": 1e6, "B": 1e9}[printed[-1]]
    return f"{count / unit:.{len(number.partition('.')[2])}f}" == number


@pytest.mark.parametrize(("model", "term", "experts", "printed"), ADDED)
def test_upcycling(model: Model, term: str, experts: int, printed: str) -> None:
    assert fits(model.deltas(term, experts) + model.router(N) + model.bias_sets(experts), printed)


def test_biases_and_routers_are_seen() -> None:
    """Without them these rows do not come out: what is tested above is not the deltas alone."""
    assert not fits(PHI.deltas("rank1", N) + PHI.router(N), "2.42M")
    assert not fits(PHI.deltas("rank1", N) + PHI.bias_sets(N), "2.42M")


@pytest.mark.parametrize(("model", "printed"), COMPRESSED)
def test_compression(model: Model, printed: str) -> None:
    for term, number in zip(TERMS, printed.split(), strict=True):
        assert fits(model.deltas(term, N), number), term


@pytest.mark.parametrize(
    ("model", "copies", "printed"),
    [(QWEN, 3, "1.22B"), (PHI, 3, "2.52B"), (CODER, 3, "2.43B"), (STABLELM, 1, "0.42B"), (PHI, 1, "0.84B")]
    + [(CODER, 1, "0.81B")],
)
def test_vanilla(model: Model, copies: int, printed: str) -> None:
    assert fits(copies * model.copy, printed)


def test_cut_where_others_are_rounded() -> None:
    assert 3 * STABLELM.copy == 1_245_708_288  # printed 1.24B
    assert 4 * CODER.copy == 3_246_391_296  # printed 3.24B: 0.81 + 2.43


@pytest.mark.parametrize(("model", "term", "experts", "printed", "ours"), NOT_REPRODUCED)
def test_not_reproduced(model: Model, term: str, experts: int, printed: str, ours: int) -> None:
    router = model.router(N) if term.startswith("sparse") else 0
    count = model.deltas(term, experts) + router
    assert not fits(count, printed)
    assert count == pytest.approx(ours, rel=1e-3)


def stand_in(folder: Path, layers: int, hidden: int, inner: int, vocab: int) -> None:
    """A llama of real size by its headers alone: the file has no data on disk, only a length."""
    shapes = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
    }
    for layer in range(layers):
        where = f"model.layers.{layer}"
        shapes |= {f"{where}.self_attn.{p}_proj.weight": [hidden, hidden] for p in "qkvo"}
        shapes |= {f"{where}.mlp.{p}_proj.weight": [inner, hidden] for p in ("gate", "up")}
        shapes |= {f"{where}.mlp.down_proj.weight": [hidden, inner]}
        shapes |= {f"{where}.{n}_layernorm.weight": [hidden] for n in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    config = dict(model_type="llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers)
    (folder / "config.json").write_text(json.dumps(config | dict(architectures=["LlamaForCausalLM"], vocab_size=vocab)))


def test_what_the_command_reports(tmp_path: Path) -> None:
    """DeepSeek-Coder-1.3B: the paper's counts, with the plain router of Mixtral for XFT's."""
    stand_in(tmp_path / "coder", 24, 2048, 5504, 32256)
    router = 24 * 2048 * N

    def parameters(*form: object) -> dict[str, int]:
        return done("upcycle", tmp_path / "coder", "--dry-run", "--json", *form).json["parameters"]

    assert parameters("--rank", 4) == {"dense": 1_346_471_936, "added": N * 4 * 24 * 3 * (2048 + 5504) + router}
    assert parameters("--rank", 1)["added"] == CODER.deltas("rank1", N) + router
    assert parameters("--sparse", 0.9)["added"] == pytest.approx(0.1 * N * CODER.copy + router, rel=1e-5)
    assert parameters("--full") == {"dense": 1_346_471_936, "added": 3 * CODER.copy + router}
    half = parameters("--rank", 1, "--layers", "even")["added"]  # a Mixtral has routers in all layers
    assert half == CODER.deltas("rank1", N) / 2 + router
    assert parameters("--rank", 1, "--split", 2, "--top-k", 1)["added"] == 2 * router + sum(
        2 * N * 24 * RankCodec(1).spec(shape)[part].size
        for shape in ((2752, 2048), (2752, 2048), (2048, 2752))
        for part in ("left", "right")
    )
