"""docs/training.md does what it says, on a tiny model: its commands and its Python, as they stand there."""

import os
import re
import shlex
from pathlib import Path

import torch
import toy
from command import done
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page(tmp_path: Path) -> None:
    toy.dense(tmp_path / "smollm2", num_hidden_layers=1, vocab_size=300)
    words = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "smollm2")
    (tmp_path / "corpus.txt").write_text(PAGE.read_text())
    before, seed = Path.cwd(), torch.initial_seed()
    os.chdir(tmp_path)
    try:
        commands = [shlex.split(line, comments=True)[1:] for block in blocks("sh") for line in block.splitlines()]
        done(*commands[0], "-q")
        (script,) = blocks("python")
        ran: dict = {}
        exec(script, ran)
        for command in commands[1:]:
            done(*command, "-q")
        done("verify", "smaller", "--against", "smollm2-moe-plain", "-q")
    finally:
        os.chdir(before)
        torch.manual_seed(seed)
    moved = ran["model"].model.layers[0].mlp.experts.gate_proj
    assert moved.delta.left.abs().max() > 0
    assert (tmp_path / "smaller" / "tokenizer.json").is_file()
