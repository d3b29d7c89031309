"""In which zone each node is made, and what to do where a zone has no machine left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Fleet, Pool

CAPACITY_CODES = ("InsufficientInstanceCapacity", "InsufficientHostCapacity", "Unsupported")
"""EC2's words for: not here, not now. The last is that of a zone without the type."""


class Refusal(Closed):
    """A zone that had no machine of a type."""

    at: Annotated[str, Field(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z$")]
    """When, in UTC."""
    node: str
    instance: str
    zone: str
    said: str


def refused_for_capacity(said: str) -> bool:
    """Whether a zone had no machine, by the words of the error."""
    return re.search(rf"\b({'|'.join(CAPACITY_CODES)})\b", said) is not None


def zones_of(pool: Pool, fleet: Fleet) -> tuple[str, ...]:
    """Zones of a pool in the order in which they are tried. Needs `fleet.aws`."""
    assert fleet.aws is not None  # noqa: S101 - AWS-SETTINGS
    return (pool.aws and pool.aws.zones) or fleet.aws.zones


def is_close(pool: Pool) -> bool:
    """Whether the pool's nodes stand close together, and therefore in one zone."""
    if pool.aws and pool.aws.placement_group is not None:
        return pool.aws.placement_group
    return pool.efa is not None


def needs_group(pool: Pool) -> bool:
    """Whether that takes a placement group: a Capacity Block's machines stand together by themselves."""
    return is_close(pool) and not (pool.machine and pool.machine.purchase == "capacity-block")


def usable(zones: Sequence[str], instance: str, refusals: Sequence[Refusal]) -> tuple[str, ...]:
    """The zones that did not refuse the type, in their order; where all did, the one whose refusal is the oldest."""
    last = {row.zone: row.at for row in sorted(refusals, key=lambda row: row.at) if row.instance == instance}
    free = tuple(zone for zone in zones if zone not in last)
    return free or (min(zones, key=lambda zone: last[zone]),)


def places(pool: Pool, fleet: Fleet, instance: str, refusals: Sequence[Refusal]) -> list[str]:
    """The zone of each node of the pool that is yet to be made, by its number. What is made stays where it is."""
    zones = usable(zones_of(pool, fleet), instance, refusals)
    if is_close(pool):
        return [zones[0]] * pool.nodes
    return [zones[number % len(zones)] for number in range(pool.nodes)]
