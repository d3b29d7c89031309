from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog
from gpuyard.plan import names
from gpuyard.plan.judge import Judge
from gpuyard.plan.reports import judged
from gpuyard.plan.rules import RULES

JUDGE = Judge(load_catalog(), "2026-11-25")
REPORTS = names.reports(Path(__file__).with_name("combinations.yaml"))
WITHIN = [report for report in REPORTS if not report.outside]
OUTSIDE = [report for report in REPORTS if report.outside]


@pytest.mark.parametrize("report", WITHIN, ids=[report.id for report in WITHIN])
def test_the_rules_say_what_was_seen(report: names.Report) -> None:
    found = judged(JUDGE, report)
    assert found.verdict == found.reported, f"{report.why} {report.source}; refused by {found.rules}"
    assert not found.wrong
    assert bool(found.rules) is not report.works
    assert {RULES[rule].kind for rule in found.rules} <= {"works"}


@pytest.mark.parametrize("report", OUTSIDE, ids=[report.id for report in OUTSIDE])
def test_what_no_rule_judges_says_why(report: names.Report) -> None:
    assert len(report.outside) > 20
    found = judged(JUDGE, report)
    assert (found.verdict, found.rules, found.wrong) == ("not judged", (), False)


def test_few_reports_are_outside_of_the_rules() -> None:
    assert len(OUTSIDE) * 5 <= len(REPORTS)


def test_there_are_many_reports_of_both_kinds() -> None:
    count = Counter(report.works for report in REPORTS)
    assert len(REPORTS) >= 60
    assert count[True] >= 40
    assert count[False] >= 40


def test_every_report_names_its_source_and_its_day() -> None:
    for report in REPORTS:
        assert len(report.source) > 5, report.id
        assert len(report.why) > 20, report.id
        assert re.fullmatch(r"20[0-9]{2}(-[0-9]{2}){0,2}", report.as_of), report.id
        assert report.words, report.id


def test_no_report_is_told_twice() -> None:
    assert [name for name, count in Counter(report.id for report in REPORTS).items() if count > 1] == []
    told = Counter((tuple(sorted(report.words.items())), report.source) for report in REPORTS)
    assert [words for words, count in told.items() if count > 1] == []


def test_no_two_reports_contradict_each_other() -> None:
    seen: dict[tuple[tuple[str, str], ...], bool] = {}
    for report in WITHIN:
        assert seen.setdefault(tuple(sorted(report.words.items())), report.works) is report.works, report.id


def test_many_rules_are_held_to_what_was_seen() -> None:
    rules = {rule for report in WITHIN for rule in judged(JUDGE, report).rules}
    assert len(rules) >= 15, sorted(rules)


def test_a_rule_that_says_the_opposite_of_what_was_seen_is_wrong() -> None:
    fails = next(report for report in WITHIN if not report.works)
    opposite = names.Report(fails.id, fails.words, True, fails.why, fails.source, fails.as_of, "")
    assert judged(JUDGE, opposite).wrong
    assert judged(JUDGE, opposite).reported == "works"


def test_that_nobody_looks_after_it_today_does_not_contradict_that_it_worked() -> None:
    report = names.Report("old", {"branch": "535", "engine": "vllm==0.11.2"}, True, "it ran", "a test", "2025", "")
    findings = JUDGE.findings(names.combination(JUDGE.catalog, report.words))
    assert "red" in {finding.level for finding in findings}
    assert judged(JUDGE, report).verdict == "works"
