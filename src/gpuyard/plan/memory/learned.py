"""Starts of one's own: read back from the engine's log, kept as cases with outcomes, used to narrow the interval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from gpuyard.catalog.memory import MemoryTables
from gpuyard.plan.memory.budget import GIB, engine_row
from gpuyard.plan.memory.cases import Row, number
from gpuyard.plan.memory.fit import Fit
from gpuyard.spec.errors import RefusedError

COLUMNS = (
    "model", "gpu", "tp", "vllm_version", "max_model_len", "gpu_mem_util", "block_size", "kv_dtype", "max_num_seqs",
    "max_num_batched_tokens", "eager", "predicted_kv_gib", "reported_weights_gib", "reported_kv_gib",
    "reported_kv_tokens", "tier",
)  # fmt: skip
"""Of the file that starts are kept in; `gpuyard fit --cases` reads it too."""
_SAME = (
    "model", "gpu", "tp", "vllm_version", "max_model_len", "gpu_mem_util", "max_num_seqs", "max_num_batched_tokens",
    "eager", "kv_dtype",
)  # fmt: skip
_AGAIN_GIB = 0.03  # two starts alike differ by so much
_PATTERNS = {
    "reported_kv_gib": (
        r"Available KV cache memory: ([\d.]+) GiB",
        r"memory reserved for KV Cache is ([\d.]+) ?GiB",
        r"(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB for KV cache",
    ),
    "reported_kv_tokens": (r"KV cache size: ([\d,]+) tokens",),
    "reported_weights_gib": (
        r"Model loading took ([\d.]+) (?:GiB|GB)",
        r"model weights take ([\d.]+) ?GiB",
    ),
}


@dataclass(frozen=True, slots=True)
class Learned:
    done: Fit
    starts: int
    """Of the same GPU, tensor parallelism and versions of vLLM alike."""
    same: int
    """Of these, with the same model and settings."""


def read_log(text: str) -> dict[str, str]:
    """The engine's own figures from the log of a start. Where ranks differ, that of the one with least: it decides.

    Raises RefusedError: FIT-LOG, if the log does not tell how much is left for the KV cache.
    """
    told: dict[str, str] = {}
    for column, patterns in _PATTERNS.items():
        values = [float(value.replace(",", "")) for pattern in patterns for value in re.findall(pattern, text)]
        if values:
            told[column] = f"{max(values) if column == 'reported_weights_gib' else min(values):g}"
    if "reported_kv_gib" not in told:
        why = "no line tells what is left for the KV cache"
        raise RefusedError("FIT-LOG", "the log", why, "take the whole log of a start, at level INFO")
    return told


def row_of(done: Fit, told: dict[str, str], eager: bool, kv_dtype: str) -> Row:
    """A start as a case with its outcomes."""
    own = {
        "model": done.model,
        "gpu": done.gpu,
        "tp": str(done.gpus),
        "vllm_version": done.engine,
        "max_model_len": str(done.max_model_len),
        "gpu_mem_util": f"{done.gpu_memory_utilization:g}",
        "block_size": str(done.block_size),
        "kv_dtype": kv_dtype,
        "max_num_seqs": str(done.max_num_seqs),
        "max_num_batched_tokens": str(done.max_num_batched_tokens),
        "eager": "yes" if eager else "no",
        "predicted_kv_gib": f"{done.kv_cache_gib:g}",
        "tier": "own",
        **told,
    }
    return {column: own.get(column, "") for column in COLUMNS}


def narrowed(done: Fit, own: Row, starts: Sequence[Row], tables: MemoryTables) -> Learned:
    """The fit with the interval that the starts leave.

    A start of the same model and settings is repeated within 0.03 GiB. Those of other models on the same GPU, width and
    versions shift the figure by their median error, and leave an interval as wide as these errors differ.
    """
    version = engine_row(tables, done.engine).since
    alike = [
        row
        for row in starts
        if (row.get("gpu"), row.get("tp")) == (own["gpu"], own["tp"])
        and re.fullmatch(r"\d+(\.\d+)*", row.get("vllm_version", ""))
        and engine_row(tables, row["vllm_version"]).since == version
        and number(row.get("reported_kv_gib", "")) is not None
        and number(row.get("predicted_kv_gib", "")) is not None
    ]
    same = [row for row in alike if all(row.get(column) == own[column] for column in _SAME)]
    if not alike:
        return Learned(done, 0, 0)
    if same:
        values = [_value(row, "reported_kv_gib") for row in same]
        likely, apart = median(values), max(values) - min(values)
        low, high = likely - apart - _AGAIN_GIB, likely + apart + _AGAIN_GIB
    else:
        errors = [_value(row, "reported_kv_gib") - _value(row, "predicted_kv_gib") for row in alike]
        shift = median(errors)
        # One start says little of how much the next one differs.
        apart = max(abs(error - shift) for error in errors) + abs(shift) / len(errors) + 10 * _AGAIN_GIB / len(errors)
        likely = done.kv_cache_gib + shift
        low = max(done.kv_cache_gib_low, likely - apart)
        high = min(done.kv_cache_gib_high, likely + apart)
        low, high = min(low, likely), max(high, likely)
    count = max(0, int(likely * GIB)) // done.bytes_per_block if done.bytes_per_block else done.num_blocks
    scale = count / done.num_blocks if done.num_blocks else 0.0
    changed = replace(
        done,
        kv_cache_gib=round(likely, 4),
        kv_cache_gib_low=round(low, 4),
        kv_cache_gib_high=round(high, 4),
        num_blocks=count,
        kv_cache_tokens=int(done.kv_cache_tokens * scale),
        max_concurrency=round(done.max_concurrency * scale, 4),
        fits=likely >= done.needed_gib,
        surely=low >= done.needed_gib,
    )
    return Learned(changed, len(alike), len(same))


def _value(row: Row, column: str) -> float:
    return number(row.get(column, "")) or 0.0
