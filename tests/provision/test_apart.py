"""Nodes that have to stand together: told before the first machine of another zone is made."""

from __future__ import annotations

from typing import Any

from gpuyard.provision.apart import close_pools_apart, standing
from gpuyard.provision.protection import machine_urn
from tests.provision.conftest import fleet_of

P5EN = fleet_of("aws-p5en")
NODES = [f"aws-p5en-large-{number}" for number in range(4)]
IN_B = dict.fromkeys(NODES, "us-east-1b")
IN_A = dict.fromkeys(NODES, "us-east-1a")


def row(node: str, zone: str | None, **more: Any) -> dict[str, Any]:
    urn = machine_urn("prod", node)
    return {"urn": urn, "type": "aws:ec2/instance:Instance", "outputs": {"availabilityZone": zone}, **more}


def test_where_machines_stand_is_read_from_the_state() -> None:
    other = {"urn": "urn:pulumi:prod::gpuyard::aws:ec2/vpc:Vpc::prod-vpc", "type": "aws:ec2/vpc:Vpc"}
    rows = [other, row("a", "us-east-1a"), row("b", "us-east-1b", delete=True), row("c", None)]
    assert standing({"resources": rows}) == {"a": "us-east-1a"}
    assert standing({}) == standing({"resources": None}) == {}


def test_a_pool_that_came_apart_is_told_with_the_fewest_nodes_to_move() -> None:
    assert close_pools_apart(P5EN, "prod", IN_B) == []
    found = close_pools_apart(P5EN, "prod", {**IN_B, NODES[3]: "us-east-1a"})
    assert [(finding.rule, finding.have) for finding in found] == [
        ("AWS-POOL-APART", "1 in us-east-1a, 3 in us-east-1b")
    ]
    assert f"take {NODES[3]} away, drained: `pulumi state unprotect --stack prod 'urn:" in found[0].change


def test_a_pool_that_would_come_apart_is_told_with_what_keeps_it_together() -> None:
    there = dict.fromkeys(NODES[:3], "us-east-1b")
    assert close_pools_apart(P5EN, "prod", there, IN_B) == []
    assert close_pools_apart(P5EN, "prod", {}, IN_A) == []
    assert close_pools_apart(P5EN, "prod", IN_B, IN_A) == [], "what is there stays where it is"
    (finding,) = close_pools_apart(P5EN, "prod", there, IN_A)
    assert finding.rule == "AWS-POOL-APART"
    assert finding.have == "3 in us-east-1b, 1 to be made in us-east-1a"
    assert finding.change.startswith(
        "ask for 3 nodes of pool large; or to try us-east-1b again, put it first in the pool's zones and remove "
        ".gpuyard/refusals/prod.jsonl; or, to have all in us-east-1a, take aws-p5en-large-0, aws-p5en-large-1"
    )


def test_what_is_missing_of_a_pool_that_came_apart_decides_which_nodes_go() -> None:
    there = {NODES[0]: "us-east-1b", NODES[1]: "us-east-1b", NODES[2]: "us-east-1a"}
    (finding,) = close_pools_apart(P5EN, "prod", there, IN_A)
    assert finding.have == "1 in us-east-1a, 2 in us-east-1b, 1 to be made in us-east-1a"
    assert finding.change.startswith(f"take {NODES[0]}, {NODES[1]} away, drained: ")


def test_nodes_that_need_not_stand_together_may_be_anywhere() -> None:
    g6e = fleet_of("aws-g6e")
    assert close_pools_apart(g6e, "prod", {"aws-g6e-chat-0": "us-east-1b"}, {"aws-g6e-chat-1": "us-east-1a"}) == []
