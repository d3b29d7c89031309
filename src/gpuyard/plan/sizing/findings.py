"""What a plan has to say of a fleet: rule, what is asked, what is there, the smallest change that would pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date

from gpuyard.catalog.rows import Severity
from gpuyard.plan import names
from gpuyard.plan.judge import Finding
from gpuyard.plan.sizing.cost import NodePrice
from gpuyard.plan.sizing.figures import Ground, number
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.parts import ModelPlan, PoolPlan
from gpuyard.plan.sizing.room import Rooms
from gpuyard.plan.sizing.seats import Seat
from gpuyard.spec.fleet import Fleet

_ARITHMETIC = "the plan's own arithmetic, shown with each figure"


def refuse_unknown(fleet: Fleet, givens: Givens) -> None:
    """Raises UnknownError where the fleet names what no table has."""
    market, known = givens.market, {row.instance: row for row in givens.instances}
    for engine in fleet.engines:
        if engine.version:
            names.engine(givens.catalog, engine.distribution, engine.version)
    for index, pool in enumerate(fleet.pools):
        names.gpu(givens.catalog, pool.gpu)
        named = pool.machine.instance if pool.machine else None
        if named is None:
            continue
        if named not in known:
            near = names.nearest(named, known)
            why = "the catalog has no machine of this name"
            raise names.UnknownError("PLAN-INSTANCE", f"pools[{index}].machine.instance {named}", why, f"take {near}")
        row = known[named]
        if (row.gpu, row.gpus) != (pool.gpu, pool.gpus_per_node):
            found = f"pools[{index}].machine.instance {named}"
            why = f"it has {row.gpus} x {row.gpu}, the pool asks for {pool.gpus_per_node} x {pool.gpu}"
            change = f"set gpu to {row.gpu} and gpus_per_node to {row.gpus}, or leave the instance out"
            raise names.UnknownError("PLAN-INSTANCE", found, why, change)
    planning = fleet.planning
    tiers = [row.tier for row in market.storage_tiers]
    if planning and planning.storage and planning.storage.tier not in tiers:
        near = names.nearest(planning.storage.tier, tiers)
        found, why = f"planning.storage.tier {planning.storage.tier}", f"the catalog knows {', '.join(tiers)}"
        raise names.UnknownError("PLAN-STORAGE", found, why, f"take {near}")
    apis = [f"{row.provider}/{row.model}" for row in market.api_prices]
    for api in planning.compare_with if planning else ():
        if api not in apis:
            why = f"the catalog has {len(apis)} prices of APIs, and none of this name"
            change = f"take {names.nearest(api, apis)}, or add a row with its source to api_prices.yaml"
            raise names.UnknownError("PLAN-API", f"planning.compare_with {api}", why, change)


def of_pool(
    fleet: Fleet, ground: Ground, givens: Givens, index: int, pool: PoolPlan, seats: Sequence[Seat], price: NodePrice
) -> Iterator[Finding]:
    """What is to be said of a pool's nodes and of who sits on them."""
    where = f"pools[{index}]"
    for seat in seats:
        yield from _of_seat(givens.rooms, pool, seat)
    if pool.gpus_used > pool.gpus_per_node:
        change = f"move a model to another pool, or set {where}.gpus_per_node to {pool.gpus_used} or more"
        have = f"models that take {pool.gpus_used} GPUs of a node with {pool.gpus_per_node}"
        yield _finding("SIZE-GPUS", "red", where, have, "a GPU for each shard of each copy", change)
    elif 0 < pool.gpus_used < pool.gpus_per_node and fleet.provider != "lab":
        idle = pool.gpus_per_node - pool.gpus_used
        change = f"set data_parallel_size of a model, or take machines with {pool.gpus_used} GPUs"
        have = f"{idle} of {pool.gpus_per_node} GPUs of each node without a model"
        yield _finding("SIZE-IDLE-GPUS", "amber", where, have, "a model on every GPU that is paid", change)
    if pool.spare_nodes >= pool.nodes:
        have = f"{pool.spare_nodes} spare of {pool.nodes} nodes"
        change = f"set planning.spare_nodes to {pool.nodes - 1}, or {where}.nodes to {pool.spare_nodes + 1}"
        yield _finding("SIZE-SPARE", "red", where, have, "a node that serves", change)
    elif pool.gpus_used and pool.nodes == 1 and fleet.provider != "lab":
        minutes = number(ground.value("minutes_per_upgrade"))
        have = f"one node: each upgrade takes its models away for {minutes} minutes"
        yield _finding("SIZE-ONE-NODE", "amber", where, have, "a second node", f"set {where}.nodes to 2")
    if pool.cache and pool.cache.fits is False and pool.cache.local_gb:
        need, have = pool.cache.needed_gb, f"{number(pool.cache.local_gb.value)} GB of local NVMe"
        change = "move a model to another pool, or take a machine with larger drives"
        yield _finding("SIZE-CACHE", "red", where, have, f"{number(need.value)} GB: {need.how}", change)
    if pool.power and pool.power.rack_margin_watts and pool.power.rack_margin_watts.value < 0 and fleet.planning:
        margin, rack, throttled = pool.power.rack_margin_watts, fleet.planning.rack, pool.power.throttled_share
        most = int((rack.watts if rack else 0) // pool.power.node_watts.value)
        have = f"{margin.how} = {number(margin.value)} W"
        need = "a rack that carries its nodes with all GPUs at their limit"
        change = f"set planning.rack.nodes to {most}"
        if throttled and throttled.value:
            change += f", or cap the GPUs' power at {throttled.value:.0%} of their limit"
        yield _finding("POWER-RACK", "red", where, have, need, change, verified=margin.verified)
    yield from _of_price(ground, where, pool, price, givens.today)


def _of_seat(rooms: Rooms, pool: PoolPlan, seat: Seat) -> Iterator[Finding]:
    where = f"models[{seat.index}]"
    if not seat.gpus:
        yield from (replace(finding, what=where) for finding in (seat.room.findings if seat.room else ()))
        return
    if seat.shape is None or seat.room is None:
        have = f"{seat.model.source} on {pool.gpu}, of which the catalog has no shape"
        change = f"did you mean {rooms.nearest(seat.model)}? Or give --config {seat.model.name}=config.json"
        yield _finding("FIT-UNKNOWN", "amber", where, have, "layers, hidden size and weights", change, verified=False)
        return
    if seat.chosen_by == "chosen" and seat.size > 1 and seat.room.fits:
        first = seat.tried[0][1]
        have = f"no tensor_parallel_size, so the engine takes 1, which has {first.have}"
        change = f"set {where}.vllm.tensor_parallel_size to {seat.size}"
        yield _finding("SIZE-TENSOR-PARALLEL", "red", where, have, f"{seat.size} GPUs for each copy", change)
    yield from (replace(finding, what=where) for finding in seat.room.findings)


def _of_price(ground: Ground, where: str, pool: PoolPlan, price: NodePrice, today: str) -> Iterator[Finding]:
    if price.purchase == "spot":
        have = "nodes that their provider may take back at any time, at a price of the moment"
        change = "keep the load that has to be served on nodes bought otherwise"
        yield _finding("COST-SPOT", "amber", where, have, "nodes that stay", change, verified=False)
    if price.figure is None:
        rows = [row for row in ground.market.prices if price.instance and row.instance == price.instance.instance]
        offers = sorted({f"{row.purchase} in {row.region}" for row in rows})
        have = f"no price of {pool.gpus_per_node} x {pool.gpu}, {price.purchase} in {price.region or 'any region'}"
        known = f"; the catalog has {', '.join(offers)}" if offers else ""
        change = f"set {where}.machine.usd_per_hour to what a node costs you{known}"
        yield _finding("COST-PRICE", "amber", where, have, "a price for the bill", change, verified=False)
    elif price.row and _days(price.row.as_of, today) > ground.value("price_days"):
        have = f"a price of {price.row.instance} that was read {price.row.as_of}"
        need = f"one of the last {number(ground.value('price_days'))} days"
        change = f"look the price up and set {where}.machine.usd_per_hour"
        yield _finding("COST-OLD-PRICE", "amber", where, have, need, change, price.row.source, price.row.verified)


def of_model(fleet: Fleet, ground: Ground, model: ModelPlan) -> Iterator[Finding]:
    """What is to be said of a model where it sits."""
    where = f"models[{next(index for index, item in enumerate(fleet.models) if item.name == model.name)}]"
    spec = next(item for item in fleet.models if item.name == model.name)
    if model.traffic and model.traffic[0].share_lost.value > ground.value("link_loss"):
        lost = model.traffic[0]
        have = f"{lost.share_lost.value:.0%} of its tokens/s lost to all-reduces over {lost.over}"
        need = f"at most {ground.value('link_loss'):.0%}"
        change = "take GPUs with NVLink, or more memory on each so that fewer hold a copy"
        yield _finding("SIZE-LINK", "amber", where, have, need, change, verified=False)
    yield from _of_start(ground, where, model)
    if model.throughput and model.throughput.basis == "reckoned":
        have = "tokens/s reckoned from bandwidth and FLOPS, measured by nobody"
        change = f"run `gpuyard bench load ADDRESS --model {model.name} --json` and plan with --bench FILE"
        yield _finding("COST-THROUGHPUT", "amber", where, have, "a measurement", change, verified=False)
    peak, money = spec.peak_tokens_per_second, model.money
    if peak and money:
        yield from _of_load(where, peak, model, spare=ground.value("spare_nodes") >= 1)


def _of_start(ground: Ground, where: str, model: ModelPlan) -> Iterator[Finding]:
    tiers = {start.tier: start for start in model.starts}
    start = tiers.get("local-nvme") or tiers.get("page-cache")
    if start is None or start.meets_goal:
        return
    stated = "cold_start_seconds" in ground.stated
    level: Severity = "red" if stated and start.meets_goal is False else "amber"
    goal = number(ground.value("cold_start_seconds"))
    better = [start.tier for start in model.starts if start.meets_goal]
    change = f"keep its weights on {better[0]}" if better else "keep the compile cache and a node that stands by"
    change += ", or set planning.cold_start_seconds to what can be borne"
    have = f"a restart from {start.tier} of {start.start_seconds}: {start.start_seconds.how}"
    yield _finding("SIZE-COLD-START", level, where, have, f"{goal} s at most", change, verified=False)


def _of_load(where: str, peak: float, model: ModelPlan, *, spare: bool) -> Iterator[Finding]:
    assert model.money  # noqa: S101 - the caller has asked
    capacity = model.money.tokens_per_second_capacity
    low, high = capacity.low or capacity.value, capacity.high or capacity.value
    each = capacity.value / model.copies
    copies = int(-(-peak // each))
    if peak > low:
        level: Severity = "red" if peak > high else "amber"
        change = f"serve it with {copies} copies instead of {model.copies}"
        need = f"{number(peak)} tokens/s at the peak"
        yield _finding("SIZE-LOAD", level, where, f"capacity of {capacity}", need, change, verified=capacity.verified)
    elif not spare and peak > capacity.value * (1 - model.data_parallel_size / model.copies):
        have = f"{number(capacity.value)} tokens/s, and a node less while it is upgraded"
        change = f"serve it with {copies + model.data_parallel_size} copies, or upgrade outside of the peak"
        need = f"{number(peak)} tokens/s at the peak"
        yield _finding("SIZE-LOAD-UPGRADE", "amber", where, have, need, change, verified=capacity.verified)


def _finding(
    rule: str,
    level: Severity,
    what: str,
    have: str,
    need: str,
    change: str,
    source: str = _ARITHMETIC,
    verified: bool = True,
) -> Finding:
    return Finding(rule, level, what, have, need, change, source, verified)


def _days(as_of: str, today: str) -> int:
    """Days since the last day that a row's date may mean."""
    parts = [int(part) for part in as_of.split("-")]
    year, month, day = (*parts, 12, 28)[:3] if len(parts) < 3 else parts
    return (date.fromisoformat(today) - date(year, month if len(parts) > 1 else 12, day)).days
