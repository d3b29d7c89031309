"""The rows of the tables that a plan is reckoned from: prices, speeds, watts. No lock needs them."""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Literal

from pydantic import Field

from gpuyard.catalog import _read  # pyright: ignore[reportPrivateUsage]
from gpuyard.catalog.rows import Row
from gpuyard.spec.closed import Closed, GpuName
from gpuyard.spec.planning import Purchase

Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]


class Price(Row):
    """What one node costs an hour."""

    provider: str
    instance: str
    region: str
    """`any`: one list price in all regions."""
    purchase: Purchase
    usd_per_hour: Positive


class PartPrice(Row):
    """What a part around the machines costs an hour."""

    provider: str
    part: str
    region: str
    usd_per_hour: Positive


class ApiPrice(Row):
    """What an API asks for a model, in USD per million tokens."""

    provider: str
    model: str
    open_weights: str | None
    """The open model that is hosted there, as owner/name; None: nobody can host it but its maker, or not told."""
    input_usd_per_mtok: Amount
    output_usd_per_mtok: Amount
    cached_input_usd_per_mtok: Amount | None


class GpuSpeed(Row):
    """What one GPU moves, computes and draws."""

    gpu: GpuName
    memory_gb_s: Positive
    tflops_16bit: Positive
    tflops_8bit: Positive | None
    """None: it computes 8-bit weights in 16 bit."""
    tdp_watts: Positive
    nvlink_gb_s: Amount
    """Both directions together; 0: none."""
    pcie_generation: Annotated[int, Field(ge=3, le=7)]
    bridged: bool
    """NVLink joins two boards by a bridge, where somebody put one in."""


class Link(Row):
    """Least bandwidth that a fleet's operator accepts of machines of a kind."""

    gpu: GpuName
    gpus: Annotated[int, Field(ge=1)]
    allreduce_busbw_gb_s: Positive
    """Bus bandwidth of an all-reduce as nccl-tests reckons it."""
    host_to_device_gb_s: Positive
    inter_node_gbps_per_gpu: Positive | None


class LinkModel(Row):
    """Nominal one-way bandwidth of one GPU to its neighbours in the node and to other nodes."""

    gpu: GpuName
    intra_node_gb_s: Positive
    inter_node_gb_s: Positive


class Fabric(Row):
    """A network between nodes."""

    fabric: str
    gbps_per_gpu: Positive


class StorageTier(Row):
    """Where weights may lie."""

    tier: str
    gb_s_low: Positive
    gb_s_high: Positive
    per: Literal["drive", "node", "tib"]
    """What the rate is of: one NVMe drive, one reading node, or each TiB of the file system."""
    over_network: bool
    usd_per_gb_month: Amount


class EngineStart(Row):
    """Seconds from the start of an engine to its first answer, without the reading of weights."""

    state: Literal["cold", "warm", "eager"]
    """cold: nothing compiled yet; warm: compile cache kept; eager: no compiling, no graphs."""
    seconds: Positive
    engine: str
    of: str


class NodePower(Row):
    """Most that a whole machine draws."""

    gpu: GpuName
    gpus: Annotated[int, Field(ge=1)]
    max_watts: Positive
    machine: str


class Thermal(Row):
    gpu: GpuName
    slowdown_c: Positive
    """From here the clocks are lowered."""
    max_operating_c: Positive


class Throughput(Row):
    """A published benchmark of a model on GPUs."""

    model: str
    """As owner/name."""
    quantization: str | None
    gpu: GpuName
    tensor_parallel_size: Annotated[int, Field(ge=1)]
    copies: Annotated[int, Field(ge=1)]
    """Copies of the model that the figure is of."""
    output_tokens_per_second: Positive
    input_tokens: Positive | None
    """Mean of a request; None: not told."""
    output_tokens: Positive | None
    engine: str
    kind: Literal["server", "offline"]
    """server: under a limit on latency; offline: all requests at once."""


class Assumption(Row):
    """A figure that is taken where a fleet does not state its own."""

    name: str
    value: Amount
    low: Amount
    high: Amount
    unit: str
    says: str


class Market(Closed):
    """All tables that a plan is reckoned from."""

    prices: tuple[Price, ...]
    parts: tuple[PartPrice, ...]
    api_prices: tuple[ApiPrice, ...]
    gpu_speeds: tuple[GpuSpeed, ...]
    links: tuple[Link, ...]
    link_models: tuple[LinkModel, ...]
    fabrics: tuple[Fabric, ...]
    storage_tiers: tuple[StorageTier, ...]
    engine_starts: tuple[EngineStart, ...]
    node_power: tuple[NodePower, ...]
    thermals: tuple[Thermal, ...]
    throughputs: tuple[Throughput, ...]
    assumptions: tuple[Assumption, ...]

    def tables(self) -> dict[str, tuple[Row, ...]]:
        """Every table of rows by its name."""
        return {name: getattr(self, name) for name in type(self).model_fields}


@cache
def load_market() -> Market:
    """Prices, speeds and watts as they come with gpuyard."""
    return Market.model_validate_json(json.dumps({name: _read(name) for name in Market.model_fields}))
