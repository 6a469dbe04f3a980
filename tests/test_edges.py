"""Numbers and shapes at the edge: subnormals, signed zeros, the largest of a dtype, groups of zeros, one row, one column.

What a codec must give is worked out here once more, in plain numpy and fp64 sums (`plain`), from docs/codecs.md and docs/format.md;
what a whole conversion holds is read by independent_reader.py. So neither side of a codec is held against itself.
"""

import json
import math
from functools import partial
from pathlib import Path

import handmade
import numpy as np
import pytest
from command import Ran, contents, ders, done
from independent_reader import draw, find_kept, narrow, read_delta, read_experts, read_tensors, widen

from ders_cli import base
from ders_cli.codecs import parse_codec
from ders_cli.codecs.base import NonFiniteError
from ders_cli.codecs.chain import ChainCodec
from ders_cli.codecs.rank import RankCodec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a user should not see one of numpy's

DTYPES = {"BF16": (2.0**-133, 255 * 2.0**120), "F16": (2.0**-24, 65504.0), "F32": (2.0**-149, (2**24 - 1) * 2.0**104)}
LOSSY = [
    "int8",
    "int4",
    "int3",
    "int2",
    "int1",
    "drop0.9",
    "drop0.5",
    "drop0",
    "ternary0.05",
    "ternary0.3",
    "top0.1",
    "top1",
]
LOSSY += ["2:4", "1:3", "3:64", "rank2", "rank999", "sparse0.9", "none", "drop0.5+int4", "top0.3+int2", "2:4+int8"]
LOSSY += ["int1+rank2", "rank2+top0.1", "ternary0.3+int3", "drop0.5+top0.5+int4", "sparse0.5+int4"]
COMMAND = [
    "exact",
    "int4",
    "int1",
    "drop0.9",
    "ternary0.05",
    "top0.1",
    "2:4",
    "rank2",
    "sparse0.9",
    "none",
    "top0.3+int2",
    "int1+rank2",
]
KEY = 2**64 - 1


def cases(dtype: str) -> dict[str, np.ndarray]:
    """Stored bits [E, out, in] of experts."""
    random, (tiny, most) = np.random.default_rng(1), DTYPES[dtype]
    normal = random.standard_normal
    one, spread = normal((2, 129)), 10.0 ** random.integers(*((-6, 4) if dtype == "F16" else (-30, 30)), (3, 2, 129))
    found = {
        "alike": normal((7, 5)) + normal((3, 7, 5)) / 100,
        "nothing but zeros": np.zeros((3, 2, 129)),
        "all the same": np.repeat(one[None], 3, 0),
        "constant rows": np.repeat(np.arange(8.0).reshape(2, 4, 1), 6, 2),
        "opposite": np.stack([one, -one]),
        "deltas larger than weights": one / 1000 + 100 * normal((3, 2, 129)),
        "subnormal": tiny * random.integers(-9, 10, (3, 3, 17)),
        "one of the smallest": np.where(np.arange(60).reshape(3, 4, 5) == 7, tiny, 0),
        "one that is not zero": np.where(np.arange(60).reshape(3, 4, 5) == 7, -1.0, 0),
        "signed zeros": np.where(random.random((3, 5, 9)) < 0.5, -0.0, 0.0),
        "a row of zeros": normal((2, 5, 9)) * (np.arange(5) != 2)[:, None],
        "of every size": normal((3, 2, 129)) * spread,
        "near the largest": 0.3 * most + normal((3, 2, 9)) * 1e-3 * most,
        "[1, 1]": normal((3, 1, 1)),
        "[1, 3]": normal((3, 1, 3)),
        "[3, 1]": normal((3, 3, 1)),
        "one expert": normal((1, 7, 5)),
    }
    return {name: narrow(experts.astype(np.float32), dtype) for name, experts in found.items()}


def beyond(dtype: str) -> dict[str, np.ndarray]:
    """Experts whose mean, delta or coded values pass the range of the dtype or of fp32, for some codecs at least."""
    random, (_, most) = np.random.default_rng(2), DTYPES[dtype]
    found = {
        "opposite": np.stack([np.full((3, 9), sign * most) for sign in (1, -1)]),
        "a sum of them": most * (1 - random.random((3, 3, 9)) / 100),
        "one huge": np.where(np.arange(54).reshape(2, 3, 9) == 7, most, 0),
        "one huge expert": np.stack([most * np.sign(random.standard_normal((3, 9))), random.standard_normal((3, 9))]),
    }
    return {name: narrow(experts.astype(np.float32), dtype) for name, experts in found.items()}


# --- what the codecs give, in plain numpy ---


def bf16(values: np.ndarray) -> np.ndarray:
    return widen(narrow(np.float32(values), "BF16"))


def groups(width: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, width, size)]


def inverse(a: float, b: np.float32) -> np.float32:
    """fp32 a / b, or 0 where that is infinite."""
    with np.errstate(over="ignore"):
        found = np.float32(a) / b if b > 0 else np.float32(0)
    return found if np.isfinite(found) else np.float32(0)


def integers(d: np.ndarray, bits: int, size: int, key: int) -> np.ndarray:
    """b >= 3: rounded by the bf16 scale; 1 and 2: the nearest level, and of a 0 the drawn sign, times the gain rule's scale."""
    out, top = np.zeros_like(d), np.float32(2 ** (bits - 1) - 1)
    signs = np.where((d > 0) | ((d == 0) & (draw(d.size, key).reshape(d.shape) < 2**31)), 1, -1)
    for row, cut in ((row, cut) for row in range(len(d)) for cut in groups(d.shape[1], size)):
        own = d[row, cut]
        most = abs(own).max()
        if bits >= 3:
            scale = bf16(most / top)
            codes = np.clip(np.rint(own * inverse(1, scale)), -top, top) + np.float32(0)  # no code is -0
            out[row, cut] = codes * scale
            continue
        level = np.where(abs(own) * inverse(1.5, most) >= 1, 1.5, 0.5) if bits == 2 else np.ones(own.shape)
        exact = own.astype(np.float64)
        against = (abs(exact) * level).sum()
        scale = bf16((exact**2).sum() / against) if against > 0 else np.float32(0)
        out[row, cut] = (signs[row, cut] * level).astype(np.float32) * scale
    return out


def ternary(d: np.ndarray, density: float, key: int) -> np.ndarray:
    """Systematic sampling: |d| / s each, kept where the running sum passes a whole number plus the row's draw."""
    out, n = np.zeros_like(d), max(1, round(density * d.shape[1]))
    draws = draw(len(d), key) * 2.0**-32
    for row, size in enumerate(abs(d).astype(np.float64)):
        total, kept = sum(size.tolist()), []
        scale = narrow(np.float32([total / n]), "BF16")
        while widen(scale)[0].astype(np.float64) * n < total:
            scale += np.uint16(1)
        s, running = float(widen(scale)[0]), draws[row]
        for i in np.flatnonzero(size):
            before, running = math.floor(running), running + min(1.0, size[i] / s)
            kept += [i] if math.floor(running) > before else []
        expected = (np.minimum(1, size / s if s else size) * s * size).sum()
        if expected and (size**2).sum() > expected * (1 + 1e-9):
            s = s * (size**2).sum() / expected
        out[row, kept[:n]] = np.sign(d[row, kept[:n]]) * bf16(s)
    return out


def select(codec, d: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns [out, k] that drop, top and n:m keep, and their fp32 values."""
    width, config = d.shape[1], codec.config
    if config["codec"] == "drop":
        columns = find_kept(config, {}, d.shape, key)
        return columns, np.take_along_axis(d, columns, 1) * np.float32(width / columns.shape[1])
    every, count = (width, codec.kept(width)) if config["codec"] == "top" else (config["m"], config["n"])
    ahead = [np.argsort(-abs(d[:, cut]), axis=1, kind="stable")[:, :count] + cut.start for cut in groups(width, every)]
    columns = np.sort(np.concatenate(ahead, axis=1), axis=1)
    values = np.take_along_axis(d, columns, 1)
    energy, held = ((a.astype(np.float64) ** 2).sum(axis=1, keepdims=True) for a in (d, values))
    return columns, values * np.divide(energy, held, out=np.ones_like(held), where=held > 0).astype(np.float32)


def plain(codec, d: np.ndarray, key: int) -> np.ndarray:
    """D fp32 [out, in] that the codec stands for; not finite where it cannot."""
    config, out = codec.config, np.zeros_like(d)
    first = codec.first if isinstance(codec, ChainCodec) else codec
    if config["codec"] == "chain" and first.config["codec"] not in ("drop", "top", "n:m"):
        begun = plain(first, d, key)
        return begun + plain(codec.then, d - begun, (key + 1) % 2**64)
    if first.config["codec"] in ("drop", "top", "n:m"):
        columns, values = select(first, d, key)
        values = bf16(values) if first is codec else plain(codec.then, values, (key + 1) % 2**64)
        np.put_along_axis(out, columns, values, 1)
    elif config["codec"] == "int":
        out = integers(d, config["bits"], config["group_size"], key)
    elif config["codec"] == "ternary":
        out = ternary(d, config["density"], key)
    elif config["codec"] == "sparse":
        count = math.ceil(len(d) * (1 - config["rate"]) * d.shape[1])
        places = read_delta(config, {"values": np.arange(1, count + 1, dtype=np.float32)}, d.shape, key) > 0
        out[places] = bf16(d[places] * np.float32(1 / (1 - config["rate"])))
    return out


def is_plain(codec) -> bool:
    """All but rank, whose singular vectors are no function of bits alone."""
    return (
        is_plain(codec.first) and is_plain(codec.then)
        if isinstance(codec, ChainCodec)
        else not isinstance(codec, RankCodec)
    )


# --- the codec contract ---


@pytest.mark.parametrize("term", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_codec_gives(term: str, dtype: str) -> None:
    """round(base + D) with D as plain numpy has it, to the bit, with the mean and with an expert as the base."""
    for name, experts in cases(dtype).items():
        for size in (1, 4, 1000) if term == "int4" else (4,):
            codec = parse_codec(term, size)
            for bits in (base.mean(list(experts), dtype), experts[0]):
                for number, expert in enumerate(experts):
                    parts = codec.encode_expert(expert, bits, dtype, KEY - number, 0)
                    found = codec.decode_expert(parts, bits, dtype, KEY - number, 0)
                    before = widen(bits, dtype)
                    d = widen(expert, dtype) - before
                    if is_plain(codec):
                        expected = narrow(before + plain(codec, d, KEY - number), dtype)
                        assert found.tobytes() == expected.tobytes(), (name, number, size)
                    else:
                        assert np.isfinite(widen(found, dtype)).all(), (name, number)
                    if not d.any() or term == "none":
                        assert (widen(found, dtype) == before).all(), (name, number)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_at_the_edge(dtype: str) -> None:
    """As near as the full decomposition, but for a tenth, the two factors' bf16 and the dtype's own step."""
    for name, experts in cases(dtype).items():
        bits = experts[0]
        before = widen(bits, dtype).astype(np.float64)
        for expert in experts[1:]:
            d = widen(expert, dtype) - before
            for rank in (1, 2, 999):
                codec = parse_codec(f"rank{rank}", 4)
                found = codec.decode_expert(codec.encode_expert(expert, bits, dtype, KEY, 0), bits, dtype, KEY, 0)
                left_out = np.linalg.svd(d)[1][rank:]
                error = np.linalg.norm(widen(found, dtype) - before - d)
                step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-23}[dtype] * np.linalg.norm(abs(before) + abs(d))
                least = 2 * DTYPES[dtype][0] * d.size + 2.0**-100
                assert error <= 1.1 * np.linalg.norm(left_out) + 2.0**-6 * np.linalg.norm(d) + step + least, (
                    name,
                    rank,
                )


@pytest.mark.parametrize("term", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_passes_the_range_is_never_taken_for_a_number(term: str, dtype: str) -> None:
    """Refused, or not finite where plain numpy has it so, which the walk refuses; and right in all other places."""
    codec = parse_codec(term, 4)
    for name, experts in beyond(dtype).items():
        for expert, bits in ((experts[1], experts[0]), (experts[0], base.mean(list(experts), dtype))):
            before = widen(bits, dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                d = widen(expert, dtype) - before
                expected = narrow(before + plain(codec, d, KEY), dtype) if is_plain(codec) else None
            try:
                found = codec.decode_expert(codec.encode_expert(expert, bits, dtype, KEY, 0), bits, dtype, KEY, 0)
            except NonFiniteError as error:
                if np.isfinite(d[error.row, error.column]):  # what comes of it is not: a row's scale, a factor, a gain
                    assert (
                        expected is None
                        or "ternary" in term
                        or not np.isfinite(widen(expected, dtype)[error.row]).all()
                    )
                continue
            assert np.isfinite(d).all(), name
            if expected is not None:
                good = np.isfinite(widen(expected, dtype))
                assert (np.isfinite(widen(found, dtype)) == good).all() and (found == expected)[good].all(), name


@pytest.mark.parametrize("width", [1, 2, 3, 63, 64, 65])
def test_how_many_are_kept(width: int) -> None:
    """At least one of a row, all of it at most; n of a block shorter than m, or all that there are."""
    kept = {
        term: parse_codec(term, 1).kept(width) for term in ("drop0.999", "drop0", "top0.001", "top1", "3:64", "1:2")
    }
    assert kept["drop0.999"] == kept["top0.001"] == 1 and kept["drop0"] == kept["top1"] == width
    assert kept["3:64"] == min(3, width) + (width == 65) and kept["1:2"] == -(-width // 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_keeps_every_pattern(dtype: str) -> None:
    """All 65536 of 16 bits, or as many of F32 with every exponent, each against a base of any other."""
    random, kind = np.random.default_rng(3), np.uint32 if dtype == "F32" else np.uint16
    expert = np.arange(65536, dtype=kind).reshape(64, 1024)
    expert = expert << 16 | expert if dtype == "F32" else expert
    codec = parse_codec("exact", 4)
    for bits in (expert, random.permutation(expert.reshape(-1)).reshape(expert.shape), np.full_like(expert, 1 << 15)):
        parts = codec.encode_expert(expert, bits, dtype, KEY, 0)
        assert codec.decode_expert(parts, bits, dtype, KEY, 0).tobytes() == expert.tobytes()


# --- the whole command ---


def strict(text: str) -> dict:
    """JSON as other languages read it: NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def quiet(ran: Ran) -> bool:
    """Only lines of ders on stderr."""
    return all(line.startswith("ders: ") for line in ran.err.splitlines())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer for each case and dtype."""
    layers = [(dtype, experts) for dtype in DTYPES for experts in cases(dtype).values()]
    tensors = {}
    for number, (dtype, experts) in enumerate(layers):
        tensors |= handmade.layer(number, dtype, experts)
    return handmade.save(tmp_path_factory.mktemp("edges") / "source", tensors)


@pytest.mark.parametrize("term", COMMAND)
def test_there_and_back(source: Path, tmp_path: Path, term: str) -> None:
    """Compressed, verified, restored: the independent reader's bits, with exact the original's; the errors noted are the true ones."""
    packed, restored = tmp_path / "packed", tmp_path / "restored"
    flags = ("--delta", term, "--group-size", 4, "-j", 2, "-q")
    assert quiet(done("compress", source, *flags, "-o", packed))
    assert quiet(done("verify", packed, "-q"))
    assert quiet(done("verify", packed, "--against", source, "-q"))
    assert quiet(done("restore", packed, "-o", restored, "-q"))
    if term == "exact":
        assert contents(restored) == contents(source)
    came, back = (handmade.read_file(folder / "model.safetensors") for folder in (source, restored))
    noted, stored = strict((packed / "ders.json").read_text()), read_tensors(packed)
    expected = read_experts(packed)
    for group in noted["groups"]:
        for member in group["members"]:
            name, dtype = member["tensor"], group["dtype"]
            assert back[name][1].tobytes() == expected[group["name"], member["label"]].tobytes(), name
            numbers = (
                widen(bits, dtype).astype(np.float64)
                for bits in (came[name][1], back[name][1], stored[group["name"] + ".base"])
            )
            assert_errors(member["error"], *numbers, name)


def assert_errors(noted: dict[str, float | None], w: np.ndarray, c: np.ndarray, b: np.ndarray, name: str) -> None:
    """Of an expert w, what it comes back as, and the base, all fp64: to the six digits that are noted, null for what is infinite."""
    size = max(abs(w).max(), abs(c).max(), abs(b).max()) or 1.0  # so that no square leaves fp64's range
    w, c, b = w / size, c / size, b / size
    (d, kept), norm = (w - b, c - b), np.linalg.norm
    error, near = norm(c - w), partial(pytest.approx, rel=2e-5, abs=0)
    expected = {
        "max_abs": near(abs(c - w).max() * size),
        "weight": near(error / norm(w)) if w.any() else None if error else 0,
        "delta": near(error / norm(d)) if d.any() else None if error else 0,
        "cosine": pytest.approx((w * c).sum() / norm(w) / norm(c), abs=1e-5) if w.any() and c.any() else 1,
        "kept": pytest.approx((d * kept).sum() / norm(d) ** 2, rel=1e-4, abs=1e-5) if d.any() else 1,
    }
    assert noted == expected, name


SPECIAL = {
    "BF16": {"nan": (0x7F81, 0xFFC0, 0x7FFF), "inf": (0x7F80,), "-inf": (0xFF80,)},
    "F16": {"nan": (0x7C01, 0xFE00, 0x7FFF), "inf": (0x7C00,), "-inf": (0xFC00,)},
    "F32": {"nan": (0x7F800001, 0xFFC00000, 0x7FFFFFFF), "inf": (0x7F800000,), "-inf": (0xFF800000,)},
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_named_or_kept(tmp_path: Path, dtype: str) -> None:
    """A lossy codec refuses it with one line that says where it stands, the first in order if there are more; exact keeps its bits."""
    good = cases(dtype)["alike"]
    for number, (said, bits) in enumerate(
        (said, bits) for said, all_bits in SPECIAL[dtype].items() for bits in all_bits
    ):
        experts = good.copy()
        experts[1, 4, 3] = experts[2, 5, 0] = bits
        tensors = handmade.layer(0, dtype, good) | handmade.layer(1, dtype, experts)
        source, out = handmade.save(tmp_path / f"source{number}", tensors), tmp_path / f"out{number}"
        for term in COMMAND[1 + number :: 5]:
            for name in ("mean", "expert:0") if term == "int4" else ("mean",):
                ran = ders("compress", source, "--delta", term, "--base", name, "-o", out, "-q", "-j", 3, "--overwrite")
                where = f"{said} at [4, 3] of expert 1's gate matrix [7, 5]"
                line = f"ders: model.layers.1.mlp.experts.1.gate_proj.weight: {where}; only --delta exact keeps such values\n"
                assert (ran.code, ran.err) == (4, line), (term, ran.err)
                assert not out.exists()
        found = ders("verify", source)
        assert found.code == 3 and f"{said} at [4, 3]" in found.out and quiet(found)
        done("compress", source, "--delta", "exact", "-o", out, "-q", "--overwrite")
        done("verify", out, "--against", source, "-q")
        done("restore", out, "-o", tmp_path / f"restored{number}", "-q")
        assert contents(tmp_path / f"restored{number}") == contents(source)


@pytest.mark.parametrize("term", COMMAND + ["drop0.5+top0.5+int4"])
def test_what_passes_the_range_is_refused(tmp_path: Path, term: str) -> None:
    """Done and true, or refused in one line that says whose numbers they are and what to do; never half."""
    for dtype in DTYPES:
        for number, experts in enumerate(beyond(dtype)[name] for name in ("opposite", "one huge expert")):
            source = handmade.save(tmp_path / f"{dtype}{number}", handmade.layer(0, dtype, experts))
            out = tmp_path / f"{dtype}{number}-out"
            ran = ders("compress", source, "--delta", term, "--group-size", 4, "-o", out, "-q")
            assert quiet(ran)
            if ran.code:
                assert ran.code == 4 and ran.err.count("\n") == 1, ran.err
                assert ran.err.startswith("ders: model.layers.0.mlp.experts.") and "exact\n" in ran.err, ran.err
                assert term != "exact" and not out.exists()
            else:
                assert quiet(done("verify", out, "--against", source, "-q"))
                strict((out / "ders.json").read_text())
                assert all(np.isfinite(widen(bits, dtype)).all() for bits in read_experts(out).values())


def test_an_expert_of_zeros(tmp_path: Path) -> None:
    """As pruning leaves one: its relative error is no number, and the checkpoint is whole all the same."""
    experts = cases("BF16")["alike"]
    experts[0] = 0
    source = handmade.save(tmp_path / "source", handmade.layer(0, "BF16", experts))
    for base_of in ("mean", "expert:1"):
        out = tmp_path / base_of.replace(":", "")
        done("compress", source, "--delta", "int4", "--base", base_of, "-o", out, "-q")
        noted = strict((out / "ders.json").read_text())["groups"][0]["members"]
        assert [member["error"]["weight"] is None for member in noted] == [True, False, False]
        strict(done("verify", out, "--against", source, "--json").out)
        done("restore", out, "-o", tmp_path / f"{out.name}-restored", "-q")
