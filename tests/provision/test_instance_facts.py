"""The catalog's facts of EC2's machines, held against EC2's own table, which moto carries whole."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import moto.ec2
import pytest

from gpuyard.catalog.rows import Instance, NetworkCards
from gpuyard.provision.refusals import architecture_of
from tests.provision.conftest import MACHINES


@cache
def published() -> dict[str, Any]:
    """What EC2 says of each type."""
    table = Path(moto.ec2.__file__).parent / "resources/instance_types.json.gz"
    return json.loads(gzip.decompress(table.read_bytes()))


ROWS = [row for row in MACHINES.instances if row.provider == "aws" and row.instance in published()]


def test_only_types_that_ec2_sells_no_more_or_not_yet_everywhere_are_left_out() -> None:
    absent = {row.instance for row in MACHINES.instances if row.provider == "aws"} - {row.instance for row in ROWS}
    assert absent <= {"p3.2xlarge", "p3.8xlarge", "p3.16xlarge", "p6e-gb200.36xlarge"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.instance)
def test_a_row_says_what_ec2_says(row: Instance) -> None:
    kind = published()[row.instance]
    assert row.gpus == sum(each["Count"] for each in kind["GpuInfo"]["Gpus"])
    assert row.vcpus == kind["VCpuInfo"]["DefaultVCpus"]
    assert row.memory_gib == kind["MemoryInfo"]["SizeInMiB"] / 1024
    assert row.efa == kind["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
    disks = kind.get("InstanceStorageInfo", {}).get("Disks", [])
    there = [{"drives": each["Count"], "gb_each": each["SizeInGB"]} for each in disks]
    assert ([row.nvme] if row.nvme else []) == there
    assert architecture_of(row.instance) in kind["ProcessorInfo"]["SupportedArchitectures"]


@pytest.mark.parametrize("row", MACHINES.cards, ids=lambda row: row.instance)
def test_the_network_cards_of_a_type_are_those_that_ec2_publishes(row: NetworkCards) -> None:
    cards = published()[row.instance]["NetworkInfo"]["NetworkCards"]
    assert row.cards == len(cards)
    efa = [card["NetworkCardIndex"] for card in cards if "efa-only" in card["InterfaceTypes"]]
    assert efa == list(range(row.first_efa_card, row.cards))
    assert {card["MaximumNetworkInterfaces"] for card in cards} == {row.interfaces_per_card}
