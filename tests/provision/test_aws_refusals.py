"""Bad input for AWS: each rule by what breaks it, and by the smallest change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.provision.refusals import architecture_of, refusals
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from tests.provision.conftest import IN_A_BLOCK, MACHINES, NAMES, fleet_of

Changed = Callable[..., Fleet]
PROJECT = Path(__file__).parents[2]

THERE = (
    "vpc: vpc-0123456789abcdef0\n"
    "    subnets: {us-east-1a: subnet-0123456789abcdef0, us-east-1b: subnet-0123456789abcdef1}"
)
EFA = ("purchase: on-demand}\n", "purchase: on-demand}\n    efa: {}\n")
BAD = {
    "no type of machine": (
        "aws-g6e",
        [("    machine: {instance: g6e.12xlarge, purchase: on-demand}\n", "")],
        "AWS-INSTANCE",
        "name one of g6e.12xlarge, g6e.24xlarge",
    ),
    "a type with other GPUs": ("aws-g6e", [("g6e.12xlarge", "g5.12xlarge")], "AWS-INSTANCE", "name one of g6e"),
    "a type that is not known": ("aws-g6e", [("g6e.12xlarge", "g9.12xlarge")], "AWS-INSTANCE", "name one of g6e"),
    "a type without EFA": (
        "aws-g6e",
        [
            ("g6e.12xlarge", "g6e.4xlarge"),
            ("gpus_per_node: 4", "gpus_per_node: 1"),
            ("data_parallel_size: 4", "data_parallel_size: 1"),
            EFA,
        ],
        "AWS-EFA",
        "take g6e.8xlarge, g6e.16xlarge",
    ),
    "more cards than it has": (
        "aws-p5en",
        [("zones: [us-east-1a]}", "zones: [us-east-1a], network_cards: 32}")],
        "AWS-CARDS",
        "set it to 16",
    ),
    "cards without EFA": (
        "aws-g6e",
        [("purchase: on-demand}", "purchase: on-demand}\n    aws: {network_cards: 2}")],
        "AWS-CARDS",
        "leave network_cards out",
    ),
    "cards that nobody knows": (
        "aws-g6e",
        [
            ("g6e.12xlarge", "g7.48xlarge"),
            ("gpus_per_node: 4", "gpus_per_node: 8"),
            ("gpu: L40S", "gpu: RTX-PRO-4500-Blackwell-Server"),
            EFA,
        ],
        "AWS-CARDS-UNKNOWN",
        "network_cards.yaml",
    ),
    "an image of another architecture": (
        "aws-g6e",
        [("x86_64, user", "arm64, user"), ("c7i.", "c7g.")],
        "AWS-ARCHITECTURE",
        "take an image of that architecture",
    ),
    "a gateway of another architecture": ("aws-g6e", [("c7i.xlarge", "c7g.xlarge")], "AWS-ARCHITECTURE", "another"),
    "all gateways in one zone": (
        "aws-g6e",
        [("zones: [us-east-1a, us-east-1b]", "zones: [us-east-1a]")],
        "AWS-GATEWAY-ZONES",
        "name a second zone",
    ),
    "an address with a host's part": ("aws-g6e", [("10.60.0.0/16", "10.60.1.0/16")], "AWS-CIDR", "first address"),
    "a VPC too small for its subnets": ("aws-g6e", [("10.60.0.0/16", "10.60.0.0/19")], "AWS-SUBNETS", "to 21"),
    "a subnet too small for its nodes": (
        "aws-g6e",
        [("10.60.0.0/16", "10.60.0.0/16\n    subnet_bits: 28")],
        "AWS-SUBNET-SMALL",
        "set it to 27 or less",
    ),
    "a file system in another zone": (
        "aws-p5en",
        [("lustre: {zone: us-east-1a", "lustre: {zone: us-east-1b")],
        "AWS-FILES-ZONE",
        "set it to us-east-1a",
    ),
    "EFA to a file system across zones": (
        "aws-p5en",
        [("    aws: {zones: [us-east-1a]}\n", "")],
        "AWS-FILES-ZONE",
        "set pools[0].aws.zones to [us-east-1a]",
    ),
    "a size that Lustre does not have": ("aws-p5en", [("tib: 9.6", "tib: 10")], "AWS-LUSTRE-SIZE", "set it to 12.0"),
    "a size too small for EFA": ("aws-p5en", [("tib: 9.6", "tib: 4.8")], "AWS-LUSTRE-SIZE", "set efa to false"),
    "Lustre on a distribution without its client": (
        "aws-p5en",
        [("distribution: ubuntu-24.04", "distribution: debian-12")],
        "AWS-LUSTRE-CLIENT",
        "take ubuntu-24.04 or ubuntu-22.04, with an image",
    ),
    "Lustre over EFA from a kernel too old": (
        "aws-p5en",
        [("distribution: ubuntu-24.04", "distribution: ubuntu-22.04")],
        "AWS-LUSTRE-CLIENT",
        'set kernel to "6.8", or aws.lustre.efa to false',
    ),
    "Lustre over EFA from a client that has none": (
        "aws-p5en",
        [("distribution: ubuntu-24.04", "distribution: rocky-9")],
        "AWS-LUSTRE-CLIENT",
        "set it to false",
    ),
    "EFA to a file system and no pool with it": ("aws-p5en", [("    efa: {}\n", "")], "AWS-LUSTRE-EFA", "to false"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_repository_s_fleets_pass(name: str) -> None:
    assert refusals(fleet_of(name), MACHINES) == []


@pytest.mark.parametrize(("name", "changes", "rule", "change"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_the_smallest_change(
    changed: Changed, name: str, changes: list[tuple[str, str]], rule: str, change: str
) -> None:
    found = refusals(changed(name, *changes), MACHINES)
    assert [finding.rule for finding in found] == [rule]
    assert change in found[0].change
    assert found[0].level == "red"


@pytest.mark.parametrize(
    "changes",
    [
        [("distribution: ubuntu-24.04", 'distribution: ubuntu-22.04\nkernel: "6.8"')],
        [("distribution: ubuntu-24.04", "distribution: ubuntu-20.04"), (", efa: true", "")],
        [("distribution: ubuntu-24.04", "distribution: debian-12"), ("  lustre: {", "  efs: true\n  #")],
    ],
    ids=["a kernel that is new enough", "no EFA", "another file system"],
)
def test_the_change_that_a_missing_client_asks_for_passes(changed: Changed, changes: list[tuple[str, str]]) -> None:
    assert refusals(changed("aws-p5en", *changes), MACHINES) == []


SPEC = {
    "a zone of another region": ("aws-g6e", ("[us-east-1a, us-east-1b]", "[us-east-1a, us-west-2b]"), "SPEC-AWS-ZONE"),
    "a pool in a zone that the fleet does not name": (
        "aws-p5en",
        ("{zones: [us-east-1a]}", "{zones: [us-east-1c]}"),
        "SPEC-AWS-ZONE",
    ),
    "prices of another region": (
        "aws-g6e",
        ("planning:\n  region: us-east-1", "planning:\n  region: us-west-2"),
        "SPEC-AWS-REGION",
    ),
    "a new VPC and an old one": (
        "aws-g6e",
        ("cidr: 10.60.0.0/16", "cidr: 10.60.0.0/16\n    vpc: vpc-0123456789abcdef0"),
        "SPEC-AWS-NETWORK",
    ),
    "no VPC": ("aws-g6e", ("    cidr: 10.60.0.0/16\n", ""), "SPEC-AWS-NETWORK"),
    "an old VPC without its subnets": (
        "aws-g6e",
        ("cidr: 10.60.0.0/16", "vpc: vpc-0123456789abcdef0"),
        "SPEC-AWS-NETWORK",
    ),
    "an endpoint in a new VPC, which gets its own": (
        "aws-g6e",
        ("cidr: 10.60.0.0/16", "cidr: 10.60.0.0/16\n    make_endpoints: [ssm]"),
        "SPEC-AWS-NETWORK",
    ),
    "an endpoint that is there and is made": (
        "aws-g6e",
        ("cidr: 10.60.0.0/16", f"{THERE}\n    s3_endpoint: vpce-0123456789abcdef0\n    make_endpoints: [s3]"),
        "SPEC-AWS-NETWORK",
    ),
    "an endpoint of S3 on no route table": (
        "aws-g6e",
        ("cidr: 10.60.0.0/16", f"{THERE}\n    make_endpoints: [s3]"),
        "SPEC-AWS-NETWORK",
    ),
    "a bastion without a name": (
        "aws-g6e",
        ("method: ssm", "method: bastion\n    sources: [10.0.0.0/8]"),
        "SPEC-AWS-ACCESS",
    ),
    "SSH open to nobody": ("aws-g6e", ("method: ssm", "method: ssh"), "SPEC-AWS-ACCESS"),
    "SSH open to the world": (
        "aws-g6e",
        ("method: ssm", "method: ssh\n    sources: [10.0.0.0/8, 0.0.0.0/0]"),
        "SPEC-AWS-ACCESS",
    ),
    "SSH open to the world in two halves": (
        "aws-g6e",
        ("method: ssm", "method: ssh\n    sources: [0.0.0.0/1, 128.0.0.0/1]"),
        "SPEC-AWS-ACCESS",
    ),
    "a bastion, and SSH open to the world all the same": (
        "aws-g6e",
        ("method: ssm", "method: bastion\n    bastion: ops@bastion.example.com\n    sources: [0.0.0.0/0]"),
        "SPEC-AWS-ACCESS",
    ),
    "a placement group with a Capacity Block": (
        "aws-p5en",
        (
            "purchase: on-demand}\n    aws: {zones: [us-east-1a]",
            "purchase: capacity-block}\n"
            "    aws: {reservation: cr-0123456789abcdef0, placement_group: true, zones: [us-east-1a]",
        ),
        "SPEC-AWS-PLACEMENT",
    ),
    "a Capacity Block without its id": (
        "aws-p5en",
        ("purchase: on-demand", "purchase: capacity-block"),
        "SPEC-AWS-RESERVATION",
    ),
    "an end of a Capacity Block that is none": (
        "aws-mixed",
        ("{zones: [us-east-1a, us-east-1b]}\n  - name: new", "{block_ends: 2026-12-07T11:30:00Z}\n  - name: new"),
        "SPEC-AWS-BLOCK-END",
    ),
    "an end that is no time": (
        "aws-p5en",
        ("zones: [us-east-1a]}", "zones: [us-east-1a], block_ends: next monday}"),
        "SPEC-VALUE",
    ),
    "an end on a day that no calendar has": (
        "aws-p5en",
        ("zones: [us-east-1a]}", "zones: [us-east-1a], block_ends: '2026-02-30T11:30:00Z'}"),
        "SPEC-VALUE",
    ),
    "a spot machine in a reservation": (
        "aws-mixed",
        ("{zones: [us-east-1a, us-east-1b]}\n  - name: new", "{reservation: cr-0123456789abcdef0}\n  - name: new"),
        "SPEC-AWS-RESERVATION",
    ),
    "settings of AWS in the lab": ("aws-g6e", ("provider: aws\n", "provider: lab\n"), "SPEC-AWS-PROVIDER"),
    "an image by its name": ("aws-g6e", ("ami-0123456789abcdef0", "debian-12-latest"), "SPEC-VALUE"),
}


@pytest.mark.parametrize(("name", "change", "rule"), SPEC.values(), ids=SPEC)
def test_a_spec_that_contradicts_itself_is_refused(
    changed: Changed, name: str, change: tuple[str, str], rule: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        changed(name, change)
    assert refused.value.rule == rule


@pytest.mark.parametrize(
    ("access", "who"),
    [("ssh", "the operators' addresses"), ("bastion\n    bastion: ops@bastion.example.com", "the bastion's address")],
    ids=["ssh", "bastion"],
)
def test_ssh_is_open_to_networks_that_are_named_and_the_refusal_says_to_whom(
    changed: Changed, access: str, who: str
) -> None:
    def opened_to(sources: str) -> Fleet:
        return changed("aws-g6e", ("method: ssm", f"method: {access}\n    sources: [{sources}]"))

    assert refusals(opened_to("203.0.113.7/32, 10.0.0.0/8"), MACHINES) == []
    with pytest.raises(RefusedError, match=who) as refused:
        opened_to("203.0.113.7/32, 0.0.0.0/0")
    assert "aws.access.sources" in str(refused.value)
    assert "0.0.0.0/0" in str(refused.value)


def test_sources_that_open_nothing_are_let_be(changed: Changed) -> None:
    assert changed("aws-g6e", ("method: ssm", "method: ssm\n    sources: [0.0.0.0/0]")).aws


def test_a_capacity_block_comes_with_its_end(changed: Changed) -> None:
    bought = ("purchase: on-demand", "purchase: capacity-block")
    with pytest.raises(RefusedError, match="SPEC-AWS-BLOCK-END"):
        changed("aws-p5en", bought, ("zones: [us-east-1a]}", "reservation: cr-0123456789abcdef0}"))
    assert refusals(changed("aws-p5en", *IN_A_BLOCK), MACHINES) == []


def test_a_fleet_that_says_nothing_of_aws_can_be_planned_not_made() -> None:
    found = refusals(fleet_of("prod"), MACHINES)
    assert [(finding.rule, finding.level) for finding in found] == [("AWS-SETTINGS", "amber")]
    assert refusals(fleet_of("lab"), MACHINES) == []


def test_the_architecture_of_a_type_is_in_its_name() -> None:
    arm = ["g5g.xlarge", "c7g.xlarge", "c8gn.large", "im4gn.large", "p6e-gb200.36xlarge"]
    x86 = ["g5.xlarge", "g6e.48xlarge", "g7e.2xlarge", "gr6.4xlarge", "c7i.xlarge", "p6-b200.48xlarge", "m7a.large"]
    assert [architecture_of(name) for name in arm] == ["arm64"] * len(arm)
    assert [architecture_of(name) for name in x86] == ["x86_64"] * len(x86)


def test_every_rule_is_in_the_guide() -> None:
    rooms = ("src/gpuyard/provision", "stacks")
    code = "".join(path.read_text() for room in rooms for path in sorted((PROJECT / room).rglob("*.py")))
    spec = (PROJECT / "src/gpuyard/spec/rules.py").read_text()
    used = {*re.findall(r'"(AWS-[A-Z-]+)"', code), *re.findall(r'"(SPEC-AWS-[A-Z-]+)"', spec)}
    guide = (PROJECT / "docs/aws.md").read_text()
    assert [rule for rule in sorted(used) if f"`{rule}`" not in guide] == []
