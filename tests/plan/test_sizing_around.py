"""What stands around the machines of a fleet on AWS is in its bill."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard.catalog.market import load_market
from gpuyard.plan.sizing.around import around_lines
from gpuyard.plan.sizing.figures import ground_of
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

FLEETS = Path(__file__).parents[2] / "fleets"


def lines(fleet: Fleet) -> dict[str, float]:
    found = around_lines(fleet, ground_of(fleet, load_market()))
    assert all(line.usd_per_hour.how for line in found)
    return {line.what: line.usd_per_hour.value for line in found}


def fleet_of(path: Path, *changes: tuple[str, str]) -> Fleet:
    text = (FLEETS / "aws-p5en.yaml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return load_fleet(path)


def test_gateways_balancer_endpoints_addresses_volumes_and_lustre(tmp_path: Path) -> None:
    assert lines(fleet_of(tmp_path / "aws-p5en.yaml")) == pytest.approx(
        {
            "nat-gateway": 2 * 0.045,
            "network-load-balancer": 0.0225,
            "endpoint": 2 * 2 * 0.01,  # two services of the Systems Manager, each in two zones
            "address": 4 * 0.005,
            "volumes": (4 * 200 + 2 * 30) * 0.08 / 730,
            "storage fsx-lustre-500": 9600 * 0.34 / 730,
        }
    )


def test_a_vpc_that_was_there_and_an_inner_balancer_cost_less(tmp_path: Path) -> None:
    there = (
        "vpc: vpc-0123456789abcdef0\n"
        "    subnets: {us-east-1a: subnet-0123456789abcdef0, us-east-1b: subnet-0123456789abcdef1}\n"
        "    route_tables: [rtb-0123456789abcdef0]"
    )
    told = lines(
        fleet_of(
            tmp_path / "aws-p5en.yaml",
            ("cidr: 10.60.0.0/16", there),
            ("    clients: [198.51.100.0/24]\n", ""),
            ("method: ssm", "method: ssh\n    sources: [10.0.0.0/8]"),
        )
    )
    assert set(told) == {"network-load-balancer", "volumes", "storage fsx-lustre-500"}


def test_a_file_system_that_the_planning_names_is_not_counted_twice(tmp_path: Path) -> None:
    planned = ("planning:\n", "planning:\n  storage: {tier: fsx-lustre-500, tib: 9.6}\n")
    assert "storage fsx-lustre-500" not in lines(fleet_of(tmp_path / "aws-p5en.yaml", planned))


def test_a_price_of_another_region_is_not_verified(tmp_path: Path) -> None:
    elsewhere = fleet_of(
        tmp_path / "aws-p5en.yaml",
        ("region: us-east-1\n  zones", "region: us-west-2\n  zones"),
        ("us-east-1a", "us-west-2a"),
        ("us-east-1b", "us-west-2b"),
        ("  region: us-east-1\n  gateway_usd", "  region: us-west-2\n  gateway_usd"),
    )
    told = around_lines(elsewhere, ground_of(elsewhere, load_market()))
    nat = next(line.usd_per_hour for line in told if line.what == "nat-gateway")
    assert not nat.verified and "us-east-1" in nat.how


def test_other_providers_have_none_of_it() -> None:
    assert lines(load_fleet(FLEETS / "onprem.yaml")) == {}


def test_endpoints_in_a_vpc_that_was_there_cost_where_they_are_asked_for(tmp_path: Path) -> None:
    there = (
        "vpc: vpc-0123456789abcdef0\n"
        "    subnets: {us-east-1a: subnet-0123456789abcdef0, us-east-1b: subnet-0123456789abcdef1}"
    )
    theirs = lines(fleet_of(tmp_path / "aws-p5en.yaml", ("cidr: 10.60.0.0/16", there)))
    ours = lines(fleet_of(tmp_path / "aws-p5en.yaml", ("cidr: 10.60.0.0/16", f"{there}\n    make_endpoints: [ssm]")))
    assert set(ours) - set(theirs) == {"endpoint"}
