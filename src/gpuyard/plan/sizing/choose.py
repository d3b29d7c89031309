"""Other machines and parallelism for the same models: what was considered, and why it was not chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpuyard.catalog.market import Price
from gpuyard.catalog.rows import Instance
from gpuyard.plan import names
from gpuyard.plan.judge import Judge
from gpuyard.plan.rules.rule import Combination
from gpuyard.plan.sizing.cost import NodePrice, offers_of, priced
from gpuyard.plan.sizing.figures import Figure, Ground, number
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.room import release_of
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kind of machine with the pool's models on it."""

    instance: Instance
    seats: tuple[Seat, ...]
    cost: Figure | None
    able: bool
    """All its models fit, and no rule refuses it."""
    told: Considered


def considered_of(
    fleet: Fleet, ground: Ground, givens: Givens, judge: Judge, pool: Pool, price: NodePrice, seats: Sequence[Seat]
) -> tuple[Considered, ...]:
    """Parallelism on the pool's own GPUs, then other machines of the same provider, those that cost less first."""
    busy = [item for item in seats if item.gpus and item.shape]
    if not busy:
        return ()
    found = [other for item in busy for other in _other_sizes(ground, givens, pool, item)]
    others = [other.told for other in candidates(fleet, ground, givens, judge, pool, price, busy)]
    return (*found, *sorted(others, key=_rank))


def _other_sizes(ground: Ground, givens: Givens, pool: Pool, chosen: Seat) -> Iterator[Considered]:
    for size, red in chosen.tried:
        what = f"{chosen.model.name}: tensor_parallel_size {size}"
        why = f"has {red.have}; needs {red.need}"
        yield Considered(what=what, rule=red.rule, why=why, usd_per_node_hour=None, usd_per_mtok=None)
    if not chosen.room or not chosen.room.memory:
        return
    if not chosen.room.fits:
        yield from _more_nodes(givens, pool, chosen)
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


def _more_nodes(givens: Givens, pool: Pool, chosen: Seat) -> Iterator[Considered]:
    """The fewest nodes that would hold a model that one does not, however its GPUs are taken."""
    sizes = [size for size in SIZES if size <= pool.gpus_per_node]
    for stages in (1, 2, 3, 4):
        tried = [givens.rooms.room(chosen.model, chosen.engine, pool.gpu, size, stages) for size in sizes]
        if stages == 1 and any(room and room.fits for room in tried):
            return  # what FIT-MEMORY says would pass
        if tried[-1] and tried[-1].fits:
            what = f"{chosen.model.name}: tensor_parallel_size {sizes[-1]}, pipeline_parallel_size {stages}"
            why = f"{stages} nodes would hold one copy; gpuyard starts each engine within a node"
            yield Considered(what=what, rule="SIZE-NODES", why=why, usd_per_node_hour=None, usd_per_mtok=None)
            return


def candidates(
    fleet: Fleet, ground: Ground, givens: Givens, judge: Judge, pool: Pool, price: NodePrice, seats: Sequence[Seat]
) -> Iterator[Candidate]:
    """Every other kind of machine of the same provider, each with the parallelism that suits it."""
    provider = price.instance.provider if price.instance else fleet.provider
    free = [free_of(item.model) for item in seats]
    own = score(ground, givens, pool.gpu, pool.gpus_per_node, price.figure, free, seats)
    kinds: dict[tuple[str, int], list[Instance]] = {}
    for row in givens.instances:
        if row.provider == provider and (row.gpu, row.gpus) != (pool.gpu, pool.gpus_per_node):
            kinds.setdefault((row.gpu, row.gpus), []).append(row)
    for rows in kinds.values():
        offers = [(row, offer) for row in rows for offer in offers_of(givens.market, row, price.region, price.purchase)]
        best = min(offers, key=lambda offer: offer[1].usd_per_hour, default=(rows[0], None))
        yield _candidate(fleet, ground, givens, judge, best[0], best[1], seats, own)


def _candidate(
    fleet: Fleet,
    ground: Ground,
    givens: Givens,
    judge: Judge,
    instance: Instance,
    offer: Price | None,
    seats: Sequence[Seat],
    own: Figure | None,
) -> Candidate:
    gpu, gpus = instance.gpu, instance.gpus
    cost = priced(offer) if offer else None
    models = [free_of(item.model) for item in seats]
    moved: tuple[Seat, ...] = ()

    def told(rule: str, why: str, each: Figure | None = None, able: bool = False) -> Candidate:
        what = f"{instance.instance}: {gpus} x {gpu}"
        considered = Considered(what=what, rule=rule, why=why, usd_per_node_hour=cost, usd_per_mtok=each)
        return Candidate(instance, moved, cost, able, considered)

    for item in seats:
        found = judge.findings(_combination(fleet, givens, gpu, item))
        # What is no longer looked after is so on every machine; `gpuyard check` says it of the fleet.
        if red := next((finding for finding in found if finding.level == "red" and finding.kind == "works"), None):
            return told(red.rule, f"has {red.have}; needs {red.need}")
    moved = tuple(
        seat(item.index, model, item.engine, givens.rooms, gpu, gpus) for item, model in zip(seats, models, strict=True)
    )
    for item in moved:
        if item.room is None:
            return told("FIT-UNKNOWN", f"nothing is known of {item.model.name} on {gpu}")
        if not item.room.fits:
            red = item.room.red
            return told(red.rule, f"{item.model.name} on {item.size} GPUs has {red.have}; needs {red.need}")
    if (needed := sum(item.gpus for item in moved)) > gpus:
        return told("SIZE-GPUS", f"its models need {needed} GPUs of a node")
    if cost is None:
        return told("COST-PRICE", "no price in this region and purchase")
    each = score(ground, givens, gpu, gpus, cost, models, moved)
    if each is None or own is None or not own.value:
        return told("SIZE-ASKED", "it would do; the spec asks for another one", each, able=True)
    ratio = each.value / own.value
    unit = "the same tokens" if len(seats) == 1 else "a node"
    if ratio < 1:
        why = f"{ratio:.2g} of the price of {unit} if always busy, as reckoned; not asked for"
        return told("COST-CHEAPER", why, each, able=True)
    return told("COST-DEARER", f"{ratio:.2g} times the price of {unit} if always busy, as reckoned", each, able=True)


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


def _rank(item: Considered) -> tuple[bool, float, str]:
    return item.usd_per_mtok is None, item.usd_per_mtok.value if item.usd_per_mtok else 0.0, item.what


def free_of(model: Model) -> Model:
    """The model without a word on its parallelism, so that each machine is tried with what suits it."""
    flags = model.vllm.model_copy(update={"tensor_parallel_size": None, "data_parallel_size": None})
    return model.model_copy(update={"vllm": flags})


def _combination(fleet: Fleet, givens: Givens, gpu: str, item: Seat) -> Combination:
    """What of the lock's rules another GPU has to pass."""
    catalog, driver = givens.catalog, fleet.driver
    features = tuple(row for flag, value in flags_of(item.model) for row in names.features(catalog, flag, value))
    base = Combination(
        gpu=names.gpu(catalog, gpu),
        engine=release_of(givens.catalog, item.engine),
        features=features or None,
        kernel_modules=driver.kernel_modules,
    )
    if not driver.version:
        return base
    release = names.driver(catalog, driver.version)
    return replace(base, driver=release, branch=names.branch(catalog, release.branch))
