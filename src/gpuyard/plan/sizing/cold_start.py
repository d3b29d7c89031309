"""From the start of an engine to its first answer, by where its weights lie, against the goal."""

from __future__ import annotations

from collections.abc import Sequence

from gpuyard.catalog.market import StorageTier
from gpuyard.catalog.rows import Instance
from gpuyard.plan.sizing.figures import GB, GIB, Figure, Ground, number, proven
from gpuyard.spec.closed import Closed
from gpuyard.spec.planning import Machine

_FILE_SYSTEM = 0.95
"""What XFS and RAID0 leave of the drives, to be on the safe side."""


class Start(Closed):
    """One way that an engine may start."""

    tier: str
    """Where the weights are read from."""
    load_seconds: Figure
    start_seconds: Figure
    """Weights read and engine ready, with the compile cache that such a start finds."""
    meets_goal: bool | None
    """None: at best it does, at worst not."""


class Cache(Closed):
    """The models of a pool against the local NVMe of one node."""

    needed_gb: Figure
    local_gb: Figure | None
    """None: the machine's drives are not told."""
    fits: bool | None


def cache(weights_gib: Sequence[float], nvme_gb: float | None, verified: bool) -> Cache:
    """All models of a node and, while one is replaced, its new revision beside the old one."""
    sizes = [gib * GIB / GB for gib in weights_gib]
    needed = sum(sizes) + max(sizes, default=0.0)
    all_of_them = " + ".join(map(number, sizes)) if len(sizes) <= 6 else f"{len(sizes)} models, {number(sum(sizes))}"
    how = f"{all_of_them} + {number(max(sizes, default=0.0))} for the largest's next revision"
    figure = Figure(value=needed, unit="GB", how=how, verified=verified)
    if nvme_gb is None:
        return Cache(needed_gb=figure, local_gb=None, fits=None)
    usable = nvme_gb * _FILE_SYSTEM
    how = f"{number(nvme_gb)} GB x {_FILE_SYSTEM} for the file system"
    local = Figure(value=usable, unit="GB", how=how, verified=False)
    return Cache(needed_gb=figure, local_gb=local, fits=needed <= usable)


def nvme_of(machine: Machine | None, instance: Instance | None) -> tuple[float | None, int | None]:
    """GB and drives of a node's local NVMe, as far as told."""
    if machine and machine.nvme_gb:
        return machine.nvme_gb, None
    if instance and instance.nvme:
        return float(instance.nvme["drives"] * instance.nvme["gb_each"]), instance.nvme["drives"]
    return None, None


def starts(
    ground: Ground,
    *,
    gpu: str,
    gpus: int,
    weights_gib: float,
    eager: bool,
    machine: Machine | None,
    instance: Instance | None,
    origin: str | None,
    origin_tib: float | None,
) -> tuple[Start, ...]:
    """Every way to start an engine that reads so much on so many GPUs: restarted, rebooted, on a new node.

    `gpus` read at once, each its own shard.
    """
    bytes_read = weights_gib * GIB
    goal = ground.value("cold_start_seconds")
    device, device_proven = _host_to_device(ground, gpu, gpus)
    found = [_start(ground, "page-cache", (device, device), device_proven, bytes_read, "warm", eager, goal)]
    tiers = {row.tier: row for row in ground.market.storage_tiers}
    if local := _local(tiers["local-nvme"], machine, instance):
        low, high, verified = local
        rate = (min(low, device), min(high, device))
        found.append(_start(ground, "local-nvme", rate, verified, bytes_read, "warm", eager, goal))
    network = (machine and machine.network_gbps) or (instance and instance.network_gbps)
    for row in ground.market.storage_tiers:
        if row.tier == "local-nvme" or (row.per == "tib" and (row.tier != origin or not origin_tib)):
            continue
        size = (origin_tib or 1.0) if row.per == "tib" else 1.0
        cap = min(device, network / 8) if row.over_network and network else device
        rate = (min(row.gb_s_low * size, cap), min(row.gb_s_high * size, cap))
        known = proven(row) and (not row.over_network or network is not None)
        found.append(_start(ground, row.tier, rate, known, bytes_read, "cold", eager, goal))
    return tuple(found)


def _start(
    ground: Ground,
    tier: str,
    rate: tuple[float, float],
    verified: bool,
    bytes_read: float,
    state: str,
    eager: bool,
    goal: float,
) -> Start:
    low, high = bytes_read / (rate[1] * GB), bytes_read / (rate[0] * GB)
    spread = number(rate[0]) if rate[0] == rate[1] else f"{number(rate[0])} to {number(rate[1])}"
    load = Figure(
        value=(low + high) / 2,
        low=low if low < high else None,
        high=high if low < high else None,
        unit="s",
        how=f"{number(bytes_read / GB)} GB / {spread} GB/s",
        verified=verified,
    )
    state = "eager" if eager else state
    rows = [row for row in ground.market.engine_starts if row.state == state]
    least, most = min(row.seconds for row in rows), max(row.seconds for row in rows)
    how = (
        f"{number(low)} to {number(high)} s + engine {state} {number(least)} to {number(most)} s ({rows[0].of}; others)"
    )
    total = Figure(
        value=load.value + (least + most) / 2,
        low=low + least,
        high=high + most,
        unit="s",
        how=how,
        # Starts were published of a few models; for another one they are no more than a range.
        verified=False,
    )
    meets = True if high + most <= goal else False if low + least > goal else None
    return Start(tier=tier, load_seconds=load, start_seconds=total, meets_goal=meets)


def _host_to_device(ground: Ground, gpu: str, gpus: int) -> tuple[float, bool]:
    tested = next((row for row in ground.market.links if row.gpu == gpu), None)
    rate = tested.host_to_device_gb_s if tested else ground.value("host_to_device_gb_s")
    return rate * gpus, proven(tested)


def _local(row: StorageTier, machine: Machine | None, instance: Instance | None) -> tuple[float, float, bool] | None:
    if machine and machine.nvme_gb_s:
        return machine.nvme_gb_s, machine.nvme_gb_s, True
    gb, drives = nvme_of(machine, instance)
    if gb is None:
        return None
    return row.gb_s_low * (drives or 1), row.gb_s_high * (drives or 1), False
