"""Loops of exact and rank beside plain definitions, bit for bit; where numba keeps what it compiled."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ders_kernels import exact_format, numba_cache
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats, lowrank, rans

from ders_cli.codecs.base import DeltaCodec
from ders_cli.codecs.rank import RankCodec

SIZES = [1, 7, 8, 9, 61, 1023, 1024, 1025, 5000]
BF16, F16, F32 = (np.uint16, 7), (np.uint16, 10), (np.uint32, 23)
DTYPES = pytest.mark.parametrize(("dtype", "shift"), [BF16, F16, F32], ids=["bf16", "f16", "f32"])


def bits(n, dtype, shift, seed=0):
    """(tokens [n] below 40, most of them small, base [n]): exponents of all kinds, zeros, infinities and NaN."""
    draw = np.random.default_rng(1000 * seed + n)
    base = draw.integers(0, 1 << 8 * np.dtype(dtype).itemsize, n, dtype=dtype)
    base[::3] = 0
    base[1::5] = np.iinfo(dtype).max
    tokens = np.minimum(draw.geometric(0.3, n) - 1, 39).astype(np.uint8)
    return tokens, base


def symbols_of(tokens, base, shift):
    exponents = 1 << (8 * base.dtype.itemsize - 1 - shift)
    return (base.astype(np.int64) >> shift) % exponents * 256 + tokens, exponents


@pytest.mark.parametrize("n", SIZES)
@DTYPES
def test_symbols_and_their_counts(n, dtype, shift):
    tokens, base = bits(n, dtype, shift)
    expected, exponents = symbols_of(tokens, base, shift)
    symbols, counts = np.full(n, 0xABCD, np.uint16), np.zeros((2, exponents * 256), np.uint32)
    rans.count_symbols(tokens, base, shift, symbols, counts)
    assert symbols.tolist() == expected.tolist()
    assert counts.sum(axis=0).tolist() == np.bincount(expected, minlength=exponents * 256).tolist()


def coder(n, dtype, shift):
    """A model of one to three contexts -> (tokens, base, symbols, frequencies [K, 256], the context of each exponent)."""
    tokens, base = bits(n, dtype, shift)
    symbols, exponents = symbols_of(tokens, base, shift)
    context = np.minimum(np.arange(exponents) * 3 // exponents, 2).astype(np.uint32)
    counts = np.zeros((3, 256), np.int64)
    np.add.at(counts, (context[symbols // 256], tokens), 1)
    counts[:, 0] += 1  # a context without a weight
    return tokens, base, symbols, exact_format._frequencies(counts), context


def plain_coder(symbols, frequency, context):
    """(words, states): rANS in Python's integers, as the head of rans.py tells."""
    start = np.cumsum(frequency, axis=1) - frequency
    words, x = [], [rans.LOWEST_STATE] * 8
    for i in range(symbols.size - 1, -1, -1):
        at = context[symbols[i] // 256], symbols[i] % 256
        f, s, state = int(frequency[at]), int(start[at]), x[i % 8]
        if state >= f << 20:
            words.append(state % 65536)
            state //= 65536
        x[i % 8] = state // f * 4096 + state % f + s
    return words[::-1], x


@pytest.mark.parametrize("n", SIZES)
@DTYPES
def test_coder_is_integer_rans(n, dtype, shift):
    tokens, base, symbols, frequency, context = coder(n, dtype, shift)
    there = np.unique(symbols // 256)
    code, inverse = exact_format._coding_tables(frequency, there, context)
    words, states = np.full(n + 8, 7, np.uint16), np.zeros(8, np.uint32)
    begin = rans.encode_symbols(symbols.astype(np.uint16), code, inverse, words, states)
    expected, expected_states = plain_coder(symbols, frequency, context)
    assert words[begin:].tolist() == expected
    assert states.tolist() == expected_states

    owner, code = np.empty(3 * 4096, np.uint8), np.empty(3 * 256, np.uint32)
    rans.fill_slots(frequency, owner, code)
    spared, found = np.concatenate([words[begin:], np.full(8, 9, np.uint16)]), np.full(n, 255, np.uint8)
    used = rans.decode_tokens(spared, states, owner, code, context * np.uint32(256), base, shift, found)
    assert used == len(expected)
    assert found.tolist() == tokens.tolist()
    assert states.tolist() == [rans.LOWEST_STATE] * 8


def test_quotients_are_exact():
    """Every frequency at states where a quotient turns: below, at and above its multiples, up to the largest state."""
    f = np.arange(1, 4097)[:, None]
    draw = np.random.default_rng(0)
    quotients = np.concatenate([np.arange(16), draw.integers(16, 1 << 20, 500), (1 << 20) - 1 - np.arange(16)])
    for off in (-1, 0, 1):
        state = np.clip(f * quotients + off, 0, (f << 20) - 1)
        assert ((state * ((1 + 2.0**-50) / f)).astype(np.int64) == state // f).all()


@pytest.mark.parametrize("damage", [1, 3, 100])
def test_too_few_words_are_noticed(damage):
    tokens, base, symbols, frequency, context = coder(5000, *BF16)
    code, inverse = exact_format._coding_tables(frequency, np.unique(symbols // 256), context)
    words, states = np.empty(5008, np.uint16), np.empty(8, np.uint32)
    begin = rans.encode_symbols(symbols.astype(np.uint16), code, inverse, words, states)
    cut = words[begin : words.size - damage]
    owner, code = np.empty(3 * 4096, np.uint8), np.empty(3 * 256, np.uint32)
    rans.fill_slots(frequency, owner, code)
    spared = np.append(cut, np.zeros(8, np.uint16))
    used = rans.decode_tokens(spared, states, owner, code, context * np.uint32(256), base, 7, tokens)
    assert used < 0 or used != cut.size or (states != rans.LOWEST_STATE).any()


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("mode", [exact_format.DIFFERENCE, exact_format.NO_BASE])
@DTYPES
def test_raw_bits_there_and_back(n, share, mode, dtype, shift):
    """Few and many tokens with raw bits, in every place of their eight; all of them where there is no base."""
    draw, width = np.random.default_rng(n), 8 * np.dtype(dtype).itemsize
    first_value, raw_bits, _ = exact_format._token_values(mode, width, shift)
    values = draw.integers(0, 16, n, dtype=dtype)
    large = draw.random(n) < share
    values[large] = draw.integers(16, 1 << width, n, dtype=dtype)[large]
    values[-1] = np.iinfo(dtype).max
    tokens = np.empty(n, np.uint8)
    if mode == exact_format.DIFFERENCE:
        rans.tokenise(values, tokens)
    else:
        tokens[:] = values >> (shift + 1)
    packed = np.full(int(raw_bits[tokens].sum()) // 32 + 1, 0xFFFFFFFF, np.uint32)
    used = rans.pack_raw_bits(values, tokens, exact_format._direct(mode), raw_bits, packed)
    one_by_one = [(int(v) >> b) & 1 for v, t in zip(values, tokens, strict=True) for b in range(raw_bits[t])]
    assert used == len(one_by_one)
    whole = sum(int(word) << 32 * i for i, word in enumerate(packed))
    assert whole == sum(bit << i for i, bit in enumerate(one_by_one))

    _, base = bits(n, dtype, shift, seed=1)
    words = np.append(packed, np.zeros(rans.BLOCK + 2, np.uint32)).astype(np.int64)
    expert, direct = np.full(n, 0x5A5A, dtype), exact_format._direct(mode)
    pairs = words[:-1] | words[1:] << 32
    assert rans.expand(tokens, direct, first_value, raw_bits, pairs, base, width - 1, expert) == used
    back = np.empty(n, dtype)
    rans.zigzag_difference(expert, base, width - 1, back)
    assert back.tolist() == values.tolist()


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 16, 61])
@pytest.mark.parametrize("shape", [(1, 1), (1, 61), (61, 1), (17, 1025), (33, 2049)])
def test_products_are_summed_in_order(shape, rank):
    """With infinities, NaN, subnormals and both zeros; what stood in `out` counts."""
    draw = np.random.default_rng(rank)
    left, right = (draw.standard_normal(s, np.float32) for s in ((shape[0], rank), (rank, shape[1])))
    left *= np.float32(10) ** draw.integers(-30, 20, left.shape).astype(np.float32)
    left[::7], right[:, ::11], right[:, 5::60] = 0, -0.0, np.float32(1e-44)
    left[3::16, -1], right[0, 7::50] = np.inf, np.nan
    out = draw.standard_normal(shape, np.float32)
    out[0, 0] = -0.0
    expected = out.copy()
    with np.errstate(all="ignore"):
        for t in range(rank):
            expected += left[:, t : t + 1] * right[t]
    lowrank.add_products(left, right, out)
    same = (out.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(out) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(1, 61), (61, 1), (300, 700), (5, 140000)])
def test_rank_decodes_by_steps_as_the_whole(shape, dtype):
    draw = np.random.default_rng(0)
    codec = RankCodec(5)
    base = floats.narrow(draw.standard_normal(shape, np.float32), dtype)
    parts = codec.encode(draw.standard_normal(shape, np.float32), make_key(1, "a", "0"), 0)
    expected = DeltaCodec.decode_expert(codec, parts, base, dtype, 0, 0)
    found = codec.decode_expert(parts, base, dtype, 0, 0)
    assert found.dtype == base.dtype
    assert found.tolist() == expected.tolist()
    some = slice(shape[0] // 3, shape[0])
    partly = codec.decode_expert(parts | {"left": parts["left"][some]}, base[some], dtype, 0, some.start)
    assert partly.tolist() == expected[some].tolist()


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.py").write_text("a = 1\n")
    (folder / "deep" / "b.py").write_text("b = 1\n")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ders"


def test_sources_name_the_directory(sources, cache):
    first = numba_cache.own_directory(sources)
    assert first.parent == cache
    assert numba_cache.NAME.fullmatch(first.name)
    assert numba_cache.own_directory(sources) == first
    assert first.stat().st_mode & 0o777 == cache.stat().st_mode & 0o777 == 0o700
    (sources / "deep" / "b.py").write_text("b = 2\n")
    second = numba_cache.own_directory(sources)
    (sources / "deep" / "b.py").rename(sources / "deep" / "c.py")
    assert len({first, second, numba_cache.own_directory(sources)}) == 3


@pytest.mark.parametrize("which", ["ders", "numba"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_where_others_write_is_refused(which, mode, sources, cache):
    folder = numba_cache.own_directory(sources)
    (cache if which == "ders" else folder).chmod(mode)
    assert numba_cache.own_directory(sources) is None
    (cache if which == "ders" else folder).chmod(0o700)
    assert numba_cache.own_directory(sources) == folder


def test_what_others_own_is_refused(sources, cache, monkeypatch):
    folder, own = numba_cache.own_directory(sources), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert numba_cache.own_directory(sources) is None
    monkeypatch.setattr(os, "geteuid", lambda: own)
    for foreign in (cache.stat().st_ino, folder.stat().st_ino):
        with monkeypatch.context() as patch:
            patch.setattr(numba_cache, "_is_own", lambda found, foreign=foreign: found.st_ino != foreign)
            assert numba_cache.own_directory(sources) is None
    folder.rename(folder.parent / "other")
    folder.symlink_to(folder.parent / "other")
    assert numba_cache.own_directory(sources) is None


def test_without_a_place_to_write(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert numba_cache.own_directory(sources) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    monkeypatch.setenv("HOME", str(tmp_path))
    assert numba_cache.own_directory(sources).parent == tmp_path / ".cache" / "ders"
    monkeypatch.setenv("HOME", "also/relative")
    assert numba_cache.own_directory(sources) is None


def test_only_old_directories_of_ours_go(sources, cache):
    cache.mkdir(parents=True, mode=0o700)
    now = time.time()
    names = [f"numba-{i:012x}" for i in range(6)]
    for i, name in enumerate([*names, "numba-else", "models"]):
        (cache / name).mkdir()
        (cache / name / "file").write_text("")
        os.utime(cache / name, (0, now - 10 * 24 * 3600 - i))
    (cache / "numba-00000000000f").symlink_to(cache / "models")
    os.utime(cache / names[5])  # used today
    folder = numba_cache.own_directory(sources)
    left = {path.name for path in cache.iterdir()}
    assert left == {folder.name, names[5], names[0], names[1], "numba-else", "models", "numba-00000000000f"}
    for name in ("numba-a00000000000", "numba-b00000000000", "numba-c00000000000"):
        (cache / name).mkdir()
    numba_cache.own_directory(sources)
    there = {path.name for path in cache.iterdir() if not path.is_symlink()} - {"numba-else", "models", folder.name}
    assert there == {"numba-a00000000000", "numba-b00000000000", "numba-c00000000000", names[5]}  # used today: not old


def run(code, **environment):
    """What a process that imports the kernels prints."""
    kept = {k: v for k, v in os.environ.items() if k not in (numba_cache.VARIABLE, numba_cache.OURS)}
    paths = os.pathsep.join(str(Path(__file__).parent.parent / part) for part in (".", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | {"PYTHONPATH": paths} | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


USE = """
import numpy as np
from ders_kernels.cpu_ops import lowrank
import numba, os
out = np.zeros((2, 3), np.float32)
lowrank.add_products(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), out)
assert (out == 1).all()
from pathlib import Path
print(numba.config.CACHE_DIR, len(list(Path(numba.config.CACHE_DIR).rglob("lowrank*.nbc"))))
print(*lowrank.add_products.stats.cache_hits.values())
"""


@pytest.mark.parametrize("before", ["", "import numba\n", "import ders_cli.codecs\n"])
def test_numba_keeps_it_there(before, tmp_path):
    folder, count, *_ = run(before + USE, XDG_CACHE_HOME=str(tmp_path))
    assert Path(folder).parent == tmp_path / "ders"
    assert count == "1"
    assert run(before + USE, XDG_CACHE_HOME=str(tmp_path)) == [folder, "1", "1"]  # found again


def test_a_users_choice_stays(tmp_path):
    mine = str(tmp_path / "mine")
    assert run(USE, NUMBA_CACHE_DIR=mine, XDG_CACHE_HOME=str(tmp_path))[0] == mine
    set_later = f"import numba\nnumba.config.CACHE_DIR = {mine!r}\n"
    assert run(set_later + USE, XDG_CACHE_HOME=str(tmp_path))[0] == mine
    # what a parent process chose is no user's choice
    ours = run(USE, NUMBA_CACHE_DIR=mine, DERS_NUMBA_CACHE=mine, XDG_CACHE_HOME=str(tmp_path))
    assert Path(ours[0]).parent == tmp_path / "ders"


def test_a_private_directory_goes_with_its_process(tmp_path):
    (tmp_path / "file").write_text("")
    fork = "import os, sys\nif (child := os.fork()) == 0:\n    sys.exit()\nos.waitpid(child, 0)\n"
    still = "print(os.path.isdir(numba.config.CACHE_DIR), oct(os.stat(numba.config.CACHE_DIR).st_mode & 0o777))\n"
    places = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    folder, count, there, mode = run(USE + fork + still, **places)
    assert (count, there, mode) == ("1", "True", "0o700")
    assert Path(folder).parent == tmp_path
    assert not Path(folder).exists()


def test_two_processes_compile_at_once(tmp_path):
    paths = os.pathsep.join(str(Path(__file__).parent.parent / part) for part in (".", "kernels"))
    kept = {k: v for k, v in os.environ.items() if k not in (numba_cache.VARIABLE, numba_cache.OURS)}
    environment = kept | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", USE], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert run(USE, XDG_CACHE_HOME=str(tmp_path))[2] == "1"
