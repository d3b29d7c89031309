"""The one door of the lab: who may pass, and what those hear who may not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.models import LabRef
from gpuyard.lab.place import Place

from .conftest import refused


@pytest.fixture
def ref(tmp_path: Path) -> LabRef:
    return LabRef(project=tmp_path, stack="lab")


def test_another_system_than_linux_is_refused(ref: LabRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with refused("LAB-OS"):
        agent.network_read(ref)


def test_without_root_and_sudo_the_exact_line_is_told(ref: LabRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def sudo(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "sudo: a password is required")

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "run", sudo)
    monkeypatch.setenv("USER", "ada")
    with refused("LAB-ROOT") as caught:
        agent.network_up(ref, 8080)
    line = f"echo 'ada ALL=(root) NOPASSWD: {sys.executable} -B -m gpuyard.lab' | sudo tee /etc/sudoers.d/gpuyard-lab"
    assert line in str(caught.value)
    assert "a password is required" in str(caught.value)


def test_without_root_the_call_goes_through_sudo_as_json_and_nothing_is_in_its_arguments(
    ref: LabRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def sudo(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        seen.update(command=command, request=json.loads(how["input"]))
        return subprocess.CompletedProcess(command, 0, '{"result": null}', "")

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "run", sudo)
    monkeypatch.setenv("GPUYARD_CACHE", "/home/ada/cache")
    assert agent.node_read(ref, "a-node") is None
    assert seen["command"] == ["sudo", "-n", sys.executable, "-B", "-m", "gpuyard.lab"]
    assert seen["request"]["arguments"] == {"name": "a-node"}
    assert seen["request"]["cache"] == "/home/ada/cache"  # root's own cache is another one


def test_a_refusal_keeps_its_rule_on_the_way_through_the_door(tmp_path: Path) -> None:
    state = tmp_path / ".gpuyard/labs/lab"
    state.mkdir(parents=True)
    (state / "lab.json").write_text("damaged")
    request = {
        "call": "network_read",
        "lab": {"project": str(tmp_path), "stack": "lab"},
        "cache": str(tmp_path),
        "arguments": {},
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpuyard.lab"], input=json.dumps(request), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["error"]["rule"] == "LAB-STATE"


def test_a_lab_that_was_never_made_is_not_there(ref: LabRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert agent.network_read(ref) is None
    assert agent.node_read(ref, "a-node") is None
    assert agent.nodes_read(ref) == []


def test_a_missing_program_is_named_with_the_line_that_installs_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None if program == "nft" else f"/usr/bin/{program}")
    with refused("LAB-TOOLS") as caught:
        host.refuse_what_cannot_work(place)
    assert "apt-get install -y nftables" in str(caught.value)


def test_a_missing_base_system_is_refused_before_anything_is_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    with refused("LAB-ROOTFS") as caught:
        host.refuse_what_cannot_work(place)
    assert "make setup" in str(caught.value)
    assert not place.state.exists()


def test_a_project_on_overlayfs_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.base_root / "usr").mkdir(parents=True)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(host, "run", lambda *_: subprocess.CompletedProcess([], 0, "overlay\n", ""))
    with refused("LAB-FS"):
        host.refuse_what_cannot_work(place)


def test_a_full_disk_is_refused_with_what_is_free(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.state.mkdir(parents=True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 30})())
    with refused("LAB-DISK") as caught:
        host.refuse_a_full_disk(place)
    assert "1.0 GiB free" in str(caught.value)
