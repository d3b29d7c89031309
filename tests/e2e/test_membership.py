"""Machines that come and go under load: exchanged, taken out of a pool and brought back, removed from service."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

import pytest

from gpuyard.lab.own_fleet import LOST, OwnFleet, Run, load, own_fleet, wait
from tools.project import PROJECT

from .conftest import MODEL

pytestmark = pytest.mark.lab

STACK = "life"
FIRST, SECOND, THIRD = (f"{STACK}-chat-{index}" for index in range(3))


def spec(own: OwnFleet, nodes: int) -> None:
    own.write(PROJECT / "fleets/drill.yaml", {"    nodes: 3\n": f"    nodes: {nodes}\n"})
    own.lock()


@pytest.fixture(scope="module")
def fleet() -> Iterator[OwnFleet]:
    with own_fleet(STACK, PROJECT) as own:
        spec(own, 3)
        own.done("gpuyard", "lab", "up", "--stack", STACK)
        yield own


def servers(own: OwnFleet) -> dict[str, str]:
    """How the gateway sees each GPU node that is there."""
    status = json.loads(own.done("gpuyard", "lab", "status", "--stack", STACK, "--json").output)
    return {row["node"]: row["gateway"] for row in status if "chat" in row["node"]}


def pulumi_lines(ran: Run) -> list[str]:
    """The lines that a playbook says make the machines, or take them away."""
    return [line for line in re.findall(r"pulumi [^\"\n]*", ran.output) if line.split()[1] in ("destroy", "up")]


def typed(own: OwnFleet, lines: list[str]) -> None:
    for line in lines:
        own.done(*shlex.split(line), "--yes", "--skip-preview")


def test_a_machine_is_exchanged_by_the_lines_that_are_said(fleet: OwnFleet) -> None:
    before = fleet.on(FIRST, "cat /etc/machine-id")
    words = ("-e", f"node={FIRST}")
    with load(fleet) as told:
        drained = fleet.played("operate/replace_node", *words)
        assert servers(fleet) == {FIRST: "DRAIN", SECOND: "UP", THIRD: "UP"}
        lines = pulumi_lines(drained)
        assert [line.split()[1] for line in lines] == ["destroy", "up"]
        typed(fleet, lines)
        assert servers(fleet)[SECOND] == servers(fleet)[THIRD] == "UP", "the others were not touched"
        fleet.played("operate/replace_node", *words)
        assert servers(fleet) == dict.fromkeys((FIRST, SECOND, THIRD), "UP")
    assert fleet.on(FIRST, "cat /etc/machine-id") != before
    assert not any(told[name] for name in LOST)
    again = fleet.played("operate/replace_node", *words)
    assert "was exchanged" in again.output
    assert set(again.changed().values()) == {0}


def test_a_pool_comes_to_fewer_nodes_and_to_more(fleet: OwnFleet) -> None:
    with load(fleet) as told:
        spec(fleet, 2)
        drained = fleet.played("operate/scale")
        assert servers(fleet) == {FIRST: "UP", SECOND: "UP", THIRD: "DRAIN"}
        assert f"--drained {THIRD}" in drained.output
        typed(fleet, pulumi_lines(drained))
        fleet.played("operate/scale")
        assert servers(fleet) == {FIRST: "UP", SECOND: "UP"}
        behind = fleet.on(f"{STACK}-gateway-0", "python3 /usr/local/lib/gpuyard/gateway_state.py servers")
        assert THIRD not in behind

        spec(fleet, 3)
        typed(fleet, pulumi_lines(fleet.played("operate/scale")))
        fleet.played("operate/scale")
        assert servers(fleet) == dict.fromkeys((FIRST, SECOND, THIRD), "UP")
    assert not any(told[name] for name in LOST)
    assert set(fleet.played("operate/scale").changed().values()) == {0}


def test_a_node_is_removed_from_service_and_brought_back(fleet: OwnFleet) -> None:
    unit = f"vllm@{MODEL}.service"
    with load(fleet) as told:
        fleet.played("operate/remove_node", "--limit", SECOND)
        wait("the gateway to see that no engine answers there", lambda: servers(fleet)[SECOND] == "DOWN")
        states = fleet.on(SECOND, f"systemctl is-active {unit}; systemctl is-enabled {unit} 2>&1; true").split()
        assert states[0] == "inactive"
        assert "enabled" not in states
        assert "remove_node.yml" in fleet.on(SECOND, "cat /var/lib/gpuyard/removed")
        assert fleet.on(SECOND, "ls /var/lib/models").strip(), "models stay without consent"
        fleet.played("site", "--limit", SECOND)
        # It serves again, and is opened by who says so.
        wait("the gateway to see that its engine answers", lambda: servers(fleet)[SECOND] == "DRAIN")
        fleet.played("operate/undrain_node", "--limit", SECOND)
        assert servers(fleet) == dict.fromkeys((FIRST, SECOND, THIRD), "UP")
    assert not any(told[name] for name in LOST)
