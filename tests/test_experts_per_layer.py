"""--experts-per-layer: layers with different numbers of experts, loaded by the plug-in, never by stock classes."""

import json

import pytest
import torch
from command import ders, done
from test_upcycle import DENSE, logits, make_dense
from transformers import AutoModelForCausalLM

import ders_cli.hf  # noqa: F401
from ders_cli.blueprint import Upcycling
from ders_cli.errors import UsageError


@pytest.mark.parametrize(
    ("parts", "layers", "expected"),
    [
        ((2, 4, 6, 8), 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ((2, 4, 6, 8), 30, [2] * 7 + [4] * 7 + [6] * 8 + [8] * 8),
        ((3, 1), 3, [3, 1, 1]),
        ((), 3, [5, 5, 5]),
    ],
)
def test_parts_of_the_depth(parts, layers, expected):
    assert Upcycling(5, 1, per_layer=parts).totals(layers) == expected


def test_molas_total():
    """MoLA's 8 x 2, 8 x 4, 8 x 6, 8 x 8 experts in 32 layers: 160, as many as 5 in each."""
    assert sum(Upcycling(8, 2, per_layer=(2, 4, 6, 8)).totals(32)) == 160
    with pytest.raises(UsageError, match="4 numbers for 3 layers"):
        Upcycling(8, 2, per_layer=(2, 4, 6, 8)).totals(3)


@pytest.mark.parametrize("name", sorted(DENSE))
@pytest.mark.parametrize("options", [("--rank", 4), ("--rank", 4, "--split", 2)], ids=str)
def test_the_plug_in_loads_them(name, options, tmp_path):
    """The dense model's logits, with 1 and 3 experts; trained a step, saved, and loaded again."""
    model = make_dense(name, tmp_path / "dense")
    done("upcycle", tmp_path / "dense", *options, "--experts-per-layer", "1-3", "-o", tmp_path / "moe", "-q")
    done("verify", tmp_path / "moe", "-q")
    moe, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(report.values()), report
    expected = logits(model)
    assert (logits(moe.eval()) - expected).abs().max() < 1e-4 * min(1, expected.abs().max())
    slices = 2 if "--split" in options else 1
    routers = [
        p.shape[0]
        for n, p in moe.named_parameters()
        if p.ndim == 2 and n.endswith((".gate.weight", ".router.weight", ".wg.weight"))
    ]
    assert routers == [1 * slices, 3 * slices]

    moe(torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    torch.optim.SGD(moe.parameters(), 0.1).step()
    moe.save_pretrained(tmp_path / "trained")
    done("verify", tmp_path / "trained", "-q")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(logits(again), logits(moe.eval()))
    assert (logits(again) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_stock_classes_stop(tmp_path):
    make_dense("llama", tmp_path / "dense")
    done("upcycle", tmp_path / "dense", "--rank", 4, "--experts-per-layer", "2-4", "-o", tmp_path / "moe", "-q")
    done("restore", tmp_path / "moe", "-o", tmp_path / "plain", "-q")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["experts_per_layer"] == [2, 4]
    config["quantization_config"]["dequantize"] = True
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ders_cli.errors.UnsupportedError, match="different numbers of experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--experts-per-layer", "2-4", "--full"), "no stock class"),
        (("--experts-per-layer", "2-4", "--rank", 4, "--experts", 4), "--experts: expected one"),
        (("--experts-per-layer", "2-x", "--rank", 4), "such as 2-4-6-8"),
        (("--experts-per-layer", "4", "--rank", 4), "such as 2-4-6-8"),
        (("--experts-per-layer", "1-2-3", "--rank", 4), "3 numbers for 2 layers"),
    ],
)
def test_refused(options, words, tmp_path):
    make_dense("llama", tmp_path / "dense")
    before = sorted(tmp_path.iterdir())
    ran = ders("upcycle", tmp_path / "dense", *options)
    assert ran.code == 2
    assert words in ran.err
    assert sorted(tmp_path.iterdir()) == before
