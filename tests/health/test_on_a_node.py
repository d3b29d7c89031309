"""The probes as a node has them: a folder without the rest of gpuyard, run by the node's own Python."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpuyard.health import __main__ as program
from gpuyard.health import tools
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict

PROJECT = Path(__file__).parents[2]
HEALTH = PROJECT / "src/gpuyard/health"
ON_NODES = sorted(
    [*HEALTH.glob("*.py"), *(PROJECT / "plugins/modules").glob("*.py"), *PROJECT.glob("roles/*/files/*.py")]
)
PYTHONS = [sys.executable, *(["/usr/bin/python3"] if Path("/usr/bin/python3").exists() else [])]


@pytest.mark.parametrize("file", ON_NODES, ids=lambda file: file.name)
def test_what_runs_on_a_node_is_python_3_9(file: Path) -> None:
    ast.parse(file.read_text(), feature_version=(3, 9))


@pytest.mark.parametrize("file", sorted(HEALTH.glob("*.py")), ids=lambda file: file.name)
def test_a_probe_needs_the_standard_library_alone(file: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(".".join((node.module or "").split(".")[:2]))
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"gpuyard.health"}


def run(folder: Path, python: str, *requests: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [python, "-I", str(folder), json.dumps(requests)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "lib/gpuyard/health"
    folder.mkdir(parents=True)
    for file in HEALTH.glob("*.py"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("python", PYTHONS)
def test_the_folder_alone_gives_a_verdict(installed: Path, python: str, tmp_path: Path) -> None:
    code, verdict = run(installed, python, {"check": "check_gpu_count", "pci_root": str(tmp_path)})
    assert code == 1
    assert verdict["state"] == "Unhealthy"
    assert [check["check"] for check in verdict["checks"]] == ["check_gpu_count"]


def test_nothing_asked_is_not_health(installed: Path) -> None:
    assert run(installed, sys.executable) == (1, {"state": "Unhealthy", "checks": []})


def test_one_probe_that_breaks_does_not_keep_the_others_from_being_run(installed: Path, tmp_path: Path) -> None:
    _, verdict = run(
        installed,
        sys.executable,
        {"check": "check_gpu_count", "no_such_argument": 1},
        {"check": "check_of_the_moon"},
        {"check": "check_model_ready", "url": "http://127.0.0.1:1", "model": "m", "key_file": str(tmp_path / "none")},
    )
    first, second, third = verdict["checks"]
    assert "the probe itself failed: TypeError" in first["reason"]
    assert "there is no such check; known: " in second["reason"]
    assert "check_driver_version" in second["reason"]
    assert "the key cannot be read" in third["reason"]


def test_a_probe_that_hangs_is_cut_off_and_the_others_are_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.PROBES, "hang", lambda: time.sleep(30))
    monkeypatch.setitem(program.PROBES, "speak", lambda: Verdict("speak", HEALTHY, "well"))
    began = time.monotonic()
    assert program.run({"check": "hang"}, seconds=1) == Verdict("hang", UNHEALTHY, "the probe gave no answer in 1 s")
    assert time.monotonic() - began < 10
    assert program.run({"check": "speak"}, seconds=1).state == HEALTHY


def test_a_healthy_node_exits_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "LoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\nNRestarts=0\nResult=success"
    monkeypatch.setattr(tools, "ask", lambda *_: tools.Answer(True, text))
    assert program.main(['[{"check": "check_service_active", "unit": "x.service"}]']) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "Healthy"


def test_a_tool_that_hangs_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(tools, "HUNG", {})
    answer = tools.ask("sleep", "30")
    assert not answer.ok
    assert "did not answer in 0.2 s" in answer.text
    monkeypatch.setattr(tools, "DEADLINE_SECONDS", 60)
    assert tools.ask("sleep", "30") == tools.Answer(False, "sleep did not answer another question in 0.2 s")
