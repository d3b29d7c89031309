"""What stands around the machines of a fleet on AWS and is paid by the hour, whether anybody uses it or not.

Bytes and requests that are paid for one by one are not reckoned: nobody knows them before there is load. A bucket and
an EFS are paid for what lies in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.plan.sizing.cost import Line
from gpuyard.plan.sizing.figures import Figure, Ground, number
from gpuyard.spec.aws import GATEWAY_ROOT_GIB, Aws, PoolAws
from gpuyard.spec.fleet import Fleet

_LISTED = "us-east-1"
_SESSION_ENDPOINTS = 2


def around_lines(fleet: Fleet, ground: Ground) -> list[Line]:
    """Gateways to the world, balancer, endpoints, addresses, volumes and Lustre. Nothing for a fleet without `aws`."""
    aws = fleet.aws
    if aws is None:
        return []
    lines = [line for part, count in _parts(aws) if (line := _of_part(ground, part, count, aws.region))]
    gib = sum(pool.nodes * (pool.aws or PoolAws()).root_gib for pool in fleet.pools)
    lines += _stored(ground, "volumes", "ebs-gp3", gib + fleet.gateway.nodes * GATEWAY_ROOT_GIB)
    planned = fleet.planning.storage.tier if fleet.planning and fleet.planning.storage else ""
    if aws.lustre and not planned.startswith("fsx-lustre"):
        tier = f"fsx-lustre-{aws.lustre.mb_s_per_tib}"
        lines += _stored(ground, f"storage {tier}", tier, round(aws.lustre.tib * 1000))
    return lines


def _parts(aws: Aws) -> Iterator[tuple[str, int]]:
    """How many there are of each part."""
    ours = len(aws.zones) if aws.network.cidr else 0
    yield "nat-gateway", ours
    yield "network-load-balancer", 1
    sessions = aws.access.method == "ssm" and aws.network.makes("ssm")
    yield "endpoint", _SESSION_ENDPOINTS * len(aws.zones) if sessions else 0
    # Each gateway to the world has one, and the load balancer one in each of its zones where clients are outside.
    yield "address", ours + (min(2, len(aws.zones)) if aws.network.clients else 0)


def _of_part(ground: Ground, part: str, count: int, region: str) -> Line | None:
    rows = [row for row in ground.market.parts if (row.provider, row.part) == ("aws", part)]
    row = next((row for row in rows if row.region == region), None)
    row = row or next(row for row in rows if row.region == _LISTED)
    if not count:
        return None
    how = f"{count} x {number(row.usd_per_hour)} USD/h; {row.region}, {row.as_of}: {row.source}"
    known = row.verified and row.region == region
    figure = Figure(value=count * row.usd_per_hour, unit="USD/h", how=how, verified=known)
    return Line(what=part, usd_per_hour=figure)


def _stored(ground: Ground, what: str, tier: str, gib: int) -> Iterator[Line]:
    hours = ground.value("hours_per_month")
    row = next(row for row in ground.market.storage_tiers if row.tier == tier)
    how = f"{number(gib)} GB x {number(row.usd_per_gb_month)} USD / {number(hours)} h; {row.source}"
    value = gib * row.usd_per_gb_month / hours
    yield Line(what=what, usd_per_hour=Figure(value=value, unit="USD/h", how=how, verified=row.verified))
