"""What is in an account, at the prices of the catalog: reckoned from what EC2 lists, not from the spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuyard.catalog.market import load_market
from tests.emulated_aws.fleet import EmulatedFleet

MARKET = load_market()
REGION = "us-east-1"
HOURS = next(row.value for row in MARKET.assumptions if row.name == "hours_per_month")


def bill(fleet: EmulatedFleet) -> dict[str, float]:
    """USD an hour by what it is for. What is paid by use is left out: NAT and balancer by the GB, EFS and S3."""
    found: dict[str, float] = {}
    for what, usd in _lines(fleet):
        found[what] = found.get(what, 0) + usd
    return found


def _lines(fleet: EmulatedFleet) -> Iterator[tuple[str, float]]:
    ec2, gateway = fleet.account.client("ec2"), fleet.spec().planning
    for one in fleet.instances().values():
        tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
        part, zone = tags["gpuyard:part"], one["Placement"]["AvailabilityZone"]
        data = fleet.template(f"{fleet.name}-{part}-{zone}")
        if part == "gateway":
            assert gateway and gateway.gateway_usd_per_hour
            yield "gateway", gateway.gateway_usd_per_hour
        else:
            market = data.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
            yield f"pool {part}", _machine(one["InstanceType"], market)
        yield "volumes", sum(disk["Ebs"]["VolumeSize"] for disk in data["BlockDeviceMappings"]) * _stored("ebs-gp3")
    gateways = [each for each in ec2.describe_nat_gateways()["NatGateways"] if each["State"] == "available"]
    yield "nat-gateway", len(gateways) * _part("nat-gateway")
    for balancer in fleet.account.client("elbv2").describe_load_balancers()["LoadBalancers"]:
        yield "network-load-balancer", _part("network-load-balancer")
        # An address for each of its zones, where it looks outside.
        zones = len(balancer["AvailabilityZones"]) if balancer["Scheme"] == "internet-facing" else 0
        yield "address", zones * _part("address")
    yield "address", len(ec2.describe_addresses()["Addresses"]) * _part("address")
    for endpoint in ec2.describe_vpc_endpoints()["VpcEndpoints"]:
        if endpoint["VpcEndpointType"] == "Interface":
            yield "endpoint", len(endpoint["SubnetIds"]) * _part("endpoint")
    for files in fleet.account.client("fsx").describe_file_systems()["FileSystems"]:
        tier = f"fsx-lustre-{files['LustreConfiguration']['PerUnitStorageThroughput']}"
        yield f"storage {tier}", files["StorageCapacity"] * _stored(tier)


def _machine(instance: str, market: str) -> float:
    wanted: tuple[Any, ...] = ("aws", instance, REGION, market)
    (price,) = [row for row in MARKET.prices if (row.provider, row.instance, row.region, row.purchase) == wanted]
    return price.usd_per_hour


def _part(name: str) -> float:
    (price,) = [row for row in MARKET.parts if (row.provider, row.part, row.region) == ("aws", name, REGION)]
    return price.usd_per_hour


def _stored(tier: str) -> float:
    """USD an hour for each GB."""
    return next(row.usd_per_gb_month for row in MARKET.storage_tiers if row.tier == tier) / HOURS
