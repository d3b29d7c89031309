"""A fleet on AWS as a list of things to make: pure, from the spec and the catalog, the same list each time.

A security group is a conversation, not a machine: its members talk to each other, and nobody else does. So no group
names another, and a machine has at most five, which is what EC2 gives an interface.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from gpuyard.provision import Json, Ref, Wanted
from gpuyard.provision.cards import efa_cards, layout
from gpuyard.provision.placement import Refusal, needs_group, places, usable, zones_of
from gpuyard.provision.refusals import Machines
from gpuyard.provision.storage import storage
from gpuyard.spec.aws import GATEWAY_ROOT_GIB, NOTICE_PORT, Aws, PoolAws
from gpuyard.spec.fleet import Fleet, Pool

_ANYWHERE = "0.0.0.0/0"
_SSM = ("ssm", "ssmmessages")


def wanted(fleet: Fleet, machines: Machines, refusals: Sequence[Refusal] = ()) -> list[Wanted]:
    """All that is made for a fleet, in an order in which it can be made.

    `refusals`: which zones had no machines, so that the nodes yet to be made go elsewhere. The fleet has to have passed
    `refusals.refusals`.
    """
    aws = fleet.aws
    assert aws is not None  # noqa: S101 - AWS-SETTINGS
    made = [
        *_network(aws),
        *_groups(fleet, aws),
        *_access(fleet, aws),
        *storage(aws, private_subnets(aws)),
        *_gateways(fleet, aws),
    ]
    for pool in fleet.pools:
        made += _pool(pool, fleet, aws, machines, refusals)
    return [_tagged(item, fleet, aws) for item in made]


def private_subnets(aws: Aws) -> dict[str, Ref | str]:
    """The private subnet of each zone."""
    if aws.network.vpc:
        return {zone: (aws.network.subnets or {})[zone] for zone in aws.zones}
    return {zone: Ref(f"private-{zone}") for zone in aws.zones}


def instance_of(pool: Pool) -> str:
    """The type of the pool's machines. Needs the pool to have passed AWS-INSTANCE."""
    assert pool.machine is not None and pool.machine.instance is not None  # noqa: S101 - AWS-INSTANCE
    return pool.machine.instance


def _vpc(aws: Aws) -> Ref | str:
    return aws.network.vpc or Ref("vpc")


def _network(aws: Aws) -> Iterator[Wanted]:
    """A new VPC, a private and a public subnet in each zone, and its door to S3; in another the door if asked for."""

    def item(kind: str, name: str, inputs: dict[str, Any], after: tuple[str, ...] = ()) -> Wanted:
        return Wanted(kind, name, inputs, "network", after=after)

    tables: list[Ref | str] = list(aws.network.route_tables)
    if aws.network.cidr:
        yield item("ec2.Vpc", "vpc", {"cidr_block": aws.network.cidr, "enable_dns_hostnames": True})
        yield item("ec2.InternetGateway", "internet", {"vpc_id": Ref("vpc")})
        cuts = ipaddress.ip_network(aws.network.cidr).subnets(new_prefix=aws.network.subnet_bits)
        for kind in ("private", "public"):
            for zone in aws.zones:
                inputs = {"vpc_id": Ref("vpc"), "availability_zone": zone, "cidr_block": str(next(cuts))}
                yield item("ec2.Subnet", f"{kind}-{zone}", inputs)
        # What is bound to no other table follows the VPC's own: that is the public subnets.
        out = {"cidr_block": _ANYWHERE, "gateway_id": Ref("internet")}
        main = {"default_route_table_id": Ref("vpc", "default_route_table_id"), "routes": [out]}
        yield item("ec2.DefaultRouteTable", "public", main)
        for zone in aws.zones:
            yield item("ec2.Eip", f"nat-{zone}", {"domain": "vpc"}, after=("internet",))
            inputs = {"allocation_id": Ref(f"nat-{zone}"), "subnet_id": Ref(f"public-{zone}")}
            yield item("ec2.NatGateway", f"nat-{zone}-gateway", inputs)
            out = {"cidr_block": _ANYWHERE, "nat_gateway_id": Ref(f"nat-{zone}-gateway")}
            yield item("ec2.RouteTable", f"private-{zone}-routes", {"vpc_id": Ref("vpc"), "routes": [out]})
            tables.append(Ref(f"private-{zone}-routes"))
            inputs = {"subnet_id": Ref(f"private-{zone}"), "route_table_id": Ref(f"private-{zone}-routes")}
            yield item("ec2.RouteTableAssociation", f"private-{zone}-association", inputs)
    if not aws.network.makes("s3"):
        return
    read = {
        "Effect": "Allow",
        "Principal": "*",  # a gateway endpoint knows no other; who may read what is said by the bucket
        "Action": ["s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{aws.bucket}/*"],
    }
    endpoint = {
        "vpc_id": _vpc(aws),
        "service_name": f"com.amazonaws.{aws.region}.s3",
        "vpc_endpoint_type": "Gateway",
        "route_table_ids": tables,
        "policy": Json({"Version": "2012-10-17", "Statement": [read]}),
    }
    yield item("ec2.VpcEndpoint", "s3-endpoint", endpoint)


def _groups(fleet: Fleet, aws: Aws) -> Iterator[Wanted]:
    def group(name: str, says: str, ingress: list[dict[str, Any]], egress: list[dict[str, Any]]) -> Wanted:
        inputs = {"vpc_id": _vpc(aws), "description": says, "ingress": ingress, "egress": egress}
        return Wanted("ec2.SecurityGroup", f"{name}-group", inputs, "network")

    def among(ports: Sequence[tuple[int, int]], protocol: str = "tcp") -> list[dict[str, Any]]:
        return [{"protocol": protocol, "from_port": low, "to_port": high, "self": True} for low, high in ports]

    def peers(name: str, says: str, ports: Sequence[tuple[int, int]], protocol: str = "tcp") -> Wanted:
        return group(name, says, among(ports, protocol), among(ports, protocol))

    def to(cidrs: Sequence[str], port: int) -> dict[str, Any]:
        return {"protocol": "tcp", "from_port": port, "to_port": port, "cidr_blocks": list(cidrs)}

    port = fleet.gateway.port
    yield peers("edge", "load balancer and gateways", [(port, port)])
    ports = sorted({NOTICE_PORT, *(model.port for model in fleet.models)})
    yield peers("serving", "gateways and GPU nodes", [(port, port) for port in ports])
    if any(pool.efa for pool in fleet.pools):
        # EFA asks for a group whose peer is itself, both ways; an open way out is not enough for it.
        yield peers("fabric", "EFA among GPU nodes", [(0, 0)], "-1")
    if aws.lustre or aws.efs:
        # Lustre's own ports, and NFS's.
        ports = [*([(988, 988), (1018, 1023)] if aws.lustre else []), *([(2049, 2049)] if aws.efs else [])]
        yield peers("storage", "GPU nodes and file systems", ports)
    out = [to([_ANYWHERE], 80), to([_ANYWHERE], 443)]
    # The endpoints of the Systems Manager are members too, and answer there.
    session = among([(443, 443)]) if aws.access.method == "ssm" else []
    yield group("outward", "packages, models, the Systems Manager", session, out)
    if aws.access.method != "ssm":
        yield group("ssh", "operators", [to(aws.access.sources, 22)], [])
    if aws.network.clients:
        yield group("clients", "clients to the load balancer", [to(aws.network.clients, port)], [])


def _access(fleet: Fleet, aws: Aws) -> Iterator[Wanted]:
    def item(kind: str, name: str, inputs: dict[str, Any]) -> Wanted:
        return Wanted(kind, name, inputs, "access")

    yield item("ec2.KeyPair", "operators", {"key_name": fleet.name, "public_key": aws.access.public_key})
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    yield item(
        "iam.Role",
        "node-role",
        {"name": f"{fleet.name}-node", "assume_role_policy": Json({"Version": "2012-10-17", "Statement": [trust]})},
    )
    yield item("iam.InstanceProfile", "node-profile", {"name": f"{fleet.name}-node", "role": Ref("node-role", "name")})
    if aws.access.method == "ssm":
        inputs = {
            "role": Ref("node-role", "name"),
            "policy_arn": "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore",
        }
        yield item("iam.RolePolicyAttachment", "node-ssm", inputs)
        for service in _SSM if aws.network.makes("ssm") else ():
            endpoint = {
                "vpc_id": _vpc(aws),
                "service_name": f"com.amazonaws.{aws.region}.{service}",
                "vpc_endpoint_type": "Interface",
                "private_dns_enabled": True,
                "subnet_ids": list(private_subnets(aws).values()),
                "security_group_ids": [Ref("outward-group")],
            }
            yield item("ec2.VpcEndpoint", f"{service}-endpoint", endpoint)
    if aws.budget:
        alarm = {
            "comparison_operator": "GREATER_THAN",
            "threshold_type": "PERCENTAGE",
            "subscriber_email_addresses": [aws.budget.email],
        }
        # AWS forecasts nothing before it has seen some five weeks of a bill.
        when = (("ACTUAL", 80), ("ACTUAL", 100), ("FORECASTED", 100))
        inputs = {
            "name": fleet.name,
            "budget_type": "COST",
            "time_unit": "MONTHLY",
            "limit_amount": f"{aws.budget.usd_per_month:.2f}",
            "limit_unit": "USD",
            "cost_filters": [{"name": "TagKeyValue", "values": [f"user:gpuyard:fleet${fleet.name}"]}],
            "notifications": [{**alarm, "notification_type": kind, "threshold": percent} for kind, percent in when],
        }
        yield item("budgets.Budget", "budget", inputs)


def _gateways(fleet: Fleet, aws: Aws) -> Iterator[Wanted]:
    """One address for clients, in two zones where there are two, and the gateways behind it."""
    zones, port = aws.zones[:2], fleet.gateway.port
    outside = bool(aws.network.clients)
    given = aws.network.gateway_subnets or aws.network.subnets or {}
    kind = "public" if outside else "private"
    subnets = [given[zone] if aws.network.vpc else Ref(f"{kind}-{zone}") for zone in zones]
    balancer = {
        "name": f"{fleet.name}-gateway",
        "load_balancer_type": "network",
        "internal": not outside,
        "subnets": subnets,
        "security_groups": [Ref("edge-group"), *([Ref("clients-group")] if outside else [])],
        "enable_cross_zone_load_balancing": True,
    }
    check = {"protocol": "TCP", "port": str(port), "interval": 10, "healthy_threshold": 2, "unhealthy_threshold": 2}
    target = {"name": f"{fleet.name}-gateway", "port": port, "protocol": "TCP", "vpc_id": _vpc(aws)}
    forward = {"type": "forward", "target_group_arn": Ref("gateway-targets", "arn")}
    listener = {"load_balancer_arn": Ref("balancer", "arn"), "port": port, "protocol": "TCP"}
    yield Wanted("lb.LoadBalancer", "balancer", balancer, "gateway")
    yield Wanted("lb.TargetGroup", "gateway-targets", {**target, "health_check": check}, "gateway")
    yield Wanted("lb.Listener", "gateway-listener", {**listener, "default_actions": [forward]}, "gateway")
    groups = ["edge", "serving", "outward", *([] if aws.access.method == "ssm" else ["ssh"])]
    cards = [_card(0, 0, "interface", groups, only=True)]
    for zone in dict.fromkeys(zones[number % len(zones)] for number in range(fleet.gateway.nodes)):
        template = _template(fleet, aws, "gateway", zone, aws.gateway_instance, cards, GATEWAY_ROOT_GIB)
        yield Wanted("ec2.LaunchTemplate", f"gateway-{zone}-template", template, "gateway")
    for number in range(fleet.gateway.nodes):
        node = f"{fleet.name}-gateway-{number}"
        yield _instance(node, "gateway", zones[number % len(zones)])
        inputs = {"target_group_arn": Ref("gateway-targets", "arn"), "target_id": Ref(node), "port": port}
        yield Wanted("lb.TargetGroupAttachment", f"{node}-target", inputs, "gateway", node)


def _pool(pool: Pool, fleet: Fleet, aws: Aws, machines: Machines, refusals: Sequence[Refusal]) -> Iterator[Wanted]:
    """Templates for every zone in which a node may stand, so that where one stands is all that a node says."""
    name = instance_of(pool)
    row = machines.instance(name)
    assert row is not None  # noqa: S101 - AWS-INSTANCE
    efa = efa_cards(pool, row)
    groups = ["serving", "outward"]
    groups += ["storage"] if aws.lustre or aws.efs else []
    groups += [] if aws.access.method == "ssm" else ["ssh"]
    groups += ["fabric"] if efa else []
    cards = [
        _card(
            card.network_card_index,
            card.device_index,
            card.interface_type,
            groups if card.interface_type == "interface" else ["fabric"],
            only=not efa,
        )
        for card in layout(machines.network_cards(name), efa)
    ]
    for zone in zones_of(pool, fleet):
        if needs_group(pool):
            inputs = {"name": f"{fleet.name}-{pool.name}-{zone}", "strategy": "cluster"}
            yield Wanted("ec2.PlacementGroup", f"{pool.name}-{zone}-placement", inputs, pool.name)
        template = _template(fleet, aws, pool.name, zone, name, cards, (pool.aws or PoolAws()).root_gib)
        if needs_group(pool):
            template["placement"]["group_name"] = Ref(f"{pool.name}-{zone}-placement", "name")
        template |= _purchase(pool)
        yield Wanted("ec2.LaunchTemplate", f"{pool.name}-{zone}-template", template, pool.name)
    for number, zone in enumerate(places(pool, fleet, name, refusals)):
        yield _instance(f"{fleet.name}-{pool.name}-{number}", pool.name, zone)


def _purchase(pool: Pool) -> dict[str, Any]:
    purchase = (pool.machine and pool.machine.purchase) or "on-demand"
    found: dict[str, Any] = {}
    if purchase == "spot":
        once = {"spot_instance_type": "one-time", "instance_interruption_behavior": "terminate"}
        found["instance_market_options"] = {"market_type": "spot", "spot_options": once}
    if purchase == "capacity-block":
        found["instance_market_options"] = {"market_type": "capacity-block"}
    if pool.aws and pool.aws.reservation:
        target = {"capacity_reservation_id": pool.aws.reservation}
        found["capacity_reservation_specification"] = {"capacity_reservation_target": target}
    return found


def _card(index: int, device: int, kind: str, groups: Sequence[str], only: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "network_card_index": index,
        "device_index": device,
        "interface_type": kind,
        "security_groups": [Ref(f"{group}-group") for group in groups],
        "delete_on_termination": "true",
    }
    # EC2 refuses the word itself where there are several interfaces, and gives none of them a public address.
    return {**found, "associate_public_ip_address": "false"} if only else found


def _template(
    fleet: Fleet, aws: Aws, pool: str, zone: str, instance: str, cards: Sequence[dict[str, Any]], root_gib: int
) -> dict[str, Any]:
    subnet = private_subnets(aws)[zone]
    disk = {
        "volume_type": "gp3",
        "volume_size": root_gib,
        "encrypted": "true",
        "delete_on_termination": "true",
    }
    tags = _tags(fleet, aws)
    return {
        "name": f"{fleet.name}-{pool}-{zone}",
        "image_id": aws.image.id,
        "instance_type": instance,
        "key_name": Ref("operators", "key_name"),
        "iam_instance_profile": {"arn": Ref("node-profile", "arn")},
        "metadata_options": {
            "http_endpoint": "enabled",
            "http_tokens": "required",
            "http_put_response_hop_limit": 1,
        },
        "block_device_mappings": [{"device_name": aws.image.root_device, "ebs": disk}],
        "network_interfaces": [{**card, "subnet_id": subnet} for card in cards],
        "placement": {"availability_zone": zone},
        "tag_specifications": [{"resource_type": kind, "tags": tags} for kind in ("volume", "network-interface")],
    }


def _instance(node: str, part: str, zone: str) -> Wanted:
    """A machine. What its template says later, also another image, is for machines to come and touches none that is."""
    template = {"id": Ref(f"{part}-{zone}-template"), "version": "$Latest"}
    inputs = {"launch_template": template, "tags": {"Name": node}}
    return Wanted("ec2.Instance", node, inputs, part, node, zone, keeps=("launch_template",))


def _tags(fleet: Fleet, aws: Aws) -> dict[str, str]:
    return {**aws.tags, "gpuyard:fleet": fleet.name}


_UNTAGGED = {
    "ec2.RouteTableAssociation",
    "iam.RolePolicyAttachment",
    "lb.TargetGroupAttachment",
    "efs.MountTarget",
    "s3.BucketPublicAccessBlock",
    "s3.BucketPolicy",
}


def _tagged(item: Wanted, fleet: Fleet, aws: Aws) -> Wanted:
    if item.kind in _UNTAGGED:
        return item
    own = {"Name": f"{fleet.name}-{item.name}", **_tags(fleet, aws), "gpuyard:part": item.part}
    inputs = {**item.inputs, "tags": {**own, **item.inputs.get("tags", {})}}
    return replace(item, inputs=inputs)


def next_zone(pool: Pool, fleet: Fleet, refusals: Sequence[Refusal]) -> str:
    """Where the next `up` will try, after what was refused until now."""
    return usable(zones_of(pool, fleet), instance_of(pool), refusals)[0]
