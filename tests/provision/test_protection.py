"""What a fleet has is given up by name: what an `up` would delete, and the line that consents to it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from gpuyard.provision import resource_name
from gpuyard.provision.aws import wanted
from gpuyard.provision.protection import consent, given_up, machine_urn
from gpuyard.spec.fleet import Fleet
from tests.provision.conftest import MACHINES, fleet_of

FLEET = "aws-p5en"


def state_of(fleet: Fleet, **more: Any) -> dict[str, Any]:
    """A state in which all of the fleet is, protected; `more`: of each row."""
    parents = "urn:pulumi:prod::gpuyard::gpuyard:aws:Fleet$gpuyard:aws:Part$"
    part = "gpuyard:aws:Part"
    rows: list[dict[str, Any]] = [{"urn": f"urn:pulumi:prod::gpuyard::{part}::{fleet.name}-network", "type": part}]
    for item in wanted(fleet, MACHINES):
        module, name = item.kind.split(".")
        kind = f"aws:{module}/{name[0].lower()}{name[1:]}:{name}"
        urn = f"{parents}{kind}::{resource_name(item, fleet.name)}"
        rows.append({"urn": urn, "type": kind, "protect": True, **more})
    return {"resources": rows}


def lost(fleet: Fleet, state: dict[str, Any]) -> list[str]:
    """How each finding says what is asked and what would pass."""
    found = given_up(wanted(fleet, MACHINES), fleet.name, "prod", state)
    assert all(finding.rule == "AWS-PROTECTED" for finding in found)
    return [f"{finding.have}; {finding.change}" for finding in found]


def test_a_fleet_as_it_is_and_one_that_grows_lose_nothing(changed: Callable[..., Fleet]) -> None:
    state = state_of(fleet_of(FLEET))
    assert lost(fleet_of(FLEET), state) == []
    assert lost(changed(FLEET, ("    nodes: 4\n", "    nodes: 5\n")), state) == []
    assert lost(fleet_of(FLEET), {}) == []


def test_machines_that_go_are_named_with_their_drain_and_the_line_to_type(changed: Callable[..., Fleet]) -> None:
    (told,) = lost(changed(FLEET, ("    nodes: 4\n", "    nodes: 2\n")), state_of(fleet_of(FLEET)))
    names = ["aws-p5en-large-2", "aws-p5en-large-3"]
    assert told.startswith(f"{', '.join(names)}, which the spec asks for no longer")
    assert f"drain {', '.join(names)} (playbooks/operate/scale.yml), then" in told
    assert f"`{consent('prod', [machine_urn('prod', name) for name in names])}`" in told


def test_a_gateway_and_a_file_system_go_without_a_drain(changed: Callable[..., Fleet]) -> None:
    """With a gateway what leads to it goes too."""
    (told,) = lost(changed(FLEET, ("gateway:\n  nodes: 2\n", "gateway:\n  nodes: 1\n")), state_of(fleet_of(FLEET)))
    assert "aws-p5en-gateway-1, aws-p5en-gateway-1-target, which" in told
    assert "drain" not in told
    (told,) = lost(changed("aws-g6e", ("  efs: true\n", "")), state_of(fleet_of("aws-g6e")))
    assert "aws-g6e-efs, aws-g6e-efs-" in told
    assert "drain" not in told


def test_what_somebody_consented_to_and_what_is_on_its_way_out_is_no_finding(changed: Callable[..., Fleet]) -> None:
    fewer = changed(FLEET, ("    nodes: 4\n", "    nodes: 2\n"))
    assert lost(fewer, state_of(fleet_of(FLEET), protect=False)) == []
    assert lost(fewer, state_of(fleet_of(FLEET), delete=True)) == []


def test_the_line_is_one_that_a_shell_reads_as_it_is_meant() -> None:
    urn = machine_urn("prod", "prod-chat-0")
    assert "$" in urn
    line = consent("prod", [urn, urn])
    assert shlex.split(line) == ["pulumi", "state", "unprotect", "--stack", "prod", urn, urn]
    assert f"'{urn}'" in line
