"""Planted faults: each is found, named and answered by the right exit code; no clean checkpoint fails.

Exit 4: the checkpoint's own structure is broken. Exit 3: verify found a difference.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy
from command import ders, done

DELTAS = {  # a codec for every kind of part
    "exact": "exact",
    "int4": "int4",
    "drop": "drop0.5",
    "top": "top0.1",
    "bitmap": "2:4",
    "ternary": "ternary0.1",
    "rank": "rank2",
    "chain": "drop0.5+int4",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("faults")
    toy.make("mixtral", root / "source", dtype=torch.bfloat16, hidden_size=40, intermediate_size=40)
    for name, delta in DELTAS.items():
        done("compress", root / "source", "--delta", delta, "-o", root / name, "-q")
    return {path.name: path for path in root.iterdir()}


def _copy(folders: dict[str, Path], name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[name], tmp_path / "broken"))


def _header(file: Path) -> tuple[int, dict]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return 8 + length, json.loads(data[8 : 8 + length])


def _flip(file: Path, at: int, bit: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.write_bytes(data)


def _kinds(folder: Path) -> dict[str, str]:
    """One tensor of each kind that the folder has."""
    _, entries = _header(folder / "model.safetensors")
    kinds = {}
    for name in entries:
        kind = name.split(".delta.")[1] if ".delta." in name else "base" if name.endswith(".base") else "copied"
        kinds.setdefault("guard" if name.endswith("gate_up_proj") else kind, name)
    return kinds


def test_clean_passes(folders: dict[str, Path]) -> None:
    for name in DELTAS:
        done("verify", folders[name], "-q")
        done("verify", folders[name], "--against", folders["source"], "-q")
    done("verify", folders["source"], "-q")
    done("verify", folders["source"], folders["source"], "-q")


@pytest.mark.parametrize("name", DELTAS)
def test_one_flipped_bit_in_every_kind_of_part(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    kinds = _kinds(folders[name])
    assert len(kinds) >= 4, kinds
    for kind, tensor in kinds.items():
        broken = Path(shutil.copytree(folders[name], tmp_path / kind.replace(".", "-")))
        start, entries = _header(broken / "model.safetensors")
        begin, end = entries[tensor]["data_offsets"]
        experts = 1 if kind in ("copied", "guard", "base", "stream") else 3
        middle, hit = (
            (end - begin) // 2,
            f"expert {(end - begin) // 2 // ((end - begin) // 3)}: " if experts == 3 else "",
        )
        _flip(broken / "model.safetensors", start + begin + middle)
        ran = ders("verify", broken)
        assert ran.code == 3 and f"{tensor}: {hit}damaged" in ran.out, (kind, ran)
        if kind == "guard":
            continue
        _flip(broken / "model.safetensors", start + begin + middle)
        if entries[tensor]["dtype"] == "BF16":  # a sign, not a bit that rounds away
            _flip(broken / "model.safetensors", start + begin + (middle | 1), 0x80)
        else:
            _flip(broken / "model.safetensors", start + begin + middle)
        ran = ders("verify", broken)
        assert kind == "copied" or f"{tensor.removesuffix('.base').split('.delta.')[0]}, expert " in ran.out, (
            kind,
            ran,
        )
        restored = ders("restore", broken, "-o", tmp_path / "plain" / kind)
        assert restored.code == 4 and not (tmp_path / "plain" / kind).exists(), (kind, restored)


def test_a_damaged_checkpoint_is_not_converted(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its hashes would be made anew, and the damage would look well."""
    for kind, tensor in _kinds(folders["exact"]).items():
        broken = Path(shutil.copytree(folders["exact"], tmp_path / f"broken-{kind}"))
        done("quantize", broken, "--bits", 4, "-o", tmp_path / f"well-{kind}", "-q")
        start, entries = _header(broken / "model.safetensors")
        begin, end = entries[tensor]["data_offsets"]
        _flip(broken / "model.safetensors", start + (begin + end) // 2)
        ran = ders("quantize", broken, "--bits", 4, "-o", tmp_path / kind, "-q")
        if kind == "guard":  # it is written anew
            assert ran.code == 0
            continue
        assert ran.code == 4 and not (tmp_path / kind).exists(), (kind, ran)
        assert (tensor if kind == "copied" else tensor.removesuffix(".base").split(".delta.")[0]) in ran.err, (
            kind,
            ran,
        )


def test_flipped_bits_in_ders_json(folders: dict[str, Path], tmp_path: Path) -> None:
    """Any bit: broken JSON, another checksum, or padding."""
    text = (folders["int4"] / "ders.json").read_bytes()
    used = len(text.rstrip())
    broken = _copy(folders, "int4", tmp_path)
    for at in range(3, used, used // 40):
        _flip(broken / "ders.json", at)
        ran = ders("verify", broken)
        assert ran.code == 4 and "ders.json" in ran.err, (at, ran)
        _flip(broken / "ders.json", at)
    done("verify", broken, "-q")


def test_changed_small_files(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "int4", tmp_path)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    ran = ders("verify", broken)
    assert ran.code == 3 and "config.json: changed" in ran.out


def test_truncated_shard(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "int4", tmp_path)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    ran = ders("verify", broken)
    assert ran.code == 4 and "model.safetensors" in ran.err and "complete" in ran.err


def test_missing_shard_and_false_index(folders: dict[str, Path], tmp_path: Path) -> None:
    source = _copy(folders, "source", tmp_path)
    toy.reshard(source, 2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if ".experts.1.w2" in n)
    index["weight_map"][name] = "model-00009-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = ders("verify", source)
    assert ran.code == 4 and "model-00009-of-00002.safetensors: missing" in ran.err
    for command in (["compress", source], ["verify", folders["int4"], "--against", source]):
        assert ders(*command).code == 4


def _experts(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = toy.load_file(folder / "model.safetensors")
    change(tensors)
    toy.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
GROUP = "model.layers.1.mlp.experts.{}_proj"


def _swap(t: dict[str, torch.Tensor]) -> None:
    a, b = EXPERT.format(1, "w1"), EXPERT.format(2, "w1")
    t[a], t[b] = t[b], t[a]


def _transpose(t: dict[str, torch.Tensor]) -> None:
    t[EXPERT.format(1, "w3")] = t[EXPERT.format(1, "w3")].T.clone()


def _zero(t: dict[str, torch.Tensor]) -> None:
    t[EXPERT.format(0, "w2")].zero_()


def _nan(t: dict[str, torch.Tensor]) -> None:
    t[EXPERT.format(2, "w2")][3, 5] = float("nan")


def _nudge(t: dict[str, torch.Tensor]) -> None:
    t[EXPERT.format(2, "w1")].view(torch.int16)[7, 9] ^= 1


def _router(t: dict[str, torch.Tensor]) -> None:
    t["model.layers.0.block_sparse_moe.gate.weight"][0, 0] += 1


FAULTS = {
    "swapped": (
        _swap,
        [
            (GROUP.format("gate"), "1", "holds the reference's expert 2"),
            (GROUP.format("gate"), "2", "holds the reference's expert 1"),
        ],
    ),
    "transposed": (_transpose, [(GROUP.format("up"), "1", "is transposed")]),
    "zeroed": (_zero, [(GROUP.format("down"), "0", "is all zeros")]),
    "nan": (_nan, [(GROUP.format("down"), "2", "NaN or infinity at [3, 5]")]),
    "one bit": (_nudge, [(GROUP.format("gate"), "2", "differs")]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_plain_against_plain(folders: dict[str, Path], tmp_path: Path, fault: str) -> None:
    broken = _copy(folders, "source", tmp_path)
    change, expected = FAULTS[fault]
    _experts(broken, change)
    ran = ders("verify", broken, folders["source"], "--json")
    assert ran.code == 3
    found = {(f["where"], f["problem"]) for f in ran.json["findings"]}
    assert len(found) == len(expected)
    for group, label, said in expected:
        assert any(where == f"{group}, expert {label}" and said in problem for where, problem in found), found


@pytest.mark.parametrize("fault", FAULTS)
def test_conversion_of_a_broken_model_against_the_original(
    folders: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """What was lost before or during a conversion shows against the original, for exact and for lossy codecs."""
    broken = _copy(folders, "source", tmp_path)
    change, expected = FAULTS[fault]
    _experts(broken, change)
    for delta in ("exact", "int8"):
        ran = ders("compress", broken, "--delta", delta, "-o", tmp_path / delta, "-q")
        if fault == "nan" and delta != "exact":
            assert ran.code == 4 and EXPERT.format(2, "w2") in ran.err and "[3, 5]" in ran.err and "nan" in ran.err
            continue
        ran = ders("verify", tmp_path / delta, "--against", folders["source"], "--json")
        assert ran.code == 3
        wheres = {f["where"] for f in ran.json["findings"]}
        assert wheres == {f"{group}, expert {label}" for group, label, _ in expected}
        assert all("another expert than the reference's" in f["problem"] for f in ran.json["findings"])


def test_alone_a_plain_checkpoint_shows_nan_and_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "source", tmp_path)
    _experts(broken, lambda t: (_zero(t), _nan(t)))
    ran = ders("verify", broken)
    assert ran.code == 3
    assert f"{GROUP.format('down')}, expert 0: is all zeros" in ran.out
    assert f"{GROUP.format('down')}, expert 2: nan at [3, 5]" in ran.out


def test_missing_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "source", tmp_path)
    _experts(broken, lambda t: t.pop(EXPERT.format(1, "w3")))
    for command in (["verify", broken], ["verify", broken, folders["source"]], ["compress", broken]):
        ran = ders(*command)
        assert ran.code == 4 and EXPERT.format(1, "w3") in ran.err and "missing" in ran.err


def test_fewer_experts_than_the_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "source", tmp_path)
    _experts(broken, lambda t: [t.pop(name) for name in list(t) if ".experts.2." in name])
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_local_experts": 2}))
    ran = ders("verify", broken, folders["source"])
    assert ran.code == 3 and "expert 2: missing" in ran.out


def test_router_differs(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = _copy(folders, "source", tmp_path)
    _experts(broken, _router)
    ran = ders("verify", folders["int4"], "--against", broken)
    assert ran.code == 3 and "model.layers.0.mlp.gate.weight: differs" in ran.out


def test_wrong_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """A base from elsewhere: found alone by its hash; found against the original even where all hashes were made anew."""
    from ders_cli.checkpoint.manifest import manifest_text
    from ders_cli.source import DersSource

    for name in ("int4", "exact"):
        broken = Path(shutil.copytree(folders[name], tmp_path / name))
        start, entries = _header(broken / "model.safetensors")
        base = GROUP.format("gate") + ".base"
        data = bytearray((broken / "model.safetensors").read_bytes())
        begin, end = (start + n for n in entries[base]["data_offsets"])
        data[begin:end] = bytes((end - begin) // 2 * [0x80, 0x3C])
        (broken / "model.safetensors").write_bytes(data)
        ran = ders("verify", broken)
        assert ran.code == 3 and f"{base}: damaged" in ran.out and f"{GROUP.format('gate')}, expert 0" in ran.out
        with DersSource(broken) as source:
            manifest = source.manifest | {
                "tensors": {n: source.reader.hashes(n, len(h)) for n, h in source.manifest["tensors"].items()}
            }
        (broken / "ders.json").write_bytes(manifest_text(manifest))
        ran = ders("verify", broken, "--against", folders["source"])
        assert ran.code in (3, 4) and GROUP.format("gate") in ran.out + ran.err


def test_wrong_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    toy.make("mixtral", tmp_path / "other", dtype=torch.bfloat16, hidden_size=40, intermediate_size=40, seed=5)
    ran = ders("verify", folders["int4"], "--against", tmp_path / "other")
    assert ran.code == 3 and "another expert than the reference's" in ran.out


def test_bounds(folders: dict[str, Path]) -> None:
    source = folders["source"]
    assert (
        ders(
            "verify",
            folders["int4"],
            "--against",
            source,
            "--max-error",
            0.5,
            "--min-cosine",
            0.9,
            "--max-output-error",
            0.5,
        ).code
        == 0
    )
    for flag, value in (("--max-error", 1e-6), ("--max-output-error", 1e-6), ("--min-cosine", 1)):
        ran = ders("verify", folders["rank"], "--against", source, flag, value)
        assert ran.code == 3 and "bound" in ran.out


def test_output_error_by_hand(folders: dict[str, Path]) -> None:
    """The reported output error is that of the FFN computed with plain torch on the same hidden states."""
    from ders_cli.compare import random_states
    from ders_cli.source import open_source

    report = done("verify", folders["rank"], "--against", folders["source"], "--json").json
    x = torch.from_numpy(random_states(0, 1, 16, 40))
    with open_source(folders["rank"]) as tested, open_source(folders["source"]) as original:
        y = []
        for source in (tested, original):
            w = {
                g.projection: torch.from_numpy(source.read(g, 2, slice(0, 40)).view("int16"))
                .view(torch.bfloat16)
                .float()
                for g in source.groups
                if g.layer == 1
            }
            y.append((torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T)
    expected = ((y[0] - y[1]).norm() / y[1].norm()).item()
    found = next(e["output"] for e in report["experts"] if e["layer"] == 1 and e["expert"] == "2")
    assert found == pytest.approx(expected, rel=1e-4)  # fp32 sums in another order


def test_hidden_states(folders: dict[str, Path], tmp_path: Path) -> None:
    toy.save_file({"hidden_states": torch.randn(5, 40)}, tmp_path / "h.safetensors")
    real = done(
        "verify", folders["int4"], "--against", folders["source"], "--hidden", tmp_path / "h.safetensors", "--json"
    ).json
    assert all(0 < expert["output"] < 1 for expert in real["experts"])
    toy.save_file({"hidden_states": torch.randn(5, 41)}, tmp_path / "h.safetensors")
    ran = ders("verify", folders["int4"], "--against", folders["source"], "--hidden", tmp_path / "h.safetensors")
    assert ran.code == 2 and "expected width 40" in ran.err


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jamba", "lfm2_moe"])
def test_two_forms_of_one_model(tmp_path: Path, name: str) -> None:
    """Per-expert and fused 3-D files of the same MoE are equal; with one expert changed, it is named."""
    toy.make(name, tmp_path / "separate", dtype=torch.bfloat16)
    toy.make(name, tmp_path / "fused", fused=True, dtype=torch.bfloat16)
    ran = done("verify", tmp_path / "separate", tmp_path / "fused", "--json")
    assert all(expert["equal"] for expert in ran.json["experts"])
    tensors = toy.load_file(tmp_path / "fused" / "model.safetensors")
    fused = next(tensor for tensor in sorted(tensors) if tensor.endswith("experts.down_proj"))
    tensors[fused][1, 2, 3] += 1
    toy.save_file(tensors, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    ran = ders("verify", tmp_path / "fused", tmp_path / "separate", "--json")
    assert ran.code == 3
    assert [f["where"].split(", ")[1] for f in ran.json["findings"]] == ["expert 1"]
    assert fused in ran.json["findings"][0]["problem"]


def test_junit_and_json(folders: dict[str, Path], tmp_path: Path) -> None:
    from xml.etree import ElementTree

    broken = _copy(folders, "source", tmp_path)
    _experts(broken, _swap)
    assert ders("verify", broken, folders["source"], "--junit", tmp_path / "v.xml").code == 3
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert int(suite.get("failures")) == 2 == len(suite.findall("testcase/failure"))
    assert int(suite.get("tests")) == len(suite.findall("testcase"))
    (broken / "model.safetensors").write_bytes(b"short")
    assert ders("verify", broken, "--junit", tmp_path / "v.xml").code == 4
    assert ElementTree.parse(tmp_path / "v.xml").getroot().find("testcase/error") is not None
