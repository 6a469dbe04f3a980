"""Routers fitted to prompts: the hidden states of each expert's own texts, in closed form.

The dense model reads every prompt once; what enters the FFN of a layer is what the layer's router will see. Per layer
with states X [tokens, hidden] and targets Y [tokens, experts], SHARPNESS for the own expert and 0 for the others,

    W = (X' X + ridge I)^-1 X' Y        (as MixER's least squares, with a ridge and every expert weighing the same)

Least squares is weak as a classifier, so its agreement is reported from prompts that were left out, which has a closed
form too: residuals of a left-out block B are (I - H_BB)^-1 (Y_B - X_B W), H = X (X' X + ridge I)^-1 X' the hat matrix.
Memory: the states of all layers, fp32, and [hidden, hidden] in fp64.
"""

from pathlib import Path

import numpy as np
import yaml

from .checkpoint.reader import CheckpointReader
from .errors import CheckpointError, DersError, UsageError
from .layouts import find_dense_layers
from .recipe import MAX_RECIPE_BYTES

SHARPNESS = 4.0  # the own expert's logit above the others': a gate of 0.95 among four
UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)  # what transformers raises for a bad folder
RIDGE = 1e-2  # in mean squared lengths of a state


def fit_routers(dense: Path, prompts: Path, experts: int) -> tuple[dict[str, np.ndarray], float]:
    """Router rows fp32 [experts, hidden] by layer ("model.layers.3"), and the mean share of left-out tokens whose own
    expert comes first. Loads the dense model with transformers (extra [hf])."""
    texts = _read_prompts(prompts, experts)
    states, owners, blocks = _hidden_states(dense, texts)
    fitted, agreement = {}, []
    for layer, x in states.items():
        rows, share = fit(x, owners, blocks, experts)
        fitted[layer] = rows
        agreement.append(share)
    return fitted, float(np.mean(agreement))


def fit(states: np.ndarray, owners: np.ndarray, blocks: np.ndarray, experts: int) -> tuple[np.ndarray, float]:
    """states fp32 [tokens, hidden], the expert and the prompt of each token -> rows fp32 [experts, hidden], agreement."""
    weight = np.sqrt(1 / np.bincount(owners, minlength=experts)[owners])[:, None]
    x = states.astype(np.float64) * weight
    y = SHARPNESS * np.eye(experts)[owners] * weight
    inverse = np.linalg.inv(x.T @ x + ridge(x) * np.eye(x.shape[1]))
    solution = inverse @ (x.T @ y)  # [hidden, experts]
    right = 0
    for block in np.unique(blocks):
        own, expert = x[blocks == block], owners[blocks == block][0]
        residual = y[blocks == block] - own @ solution
        left_out = y[blocks == block] - np.linalg.solve(np.eye(len(own)) - own @ inverse @ own.T, residual)
        right += int((left_out.argmax(axis=1) == expert).sum())
    return solution.T.astype(np.float32), right / len(owners)


def ridge(x: np.ndarray) -> float:
    """RIDGE in mean squared lengths of the rows, fp64 [tokens, hidden]; above 0 even for states of 0."""
    return RIDGE * float(np.mean(np.sum(x**2, axis=1))) or RIDGE


def _read_prompts(path: Path, experts: int) -> list[list[str]]:
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UsageError(f"--router {path}: {path.stat().st_size} bytes; expected at most {MAX_RECIPE_BYTES}")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--router {path}: not YAML: {' '.join(str(error).split())}") from None
    good = isinstance(found, list) and all(
        isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts) for texts in found
    )
    if not good or len(found) != experts:
        raise UsageError(f"--router {path}: expected {experts} lists of prompts, one for each expert")
    return found


def _hidden_states(dense: Path, texts: list[list[str]]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """{layer: what enters its FFN, fp32 [tokens, hidden]}, the expert of each token, the prompt of each token."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise DersError(f"--router with prompts needs transformers: pip install 'ders-cli[hf]' ({error})") from None

    logging.disable_progress_bar()
    with CheckpointReader(dense) as reader:
        places = {
            f"{stem}.{layer}": views["up"].tensor.rsplit(".", 2)[0]
            for (stem, layer), views in find_dense_layers(reader.tensors).items()
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(dense)
    except UNLOADABLE as error:
        raise UsageError(f"{dense}: has no tokenizer, which --router with prompts needs ({_line(error)})") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    except UNLOADABLE as error:
        raise CheckpointError(
            f"{dense}: transformers does not load it, as --router with prompts needs ({_line(error)})"
        ) from None
    states: dict[str, list[np.ndarray]] = {layer: [] for layer in places}

    def keep(layer: str):
        return lambda module, inputs: states[layer].append(inputs[0].flatten(0, -2).float().numpy())

    for layer, place in places.items():
        model.get_submodule(place).register_forward_pre_hook(keep(layer))
    owners, blocks = [], []
    for expert, of_expert in enumerate(texts):
        for text in of_expert:
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            if not tokens.numel():
                raise UsageError(f"--router: prompt {text!r:.60} has no tokens")
            with torch.no_grad():
                model(tokens)
            owners += [expert] * tokens.shape[1]
            blocks += [blocks[-1] + 1 if blocks else 0] * tokens.shape[1]
    joined = {layer: np.concatenate(parts) for layer, parts in states.items()}
    return joined, np.array(owners), np.array(blocks)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
