"""Driver and engines changed under load: they come, they go back where they cannot, and a killed operator goes on.

Its name has it run before the fleet with the real engine comes up, whose idle workers take half a processor.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gpuyard.lab.own_fleet import OwnFleet, Run, load, own_fleet, wait
from gpuyard.upgrade import record
from tools.bench_drain import WAYS, Drill
from tools.bench_upgrade import NAIVE, QUICK, UPGRADE, drivers, lock, spans, walk, watched
from tools.project import PROJECT, files_of, landed

from .conftest import MODEL

pytestmark = pytest.mark.lab

STACK = "change"
NODES = [f"{STACK}-chat-{index}" for index in range(3)]
# Behind the canary both others at once: how few of a batch may be out is for tests that take no minutes.
POLICY = (*QUICK, "-e", "upgrade_max_unavailable=2")
FIRST, SECOND, THIRD = "580.105.08", "580.126.20", "590.44.01"


@pytest.fixture(scope="module")
def fleet() -> Iterator[OwnFleet]:
    """Three GPU nodes with simulated engines, on an older driver: brought up as the last landed state does, then
    converged by this one, as it comes to a fleet that is there."""
    with own_fleet(STACK, PROJECT) as own:
        lock(own, FIRST)
        with files_of(landed()) as before:
            own.take_hands(before)
            own.done("gpuyard", "lab", "up", "--stack", STACK)
        own.take_hands(PROJECT)
        own.played("site")
        yield own


def upgrade(own: OwnFleet, *words: str) -> Any:
    return own.playbook("operate/upgrade_driver", *POLICY, *words)


@contextmanager
def begun(own: OwnFleet, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """An upgrade on its way; ended with the block, if it has not ended by then."""
    argv = ("ansible-playbook", "-i", f"inventories/{STACK}", UPGRADE[1], *POLICY, *words)
    # Nothing of ours: an ssh beside it makes what it shares non-blocking, and Ansible refuses that.
    nothing: Any = subprocess.DEVNULL
    operator = subprocess.Popen(
        own.words(*argv), cwd=own.project, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    )
    try:
        yield operator
    finally:
        if operator.poll() is None:
            os.killpg(operator.pid, signal.SIGKILL)
            operator.wait()


def until(comes: Callable[[], object], operator: subprocess.Popen[Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not comes():
        assert operator.poll() is None, "it ended before it came to that"
        assert time.monotonic() < deadline
        time.sleep(0.5)


def recorded(own: OwnFleet) -> list[dict[str, Any]]:
    """The record of the last run, its chain of hashes proven."""
    return record.read(max((own.project / ".gpuyard/runs").glob("*/record.jsonl")))


def walked(own: OwnFleet, node: str) -> list[str]:
    return [event["state"] for event in own.states(node)]


def untouched(own: OwnFleet) -> None:
    """No node was drained, no driver changed, and every server of the gateway is as it was."""
    states = [event["state"] for event in recorded(own) if event["event"] == "state"]
    assert set(states) <= {"upgrade-required"}, states
    status = json.loads(own.done("gpuyard", "lab", "status", "--stack", STACK, "--json").output)
    assert [row["gateway"] for row in status if row["node"] in NODES] == ["UP"] * 3
    assert drivers(own) == [FIRST] * 3


def kept(own: OwnFleet, node: str) -> set[str]:
    """The drivers whose packages lie on a node, each file as it was verified."""
    whole = "sha256sum --quiet -c SHA256SUMS >/dev/null 2>&1"
    return set(
        own.on(node, f"cd /var/lib/gpuyard/packages; for v in *; do (cd $v && {whole}) && echo $v; done").split()
    )


@contextmanager
def no_repository(own: OwnFleet) -> Iterator[None]:
    folder = own.project / f".gpuyard/labs/{STACK}/apt"
    away = folder.with_name("apt-away")
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)


def test_what_cannot_work_is_refused_on_every_node_before_one_is_drained(fleet: OwnFleet) -> None:
    lock(fleet, THIRD)
    faults = ((NODES[0], "module-in-use"), (NODES[1], "apt-lock"), (NODES[2], "dpkg-interrupted"))
    for node, fault in faults:
        fleet.done("gpuyard", "lab", "break", "--stack", STACK, node, fault)
    fleet.on(NODES[0], "apt-mark hold nvidia-driver-pinning-590")
    asked = {
        "nvidia_driver_lock_seconds": 2,
        "nvidia_driver_engine_needs": {"vllm 99": "600.1"},
        "nvidia_driver_free_mib_below": {"/": 10**9},
    }
    refused = upgrade(fleet, "-e", json.dumps(asked))
    words = " ".join(refused.output.split())
    assert refused.rc != 0
    for expected in (
        "DRIVER-BUSY: the driver of change-chat-0 is to be unloaded, and others than its engines hold a GPU: dcgm-exp",
        "APT-HELD: driver 590.44.01 brings nvidia-driver-pinning-590",
        "APT-LOCKED: the packages of change-chat-1 are to be changed, and unattended-upgr",
        "change-chat-2, where dpkg is not done with nvidia-persistenced",
        "DRIVER-ENGINE: vllm 99 on change-chat-1 needs driver 600.1 or newer, and the way back is 580.105.08",
        "DRIVER-DISK: 1000000000 MiB are asked for below / of change-chat-2",
    ):
        assert expected in words, words
    untouched(fleet)
    # Whoever comes next, from whatever machine, finds that nobody holds the fleet.
    assert (recorded(fleet)[-1]["event"], recorded(fleet)[-1]["result"]) == ("released", "refused")
    for node, fault in faults:
        fleet.done("gpuyard", "lab", "mend", "--stack", STACK, node, fault)
    fleet.on(NODES[0], "apt-mark unhold nvidia-driver-pinning-590")

    gone = (NODES[0], "version-missing", "package=nvidia-fabricmanager", f"version={THIRD}-1")
    fleet.done("gpuyard", "lab", "break", "--stack", STACK, *gone)
    refused = upgrade(fleet, "--check")
    assert refused.rc != 0
    assert "APT-VERSION-UNKNOWN: not to be had on this node: nvidia-fabricmanager=590.44.01-1" in " ".join(
        refused.output.split()
    )
    untouched(fleet)
    fleet.done("gpuyard", "lab", "mend", "--stack", STACK, *gone[:2])


def test_restarts_of_drained_nodes_lose_nothing_though_engines_cut_at_once_what_runs(fleet: OwnFleet) -> None:
    """Streams, each byte compared, while the gateway is reloaded before and in the middle of each drain."""
    (way,) = [way for way in WAYS if way.drained and way.drain_seconds == 0]
    told = Drill(fleet).walk(way, requests=600, rate=20, seed=4)
    lost = [line for line in told["lines"] if line["outcome"] != "complete"]
    assert told["lossless"], lost[:5]
    assert told["requests"] >= 600
    assert told["seconds"] > told["walk_seconds"], "the load ended before the walk"


WAY = ["upgrade-required", "drain-required", "driver-install-required", "validation-required", "uncordon-required"]
DONE = ["soak-required", "upgrade-done"]


def test_a_serving_fleet_comes_to_another_driver_though_its_operator_is_killed_on_the_way(fleet: OwnFleet) -> None:
    """Killed when the canary is empty and its old driver is out; and from then on there is no repository."""
    lock(fleet, SECOND)
    check = upgrade(fleet, "--check")
    assert check.rc == 0, check.output
    assert drivers(fleet) == [FIRST] * 3
    runs = fleet.project / ".gpuyard/runs"
    before = set(runs.iterdir())
    with watched(fleet) as samples, load(fleet) as told:
        with begun(fleet) as operator:
            until(lambda: set(runs.iterdir()) - before, operator)
            second = upgrade(fleet)
            assert "UPGRADE-TWO" in second.output, "two who change the fleet at once"
            until(lambda: fleet.note(NODES[0]).get("state") == "driver-install-required", operator)
        opened = fleet.playbook("operate/undrain_node", "--limit", NODES[0])
        assert f"GATE-UNPROVEN: the driver of {NODES[0]} stands at driver-install-required" in " ".join(
            opened.output.split()
        )
        with no_repository(fleet):
            gone_on = upgrade(fleet)
        wait("all nodes to be up again", lambda: samples()[-1].up())
        outages = spans(samples())
    assert gone_on.rc == 0, gone_on.output
    assert f"begun: {NODES[0]}" in gone_on.output
    assert drivers(fleet) == [SECOND] * 3
    first = fleet.note(NODES[0])
    assert (first["state"], first["attempts"], first["previous"]["version"]) == ("upgrade-done", 2, FIRST)
    for node in NODES:
        assert list(dict.fromkeys(walked(fleet, node))) == [*WAY, *DONE]
    (proof,) = [event["proof"] for event in recorded(fleet) if event.get("node") == NODES[0] and event.get("proof")]
    assert (proof["answers"][0]["compared"], proof["answers"][0]["deviations"]) == (1024, 0)
    assert told["requests"] > 300
    assert told["lossless"], told
    assert all(outages[node] for node in NODES), "each node was out of rotation"
    assert [kept(fleet, node) for node in NODES] == [{FIRST, SECOND}] * 3
    assert upgrade(fleet).changed() == dict.fromkeys(NODES, 0), "a second run changes nothing"


def test_what_a_run_changed_goes_back_with_a_command_paused_and_gone_on_with(fleet: OwnFleet) -> None:
    """With `gpuyard upgrade`: Ctrl-C once stops it before the second node, and `resume` ends it; offline."""
    words = fleet.words("gpuyard", "upgrade", "rollback", "--yes", "--stack", STACK)
    with load(fleet) as told, no_repository(fleet):
        log = (fleet.project / ".gpuyard/rollback.log").open("w+")
        command = subprocess.Popen(words, cwd=fleet.project, stdout=log, stderr=log)
        until(lambda: fleet.note(NODES[0]).get("state") == "drain-required" and fleet.note(NODES[0])["back"], command)
        command.send_signal(signal.SIGINT)
        command.wait(timeout=300)
        log.seek(0)
        said = log.read()
        assert command.returncode != 0, said
        assert "stopping before the next node" in said
        assert "UPGRADE-PAUSED" in said
        assert "to go on: gpuyard upgrade resume" in said
        assert drivers(fleet) == [FIRST, SECOND, SECOND]
        asked = json.loads(
            fleet.done("gpuyard", "upgrade", "status", "--stack", STACK, "--json").output.partition("\n")[2]
        )
        assert asked["claim"]["paused"]
        assert asked["nodes"][NODES[2]]["state"] == "upgrade-required"
        fleet.done("gpuyard", "upgrade", "resume", "--yes", "--stack", STACK)
    assert drivers(fleet) == [FIRST] * 3
    assert told["lossless"], told
    shown = json.loads(fleet.done("gpuyard", "runs", "show", "--json").output)
    assert (shown["result"], shown["back"], set(shown["nodes"])) == ("done", True, set(NODES))
    assert (fleet.project / ".gpuyard/runs" / shown["run"] / "report.html").is_file()


def test_a_node_that_cannot_have_the_driver_goes_back_and_no_other_is_touched(fleet: OwnFleet) -> None:
    break_it = ("gpuyard", "lab", "break", "--stack", STACK, NODES[1], "dkms-build-fails", f"version={THIRD}")
    lock(fleet, THIRD)
    fleet.done(*break_it)
    with load(fleet) as told:
        refused = upgrade(fleet, "-e", "upgrade_max_unavailable=1")
    assert refused.rc != 0
    assert "UPGRADE-ROLLED-BACK" in refused.output
    assert "change-chat-1 could not prove driver 590.44.01" in " ".join(refused.output.split())
    assert drivers(fleet) == [THIRD, FIRST, FIRST]
    left = fleet.note(NODES[1])
    assert (left["state"], left["previous"]["version"]) == ("rollback-done", FIRST)
    assert "APT-FAILED" in left["reason"]
    assert fleet.note(NODES[2])["state"] == "upgrade-required"
    assert told["lossless"], told
    status = json.loads(fleet.done("gpuyard", "lab", "status", "--stack", STACK, "--json").output)
    assert [row["gateway"] for row in status if row["node"] in NODES] == ["UP"] * 3
    fleet.done("gpuyard", "lab", "mend", "--stack", STACK, NODES[1], "dkms-build-fails")


SPEED = 'VLLM_SIM_INTER_TOKEN_LATENCY: "10"'


def test_engines_come_to_other_settings_as_a_driver_does_and_slower_ones_go_back(fleet: OwnFleet) -> None:
    """Settings stand for a version: both are another environment or another file that the units name."""
    now = drivers(fleet)
    setting = f"sed -n 's/VLLM_SIM_INTER_TOKEN_LATENCY=//p' /etc/vllm/{MODEL}.env"

    def asked(milliseconds: int, *words: str) -> Run:
        lock(fleet, FIRST, {SPEED: SPEED.replace("10", str(milliseconds))})
        return fleet.playbook("operate/upgrade_engine", *POLICY, *words)

    def settings() -> list[str]:
        return [fleet.on(node, setting).strip().strip('"') for node in NODES]

    assert asked(9, "--check").rc == 0
    assert settings() == ["10"] * 3
    with load(fleet) as told:
        gone = fleet.playbook("operate/upgrade_engine", *POLICY)
        assert gone.rc == 0, gone.output
        assert settings() == ["9"] * 3
        assert walked(fleet, NODES[0]) == [way.replace("driver-install", "service-stop") for way in [*WAY, *DONE]]
        again = fleet.playbook("operate/upgrade_engine", *POLICY)
        assert again.changed() == dict.fromkeys(NODES, 0), again.output
        refused = asked(13)
    assert "UPGRADE-ROLLED-BACK" in refused.output, refused.output
    assert "ANSWERS-SLOW" in refused.output
    assert settings() == ["9"] * 3
    left = fleet.note(NODES[0], "engine")
    assert (left["state"], left["kind"]) == ("rollback-done", "engine")
    assert told["requests"] > 300
    assert told["lossless"], told
    assert drivers(fleet) == now, "nobody touched the driver"


def test_the_same_without_a_drain_loses_requests_so_that_the_load_would_show_a_loss(fleet: OwnFleet) -> None:
    """Last: what it leaves on the nodes, the product has no note of."""
    # Of the same branch: the pinning package of another one stops it half-way.
    lock(fleet, SECOND)
    seen = walk(fleet, NAIVE, rate=30, limit=",".join(NODES[1:]))
    assert drivers(fleet) == [THIRD, SECOND, SECOND]
    assert not seen.told["lossless"]
    assert seen.told["failed"] + seen.told["truncated"] > 0
