"""What a plan is made from, beside the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpuyard.catalog import Catalog
from gpuyard.catalog.market import Market
from gpuyard.catalog.rows import Instance
from gpuyard.plan.sizing.room import Rooms
from gpuyard.plan.sizing.throughput import Measured


@dataclass(frozen=True, slots=True)
class Givens:
    catalog: Catalog
    market: Market
    instances: Sequence[Instance]
    rooms: Rooms
    today: str
    measured: Mapping[str, Measured] = field(default_factory=dict[str, Measured])
    """By model: what `gpuyard bench load` measured."""
