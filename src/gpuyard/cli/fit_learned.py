"""`gpuyard fit --learned`: starts of one's own, kept in a CSV file, and what an engine's log says of one."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

from gpuyard.catalog.memory import load_memory
from gpuyard.cli.fit_cases import read_rows
from gpuyard.cli.write import write
from gpuyard.plan.judge import Finding
from gpuyard.plan.memory.fit import Fit
from gpuyard.plan.memory.learned import COLUMNS, narrowed, read_log, row_of
from gpuyard.spec.errors import RefusedError


def learn(done: Fit, learned: Path | None, log: Path | None, eager: bool, kv_dtype: str) -> Fit:
    """The fit, narrowed by the starts in `learned`; a log is read back first, compared, and kept there.

    Raises RefusedError: FIT-LOG, FIT-CSV.
    """
    if learned is None:
        raise RefusedError("FIT-LOG", f"--log {log}", "what it tells is kept in a file", "add --learned FILE.csv")
    rows = list(read_rows(learned)) if learned.is_file() or log is None else []
    told: tuple[Finding, ...] = ()
    if log is not None:
        figures = read_log(_text(log))
        rows.append(row_of(done, figures, eager, kv_dtype))
        paper = io.StringIO()
        writer = csv.DictWriter[str](paper, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(learned, paper.getvalue())
        told = (_compared(done, float(figures["reported_kv_gib"]), log),)
    found = narrowed(done, row_of(done, {}, eager, kv_dtype), rows, load_memory())
    if found.starts:
        have = f"{found.starts} starts of this GPU and version, {found.same} of them with these settings"
        told += (Finding("FIT-LEARNED", "amber", "", have, "none", "", str(learned), True),)
    return replace(found.done, findings=(*told, *found.done.findings))


def _compared(done: Fit, printed: float, log: Path) -> Finding:
    inside = done.kv_cache_gib_low <= printed <= done.kv_cache_gib_high
    have = f"{printed:.2f} GiB printed, {done.kv_cache_gib:.2f} reckoned ({done.kv_cache_gib / printed - 1:+.1%})"
    need = f"{done.kv_cache_gib_low:.2f} to {done.kv_cache_gib_high:.2f}" + ("" if inside else ": it lies outside")
    return Finding("FIT-COMPARED", "amber", done.model, have, need, "", str(log), True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RefusedError("FIT-LOG", str(path), why, "name the log of a start") from error
