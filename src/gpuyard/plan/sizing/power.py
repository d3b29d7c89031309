"""Watts of a node and of a rack against what they are given, and how far a GPU is from lowering its clocks."""

from __future__ import annotations

from gpuyard.plan.sizing.figures import Figure, Ground, number, proven
from gpuyard.spec.closed import Closed
from gpuyard.spec.planning import Machine, Rack


class Power(Closed):
    """Power of the nodes of a pool, none of it where a provider bears it."""

    node_watts: Figure
    """With all GPUs at their limit."""
    pool_kilowatts: Figure
    thermal_margin_c: Figure | None
    """From the hottest that the GPU is specified to run at to where its clocks fall; None: no row."""
    rack_watts: Figure | None
    rack_margin_watts: Figure | None
    """What the rack has left with all its GPUs at their limit; below 0 the feed trips or power is capped."""
    throttled_share: Figure | None
    """Of their limit that GPUs can draw in a rack that has too little; 1: all of it."""
    usd_per_hour: Figure | None
    """Energy of the pool, where the fleet states its price."""


def power(
    ground: Ground, *, gpu: str, gpus: int, nodes: int, machine: Machine | None, rack: Rack | None, utilisation: float
) -> Power | None:
    """None where the catalog does not know what the GPU draws and the fleet does not say it."""
    speed = next((row for row in ground.market.gpu_speeds if row.gpu == gpu), None)
    if speed is None:
        return None
    boards = gpus * speed.tdp_watts
    node = _node(ground, gpu, gpus, boards, machine, proven(speed))
    pool = Figure(
        value=node.value * nodes / 1000,
        unit="kW",
        how=f"{nodes} nodes x {number(node.value)} W / 1000",
        verified=node.verified,
    )
    thermal = next((row for row in ground.market.thermals if row.gpu == gpu), None)
    margin = thermal and Figure(
        value=thermal.slowdown_c - thermal.max_operating_c,
        unit="C",
        how=f"clocks fall from {number(thermal.slowdown_c)} C, specified to {number(thermal.max_operating_c)} C",
        verified=thermal.verified,
    )
    given = left = throttled = energy = None
    if rack:
        standing = min(rack.nodes, nodes)
        drawn = standing * node.value
        given = Figure(value=drawn, unit="W", how=f"{standing} nodes x {number(node.value)} W", verified=node.verified)
        left = Figure(
            value=rack.watts - drawn,
            unit="W",
            how=f"{number(rack.watts)} W - {number(drawn)} W",
            verified=node.verified,
        )
        host = node.value - boards
        share = max(0.0, min(1.0, (rack.watts / standing - host) / boards))
        throttled = Figure(
            value=share,
            unit="of the GPUs' limit",
            how=f"({number(rack.watts)} W / {standing} - {number(host)} W of the host) / {number(boards)} W, 1 at most",
            verified=node.verified,
        )
        if rack.usd_per_kwh:
            # Between idle and full, GPUs draw by what they do; the host draws all the time.
            average = host + boards * utilisation
            price = average * nodes / 1000 * rack.power_usage_effectiveness * rack.usd_per_kwh
            energy = Figure(
                value=price,
                unit="USD/h",
                how=f"({number(host)} W + {number(boards)} W x {number(utilisation)}) x {nodes} / 1000 "
                f"x {rack.power_usage_effectiveness} x {rack.usd_per_kwh} USD/kWh",
                verified=False,
            )
    return Power(
        node_watts=node,
        pool_kilowatts=pool,
        thermal_margin_c=margin,
        rack_watts=given,
        rack_margin_watts=left,
        throttled_share=throttled,
        usd_per_hour=energy,
    )


def _node(ground: Ground, gpu: str, gpus: int, boards: float, machine: Machine | None, known: bool) -> Figure:
    if machine and machine.max_watts:
        return Figure(value=machine.max_watts, unit="W", how="machine.max_watts", verified=True)
    row = next((row for row in ground.market.node_power if row.gpu == gpu and row.gpus == gpus), None)
    if row:
        how = f"{row.machine}: {number(row.max_watts)} W at most, of which GPUs {number(boards)} W"
        return Figure(value=row.max_watts, low=boards, high=row.max_watts, unit="W", how=how, verified=row.verified)
    host = ground.rows["host_watts_per_gpu"]
    how = f"{gpus} x {number(boards / gpus)} W + host {gpus} x {number(host.value)} W (assumed)"
    return Figure(
        value=boards + gpus * host.value,
        low=boards + gpus * host.low,
        high=boards + gpus * host.high,
        unit="W",
        how=how,
        verified=known and host.verified,
    )
