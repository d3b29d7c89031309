"""From which value on a GPU is not well, by the name of what is measured.

Here and not in the catalog, because a node reads no YAML. A value that reaches the limit is a fault, one less is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Threshold(NamedTuple):
    limit: int
    source: str
    as_of: str
    verified: bool = True

    def reached(self, value: int) -> bool:
        return value >= self.limit


AZURE = "Azure/azurehpc-health-checks, H100"
GCM = "facebookresearch/gcm, NVLink check: threshold 0"
MEMORY = "docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt"
LINK5 = "names: nvidia-smi 595.91.07 on Blackwell, as others recorded it; limit: as GCM has it for the older counters"
MANUAL = "nvidia-smi(1): the maximum is what this GPU can have in this system"

THRESHOLDS: Mapping[str, Threshold] = {
    # ECC counters since the driver was loaded.
    "sram_uncorrectable": Threshold(1, AZURE, "2026-11"),
    "dram_uncorrectable": Threshold(1, f"{MEMORY}: it ends what it hits; counted from the load on", "2026-11"),
    "sram_correctable": Threshold(10_001, AZURE, "2026-11"),
    "dram_correctable": Threshold(20_000_001, AZURE, "2026-11"),
    # PCIe: what is missing to the most that this GPU can have in this slot.
    "pcie_lanes_missing": Threshold(1, MANUAL, "2026-11", verified=False),
    "pcie_generations_missing": Threshold(1, MANUAL, "2026-11", verified=False),
    # Degrees above the temperature at which the GPU slows itself down: at it, it does.
    "degrees_above_slowdown": Threshold(0, "nvidia-smi(1): GPU T.Limit, Slowdown T.Limit", "2026-11", verified=False),
    "nvlinks_inactive": Threshold(1, "docs.nvidia.com/health-validation: inactive > 0 is critical", "2026-11"),
    # Counters of a link, by nvidia-smi's own names: up to NVLink 4, and from NVLink 5 on.
    "Replay Errors": Threshold(1, GCM, "2026-11"),
    "Recovery Errors": Threshold(1, GCM, "2026-11"),
    "CRC Errors": Threshold(1, GCM, "2026-11"),
    "Malformed packet Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Buffer overrun Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Rx Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Rx remote Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Rx General Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Local link integrity Errors": Threshold(1, LINK5, "2026-11", verified=False),
    "Link recovery failed events": Threshold(1, LINK5, "2026-11", verified=False),
    "Effective Errors": Threshold(1, LINK5, "2026-11", verified=False),
}
