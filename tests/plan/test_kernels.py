"""The kernel of a lock: the newest of its series until it is locked, then the same until it is asked to move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog, numbers
from gpuyard.plan.lock import Lock, load_lock
from gpuyard.plan.moves import Part, moves, staying
from gpuyard.plan.resolve import PlanError, World, resolve
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).parents[2]
WORLD = World(load_catalog(), {"requirements/engine-cpu.txt": "a" * 64}, "2026-11-29")
OFFERED = [row for row in WORLD.catalog.kernel_releases if row.distribution == "debian-12"]
GENERAL = sorted((row.release for row in OFFERED if row.flavour == "amd64"), key=numbers)
OLDEST, NEWEST = GENERAL[0], GENERAL[-1]
CLOUD = max((row.release for row in OFFERED if row.flavour == "cloud-amd64"), key=numbers)


def wish(**changed: object) -> Fleet:
    return load_fleet(PROJECT / "fleets/lab.yaml").model_copy(update=changed)


def kernel_of(lock: Lock) -> str:
    found = lock.pools["chat"].kernel_release
    assert found
    return found.version


def test_the_newest_for_every_machine_is_locked_with_its_headers_at_the_same_version() -> None:
    locked = resolve(wish(), WORLD).pools["chat"].kernel_release
    assert locked
    assert locked.version == NEWEST
    assert set(locked.packages) == {f"linux-image-{NEWEST}", f"linux-headers-{NEWEST}"}
    assert len(set(locked.packages.values())) == 1
    assert kernel_of(resolve(wish(kernel="6.1"), WORLD)) == NEWEST


@pytest.mark.parametrize("release", [OLDEST, CLOUD])
def test_a_release_that_is_named_is_taken_and_its_series_is_judged(release: str) -> None:
    lock = resolve(wish(kernel=release), WORLD)
    assert (kernel_of(lock), lock.pools["chat"].kernel) == (release, "6.1")
    assert any(item.because == f"asked for as {release}" for item in lock.evidence)


@pytest.mark.parametrize(("upgrade", "came"), [((), OLDEST), (("driver",), OLDEST), (("kernel",), NEWEST)])
def test_a_kernel_stays_as_it_was_locked_until_it_is_asked_to_move(upgrade: tuple[Part, ...], came: str) -> None:
    before = resolve(wish(kernel=OLDEST), WORLD)
    after = resolve(wish(), WORLD, staying(before, upgrade))
    assert kernel_of(after) == came
    told = [move for move in moves(before, after, wish(), WORLD) if move.what == "kernel"]
    assert [(move.before, move.after) for move in told] == ([(OLDEST, NEWEST)] if came == NEWEST else [])


def test_a_release_that_the_catalog_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        PlanError, match=r"PLAN-KERNEL \[red\]: kernel: has kernel 6\.1\.0-99-amd64.*take 6\.1\.0-57-amd64"
    ):
        resolve(wish(kernel="6.1.0-99-amd64"), WORLD)


def test_a_distribution_of_which_no_release_is_known_is_locked_without_one() -> None:
    none = World(WORLD.catalog.model_copy(update={"kernel_releases": ()}), WORLD.requirements, WORLD.today)
    before = resolve(wish(), none)
    assert before.pools["chat"].kernel_release is None
    told = [move for move in moves(before, resolve(wish(), WORLD), wish(), WORLD) if move.what == "kernel"]
    assert [(move.before, move.why) for move in told] == [("none", "none was locked before")]


def test_a_lock_that_was_written_before_kernels_were_locked_is_read(tmp_path: Path) -> None:
    from gpuyard.plan import lock as module

    made = resolve(wish(), WORLD)
    plain = made.plain()
    del plain["pools"]["chat"]["kernel_release"]  # type: ignore[index]
    plain["digest"] = module._seal(plain)
    path = tmp_path / "lab.lock.yaml"
    path.write_text(json.dumps(plain))
    assert load_lock(path).pools["chat"].kernel_release is None
