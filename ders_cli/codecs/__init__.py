"""Codecs: what stands in for a delta. Each file here offers one class as `CODEC`; base.py has the contract."""

import dataclasses
import sys
from typing import Any

from ..errors import CheckpointError, UsageError
from ..registry import discover
from .base import DeltaCodec
from .chain import MOST, ChainCodec
from .mixed import GroupCodec, MixedCodec

CODECS: dict[str, type[DeltaCodec]] = {c.name: c for c in discover(sys.modules[__name__], "CODEC").values()}


def parse_codec(text: str, group_size: int) -> DeltaCodec:
    """The codec that a --delta text such as `drop0.9+int4` asks for. Raises UsageError naming the term."""
    codec: DeltaCodec | None = None
    for term in reversed(text.split("+")):
        here = _parse_term(term.strip(), text, group_size)
        codec = here if codec is None else ChainCodec(here, codec)
    return codec


def _parse_term(term: str, text: str, group_size: int) -> DeltaCodec:
    for codec in CODECS.values():
        if match := codec.pattern.fullmatch(term):
            return codec.from_term(match, group_size)
    raise UsageError(
        f"--delta {text!r:.80}: no codec {term!r:.80}; expected exact, int8 ... int1, dropP, sparseP, ternaryK, topK, N:M, rankR, "
        "none, or a chain such as drop0.9+int4"
    )


def codec_from_config(config: dict[str, Any], within: int = 0) -> DeltaCodec:
    """The codec that ders.json describes, `within` so many chains. Raises CheckpointError on what no version of ders has written."""
    if within >= MOST:
        raise CheckpointError(f"ders.json: codec: a chain of more than {MOST} codecs")
    try:
        fields = dict(config)
        codec = CODECS[fields.pop("codec")]
        if codec is ChainCodec:
            return ChainCodec(*(codec_from_config(fields.pop(part), within + 1) for part in ("first", "then")))
        for field in dataclasses.fields(codec):
            value = fields.setdefault(field.name, field.default)  # one without a default is no number, and refused
            if type(value) not in {int: (int,), float: (int, float), str: (str,)}[field.type]:
                raise TypeError(f"{field.name}: expected a {field.type.__name__}, found {value!r:.40}")
        return codec(**fields)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise CheckpointError(f"ders.json: codec {config!r:.120}: not understood ({error})") from None


def group_codec_from_config(config: dict[str, Any], members: int) -> GroupCodec:
    """What stands for a group of so many members, as ders.json describes it. Raises CheckpointError."""
    if config.get("codec") != "mixed":
        return codec_from_config(config)
    codecs, of = config.get("codecs"), config.get("of")
    if config.keys() != {"codec", "codecs", "of"} or not (isinstance(codecs, list) and isinstance(of, list)):
        raise CheckpointError(f"ders.json: codec {config!r:.120}: expected the lists `codecs` and `of`, and no more")
    if not all(isinstance(each, dict) for each in codecs) or not all(type(k) is int for k in of):
        raise CheckpointError(f"ders.json: codec {config!r:.120}: expected objects in `codecs` and numbers in `of`")
    if len(of) != members:
        raise CheckpointError(f"ders.json: codec: `of` has {len(of)} numbers, expected {members}, one for each member")
    if len(codecs) < 2 or list(dict.fromkeys(of)) != list(range(len(codecs))):
        raise CheckpointError(
            f"ders.json: codec: `of` {of!r:.80}: expected the numbers of 2 or more `codecs` (here {len(codecs)}), "
            "each of them used, in order of first use"
        )
    return MixedCodec(tuple(codec_from_config(each) for each in codecs), tuple(of))
