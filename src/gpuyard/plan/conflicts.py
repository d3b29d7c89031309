"""When nothing grants all wishes: the smallest sets of them that conflict, why, and the nearest that would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from gpuyard.catalog import numbers
from gpuyard.plan import names
from gpuyard.plan.judge import Finding, is_verified
from gpuyard.plan.rules.rule import Combination, Misfit, Rule
from gpuyard.plan.wishes import Key, Search, Wishes, places_of
from gpuyard.spec.fleet import Pool

MOST = 8
"""So many conflicts are told at most."""
_PAIRS = 48
"""With more wishes than this, pairs are no longer tried one by one."""

# What is the least trouble to change comes first.
_EASE = (
    "driver.version",
    "driver.branch",
    "driver.kernel_modules",
    "cuda_toolkit",
    "dcgm.version",
    "dcgm",
    "efa.installer",
    "efa",
    "engine",
    *names.FLAGS,
    "kernel",
    "distribution",
    "gpu",
)


def conflicts(search: Search, wishes: Wishes) -> list[Finding]:
    """One finding for each smallest set of wishes that cannot hold together."""
    return [_told(search, wishes, found) for found in smallest_conflicts(search, wishes)]


def smallest_conflicts(search: Search, wishes: Wishes) -> list[tuple[Key, ...]]:
    """Sets of wishes that conflict, none within another, the smallest first; empty where all can be granted."""
    if search.choose(wishes):
        return []
    found: list[tuple[Key, ...]] = []
    keys = sorted(wishes)
    if len(keys) <= _PAIRS:
        for size in (1, 2):
            for some in combinations(keys, size):
                if not any(set(known) <= set(some) for known in found) and not _granted(search, wishes, some):
                    found.append(some)
    # Larger ones, and all where there are too many wishes to try: drop wishes one by one as long as a conflict remains.
    while len(found) < MOST:
        # Without one wish of each known conflict these are gone; what remains is another one, or none.
        rest = [key for key in keys if key not in {_easiest(known) for known in found}]
        if _granted(search, wishes, rest):
            break
        found.append(_shrunk(search, wishes, rest))
    return sorted(found, key=lambda some: (len(some), some))[:MOST]


def _granted(search: Search, wishes: Wishes, keys: Sequence[Key]) -> bool:
    return search.choose({key: wishes[key] for key in keys}) is not None


def _shrunk(search: Search, wishes: Wishes, keys: Sequence[Key]) -> tuple[Key, ...]:
    left = list(keys)
    for key in keys:
        without = [other for other in left if other != key]
        if not _granted(search, wishes, without):
            left = without
    return tuple(left)


def _easiest(keys: Sequence[Key]) -> Key:
    return min(keys, key=lambda key: _EASE.index(key[0]) if key[0] in _EASE else len(_EASE))


def _told(search: Search, wishes: Wishes, keys: tuple[Key, ...]) -> Finding:
    some = {key: wishes[key] for key in keys}
    for kind, about in keys:
        if kind == "engine.distribution" and not search.engines(some, about):
            return _nothing_to_lock(search, (kind, about), wishes)
    rule, misfit, parts = _why(search, some)
    what = " with ".join(_wish(search, key, wishes[key]) for key in keys)
    changes = list(_changes(search, wishes, keys))
    change = " or ".join(changes[:3]) if changes else "leave one of them out"
    if rule.acceptable:
        change += f" or accept {rule.id} for a while, with a reason"
    return Finding(
        rule.id,
        "red",
        what,
        misfit.have,
        misfit.need,
        change,
        misfit.row.source if misfit.row else rule.source,
        is_verified(rule, misfit, parts),
        rule.kind,
    )


def _nothing_to_lock(search: Search, key: Key, wishes: Wishes) -> Finding:
    rows = [row for row in search.catalog.engines if row.distribution == wishes[key] and row.requirements]
    return Finding(
        "PLAN-REQUIREMENTS",
        "red",
        _wish(search, key, wishes[key]),
        "no hash-locked requirements in the project for any version",
        f"the file {' or '.join(str(row.requirements) for row in rows) or 'that a row of engines.yaml names'}",
        "compile it with `make lock-python`",
        "requirements/",
        verified=True,
    )


def _wish(search: Search, key: Key, value: str) -> str:
    places = places_of(search.fleet, key)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{places[0]} {value}{more}"


def _why(search: Search, some: Wishes) -> tuple[Rule, Misfit, Combination]:
    """Of all that the wishes leave open, what comes nearest to fitting, and the rule that still refuses it."""
    best: list[tuple[Rule, Misfit, Combination]] | None = None
    for driver, modules in search.drivers(some):
        misfits = list(_refusals(search, some, search.node(some, driver, modules)))
        if misfits and (best is None or len(misfits) < len(best)):
            best = misfits
        if best and len(best) == 1:
            break
    assert best is not None  # noqa: S101 - a conflict is refused by at least one rule
    return best[0]


def _refusals(search: Search, some: Wishes, node: Combination) -> Iterator[tuple[Rule, Misfit, Combination]]:
    """Every refusal on the way of one driver, as `Search.choose_with` would meet it, the nearest version each time."""
    tried: list[list[Combination]] = [[node]]
    if ("dcgm", "") in some:
        tried.append([replace(node, dcgm=row) for row in search.dcgms(some)])
    bases: dict[str, Combination] = {}
    for pool in search.fleet.pools:
        gpu = some.get(("gpu", pool.gpu))
        base = replace(
            node,
            gpu=names.gpu(search.catalog, gpu) if gpu else None,
        )
        wanted = some.get(("cuda_toolkit", pool.cuda_toolkit)) if pool.cuda_toolkit else None
        options = [replace(base, toolkit=row) for row in search.toolkits(wanted, pool.name)] if wanted else [base]
        tried.append(options)
        bases[pool.name] = options[0]
        if pool.efa and ("efa", "") in some:
            tried.append([replace(base, efa=row) for row in search.installers(some, pool)])
    for engine in search.fleet.engines:
        for demand in search.demands(some, engine.name, bases):
            if not search.wants(some, engine):
                tried.append([demand])
                continue
            tried.append([replace(demand, engine=row, nccl=row.nccl) for row in search.engines(some, engine.name)])
    for pool in search.fleet.pools:
        if pool.efa and ("efa", "") in some:
            for nccl in _nccl(search, some, pool, bases):
                tried.append([replace(bases[pool.name], efa=row, nccl=nccl) for row in search.installers(some, pool)])
    seen: set[tuple[str, str]] = set()
    nothing: list[tuple[Rule, Misfit, Combination]] = []
    for options in tried:
        best = min((_red(search, option) for option in options), key=len, default=nothing)
        for rule, misfit, option in best:
            if (rule.id, misfit.have) not in seen:
                seen.add((rule.id, misfit.have))
                yield rule, misfit, option


def _nccl(search: Search, some: Wishes, pool: Pool, bases: Mapping[str, Combination]) -> list[str]:
    """NCCL of the engines that serve a pool, each in the version that does best what is asked of it."""
    found: list[str] = []
    for engine in search.fleet.engines:
        if not search.wants(some, engine) or not any(
            (model.engine, model.pool) == (engine.name, pool.name) for model in search.fleet.models
        ):
            continue
        demands = search.demands(some, engine.name, bases)
        options = [
            (sum(len(_red(search, replace(demand, engine=row))) for demand in demands), index, row.nccl)
            for index, row in enumerate(search.engines(some, engine.name))
        ]
        _, _, nccl = min(options, default=(0, 0, None))
        found += [nccl] if nccl else []
    return found


def _red(search: Search, option: Combination) -> list[tuple[Rule, Misfit, Combination]]:
    return [
        (rule, misfit, option)
        for rule, misfit in search.judge.misfits(option)
        if misfit.level == "red" and rule.id not in search.judge.accepted
    ]


def _changes(search: Search, wishes: Wishes, keys: tuple[Key, ...]) -> Iterator[str]:
    """For each wish of a conflict, the nearest value with which this conflict is gone; what grants all comes first."""
    found: list[tuple[bool, int, str]] = []
    for key in keys:
        if key[0] not in _EASE:
            continue
        for value in _nearby(search, key, wishes[key]):
            some = {**{other: wishes[other] for other in keys}}
            changed = {other: known for other, known in some.items() if other != key}
            everything = {other: known for other, known in wishes.items() if other != key}
            if value is not None:
                changed[key], everything[key] = value, value
            if search.choose(changed):
                place, *others = places_of(search.fleet, key)
                more = f" and {len(others)} more" if others else ""
                words = f"leave {place}{more} out" if value is None else f"set {place}{more} to {value}"
                found.append((search.choose(everything) is None, _EASE.index(key[0]), words))
                break
    for _, _, words in sorted(found):
        yield words


def _nearby(search: Search, key: Key, value: str) -> Sequence[str | None]:
    """Other values of a wish, the nearest first; None stands for leaving it out."""
    catalog = search.catalog
    branches = [row.branch for row in catalog.drivers.branches if row.kind in ("lts", "production")]
    kind, about = key
    match kind:
        case "driver.version":
            supported = [row.version for row in catalog.drivers.versions if row.branch in branches]
            versions = [row.version for row in catalog.drivers.versions]
            return [*_by_distance(value, supported), *_by_distance(value, versions)]
        case "driver.branch":
            every = [row.branch for row in catalog.drivers.branches]
            return [*_by_distance(value, branches), *_by_distance(value, every)]
        case "driver.kernel_modules":
            return ["proprietary" if value == "open" else "open"]
        case "cuda_toolkit":
            return [*_by_distance(value, sorted({row.toolkit for row in catalog.toolkits})), None]
        case "efa.installer":
            return _by_distance(value, [row.installer for row in catalog.efa])
        case "dcgm.version":
            return _by_distance(value, [row.version for row in catalog.dcgm])
        case "engine":
            distribution = next(engine.distribution for engine in search.fleet.engines if engine.name == about)
            rows = [row for row in catalog.engines if row.distribution == distribution and row.version != value]
            ready = [row.version for row in rows if row.requirements in search.lockable]
            return [*_by_distance(value, ready), *_by_distance(value, [row.version for row in rows])]
        case "kernel":
            return _by_distance(value, sorted({kernel for row in catalog.distributions for kernel in row.kernels}))
        case "distribution":
            systems = [row.distribution for row in catalog.distributions if row.distribution != value]
            family, _, _ = value.partition("-")
            near: list[str] = sorted(systems, key=lambda name: (not name.startswith(family), name))
            return near
        case "gpu":
            have = next(row for row in catalog.gpus if row.name == value)
            others = [row for row in catalog.gpus if row.name != value and not row.blocked]

            def far(name: str) -> tuple[int, ...]:
                row = next(row for row in others if row.name == name)
                a, b = numbers(row.compute_capability), numbers(have.compute_capability)
                return (abs(a[0] - b[0]), abs(a[1] - b[1]), row.nvswitch != have.nvswitch)

            return sorted((row.name for row in others), key=far)
        case _:
            return [None]


def _by_distance(wanted: str, known: Iterable[str]) -> list[str]:
    return [version for version in names.by_distance(wanted, known) if version != wanted]
