"""GPU and driver."""

from __future__ import annotations

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import Branch, DriverRelease, Flavour, Gpu
from gpuyard.plan.rules.rule import CATALOG, MATRIX, MODULES, Misfit, rule


@rule(
    "COMPAT-GPU-FIRST-BRANCH",
    "The driver's branch knows the GPU.",
    reason="An older branch does not bind to the device: nvidia-smi finds no device.",
    source=MATRIX,
    fits={"gpu": "B200-SXM-180GB", "branch": "570"},
    fails={"gpu": "B200-SXM-180GB", "branch": "550"},
)
def _first_branch(gpu: Gpu, branch: Branch) -> Misfit | None:
    if gpu.first_branch and int(branch.branch) < int(gpu.first_branch):
        return Misfit(f"branch {branch.branch}", f"branch {gpu.first_branch} or newer for {gpu.name}")
    return None


@rule(
    "COMPAT-GPU-LAST-BRANCH",
    "The driver's branch still knows the GPU.",
    reason="A branch that dropped an architecture does not bind to its devices.",
    source=MATRIX,
    fits={"gpu": "V100-SXM2-32GB", "branch": "580"},
    fails={"gpu": "V100-SXM2-32GB", "branch": "590"},
)
def _last_branch(gpu: Gpu, branch: Branch) -> Misfit | None:
    if gpu.last_branch and int(branch.branch) > int(gpu.last_branch):
        return Misfit(f"branch {branch.branch}", f"branch {gpu.last_branch} or older for {gpu.architecture}")
    return None


@rule(
    "COMPAT-GPU-MODULES",
    "The flavour of the kernel modules is one that the GPU runs with.",
    reason="Open modules need the GSP, which Turing was the first to have; Grace Hopper and Blackwell need open ones.",
    source=MODULES,
    fits={"gpu": "T4", "kernel_modules": "open"},
    fails={"gpu": "V100-SXM2-32GB", "kernel_modules": "open"},
)
def _gpu_modules(gpu: Gpu, kernel_modules: Flavour) -> Misfit | None:
    need = {"unsupported": "proprietary", "required": "open"}.get(gpu.open_modules, kernel_modules)
    if need != kernel_modules:
        return Misfit(f"{kernel_modules} kernel modules", f"{need} ones for {gpu.architecture}")
    return None


@rule(
    "COMPAT-BRANCH-MODULES",
    "The branch comes with that flavour of the kernel modules.",
    reason="Open modules begin with branch 515; NVIDIA's documentation names no proprietary ones from branch 620 on.",
    source=MODULES,
    fits={"branch": "580", "kernel_modules": "open"},
    fails={"branch": "470", "kernel_modules": "open"},
)
def _branch_modules(branch: Branch, kernel_modules: Flavour) -> Misfit | None:
    if branch.kernel_modules is not None and kernel_modules not in branch.kernel_modules:
        return Misfit(
            f"{kernel_modules} kernel modules", f"{' or '.join(branch.kernel_modules)}: branch {branch.branch}"
        )
    return None


@rule(
    "COMPAT-BRANCH-END",
    "The driver's branch is not at its end of life.",
    reason="Nobody mends it any more, its security holes least of all.",
    source="NVIDIA data center drivers, Supported Drivers and CUDA Toolkit Versions",
    fits={"branch": "580"},
    fails={"branch": "535"},
    kind="kept",
    acceptable=True,
)
def _branch_end(branch: Branch, today: str) -> Misfit | None:
    if branch.end_of_life and today[: len(branch.end_of_life)] > branch.end_of_life:
        return Misfit(f"branch {branch.branch}, which ended {branch.end_of_life}", f"a branch that lives on {today}")
    return None


@rule(
    "COMPAT-DRIVER-ISSUE",
    "The driver version has no fault that is known to strike these GPUs.",
    reason="Release notes and threads tell which version brings which fault; nobody has to find it a second time.",
    source=CATALOG,
    fits={"driver": "570.133.20"},
    fails={"driver": "570.124.06"},
    acceptable=True,
)
def _driver_issue(driver: DriverRelease, catalog: Catalog, gpu: Gpu | None = None) -> Misfit | None:
    have = numbers(driver.version)
    worst: Misfit | None = None
    for issue in catalog.drivers.issues:
        if issue.branch != driver.branch or (issue.since and have < numbers(issue.since)):
            continue
        if issue.before and have >= numbers(issue.before):
            continue
        if issue.architectures is not None or issue.gpus is not None:
            struck = gpu and (gpu.architecture in (issue.architectures or ()) or gpu.name in (issue.gpus or ()))
            if not struck:
                continue
        need = f"{issue.before} or newer" if issue.before else f"another branch than {issue.branch}"
        found = Misfit(f"driver {driver.version}: {issue.symptom}", need, issue.severity, issue)
        if found.level == "red":
            return found
        worst = worst or found
    return worst


@rule(
    "COMPAT-DRIVER-SECURITY",
    "The driver version has the mended security holes of its branch.",
    reason="Amber, because such holes are open to who can already run code on the node; a node serves one tenant.",
    source="NVIDIA security bulletins, GPU Display Driver",
    fits={"driver": "580.178.04"},
    fails={"driver": "535.129.03"},
    kind="kept",
)
def _driver_security(driver: DriverRelease, catalog: Catalog) -> Misfit | None:
    open_holes = [
        (bulletin, fixed)
        for bulletin in catalog.drivers.security
        if (fixed := bulletin.fixed.get(driver.branch)) and numbers(driver.version) < numbers(fixed)
    ]
    if not open_holes:
        return None
    bulletin, fixed = max(open_holes, key=lambda hole: numbers(hole[1]))
    return Misfit(f"driver {driver.version}: {bulletin.id}", f"{fixed} or newer", "amber", bulletin)
