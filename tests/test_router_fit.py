"""Routers at the start: seeded normal ones, and those fitted to prompts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import contents, ders, done
from safetensors.torch import load_file

from ders_cli.router_fit import RIDGE, SHARPNESS, fit, ridge
from ders_cli.routers import normal, start_router

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
WORDS = ("cat dog bird fish", "one two three four five", "red green blue black", "north south east west")


def drawn(tokens: int, hidden: int, experts: int, prompts: int, apart: float) -> tuple[np.ndarray, ...]:
    """States around one centre for each expert; owners; prompts of uneven length, none shared by two experts."""
    random = np.random.default_rng(0)
    blocks = np.sort(random.integers(0, prompts, tokens))
    owners = blocks % experts
    centres = random.standard_normal((experts, hidden))
    states = apart * centres[owners] + random.standard_normal((tokens, hidden))
    return states.astype(np.float32), owners, blocks


def test_separable_states() -> None:
    rows, agreement = fit(*drawn(300, 24, 4, 20, apart=8.0), 4)
    assert agreement == 1 and rows.shape == (4, 24) and rows.dtype == np.float32


def test_random_owners_are_chance() -> None:
    """Left-out prompts of no meaning: 1/4 +- 4 standard deviations of 80 prompts. In-sample it would be near 1."""
    states, owners, blocks = drawn(160, 150, 4, 80, apart=0.0)
    rows, agreement = fit(states, owners, blocks, 4)
    assert abs(agreement - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 80)
    assert ((states @ rows.T).argmax(axis=1) == owners).mean() > 0.9


@pytest.mark.parametrize(("tokens", "hidden", "experts", "prompts"), [(40, 9, 3, 7), (20, 31, 2, 4), (5, 6, 5, 5)])
def test_left_out_prompts_by_refitting(tokens: int, hidden: int, experts: int, prompts: int) -> None:
    """The slow reference: leave out a prompt, solve the rest anew (with the ridge and the weights of all), predict it."""
    states, owners, blocks = drawn(tokens, hidden, experts, prompts, apart=0.6)
    owners[:experts] = range(experts)
    blocks[:experts] = 1000 + np.arange(experts)
    weight = np.sqrt(1 / np.bincount(owners, minlength=experts)[owners])[:, None]
    x, y = states.astype(np.float64) * weight, SHARPNESS * np.eye(experts)[owners] * weight
    right = 0
    for block in np.unique(blocks):
        rest, own = blocks != block, blocks == block
        gram = x[rest].T @ x[rest] + ridge(x) * np.eye(hidden)
        solution = np.linalg.solve(gram, x[rest].T @ y[rest])
        right += int(((x[own] @ solution).argmax(axis=1) == owners[own]).sum())
    rows, agreement = fit(states, owners, blocks, experts)
    assert agreement == right / tokens
    whole = np.linalg.solve(x.T @ x + ridge(x) * np.eye(hidden), x.T @ y)
    np.testing.assert_allclose(rows, whole.T, rtol=1e-4, atol=1e-5)  # fp32 of another solver's fp64
    assert ridge(x) == pytest.approx(RIDGE * (x**2).sum() / tokens)


def test_states_of_zero() -> None:
    rows, agreement = fit(np.zeros((4, 3), np.float32), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 2)
    assert not rows.any() and 0 <= agreement <= 1


# --- the start without prompts ---


def test_normal_numbers() -> None:
    found = normal(7, 0, 100_000)
    assert abs(found.mean()) < 4 / math.sqrt(100_000) and abs(found.std() - 1) < 4 / math.sqrt(200_000)
    assert np.abs(found).max() > 3.5 and np.isfinite(found).all()
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / math.sqrt(100_000)
    assert np.array_equal(found[500:700], normal(7, 500, 200))


def test_start_router() -> None:
    here = start_router("normal", {"initializer_range": 0.5}, 0, "a", 64, 512)
    assert here.shape == (64, 512) and abs(here.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * here.size)
    assert np.array_equal(here, start_router("normal", {"initializer_range": 0.5}, 0, "a", 64, 512))
    for seed, name in ((1, "a"), (0, "b")):
        other = start_router("normal", {"initializer_range": 0.5}, seed, name, 64, 512)
        assert abs(np.corrcoef(here.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(here.size)
    assert abs(start_router("normal", {}, 0, "a", 64, 512).std() - 0.02) < 0.0005
    assert not start_router("zero", {}, 0, "a", 2, 3).any()


# --- the command ---


def save_tokenizer(folder: Path) -> None:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for line in WORDS for word in line.split())
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word: 3 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def prompts_file(folder: Path, experts: int = 4) -> Path:
    found = [[" ".join(line.split()[i:] + line.split()[:i]) for i in range(3)] for line in WORDS[:experts]]
    (folder / "prompts.yaml").write_text(json.dumps(found))  # JSON is YAML
    return folder / "prompts.yaml"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "dense"
    toy.dense(folder, intermediate_size=48, initializer_range=0.3)
    save_tokenizer(folder)
    return folder


def test_fitted_to_what_enters_the_ffn(dense, tmp_path) -> None:
    """The rows are those of `fit` on the FFNs' inputs; the router puts each word's expert first; slices share a row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    document = done(
        "upcycle", dense, "--rank", 2, "--router", prompts_file(tmp_path), "-o", tmp_path / "moe", "--json"
    ).json
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense).eval(), AutoTokenizer.from_pretrained(dense)
    states, owners, blocks = [[], []], [], []
    for layer in (0, 1):
        norm = model.model.layers[layer].post_attention_layernorm
        norm.register_forward_hook(lambda module, inputs, output, layer=layer: states[layer].append(output[0]))
    for expert, prompts in enumerate(json.loads((tmp_path / "prompts.yaml").read_text())):
        for text in prompts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                model(ids)
            blocks += [len(states[0])] * ids.shape[1]
            owners += [expert] * ids.shape[1]
    tensors, agreements = load_file(tmp_path / "moe" / "model.safetensors"), []
    for layer in (0, 1):
        x = torch.cat(states[layer]).numpy()
        rows, agreement = fit(x, np.array(owners), np.array(blocks), 4)
        found = tensors[ROUTER.format(layer)].numpy()
        np.testing.assert_allclose(found, rows, atol=1e-5)  # the same model, run again
        assert ((x @ found.T).argmax(axis=1) == owners).mean() > 0.9
        agreements.append(agreement)
    assert document["router_agreement"] == pytest.approx(np.mean(agreements), abs=0.05)
    options = ("--rank", 2, "--router", tmp_path / "prompts.yaml", "--split", 2)
    done("upcycle", dense, *options, "-o", tmp_path / "split", "-q")
    fine = load_file(tmp_path / "split" / "model.safetensors")[ROUTER.format(1)]
    assert torch.equal(fine, tensors[ROUTER.format(1)].repeat_interleave(2, dim=0))


def test_resume_with_other_prompts(dense, tmp_path) -> None:
    options = ("upcycle", dense, "--full", "--router", prompts_file(tmp_path), "-o", tmp_path / "moe", "-q")
    done(*options)
    (tmp_path / "moe").rename(tmp_path / "whole")
    ours = contents(tmp_path / "whole")
    (tmp_path / "moe.partial").mkdir()
    from ders_cli import upcycle

    class Stop(Exception):
        pass

    def stop(source, out, options, mark, title):
        (out.with_name("moe.partial") / ".ders-plan.json").write_text(json.dumps(mark))
        raise Stop

    original, upcycle.write_plain = upcycle.write_plain, stop
    try:
        with pytest.raises(Stop):
            ders(*options, "--overwrite")
    finally:
        upcycle.write_plain = original
    text = (tmp_path / "prompts.yaml").read_text()
    (tmp_path / "prompts.yaml").write_text(text.replace("cat", "dog"))
    ran = ders(*options, "--resume")
    assert ran.code == 2 and "was begun with another upcycling" in ran.err
    (tmp_path / "prompts.yaml").write_text(text)
    done(*options, "--resume")
    assert contents(tmp_path / "moe") == ours


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("\xff\xfe".encode("latin-1"), "not YAML"),
        ("a: b", "expected 4 lists of prompts"),
        ("[[a], [b], [c]]", "expected 4 lists of prompts"),
        ("[[a], [b], [c], []]", "expected 4 lists of prompts"),
        ("[[a], [b], [c], [3]]", "expected 4 lists of prompts"),
        ("[a, b, c, d]", "expected 4 lists of prompts"),
        ("", "expected 4 lists of prompts"),
        ("[" * 10_000, "not YAML"),
        ("[[a], [b], [c], ['  ']]", "has no tokens"),
        (b" " * 1_000_001, "expected at most"),
    ],
)
def test_prompts_that_are_refused(dense, tmp_path, text, said) -> None:
    (tmp_path / "p.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = ders("upcycle", dense, "--rank", 2, "--router", tmp_path / "p.yaml", "-o", tmp_path / "moe")
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "moe.partial").exists()


def test_no_prompts_file(dense, tmp_path) -> None:
    ran = ders("upcycle", dense, "--rank", 2, "--router", "norml", "-o", tmp_path / "moe")
    assert ran.code == 2 and "expected normal, zero or a YAML file" in ran.err


def test_no_tokenizer(tmp_path) -> None:
    toy.dense(tmp_path / "dense")
    ran = ders("upcycle", tmp_path / "dense", "--rank", 2, "--router", prompts_file(tmp_path), "-o", tmp_path / "moe")
    assert ran.code == 2 and "has no tokenizer" in ran.err and ran.err.count("\n") == 1
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ran = ders(
        "upcycle", tmp_path / "dense", "--rank", 2, "--router", tmp_path / "prompts.yaml", "-o", tmp_path / "moe"
    )
    assert ran.code == 2 and "has no tokenizer" in ran.err and ran.err.count("\n") == 1


def test_a_dry_run_fits_nothing(dense, tmp_path) -> None:
    found = done("upcycle", dense, "--rank", 2, "--router", prompts_file(tmp_path), "--dry-run", "--json").json
    assert found["router_agreement"] is None
