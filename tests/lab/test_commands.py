"""The commands `gpuyard lab …` over a lab that is only words."""

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gpuyard.cli import app
from gpuyard.cli import lab as commands
from gpuyard.lab.models import LabRef, NodeSpec, NodeState

from .conftest import PROJECT

NODES = [
    NodeState(name=name, address=f"10.77.0.{n}", running=running, spec=NodeSpec(name=name, role=role))
    for n, name, role, running in [
        (10, "lab-gateway-0", "gateway", True),
        (20, "lab-chat-0", "gpu", True),
        (21, "lab-chat-1", "gpu", False),
    ]
]
SAID: dict[str, dict[str, Any]] = {
    "lab-gateway-0": {"driver": None, "engines": {}, "servers": {"lab-chat-0": "UP", "lab-chat-1": "DOWN"}},
    "lab-chat-0": {"driver": "580.126.20", "engines": {"smol": "active"}, "servers": {}},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Pulumi.yaml").write_text("name: gpuyard\n")
    (tmp_path / "fleets").mkdir()
    (tmp_path / "fleets/lab.yaml").write_text((PROJECT / "fleets/lab.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nodes(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def ask_node(_: LabRef, node: NodeState) -> dict[str, Any]:
        assert node.running, "a node that does not run is not asked"
        return SAID[node.name]

    monkeypatch.setattr(commands.agent, "nodes_read", lambda _: NODES)
    monkeypatch.setattr(commands, "ask_node", ask_node)
    return project


def lab(*words: str) -> Result:
    return CliRunner().invoke(app, ["lab", *words])


def test_status_tells_of_each_node_what_it_runs_and_what_the_gateway_thinks(nodes: Path) -> None:
    done = lab("status", "--json")
    rows = {row["node"]: row for row in json.loads(done.stdout)}
    assert rows["lab-chat-0"] == {
        "node": "lab-chat-0",
        "role": "gpu",
        "address": "10.77.0.20",
        "running": True,
        "driver": "580.126.20",
        "engines": {"smol": "active"},
        "gateway": "UP",
    }
    assert rows["lab-chat-1"]["gateway"] == "DOWN"
    assert done.exit_code == 1, "a node that is down is a finding"


def test_status_is_a_table_for_people(nodes: Path) -> None:
    text = lab("status").stdout
    assert all(node.name in text for node in NODES)
    assert "smol active" in text


def test_a_lab_without_nodes_is_refused_with_what_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.agent, "nodes_read", lambda _: [])
    done = lab("status")
    assert done.exit_code == 3
    assert "gpuyard lab up" in done.stderr


def test_an_unknown_node_is_wrong_usage_and_the_nearest_is_offered(nodes: Path) -> None:
    done = lab("ssh", "lab-chatt-0", "--", "true")
    assert done.exit_code == 2
    assert "did you mean lab-chat-0?" in done.stderr


def test_ssh_checks_the_host_key_and_reads_nothing_of_the_users_own_configuration(
    nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def execvp(_: str, words: list[str]) -> None:
        ran.extend(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", execvp)
    lab("ssh", "lab-chat-0", "--", "systemctl", "--failed")
    assert ran[:3] == ["ssh", "-F", "none"]
    assert "StrictHostKeyChecking=yes" in ran
    assert f"UserKnownHostsFile={nodes}/.gpuyard/labs/lab/ssh/known_hosts" in ran
    assert ran[-3:] == ["root@10.77.0.20", "systemctl", "--failed"]


def test_outside_of_a_project_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPUYARD_PROJECT", raising=False)
    done = lab("status")
    assert done.exit_code == 3
    assert "LAB-PROJECT" in done.stderr


# --- the walk --------------------------------------------------------------------------------------------


@pytest.fixture
def tools(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tools that write down how they were called; `fails` names the one that fails."""
    bin_ = project / "bin"
    bin_.mkdir()
    for name in ("pulumi", "ansible-playbook"):
        (bin_ / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >> {project}/calls\n[ "$1 $2" = "stack ls" ] && cat {project}/stacks\n'
            f'[ -e {project}/fails ] && case "{name} $*" in *"$(cat {project}/fails)"*) exit 7;; esac\nexit 0\n'
        )
        (bin_ / name).chmod(0o755)
    (project / "stacks").write_text('[{"name": "organization/gpuyard/lab"}]')
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "answer_of", lambda *_: "The capital of France is Paris.")
    monkeypatch.setattr(commands, "status_of", lambda _: [])
    return project


def calls(project: Path) -> list[str]:
    return (project / "calls").read_text().splitlines() if (project / "calls").is_file() else []


def test_up_walks_the_ordinary_commands_prints_each_and_ends_with_the_answer(tools: Path) -> None:
    done = lab("up")
    assert done.exit_code == 0, done.output
    assert calls(tools) == [
        "pulumi stack select --create lab",
        "pulumi up --yes --skip-preview --stack lab",
        "ansible-playbook -i inventories/lab playbooks/site.yml",
        "ansible-playbook -i inventories/lab playbooks/verify.yml",
    ]
    assert all(f"↳ {call}" in done.stdout for call in calls(tools))
    assert "The capital of France is Paris." in done.stdout
    assert "time: provision" in done.stdout.splitlines()[-1]


def test_up_stops_at_the_first_command_that_fails_and_names_it(tools: Path) -> None:
    (tools / "fails").write_text("site.yml")
    done = lab("up")
    assert done.exit_code == 1
    assert "playbooks/site.yml` ended with 7" in done.stderr
    assert calls(tools)[-1].endswith("site.yml")


def test_up_without_an_activated_environment_says_which_line_is_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = lab("up")
    assert done.exit_code == 3
    assert ". ./activate" in done.stderr


def lock_of(project: Path, pid: int) -> None:
    locks = project / ".gpuyard/pulumi/.pulumi/locks/organization/gpuyard/lab"
    locks.mkdir(parents=True)
    (locks / "1.json").write_text(json.dumps({"pid": pid, "hostname": socket.gethostname()}))


def test_the_lock_of_a_killed_update_is_taken_away(tools: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock_of(tools, ended.pid)
    assert lab("up").exit_code == 0
    assert "pulumi cancel --yes --stack lab" in calls(tools)


def test_the_lock_of_a_living_update_is_left_alone(tools: Path) -> None:
    (tools / "bin/living").mkdir()
    # A process is known by its name, so one of this name stands in for the living update.
    (tools / "bin/living/pulumi").symlink_to("/bin/sleep")
    with subprocess.Popen([str(tools / "bin/living/pulumi"), "60"]) as living:
        try:
            lock_of(tools, living.pid)
            lab("up")
            assert not [call for call in calls(tools) if "cancel" in call]
        finally:
            living.kill()


@pytest.mark.parametrize("fails", [False, True])
def test_down_destroys_the_stack_and_sweeps_in_any_case(
    tools: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    swept: list[LabRef] = []
    monkeypatch.setattr(commands.agent, "lab_down", swept.append)
    if fails:
        (tools / "fails").write_text("destroy")
    done = lab("down")
    assert "pulumi destroy --yes --skip-preview --stack lab" in calls(tools)
    assert [ref.stack for ref in swept] == ["lab"]
    assert done.exit_code == (1 if fails else 0)


def test_down_of_a_stack_that_was_never_made_only_sweeps(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[LabRef] = []
    monkeypatch.setattr(commands.agent, "lab_down", swept.append)
    (tools / "stacks").write_text("[]")
    assert lab("down").exit_code == 0
    assert not [call for call in calls(tools) if "destroy" in call]
    assert swept


# --- asking ------------------------------------------------------------------------------------------------


class Gateway(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = self.headers["Authorization"] == "Bearer good-key"
        said = {"choices": [{"message": {"content": f" {body['messages'][0]['content']} {body['model']} "}}]}
        text = json.dumps(said if good else {"error": "who are you?"}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Quiet: what is asked is no news here."""


@pytest.fixture
def gateway(project: Path) -> Iterator[Path]:
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        spec = project / "fleets/lab.yaml"
        spec.write_text(spec.read_text().replace("port: 8080", f"port: {server.server_address[1]}"))
        key = project / ".gpuyard/secrets/lab/api_key"
        key.parent.mkdir(parents=True)
        key.write_text("good-key\n")
        yield project
        server.shutdown()
        thread.join(10)


def test_a_question_goes_to_the_first_model_with_the_key_of_the_fleet(gateway: Path) -> None:
    assert lab("ask", "Why?").stdout == "Why? smollm2-135m-instruct\n"


def test_a_key_that_the_gateway_does_not_know_is_told_and_not_shown(gateway: Path) -> None:
    (gateway / ".gpuyard/secrets/lab/api_key").write_text("wrong-key")
    done = lab("ask", "Why?")
    assert done.exit_code == 3
    assert "the gateway answers 401: " in done.stderr
    assert "wrong-key" not in done.output


def test_without_a_key_or_a_gateway_the_cause_is_told(gateway: Path) -> None:
    spec = gateway / "fleets/lab.yaml"
    (gateway / ".gpuyard/secrets/lab/api_key").rename(gateway / "key")
    assert "LAB-KEY" in lab("ask").stderr
    (gateway / "key").rename(gateway / ".gpuyard/secrets/lab/api_key")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        text = spec.read_text()
        spec.write_text(text[: text.rindex("port: ")] + f"port: {port}\n  max_body_mib: 8\n")
        assert "LAB-ASK" in lab("ask").stderr
