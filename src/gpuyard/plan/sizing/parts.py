"""The parts of a plan: a model on its nodes, and the nodes of a pool."""

from __future__ import annotations

from typing import Literal

from gpuyard.plan.sizing.choose import Considered
from gpuyard.plan.sizing.cold_start import Cache, Start
from gpuyard.plan.sizing.cost import Served, Shares
from gpuyard.plan.sizing.figures import Figure
from gpuyard.plan.sizing.power import Power
from gpuyard.plan.sizing.room import Memory
from gpuyard.plan.sizing.throughput import Throughput
from gpuyard.plan.sizing.traffic import Traffic
from gpuyard.spec.closed import Closed


class ModelPlan(Closed):
    """One model on the nodes of its pool."""

    name: str
    source: str
    pool: str
    tensor_parallel_size: int
    tensor_parallel_from: Literal["spec", "chosen", "default"]
    data_parallel_size: int
    gpus_per_node: int
    """GPUs of each node that it takes; 0: its engine uses none."""
    copies: int
    """On nodes in service."""
    memory: Memory | None
    traffic: tuple[Traffic, ...]
    """Of its tensor parallelism, over the links that it has and over those that it might have."""
    throughput: Throughput | None
    starts: tuple[Start, ...]
    money: Served | None


class PoolPlan(Closed):
    """The nodes of one pool."""

    name: str
    nodes: int
    spare_nodes: int
    gpu: str
    gpus_per_node: int
    gpus_used: int
    instance: str | None
    region: str | None
    purchase: str
    usd_per_node_hour: Figure | None
    shares: Shares | None
    cache: Cache | None
    power: Power | None
    considered: tuple[Considered, ...]
    """Other machines and parallelism for the same models, and why not."""
