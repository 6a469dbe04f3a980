"""What may be spent: bits per delta weight, bytes of the whole output folder, or an error of outputs."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from ..options import parse_bytes
from ..report import human_bytes

_BITS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*bpw", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """bits: of all delta parts per weight of the experts, as reports print `bits_per_delta_weight`. folder: bytes of all files
    of the output, ders.json included. error: predicted relative error of outputs (spend.py)."""

    kind: Literal["bits", "folder", "error"]
    amount: float

    def __str__(self) -> str:
        if self.kind == "folder":
            return human_bytes(self.amount)
        return f"{self.amount:g}bpw" if self.kind == "bits" else f"output error {self.amount:g}"


def parse_budget(text: str) -> Limit:
    """ "1.5bpw" or "12GB". Raises UsageError."""
    if match := _BITS.fullmatch(text.strip()):
        return Limit("bits", float(match[1]))
    try:
        return Limit("folder", parse_bytes(text, "--budget"))
    except UsageError:
        raise UsageError(
            f"--budget {text!r:.80}: expected bits per delta weight such as 1.5bpw, or bytes of the whole output such as 12GB"
        ) from None


def most_error(amount: float) -> Limit:
    """The limit that --max-loss asks for. Raises UsageError."""
    if not (math.isfinite(amount) and amount >= 0):
        raise UsageError(f"--max-loss {amount}: expected a relative error of outputs such as 0.01, 0 or more")
    return Limit("error", amount)
