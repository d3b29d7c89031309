"""No row or page of a GPU's memory waits to be replaced, and none could not be."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.health import smi, tools
from gpuyard.health.verdict import UNHEALTHY, Verdict

CHECK = "check_remapped_rows"


def probe() -> Verdict:
    return judge(smi.query())


def judge(answer: tools.Answer) -> Verdict:
    return smi.judge(CHECK, answer, look, "no memory waits to be replaced")


def look(gpu: smi.Gpu) -> Iterator[smi.Finding]:
    pending = gpu.flag("remapped_rows/remapped_row_pending")
    failure = gpu.flag("remapped_rows/remapped_row_failure")
    if (pending is None) != (failure is None):
        raise smi.UnreadError("it remaps rows, and only half of what came of it can be read")
    if failure:
        yield smi.Finding(UNHEALTHY, "a row of its memory could not be remapped: return the GPU")
    if pending:
        yield smi.Finding(UNHEALTHY, "a row of its memory is remapped at the next reset: reset it while it is drained")
    # Up to Turing, GPUs retire pages instead of remapping rows.
    if any([gpu.flag("retired_pages/pending_retirement"), gpu.flag("retired_pages/pending_blacklist")]):
        yield smi.Finding(UNHEALTHY, "a page of its memory is retired at the next reset: reset it while it is drained")
