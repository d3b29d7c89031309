"""The fabric manager runs where there is an NVSwitch, and only there."""

from __future__ import annotations

from gpuyard.health import service_active, tools
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict

CHECK = "check_fabric_manager"
UNIT = "nvidia-fabricmanager.service"


def probe(pci_root: str = tools.PCI_ROOT) -> Verdict:
    return judge(len(tools.pci_devices(pci_root, tools.NVSWITCH_CLASSES)), service_active.probe(UNIT))


def judge(nvswitches: int, service: Verdict) -> Verdict:
    found = {"nvswitches": nvswitches, **service.found}
    if nvswitches:
        return Verdict(CHECK, service.state, f"{nvswitches} NVSwitches; {service.reason}", found)
    if service.found.get("LoadState") == "loaded":
        return Verdict(CHECK, UNHEALTHY, f"there is no NVSwitch, yet {UNIT} is installed", found)
    return Verdict(CHECK, HEALTHY, "there is no NVSwitch, and no fabric manager", found)
