"""The network between nodes."""

from __future__ import annotations

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import EfaInstaller, Flavour, OperatingSystem
from gpuyard.plan.rules.rule import CATALOG, Misfit, rule


@rule(
    "COMPAT-EFA-PROVIDER",
    "Only AWS has Elastic Fabric Adapters.",
    reason="Elsewhere the installer finds no device.",
    source="Amazon EC2 User Guide, Elastic Fabric Adapter",
    fits={"efa": "1.51.0", "provider": "aws"},
    fails={"efa": "1.51.0", "provider": "lab"},
)
def _efa_provider(efa: EfaInstaller, provider: str) -> Misfit | None:
    if provider == "lab":
        return Misfit(f"EFA installer {efa.installer} for provider {provider}", "provider aws, or no efa")
    return None


@rule(
    "COMPAT-EFA-DISTRIBUTION",
    "The EFA installer is for the distribution.",
    reason="It refuses to run on one that it does not know or no longer supports.",
    source="Elastic Fabric Adapter release notes",
    fits={"efa": "1.50.0", "distribution": "debian-11"},
    fails={"efa": "1.51.0", "distribution": "debian-11"},
)
def _efa_distribution(efa: EfaInstaller, distribution: OperatingSystem, catalog: Catalog) -> Misfit | None:
    name, version = distribution.distribution, numbers(efa.installer)
    dropped = any(name in row.dropped for row in catalog.efa if numbers(row.installer) <= version)
    if dropped or name in efa.fails_on or (efa.distributions is not None and name not in efa.distributions):
        known = f"one of {', '.join(efa.distributions)}" if efa.distributions else "one that it still supports"
        return Misfit(f"EFA installer {efa.installer} on {name}", known)
    return None


@rule(
    "COMPAT-EFA-NCCL",
    "NCCL is new enough for the OFI plugin of the EFA installer.",
    reason="A plugin that does not load makes NCCL fall back to TCP: all works, several times slower.",
    source="aws/aws-ofi-nccl release notes",
    fits={"efa": "1.51.0", "nccl": "2.29.7"},
    fails={"efa": "1.50.0", "nccl": "2.4.8"},
)
def _efa_nccl(efa: EfaInstaller, nccl: str) -> Misfit | None:
    if efa.nccl_min and numbers(nccl) < numbers(efa.nccl_min):
        return Misfit(f"NCCL {nccl}", f"{efa.nccl_min} or newer for aws-ofi-nccl {efa.ofi_nccl}")
    if efa.nccl_below and numbers(nccl) >= numbers(efa.nccl_below):
        return Misfit(f"NCCL {nccl}", f"an older one than {efa.nccl_below} for EFA installer {efa.installer}")
    return None


@rule(
    "COMPAT-EFA-HASH",
    "The hash of the EFA installer's archive is known.",
    reason="Nodes run nothing as root that cannot be compared: EFA-HASH refuses it unless the inventory has the hash.",
    source=CATALOG,
    fits={"efa": "1.50.0"},
    fails={"efa": "1.51.0"},
    kind="kept",
)
def _efa_hash(efa: EfaInstaller, catalog: Catalog) -> Misfit | None:
    if efa.sha256 is None:
        newest = max((row.installer for row in catalog.efa if row.sha256), key=numbers, default=None)
        need = (
            f"{newest}, or efa_installer_sha256 in the inventory" if newest else "efa_installer_sha256 in the inventory"
        )
        return Misfit(f"EFA installer {efa.installer}, whose SHA-256 the catalog does not know", need, "amber")
    return None


# First kernels of each series that keep symbols from proprietary modules: awslabs/amazon-eks-ami#1494.
_PEER_MEMORY_ENDS = ((4, 14, 326), (5, 4, 257), (5, 10, 195), (5, 15, 131), (6, 1, 52))


@rule(
    "COMPAT-EFA-MODULES",
    "EFA reaches the memory of GPUs with open kernel modules.",
    reason="Newer kernels keep symbols from proprietary modules: GPUDirect RDMA is lost, NCCL copies through the host.",
    source="awslabs/amazon-eks-ami#1494; aws/aws-parallelcluster#6015",
    fits={"efa": "1.50.0", "kernel_modules": "open", "kernel": "6.1.60"},
    fails={"efa": "1.50.0", "kernel_modules": "proprietary", "kernel": "6.1.60"},
)
def _efa_modules(efa: EfaInstaller, kernel_modules: Flavour, kernel: str) -> Misfit | None:
    have = numbers(kernel)
    ended = [end for end in _PEER_MEMORY_ENDS if end[:2] == have[:2]]
    lost = have[:2] > _PEER_MEMORY_ENDS[-1][:2] or any(have >= end or len(have) == 2 for end in ended)
    if kernel_modules == "proprietary" and lost:
        told = f"proprietary kernel modules on kernel {kernel} with EFA installer {efa.installer}"
        return Misfit(told, "open ones for GPUDirect RDMA", "amber")
    return None
