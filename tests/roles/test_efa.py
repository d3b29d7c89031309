"""Which sets of EFA installer, kernel, modules and engine are known to fail, and what a node says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog
from plugins.module_utils.efa import BAD_SETS, Facts, bad_sets, installed_version, upstream_kernel
from plugins.modules.efa_info import addresses

WELL = Facts("1.50.0", "6.1.170", "open", ("2.29.7",), ("13.0",))
# One node for each known bad set, and the smallest change of it that is well.
CASES = {
    "EFA-PEER-MEMORY": (replace(WELL, kernel_modules="proprietary"), {"kernel_modules": "open"}),
    "EFA-OPEN-MODULES": (Facts("1.28.0", "6.1.170", "open"), {"installer": "1.29.0"}),
    "EFA-NCCL-MEMORY": (Facts("1.29.0", "5.10.100", "open", ("2.19.3",)), {"nccl": ("2.18.6",)}),
    "EFA-PLUGIN-CUDA": (Facts("1.43.2", "6.1.170", "open", cuda=("13.0",)), {"cuda": ("12.9",)}),
    "EFA-PLUGIN-CRASH": (Facts("1.43.2", "6.1.170", "open", nccl=("2.28.3",)), {"nccl": ("2.27.5",)}),
    "EFA-SLOW-PLUGIN": (Facts("1.35.0", "6.1.170", "open"), {"installer": "1.36.0"}),
}


def test_every_known_bad_set_is_tried_here() -> None:
    assert [bad.id for bad in BAD_SETS] == list(CASES)
    assert all(bad.why and bad.change and bad.source and bad.as_of for bad in BAD_SETS)


def test_a_node_as_locked_today_is_well() -> None:
    assert bad_sets(WELL) == []


@pytest.mark.parametrize(("rule", "facts", "change"), [(rule, *case) for rule, case in CASES.items()], ids=CASES)
def test_a_bad_set_is_known_and_the_smallest_change_of_it_is_well(
    rule: str, facts: Facts, change: dict[str, str]
) -> None:
    assert [bad.id for bad in bad_sets(facts)] == [rule]
    assert bad_sets(replace(facts, **change)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "bad"),
    [
        ("6.1.51", False),
        ("6.1.52", True),
        ("5.15.130", False),
        ("5.15.131", True),
        ("5.4.256", False),
        ("6.8.0", True),
        ("6.12.1", True),
        ("5.19.17", False),
    ],
)
def test_proprietary_modules_are_well_up_to_a_kernel_of_each_series(kernel: str, bad: bool) -> None:
    found = bad_sets(replace(WELL, kernel=kernel, kernel_modules="proprietary"))
    assert [one.id for one in found] == (["EFA-PEER-MEMORY"] if bad else [])


@pytest.mark.parametrize(
    ("release", "version", "kernel"),
    [
        ("6.1.0-51-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.170-1 (2026-10-01)", "6.1.170"),
        ("6.8.0-1021-aws", "#23-Ubuntu SMP Mon Dec  9 23:59:34 UTC 2026", "6.8.0"),
    ],
)
def test_the_kernels_own_version_is_found_behind_an_abi(release: str, version: str, kernel: str) -> None:
    assert upstream_kernel(release, version) == kernel


def test_the_installer_tells_its_version_in_the_file_that_it_leaves() -> None:
    told = "# EFA installer version: 1.43.2\n# Debug packages installed: no\n# Packages installed:\nefa_2.17.2_all\n"
    assert installed_version(told) == "1.43.2"
    assert installed_version("") == ""


def test_a_device_is_told_from_an_ena_by_its_number(tmp_path: Path) -> None:
    for address, vendor, device in (("47", "0x1d0f", "0xefa2"), ("49", "0x1d0f", "0xec20"), ("50", "0x10de", "0xefa2")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "vendor").write_text(f"{vendor}\n")
        (tmp_path / address / "device").write_text(f"{device}\n")
    assert addresses(tmp_path) == ["47"]
    assert addresses(tmp_path / "nowhere") == []


def test_the_plugins_of_installers_are_those_of_the_catalog() -> None:
    """Where a bad set is one of aws-ofi-nccl, its bounds are installers, which the catalog knows the plugins of."""
    for row in load_catalog().efa:
        if row.ofi_nccl is None:
            continue
        old = tuple(map(int, row.ofi_nccl.split("."))) < (1, 17, 1)
        found = {bad.id for bad in bad_sets(Facts(row.installer, "6.1.170", "open", ("2.28.3",), ("13.0",)))}
        assert ("EFA-PLUGIN-CUDA" in found) == old, row.installer
