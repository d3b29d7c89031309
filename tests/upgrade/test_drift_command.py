"""The command `gpuyard drift`, over a playbook that is only words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gpuyard.cli import app
from gpuyard.cli import drift as command
from gpuyard.cli.play import Told

WELL = {"findings": [], "failed": "", "loaded": "580.126.20", "locked": "580.126.20", "next_kernel": "6.1.0-41-amd64"}
LOST = {
    "rule": "DRIFT-REBOOT",
    "found": "kernel 6.1.0-42-amd64 boots next",
    "why": "it would be lost",
    "change": "build",
}


@pytest.fixture
def finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the playbook find something on each node; nothing, where it does not come to write a file."""
    (tmp_path / "Pulumi.yaml").write_text("name: gpuyard\n")
    (tmp_path / ".gpuyard").mkdir()
    monkeypatch.chdir(tmp_path)
    result = tmp_path / command.RESULT
    result.write_text(json.dumps({"of-yesterday": WELL}))

    def find(nodes: dict[str, Any] | None) -> None:
        def played(*words: Any) -> Told:
            assert words == (tmp_path, "lab", "check_drift", [])
            if nodes is not None:
                result.write_text(json.dumps(nodes))
            return Told(rc=2, failures=["GATE: nobody is there"])

        monkeypatch.setattr(command, "played", played)

    return find


def drift(*words: str) -> Result:
    return CliRunner().invoke(app, ["drift", *words])


def test_a_fleet_that_is_as_locked_ends_with_0(finding: Any) -> None:
    finding({"lab-chat-0": WELL})
    done = drift()
    assert done.exit_code == 0
    assert "580.126.20" in done.stdout


def test_drift_is_told_node_by_node_and_ends_with_1(finding: Any) -> None:
    finding({"lab-chat-0": WELL, "lab-chat-1": {**WELL, "findings": [LOST]}})
    done = drift()
    assert done.exit_code == 1
    assert "lab-chat-1: DRIFT-REBOOT: kernel 6.1.0-42-amd64 boots next: it would be lost; build" in done.stdout
    [row] = [line for line in done.stdout.splitlines() if "lab-chat-0" in line]
    assert "no" in row.split()


def test_a_node_that_was_not_reached_is_not_well(finding: Any) -> None:
    finding({"lab-chat-0": {"findings": [], "failed": "not reached"}})
    done = drift("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"lab-chat-0": {"findings": [], "failed": "not reached"}}


def test_what_an_earlier_run_found_does_not_pass_for_an_answer(finding: Any) -> None:
    finding(None)
    done = drift("--json")
    assert done.exit_code == 3
    refused = json.loads(done.stdout)["refused"]
    assert (refused["rule"], refused["found"]) == ("DRIFT-UNKNOWN", "GATE: nobody is there")
