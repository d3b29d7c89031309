"""What a record says of its run, the page made of it, and what a watched playbook tells."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpuyard.cli import app
from gpuyard.cli.play import Told, played
from gpuyard.cli.rollout import runbook
from gpuyard.cli.upgrade import last_change, the_run, words_of
from gpuyard.upgrade import record
from gpuyard.upgrade.record import RecordError
from gpuyard.upgrade.report import html
from gpuyard.upgrade.runs import AT_REST, out_of_rotation, run_of, typical
from plugins.module_utils import node_upgrade

PROJECT = Path(__file__).resolve().parents[2]
BEGAN = datetime(2026, 11, 1, 12, tzinfo=UTC)
CLAIM = {
    "event": "claimed",
    "run": "20261101T120000Z-driver-aaaa",
    "fleet": "prod",
    "kind": "driver",
    "target": "590.44.01",
    "operator": {"name": "anna", "host": "desk", "pid": 7, "started": "b/1"},
    "result": "",
    "policy": {"canary": "1", "max_unavailable": "25%", "accept_downtime": False},
    "limit": "",
    "soak_seconds": "600",
    "soak_every": "30",
    "back": False,
    "allow_downgrade": False,
}
GOOD = [
    ("upgrade-required", 0),
    ("drain-required", 10),
    ("driver-install-required", 15),
    ("validation-required", 75),
    ("uncordon-required", 95),
    ("soak-required", 96),
    ("upgrade-done", 696),
]
BAD = [*GOOD[:4], ("rollback-required", 80), ("rollback-done", 140)]


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock for the record."""

    class Clock:
        seconds = 0.0

        @classmethod
        def now(cls, _zone: Any) -> datetime:
            return BEGAN + timedelta(seconds=cls.seconds)

    monkeypatch.setattr(record, "datetime", Clock)
    return Clock


def recorded(path: Path, moment: Any, walks: dict[str, list[tuple[str, float]]], result: str = "done") -> Path:
    file = path / "runs" / str(CLAIM["run"]) / "record.jsonl"
    moment.seconds = 0
    record.append(file, CLAIM)
    events = sorted((at, node, state) for node, walk in walks.items() for state, at in walk)
    for at, node, state in events:
        moment.seconds = at
        reason = "APT-FAILED: <dkms> said no" if "rollback" in state else ""
        told = {"node": node, "state": state, "attempts": 1, "reason": reason}
        record.append(file, {"event": "state", **told, "previous": "580.105.08", "target": "590.44.01"})
    if result:
        moment.seconds += 1
        record.append(file, {**CLAIM, "event": "released", "result": result})
    return file


def test_a_run_is_read_from_its_record(tmp_path: Path, moment: Any) -> None:
    run = run_of(recorded(tmp_path, moment, {"n0": GOOD, "n1": BAD}, "halted"))
    assert (run.result, run.operators, run.ended) == ("halted", ("anna@desk",), BEGAN + timedelta(seconds=697))
    assert {name: walk.state for name, walk in run.walks.items()} == {"n0": "upgrade-done", "n1": "rollback-done"}
    assert out_of_rotation(run.walks["n0"]) == 86
    assert out_of_rotation(run.walks["n1"]) == 130
    told = run.as_dict()
    assert told["nodes"]["n0"]["seconds"]["driver-install-required"] == 60
    assert told["nodes"]["n1"]["reason"].startswith("APT-FAILED")
    # What failed says nothing of how long it usually takes.
    assert typical([run])["validation-required"] == 20


def test_a_run_that_nobody_ended_is_open(tmp_path: Path, moment: Any) -> None:
    run = run_of(recorded(tmp_path, moment, {"n0": GOOD[:3]}, ""))
    assert (run.result, run.ended, run.walks["n0"].stays[-1].seconds) == ("", None, None)
    assert 'class="open"' in html(run, BEGAN + timedelta(seconds=60))


def test_a_step_taken_up_again_is_one_stay(tmp_path: Path, moment: Any) -> None:
    file = recorded(tmp_path, moment, {"n0": GOOD[:3]}, "")
    moment.seconds = 500
    again = {**CLAIM, "operator": {**CLAIM["operator"], "name": "bert"}}
    record.append(file, again)
    told = {"node": "n0", "state": "driver-install-required", "attempts": 2, "reason": ""}
    record.append(file, {"event": "state", **told, "previous": "580.105.08", "target": "590.44.01"})
    run = run_of(file)
    assert run.operators == ("anna@desk", "bert@desk")
    assert (run.walks["n0"].attempts, len(run.walks["n0"].stays)) == (2, 3)


def test_the_page_tells_all_and_runs_nothing(tmp_path: Path, moment: Any) -> None:
    run = run_of(recorded(tmp_path, moment, {"n0": GOOD, "<n1>": BAD}, "halted"))
    page = html(run)
    for told in (run.id, run.head, "580.105.08", "590.44.01", "halted", "driver-install-required", "1 min 26 s"):
        assert told in page
    assert "&lt;n1&gt;" in page and "&lt;dkms&gt;" in page
    assert "<script" not in page and "http" not in page


def test_states_of_rest_are_those_of_the_table() -> None:
    assert AT_REST == node_upgrade.AT_REST


def test_every_state_that_a_node_may_be_left_in_has_a_page() -> None:
    told = Told(notes={state: {"state": state} for table in node_upgrade.TABLES.values() for state in table})
    pages = {"on-the-way", "upgrade-required", "rollback-done", "rollback-failed"}
    assert set(runbook(PROJECT, told)) == {f"docs/runbook/{page}.md" for page in pages}


def test_an_edited_record_is_no_run(tmp_path: Path, moment: Any) -> None:
    file = recorded(tmp_path, moment, {"n0": GOOD})
    file.write_text(file.read_text().replace('"attempts":1', '"attempts":2', 1))
    with pytest.raises(RecordError, match="RECORD-BROKEN"):
        run_of(file)


def test_a_run_that_found_nothing_to_do_is_nothing_to_go_back_from(tmp_path: Path, moment: Any) -> None:
    """`gpuyard upgrade driver`, again to see that all is done, and then back: back from the first one."""
    recorded(tmp_path / ".gpuyard", moment, {"n0": GOOD})
    empty = tmp_path / ".gpuyard/runs/20261102T120000Z-driver-bbbb/record.jsonl"
    claim = {**CLAIM, "run": empty.parent.name}
    record.append(empty, claim)
    record.append(empty, {**claim, "event": "released", "result": "done"})
    assert the_run(tmp_path, None).id == claim["run"]
    assert last_change(tmp_path).id == CLAIM["run"]


def test_a_resumed_run_is_asked_for_as_it_was(tmp_path: Path, moment: Any) -> None:
    words = words_of(run_of(recorded(tmp_path, moment, {"n0": GOOD[:3]}, "")))
    assert words == {
        "upgrade_canary": "1",
        "upgrade_max_unavailable": "25%",
        "upgrade_soak_seconds": "600",
        "upgrade_soak_every": "30",
    }


# --- the commands ---


@pytest.fixture
def project(tmp_path: Path, moment: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Pulumi.yaml").write_text("")
    recorded(tmp_path / ".gpuyard", moment, {"n0": GOOD, "n1": BAD}, "halted")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_and_shown(project: Path) -> None:
    (listed,) = json.loads(CliRunner().invoke(app, ["runs", "--json"]).stdout)
    assert (listed["run"], listed["result"]) == (CLAIM["run"], "halted")
    shown = CliRunner().invoke(app, ["runs", "show", "--report", "page.html"])
    assert shown.exit_code == 0
    assert "rollback-done" in shown.stdout
    assert "<!doctype html>" in (project / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["runs", "show", "never"], "RECORD-MISSING"),
        (["upgrade", "driver", "--yes", "--stack", "none"], "CLI-INVENTORY"),
        (["upgrade", "rollback", "never"], "RECORD-MISSING"),
        (["upgrade", "resume", "never"], "RECORD-MISSING"),
    ],
)
def test_what_cannot_be_is_refused_by_its_rule(project: Path, words: list[str], rule: str) -> None:
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, rule in refused.stderr) == (3, True), refused.stderr


@pytest.mark.parametrize("soak", ["ten", "10d", "-1", ""])
def test_a_time_is_a_number_and_a_unit(project: Path, soak: str) -> None:
    assert CliRunner().invoke(app, ["upgrade", "driver", "--soak", soak]).exit_code == 2


# --- a playbook, watched ---


def test_a_watched_playbook_tells_its_plan_its_refusal_and_keeps_what_it_printed(tmp_path: Path) -> None:
    """With the real ansible-runner: its events are what the live view lives on."""
    (tmp_path / "inventories/here").mkdir(parents=True)
    (tmp_path / "inventories/here/hosts.yaml").write_text("all: {hosts: {here: {ansible_connection: local}}}\n")
    (tmp_path / "playbooks/operate").mkdir(parents=True)
    (tmp_path / "playbooks/operate/some.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        "    - {name: Print the plan, ansible.builtin.debug: {msg: [run x, 'canary 1: here']}}\n"
        "    - {name: Look, ansible.builtin.fail: {msg: 'UPGRADE-NOTHING: there is none'}}\n"
    )
    told = played(tmp_path, "here", "some", [])
    assert (told.rc, told.plan, told.doing) == (2, ["run x", "canary 1: here"], {"here": "Look"})
    assert told.failures == ["UPGRADE-NOTHING: there is none"]
    assert "PLAY RECAP" in told.output.read_text()
    assert [path.name for path in (tmp_path / ".gpuyard").iterdir()] == ["ansible-playbook.log"]


def test_a_node_that_moves_is_told_once() -> None:
    told = Told()
    note = {"state": "drain-required"}
    for action, result in (("gpuyard.fleet.node_upgrade", {"note": note}), ("gpuyard.fleet.rollout", {"claim": {}})):
        for _ in range(2):
            told.hear({"event": "runner_on_ok", "event_data": {"host": "n", "task_action": action, "res": result}})
    assert told.moved == [("n", "drain-required")]
