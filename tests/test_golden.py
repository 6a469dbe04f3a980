"""Stored bytes: folders of format 1 must decode for ever, and the encoders must still write them.

`python tests/test_golden.py` wrote tests/golden/format1; it is run again only for a new format, into a new folder. A new codec's
folder is added by hand, with the command that the test below has.
"""

import shutil
import sys
from pathlib import Path

import pytest
from command import contents, done

GOLDEN = Path(__file__).parent / "golden" / "format1"
DELTAS = [
    "exact",
    "int8",
    "int4",
    "int3",
    "int2",
    "int1",
    "drop0.9",
    "ternary0.1",
    "top0.1",
    "top0.5",
    "2:4",
    "rank3",
    "sparse0.9",
    "none",
    "drop0.5+int4",
    "int1+rank2",
]


def folder_of(delta: str) -> Path:
    return GOLDEN / delta.replace(":", "of")


@pytest.mark.parametrize("delta", DELTAS)
def test_old_bytes_decode(delta: str, tmp_path: Path) -> None:
    """The hashes in ders.json are of the experts as they decoded on the day of writing."""
    done("verify", folder_of(delta), "-q")
    done("verify", folder_of(delta), "--against", GOLDEN / "source", "-q")
    done("restore", folder_of(delta), "-o", tmp_path / "plain", "-q")
    if delta == "exact":
        assert contents(tmp_path / "plain") == contents(GOLDEN / "source")


@pytest.mark.parametrize("delta", [delta for delta in DELTAS if "rank" not in delta])  # BLAS may sum in another order
def test_encoders_write_the_same_bytes(delta: str, tmp_path: Path) -> None:
    done("compress", GOLDEN / "source", "--delta", delta, "--group-size", 16, "-o", tmp_path / "out", "-q")
    assert contents(tmp_path / "out") == contents(folder_of(delta))


def main() -> None:
    import torch
    import toy

    shutil.rmtree(GOLDEN, ignore_errors=True)
    toy.make(
        "mixtral",
        GOLDEN / "source",
        dtype=torch.bfloat16,
        hidden_size=24,
        intermediate_size=37,
        vocab_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for delta in DELTAS:
        done("compress", GOLDEN / "source", "--delta", delta, "--group-size", 16, "-o", folder_of(delta), "-q")


if __name__ == "__main__":
    sys.exit(main())
