"""What a verification found, check by check."""

from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


@dataclass
class Report:
    """Everything found. `findings`: {"where", "problem"}; `checks`: where -> problem or "" for JUnit."""

    source: str
    against: str | None
    findings: list[dict[str, str]] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, Any] | None = None  # {"backend", "experts", "decoded"}, if a backend ran

    def add(self, where: str, problem: str = "") -> None:
        """Note a check that was made, and its problem if it has one."""
        if problem:
            self.findings.append({"where": where, "problem": problem})
        self.checks[where] = "; ".join(filter(None, (self.checks.get(where, ""), problem)))

    def document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": "verify",
            "source": self.source,
            "against": self.against,
            "ok": not self.findings,
            "checks": len(self.checks),
            "findings": self.findings,
            "experts": self.experts,
            **({"kernels": self.kernels} if self.kernels else {}),
        }
