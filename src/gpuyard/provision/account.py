"""What stands in an account against a fleet: asked before anything is made in it, judged here.

Only what is still to be made is asked for: an `up` that changes nothing asks nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpuyard.catalog.rows import Quota
from gpuyard.plan.judge import Finding
from gpuyard.provision import Wanted, resource_name
from gpuyard.provision.aws import instance_of
from gpuyard.provision.storage import lustre_addresses
from gpuyard.spec.aws import Aws
from gpuyard.spec.fleet import Fleet

_EC2 = "Amazon EC2 User Guide"


@dataclass(frozen=True, slots=True)
class Image:
    architecture: str
    root_device: str


@dataclass(frozen=True, slots=True)
class Subnet:
    zone: str
    vpc: str
    free: int
    """Addresses that nobody has."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    vpc: str
    service: str
    tables: frozenset[str] | None
    """Route tables that lead to it; None: it needs none."""


@dataclass(frozen=True, slots=True)
class MachineType:
    vcpus: int
    architectures: tuple[str, ...]
    zones: frozenset[str]
    """Zones of the region that offer it."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Ids and names to ask about. Nothing where nothing is to be made."""

    image: str | None
    types: tuple[str, ...]
    subnets: tuple[str, ...]
    quotas: tuple[str, ...]
    s3: Mapping[str, str] = field(default_factory=dict[str, str])
    """By what the endpoint of S3 of a VPC that is there is looked for."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the account says. What it does not have is left out."""

    image: Image | None
    types: Mapping[str, MachineType]
    subnets: Mapping[str, Subnet]
    quotas: Mapping[str, float]
    """Those that the account may be asked for."""
    s3: Endpoint | None = None


def to_make(items: Sequence[Wanted], fleet: str, there: frozenset[str]) -> list[Wanted]:
    """What is in no state yet. `there`: names of resources in the state."""
    return [item for item in items if resource_name(item, fleet) not in there]


def questions(fleet: Fleet, new: Sequence[Wanted], quotas: Sequence[Quota]) -> Questions:
    """What there is to know before `new` is made."""
    aws = _aws(fleet)
    machines = [item for item in new if item.kind == "ec2.Instance"]
    types = {_type_of(item, fleet, aws) for item in machines}
    given = [*(aws.network.subnets or {}).values(), *(aws.network.gateway_subnets or {}).values()]
    codes = {quota.code for item in machines for quota in _quotas_of(item, fleet, aws, quotas)}
    image = aws.image.id if machines else None
    subnets = tuple(dict.fromkeys(given)) if new else ()
    return Questions(image, tuple(sorted(types)), subnets, tuple(sorted(codes)), _way_to_s3(aws) if new else {})


def _way_to_s3(aws: Aws) -> dict[str, str]:
    if aws.network.vpc is None or aws.network.makes("s3"):
        return {}
    if aws.network.s3_endpoint:
        return {"id": aws.network.s3_endpoint}
    return {"vpc_id": aws.network.vpc, "service_name": _s3(aws)}


def _s3(aws: Aws) -> str:
    return f"com.amazonaws.{aws.region}.s3"


def findings(
    fleet: Fleet, items: Sequence[Wanted], new: Sequence[Wanted], told: Answers, quotas: Sequence[Quota]
) -> list[Finding]:
    """Every reason why `new`, a part of `items`, cannot be made in this account."""
    aws = _aws(fleet)
    machines = [item for item in new if item.kind == "ec2.Instance"]
    found = list(_of_image(aws, told)) if machines else []
    found += _of_types(fleet, aws, machines, told)
    found += _of_subnets(aws, new, told)
    found += _of_s3(aws, told) if new and _way_to_s3(aws) else ()
    return [*found, *_of_quotas(fleet, aws, items, machines, told, quotas)]


def family_of(instance: str) -> tuple[str, str]:
    """Letters of a type's name, and letters with the generation: p and p5 of p5en.48xlarge."""
    found = re.match(r"([a-z]+)([0-9]*)", instance)
    return (found[1], found[1] + found[2]) if found else (instance, instance)


def _aws(fleet: Fleet) -> Aws:
    assert fleet.aws is not None  # noqa: S101 - AWS-SETTINGS
    return fleet.aws


def _type_of(item: Wanted, fleet: Fleet, aws: Aws) -> str:
    pools = {pool.name: pool for pool in fleet.pools}
    return instance_of(pools[item.part]) if item.part in pools else aws.gateway_instance


def _where(item: Wanted, fleet: Fleet) -> str:
    index = next((number for number, pool in enumerate(fleet.pools) if pool.name == item.part), None)
    return "aws.gateway_instance" if index is None else f"pools[{index}].machine.instance"


def _quotas_of(item: Wanted, fleet: Fleet, aws: Aws, quotas: Sequence[Quota]) -> list[Quota]:
    """The quota that a machine counts in. A Capacity Block and what is reserved were counted when they were bought."""
    pool = next((pool for pool in fleet.pools if pool.name == item.part), None)
    bought = (pool and pool.machine and pool.machine.purchase) or "on-demand"
    if bought == "capacity-block" or (pool and pool.aws and pool.aws.reservation):
        return []
    kind = "spot" if bought == "spot" else "on-demand"
    family = family_of(_type_of(item, fleet, aws))
    return [row for row in quotas if row.purchase == kind and set(row.families) & set(family)]


def _of_image(aws: Aws, told: Answers) -> Iterator[Finding]:
    if told.image is None:
        need = f"an image of {aws.region} that this account may use"
        change = f"name the id that the image has in {aws.region}: it has another one in each region"
        yield _red("AWS-IMAGE", "aws.image.id", f"{aws.image.id}, which is not there", need, change)
        return
    if told.image.architecture != aws.image.architecture:
        have, need = f"an image of {told.image.architecture}", f"one of {aws.image.architecture}, as the spec says"
        change = f"name another image, or set aws.image.architecture to {told.image.architecture}"
        yield _red("AWS-ARCHITECTURE", "aws.image", have, need, change)
    if told.image.root_device != aws.image.root_device:
        have, need = aws.image.root_device, f"the name of its root volume, {told.image.root_device}"
        change = f"set it to {told.image.root_device}: under another name the volume would be a second one"
        yield _red("AWS-IMAGE", "aws.image.root_device", have, need, change)


def _of_types(fleet: Fleet, aws: Aws, machines: Sequence[Wanted], told: Answers) -> Iterator[Finding]:
    for (name, where), zones in sorted(_zones(fleet, aws, machines).items()):
        kind = told.types.get(name)
        if kind is None:
            change = "take another type or region"
            yield _red("AWS-TYPE-ZONE", where, f"{name}, which {aws.region} does not have", "a type of it", change)
            continue
        if aws.image.architecture not in kind.architectures:
            have, need = f"{name}, of {', '.join(kind.architectures)}", f"{aws.image.architecture}, as aws.image is"
            yield _red("AWS-ARCHITECTURE", where, have, need, "take another type or image")
        if lacking := sorted(zones - kind.zones):
            offered = ", ".join(sorted(kind.zones)) or "none"
            have, need = f"{name} in {', '.join(lacking)}", f"a zone that offers it: {offered}"
            yield _red("AWS-TYPE-ZONE", where, have, need, f"leave {', '.join(lacking)} out of the zones")


def _zones(fleet: Fleet, aws: Aws, machines: Sequence[Wanted]) -> dict[tuple[str, str], set[str]]:
    """Zones by type and by where the spec names it."""
    found: dict[tuple[str, str], set[str]] = {}
    for item in machines:
        found.setdefault((_type_of(item, fleet, aws), _where(item, fleet)), set()).add(item.zone or "")
    return found


def _of_subnets(aws: Aws, new: Sequence[Wanted], told: Answers) -> Iterator[Finding]:
    if not new:
        return
    given = [("subnets", aws.network.subnets or {}), ("gateway_subnets", aws.network.gateway_subnets or {})]
    for key, subnets in given:
        for zone, name in subnets.items():
            where, subnet = f"aws.network.{key}.{zone}", told.subnets.get(name)
            if subnet is None:
                have = f"{name}, which is not there"
                yield _red("AWS-SUBNET", where, have, f"a subnet of {aws.region}", "name another one")
            elif (subnet.zone, subnet.vpc) != (zone, aws.network.vpc):
                have = f"{name}, of {subnet.vpc} in {subnet.zone}"
                need = f"a subnet of {aws.network.vpc} in {zone}"
                yield _red("AWS-SUBNET", where, have, need, "name another one")
    taken = _addresses(aws, new)
    for zone, name in (aws.network.subnets or {}).items():
        subnet = told.subnets.get(name)
        if subnet and taken[zone] > subnet.free:
            have, need = f"{name} with {subnet.free} free addresses", f"{taken[zone]} for what is to be made there"
            change = f"name a larger subnet, or make {taken[zone] - subnet.free} fewer nodes in {zone}"
            yield _red("AWS-SUBNET-SMALL", f"aws.network.subnets.{zone}", have, need, change)


def _of_s3(aws: Aws, told: Answers) -> Iterator[Finding]:
    """Nodes read the bucket without a name: S3 has to know them by the endpoint or the VPC that they come through."""
    named, vpc = aws.network.s3_endpoint, aws.network.vpc
    where = "aws.network.s3_endpoint" if named else "aws.network.vpc"
    need = f"an endpoint of {_s3(aws)} in {vpc}: nodes could read no model of the bucket without"
    if told.s3 is None:
        have = f"{named}, which is not there" if named else f"{vpc}, which has none of S3"
        change = (
            "make one, or set aws.network.make_endpoints to [s3], with route_tables: it lets our bucket alone through"
        )
        yield _red("AWS-S3-ENDPOINT", where, have, need, f"name one that is there, {change}" if named else change)
    elif (told.s3.vpc, told.s3.service) != (vpc, _s3(aws)):
        have = f"{named}, of {told.s3.service} in {told.s3.vpc}"
        yield _red("AWS-S3-ENDPOINT", where, have, need, "name another one, or leave it out")
    elif told.s3.tables is not None and (lacking := sorted({*aws.network.route_tables} - told.s3.tables)):
        have = f"{', '.join(lacking)}, which the endpoint of S3 is not on"
        yield _red("AWS-S3-ENDPOINT", "aws.network.route_tables", have, need, "put it on them, or name another one")


def _addresses(aws: Aws, new: Sequence[Wanted]) -> Counter[str]:
    """Addresses that what is to be made takes of the private subnet of each zone."""
    taken: Counter[str] = Counter()
    for item in new:
        match item.kind:
            case "ec2.Instance":
                taken[item.zone or ""] += 1
            case "ec2.VpcEndpoint" if item.inputs["vpc_endpoint_type"] == "Interface":
                taken.update(aws.zones)
            case "lb.LoadBalancer" if not aws.network.clients:
                taken.update(aws.zones[:2])
            case "efs.MountTarget":
                taken[item.name.removeprefix("efs-")] += 1
            case "fsx.LustreFileSystem" if aws.lustre:
                taken[aws.lustre.zone] += lustre_addresses(aws.lustre.tib)
            case _:
                pass
    return taken


def _of_quotas(
    fleet: Fleet,
    aws: Aws,
    items: Sequence[Wanted],
    machines: Sequence[Wanted],
    told: Answers,
    quotas: Sequence[Quota],
) -> Iterator[Finding]:
    """What the fleet alone takes is held against the quota: what others run in the account is not known here."""
    asked = {quota.code for item in machines for quota in _quotas_of(item, fleet, aws, quotas)}
    for quota in quotas:
        if quota.code not in asked or quota.code not in told.quotas:
            continue
        counted = Counter(
            _type_of(item, fleet, aws)
            for item in items
            if item.kind == "ec2.Instance" and quota in _quotas_of(item, fleet, aws, quotas)
        )
        known = {name: told.types[name].vcpus for name in counted if name in told.types}
        need = sum(counted[name] * vcpus for name, vcpus in known.items())
        if need > told.quotas[quota.code]:
            have = f"{told.quotas[quota.code]:.0f} vCPUs of `{quota.name}`"
            made = ", ".join(f"{counted[name]} x {name} of {vcpus}" for name, vcpus in sorted(known.items()))
            change = f"ask AWS for {need} of quota {quota.code} in {aws.region}, or for fewer nodes here"
            yield _red("AWS-QUOTA", f"the account in {aws.region}", have, f"{need}: {made}", change, quota.source)


def _red(rule: str, what: str, have: str, need: str, change: str, source: str = _EC2) -> Finding:
    return Finding(rule, "red", what, have, need, change, source, verified=True)
