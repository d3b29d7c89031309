"""The run of all tests: what counts as a pass, what is said of the rest."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="a"/><testcase classname="t" name="b"><failure message="no">trace</failure></testcase>
<testcase classname="t" name="c"><error message="no">trace</error></testcase>
<testcase classname="t" name="d"><skipped type="pytest.skip" message="no zsh"/></testcase></testsuite></testsuites>"""


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    # By path: the standard library has a package of this name.
    spec = importlib.util.spec_from_file_location("gpuyard_parts", PROJECT / "tools/test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "setup_seconds", lambda: None)
    return module


def part(parts, name="one", run=lambda _: None, hindrance="", **more):
    return parts.Part(name, run, 60, lambda: hindrance, **more)


def test_the_counts_are_those_pytest_wrote_down(parts, tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    report = parts.read_junit(tmp_path / "junit.xml")
    assert (report.passed, report.failed, report.skipped) == (1, 2, ["t::d: no zsh"])
    assert report.failures == ["t::b: no", "t::c: no"]


def test_a_failed_part_keeps_no_other_from_running(parts, monkeypatch, capsys):
    first = part(parts, "first", lambda _: parts.Report(passed=3, failed=1))
    second = part(parts, "second", lambda _: parts.Report(passed=4))
    monkeypatch.setattr(parts, "PARTS", [first, second])
    assert parts.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 1 failed"


def test_what_failed_is_named_in_the_last_lines(parts, monkeypatch, capsys):
    bad = part(parts, "lab", lambda _: parts.Report(passed=3, failed=2, failures=["t::b: no", "t::c: no"]))
    monkeypatch.setattr(parts, "PARTS", [bad])
    assert parts.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "Failed:",
        "  lab: t::b: no",
        "  lab: t::c: no",
        "3 passed, 2 failed",
    ]


def test_what_was_not_run_is_listed_with_its_reason(parts, monkeypatch, capsys):
    skipping = part(parts, "unit", lambda _: parts.Report(passed=1, skipped=["t::d: no zsh"]))
    monkeypatch.setattr(parts, "PARTS", [skipping, part(parts, "lab", hindrance="needs root")])
    assert parts.main([]) == 0
    said = capsys.readouterr().out
    assert "  unit: t::d: no zsh" in said
    assert "  lab: needs root" in said


def test_in_ci_a_part_that_cannot_run_is_a_failure(parts, monkeypatch, capsys):
    monkeypatch.setattr(parts, "IN_CI", True)
    without_gpu = part(parts, "hardware", hindrance="no GPU", always_in_ci=False)
    monkeypatch.setattr(parts, "PARTS", [part(parts, "lab", hindrance="needs root"), without_gpu])
    assert parts.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize(("name", "always", "code"), [("lab", True, 1), ("unit", True, 1), ("hardware", False, 0)])
def test_in_ci_a_skipped_test_is_a_failure_where_ci_can_run_it(parts, monkeypatch, name, always, code):
    monkeypatch.setattr(parts, "IN_CI", True)
    holed = part(parts, name, lambda _: parts.Report(passed=1, skipped=["t::d: no lab"]), always_in_ci=always)
    monkeypatch.setattr(parts, "PARTS", [holed])
    assert parts.main([]) == code


@pytest.mark.parametrize(("code", "why"), [(5, "no test was found"), (2, "collecting failed"), (124, "time was over")])
def test_a_run_of_pytest_that_failed_outside_a_test_is_a_failure(parts, monkeypatch, code, why):
    monkeypatch.setattr(parts, "ended", lambda *_: code)
    assert parts.pytest("lab")(60).failed == 1, why


def test_a_command_that_does_not_end_is_ended(parts, capsys):
    assert parts.ended(["sleep", "1000"], 1) == 124
    assert "was stopped: it had 1 s" in capsys.readouterr().out


def test_a_slow_part_is_run_where_it_is_named_and_listed_where_it_is_not(parts, monkeypatch, capsys):
    slow = part(parts, "slow", lambda _: parts.Report(failed=1), always_in_ci=False, only_by_name="it is slow")
    monkeypatch.setattr(parts, "PARTS", [part(parts, run=lambda _: parts.Report(passed=1)), slow])
    assert parts.main([]) == 0
    assert "slow: it is slow" in capsys.readouterr().out
    assert parts.main(["slow"]) == 1


def test_without_qemu_its_part_says_what_is_missing_and_how_to_get_it(parts, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(parts, "system_path", lambda: "/nonexistent")
    assert parts.qemu_hindrance() == "qemu-system-x86_64, qemu-img not installed; run `make setup`"


def rehearsed(parts, monkeypatch, failing):
    """What came of three scenarios, and the last words of each command that was run for them."""
    ran = []

    def ended(command, _seconds, output, _more):
        ran.append([word for word in command if not word.startswith("--")][-1])
        output.write(f"what {ran[-1]} said\n")
        return int(ran[-1] == failing)

    monkeypatch.setattr(parts, "ended", ended)
    monkeypatch.setattr(parts, "scenarios", lambda: ["gateway", "lab_gpu", "node_gate"])
    return parts.molecule(60), ran


def test_a_scenario_that_fails_keeps_no_other_from_running_and_is_named(parts, monkeypatch, capsys):
    report, ran = rehearsed(parts, monkeypatch, failing="lab_gpu")
    assert (report.passed, report.failed, report.failures) == (2, 1, ["lab_gpu"])
    assert ran == ["destroy", "create", "gateway", "lab_gpu", "node_gate", "destroy"]
    said = capsys.readouterr().out
    # Told where it ran, and again behind what came of it.
    assert said.count("what lab_gpu said") == 2
    assert said.count("what gateway said") == 1
    assert re.search(r"^  lab_gpu +failed in .*\n    what lab_gpu said$", said, re.MULTILINE)
    assert re.search(r"^  node_gate +passed in", said, re.MULTILINE)


def test_without_nodes_no_scenario_is_run_and_what_was_made_of_them_is_removed(parts, monkeypatch):
    report, ran = rehearsed(parts, monkeypatch, failing="create")
    assert (report.passed, report.failed) == (0, 1)
    assert ran == ["destroy", "create", "destroy"]


BESIDE = """
import json, os, sys
print("said by", *sys.argv[1:])
report = {"passed": 2, "failed": 0, "skipped": [], "seconds": 1, "not_run": ""}
open(os.environ["GPUYARD_TEST_REPORTS"], "w").write(json.dumps({"good": report}))
"""


def test_parts_beside_the_others_count_and_one_without_a_report_has_failed(parts, monkeypatch, tmp_path, capsys):
    (tmp_path / "beside.py").write_text(BESIDE)
    monkeypatch.setattr(parts, "__file__", str(tmp_path / "beside.py"))
    others = [part(parts, name, beside=True) for name in ("good", "bad")]
    monkeypatch.setattr(parts, "PARTS", [*others, part(parts, "lab", lambda _: parts.Report(passed=1))])
    assert parts.main([]) == 1
    said = capsys.readouterr().out
    assert "said by good bad" in said
    assert said.splitlines()[-1] == "3 passed, 1 failed"
    rows = [line.split()[0] for line in said.splitlines() if re.match(r"(good|bad|lab) +(passed|failed)", line)]
    assert rows == ["good", "bad", "lab"]


def test_an_unknown_part_is_refused_with_those_there_are(parts, capsys):
    assert parts.main(["units"]) == 2
    assert "lint, unit, engine, lab, relock, qemu, contract, molecule, hardware" in capsys.readouterr().err
