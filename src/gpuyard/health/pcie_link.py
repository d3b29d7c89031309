"""Every GPU has all the lanes that it can have, and at work their full speed."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.health import smi, tools
from gpuyard.health.thresholds import THRESHOLDS
from gpuyard.health.verdict import UNHEALTHY, Verdict

CHECK = "check_pcie_link"

LINK = "pci/pci_gpu_link_info"
WIDTH = (f"{LINK}/link_widths/current_link_width", f"{LINK}/link_widths/max_link_width")
GENERATION = (f"{LINK}/pcie_gen/current_link_gen", f"{LINK}/pcie_gen/max_link_gen")
# The state of a GPU at work. In the others the link is slowed down to save power, which is no fault.
AT_WORK = "P0"


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "the PCIe links are as wide and as fast as they can be")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    lanes, most = both(gpu, WIDTH)
    if THRESHOLDS["pcie_lanes_missing"].reached(most - lanes):
        yield smi.Finding(UNHEALTHY, f"its PCIe link has {lanes} of {most} lanes")
    generation, best = both(gpu, GENERATION)
    if gpu.text("performance_state") == AT_WORK and THRESHOLDS["pcie_generations_missing"].reached(best - generation):
        words = f"its PCIe link is of generation {generation} instead of {best}, in performance state {AT_WORK}"
        yield smi.Finding(UNHEALTHY, words)


def both(gpu: smi.Gpu, names: tuple[str, str]) -> tuple[int, int]:
    current, most = gpu.number(names[0]), gpu.number(names[1])
    if current is None or most is None:
        # Every GPU is on PCI, or one could not ask it.
        raise smi.UnreadError(f"{names[0] if current is None else names[1]} is N/A")
    return current, most
