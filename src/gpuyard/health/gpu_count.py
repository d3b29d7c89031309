"""Every GPU on the bus answers, and there are as many as the pool was promised."""

from __future__ import annotations

from collections.abc import Sequence

from gpuyard.health import tools
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict

CHECK = "check_gpu_count"


def probe(expected: int = 0, pci_root: str = tools.PCI_ROOT) -> Verdict:
    answer = tools.ask("nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader")
    if not answer.ok:
        return Verdict(CHECK, UNHEALTHY, f"nvidia-smi lists no GPU: {answer.text[:300]}")
    answering = [line.strip() for line in answer.text.splitlines() if line.strip()]
    return judge(int(expected), tools.pci_devices(pci_root, tools.GPU_CLASSES), answering)


def judge(expected: int, on_bus: Sequence[str], answering: Sequence[str]) -> Verdict:
    silent = sorted(set(map(short, on_bus)) - set(map(short, answering)))
    found = {"expected": expected, "on_bus": len(on_bus), "answering": len(answering), "silent": silent}
    if silent:
        reason = f"{len(silent)} of {len(on_bus)} GPUs on the bus do not answer: {', '.join(silent)}"
    elif len(on_bus) != len(answering):
        reason = f"{len(answering)} GPUs answer, {len(on_bus)} are on the bus"
    elif not answering:
        reason = "there is no GPU"
    elif expected not in (0, len(answering)):
        reason = f"{expected} GPUs were promised, {len(answering)} are there"
    else:
        return Verdict(CHECK, HEALTHY, f"{len(answering)} GPUs answer", found)
    return Verdict(CHECK, UNHEALTHY, reason, found)


def short(address: str) -> str:
    """A PCI address as the kernel writes it; nvidia-smi writes eight digits for the domain, and capitals."""
    domain, _, rest = address.lower().partition(":")
    return f"{domain[-4:].zfill(4)}:{rest}"
