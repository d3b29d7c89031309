"""What people saw work or fail, and what the rules say of the same: the field holds the rules to account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuyard.plan import names
from gpuyard.plan.judge import Judge


@dataclass(frozen=True, slots=True)
class Judged:
    """One report beside the verdict of the rules."""

    report: names.Report
    verdict: Literal["works", "fails", "not judged"]
    rules: tuple[str, ...]
    """Those that refuse it."""

    @property
    def reported(self) -> Literal["works", "fails"]:
        return "works" if self.report.works else "fails"

    @property
    def wrong(self) -> bool:
        return self.verdict not in ("not judged", self.reported)


def judged(judge: Judge, report: names.Report) -> Judged:
    """What the rules make of a report. It tells whether it worked that day, not whether it is looked after today."""
    if report.outside:
        return Judged(report, "not judged", ())
    findings = judge.findings(names.combination(judge.catalog, report.words))
    red = [finding.rule for finding in findings if finding.level == "red" and finding.kind == "works"]
    return Judged(report, "fails" if red else "works", tuple(dict.fromkeys(red)))
