"""A zone that has no machine: the real engine, told so by the emulated account, and where the next `up` puts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedFleet]:
    """Four old machines in turn in two zones, four new ones with EFA in one. The tests go on from each other."""
    folder = tmp_path_factory.mktemp("capacity")
    with moto_server(folder / "moto") as endpoint:
        yield emulated_fleet(folder, "aws-mixed", endpoint)


def full(instance: str, zone: str, **more: Any) -> dict[str, Any]:
    """A zone without machines of a type, for as long as the test does not take it back."""
    code = {"code": "InsufficientInstanceCapacity", "times": 99, **more}
    return {"act": "create", "type": "ec2/instance:Instance", "instance": instance, "zone": zone, **code}


def zones(fleet: EmulatedFleet, pool: str) -> dict[str, str]:
    found = fleet.instances()
    return {name: found[name]["Placement"]["AvailabilityZone"] for name in sorted(found) if f"-{pool}-" in name}


def remembered(fleet: EmulatedFleet) -> list[dict[str, str]]:
    path = fleet.project / f".gpuyard/refusals/{fleet.name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def failed_up(fleet: EmulatedFleet) -> str:
    fleet.forget()
    ran = fleet.pulumi("up", "--yes", "--skip-preview")
    assert ran.returncode != 0, ran.stdout
    assert "Traceback" not in ran.stdout, ran.stdout
    return ran.stdout


def test_a_zone_that_has_no_machine_is_told_and_written_down(mixed: EmulatedFleet):
    # It answers late, when all others have been made.
    mixed.faults(full("p4d.24xlarge", "us-east-1a", times=1, seconds=20))
    said = failed_up(mixed)
    (row,) = remembered(mixed)
    assert row["node"] in {"aws-mixed-old-0", "aws-mixed-old-2"}
    assert (row["instance"], row["zone"]) == ("p4d.24xlarge", "us-east-1a")
    assert "InsufficientInstanceCapacity" in row["said"]
    next_one = "the next `pulumi up` tries us-east-1b"
    assert f"AWS-CAPACITY: us-east-1a has no p4d.24xlarge for {row['node']}; {next_one}" in said
    assert row["node"] not in mixed.instances()
    assert len(zones(mixed, "old")) == 3


def test_the_next_up_makes_that_node_in_the_other_zone_and_touches_no_other(mixed: EmulatedFleet):
    (row,) = remembered(mixed)
    before = mixed.instances()
    mixed.faults(full("p4d.24xlarge", "us-east-1a"))
    acts = mixed.up()
    after = mixed.instances()
    assert acts == [("create", row["node"])]
    assert {name: after[name]["InstanceId"] for name in before} == {n: one["InstanceId"] for n, one in before.items()}
    assert zones(mixed, "old")[row["node"]] == "us-east-1b"
    assert len(zones(mixed, "old")) == len(zones(mixed, "new")) == 4
    mixed.faults()
    assert mixed.up() == []
    assert mixed.instances() == after


def test_a_pool_with_efa_that_would_come_apart_is_refused_before_a_machine_is_made(mixed: EmulatedFleet):
    mixed.resize("new", 6)
    mixed.faults(full("p5.48xlarge", "us-east-1b", times=1, seconds=20))
    failed_up(mixed)
    assert len(zones(mixed, "new")) == 5
    said = failed_up(mixed)
    assert "AWS-POOL-APART: pool new: 5 in us-east-1b, 1 to be made in us-east-1a" in said
    assert "remove .gpuyard/refusals/aws-mixed.jsonl" in said
    assert mixed.acts() == []
    (mixed.project / ".gpuyard/refusals/aws-mixed.jsonl").unlink()
    acts = mixed.up()
    assert [act for act, _ in acts] == ["create"]
    assert set(zones(mixed, "new").values()) == {"us-east-1b"}
    assert mixed.up() == []
