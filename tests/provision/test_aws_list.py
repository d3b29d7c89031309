"""What is decided for a fleet on AWS, before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpuyard.catalog import load_network_cards
from gpuyard.handover import Handover
from gpuyard.handover.aws import Made, handover_of
from gpuyard.provision import Json, Ref, Wanted
from gpuyard.provision.aws import wanted
from gpuyard.provision.cards import layout
from gpuyard.provision.placement import Refusal, places, refused_for_capacity, usable
from gpuyard.spec.aws import NOTICE_PORT
from gpuyard.spec.fleet import Fleet
from tests.provision.conftest import IN_A_BLOCK, MACHINES, NAMES, fleet_of

Changed = Callable[..., Fleet]

# (cards, EFA interfaces, where the first of them sits): as EC2 publishes them, written here a second time.
CARDS = {
    "g5.48xlarge": (1, 1, (0, 1)),
    "g6e.12xlarge": (1, 1, (0, 1)),
    "g6e.24xlarge": (2, 2, (0, 1)),
    "g6e.48xlarge": (4, 4, (0, 1)),
    "g7e.24xlarge": (2, 2, (0, 1)),
    "g7e.48xlarge": (4, 4, (0, 1)),
    "p4d.24xlarge": (4, 4, (0, 1)),
    "p4de.24xlarge": (4, 4, (0, 1)),
    "p5.4xlarge": (1, 1, (0, 1)),
    "p5.48xlarge": (32, 32, (0, 1)),
    "p5e.48xlarge": (32, 32, (0, 1)),
    "p5en.48xlarge": (16, 16, (0, 1)),
    "p6-b200.48xlarge": (8, 8, (0, 1)),
    "p6-b300.48xlarge": (17, 16, (1, 0)),
}


@pytest.mark.parametrize("name", CARDS)
def test_every_card_of_a_type_gets_its_interface_where_ec2_wants_it(name: str) -> None:
    cards, efa, first = CARDS[name]
    row = MACHINES.instance(name)
    assert row is not None and row.efa == efa
    found = layout(MACHINES.network_cards(name), efa)
    assert (found[0].network_card_index, found[0].device_index, found[0].interface_type) == (0, 0, "interface")
    assert (found[1].network_card_index, found[1].device_index) == first
    only = found[1:]
    assert [card.interface_type for card in only] == ["efa-only"] * efa
    assert len({card.network_card_index for card in only}) == efa, "two EFA interfaces on one card"
    assert {card.network_card_index for card in found} == set(range(cards))
    assert all(card.device_index == 0 for card in only if card.network_card_index > 0)


def test_every_type_with_several_cards_is_in_the_list_above() -> None:
    assert {row.instance for row in load_network_cards()} <= set(CARDS)


def every(name: str) -> list[Wanted]:
    return wanted(fleet_of(name), MACHINES)


def of_kind(items: list[Wanted], kind: str) -> list[Wanted]:
    return [item for item in items if item.kind == kind]


def refs(value: Any) -> Iterator[Ref]:
    match value:
        case Ref():
            yield value
        case Json():
            yield from refs(dict(value.data))
        case dict():
            for item in value.values():
                yield from refs(item)
        case list():
            for item in value:
                yield from refs(item)
        case _:
            return


@pytest.mark.parametrize("name", NAMES)
def test_each_thing_is_there_once_and_after_what_it_refers_to(name: str) -> None:
    known: set[str] = set()
    for item in every(name):
        assert item.name not in known
        assert {ref.name for ref in refs(dict(item.inputs))} | set(item.after) <= known, item.name
        known.add(item.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_node_is_one_thing_and_a_fleet_at_most_eight_for_each(name: str) -> None:
    fleet, items = fleet_of(name), every(name)
    nodes = fleet.gateway.nodes + sum(pool.nodes for pool in fleet.pools)
    assert len(of_kind(items, "ec2.Instance")) == nodes
    assert len(items) <= 8 * nodes
    pool = fleet.pools[0]
    more = fleet.model_copy(update={"pools": (pool.model_copy(update={"nodes": pool.nodes + 1}), *fleet.pools[1:])})
    assert len(wanted(more, MACHINES)) == len(items) + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_has_imdsv2_an_encrypted_disk_and_no_public_address(name: str) -> None:
    templates = of_kind(every(name), "ec2.LaunchTemplate")
    assert templates
    for item in templates:
        data = item.inputs
        assert data["metadata_options"]["http_tokens"] == "required"
        assert [disk["ebs"]["encrypted"] for disk in data["block_device_mappings"]] == ["true"]
        assert data["block_device_mappings"][0]["ebs"]["volume_type"] == "gp3"
        cards = data["network_interfaces"]
        public = [card.get("associate_public_ip_address") for card in cards]
        assert public == (["false"] if len(cards) == 1 else [None] * len(cards))
        assert all(1 <= len(card["security_groups"]) <= 5 for card in cards)
        assert data["image_id"] == fleet_of(name).aws.image.id  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("name", NAMES)
def test_from_outside_only_the_gateway_s_port_is_open_and_only_to_its_clients(name: str) -> None:
    fleet = fleet_of(name)
    inward = [
        (item.name, rule["from_port"], rule["to_port"], rule.get("cidr_blocks"))
        for item in of_kind(every(name), "ec2.SecurityGroup")
        for rule in item.inputs["ingress"]
        if rule.get("cidr_blocks")
    ]
    port = fleet.gateway.port
    assert inward == [("clients-group", port, port, ["198.51.100.0/24"])]


SOURCES = "sources: [10.9.0.0/24, 203.0.113.7/32]"
ACCESS = {
    "ssm": [],
    f"ssh\n    {SOURCES}": ["10.9.0.0/24", "203.0.113.7/32"],
    f"bastion\n    bastion: ops@bastion.example.com\n    {SOURCES}": ["10.9.0.0/24", "203.0.113.7/32"],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("access", "sources"), ACCESS.items(), ids=["ssm", "ssh", "bastion"])
def test_port_22_is_open_to_the_sources_alone_and_with_sessions_to_nobody(
    changed: Changed, name: str, access: str, sources: list[str]
) -> None:
    items = wanted(changed(name, ("method: ssm", f"method: {access}")), MACHINES)
    groups = {item.name: item.inputs for item in of_kind(items, "ec2.SecurityGroup")}
    opened = {
        (group, rule["from_port"], rule["to_port"], *rule["cidr_blocks"])
        for group, inputs in groups.items()
        for rule in inputs["ingress"]
        if rule["protocol"] == "tcp" and rule["from_port"] <= 22 <= rule["to_port"]
    }
    assert opened == ({("ssh-group", 22, 22, *sources)} if sources else set())
    assert ("ssh-group" in groups) is bool(sources)
    if sources:
        assert groups["ssh-group"]["egress"] == []
    # Every machine is reached, by its first card: the one with the address.
    for template in of_kind(items, "ec2.LaunchTemplate"):
        first, *others = template.inputs["network_interfaces"]
        assert (Ref("ssh-group") in first["security_groups"]) is bool(sources), template.name
        assert all(Ref("ssh-group") not in card["security_groups"] for card in others), template.name
        assert len(first["security_groups"]) <= 5, "EC2 gives an interface no more"
    balancer = of_kind(items, "lb.LoadBalancer")[0].inputs["security_groups"]
    assert Ref("ssh-group") not in balancer


@pytest.mark.parametrize(("access", "sources"), ACCESS.items(), ids=["ssm", "ssh", "bastion"])
def test_the_systems_manager_has_its_policy_and_its_endpoints_only_where_sessions_are_used(
    changed: Changed, access: str, sources: list[str]
) -> None:
    """The policy reads every parameter of the account: who comes by SSH does without it."""
    items = {it.name: it for it in wanted(changed("aws-g6e", ("method: ssm", f"method: {access}")), MACHINES)}
    of_sessions = {"node-ssm", "ssm-endpoint", "ssmmessages-endpoint"}
    assert of_sessions & set(items) == (set() if sources else of_sessions)
    attached = [item.inputs["policy_arn"] for item in items.values() if item.kind == "iam.RolePolicyAttachment"]
    assert attached == ([] if sources else ["arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"])
    inward = items["outward-group"].inputs["ingress"]
    assert [rule["from_port"] for rule in inward] == ([] if sources else [443])


@pytest.mark.parametrize(
    ("access", "proxy"),
    list(zip(ACCESS, [("ssm", None), None, ("bastion", "ops@bastion.example.com")], strict=True)),
    ids=["ssm", "ssh", "bastion"],
)
def test_the_handover_says_by_which_way_machines_are_reached(
    changed: Changed, access: str, proxy: tuple[str, str | None] | None
) -> None:
    ssh = handed_over(changed("aws-g6e", ("method: ssm", f"method: {access}"))).ssh
    assert (ssh.proxy and (ssh.proxy.method, ssh.proxy.bastion)) == proxy
    assert (ssh.user, ssh.private_key_file) == ("admin", "~/.ssh/id_ed25519")
    assert (ssh.known_hosts_file, ssh.first_seen) == ("~/.ssh/known_hosts.aws-g6e", True)


def test_without_clients_the_balancer_is_an_internal_one(changed: Changed) -> None:
    fleet = changed("aws-g6e", ("    clients: [198.51.100.0/24]\n", ""))
    items = wanted(fleet, MACHINES)
    assert of_kind(items, "lb.LoadBalancer")[0].inputs["internal"] is True
    assert "clients-group" not in {item.name for item in items}


def test_efa_s_group_lets_everything_to_itself_and_nothing_to_others() -> None:
    group = next(item for item in every("aws-p5en") if item.name == "fabric-group")
    rule = [{"protocol": "-1", "from_port": 0, "to_port": 0, "self": True}]
    assert group.inputs["ingress"] == group.inputs["egress"] == rule


def test_no_policy_of_ours_allows_everything() -> None:
    for name in NAMES:
        for item in every(name):
            for document in (value for value in item.inputs.values() if isinstance(value, Json)):
                for statement in document.data["Statement"]:
                    if statement["Effect"] == "Deny":
                        continue
                    actions = statement["Action"]
                    assert "*" not in json.dumps(actions), item.name
                    assert statement.get("Resource", "none") != "*", item.name


def test_the_bucket_is_shut_and_read_through_the_endpoint_alone() -> None:
    items = {item.name: item for item in every("aws-p5en")}
    shut = items["models-shut"].inputs
    assert all(value is True for key, value in shut.items() if key not in ("bucket", "tags"))
    allow, deny = items["models-policy"].inputs["policy"].data["Statement"]
    assert allow["Condition"] == {"StringEquals": {"aws:SourceVpce": Ref("s3-endpoint")}}
    assert (deny["Effect"], deny["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})


def test_gateways_stand_in_two_zones_behind_one_address() -> None:
    items = every("aws-g6e")
    assert [item.zone for item in items if item.part == "gateway" and item.zone] == ["us-east-1a", "us-east-1b"]
    assert len(of_kind(items, "lb.TargetGroupAttachment")) == 2


def test_gateways_may_ask_a_node_whether_it_goes_on() -> None:
    group = next(item for item in every("aws-p5en") if item.name == "serving-group").inputs
    opened = [{"protocol": "tcp", "from_port": port, "to_port": port, "self": True} for port in (NOTICE_PORT, 8000)]
    assert group["ingress"] == group["egress"] == opened


def handed_over(fleet: Fleet, **types: str) -> Handover:
    """What a fleet hands over once it is made. `types`: of the machines of a part, as AWS tells them."""
    machines = [item for item in wanted(fleet, MACHINES) if item.kind == "ec2.Instance"]
    nodes = {
        item.name: {
            "id": f"i-{number:017x}",
            "address": f"10.60.0.{number + 4}",
            "zone": "us-east-1a",
            "type": types.get(item.part, "c7i.xlarge"),
        }
        for number, item in enumerate(machines)
    }
    lustre = {"dns_name": "fs-1.fsx.us-east-1.amazonaws.com", "mount_name": "abcd"}
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n"
    made = Made("gateway.example.com", nodes, lustre, {"dns_name": "fs-2.efs.us-east-1.amazonaws.com"})
    return handover_of(fleet, "prod", f"sha256:{'0' * 64}", key, "A" * 40, made)


def test_a_node_in_a_capacity_block_is_handed_over_with_its_end(changed: Changed) -> None:
    def ends(fleet: Fleet) -> set[tuple[str, str | None]]:
        return {(node.role, node.block_ends) for node in handed_over(fleet).nodes}

    assert ends(changed("aws-p5en", *IN_A_BLOCK)) == {("gateway", None), ("gpu", "2026-12-07T11:30:00Z")}
    assert ends(fleet_of("aws-p5en")) == {("gateway", None), ("gpu", None)}


@pytest.mark.parametrize(
    ("instance", "disks"),
    [("p5en.48xlarge", 8), ("g6e.12xlarge", 2), ("p3.16xlarge", None), ("p9.48xlarge", None)],
    ids=["eight", "as it was made, whatever the spec asks for", "none", "a type that is not known"],
)
def test_a_node_is_handed_over_with_the_local_disks_of_its_machine(instance: str, disks: int | None) -> None:
    """A gateway has none to be held to, of whatever type it is."""
    found = {
        (node.role, node.nvme and node.nvme.disks) for node in handed_over(fleet_of("aws-p5en"), large=instance).nodes
    }
    assert found == {("gateway", None), ("gpu", disks)}
    of_gateways = handed_over(fleet_of("aws-p5en"), large=instance, gateway="g6e.12xlarge")
    assert {node.nvme for node in of_gateways.nodes if node.role == "gateway"} == {None}


def test_spot_reservation_and_capacity_block_stand_in_the_template(changed: Changed) -> None:
    def template(fleet: Fleet, name: str) -> Any:
        return next(item.inputs for item in wanted(fleet, MACHINES) if item.name == name)

    spot = template(fleet_of("aws-mixed"), "old-us-east-1a-template")
    assert spot["instance_market_options"]["market_type"] == "spot"
    block = changed("aws-p5en", *IN_A_BLOCK)
    data = template(block, "large-us-east-1a-template")
    assert data["instance_market_options"] == {"market_type": "capacity-block"}
    target = {"capacity_reservation_id": "cr-0123456789abcdef0"}
    assert data["capacity_reservation_specification"] == {"capacity_reservation_target": target}
    assert "group_name" not in data["placement"]
    assert not of_kind(wanted(block, MACHINES), "ec2.PlacementGroup")
    reserved = changed("aws-p5en", ("zones: [us-east-1a]}", "zones: [us-east-1a], reservation: cr-0123456789abcdef0}"))
    data = template(reserved, "large-us-east-1a-template")
    assert "instance_market_options" not in data
    assert data["capacity_reservation_specification"] == {"capacity_reservation_target": target}
    assert data["placement"]["group_name"] == Ref("large-us-east-1a-placement", "name")


SUBNETS = "subnets: {us-east-1a: subnet-0123456789abcdef0, us-east-1b: subnet-0123456789abcdef1}"
THERE = f"vpc: vpc-0123456789abcdef0\n    {SUBNETS}"
TABLES = "\n    route_tables: [rtb-0123456789abcdef0]"


def in_theirs(changed: Changed, more: str = "") -> dict[str, Wanted]:
    """The list in a VPC that is there, by name."""
    items = wanted(changed("aws-g6e", ("cidr: 10.60.0.0/16", THERE + more)), MACHINES)
    assert not {"ec2.Vpc", "ec2.Subnet", "ec2.RouteTable", "ec2.NatGateway", "ec2.Eip"} & {item.kind for item in items}
    return {item.name: item for item in items}


def readers(items: dict[str, Wanted]) -> Any:
    return items["models-policy"].inputs["policy"].data["Statement"][0]["Condition"]


def endpoints(items: dict[str, Wanted]) -> list[str]:
    return [name for name, item in items.items() if item.kind == "ec2.VpcEndpoint"]


def test_an_existing_vpc_is_used_and_nothing_of_it_is_made_no_endpoint_either(changed: Changed) -> None:
    items = in_theirs(changed)
    template = items["chat-us-east-1b-template"].inputs
    assert template["network_interfaces"][0]["subnet_id"] == "subnet-0123456789abcdef1"
    assert endpoints(items) == []
    assert readers(items) == {"StringEquals": {"aws:SourceVpc": "vpc-0123456789abcdef0"}}


def test_an_existing_endpoint_of_s3_is_the_way_to_the_bucket(changed: Changed) -> None:
    items = in_theirs(changed, "\n    s3_endpoint: vpce-0123456789abcdef0")
    assert endpoints(items) == []
    assert readers(items) == {"StringEquals": {"aws:SourceVpce": "vpce-0123456789abcdef0"}}


def test_endpoints_are_made_in_an_existing_vpc_when_they_are_asked_for(changed: Changed) -> None:
    assert endpoints(in_theirs(changed, "\n    make_endpoints: [ssm]")) == ["ssm-endpoint", "ssmmessages-endpoint"]
    items = in_theirs(changed, f"{TABLES}\n    make_endpoints: [s3]")
    assert endpoints(items) == ["s3-endpoint"]
    assert items["s3-endpoint"].inputs["route_table_ids"] == ["rtb-0123456789abcdef0"]
    assert readers(items) == {"StringEquals": {"aws:SourceVpce": Ref("s3-endpoint")}}


@pytest.mark.parametrize("name", NAMES)
def test_a_mail_is_sent_of_a_bill_that_is_there_and_of_one_that_is_forecast(name: str) -> None:
    (budget,) = of_kind(every(name), "budgets.Budget")
    mails = budget.inputs["notifications"]
    assert [(mail["notification_type"], mail["threshold"]) for mail in mails] == [
        ("ACTUAL", 80),
        ("ACTUAL", 100),
        ("FORECASTED", 100),
    ]
    assert {(*mail["subscriber_email_addresses"], mail["threshold_type"]) for mail in mails} == {
        ("platform@example.com", "PERCENTAGE")
    }


def test_a_word_that_begins_like_one_of_capacity_s_is_none() -> None:
    assert refused_for_capacity("api error InsufficientInstanceCapacity: We currently do not have sufficient capacity")
    assert refused_for_capacity("api error Unsupported: Your requested instance type is not supported in your zone")
    assert not refused_for_capacity("api error UnsupportedOperation: The instance configuration is not supported")
    assert not refused_for_capacity("api error InsufficientInstanceCapacityLike")


def refusal(zone: str, minute: int, instance: str = "p5.48xlarge") -> Refusal:
    at = f"2026-11-29T10:{minute:02}:00Z"
    return Refusal(at=at, node="aws-mixed-new-0", instance=instance, zone=zone, said="InsufficientInstanceCapacity")


def test_a_zone_that_refused_is_left_and_tried_again_when_all_did() -> None:
    zones = ("a", "b", "c")
    assert usable(zones, "p5.48xlarge", []) == zones
    assert usable(zones, "p5.48xlarge", [refusal("a", 1)]) == ("b", "c")
    assert usable(zones, "p5.48xlarge", [refusal("a", 1, "p4d.24xlarge")]) == zones
    all_of_them = [refusal("b", 1), refusal("a", 2), refusal("c", 3)]
    assert usable(zones, "p5.48xlarge", all_of_them) == ("b",)
    assert usable(zones, "p5.48xlarge", [*all_of_them, refusal("b", 4)]) == ("a",)


def test_nodes_with_efa_move_together_and_others_are_spread() -> None:
    mixed, g6e = fleet_of("aws-mixed"), fleet_of("aws-g6e")
    new = mixed.pools[1]
    assert places(new, mixed, "p5.48xlarge", []) == ["us-east-1b"] * 4
    assert places(new, mixed, "p5.48xlarge", [refusal("us-east-1b", 1)]) == ["us-east-1a"] * 4
    assert places(g6e.pools[0], g6e, "g6e.12xlarge", []) == ["us-east-1a", "us-east-1b"] * 4
    refused = [refusal("us-east-1a", 1, "g6e.12xlarge")]
    assert places(g6e.pools[0], g6e, "g6e.12xlarge", refused) == ["us-east-1b"] * 8
