"""No hardware holds a GPU's clocks down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpuyard.health import smi, tools
from gpuyard.health.verdict import DEGRADED, HEALTHY, UNHEALTHY, Verdict

CHECK = "check_clocks_event_reasons"

# Until branch 535 the group and each reason were called the second name.
NAMES = (("clocks_event_reasons", "clocks_event_reason_"), ("clocks_throttle_reasons", "clocks_throttle_reason_"))

# What an active reason says of the GPU. Source: NVML, nvmlClocksEventReasons; which are faults: Azure's and gpud's
# checks; 2026-11. Software that slows down a hot GPU keeps it whole, and slow.
REASONS: Mapping[str, str] = {
    "gpu_idle": HEALTHY,
    "applications_clocks_setting": HEALTHY,
    "sw_power_cap": HEALTHY,
    "sync_boost": HEALTHY,
    "display_clocks_setting": HEALTHY,
    "sw_thermal_slowdown": DEGRADED,
    "hw_slowdown": UNHEALTHY,
    "hw_thermal_slowdown": UNHEALTHY,
    "hw_power_brake_slowdown": UNHEALTHY,
}
# A reason that nobody here knows is told, and is not the GPU's fault before somebody has read what it means.
UNKNOWN = DEGRADED


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "nothing but their load and their settings sets the clocks")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    for reason, state in REASONS.items():
        names = tuple(f"{group}/{prefix}{reason}" for group, prefix in NAMES)
        # What is no fault may be missing: a driver need not know it.
        if state == HEALTHY and not any(map(gpu.shows, names)):
            continue
        if gpu.flag(*names, yes="Active", no="Not Active") and state != HEALTHY:
            yield smi.Finding(state, f"its clocks are held down: {reason}")
    for reason in unknown(gpu):
        yield smi.Finding(UNKNOWN, f"its clocks are held down: {reason}, which is not known here")


def unknown(gpu: smi.Gpu) -> Iterator[str]:
    for group, prefix in NAMES:
        for element in gpu.element.findall(f"{group}/*"):
            reason = element.tag[len(prefix) :] if element.tag.startswith(prefix) else element.tag
            if reason not in REASONS and (element.text or "").strip() == "Active":
                yield reason
