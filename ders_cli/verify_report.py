"""A verify report for a person: findings first, then one table of errors by projection."""

from collections import Counter
from typing import Any

from .findings import Report
from .report import print_table, visible

SHOWN = 40  # findings printed; --json has them all


def print_report(report: Report, quiet: bool) -> None:
    """One line per finding; the errors' summary unless `quiet`; the verdict last."""
    for finding in report.findings[:SHOWN]:
        print(visible(f"{finding['where']}: {finding['problem']}"))
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more (--json lists all)")
    unequal = [expert for expert in report.experts if not expert["equal"]]
    if unequal and not quiet:
        rows = []
        for projection in dict.fromkeys(expert["projection"] for expert in unequal):
            here = [expert for expert in unequal if expert["projection"] == projection]
            rows.append(
                [
                    projection,
                    str(len(here)),
                    *(_worst(here, key) for key in ("max_abs", "weight", "delta", "output", "output_delta")),
                    f"{min(expert['cosine'] for expert in here):.6f}",
                ]
            )
        print_table(
            "worst over experts and layers",
            ["projection", "experts", "max abs", "weight", "delta", "output", "output/delta", "cosine"],
            rows,
        )
    if report.kernels and not quiet:
        _print_kernels(report.kernels)
    against = f" against {report.against}" if report.against else ""
    if report.findings:
        print(f"{report.source}{against}: {len(report.findings)} finding(s) in {len(report.checks)} checks")
    else:
        equal = (
            f"; {len(report.experts) - len(unequal)} of {len(report.experts)} expert matrices equal bit for bit"
            if report.experts
            else ""
        )
        print(f"{report.source}{against}: all well, {len(report.checks)} checks{equal}")


def _print_kernels(kernels: dict[str, Any]) -> None:
    """One line for what the backend ran, one for each reason why groups were decoded instead."""
    experts, reasons = kernels["experts"], Counter(kernels["decoded"].values())
    distance = f", at most {max(e['distance'] for e in experts):.1e} from the decoded experts'" if experts else ""
    rows = [[kernels["backend"], f"{len(experts)} experts' outputs{distance}"]]
    rows += [["decoded", f"{count} groups: {why}"] for why, count in reasons.items()]
    print_table("through kernels", ["by", "what"], rows)


def _worst(experts: list[dict], key: str) -> str:
    found = [expert[key] for expert in experts if key in expert]
    return f"{max(found):.2e}" if found else "-"
