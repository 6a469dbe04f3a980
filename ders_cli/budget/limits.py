"""What may be spent: bits per delta weight, bytes of the whole output folder, or an error of outputs."""

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from ..options import parse_bytes
from ..report import human_bytes

LONGEST = 40  # characters
MOST = {"bits": 10**4, "folder": 10**18, "error": 10**6}  # more than any plan takes, and small enough to calculate with
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
    expected = UsageError(
        f"--budget {text!r:.80}: expected bits per delta weight such as 1.5bpw, or bytes of the whole output such as 12GB"
    )
    if len(text) > LONGEST:
        raise expected
    if match := _BITS.fullmatch(text.strip()):
        limit = Limit("bits", float(match[1]))
    else:
        try:
            limit = Limit("folder", parse_bytes(text, "--budget"))
        except UsageError:
            raise expected from None
    if limit.amount > MOST[limit.kind]:
        raise expected
    return limit


def most_error(amount: float) -> Limit:
    """The limit that --max-loss asks for. Raises UsageError."""
    if not 0 <= amount <= MOST["error"]:
        raise UsageError(f"--max-loss {amount}: expected a relative error of outputs such as 0.01, 0 or more")
    return Limit("error", amount)
