"""DersExperts through the GPU's kernels: what goes that way, and that it is the same layer."""

import pytest
import torch
from test_runtime import FP32, activate, experts_of, reference
from torch.nn.functional import gelu, silu

from ders_cli.runtime import gpu
from ders_cli.runtime.synthesis import decode_delta

TOKENS, EXPERTS, TOP = 5, 4, 2


def routed(device="cpu"):
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(TOKENS)])
    return torch.randn(TOKENS, 64).to(device), index.to(device), torch.rand(TOKENS, TOP).to(device)


def unrounded(projection, member):
    """B + D, fp32: apart, the sum of base and delta is never rounded to the base's dtype."""
    base = projection.base.detach().float()
    if projection.no_delta:
        return base
    own = {name: part.detach() for name, part in projection.piece(member).items()}
    return base + torch.from_numpy(decode_delta(projection.group, own, member))


@pytest.mark.parametrize("codec", ["int4", "int3", "drop0.5", "ternary0.02", "rank4", "drop0.5+int4", "int2+rank2"])
def test_is_the_same_layer(codec, device):
    module = experts_of(codec, EXPERTS, dtype=torch.float32)
    expected = reference(module, *routed(), unrounded)
    with torch.no_grad():
        found = gpu.forward(module.to(device), *routed(device)).cpu()
    assert torch.allclose(found, expected, rtol=0, atol=FP32 * expected.abs().max())


def test_changed_parameters_are_seen(device):
    module = experts_of("int4", EXPERTS, dtype=torch.float32).to(device)
    with torch.no_grad():
        before = gpu.forward(module, *routed(device))
        module.down_proj.base.zero_()
        module.down_proj.delta.tensors()["scale"].mul_(2)
        after = gpu.forward(module, *routed(device)).cpu()
    expected = reference(module.cpu(), *routed(), unrounded)
    assert not torch.equal(before.cpu(), after)
    assert torch.allclose(after, expected, rtol=0, atol=FP32 * expected.abs().max())


def test_changed_data_is_seen_after_eval(device):
    module = experts_of("ternary0.02", EXPERTS, dtype=torch.float32).to(device)
    with torch.no_grad():
        gpu.forward(module, *routed(device))
        module.down_proj.delta.tensors()["scale"].data.mul_(1024)
        after = gpu.forward(module.train().eval(), *routed(device)).cpu()
    expected = reference(module.cpu(), *routed(), unrounded)
    assert torch.allclose(after, expected, rtol=0, atol=FP32 * expected.abs().max())


def test_another_activation_is_seen(device):
    module = experts_of("int4", EXPERTS, dtype=torch.float32).to(device)
    with torch.no_grad():
        before = gpu.forward(module, *routed(device))
        module.activate = lambda gate, up: gate.relu() * up
        assert not torch.equal(gpu.forward(module, *routed(device)), before)


def test_activations_are_known_by_what_they_do():
    assert gpu.activation_name(activate, True) == "silu"
    assert gpu.activation_name(activate, False) == "silu"
    assert gpu.activation_name(lambda gate, up: gelu(gate) * up, True) == "gelu"
    assert gpu.activation_name(lambda gate, up: gelu(gate, approximate="tanh") * up, True) == "gelu_tanh"
    assert gpu.activation_name(lambda gate, up: gate.relu() * up, True) == "relu"
    assert gpu.activation_name(lambda gate, up: silu(gate.clamp(max=100)) * up, True) == ""
    assert gpu.activation_name(lambda gate, up: silu(gate) * (up + 1), True) == ""


def test_a_cpu_goes_its_own_way():
    module = experts_of("int4", EXPERTS)
    assert not gpu.runs(module, routed()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_takes_the_kernels(dtype):
    """Inference does; training, a gradient, biases, an exact delta don't, and give the same."""
    x, index, gates = routed("cuda")
    x = x.to(dtype)
    module = experts_of("int4", EXPERTS, dtype=dtype).cuda().requires_grad_(False)
    with torch.no_grad():
        assert gpu.runs(module, x)
        found = module(x, index, gates)
        module.way = "whole"
        assert not gpu.runs(module, x)
        expected = module(x, index, gates)
    assert torch.allclose(found.float(), expected.float(), rtol=0, atol=3e-2 * expected.abs().max())
    module.way = "auto"
    assert not gpu.runs(module.train(), x)
    assert not gpu.runs(experts_of("exact", EXPERTS, dtype=dtype).cuda(), x)
    bias = experts_of(
        "int4", EXPERTS, biases=lambda projection, expert: torch.zeros(64 if projection == "down" else 48)
    )
    assert not gpu.runs(bias.cuda().eval().requires_grad_(False), x)
    assert not gpu.runs(experts_of("int4", EXPERTS, dtype=dtype).cuda(), x)  # its base needs a gradient
