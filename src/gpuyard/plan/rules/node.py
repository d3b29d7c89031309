"""The driver and its node: kernel, distribution, repository, fabric manager, DCGM."""

from __future__ import annotations

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import (
    Branch,
    Dcgm,
    DriverPackages,
    DriverRelease,
    Flavour,
    Gpu,
    OperatingSystem,
    Repository,
    Toolkit,
)
from gpuyard.plan.rules.rule import CATALOG, NO_FABRIC_MANAGER, Misfit, rule


@rule(
    "COMPAT-KERNEL-DRIVER",
    "The driver's modules build and load on the node's kernel.",
    reason="A kernel's internal interfaces move; DKMS fails, and after the next reboot the node has no GPU.",
    source=CATALOG,
    fits={"kernel": "6.1", "driver": "580.126.20"},
    fails={"kernel": "6.8", "driver": "535.129.03"},
)
def _kernel_driver(
    kernel: str, driver: DriverRelease, catalog: Catalog, kernel_modules: Flavour | None = None
) -> Misfit | None:
    have = numbers(kernel)
    for limit in catalog.kernels:
        # Where the flavour is not told, the open one may have been meant.
        if limit.kernel_modules and limit.kernel_modules != (kernel_modules or "open"):
            continue
        # A series alone, e.g. 6.1, stands for its newest release: that is what an archive ships.
        if limit.branch != driver.branch or have < numbers(limit.kernel_from)[: len(have)]:
            continue
        if limit.before is None or numbers(driver.version) < numbers(limit.before):
            newer = f"{limit.before} or newer" if limit.before else f"a newer branch than {limit.branch}"
            return Misfit(
                f"driver {driver.version} on kernel {kernel}: {limit.symptom}",
                f"{newer}, or a kernel older than {limit.kernel_from}",
                row=limit,
            )
    return None


@rule(
    "COMPAT-DISTRIBUTION-KERNEL",
    "The distribution ships that kernel series.",
    reason="Headers for DKMS and fixes come from the distribution's own archive.",
    source=CATALOG,
    fits={"distribution": "debian-12", "kernel": "6.1"},
    fails={"distribution": "debian-12", "kernel": "5.4"},
    kind="kept",
)
def _distribution_kernel(distribution: OperatingSystem, kernel: str) -> Misfit | None:
    series = ".".join(kernel.split(".")[:2])
    if series not in distribution.kernels:
        return Misfit(f"kernel {kernel}", f"{' or '.join(distribution.kernels)}: {distribution.distribution}")
    return None


@rule(
    "COMPAT-DISTRIBUTION-DRIVER",
    "The driver's repository has packages of the branch for the distribution.",
    reason="A driver that no repository carries can neither be installed nor rolled back to.",
    source=CATALOG,
    fits={"distribution": "debian-12", "branch": "580"},
    fails={"distribution": "debian-13", "branch": "580"},
    kind="kept",
)
def _distribution_driver(distribution: OperatingSystem, branch: Branch, catalog: Catalog) -> Misfit | None:
    if packages_for(catalog, distribution.distribution, branch.branch):
        return None
    rows = [row for row in catalog.packages if row.distribution == distribution.distribution]
    known = ", ".join(f"{row.branch_from} to {row.branch_to or 'the newest'}" for row in rows) or "none"
    return Misfit(f"branch {branch.branch} on {distribution.distribution}", f"a branch with packages: {known}")


@rule(
    "COMPAT-REPOSITORY-DRIVER",
    "The repository that the nodes use carries the driver version.",
    reason="A mirror holds what was put there; the lab's holds four versions of two branches.",
    source=CATALOG,
    fits={"provider": "lab", "driver": "580.126.20"},
    fails={"provider": "lab", "driver": "570.133.20"},
    kind="kept",
)
def _repository_driver(repository: Repository, driver: DriverRelease) -> Misfit | None:
    if repository.drivers is not None and driver.version not in repository.drivers:
        return Misfit(f"driver {driver.version}", f"one of {', '.join(repository.drivers)}")
    return None


@rule(
    "COMPAT-REPOSITORY-TOOLKIT",
    "The repository that the nodes use carries the CUDA toolkit.",
    reason="As for drivers.",
    source=CATALOG,
    fits={"provider": "lab", "toolkit": "13.0.2"},
    fails={"provider": "lab", "toolkit": "12.8"},
    kind="kept",
)
def _repository_toolkit(repository: Repository, toolkit: Toolkit) -> Misfit | None:
    if repository.toolkits is not None and toolkit.version not in repository.toolkits:
        return Misfit(f"CUDA toolkit {toolkit.version}", f"one of {', '.join(repository.toolkits)}")
    return None


@rule(
    "COMPAT-FABRIC-MANAGER-VERSION",
    "The fabric manager has exactly the driver's version.",
    reason="Any other refuses to start, and every CUDA program on the node ends with error 802.",
    source="Talos documentation, nvidia-fabricmanager; NVIDIA/gpu-operator#544",
    fits={"driver": "580.126.20", "fabric_manager": "580.126.20"},
    fails={"driver": "580.126.20", "fabric_manager": "580.105.08"},
)
def _fabric_manager_version(driver: DriverRelease, fabric_manager: str) -> Misfit | None:
    if fabric_manager not in (NO_FABRIC_MANAGER, driver.version):
        return Misfit(f"fabric manager {fabric_manager}", f"{driver.version}, the driver's version")
    return None


@rule(
    "COMPAT-FABRIC-MANAGER-PRESENCE",
    "The fabric manager runs where there is an NVSwitch, and nowhere else.",
    reason="Without it NVSwitch systems have no CUDA; elsewhere it finds no switch and its unit fails.",
    source="Azure/azhpc-images#86; NVIDIA Fabric Manager User Guide",
    fits={"gpu": "L40S", "fabric_manager": "none"},
    fails={"gpu": "H100-SXM5-80GB", "fabric_manager": "none"},
)
def _fabric_manager_presence(gpu: Gpu, fabric_manager: str) -> Misfit | None:
    absent = fabric_manager == NO_FABRIC_MANAGER
    if gpu.nvswitch and absent:
        return Misfit("no fabric manager", f"that of the driver's version for the NVSwitch of {gpu.name}")
    if not gpu.nvswitch and not absent:
        return Misfit(f"fabric manager {fabric_manager}", f"none: {gpu.name} has no NVSwitch")
    return None


@rule(
    "COMPAT-DCGM-DRIVER",
    "DCGM knows the driver: it is new enough, and DCGM has a package for its CUDA major.",
    reason="DCGM's diagnostics are built per CUDA major; a missing one ends every dcgmi diag.",
    source=CATALOG,
    fits={"dcgm": "4.4.1", "branch": "580"},
    fails={"dcgm": "3.3.9", "branch": "580"},
)
def _dcgm_driver(dcgm: Dcgm, branch: Branch, driver: DriverRelease | None = None) -> Misfit | None:
    if driver and numbers(driver.version) < numbers(dcgm.driver_min):
        return Misfit(f"driver {driver.version}", f"{dcgm.driver_min} or newer for DCGM {dcgm.version}")
    if branch.cuda and (major := branch.cuda.split(".")[0]) not in dcgm.packages:
        known = " and ".join(dcgm.packages)
        return Misfit(f"DCGM {dcgm.version} for CUDA {known}", f"one for CUDA {major}, that of branch {branch.branch}")
    return None


@rule(
    "COMPAT-DCGM-GPU",
    "DCGM's diagnostics for the driver's CUDA still have code for the GPU.",
    reason="On GPUs that CUDA 13 dropped, a driver of CUDA 13 leaves dcgmi diag without a plugin for both.",
    source="NVIDIA/DCGM issue threads on V100 with driver 580",
    fits={"dcgm": "4.4.1", "gpu": "A100-SXM4-80GB", "branch": "580"},
    fails={"dcgm": "4.4.1", "gpu": "V100-SXM2-32GB", "branch": "580"},
)
def _dcgm_gpu(dcgm: Dcgm, gpu: Gpu, branch: Branch) -> Misfit | None:
    if gpu.last_toolkit_major and branch.cuda and numbers(branch.cuda)[0] > gpu.last_toolkit_major:
        have = f"DCGM {dcgm.version} on {gpu.name} with a driver of CUDA {branch.cuda}"
        return Misfit(have, f"a branch of CUDA {gpu.last_toolkit_major}, or to do without its diagnostics", "amber")
    return None


def packages_for(catalog: Catalog, distribution: str, branch: str) -> DriverPackages | None:
    """The row of packages of a branch on a distribution, or None."""
    for row in catalog.packages:
        if row.distribution == distribution and int(row.branch_from) <= int(branch) <= int(row.branch_to or branch):
            return row
    return None
