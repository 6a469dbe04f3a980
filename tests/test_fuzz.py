"""Every way in for a stranger's bytes (fuzz/targets.py): kept inputs and seeded changes of them lead to a DersError at most.

The fuzzer itself, with atheris: `python tests/fuzz/run.py TARGET --minutes 10`, or `--all`.
"""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from command import ROOT
from ders_kernels import counter_rng, numba_cache
from fuzz import memory, python_kernels
from fuzz.targets import CONFIGS, TARGETS, finds

from ders_cli.codecs import codec_from_config, integers, parse_codec
from ders_cli.errors import CheckpointError, UsageError
from ders_cli.recipe import load_recipe
from ders_cli.source import DersSource

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
MUTATIONS = 300
ALL = pytest.mark.parametrize("name", TARGETS)


def _kept(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def _require(name: str, data: bytes) -> None:
    if (found := finds(TARGETS[name], data)) is not None:
        raise AssertionError(f"{name}: {data!r}") from found


@ALL
def test_every_seed_is_valid(name: str) -> None:
    """Else what is changed would not get past the first check."""
    for seed in TARGETS[name].seeds():
        TARGETS[name].one(seed)


@ALL
def test_kept_inputs(name: str) -> None:
    kept = _kept(name)
    assert kept and sum(map(len, kept)) < 60_000
    for data in kept:
        _require(name, data)


@ALL
def test_seeded_changes(name: str) -> None:
    rng, whole = Random(name), [*TARGETS[name].seeds(), *_kept(name)]
    for _ in range(MUTATIONS):
        data = rng.choice(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            data = TARGETS[name].mutate(data, rng)
        _require(name, data)


WITHOUT_COMPILER = """
from pathlib import Path
from fuzz import python_kernels
from fuzz.targets import CONFIGS, TARGETS, finds
python_kernels.install()
for name in CONFIGS:
    for path in sorted(Path({corpus!r}, name).iterdir()):
        if found := finds(TARGETS[name], path.read_bytes()):
            raise AssertionError(path) from found
"""


def _python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
    environment = os.environ | variables | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_kept_inputs_stay_within_their_arrays() -> None:
    """Compiled kernels look at no bounds; as Python they do."""
    ran = _python(WITHOUT_COMPILER.format(corpus=str(CORPUS)), NUMBA_DISABLE_JIT="1")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_can_be_made_to_look_at_bounds(variable: str, tmp_path: Path) -> None:
    code = "import numpy as np; from ders_kernels.packing import _pack_bitmap\n"
    code += "try: _pack_bitmap(np.full((1, 1), 99, np.int32), np.zeros((1, 1), np.uint8))\n"
    code += "except IndexError: print('out of bounds')"
    ran = _python(code, **{variable: "1"}, NUMBA_CACHE_DIR=str(tmp_path))
    assert ran.stdout == "out of bounds\n", ran.stderr


def test_code_that_looks_at_bounds_is_cached_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_BOUNDSCHECK", raising=False)
    plain = numba_cache.digest(tmp_path)
    for value, same in (("0", True), ("", True), ("1", False)):
        monkeypatch.setenv("NUMBA_BOUNDSCHECK", value)
        assert (numba_cache.digest(tmp_path) == plain) == same


@pytest.mark.parametrize("first", [0, 5, 1023, 2**33 + 6])
def test_the_fuzzers_draws_are_the_kernels(first: int) -> None:
    out = np.empty(131, np.uint32)
    python_kernels.fill(np.uint64(2**40 + 3), np.uint64(first), out)
    assert (out == counter_rng.draw(2**40 + 3, first, 131)).all()
    for word in (0, 1, 2**63, 0b1011000):
        assert python_kernels.count_bits(np.uint64(word)) == bin(word).count("1")
        assert python_kernels.lowest_bit(np.uint64(word)) == (
            len(bin(word)) - 1 - bin(word).rindex("1") if word else 64
        )


# --- planted faults: each is found, so that finding nothing means something ---


def _example() -> bytes:
    return memory.example(CONFIGS["integers"][3], (3, 40), "BF16")


def test_an_error_that_is_no_ders_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert finds(TARGETS["integers"], _example()) is None
    for error in (IndexError, KeyError, MemoryError, AssertionError, ZeroDivisionError):
        monkeypatch.setattr(
            integers.IntCodec, "decode_expert", lambda *_, error=error: (_ for _ in ()).throw(error("x"))
        )
        assert isinstance(finds(TARGETS["integers"], _example()), error)
    monkeypatch.setattr(integers.IntCodec, "decode_expert", lambda *_: (_ for _ in ()).throw(CheckpointError("x")))
    assert finds(TARGETS["integers"], _example()) is None


def test_decoding_that_depends_on_the_moment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))
    monkeypatch.setattr(integers.IntCodec, "decode_expert", lambda self, parts, base, *_: base + np.uint16(next(calls)))
    assert "again" in str(finds(TARGETS["integers"], _example()))


def test_decoding_that_depends_on_the_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        integers.IntCodec, "decode_expert", lambda self, parts, base, *_: np.full_like(base, base.shape[0])
    )
    assert "whole" in str(finds(TARGETS["integers"], _example()))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_something_else_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = memory.example(CONFIGS[name][0], (3, 40), "BF16")
    decode = DersSource.decode
    monkeypatch.setattr(DersSource, "decode", lambda *given: decode(*given) ^ np.uint16(1))
    assert "format.md" in str(finds(TARGETS[name], example))


def test_reading_beside_a_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = DersSource._parts
    monkeypatch.setattr(
        DersSource, "_parts", lambda self, group, codec, member, rows: parts(self, group, codec, member + 2, rows)
    )
    assert "read" in str(finds(TARGETS["integers"], _example()))


def test_an_output_of_another_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers.IntCodec, "decode_expert", lambda self, parts, base, *_: base.astype(np.int64))
    assert "int64" in str(finds(TARGETS["integers"], _example()))


def test_the_fuzzer_reports_what_it_finds(tmp_path: Path) -> None:
    """A real run of a second, and one of a target with a fault."""
    pytest.importorskip("atheris")
    command = [
        sys.executable,
        str(ROOT / "tests" / "fuzz" / "run.py"),
        "none",
        "--minutes",
        "0.1",
        "--findings",
        str(tmp_path),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and "no finding" in ran.stdout, ran
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nos._exit(7) if '--child' in open('/proc/self/cmdline').read() else None\n"
    )
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ran.returncode == 1 and "exit 7" in ran.stdout, ran


# --- what was found, by its message ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a-date-that-is-none", "month must be in 1..12"),
        ("int-tag-on-a-word", "a !!tag that YAML cannot read: ValueError"),
        ("int-tag-on-nothing", "cannot read: IndexError"),
        ("bool-tag-on-a-word", "cannot read: KeyError"),
        ("timestamp-tag-on-a-word", "cannot read: AttributeError"),
        ("hex-of-5000-digits", "line 2: expected at most 16 levels and 1000 characters a value"),
        ("brackets-500-deep", "line 1: expected at most 16 levels"),
        ("group-size-0-in-a-rule", "group size 0: expected 1"),
        ("2-of-4-without-quotes", "found 124; YAML takes N:M for a number, so put it in quotes"),
        ("key-twice", "'delta' stands twice"),
    ],
)
def test_recipes_that_were_findings(name: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_recipe(str(CORPUS / "recipe" / name), {})
    assert said in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("kind", ["fifo", "device", "loop"])
def test_a_recipe_that_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(UsageError, match="expected a recipe"):
        load_recipe(str(path), {})


@pytest.mark.parametrize(
    "text",
    ["+".join(["int1"] * 17), "int" + "1" * 5000, "rank" + "9" * 5000, "9" * 5000 + ":4", "drop" + "1" * 100_000 + "x"],
)
def test_deltas_beyond_reason(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_codec(text, 8)
    assert len(str(raised.value)) < 400
    assert parse_codec("+".join(["int1"] * 16), 8).spec((4, 8))


@pytest.mark.parametrize("within", [15, 16, 900])
def test_a_chain_in_a_chain(within: int) -> None:
    config: dict = {"codec": "none"}
    for _ in range(within):
        config = {"codec": "chain", "first": {"codec": "none"}, "then": config}
    if within == 15:
        assert codec_from_config(config).config == config
    else:
        with pytest.raises(CheckpointError, match="more than 16 codecs"):
            codec_from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"codec": "chain", "first": {"codec": "chain", "first": {"codec": "none"}, "then": {"codec": "none"}}, "then": {"codec": "none"}},
        {"codec": "chain", "first": "abc", "then": "x"},
        {"codec": "drop", "rate": 10**400},
    ],
    ids=["chain first", "a word", "400 digits"],
)  # fmt: skip
def test_codecs_that_were_findings(config: dict) -> None:
    with pytest.raises(CheckpointError, match=r"ders\.json: codec"):
        codec_from_config(config)
