"""What is done about an Xid, by its number: the first action, and what the driver means by it.

Meanings and NVIDIA's own actions: NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors) in leptonai/gpud's generated
copy of 2025-10-29. Where NVSentinel, gpud and Azure's checks disagree, the class is this project's choice.
Numbers to which that copy names no action (167 to 172) are not here on purpose: an unknown Xid never reboots a node and
is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

AS_OF = "2026-11"

# Restart the service; drain and reset the GPU; drain and reboot; see to links and fabric manager; send the GPU back.
APP, RESET, REBOOT, FABRIC, RMA = "APP", "RESET", "REBOOT", "FABRIC", "RMA"
# Written down, and nothing else.
INFO = "INFO"
# Out of service until a person has looked.
QUARANTINE = "QUARANTINE"
CLASSES = (APP, RESET, REBOOT, FABRIC, RMA, INFO, QUARANTINE)


class Xid(NamedTuple):
    meaning: str
    does: str
    alone: str = ""
    """The class where no other Xid of the same GPU came with it, if that is another one."""
    verified: bool = True


class RecoveryAction(NamedTuple):
    text: str
    """As nvidia-smi words it."""
    does: str
    verified: bool = True


XIDS: Mapping[int, Xid] = {
    13: Xid("graphics engine exception", APP),
    31: Xid("GPU memory page fault", APP),
    43: Xid("GPU stopped processing", APP),
    45: Xid("preemptive cleanup", INFO, alone=FABRIC),
    46: Xid("GPU stopped processing", RESET),
    48: Xid("double-bit ECC error", RESET),
    61: Xid("PMU breakpoint", REBOOT),
    62: Xid("PMU halt", RESET),
    63: Xid("row to be remapped", INFO),  # check_remapped_rows tells whether it still waits
    64: Xid("row remapping failed", RMA),
    68: Xid("NVDEC0 exception", APP),
    69: Xid("graphics engine class error", APP),
    74: Xid("NVLink error", FABRIC),
    79: Xid("GPU has fallen off the bus", REBOOT),
    92: Xid("high rate of single-bit ECC errors", INFO),
    94: Xid("contained memory error", APP),
    95: Xid("uncontained memory error", RESET),
    109: Xid("context switch timeout", RESET),
    110: Xid("security fault", RESET),
    119: Xid("GSP RPC timeout", RESET),
    120: Xid("GSP error", RESET),
    121: Xid("C2C error", INFO),
    136: Xid("link training failed", FABRIC),
    137: Xid("NVLink privilege error", INFO),
    140: Xid("unrecovered ECC error", RESET),
    143: Xid("GPU initialization error", RESET),
    144: Xid("NVLink SAW error", FABRIC),
    145: Xid("NVLink RLW error", FABRIC),
    146: Xid("NVLink TLW error", FABRIC),
    147: Xid("NVLink TREX error", FABRIC),
    148: Xid("NVLink NVLPW_CTRL error", FABRIC),
    149: Xid("NVLink NETIR error", FABRIC),
    150: Xid("NVLink MSE error", FABRIC),
    # 154 is read by the action it names: RECOVERY_ACTIONS.
    155: Xid("NVLink software-defined error", RESET),
    156: Xid("resource retirement", RESET),
    157: Xid("resource retirement failed", RMA),
    158: Xid("GPU fatal timeout", RESET),
}

RECOVERY_ACTION_CHANGED = 154

# nvmlDeviceGpuRecoveryAction_t. Texts: docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt; those of the newest are recall.
RECOVERY_ACTIONS: Mapping[int, RecoveryAction] = {
    0: RecoveryAction("None", INFO),
    1: RecoveryAction("Reset", RESET),
    2: RecoveryAction("Reboot", REBOOT),
    3: RecoveryAction("Drain P2P", FABRIC),
    4: RecoveryAction("Drain and Reset", RESET),
    5: RecoveryAction("Recover IMEX Domain", FABRIC, verified=False),
    6: RecoveryAction("Bus Reset", RESET, verified=False),
    7: RecoveryAction("System Reboot", REBOOT, verified=False),
}
