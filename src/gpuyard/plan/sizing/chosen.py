"""A fleet with its machines and parallelism chosen: the least bill that carries the load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from gpuyard.plan.judge import Judge
from gpuyard.plan.sizing.choose import candidates, free_of
from gpuyard.plan.sizing.cost import dip, node_price
from gpuyard.plan.sizing.figures import Ground, ground_of
from gpuyard.plan.sizing.findings import refuse_unknown
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.seats import SIZES, Seat, seat, seats_of
from gpuyard.plan.sizing.throughput import throughput
from gpuyard.plan.sizing.traffic import inside
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet, Model, Pool
from gpuyard.spec.planning import Machine


@dataclass(frozen=True, slots=True)
class _Choice:
    gpu: str
    gpus: int
    instance: str | None
    seats: tuple[Seat, ...]
    nodes: int
    usd_per_hour: float | None


def chosen(fleet: Fleet, givens: Givens) -> Fleet:
    """The fleet on the machines that cost least for the load, with the parallelism that suits them.

    The load is each model's peak where it is stated, else what the pool's own machines would carry. Most speeds are
    reckoned: of two machines with nearly the same bill either may be the better one. Raises RefusedError where nothing
    fits.
    """
    ground = ground_of(fleet, givens.market)
    refuse_unknown(fleet, givens)
    judge = Judge(givens.catalog, givens.today)
    pools: list[Pool] = []
    models = {model.name: model for model in fleet.models}
    for index, pool in enumerate(fleet.pools):
        busy = [item for item in seats_of(fleet, pool, givens.rooms) if item.gpus and item.shape]
        if not busy:
            pools.append(pool)
            continue
        best = _best(fleet, ground, givens, judge, index, pool, busy)
        machine = (pool.machine or Machine()).model_copy(update={"instance": best.instance})
        moved = {"gpu": best.gpu, "gpus_per_node": best.gpus, "nodes": best.nodes, "machine": machine}
        pools.append(pool.model_copy(update=moved))
        models |= {item.model.name: _placed(models[item.model.name], item, best) for item in best.seats}
    data = fleet.model_copy(update={"pools": tuple(pools), "models": tuple(models.values())})
    return Fleet.model_validate_json(data.model_dump_json())


def _best(
    fleet: Fleet, ground: Ground, givens: Givens, judge: Judge, index: int, pool: Pool, busy: list[Seat]
) -> _Choice:
    price = node_price(fleet, pool, givens.market, givens.instances)
    own = tuple(
        seat(item.index, free_of(item.model), item.engine, givens.rooms, pool.gpu, pool.gpus_per_node) for item in busy
    )
    own = _widened(ground, givens, own, pool.gpu, pool.gpus_per_node)
    spare = int(ground.value("spare_nodes"))
    rates = _rates(ground, pool.gpu, pool.gpus_per_node, own)
    serving = max(pool.nodes - spare, 1)
    load = {
        item.model.name: item.model.peak_tokens_per_second or rates.get(item.model.name, 0.0) * serving for item in busy
    }
    choices: list[_Choice] = []
    fits = all(item.room and item.room.fits for item in own) and sum(item.gpus for item in own) <= pool.gpus_per_node
    if fits:
        named = price.instance.instance if price.instance else None
        nodes = _nodes(load, rates, spare)
        usd = price.figure.value * nodes if price.figure else None
        choices.append(_Choice(pool.gpu, pool.gpus_per_node, named, own, nodes, usd))
    # A price that its owner states is of his machine alone.
    if pool.machine is None or pool.machine.usd_per_hour is None:
        for other in candidates(fleet, ground, givens, judge, pool, price, busy):
            if not other.able or not other.cost:
                continue
            row = other.instance
            seats = _widened(ground, givens, other.seats, row.gpu, row.gpus)
            rates = _rates(ground, row.gpu, row.gpus, seats)
            if rates or not any(load.values()):
                nodes = _nodes(load, rates, spare)
                choices.append(_Choice(row.gpu, row.gpus, row.instance, seats, nodes, other.cost.value * nodes))
    if not choices:
        names = ", ".join(item.model.name for item in busy)
        why = "no machine of the catalog that has a price here holds them"
        change = "choose another region, quantised models, or fewer models in one pool"
        raise RefusedError("PLAN-NOTHING-FITS", f"pools[{index}] with {names}", why, change)
    return min(choices, key=lambda choice: (choice.usd_per_hour is None, choice.usd_per_hour or 0.0, choice.gpus))


def _widened(ground: Ground, givens: Givens, seats: tuple[Seat, ...], gpu: str, gpus: int) -> tuple[Seat, ...]:
    """A model alone on its nodes gets the size at which a node answers most: more room for requests, or more copies."""
    if len(seats) != 1 or not seats[0].room or not seats[0].room.fits:
        return seats
    (first,) = seats
    sizes = [first]
    for size in SIZES:
        room = givens.rooms.room(first.model, first.engine, gpu, size) if first.size < size <= gpus else None
        if room and room.fits:
            sizes.append(replace(first, size=size, room=room))
    best = max(sizes, key=lambda item: (_rates(ground, gpu, gpus, (item,)).get(first.model.name, 0.0), -item.size))
    return (best,)


def _rates(ground: Ground, gpu: str, gpus: int, seats: tuple[Seat, ...]) -> dict[str, float]:
    """Answer tokens a second of a node by model; without those that nobody can reckon."""
    found: dict[str, float] = {}
    for item in seats:
        path = inside(ground, gpu, item.size)
        fast = item.shape and throughput(
            ground, item.shape, gpu=gpu, size=item.size, held=item.batch, path=path, measured=None, copies=1
        )
        if fast:
            found[item.model.name] = fast.tokens_per_second.value * _copies(item, gpus, len(seats)) * (1 - dip(ground))
    return found


def _nodes(load: dict[str, float], rates: dict[str, float], spare: int) -> int:
    needed = [ceil(load[name] / rate) for name, rate in rates.items() if rate]
    return max([1, *needed]) + spare


def _copies(item: Seat, gpus: int, models: int) -> int:
    """Alone on its nodes a model fills them."""
    return gpus // item.size if models == 1 else 1


def _placed(model: Model, item: Seat, best: _Choice) -> Model:
    copies = _copies(item, best.gpus, len(best.seats))
    flags = {"tensor_parallel_size": item.size, "data_parallel_size": copies if copies > 1 else None}
    return model.model_copy(update={"vllm": model.vllm.model_copy(update=flags)})
