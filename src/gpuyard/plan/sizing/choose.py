"""Other machines and parallelism for the same models: what was considered, and why it was not chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpuyard.catalog import numbers
from gpuyard.catalog.market import Price
from gpuyard.catalog.rows import EngineRelease, Instance
from gpuyard.plan import names
from gpuyard.plan.judge import Judge
from gpuyard.plan.rules.rule import Combination
from gpuyard.plan.sizing.cost import NodePrice, offers_of, priced
from gpuyard.plan.sizing.figures import Figure, Ground, number
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.seats import SIZES, Seat, seat
from gpuyard.plan.sizing.throughput import reckoned
from gpuyard.plan.sizing.traffic import inside
from gpuyard.plan.wishes import flags_of
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Fleet, Model, Pool


class Considered(Closed):
    """One that was not chosen."""

    what: str
    rule: str
    why: str
    usd_per_node_hour: Figure | None
    usd_per_mtok: Figure | None
    """For a million answer tokens of a machine that is always busy, by what is reckoned; None: of several models."""


def considered_of(
    fleet: Fleet, ground: Ground, givens: Givens, judge: Judge, pool: Pool, price: NodePrice, seats: Sequence[Seat]
) -> tuple[Considered, ...]:
    """Parallelism on the pool's own GPUs, then other machines of the same provider, those that cost less first."""
    busy = [item for item in seats if item.gpus and item.shape]
    if not busy:
        return ()
    found = [other for item in busy for other in _other_sizes(ground, givens, pool, item)]
    return (*found, *sorted(_machines(fleet, ground, givens, judge, pool, price, busy), key=_rank))


def _other_sizes(ground: Ground, givens: Givens, pool: Pool, chosen: Seat) -> Iterator[Considered]:
    for size, room in chosen.tried:
        what = f"{chosen.model.name}: tensor_parallel_size {size}"
        yield Considered(what=what, rule=room.rule, why=room.why, usd_per_node_hour=None, usd_per_mtok=None)
    if not chosen.room or not chosen.room.memory:
        return
    larger = next((size for size in SIZES if size > chosen.size and size * chosen.copies <= pool.gpus_per_node), None)
    room = givens.rooms.room(chosen.model, chosen.engine, pool.gpu, larger) if larger else None
    if larger and room and room.memory:
        what = f"{chosen.model.name}: tensor_parallel_size {larger}"
        why = (
            f"{number(room.memory.max_concurrency)} instead of {number(chosen.room.memory.max_concurrency)} longest "
            f"requests at once, on {larger} instead of {chosen.size} GPUs, with all-reduces over "
            f"{inside(ground, pool.gpu, larger).name}"
        )
        yield Considered(what=what, rule="SIZE-LARGER", why=why, usd_per_node_hour=None, usd_per_mtok=None)


def _machines(
    fleet: Fleet, ground: Ground, givens: Givens, judge: Judge, pool: Pool, price: NodePrice, seats: Sequence[Seat]
) -> Iterator[Considered]:
    provider = price.instance.provider if price.instance else fleet.provider
    free = [_free(item.model) for item in seats]
    own = score(ground, givens, pool.gpu, pool.gpus_per_node, price.figure, free, seats)
    kinds: dict[tuple[str, int], list[Instance]] = {}
    for row in givens.instances:
        if row.provider == provider:
            kinds.setdefault((row.gpu, row.gpus), []).append(row)
    for (gpu, gpus), rows in kinds.items():
        if (gpu, gpus) == (pool.gpu, pool.gpus_per_node):
            continue
        offers = [(row, offer) for row in rows for offer in offers_of(givens.market, row, price.region, price.purchase)]
        best = min(offers, key=lambda offer: offer[1].usd_per_hour, default=None)
        yield _machine(fleet, ground, givens, judge, (gpu, gpus), rows[0], best[1] if best else None, seats, own)


def _machine(
    fleet: Fleet,
    ground: Ground,
    givens: Givens,
    judge: Judge,
    kind: tuple[str, int],
    first: Instance,
    offer: Price | None,
    seats: Sequence[Seat],
    own: Figure | None,
) -> Considered:
    gpu, gpus = kind
    what = f"{offer.instance if offer else first.instance}: {gpus} x {gpu}"
    cost = priced(offer) if offer else None
    models = [_free(item.model) for item in seats]
    moved = [
        seat(item.index, model, item.engine, givens.rooms, gpu, gpus) for item, model in zip(seats, models, strict=True)
    ]
    each: Figure | None = None
    for item in moved:
        if item.room is None or not item.room.fits:
            rule, why = (item.room.rule, item.room.why) if item.room else ("FIT-UNKNOWN", f"no memory told of {gpu}")
            return _told(what, rule, f"{item.model.name} on {item.size} GPUs: {why}", cost, each)
    if (needed := sum(item.gpus for item in moved)) > gpus:
        return _told(what, "SIZE-GPUS", f"its models need {needed} GPUs of a node", cost, each)
    for item in moved:
        combination = _combination(fleet, givens, gpu, item)
        if red := next((found for found in judge.findings(combination) if found.level == "red"), None):
            return _told(what, red.rule, f"has {red.have}; needs {red.need}", cost, each)
    if cost is None:
        return _told(what, "COST-PRICE", "no price in this region and purchase", cost, each)
    each = score(ground, givens, gpu, gpus, cost, models, moved)
    if each is None or own is None or not own.value:
        return _told(what, "SIZE-ASKED", "it would do; the spec asks for another one", cost, each)
    ratio = each.value / own.value
    unit = "the same tokens" if len(seats) == 1 else "a node"
    if ratio < 1:
        return _told(
            what, "COST-CHEAPER", f"{ratio:.2g} of the price of {unit}; the spec asks for another one", cost, each
        )
    return _told(what, "COST-DEARER", f"{ratio:.2g} times the price of {unit}", cost, each)


def score(
    ground: Ground,
    givens: Givens,
    gpu: str,
    gpus: int,
    cost: Figure | None,
    models: Sequence[Model],
    seats: Sequence[Seat],
) -> Figure | None:
    """What machines are compared by: USD for a million answer tokens of one model, of several the node's price."""
    if cost is None:
        return None
    if len(models) > 1:
        return cost
    item = seats[0]
    speed = next((row for row in givens.market.gpu_speeds if row.gpu == gpu), None)
    batch = item.batch(ground)
    if speed is None or item.shape is None or batch < 1:
        return None
    fast = reckoned(ground, item.shape, speed, item.size, batch, inside(ground, gpu, item.size))
    copies = gpus // item.size
    rate = copies * fast.value * 3600 / 1e6
    how = f"{number(cost.value)} USD/h / ({copies} copies x {number(fast.value)} tokens/s x 3600 / 10^6)"
    return Figure(value=cost.value / rate, unit="USD/Mtok answered", how=how, verified=False)


def _told(what: str, rule: str, why: str, cost: Figure | None, each: Figure | None) -> Considered:
    return Considered(what=what, rule=rule, why=why, usd_per_node_hour=cost, usd_per_mtok=each)


def _rank(item: Considered) -> tuple[bool, float, str]:
    return item.usd_per_mtok is None, item.usd_per_mtok.value if item.usd_per_mtok else 0.0, item.what


def _free(model: Model) -> Model:
    """The model without a word on its parallelism, so that each machine is tried with what suits it."""
    flags = model.vllm.model_copy(update={"tensor_parallel_size": None, "data_parallel_size": None})
    return model.model_copy(update={"vllm": flags})


def _combination(fleet: Fleet, givens: Givens, gpu: str, item: Seat) -> Combination:
    """What of the lock's rules another GPU has to pass."""
    catalog, driver = givens.catalog, fleet.driver
    features = tuple(row for flag, value in flags_of(item.model) for row in names.features(catalog, flag, value))
    base = Combination(
        gpu=names.gpu(catalog, gpu),
        engine=_release(givens, item),
        features=features or None,
        kernel_modules=driver.kernel_modules,
    )
    if not driver.version:
        return base
    release = names.driver(catalog, driver.version)
    return replace(base, driver=release, branch=names.branch(catalog, release.branch))


def _release(givens: Givens, item: Seat) -> EngineRelease | None:
    rows = [row for row in givens.catalog.engines if row.distribution == item.engine.distribution]
    if item.engine.version:
        return next((row for row in rows if row.version == item.engine.version), None)
    return max((row for row in rows if row.requirements), key=lambda row: numbers(row.version), default=None)
