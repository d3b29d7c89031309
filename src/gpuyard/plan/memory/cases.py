"""Published starts of vLLM, one a row of a CSV file: what `fit` says of each, and how far off that is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from gpuyard.catalog import numbers
from gpuyard.catalog.memory import MemoryTables
from gpuyard.catalog.rows import Gpu
from gpuyard.plan.memory.budget import Board, board_of
from gpuyard.plan.memory.fit import NEWEST, OLDEST, Fit, Settings, fit
from gpuyard.plan.memory.shape import Shape
from gpuyard.spec.errors import RefusedError

NEEDED = ("model", "gpu")
INPUTS = (
    *NEEDED, "n_gpus", "tp", "dtype", "quant", "max_model_len", "gpu_mem_util", "vllm_version", "block_size",
    "kv_dtype", "max_num_seqs", "max_num_batched_tokens", "eager", "tier", "config", "weights_gib",
)  # fmt: skip
"""Columns that a prediction may read. Everything else is an outcome or a note."""
FITTED = ("deepseek", "llama", "opt")
"""Families whose starts the coefficients were fitted on: every other one in the order of their names."""
_FAMILIES = (
    ("qwen", "qwen"), ("ui-tars", "qwen"), ("gpt-oss", "gpt-oss"), ("llava", "mistral"), ("mistral", "mistral"),
    ("mixtral", "mistral"), ("deepseek", "deepseek"), ("llama", "llama"), ("opt-", "opt"),
)  # fmt: skip
_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_SUFFIX = re.compile(r"-(instruct|it|base|chat|hf|bf16|fp16)(?=$|-)")

_DESK = 34
"""GiB: a card that nobody names and that has less may be one for a desk."""
_GREEDIEST = "0.15.0"
"""Of the versions with the largest sampler: what is left where nobody told the version may be as little."""

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prediction:
    row: Row
    done: Fit | None
    reason: str
    """What was assumed where the row does not tell, or why there is no prediction."""

    def as_dict(self) -> dict[str, object]:
        done = self.done
        return {
            "model": self.row["model"],
            "gpu": self.row["gpu"],
            "tier": self.row.get("tier", ""),
            "predicted_weights_gib": done and done.weights_gib,
            "predicted_kv_gib": done and done.kv_cache_gib,
            "predicted_kv_gib_low": done and done.kv_cache_gib_low,
            "predicted_kv_gib_high": done and done.kv_cache_gib_high,
            "predicted_kv_tokens": done and done.kv_cache_tokens,
            "fits": done and done.fits,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Error:
    """A prediction beside what the engine printed."""

    prediction: Prediction
    track: str
    """config, or weights: with the weights that the engine printed."""
    half: str
    """fitted, or scored: of a family that no coefficient was fitted on."""
    share: float
    """(predicted - printed) / printed of the KV cache's GiB; above 0 is optimistic."""
    inside: bool
    """What was printed lies in the interval."""
    tokens_share: float | None

    def as_dict(self) -> dict[str, object]:
        row, done = self.prediction.row, self.prediction.done
        return {
            "model": row["model"],
            "gpu": row["gpu"],
            "tier": row.get("tier", ""),
            "track": self.track,
            "half": self.half,
            "predicted_kv_gib": done and done.kv_cache_gib,
            "reported_kv_gib": number(row.get("reported_kv_gib", "")),
            "error": round(self.share, 4),
            "inside": self.inside,
            "tokens_error": None if self.tokens_share is None else round(self.tokens_share, 4),
        }


Shapes = Callable[[str, str], Shape]
"""The shape of a model by its name and the path of its config.json, which may be empty."""


def rows_of(table: Sequence[Row], columns: Sequence[str]) -> Sequence[Row]:
    """The rows, once their columns are enough. Raises RefusedError: FIT-COLUMNS."""
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        have = f"columns {', '.join(columns) or '(none)'}"
        raise RefusedError("FIT-COLUMNS", have, f"{', '.join(missing)} is missing", f"add {', '.join(missing)}")
    if not table:
        raise RefusedError("FIT-COLUMNS", "no row", "there is nothing to reckon", "add a row below the header")
    return table


def predict(row: Row, shapes: Shapes, gpus: Sequence[Gpu], tables: MemoryTables) -> Prediction:
    """What `fit` says of a row. Reads the columns of INPUTS only; a row that cannot be reckoned says why."""
    told = {name: (row.get(name) or "").strip() for name in INPUTS}
    notes: list[str] = []
    try:
        shape = shapes(told["model"], told["config"])
        if shape.name != told["model"] and not told["config"]:
            notes.append(f"taken to be {shape.name}")
        board = board_named(gpus, told["gpu"])
        settings = _settings(told, notes)
        if settings.max_model_len and settings.max_model_len > shape.max_model_len:
            shape = replace(shape, max_model_len=settings.max_model_len)
        done = fit(shape, board, settings, tables)
        if not told["vllm_version"]:
            least = fit(shape, board, replace(settings, engine=_GREEDIEST), tables).kv_cache_gib_low
            done = replace(done, kv_cache_gib_low=min(done.kv_cache_gib_low, least))
    except RefusedError as refused:
        return Prediction(row, None, str(refused))
    notes += [finding.rule for finding in done.findings]
    return Prediction(row, done, "; ".join(notes))


def with_printed_weights(row: Row) -> Row | None:
    """The row with the weights that the engine printed as an input, for the track that is given them."""
    printed = number(row.get("reported_weights_gib", ""))
    return {**row, "weights_gib": str(printed)} if printed else None


def error_of(prediction: Prediction, track: str) -> Error | None:
    """How far the prediction is from the outcome in its row; None where either is not there."""
    done, printed = prediction.done, number(prediction.row.get("reported_kv_gib", ""))
    if done is None or not printed:
        return None
    tokens = number(prediction.row.get("reported_kv_tokens", ""))
    half = "fitted" if family_of(prediction.row["model"]) in FITTED else "scored"
    # A line with two decimals stands for all that round to it.
    inside = done.kv_cache_gib_low - 0.005 <= printed <= done.kv_cache_gib_high + 0.005
    return Error(
        prediction,
        track,
        half,
        done.kv_cache_gib / printed - 1,
        inside,
        done.kv_cache_tokens / tokens - 1 if tokens else None,
    )


def summary(errors: Sequence[Error]) -> dict[str, float]:
    """Median, worst and coverage of a set of errors."""
    if not errors:
        return {"cases": 0}
    sizes = sorted(abs(error.share) for error in errors)
    return {
        "cases": len(errors),
        "median": round(median(sizes), 4),
        "p90": round(sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))], 4),
        "worst": round(sizes[-1], 4),
        "most_optimistic": round(max(0.0, *(error.share for error in errors)), 4),
        "coverage": round(sum(error.inside for error in errors) / len(errors), 4),
    }


def family_of(model: str) -> str:
    low = model.lower()
    return next((family for word, family in _FAMILIES if word in low), low)


def base_name(model: str) -> str:
    """The name without its owner and without what says how it was tuned, for comparison."""
    bare = re.sub(r"\(.*", "", model.lower()).strip()
    return _SUFFIX.sub("", bare.rpartition("/")[2])


def board_named(gpus: Sequence[Gpu], text: str) -> Board:
    """The GPU that people mean: a name of the catalog, a part of one with its size, or a size alone.

    Raises RefusedError: FIT-GPU.
    """
    exact = next((gpu for gpu in gpus if gpu.name.lower() == text.lower()), None)
    if exact:
        return board_of(exact)
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    size = re.search(r"(\d+) ?gb", text.lower())
    likely = [
        gpu
        for gpu in gpus
        if words & {part for part in gpu.name.lower().split("-") if re.search(r"\d", part) and not part.endswith("gb")}
        and (not size or abs(gpu.memory_gib - int(size[1])) < 0.12 * int(size[1]))
    ]
    pcie = "pcie" in words
    likely.sort(
        key=lambda gpu: (
            -len(words & set(gpu.name.lower().split("-"))),
            ("pcie" in gpu.name.lower()) is not pcie,
        )
    )
    found = likely[0] if likely else None
    seen = re.search(r"\(([\d.]+) GiB\b(?! free)", text)
    if seen:
        total = float(seen[1])
        memory, name = (total - 0.01, total, total + 0.01), found.name if found else text
        if found:
            return replace(board_of(found), memory_gib=memory)
        return Board(name, memory, nvlink=False, display=total < _DESK)
    if found:
        return board_of(found)
    if size:
        # A card sold by so many GB shows a little less than so many GiB.
        gib = float(size[1])
        return Board(text, (0.965 * gib, 0.985 * gib, 1.0 * gib), False, gib < _DESK)
    near = ", ".join(gpu.name for gpu in gpus[:3])
    raise RefusedError("FIT-GPU", f"GPU {text or '(none)'}", "the catalog has no such name", f"e.g. {near}, … or 24GB")


def number(text: str) -> float | None:
    """The number that a cell begins with, with or without commas."""
    found = re.match(r"\s*(-?\d[\d,]*\.?\d*)", text or "")
    return float(found[1].replace(",", "")) if found else None


def _count(text: str) -> int | None:
    value = number(text)
    if value is None and (implied := re.search(r"implies (\d+)", text)):
        value = float(implied[1])
    return int(value) if value else None


def _settings(told: Row, notes: list[str]) -> Settings:
    version = re.match(r"v?(\d+\.\d+(?:\.\d+)?)(?![\d-])", told["vllm_version"]) or re.match(
        r"v?(0\.\d+(?:\.\d+)?)", told["vllm_version"]
    )
    if not version:
        notes.append(f"no version told: {NEWEST}")
    engine = version[1] if version else NEWEST
    if numbers(engine) < numbers(OLDEST):
        notes.append(f"{engine} taken to be as {OLDEST}")
        engine = OLDEST
    share = number(told["gpu_mem_util"])
    bytes_told = re.search(r"kv_cache_memory_bytes=(\d+)", told["gpu_mem_util"])
    if "implies" in told["max_num_seqs"]:
        notes.append("max_num_seqs is inferred, not told")
    for column in ("gpu_mem_util", "max_num_seqs", "max_model_len", "max_num_batched_tokens"):
        if not told[column]:
            notes.append(f"{column} by default")
    return Settings(
        engine=engine,
        tensor_parallel_size=_count(told["tp"]) or _count(told["n_gpus"]) or 1,
        dtype=_NAMES.get(_word(told["dtype"]), _word(told["dtype"])) or None,
        quantization=_method(told["quant"]),
        kv_cache_dtype=_NAMES.get(_word(told["kv_dtype"]), _word(told["kv_dtype"])) or "auto",
        max_model_len=_count(told["max_model_len"]),
        gpu_memory_utilization=share if share is not None else None,
        max_num_seqs=_count(told["max_num_seqs"]),
        max_num_batched_tokens=_count(told["max_num_batched_tokens"]),
        block_size=_count(told["block_size"]),
        enforce_eager=told["eager"].lower() in ("yes", "true", "1"),
        kv_cache_memory_bytes=int(bytes_told[1]) if bytes_told else None,
        weights_gib=number(told["weights_gib"]),
    )


def _word(text: str) -> str:
    return text.lower().partition(" ")[0]


def _method(text: str) -> str | None:
    """The method of quantisation in a cell such as `fp8 (compressed-tensors)`; an empty cell tells none."""
    low = text.lower()
    if not low or low.startswith(("none", "no", "bf16", "fp16")):
        return "none" if low else None
    for word in ("mxfp4", "nvfp4", "fp8", "int8", "w8a8", "awq", "gptq", "int4", "4-bit", "4bit", "bnb", "gguf"):
        if word in low:
            return "int4" if word in ("4-bit", "4bit") else word
    return low.split()[0]
