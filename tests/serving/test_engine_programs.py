"""The programs around an engine: who holds its GPU, when it is ready, what it was started from, how it is installed."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugins.module_utils import engine_inputs
from plugins.modules import engine_units
from tests.programs import program
from tests.serving.conftest import PROJECT

gpu_holders = program("vllm_server/files/gpu_holders.py")
engine_ready = program("vllm_server/files/engine_ready.py")

# --- who holds a GPU


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path / "proc"


def process(proc: Path, pid: int, unit: str, command: list[str], *opened: str) -> None:
    home = proc / str(pid)
    (home / "fd").mkdir(parents=True)
    for number, name in enumerate(opened):
        (home / "fd" / str(number)).symlink_to(name)
    (home / "cgroup").write_text(f"0::/system.slice/{unit}\n")
    (home / "cmdline").write_bytes(b"\0".join(word.encode() for word in command) + b"\0")


def held(proc: Path, wanted: set[str] | None = None, *allowed: str) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(found.pid, found.unit, found.devices) for found in gpu_holders.holders(proc, wanted, set(allowed))]


def test_a_process_that_holds_a_gpu_is_named_with_its_unit(proc: Path) -> None:
    process(proc, 41, "train.service", ["python3", "train.py"], "/dev/nvidia3", "/dev/nvidia0", "/dev/nvidiactl")
    process(proc, 42, "ssh.service", ["sshd"], "/dev/null", "/dev/nvidiactl", "socket:[7]")
    assert held(proc) == [(41, "train.service", ("/dev/nvidia0", "/dev/nvidia3"))]


def test_a_unit_that_holds_gpus_by_design_is_no_finding(proc: Path) -> None:
    process(proc, 41, "nvidia-persistenced.service", ["nvidia-persistenced"], "/dev/nvidia0")
    assert held(proc, None, "nvidia-persistenced.service") == []


def test_only_the_gpus_an_engine_is_given_count(proc: Path) -> None:
    process(proc, 41, "vllm@other.service", ["python"], "/dev/nvidia0")
    assert held(proc, gpu_holders.visible("1,2")) == []
    assert held(proc, gpu_holders.visible("0,1")) == [(41, "vllm@other.service", ("/dev/nvidia0",))]


def test_gpus_given_by_a_name_that_is_no_number_all_count() -> None:
    assert gpu_holders.visible("GPU-4f2a") is None
    assert gpu_holders.visible("") is None


def test_a_process_that_ends_meanwhile_is_no_finding(proc: Path) -> None:
    (proc / "77").mkdir()
    assert held(proc) == []


def test_the_refusal_says_pid_command_unit_and_how_to_end_it(proc: Path) -> None:
    process(proc, 41, "train.service", ["python3", "train.py", "--token", "hf_secret"], "/dev/nvidia0")
    done = subprocess.run(
        ["python3", str(PROJECT / "roles/vllm_server/files/gpu_holders.py"), "--proc", str(proc)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    for part in ("GPU-BUSY", "/dev/nvidia0", "process 41", "python3 train.py", "systemctl stop train.service"):
        assert part in done.stderr
    assert "hf_secret" not in done.stderr


# --- when an engine is ready


class FakeEngine:
    """Answers as an engine does; what is not ready yet is told by `states`, one for each look at /health."""

    def __init__(self, states: list[str]) -> None:
        self.states = states
        self.looks = 0
        self.keys: set[str | None] = set()
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Tests are silent."""

            def reply(self, status: int, body: object) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                engine.keys.add(self.headers["Authorization"])
                state = engine.states[min(engine.looks, len(engine.states) - 1)]
                if self.path == "/health":
                    engine.looks += state != "serving"
                    self.reply(503 if state == "starting" else 200, {})
                else:
                    self.reply(200, {"data": [{"id": "other" if state == "unlisted" else "tiny"}]})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                state = engine.states[min(engine.looks, len(engine.states) - 1)]
                self.reply(500 if state == "mute" else 200, {"choices": [{"text": "Hi"}]})

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[FakeEngine]:
    running = FakeEngine(request.param)
    yield running
    running.server.shutdown()
    running.server.server_close()


def wait(port: int, pid: int | None = None, seconds: float = 10.0, first_token: float = 10.0) -> int:
    asked = engine_ready.Engine(port, "key", 5)
    return engine_ready.wait(asked, "tiny", pid or os.getpid(), seconds, first_token, pause=0.01)


@pytest.mark.parametrize("engine", [["starting", "starting", "serving"]], indirect=True)
def test_an_engine_is_ready_when_it_generated_a_token(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert wait(engine.port) == 0
    told = capsys.readouterr().out
    assert "answers 503" in told
    assert "first token 'Hi'" in told
    assert engine.keys == {"Bearer key"}


@pytest.mark.parametrize("engine", [["unlisted"], ["mute"], ["starting"]], indirect=True)
def test_an_engine_that_is_healthy_and_no_more_is_not_ready(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wait(engine.port, seconds=0.2) == 1
    assert "SERVE-READY" in capsys.readouterr().out


@pytest.mark.parametrize("engine", [["starting", "unlisted"], ["mute"]], indirect=True)
def test_an_engine_that_is_healthy_and_silent_is_not_waited_for_as_one_that_loads(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wait(engine.port, seconds=60, first_token=0.2) == 1
    assert "SERVE-SILENT: tiny has been healthy for" in capsys.readouterr().out


@pytest.mark.parametrize("engine", [["starting"]], indirect=True)
def test_an_engine_that_still_loads_has_its_time(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert wait(engine.port, seconds=0.3, first_token=0) == 1
    assert "SERVE-READY" in capsys.readouterr().out


def test_an_engine_that_has_died_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    began = time.monotonic()
    assert wait(1, pid=dead.pid, seconds=60) == 1
    assert time.monotonic() - began < 10
    assert "SERVE-DIED" in capsys.readouterr().out


# --- what an engine was started from


@pytest.fixture
def node(tmp_path: Path) -> Path:
    for name in (
        "etc/systemd/system/vllm@.service",
        "etc/systemd/system/vllm@tiny.service.d/gpuyard.conf",
        "etc/vllm/tiny.yaml",
        "etc/vllm/tiny.env",
        "etc/vllm/credentials/tiny.key",
        "usr/local/lib/gpuyard/engine_run",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    return tmp_path


def test_an_engine_runs_on_its_files_until_one_of_them_changes(node: Path) -> None:
    engine_inputs.record("tiny", node)
    assert engine_inputs.changed("tiny", node) == []
    (node / "etc/vllm/tiny.yaml").write_text("2")
    (node / "etc/systemd/system/vllm@tiny.service.d/more.conf").write_text("x")
    assert engine_inputs.changed("tiny", node) == [
        "/etc/systemd/system/vllm@tiny.service.d/more.conf",
        "/etc/vllm/tiny.yaml",
    ]


def test_a_file_that_went_is_a_change(node: Path) -> None:
    engine_inputs.record("tiny", node)
    (node / "etc/vllm/tiny.env").unlink()
    assert engine_inputs.changed("tiny", node) == ["/etc/vllm/tiny.env"]


def test_an_engine_without_a_record_counts_as_changed(node: Path) -> None:
    assert len(engine_inputs.changed("tiny", node)) == 6


def test_the_record_is_for_root_alone_because_it_tells_of_the_key(node: Path) -> None:
    engine_inputs.record("tiny", node)
    assert engine_inputs.record_file("tiny", node).stat().st_mode & 0o777 == 0o600


RUNNING = {"ActiveState": "active", "SubState": "running", "NeedDaemonReload": "no"}


@pytest.mark.parametrize(
    ("state", "differing", "expected"),
    [
        (RUNNING, [], ([], [])),
        (RUNNING, ["/etc/vllm/tiny.yaml"], ([], ["tiny"])),
        ({**RUNNING, "NeedDaemonReload": "yes"}, [], ([], ["tiny"])),
        ({**RUNNING, "ActiveState": "inactive", "SubState": "dead"}, ["x"], (["tiny"], [])),
        ({**RUNNING, "ActiveState": "failed", "SubState": "failed"}, [], (["tiny"], [])),
        ({**RUNNING, "ActiveState": "activating", "SubState": "start-post"}, [], (["tiny"], [])),
        ({**RUNNING, "ActiveState": "activating", "SubState": "start-post"}, ["x"], ([], ["tiny"])),
        ({**RUNNING, "ActiveState": "activating", "SubState": "auto-restart"}, ["x"], (["tiny"], [])),
    ],
)
def test_an_engine_is_started_restarted_or_left_alone(
    state: dict[str, str], differing: list[str], expected: tuple[list[str], list[str]]
) -> None:
    start, restart = engine_units.plan(["tiny"], {"tiny": state}, {"tiny": differing})
    assert (start, list(restart)) == expected


# --- how an engine is installed

FAKE_UV = """#!/bin/sh
# Stands for uv: makes the folders that uv makes, notes each call, and fails where FAIL says so.
echo "$*" >>"$CALLS"
case "$1 $2" in
"cache dir") echo "$CACHE" ;;
"venv --quiet")
    for last; do :; done
    mkdir -p "$last/bin" "$last/lib"
    ln -s /usr/bin/python3 "$last/bin/python"
    ;;
"pip install") [ -z "$FAIL" ] || exit 1 ;;
esac
"""


class Installer:
    """engine_install.sh with a pretended uv."""

    def __init__(self, folder: Path) -> None:
        self.env_dir = folder / "engines/vllm-1"
        self.requirements = folder / "requirements.txt"
        self.requirements.write_text("vllm==1\n")
        self.uv = folder / "uv"
        self.uv.write_text(FAKE_UV)
        self.uv.chmod(0o755)
        self.calls = folder / "calls"
        self.environment = {**os.environ, "CALLS": str(self.calls), "CACHE": str(folder / "cache"), "FAIL": ""}

    def run(self, *arguments: str, fail: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                str(PROJECT / "roles/vllm_server/files/engine_install.sh"),
                *(arguments or (str(self.env_dir), str(self.requirements), str(self.uv))),
            ],
            env={**self.environment, "FAIL": "1" if fail else ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def installer(tmp_path: Path) -> Installer:
    return Installer(tmp_path)


def test_an_engine_is_installed_once(installer: Installer) -> None:
    first = installer.run()
    assert (first.returncode, first.stdout.splitlines()[-1]) == (0, "installed"), first.stderr
    marker = installer.env_dir / ".gpuyard-engine"
    assert marker.read_text().strip() == hashlib.sha256(installer.requirements.read_bytes()).hexdigest()
    calls = installer.calls.read_text()
    assert "--require-hashes --no-deps" in calls
    assert installer.run().stdout.strip() == "unchanged"
    assert installer.calls.read_text() == calls


def test_an_install_that_failed_leaves_nothing_that_passes_for_an_engine(installer: Installer) -> None:
    assert installer.run(fail=True).returncode != 0
    assert not installer.env_dir.exists()
    assert installer.run().stdout.splitlines()[-1] == "installed"
    assert not installer.env_dir.with_name("vllm-1.partial").exists()


def test_an_environment_of_other_requirements_is_built_anew(installer: Installer) -> None:
    installer.run()
    (installer.env_dir / "stranger").touch()
    installer.requirements.write_text("vllm==2\n")
    assert installer.run().stdout.splitlines()[-1] == "installed"
    assert not (installer.env_dir / "stranger").exists()


@pytest.mark.parametrize(
    ("position", "value", "rule"),
    [(0, "relative/path", "ENGINE-PATH"), (1, "/nowhere.txt", "ENGINE-REQUIREMENTS"), (2, "/nowhere", "ENGINE-UV")],
)
def test_an_argument_that_cannot_work_is_refused_by_name(
    installer: Installer, position: int, value: str, rule: str
) -> None:
    arguments = [str(installer.env_dir), str(installer.requirements), str(installer.uv)]
    arguments[position] = value
    done = installer.run(*arguments)
    assert (done.returncode, done.stderr.split(":")[0]) == (2, rule)
    assert value in done.stderr
