"""What an account says against a fleet: each rule by what breaks it, and by what passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gpuyard.catalog import load_quotas
from gpuyard.plan.judge import Finding
from gpuyard.provision import resource_name
from gpuyard.provision.account import (
    Answers,
    Endpoint,
    Image,
    MachineType,
    Questions,
    Subnet,
    family_of,
    findings,
    questions,
    to_make,
)
from gpuyard.provision.aws import wanted
from gpuyard.spec.fleet import Fleet
from tests.provision.conftest import IN_A_BLOCK, MACHINES, NAMES, fleet_of

Changed = Callable[..., Fleet]
QUOTAS = load_quotas()
ZONES = frozenset({"us-east-1a", "us-east-1b"})
VCPUS = {"c7i.xlarge": 4, "g6e.12xlarge": 48, "p4d.24xlarge": 96, "p5.48xlarge": 192, "p5en.48xlarge": 192}
TYPES = {name: MachineType(vcpus, ("x86_64",), ZONES) for name, vcpus in VCPUS.items()}
PLENTY = {quota.code: 10_000.0 for quota in QUOTAS}
THERE = (
    "vpc: vpc-0123456789abcdef0\n"
    "    subnets: {us-east-1a: subnet-0123456789abcdef0, us-east-1b: subnet-0123456789abcdef1}\n"
    "    route_tables: [rtb-0123456789abcdef0]"
)
MADE = THERE + "\n    make_endpoints: [s3, ssm]"
S3 = Endpoint("vpc-0123456789abcdef0", "com.amazonaws.us-east-1.s3", frozenset({"rtb-0123456789abcdef0"}))
SUBNETS = {
    "subnet-0123456789abcdef0": Subnet("us-east-1a", "vpc-0123456789abcdef0", 4000),
    "subnet-0123456789abcdef1": Subnet("us-east-1b", "vpc-0123456789abcdef0", 4000),
}


def good(fleet: Fleet) -> Answers:
    """An account that has all of it."""
    assert fleet.aws is not None
    return Answers(Image("x86_64", fleet.aws.image.root_device), TYPES, {}, PLENTY)


def judged(fleet: Fleet, told: Answers, there: frozenset[str] = frozenset()) -> list[Finding]:
    items = wanted(fleet, MACHINES)
    return findings(fleet, items, to_make(items, fleet.name, there), told, QUOTAS)


def asked(fleet: Fleet, there: frozenset[str] = frozenset()) -> Questions:
    return questions(fleet, to_make(wanted(fleet, MACHINES), fleet.name, there), QUOTAS)


def told(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.rule, finding.what) for finding in found]


@pytest.mark.parametrize("name", NAMES)
def test_an_account_that_has_it_all_is_not_refused(name: str) -> None:
    fleet = fleet_of(name)
    assert judged(fleet, good(fleet)) == []


def test_only_what_is_still_to_be_made_is_asked_for() -> None:
    fleet = fleet_of("aws-mixed")
    assert asked(fleet) == Questions(
        "ami-0123456789abcdef0",
        ("c7i.xlarge", "p4d.24xlarge", "p5.48xlarge"),
        (),
        ("L-1216C47A", "L-417A185B", "L-7212CCBC"),
    )
    names = frozenset(resource_name(item, fleet.name) for item in wanted(fleet, MACHINES))
    assert asked(fleet, names) == Questions(None, (), (), ())
    assert asked(fleet, names - {"aws-mixed-old-3"}) == Questions(
        "ami-0123456789abcdef0", ("p4d.24xlarge",), (), ("L-7212CCBC",)
    )


def test_an_image_of_another_region_architecture_or_root_device() -> None:
    fleet = fleet_of("aws-g6e")
    found = judged(fleet, replace(good(fleet), image=None))
    assert told(found) == [("AWS-IMAGE", "aws.image.id")]
    assert "the id that the image has in us-east-1" in found[0].change
    found = judged(fleet, replace(good(fleet), image=Image("arm64", "/dev/xvda")))
    assert told(found) == [("AWS-ARCHITECTURE", "aws.image")]
    assert "set aws.image.architecture to arm64" in found[0].change
    found = judged(fleet, replace(good(fleet), image=Image("x86_64", "/dev/sda1")))
    assert told(found) == [("AWS-IMAGE", "aws.image.root_device")]
    assert "set it to /dev/sda1" in found[0].change


def test_a_region_or_a_zone_without_the_type() -> None:
    fleet = fleet_of("aws-p5en")
    elsewhere = MachineType(192, ("x86_64",), frozenset({"us-east-1b", "us-east-1c"}))
    found = judged(fleet, replace(good(fleet), types={**TYPES, "p5en.48xlarge": elsewhere}))
    assert told(found) == [("AWS-TYPE-ZONE", "pools[0].machine.instance")]
    assert found[0].have == "p5en.48xlarge in us-east-1a"
    assert found[0].need == "a zone that offers it: us-east-1b, us-east-1c"
    nowhere = {name: kind for name, kind in TYPES.items() if name != "p5en.48xlarge"}
    found = judged(fleet, replace(good(fleet), types=nowhere))
    assert told(found) == [("AWS-TYPE-ZONE", "pools[0].machine.instance")]
    assert "which us-east-1 does not have" in found[0].have


def test_a_type_of_another_architecture_by_ec2_s_own_word() -> None:
    fleet = fleet_of("aws-g6e")
    found = judged(fleet, replace(good(fleet), types={**TYPES, "c7i.xlarge": MachineType(4, ("arm64",), ZONES)}))
    assert told(found) == [("AWS-ARCHITECTURE", "aws.gateway_instance")]


def test_a_quota_that_the_fleet_alone_exceeds() -> None:
    fleet = fleet_of("aws-p5en")
    assert judged(fleet, replace(good(fleet), quotas={**PLENTY, "L-417A185B": 768})) == []
    found = judged(fleet, replace(good(fleet), quotas={**PLENTY, "L-417A185B": 767}))
    assert told(found) == [("AWS-QUOTA", "the account in us-east-1")]
    assert found[0].have == "767 vCPUs of `Running On-Demand P instances`"
    assert found[0].need == "768: 4 x p5en.48xlarge of 192"
    assert "ask AWS for 768 of quota L-417A185B" in found[0].change
    # Gateways count too, and a new account has five of these.
    assert told(judged(fleet, replace(good(fleet), quotas={**PLENTY, "L-1216C47A": 5}))) == [
        ("AWS-QUOTA", "the account in us-east-1")
    ]


def test_spot_counts_in_its_own_quota_and_a_block_in_none(changed: Changed) -> None:
    mixed = fleet_of("aws-mixed")
    low = replace(good(mixed), quotas={**PLENTY, "L-7212CCBC": 100})
    assert [finding.need for finding in judged(mixed, low)] == ["384: 4 x p4d.24xlarge of 96"]
    block = changed("aws-p5en", *IN_A_BLOCK)
    assert "L-417A185B" not in asked(block).quotas
    assert judged(block, replace(good(block), quotas={"L-1216C47A": 8})) == []


def test_subnets_of_an_existing_vpc_that_are_elsewhere_or_full(changed: Changed) -> None:
    fleet = changed("aws-g6e", ("cidr: 10.60.0.0/16", MADE))
    assert asked(fleet).s3 == {}
    assert asked(fleet).subnets == tuple(SUBNETS)
    assert judged(fleet, replace(good(fleet), subnets=SUBNETS)) == []
    first, second = SUBNETS
    found = judged(fleet, replace(good(fleet), subnets={second: SUBNETS[second]}))
    assert told(found) == [("AWS-SUBNET", "aws.network.subnets.us-east-1a")]
    wrong = {**SUBNETS, first: Subnet("us-east-1b", "vpc-0123456789abcdef0", 4000)}
    found = judged(fleet, replace(good(fleet), subnets=wrong))
    assert told(found) == [("AWS-SUBNET", "aws.network.subnets.us-east-1a")]
    assert found[0].need == "a subnet of vpc-0123456789abcdef0 in us-east-1a"
    # Four nodes, a gateway, two endpoints and a mount target stand in each zone.
    enough = {**SUBNETS, second: Subnet("us-east-1b", "vpc-0123456789abcdef0", 8)}
    assert judged(fleet, replace(good(fleet), subnets=enough)) == []
    full = {**SUBNETS, second: Subnet("us-east-1b", "vpc-0123456789abcdef0", 7)}
    found = judged(fleet, replace(good(fleet), subnets=full))
    assert told(found) == [("AWS-SUBNET-SMALL", "aws.network.subnets.us-east-1b")]
    assert "make 1 fewer nodes in us-east-1b" in found[0].change


def test_an_existing_vpc_without_a_way_to_the_bucket(changed: Changed) -> None:
    fleet = changed("aws-g6e", ("cidr: 10.60.0.0/16", THERE))
    assert asked(fleet).s3 == {"vpc_id": "vpc-0123456789abcdef0", "service_name": "com.amazonaws.us-east-1.s3"}
    names = frozenset(resource_name(item, fleet.name) for item in wanted(fleet, MACHINES))
    assert asked(fleet, names).s3 == {}
    account = replace(good(fleet), subnets=SUBNETS)
    assert judged(fleet, replace(account, s3=S3)) == []
    assert judged(fleet, replace(account, s3=replace(S3, tables=None))) == []
    (found,) = judged(fleet, account)
    assert (found.rule, found.have) == ("AWS-S3-ENDPOINT", "vpc-0123456789abcdef0, which has none of S3")
    assert "set aws.network.make_endpoints to [s3]" in found.change
    (found,) = judged(fleet, replace(account, s3=replace(S3, tables=frozenset({"rtb-0123456789abcdef9"}))))
    assert (found.rule, found.what) == ("AWS-S3-ENDPOINT", "aws.network.route_tables")
    named = changed("aws-g6e", ("cidr: 10.60.0.0/16", THERE + "\n    s3_endpoint: vpce-0123456789abcdef0"))
    assert asked(named).s3 == {"id": "vpce-0123456789abcdef0"}
    assert judged(named, replace(account, s3=S3)) == []
    for wrong in (None, replace(S3, vpc="vpc-9"), replace(S3, service="com.amazonaws.us-east-1.ecr.api")):
        assert told(judged(named, replace(account, s3=wrong))) == [("AWS-S3-ENDPOINT", "aws.network.s3_endpoint")]


def test_a_quota_that_the_account_does_not_tell_is_not_held_against_the_fleet() -> None:
    fleet = fleet_of("aws-p5en")
    assert judged(fleet, replace(good(fleet), quotas={})) == []


def test_the_family_of_a_type() -> None:
    assert [family_of(name) for name in ("p5en.48xlarge", "g6e.xlarge", "p6-b200.48xlarge", "c7i.xlarge")] == [
        ("p", "p5"),
        ("g", "g6"),
        ("p", "p6"),
        ("c", "c7"),
    ]
