"""Numbers of a run, out of the ledger and the gaps between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpuyard.bench.answers import Outcome
from gpuyard.bench.ledger import Entry, Ledger

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share / 100 * len(ordered)), 1) - 1]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99, rounded to a tenth of a millisecond; nothing of nothing."""
    return {f"p{share}": round(percentile(values, share), 4) for share in PERCENTILES} if values else None


def report(ledger: Ledger, gaps: Sequence[float], seconds: float, planned: int | None) -> dict[str, Any]:
    """The run in numbers. `lossless` is the verdict: each request that was to be sent ended complete.

    Times are those of complete answers alone; what was lost early would make them look better.
    """
    entries = ledger.entries
    complete = [entry for entry in entries if entry.outcome is Outcome.COMPLETE]
    tokens = sum(entry.tokens or 0 for entry in complete)
    asked = len(entries) + ledger.unended
    return {
        "requests": asked,
        **{outcome.value: ledger.counts[outcome] for outcome in Outcome},
        "unended": ledger.unended,
        "unsent": max((planned or 0) - asked, 0),
        "lossless": 0 < len(complete) == max(asked, planned or 0),
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "requests_per_second": round(len(complete) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "ttft_seconds": spread([entry.ttft for entry in complete if streamed(entry) and entry.ttft is not None]),
        "itl_seconds": spread(gaps),
        "latency_seconds": spread([entry.seconds for entry in complete]),
    }


def streamed(entry: Entry) -> bool:
    return entry.kind == "streamed"
