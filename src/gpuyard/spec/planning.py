"""What a plan reckons with and no node is told: prices, shares, goals. It is no part of a fleet's digest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpuyard.spec.closed import Closed

Purchase = Literal["on-demand", "spot", "capacity-block", "reserved-1y", "reserved-3y"]
Share = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Region = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,40}$")]
InstanceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,60}$")]
ApiName = Annotated[str, Field(pattern=r"^[a-z0-9_]+/[A-Za-z0-9._:/-]{1,120}$")]


class Machine(Closed):
    """What a node of a pool is, for the plan of its cost, cold start and power."""

    instance: InstanceName | None = None
    """Machine as its provider names it, e.g. p5.48xlarge; left out, the cheapest that has the pool's GPUs."""
    region: Region | None = None
    """Region of the price; left out, the fleet's."""
    purchase: Purchase | None = None
    """How it is bought; left out, as the fleet's."""
    usd_per_hour: Amount | None = None
    """What one node costs you an hour, by contract or as an owner; wins over the catalog's price."""
    max_watts: Positive | None = None
    """Most that one node draws, in watts."""
    nvme_gb: Positive | None = None
    """Local NVMe of one node, in GB."""
    nvme_gb_s: Positive | None = None
    """Measured read rate of a node's local NVMe, in GB/s."""
    network_gbps: Positive | None = None
    """Network of one node, in Gbit/s."""


class Staff(Closed):
    """The people's share."""

    full_time_equivalents: Amount
    """How many people's time the fleet takes."""
    usd_per_year: Amount
    """What one of them costs a year, all included."""


class Storage(Closed):
    """Where the models' origin lies, from which a new node fetches them."""

    tier: Annotated[str, Field(pattern=r"^[a-z0-9-]{2,40}$")]
    """Storage tier as the catalog names it, e.g. s3-standard or fsx-lustre-500."""
    tib: Positive | None = None
    """Size of a file system whose rate follows its size, in TiB."""


class Rack(Closed):
    """What a rack of own hosts gives."""

    watts: Positive
    """Most that the rack's feed and cooling carry, in watts."""
    nodes: Annotated[int, Field(ge=1, le=64)]
    """How many nodes stand in one rack."""
    usd_per_kwh: Amount = 0
    """Price of energy; 0 where it is in the price of the node."""
    power_usage_effectiveness: Annotated[float, Field(ge=1, le=3)] = 1
    """Energy of the room for each unit of energy of the nodes."""


class Planning(Closed):
    """What `gpuyard plan` reckons with. What is left out is taken from the catalog's assumptions, and said so."""

    region: Region | None = None
    """Region of prices, e.g. us-east-1."""
    purchase: Purchase | None = None
    """How nodes are bought."""
    utilisation: Share | None = None
    """Share of the tokens that nodes in service could serve that are asked for, over a month."""
    spare_nodes: Annotated[int, Field(ge=0, le=64)] | None = None
    """Nodes of each pool that stand by, paid and without load."""
    upgrades_per_year: Amount | None = None
    """How often each node is taken out for a driver, engine or model."""
    minutes_per_upgrade: Amount | None = None
    """How long a node is out each time."""
    cold_start_seconds: Positive | None = None
    """Longest time from the start of an engine to its first answer that is acceptable."""
    input_tokens: Positive | None = None
    """Tokens of a request's prompt, on average."""
    output_tokens: Positive | None = None
    """Tokens of a request's answer, on average."""
    staff: Staff | None = None
    """The people's share of the cost."""
    storage: Storage | None = None
    """Where the models come from."""
    model_revisions: Annotated[int, Field(ge=1, le=64)] | None = None
    """Revisions of each model that the origin keeps."""
    transfer_gb_per_month: Amount | None = None
    """Data that leaves the provider, in GB a month."""
    transfer_usd_per_gb: Amount | None = None
    """Price of data that leaves the provider."""
    gateway_usd_per_hour: Amount | None = None
    """What one gateway node costs an hour."""
    rack: Rack | None = None
    """Racks of own hosts."""
    compare_with: Annotated[tuple[ApiName, ...], Field(max_length=16)] = ()
    """APIs to compare with, as provider/model, beside those that host the same open model."""
