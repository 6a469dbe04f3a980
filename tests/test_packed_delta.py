"""What the kernels are given is what the codec decodes, bit for bit, by the definitions in plain torch."""

import numpy as np
import pytest
import torch
from ders_kernels import reference

from ders_cli.codecs import parse_codec
from ders_cli.runtime.deltas import packed_delta
from ders_cli.runtime.dtypes import TORCH

CODECS = ["int8", "int4", "int3", "int2", "int1", "drop0.7", "top0.3", "top0.02", "2:4", "3:7", "ternary0.1"]
CODECS += ["rank3", "drop0.5+int4", "2:4+int3", "top0.02+int8", "int1+rank2", "int2+drop0.8", "int1+int1"]


def packed(delta: str, shape: tuple[int, int], keys: tuple[int, ...], group_size: int = 32):
    """A codec, and its packed delta of random experts: (codec, delta, parts of each expert as numpy has them)."""
    codec, random, each = parse_codec(delta, group_size), np.random.default_rng(7), []
    for key in keys:
        each.append(codec.encode(random.standard_normal(shape).astype(np.float32), key, 0))
    specs = codec.spec(shape)
    parts = {
        name: torch.from_numpy(np.stack([own[name] for own in each])).view(TORCH[spec.dtype])
        for name, spec in specs.items()
    }
    return codec, packed_delta(codec, parts, shape[1], keys), each


@pytest.mark.parametrize("shape", [(1, 1), (3, 61), (16, 128)], ids=str)
@pytest.mark.parametrize("delta", CODECS)
def test_the_kernels_delta_is_the_codecs(delta, shape):
    keys = (11, 2**64 - 1)
    codec, made, each = packed(delta, shape, keys)
    assert made.shape == (2, *shape)
    for expert, key in enumerate(keys):
        expected = codec.decode(each[expert], shape, key, 0)
        assert (reference.decode(made, expert).numpy() == expected).all()


@pytest.mark.parametrize("delta", ["exact", "none", "sparse0.9", "drop0.5+drop0.5"])
def test_no_packed_delta(delta):
    assert packed_delta(parse_codec(delta, 32), {}, 8, (1,)) is None
