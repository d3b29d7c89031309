"""Sets of EFA installer, kernel, kernel modules and engine that are known to fail, and which of them a node has.

Pure; runs with Python 3.9 and the standard library alone. What distribution an installer is for, the lock judges.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ansible_collections.gpuyard.fleet.plugins.module_utils.driver_change import numbers


@dataclass(frozen=True)
class Facts:
    """What a node has, or is to have."""

    installer: str
    kernel: str
    """Upstream version of the running kernel, e.g. 6.1.170."""
    kernel_modules: str
    """Flavour of the NVIDIA kernel modules: open or proprietary."""
    nccl: Sequence[str] = ()
    """Of each engine."""
    cuda: Sequence[str] = ()
    """Of each engine."""


@dataclass(frozen=True)
class BadSet:
    """Parts that fail together. A part that is not named may be any."""

    id: str
    why: str
    change: str
    source: str
    as_of: str
    before: str = ""
    """First installer without the fault."""
    since: str = ""
    """First installer with it."""
    kernel_modules: str = ""
    kernels: tuple[str, ...] = ()
    """First kernel of each series with the fault; the last one's series and all later ones have it throughout."""
    nccl_since: str = ""
    cuda_since: str = ""


BAD_SETS = (
    BadSet(
        "EFA-PEER-MEMORY",
        "newer kernels keep their symbols from proprietary modules, so EFA does not reach the memory of GPUs and NCCL "
        "copies through the host",
        "set driver.kernel_modules to open, and lock",
        "awslabs/amazon-eks-ami#1494; aws/aws-parallelcluster#6015",
        "2026-11-25",
        kernel_modules="proprietary",
        kernels=("4.14.326", "5.4.257", "5.10.195", "5.15.131", "6.1.52"),
    ),
    BadSet(
        "EFA-OPEN-MODULES",
        "this installer's driver reaches the memory of GPUs through proprietary modules alone",
        "ask for installer 1.29.0 or later",
        "awslabs/amazon-eks-ami#1494; aws/aws-parallelcluster#6015",
        "2026-11-25",
        before="1.29.0",
        kernel_modules="open",
    ),
    BadSet(
        "EFA-NCCL-MEMORY",
        "NCCL registers memory in a way that this libfabric refuses",
        "ask for installer 1.29.1 or later",
        "aws/aws-ofi-nccl#584; awsome-distributed-training efa-cheatsheet.md @7217859",
        "2026-11-25",
        before="1.29.1",
        nccl_since="2.19",
    ),
    BadSet(
        "EFA-PLUGIN-CUDA",
        "aws-ofi-nccl before 1.17.1 is built for one CUDA major, and not for 13",
        "ask for installer 1.45.0 or later",
        "aws/aws-ofi-nccl RELEASENOTES.md, tag v1.21.1; plugins of installers: catalog/efa.yaml (1.43.2 has 1.16.3)",
        "2026-11-25",
        since="1.39.0",
        before="1.43.3",
        cuda_since="13.0",
    ),
    BadSet(
        "EFA-PLUGIN-CRASH",
        "aws-ofi-nccl before 1.17.2 crashes with this NCCL where libfabric does not start",
        "ask for installer 1.45.0 or later",
        "aws/aws-ofi-nccl RELEASENOTES.md, tag v1.21.1; plugins of installers: catalog/efa.yaml (1.43.2 has 1.16.3)",
        "2026-11-25",
        since="1.39.0",
        before="1.43.3",
        nccl_since="2.28",
    ),
    BadSet(
        "EFA-SLOW-PLUGIN",
        "NCCL is slower with this installer until its plugin is replaced",
        "ask for installer 1.36.0 or later",
        "awslabs/awsome-distributed-ai#466",
        "2026-11-25",
        since="1.35.0",
        before="1.35.1",
    ),
)


def bad_sets(facts: Facts) -> list[BadSet]:
    """Every known bad set that a node has."""
    return [bad for bad in BAD_SETS if _has(bad, facts)]


def _has(bad: BadSet, facts: Facts) -> bool:
    installer = numbers(facts.installer)
    if bad.before and installer >= numbers(bad.before):
        return False
    if bad.since and installer < numbers(bad.since):
        return False
    if bad.kernel_modules and facts.kernel_modules != bad.kernel_modules:
        return False
    if bad.kernels and not _in_kernels(facts.kernel, bad.kernels):
        return False
    for since, versions in ((bad.nccl_since, facts.nccl), (bad.cuda_since, facts.cuda)):
        if since and not any(numbers(version) >= numbers(since) for version in versions):
            return False
    return True


def _in_kernels(kernel: str, ends: Sequence[str]) -> bool:
    have = numbers(kernel)
    for end in map(numbers, ends):
        if end[:2] == have[:2]:
            return have >= end
    return have[:2] > numbers(ends[-1])[:2]


def upstream_kernel(release: str, version: str) -> str:
    """Of `uname -r` and `uname -v`: Debian's release has the number of an ABI, its version the kernel's own."""
    if debian := re.search(r"Debian (\d+\.\d+\.\d+)", version):
        return debian[1]
    plain = re.match(r"\d+\.\d+(?:\.\d+)?", release)
    return plain[0] if plain else release


def installed_version(text: str) -> str:
    """Of the installer that was run, from /opt/amazon/efa_installed_packages; nothing if it does not tell."""
    found = re.search(r"EFA installer version: (\S+)", text)
    return found[1] if found else ""
