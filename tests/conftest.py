"""Triton's kernels run in its interpreter, on the CPU, unless a run is for a GPU: `pytest -m gpu`."""

import itertools
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads the variable at import, and test modules are imported after this; processes they start inherit it."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
        return
    import torch

    if not torch.cuda.is_available():  # else all would be skipped, and look well
        raise pytest.UsageError("-m gpu: torch finds no GPU")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run."""
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cpu" and not interpreted:
        pytest.skip("kernels are compiled in this run")
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("no GPU, or kernels are the interpreter's in this run")
    return request.param


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty gives holds NaN, and integers that are wrong; a kernel that leaves its tensors' memory fails.

    The second in the interpreter alone, where each load and store is seen: masks are the same on a GPU.
    """
    import torch

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.copy_(torch.arange(4, tensor.numel() + 4).view(tensor.shape))

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, plain=plain, **named: poisoned(plain(*given, **named)))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from ders_kernels.triton_ops import kept

        monkeypatch.setattr(kept, "LARGEST_TILE", 1 << 12)  # draws of one program: a few rows, for time
        _watch_memory(monkeypatch)


def _watch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    memory: list[tuple[int, int]] = []  # begin and end of the launch's tensors

    def launched(kernel, *given, **named):
        own = [one for one in itertools.chain(given, named.values()) if hasattr(one, "data_ptr")]
        memory[:] = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in own]
        return run(kernel, *given, **named)

    def inside(pointers, mask) -> None:
        used = pointers.data[mask.data.astype(bool)]
        if used.size:
            first, last = int(used.min()), int(used.max()) + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            assert any(begin <= first and last <= end for begin, end in memory), "outside of the kernel's tensors"

    def seen_load(builder, pointers, mask, *others):
        inside(pointers, mask)
        return load(builder, pointers, mask, *others)

    def seen_store(builder, pointers, value, mask, *others):
        inside(pointers, mask)
        return store(builder, pointers, value, mask, *others)

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", seen_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", seen_store)
