"""The plan of a fleet: what each model takes of its nodes, how fast it is, what starts cost, and the money."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import fsum
from typing import Literal

from gpuyard.catalog.market import ApiPrice, Market
from gpuyard.plan.judge import Finding, Judge, Verdict
from gpuyard.plan.sizing import findings as said
from gpuyard.plan.sizing.around import around_lines
from gpuyard.plan.sizing.choose import considered_of
from gpuyard.plan.sizing.cold_start import Start, cache, nvme_of, starts
from gpuyard.plan.sizing.cost import (
    Bill,
    Line,
    NodePrice,
    Shares,
    bill,
    dip,
    node_price,
    other_lines,
    served,
    shares,
)
from gpuyard.plan.sizing.figures import Assumed, Figure, Ground, ground_of, number
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.parts import ModelPlan, PoolPlan
from gpuyard.plan.sizing.power import Power, power
from gpuyard.plan.sizing.seats import Seat, seats_of
from gpuyard.plan.sizing.throughput import decode_step, throughput
from gpuyard.plan.sizing.traffic import Traffic, between, fabrics, inside, pipeline_parallel, tensor_parallel
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Fleet, Pool


class Plan(Closed):
    """All that is reckoned of a fleet. The same fleet, tables, day and measurements give the same plan."""

    version: Literal[1]
    fleet: str
    provider: str
    spec_digest: str
    today: str
    verdict: Verdict
    """red: a model does not fit or a stated goal is missed for sure; amber: something is to be known."""
    assumptions: tuple[Assumed, ...]
    pools: tuple[PoolPlan, ...]
    models: tuple[ModelPlan, ...]
    bill: Bill
    unpriced: tuple[str, ...]
    """Pools whose nodes have no price; they are not in the bill."""
    findings: tuple[Finding, ...]


def plan_of(fleet: Fleet, givens: Givens) -> Plan:
    """The plan. Raises UnknownError where the fleet names a machine, a tier or an API that no table has."""
    ground = ground_of(fleet, givens.market)
    judge = Judge(givens.catalog, givens.today)
    said.refuse_unknown(fleet, givens)
    pools: list[PoolPlan] = []
    models: list[ModelPlan] = []
    findings: list[Finding] = []
    lines: list[Line] = []
    weights: list[float] = []
    priced: dict[str, NodePrice] = {}
    for index, pool in enumerate(fleet.pools):
        price = priced[pool.name] = node_price(fleet, pool, givens.market, givens.instances)
        seats = seats_of(fleet, pool, givens.rooms)
        spare = int(ground.value("spare_nodes"))
        serving = max(pool.nodes - spare, 0)
        used = sum(seat.gpus for seat in seats)
        found = [_model(fleet, ground, givens, pool, price, seat, serving) for seat in seats]
        watts = power(
            ground,
            gpu=pool.gpu,
            gpus=pool.gpus_per_node,
            nodes=pool.nodes,
            machine=pool.machine,
            rack=fleet.planning.rack if fleet.planning else None,
            utilisation=ground.value("utilisation"),
        )
        gib = [seat.shape.weights_gib for seat in seats if seat.shape]
        plan = PoolPlan(
            name=pool.name,
            nodes=pool.nodes,
            spare_nodes=spare,
            gpu=pool.gpu,
            gpus_per_node=pool.gpus_per_node,
            gpus_used=used,
            instance=price.instance.instance if price.instance else pool.machine.instance if pool.machine else None,
            region=price.region,
            purchase=price.purchase,
            usd_per_node_hour=price.figure,
            shares=_shares(ground, pool, spare, used),
            cache=cache(gib, nvme_of(pool.machine, price.instance)[0], False) if gib else None,
            power=watts,
            considered=considered_of(fleet, ground, givens, judge, pool, price, seats),
        )
        pools.append(plan)
        models += found
        weights += gib
        lines += _pool_lines(pool, price, watts)
        findings += said.of_pool(fleet, ground, givens, index, plan, seats, price)
    lines += [*around_lines(fleet, ground), *other_lines(fleet, ground, weights, known=False)]
    total = bill(lines, ground)
    models = [_with_money(fleet, ground, givens.market, model, pools, models, total) for model in models]
    findings += [finding for model in models for finding in said.of_model(fleet, ground, model)]
    findings.sort(key=lambda finding: finding.level, reverse=True)
    levels = {finding.level for finding in findings}
    return Plan(
        version=1,
        fleet=fleet.name,
        provider=fleet.provider,
        spec_digest=fleet.digest,
        today=givens.today,
        verdict="red" if "red" in levels else "amber" if levels else "green",
        assumptions=ground.assumed(),
        pools=tuple(pools),
        models=tuple(models),
        bill=total,
        unpriced=tuple(name for name, price in priced.items() if price.figure is None),
        findings=tuple(findings),
    )


def plan_schema_text() -> str:
    """JSON Schema of a plan as `gpuyard plan --json` prints it."""
    return json.dumps(Plan.model_json_schema(mode="serialization"), indent=2, ensure_ascii=False) + "\n"


def _shares(ground: Ground, pool: Pool, spare: int, used: int) -> Shares | None:
    if not used or spare >= pool.nodes:
        return None
    return shares(
        ground,
        nodes=pool.nodes,
        spare=spare,
        used=min(used, pool.gpus_per_node),
        gpus=pool.gpus_per_node,
        utilisation=ground.value("utilisation"),
    )


def _pool_lines(pool: Pool, price: NodePrice, watts: Power | None) -> list[Line]:
    lines: list[Line] = []
    if price.figure:
        each = price.figure
        how = f"{pool.nodes} nodes x {number(each.value)} USD/h; {each.how}"
        figure = Figure(value=pool.nodes * each.value, unit="USD/h", how=how, verified=each.verified)
        lines.append(Line(what=f"pool {pool.name}", usd_per_hour=figure))
    if watts and watts.usd_per_hour:
        lines.append(Line(what=f"energy of pool {pool.name}", usd_per_hour=watts.usd_per_hour))
    return lines


def _model(
    fleet: Fleet, ground: Ground, givens: Givens, pool: Pool, price: NodePrice, seat: Seat, serving: int
) -> ModelPlan:
    model, shape, size = seat.model, seat.shape, seat.size
    memory = seat.room.memory if seat.room else None
    fast = None
    ways: list[Traffic] = []
    begun: tuple[Start, ...] = ()
    if shape and seat.gpus:
        batch = seat.batch(ground)
        path = inside(ground, pool.gpu, size)
        fast = throughput(
            ground,
            shape,
            gpu=pool.gpu,
            size=size,
            held=seat.batch,
            path=path,
            measured=givens.measured.get(model.name),
            copies=max(seat.copies * serving, 1),
        )
        speed = next((row for row in givens.market.gpu_speeds if row.gpu == pool.gpu), None)
        if size > 1 and speed and batch:
            step = decode_step(ground, shape, speed, size, batch)
            network = between(ground, price.instance, size) if price.instance else None
            over = [path, *([network] if network else []), *fabrics(ground, size)]
            ways = [tensor_parallel(way, shape.layers, shape.hidden, size, batch, step) for way in over]
            ways += [pipeline_parallel(way, shape.hidden, 2, batch, step) for way in over[1:]]
        storage = fleet.planning.storage if fleet.planning else None
        begun = starts(
            ground,
            gpu=pool.gpu,
            gpus=size,
            weights_gib=shape.weights_gib,
            eager=bool(model.vllm.enforce_eager),
            machine=pool.machine,
            instance=price.instance,
            origin=storage.tier if storage else None,
            origin_tib=storage.tib if storage else None,
        )
    return ModelPlan(
        name=model.name,
        source=model.source,
        pool=pool.name,
        tensor_parallel_size=size,
        tensor_parallel_from=seat.chosen_by,
        data_parallel_size=seat.copies,
        gpus_per_node=seat.gpus,
        copies=seat.copies * serving,
        memory=memory,
        traffic=tuple(ways),
        throughput=fast,
        starts=begun,
        money=None,
    )


def _with_money(
    fleet: Fleet,
    ground: Ground,
    market: Market,
    model: ModelPlan,
    pools: Sequence[PoolPlan],
    models: Sequence[ModelPlan],
    total: Bill,
) -> ModelPlan:
    """The model with its share of the whole bill: of its pool by GPUs, of the rest by what the pools cost."""
    pool = next(item for item in pools if item.name == model.pool)
    if pool.usd_per_node_hour is None or not model.gpus_per_node or not model.throughput or not model.copies:
        return model
    own = pool.nodes * pool.usd_per_node_hour.value * model.gpus_per_node / max(pool.gpus_used, 1)
    nodes = fsum(
        item.nodes * item.usd_per_node_hour.value for item in pools if item.usd_per_node_hour and item.gpus_used
    )
    share = own / nodes if nodes else model.gpus_per_node / sum(item.gpus_per_node for item in models)
    cost = total.usd_per_hour
    each = model.throughput.tokens_per_second
    left = 1 - dip(ground)
    scale = model.copies * left

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * scale

    capacity = Figure(
        value=each.value * scale,
        low=scaled(each.low),
        high=scaled(each.high),
        unit="tokens/s",
        how=f"{model.copies} copies x {number(each.value)} tokens/s x {left:.5g} without upgrades",
        verified=each.verified and ground.verified("upgrades_per_year", "minutes_per_upgrade"),
    )
    money = served(
        ground,
        usd_per_hour=Figure(
            value=cost.value * share,
            unit="USD/h",
            how=f"{number(cost.value)} USD/h x {share:.4g}, its share of the nodes' price by GPUs",
            verified=cost.verified,
        ),
        capacity=capacity,
        utilisation=ground.value("utilisation"),
        apis=_apis(fleet, market, model),
    )
    return model.model_copy(update={"money": money})


def _apis(fleet: Fleet, market: Market, model: ModelPlan) -> list[ApiPrice]:
    asked = fleet.planning.compare_with if fleet.planning else ()
    repository = model.source.removeprefix("hf:").partition("@")[0]
    return [
        row for row in market.api_prices if row.open_weights == repository or f"{row.provider}/{row.model}" in asked
    ]
