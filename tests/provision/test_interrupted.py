"""What a killed `up` had begun: read from the state, found again, and never taken for another."""

from __future__ import annotations

from typing import Any

import pytest

from gpuyard.provision import Wanted, resource_name
from gpuyard.provision.aws import wanted
from gpuyard.provision.interrupted import _ARNS, HOW, Begun, begun, by_tags
from gpuyard.spec.errors import RefusedError
from tests.provision.conftest import MACHINES, NAMES, fleet_of

ITEMS = {name: wanted(fleet_of(name), MACHINES) for name in NAMES}


def item(name: str, fleet: str = "aws-p5en") -> Wanted:
    return next(one for one in ITEMS[fleet] if one.name == name)


def urn(name: str) -> str:
    return f"urn:pulumi:prod::gpuyard::gpuyard:aws:Fleet$gpuyard:aws:Part$aws:x:X::{name}"


def creating(name: str, **inputs: Any) -> dict[str, Any]:
    return {"type": "creating", "resource": {"urn": urn(name), "inputs": inputs}}


def test_what_was_begun_and_is_in_no_state_is_told_with_what_was_asked_for() -> None:
    state = {
        "resources": [{"urn": urn("aws-p5en-vpc")}],
        "pending_operations": [
            creating("aws-p5en-vpc"),  # of an older kill, and gone on with since
            creating("aws-p5en-large-2", launchTemplate={"id": "lt-1"}),
            {"type": "deleting", "resource": {"urn": urn("aws-p5en-large-3")}},
            creating("aws-p5en-large-9"),  # nobody asks for it any more
        ],
    }
    found = begun(ITEMS["aws-p5en"], "aws-p5en", state)
    assert [(one.item.name, one.inputs) for one in found] == [("aws-p5en-large-2", {"launchTemplate": {"id": "lt-1"}})]
    assert begun(ITEMS["aws-p5en"], "aws-p5en", {}) == []


@pytest.mark.parametrize("fleet", NAMES)
def test_everything_that_is_made_can_be_found_again(fleet: str) -> None:
    names = [resource_name(one, fleet) for one in ITEMS[fleet]]
    found = begun(ITEMS[fleet], fleet, {"pending_operations": [creating(name) for name in names]})
    assert [one.item for one in found] == ITEMS[fleet]
    for one in found:
        assert one.item.kind in HOW or (one.item.kind in _ARNS and one.item.inputs["tags"]["Name"]), one.item.name


def tags(name: str, fleet: str = "aws-p5en") -> dict[str, str]:
    return {"Name": name, "gpuyard:fleet": fleet}


REGION = "us-east-1:123456789012"
BALANCER = f"arn:aws:elasticloadbalancing:{REGION}:loadbalancer/net/aws-p5en-gateway/50dc6c495c0c9188"


@pytest.mark.parametrize(
    ("name", "arn", "its"),
    [
        ("vpc", f"arn:aws:ec2:{REGION}:vpc/vpc-1", "vpc-1"),
        ("nat-us-east-1a", f"arn:aws:ec2:{REGION}:elastic-ip/eipalloc-1", "eipalloc-1"),
        ("operators", f"arn:aws:ec2:{REGION}:key-pair/key-1", "aws-p5en"),
        ("large-us-east-1a-placement", f"arn:aws:ec2:{REGION}:placement-group/aws-p5en-large-us-east-1a", None),
        ("lustre", f"arn:aws:fsx:{REGION}:file-system/fs-1", "fs-1"),
        ("balancer", BALANCER, BALANCER),
    ],
)
def test_a_thing_is_found_by_its_tags_as_the_sdk_imports_it(name: str, arn: str, its: str | None) -> None:
    one = Begun(item(name), {"keyName": "aws-p5en"})
    mine = (arn, tags(f"aws-p5en-{name}"))
    others = [
        (f"arn:aws:ec2:{REGION}:vpc/vpc-9", tags(f"aws-p5en-{name}", "another")),
        (f"arn:aws:ec2:{REGION}:snapshot/snap-9", tags(f"aws-p5en-{name}")),
        (arn.replace("1", "9"), tags("aws-p5en-other")),
    ]
    assert by_tags(one, "aws-p5en", others) is None
    assert by_tags(one, "aws-p5en", [*others, mine]) == (its or arn.rsplit("/", 1)[1])


def test_of_two_none_is_taken_for_the_other() -> None:
    mine = tags("aws-p5en-lustre")
    there = [(f"arn:aws:fsx:{REGION}:file-system/fs-{n}", mine) for n in (1, 2)]
    with pytest.raises(RefusedError, match="AWS-TWICE: fs-1, fs-2 are all lustre"):
        by_tags(Begun(item("lustre"), {}), "aws-p5en", there)
