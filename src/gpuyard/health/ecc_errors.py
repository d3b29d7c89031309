"""No GPU has counted an ECC error that it could not correct since its driver was loaded, nor too many that it could."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.health import smi, tools
from gpuyard.health.thresholds import THRESHOLDS
from gpuyard.health.verdict import UNHEALTHY, Verdict

CHECK = "check_ecc_errors"

VOLATILE, AGGREGATE = "ecc_errors/volatile", "ecc_errors/aggregate"

# Older drivers have one counter for what newer ones count apart.
WHOLE = f"{VOLATILE}/sram_uncorrectable"
PARTS = (f"{VOLATILE}/sram_uncorrectable_parity", f"{VOLATILE}/sram_uncorrectable_secded")


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "no ECC errors that matter")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    # A GPU without ECC, or with ECC switched off, says N/A in every counter.
    counts = gpu.flag("ecc_mode/current_ecc", yes="Enabled", no="Disabled") is True
    older = gpu.shows(WHOLE)
    for counter, names in {
        "sram_uncorrectable": (WHOLE,) if older else PARTS,
        "dram_uncorrectable": (f"{VOLATILE}/dram_uncorrectable",),
        "sram_correctable": (f"{VOLATILE}/sram_correctable",),
        "dram_correctable": (f"{VOLATILE}/dram_correctable",),
    }.items():
        errors = [number for number in map(gpu.number, names) if number is not None]
        if counts and len(errors) < len(names):
            raise smi.UnreadError(f"ECC is enabled, and nvidia-smi does not count {counter}")
        if errors and THRESHOLDS[counter].reached(sum(errors)):
            words = f"{sum(errors)} {counter.replace('_', ' ')} ECC errors since the driver was loaded"
            yield smi.Finding(UNHEALTHY, words)
    if not older and gpu.flag(f"{AGGREGATE}/sram_threshold_exceeded"):
        yield smi.Finding(UNHEALTHY, "its SRAM is past NVIDIA's threshold of uncorrectable errors: return the GPU")
