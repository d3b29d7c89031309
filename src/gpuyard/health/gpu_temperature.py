"""No GPU is as hot as where it slows itself down."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.health import smi, tools
from gpuyard.health.thresholds import THRESHOLDS
from gpuyard.health.verdict import UNHEALTHY, Verdict

CHECK = "check_gpu_temperature"

# Newer boards tell how many degrees are left to their limit, and at how many left they slow down; older ones degrees.
LEFT, LEFT_AT_SLOWDOWN = "temperature/gpu_temp_tlimit", "temperature/gpu_temp_slow_tlimit_threshold"
DEGREES, SLOWDOWN = "temperature/gpu_temp", "temperature/gpu_temp_slow_threshold"


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "below the temperature at which they slow down")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    degrees = gpu.number(DEGREES)
    if gpu.shows(LEFT_AT_SLOWDOWN) and (least := gpu.number(LEFT_AT_SLOWDOWN)) is not None:
        left = gpu.number(LEFT)
        above = None if left is None else least - left
        words = f"{left} °C are left to its limit, and at {least} °C it slows down"
    else:
        slowdown = gpu.number(SLOWDOWN)
        above = None if degrees is None or slowdown is None else degrees - slowdown
        words = f"at {slowdown} °C it slows down"
    if degrees is None or above is None:
        raise smi.UnreadError("its temperature, or the one at which it slows down, is N/A")
    if THRESHOLDS["degrees_above_slowdown"].reached(above):
        yield smi.Finding(UNHEALTHY, f"it has {degrees} °C: {words}")
