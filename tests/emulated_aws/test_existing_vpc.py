"""A fleet in a VPC that was there before: the real engine, and what is left of the VPC afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server
from tests.emulated_aws.readback import Readback

pytestmark = pytest.mark.engine
ZONES = ("us-east-1a", "us-east-1b")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedFleet]:
    """A fleet of four that is to stand in somebody's VPC, with a private subnet in each zone and their routes."""
    folder = tmp_path_factory.mktemp("existing-vpc")
    with moto_server(folder / "moto") as endpoint:
        fleet = emulated_fleet(folder, "aws-p5en", endpoint)
        ec2 = fleet.account.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.99.0.0/16")["Vpc"]["VpcId"]
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        subnets: dict[str, str] = {}
        for number, zone in enumerate(ZONES):
            cidr = f"10.99.{number}.0/24"
            made = ec2.create_subnet(VpcId=vpc, CidrBlock=cidr, AvailabilityZone=zone)["Subnet"]
            subnets[zone] = made["SubnetId"]
            ec2.associate_route_table(RouteTableId=table, SubnetId=made["SubnetId"])
        told = ", ".join(f"{zone}: {name}" for zone, name in subnets.items())
        fleet.edit("cidr: 10.60.0.0/16", f"vpc: {vpc}\n    subnets: {{{told}}}\n    route_tables: [{table}]")
        yield fleet


def given(fleet: EmulatedFleet) -> dict[str, list[str]]:
    """What the VPC is made of, by the account."""
    ec2, network = fleet.account.client("ec2"), fleet.spec().aws
    assert network is not None
    mine = [{"Name": "vpc-id", "Values": [network.network.vpc]}]
    tables = ec2.describe_route_tables(Filters=mine)["RouteTables"]
    return {
        "vpcs": [row["VpcId"] for row in ec2.describe_vpcs(Filters=mine)["Vpcs"]],
        "subnets": sorted(row["SubnetId"] for row in ec2.describe_subnets(Filters=mine)["Subnets"]),
        "tables": sorted(row["RouteTableId"] for row in tables),
        "routes": sorted(str(route) for row in tables for route in row["Routes"]),
        "gateways": ec2.describe_internet_gateways()["InternetGateways"],
        "endpoints": [row["VpcEndpointId"] for row in ec2.describe_vpc_endpoints(Filters=mine)["VpcEndpoints"]],
    }


def test_a_subnet_of_another_vpc_is_refused_before_anything_is_made(theirs: EmulatedFleet):
    ec2, spec = theirs.account.client("ec2"), theirs.project / "fleets/aws-p5en.yaml"
    other = ec2.create_vpc(CidrBlock="10.98.0.0/16")["Vpc"]["VpcId"]
    wrong = ec2.create_subnet(VpcId=other, CidrBlock="10.98.0.0/24", AvailabilityZone=ZONES[0])["Subnet"]["SubnetId"]
    found = re.search(rf"{ZONES[0]}: (subnet-\w+)", Path(spec).read_text())
    assert found
    theirs.edit(found[1], wrong)
    theirs.forget()
    refused = theirs.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert f"AWS-SUBNET: aws.network.subnets.{ZONES[0]}: {wrong}, of {other}" in refused.stdout
    assert theirs.acts() == []
    theirs.edit(wrong, found[1])


def test_without_a_way_to_s3_it_is_refused_before_anything_is_made(theirs: EmulatedFleet):
    theirs.forget()
    refused = theirs.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert "AWS-S3-ENDPOINT: aws.network.vpc: vpc-" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert theirs.acts() == []


def test_the_fleet_stands_in_it_and_leaves_it_as_it_was(theirs: EmulatedFleet):
    spec = theirs.spec().aws
    assert spec is not None
    service = {"ServiceName": "com.amazonaws.us-east-1.s3", "VpcEndpointType": "Gateway"}
    tables = list(spec.network.route_tables)
    theirs.account.client("ec2").create_vpc_endpoint(VpcId=spec.network.vpc, RouteTableIds=tables, **service)
    before = given(theirs)
    assert len(before["endpoints"]) == 1
    # An operator who may not ask for quotas is not stopped by it.
    theirs.faults({"act": "ask", "type": "getServiceQuota", "code": "AccessDeniedException", "times": 99})
    theirs.forget()
    said = theirs.done("up", "--yes", "--skip-preview")
    assert "AWS-QUOTA: L-417A185B is not held against the fleet" in said
    theirs.faults()
    assert Readback(theirs).mismatches() == []
    assert {one["SubnetId"] for one in theirs.instances().values()} <= set((spec.network.subnets or {}).values())
    made = {row["type"].split(":")[-1] for row in theirs.state()}
    assert not made & {"Vpc", "Subnet", "InternetGateway", "NatGateway", "RouteTable", "DefaultRouteTable", "Eip"}
    assert "VpcEndpoint" not in made
    policy = theirs.account.client("s3").get_bucket_policy(Bucket=spec.bucket)["Policy"]
    assert json.loads(policy)["Statement"][0]["Condition"] == {"StringEquals": {"aws:SourceVpc": spec.network.vpc}}
    assert theirs.up() == []
    theirs.give_up()
    theirs.done("destroy", "--yes", "--skip-preview")
    assert theirs.left() == []
    assert given(theirs) == before
