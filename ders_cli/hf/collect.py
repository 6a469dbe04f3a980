"""What the experts of a model see of a text: the stock transformers model on a CPU, a hook at every experts module.

The text is cut into pieces of 512 tokens, each behind the tokenizer's own first token if it has one; as many pieces as
`tokens` needs are drawn and run, and of these just as many tokens are drawn. A model runs in its checkpoint's dtype (F16
in fp32) and takes its own size in memory, beside what is recorded: tokens x hidden numbers a layer. A DeRS checkpoint
runs dequantised.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ders_kernels.counter_rng import draw, make_key
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..activations import write_activations
from ..checkpoint.files import read_small
from ..errors import CheckpointError, UnsupportedError, UsageError
from ..runtime.group import split_name
from ..source import Source
from .stock import locate

PIECE = 512  # tokens that a model reads at once
MAX_TEXT_BYTES = 32_000_000
UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)  # what transformers raises
CALL = ("hidden_states", "top_k_index", "top_k_weights")


def collect(source: Source, text: Path, tokens: int, seed: int, out: Path) -> int:
    """Run the model that `source` is on a text file, and write what its experts see: at most `tokens` tokens a layer.

    Returns how many tokens there are. A layer that the model's class does not have (a head for multi-token prediction) is
    left out of the file. Raises UsageError where text or tokenizer do not serve, UnsupportedError where transformers does
    not run the model, or calls its experts in another way.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = source.reader.folder
    tokenizer = _load_tokenizer(folder)
    start, ids = _first_token(tokenizer), _token_ids(tokenizer, text)
    pieces = [start + piece for piece in _drawn_pieces(ids, tokens, seed)]
    model = _load_model(folder)
    _check_vocabulary(folder, model, pieces)
    recorded = {path: _Recorded(path, module) for path, module in _experts_modules(model, source).items()}
    with torch.inference_mode():
        for piece in pieces:
            model.base_model(input_ids=torch.tensor([piece]), use_cache=False)
    count = sum(map(len, pieces))
    kept = _drawn_tokens(count, tokens, seed)
    write_activations(out, {name: part for one in recorded.values() for name, part in one.tensors(count, kept)})
    return len(kept)


class _Recorded:
    """What one experts module was called with, token by token."""

    def __init__(self, path: str, module: nn.Module):
        self._path, self._calls = path, []
        module.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found = dict(zip(CALL, arguments)) | named
        call = [found[name] for name in CALL if isinstance(found.get(name), Tensor)]
        if len(call) == len(CALL):
            call = [one.flatten(0, -2) for one in call]
        if len({len(one) for one in call}) != 1 or len(call) != len(CALL) or call[1].shape != call[2].shape:
            shapes = ", ".join(str(list(one.shape)) for one in call)
            raise UnsupportedError(
                f"{self._path}: {type(module).__name__} is called with {shapes or 'no tensors'}; expected states, chosen experts "
                "and their gates of every token. Give --activations FILE, made by other means (docs/calibration.md)"
            )
        self._calls.append([call[0].clone(), call[1].to(torch.int32), call[2].float()])

    def tensors(self, count: int, kept: Tensor) -> Iterator[tuple[str, tuple[np.ndarray, str]]]:
        """Names and bits for the file, of the tokens `kept` out of `count`."""
        states, chosen, gates = (torch.cat(parts) for parts in zip(*self._calls))
        assert len(states) == count, f"{self._path} saw {len(states)} of {count} tokens"
        if states.dtype == torch.bfloat16:
            yield f"{self._path}.states", (states[kept].view(torch.uint16).numpy(), "BF16")
        else:
            yield f"{self._path}.states", (states[kept].float().numpy(), "F32")
        yield f"{self._path}.chosen", (chosen[kept].numpy(), "I32")
        yield f"{self._path}.gates", (gates[kept].numpy(), "F32")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = "it knows no words" if not tokenizer("text", add_special_tokens=False)["input_ids"] else ""
    except UNLOADABLE as error:
        found = _line(error)
    if found:
        raise UsageError(
            f"{folder}: no tokenizer that transformers loads ({found}); put tokenizer.json there, or give --activations FILE"
        )
    return tokenizer


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the token that it puts in front of every text], or []."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: Path) -> list[int]:
    """The tokens of a whole text file, no special ones added."""
    if not os.path.lexists(text):
        raise UsageError(f"{text}: no such file; expected a text")
    try:
        words = read_small(text, MAX_TEXT_BYTES, "a text")[0].decode()
    except CheckpointError as error:  # a text is no part of a checkpoint
        raise UsageError(str(error)) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{text}: expected text in UTF-8, found byte {error.object[error.start]:#x} at {error.start}"
        ) from None
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError(f"{text}: no tokens in it; expected text of the kind that the model will read")
    return ids


def _drawn_pieces(ids: list[int], tokens: int, seed: int) -> list[list[int]]:
    """As many pieces of a text as hold `tokens` tokens (all, if there are not so many), in the text's order."""
    pieces = [ids[begin : begin + PIECE] for begin in range(0, len(ids), PIECE)]
    order = np.argsort(draw(make_key(seed, "text", "pieces"), 0, len(pieces)), kind="stable")
    found, held = [], 0
    for number in order:
        if held < tokens:
            found.append(number)
            held += len(pieces[number])
    return [pieces[number] for number in sorted(found)]


def _drawn_tokens(count: int, tokens: int, seed: int) -> Tensor:
    """int64: places of at most `tokens` tokens out of `count`, ascending."""
    order = np.argsort(draw(make_key(seed, "text", "tokens"), 0, count), kind="stable")
    return torch.from_numpy(np.sort(order[:tokens]))


def _load_model(folder: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (
            isinstance(method := getattr(config, "quantization_config", None), dict)
            and method.get("quant_method") == "ders"
        ):
            config.quantization_config = method | {"dequantize": True}
        dtype = torch.float32 if config.dtype == torch.float16 else "auto"
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            experts_implementation="eager",  # grouped_mm refuses rows that are no multiple of 16 bytes
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UNLOADABLE as error:
        raise UnsupportedError(
            f"{folder}: transformers does not load it as a causal language model ({_line(error)}); give --activations FILE"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedError(
            f"{folder}: transformers finds no {missing[0]} in it and would take random numbers; give --activations FILE"
        )
    return model.eval()


def _check_vocabulary(folder: Path, model: PreTrainedModel, pieces: list[list[int]]) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if (most := max(map(max, pieces))) >= vocabulary:
        raise CheckpointError(f"{folder}: its tokenizer gives a token {most}; the model has 0 ... {vocabulary - 1}")


def _experts_modules(model: PreTrainedModel, source: Source) -> dict[str, nn.Module]:
    """{path in the groups' names: module}, of the layers that the model's class has."""
    paths = dict.fromkeys(split_name(group.name)[0] for group in source.groups)
    modules = {path: found[1] for path in paths if (found := locate(model, path)) is not None}
    if not modules:
        raise UnsupportedError(
            f"{next(iter(paths))}: {type(model).__name__} has no such module; give --activations FILE, made by other means"
        )
    return modules


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
