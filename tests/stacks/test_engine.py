"""The lab's stack under the real engine. Only the machines are pretended."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard.handover import read_handover
from gpuyard.plan.lock import load_lock
from gpuyard.spec.loader import load_fleet
from tests.engine import REPOSITORY
from tests.stacks.conftest import LabStack
from tests.stacks.helpers import world

pytestmark = pytest.mark.engine


def test_a_fleet_comes_up_whole_and_hands_over_every_node(stack: LabStack):
    handover = read_handover(stack.handover())
    assert [node.name for node in handover.nodes] == ["lab-gateway-0", "lab-chat-0", "lab-chat-1"]
    assert handover.stack == "lab"
    assert handover.endpoint == "http://127.0.0.1:8080"
    assert handover.ssh.private_key_file == f"{stack.project}/ssh/id_ed25519"


def test_a_second_up_changes_nothing(stack: LabStack):
    before = stack.handover()
    assert stack.steps(stack.planned()) == {}
    assert stack.up() == []
    assert stack.handover() == before


def test_a_killed_node_and_a_wiped_one_are_seen_by_preview_and_mended_by_up(stack: LabStack):
    with world(stack.project) as found:
        found["nodes"]["lab-chat-1"]["running"] = False
        del found["nodes"]["lab-gateway-0"]
    planned = stack.planned()
    assert stack.steps(planned) == {"update": ["lab-chat-1", "lab-gateway-0"]}
    told = " ".join(diagnostic["message"] for diagnostic in planned["diagnostics"])
    assert "lab-chat-1 is not running" in told
    assert "lab-gateway-0 is gone" in told
    assert stack.up() == ["node_up lab-chat-1", "node_up lab-gateway-0"]


def test_a_broken_network_is_mended_and_no_node_is_touched(stack: LabStack):
    with world(stack.project) as found:
        found["network"]["healthy"] = False
    assert stack.steps(stack.planned()) == {"update": ["lab-network"]}
    assert stack.up() == ["network_up 8080"]


def test_another_pool_size_adds_and_removes_just_those_nodes(stack: LabStack):
    stack.ask_for(3)
    assert stack.steps(stack.planned())["create"] == ["lab-chat-2"]
    assert stack.up() == ["node_up lab-chat-2"]
    assert len(stack.handover()["nodes"]) == 4
    stack.ask_for(1)
    assert stack.steps(stack.planned())["delete"] == ["lab-chat-1", "lab-chat-2"]
    assert stack.up() == ["node_down lab-chat-1", "node_down lab-chat-2"]
    assert [node["name"] for node in stack.handover()["nodes"]] == ["lab-gateway-0", "lab-chat-0"]


def test_other_gpus_are_another_node_and_the_old_one_goes_first(stack: LabStack):
    spec = stack.project / "fleets/lab.yaml"
    spec.write_text(spec.read_text().replace("gpus_per_node: 8", "gpus_per_node: 4"))
    with world(stack.project) as found:
        found["calls"] = []
    stack.done("up", "--yes", "--skip-preview")
    with world(stack.project) as found:
        for node in ("lab-chat-0", "lab-chat-1"):
            acts = [call for call in found["calls"] if call.endswith(node)]
            assert acts == [f"node_down {node}", f"node_up {node}"]
        assert not any("gateway" in call or "network" in call for call in found["calls"])
    assert {node["gpu_count"] for node in stack.handover()["nodes"]} == {0, 4}


def test_refresh_sees_a_killed_node_and_a_wiped_one(stack: LabStack):
    with world(stack.project) as found:
        found["nodes"]["lab-chat-0"]["running"] = False
        del found["nodes"]["lab-chat-1"]
    stack.done("refresh", "--yes")
    state = stack.state()
    assert state["lab-chat-0"]["outputs"]["running"] is False
    assert state["lab-gateway-0"]["outputs"]["running"] is True
    assert "lab-chat-1" not in state
    assert stack.up() == ["node_up lab-chat-0", "node_up lab-chat-1"]


def test_destroy_removes_the_nodes_before_the_network(stack: LabStack):
    with world(stack.project) as found:
        found["calls"] = []
    stack.done("destroy", "--yes", "--skip-preview")
    with world(stack.project) as found:
        assert sorted(found["calls"][:-1]) == [
            "node_down lab-chat-0",
            "node_down lab-chat-1",
            "node_down lab-gateway-0",
        ]
        assert found["calls"][-1] == "network_down"
        assert not found["nodes"]
    assert stack.state() == {}


def test_a_refusal_of_the_lab_is_told_without_frames(empty: LabStack):
    with world(empty.project) as found:
        found["busy_port"] = 8080
    refused = empty.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert "LAB-PORT: port 8080 is in use; set another gateway.port, e.g. 8090" in refused.stdout
    assert ".py" not in refused.stdout


def test_the_state_names_providers_and_does_not_hold_their_source(stack: LabStack):
    resources = [resource for resource in stack.state().values() if "__provider" in resource.get("inputs", {})]
    assert len(resources) == 4
    for resource in resources:
        pickled = base64.b64decode(resource["inputs"]["__provider"])
        assert b"stacks.layouts.lab" in pickled
        assert len(pickled) < 200
        assert "PRIVATE KEY" not in json.dumps(resource)


def test_an_error_of_the_program_is_shown_with_its_frames_and_its_output(empty: LabStack):
    (empty.project / "stacks/__main__.py").write_text("print('as far as here')\nraise ValueError('a mistake')\n")
    failed = empty.pulumi("preview")
    assert failed.returncode != 0
    told = failed.stdout.partition("Diagnostics:")[2]
    assert "as far as here" in told
    assert told.count("ValueError: a mistake") == 1
    assert '__main__.py", line 2' in told


def test_a_killed_up_leaves_no_process_and_the_next_one_makes_the_fleet_whole(empty: LabStack):
    with world(empty.project) as found:
        found["held"] = "lab-chat-1"
    killed = started_up(empty)
    wait_until(lambda: "node_up lab-chat-1" in world_of(empty)["calls"])
    assert len(processes_of(empty)) >= 3
    killed.kill()
    killed.wait()
    wait_until(lambda: not processes_of(empty))

    with world(empty.project) as found:
        del found["held"]
    assert "locked" in empty.pulumi("up", "--yes", "--skip-preview").stderr
    empty.done("cancel", "--yes", "--stack", "lab")
    assert "node_up lab-chat-1" in empty.up()
    assert empty.steps(empty.planned()) == {}
    assert len(empty.handover()["nodes"]) == 3


def test_an_interrupted_up_ends_what_it_began_and_leaves_no_lock(empty: LabStack):
    with world(empty.project) as found:
        found["held"] = "lab-chat-1"
    interrupted = started_up(empty)
    wait_until(lambda: "node_up lab-chat-1" in world_of(empty)["calls"])
    interrupted.send_signal(signal.SIGINT)
    time.sleep(1)  # the engine takes the signal while the node is still being made
    with world(empty.project) as found:
        del found["held"]
    assert interrupted.wait(60) != 0
    assert "lab-chat-1" in empty.state()
    empty.up()
    assert empty.steps(empty.planned()) == {}


def started_up(stack: LabStack) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["pulumi", "up", "--yes", "--skip-preview", "--non-interactive"],
        cwd=stack.project,
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def world_of(stack: LabStack) -> dict[str, Any]:
    with world(stack.project) as found:
        return found


def processes_of(stack: LabStack) -> list[str]:
    """Every process of this project's pulumi, itself included."""
    ours = f"GPUYARD_PROJECT={stack.project}".encode()
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if ours in (folder / "environ").read_bytes().split(b"\0") and (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


def forget_the_lock(project: Path) -> None:
    (project / "fleets/lab.lock.yaml").unlink()


def edit_the_spec(project: Path) -> None:
    spec = project / "fleets/lab.yaml"
    spec.write_text(spec.read_text().replace("nodes: 2", "nodes: 3"))


def wish_for_machines_that_nobody_makes(project: Path) -> None:
    spec = project / "fleets/lab.yaml"
    spec.write_text(spec.read_text().replace("provider: lab", "provider: hosts"))


def take_the_lock_of_another_fleet(project: Path) -> None:
    shutil.copy(REPOSITORY / "fleets/molecule.lock.yaml", project / "fleets/lab.lock.yaml")


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (forget_the_lock, "LOCK-MISSING"),
        (edit_the_spec, "LOCK-STALE"),
        (take_the_lock_of_another_fleet, "LOCK-FLEET"),
        (wish_for_machines_that_nobody_makes, "STACK-PROVIDER"),
    ],
)
def test_the_program_refuses_in_one_line(empty: LabStack, spoil: Callable[[Path], None], rule: str):
    shutil.copy(REPOSITORY / "stacks/__main__.py", empty.project / "stacks")
    spoil(empty.project)
    refused = empty.pulumi("preview")
    assert refused.returncode != 0
    told = [line for line in refused.stdout.splitlines() if line.startswith("    error: ")]
    assert len(told) == 1
    assert rule in told[0]
    assert "Traceback" not in refused.stdout


def test_the_committed_locks_are_of_the_committed_specs_as_the_program_demands():
    from gpuyard.plan.lock import check_lock

    for name in ("lab", "molecule", "aws-g6e", "aws-p5en", "aws-mixed"):
        check_lock(load_lock(REPOSITORY / f"fleets/{name}.lock.yaml"), load_fleet(REPOSITORY / f"fleets/{name}.yaml"))
