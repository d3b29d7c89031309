"""No GPU asks to be reset, drained or rebooted."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.health import smi, tools
from gpuyard.health.verdict import UNHEALTHY, Verdict
from gpuyard.health.xid_catalog import QUARANTINE, RECOVERY_ACTIONS

CHECK = "check_gpu_recovery_action"

# Branch 570 and later say what is to be done; older ones answer these two questions instead.
ACTION = "gpu_recovery_action"
RESET, DRAIN_AND_RESET = "gpu_reset_status/reset_required", "gpu_reset_status/drain_and_reset_recommended"


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "none asks for a reset or a reboot")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    if gpu.shows(ACTION):
        action = gpu.text(ACTION)
        if action is None:
            raise smi.UnreadError(f"{ACTION} is N/A")
        if action != "None":
            known = {row.text: row.does for row in RECOVERY_ACTIONS.values()}
            does = known.get(action, f"unknown here: {QUARANTINE}")
            yield smi.Finding(UNHEALTHY, f"it asks for {action or 'nothing that can be read'}: {does}")
        return
    reset, drain = gpu.flag(RESET), gpu.flag(DRAIN_AND_RESET)
    if reset is None:
        raise smi.UnreadError(f"there is no {ACTION}, and {RESET} is N/A")
    if reset:
        yield smi.Finding(UNHEALTHY, "it asks for a reset")
    if drain:
        yield smi.Finding(UNHEALTHY, "it asks to be drained and reset")
