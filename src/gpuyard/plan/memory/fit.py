"""Does a model fit on a GPU, and what is left for its KV cache: the one public function, `fit`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from gpuyard.catalog import numbers
from gpuyard.catalog.memory import EngineMemory, MemoryTables, Quantization
from gpuyard.plan import names
from gpuyard.plan.judge import Finding
from gpuyard.plan.memory.budget import (
    GIB,
    Batch,
    Board,
    Term,
    activation,
    batch_of,
    engine_row,
    graphs,
    left_over,
    non_torch,
)
from gpuyard.plan.memory.kv import Blocks, CannotPlanError, Spec, plan
from gpuyard.plan.memory.layers import KV_DTYPES, CacheSettings, ranks_of
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.speculative import Draft, draft_bytes
from gpuyard.plan.memory.weights import DTYPE_BYTES, weights_of
from gpuyard.spec.errors import RefusedError

NEWEST = "0.33.0"
OLDEST = "0.6.0"
_SOURCE = "docs/fit.md"
_UNCHECKED = 5  # a kind of model that nobody counted: what it has of its own may be as much
_PRINTED = 0.01  # GiB: measured weights come from a line with two decimals


@dataclass(frozen=True, slots=True)
class Settings:
    """vLLM's flags, by their names; None: the default of its version."""

    engine: str = NEWEST
    """Version of vLLM."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    draft: Draft | None = None
    """Of --speculative-config."""
    weights_gib: float | None = None
    """Measured on one GPU, e.g. what the engine printed; wins over what the config tells."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What vLLM will make of it. GiB on the GPU that decides; 90 % of starts lie between low and high."""

    model: str
    gpu: str
    gpus: int
    engine: str
    fits: bool
    """Likely: one request of max_model_len fits beside everything else."""
    surely: bool
    """It fits at the low end of the interval too."""
    memory_gib: float
    """Of the GPU, as CUDA reports it."""
    requested_gib: float
    weights_gib: float
    """With those of a draft."""
    draft_gib: float
    activation_gib: float
    non_torch_gib: float
    cudagraph_gib: float
    kv_cache_gib: float
    """Below nothing where not even the weights fit."""
    kv_cache_gib_low: float
    kv_cache_gib_high: float
    kv_cache_tokens: int
    """As this version prints it."""
    num_blocks: int
    block_size: int
    bytes_per_block: int
    max_concurrency: float
    needed_gib: float
    """KV cache of one request of max_model_len."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "findings": [finding.as_dict() for finding in self.findings]}


def fit(shape: Shape, board: Board, settings: Settings, tables: MemoryTables) -> Fit:
    """Reckon a start of vLLM, as its version would.

    Raises RefusedError for settings that no start can have (FIT-TP, FIT-CONTEXT, FIT-UTILIZATION, …). What starts but
    has no room is no refusal: `fits` is false, and a finding names the smallest change that would pass.
    """
    checked(shape, settings)
    done, ranks, engine, batch = _reckon(shape, board, settings, tables)
    found = _doubts(done, shape, settings, engine)
    if not done.fits:
        found = (_no_room(done, shape, board, settings, tables, ranks, engine, batch), *found)
    return replace(done, findings=found)


def _reckon(
    shape: Shape, board: Board, settings: Settings, tables: MemoryTables
) -> tuple[Fit, list[list[tuple[str, Spec]]], EngineMemory, Batch]:
    engine = engine_row(tables, settings.engine)
    quantization = quantization_of(tables, shape, settings.quantization)
    dtype = settings.dtype if settings.dtype and settings.dtype != "auto" else shape.dtype
    length = settings.max_model_len or shape.max_model_len
    batch = batch_of(engine, board, settings.max_num_seqs, settings.max_num_batched_tokens, length)
    share = settings.gpu_memory_utilization or engine.utilization
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    forward = tables.forward[0]

    draft = draft_bytes(settings.draft, shape, quantization, dtype, pipeline) / GIB if settings.draft else 0.0
    weights = _weights(shape, settings, quantization, dtype, forward.weights_spread, draft)
    taken = (
        activation(shape, engine, forward, batch, board, tensor),
        non_torch(tables, settings.engine, tensor * pipeline, board),
        graphs(shape, engine, forward, settings.enforce_eager),
    )
    low, likely, high = board.memory_gib
    asked = Term(low * share, likely * share, high * share)
    stages = [left_over(asked, (stage, *taken)) for stage in weights]
    kv = min(stages, key=lambda stage: stage.likely)
    if settings.kv_cache_memory_bytes is not None:
        told = settings.kv_cache_memory_bytes / GIB
        kv, stages = Term(told, told, told), [Term(told, told, told)] * pipeline
    ranks = ranks_of(shape, _cache(shape, engine, settings, dtype))
    blocks = _plan(shape, engine, ranks, [int(stage.likely * GIB) for stage in stages], length, batch)
    surely = _plan(shape, engine, ranks, [int(stage.low * GIB) for stage in stages], length, batch).starts
    fits = blocks.starts and kv.likely > 0
    heaviest = max(weights, key=lambda stage: stage.likely)
    done = Fit(
        model=shape.name,
        gpu=board.name,
        gpus=tensor * pipeline,
        engine=settings.engine,
        fits=fits,
        surely=surely and kv.low > 0,
        memory_gib=round(likely, 4),
        requested_gib=round(asked.likely, 4),
        weights_gib=round(heaviest.likely, 4),
        draft_gib=round(draft, 4),
        activation_gib=round(taken[0].likely, 4),
        non_torch_gib=round(taken[1].likely, 4),
        cudagraph_gib=round(taken[2].likely, 4),
        kv_cache_gib=round(kv.likely, 4),
        kv_cache_gib_low=round(kv.low, 4),
        kv_cache_gib_high=round(kv.high, 4),
        kv_cache_tokens=blocks.tokens,
        num_blocks=blocks.num_blocks,
        block_size=min((spec.block_size for rank in ranks for _, spec in rank), default=0),
        bytes_per_block=blocks.bytes_per_block,
        max_concurrency=round(blocks.max_concurrency, 4),
        needed_gib=round(blocks.needed_bytes / GIB, 4),
        max_model_len=length,
        max_num_seqs=batch.max_num_seqs,
        max_num_batched_tokens=batch.max_num_batched_tokens,
        gpu_memory_utilization=share,
        findings=(),
    )
    return done, ranks, engine, batch


def quantization_of(tables: MemoryTables, shape: Shape, told: str | None) -> Quantization | None:
    """The row of the method that is told, or of the one in the config; None: weights in dtype."""
    method = shape.quantization if told in (None, "", "auto") else told
    if method is None or method == "none":
        return None
    word = method.lower().replace("compressed-tensors", {8: "fp8", 4: "gptq"}.get(shape.bits or 8, "fp8"))
    word = "int8" if word in ("gptq", "bitsandbytes") and shape.bits == 8 else word
    known = {name: row for row in tables.quantizations for name in (row.method, *row.names)}
    if word in known:
        return known[word]
    change = f"did you mean {names.nearest(word, known)}? Or give --weights-gib"
    raise RefusedError("FIT-QUANTIZATION", f"quantization {method}", "its bytes per weight are not known", change)


def checked(shape: Shape, settings: Settings) -> None:
    """Raises RefusedError for what no start can have."""
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    if tensor < 1 or shape.heads % tensor:
        fitting = [size for size in range(1, shape.heads + 1) if shape.heads % size == 0]
        near = min(fitting, key=lambda size: (abs(size - tensor), -size))
        why = f"it does not divide the {shape.heads} attention heads of {shape.name}"
        raise RefusedError("FIT-TP", f"--tensor-parallel-size {tensor}", why, f"take {near}")
    if pipeline < 1 or pipeline > len(shape.layers):
        why = f"{shape.name} has {len(shape.layers)} layers"
        change = f"take 1 to {len(shape.layers)}"
        raise RefusedError("FIT-PP", f"--pipeline-parallel-size {pipeline}", why, change)
    length = settings.max_model_len
    if length is not None and not 1 <= length <= shape.max_model_len:
        why = f"{shape.name} was trained for 1 to {shape.max_model_len} tokens"
        change = f"take {shape.max_model_len if length > 0 else 1}"
        raise RefusedError("FIT-CONTEXT", f"--max-model-len {length}", why, change)
    share = settings.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        why = "it is a share of the GPU's memory, above 0 and at most 1"
        raise RefusedError("FIT-UTILIZATION", f"--gpu-memory-utilization {share:g}", why, "take e.g. 0.9")
    for flag, value in (
        ("--max-num-seqs", settings.max_num_seqs),
        ("--max-num-batched-tokens", settings.max_num_batched_tokens),
        ("--block-size", settings.block_size),
        ("--kv-cache-memory-bytes", settings.kv_cache_memory_bytes),
    ):
        if value is not None and value < 1:
            raise RefusedError("FIT-VALUE", f"{flag} {value}", "it is a count above 0", "leave it out for the default")
    if settings.weights_gib is not None and not 0 < settings.weights_gib < 10_000:
        why = "it is the GiB of weights on one GPU"
        raise RefusedError("FIT-VALUE", f"--weights-gib {settings.weights_gib:g}", why, "take what the engine printed")
    if settings.dtype not in (None, *DTYPE_BYTES):
        why = f"known are {', '.join(DTYPE_BYTES)}"
        change = f"did you mean {names.nearest(settings.dtype, DTYPE_BYTES)}?"
        raise RefusedError("FIT-DTYPE", f"--dtype {settings.dtype}", why, change)
    if settings.kv_cache_dtype not in KV_DTYPES:
        why = f"known are {', '.join(KV_DTYPES)}"
        change = f"did you mean {names.nearest(settings.kv_cache_dtype, KV_DTYPES)}?"
        raise RefusedError("FIT-KV-DTYPE", f"--kv-cache-dtype {settings.kv_cache_dtype}", why, change)
    if not (numbers(settings.engine) and numbers(OLDEST) <= numbers(settings.engine)):
        why = f"its planning is known from {OLDEST} on"
        raise RefusedError("FIT-ENGINE", f"vllm {settings.engine}", why, f"take {OLDEST} to {NEWEST}")


def _weights(
    shape: Shape,
    settings: Settings,
    quantization: Quantization | None,
    dtype: str,
    spread: tuple[float, float],
    draft: float,
) -> list[Term]:
    """Of each pipeline stage; a draft sits on the last, and what was measured holds it."""
    if settings.weights_gib is not None:
        told = settings.weights_gib
        return [Term(told - _PRINTED, told, told + _PRINTED)] * settings.pipeline_parallel_size
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    # Sizes in files are exact up to what loading pads; how a quantisation that only a flag names packs is a guess.
    doubt = 0.5 if shape.files else (3.0 if quantization else 1.0) * (1 if shape.checked else _UNCHECKED)
    stages = [size / GIB for size in weights_of(shape, tensor, pipeline, quantization, dtype).per_rank]
    stages[-1] += draft
    low, high = 1 - (1 - spread[0]) * doubt, 1 + (spread[1] - 1) * doubt
    return [Term(size * low, size, size * high) for size in stages]


def _cache(shape: Shape, engine: EngineMemory, settings: Settings, dtype: str) -> CacheSettings:
    return CacheSettings(
        tensor=settings.tensor_parallel_size,
        pipeline=settings.pipeline_parallel_size,
        block_size=settings.block_size or 16,
        dtype=shape.cache_dtype or "auto" if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype,
        model_dtype=dtype,
        states_per_request=engine.states_per_request,
        draft=settings.draft,
        grows_by_block=engine.planner == "padded-null",
    )


def _plan(
    shape: Shape,
    engine: EngineMemory,
    ranks: list[list[tuple[str, Spec]]],
    available: list[int],
    length: int,
    batch: Batch,
) -> Blocks:
    try:
        return plan(
            engine.planner,
            ranks,
            available,
            length,
            _in_flight(engine, batch, len(ranks)),
            engine.tokens_by_concurrency,
        )
    except CannotPlanError as error:
        why = f"vLLM {engine.since} and the versions like it cannot plan its cache: {error}"
        raise RefusedError("FIT-LAYERS", shape.name, why, "take a newer vLLM") from error


def _doubts(done: Fit, shape: Shape, settings: Settings, engine: EngineMemory) -> tuple[Finding, ...]:
    found: list[Finding] = []
    if done.fits and not done.surely:
        have = f"{done.kv_cache_gib_low:.2f} to {done.kv_cache_gib_high:.2f} GiB for the KV cache"
        need = f"{done.needed_gib:.2f} GiB for one request of {done.max_model_len} tokens"
        change = "take a shorter --max-model-len, or measure one start"
        found.append(Finding("FIT-CLOSE", "amber", done.model, have, need, change, _SOURCE, True))
    if not shape.verified:
        have, change = "a shape from memory", "give --model config.json"
        found.append(Finding("FIT-SHAPE", "amber", done.model, have, "its config.json", change, shape.source, False))
    if not shape.checked and not shape.files and settings.weights_gib is None:
        have = f"model_type {shape.kind or '(none)'}, of which no model was counted"
        change = "give --weights-gib, or a directory with its files; and compare the tokens with one start's log"
        found.append(Finding("FIT-KIND", "amber", done.model, have, "a kind that is known", change, _SOURCE, False))
    if not engine.verified or numbers(settings.engine) > numbers(NEWEST):
        have, need = f"vLLM {settings.engine}, whose planning was not read in full", "one start of it"
        change = "compare with that start's log"
        found.append(Finding("FIT-VERSION", "amber", "", have, need, change, engine.source, False))
    if shape.kv_heads < settings.tensor_parallel_size and not shape.attention_free and not shape.latent:
        have = f"{shape.kv_heads} KV heads on {settings.tensor_parallel_size} GPUs, so that each is kept more than once"
        change = f"--tensor-parallel-size {shape.kv_heads} keeps each once"
        found.append(
            Finding("FIT-KV-HEADS", "amber", done.model, have, "a KV head for each GPU", change, _SOURCE, True)
        )
    return tuple(found)


def _no_room(
    done: Fit,
    shape: Shape,
    board: Board,
    settings: Settings,
    tables: MemoryTables,
    ranks: list[list[tuple[str, Spec]]],
    engine: EngineMemory,
    batch: Batch,
) -> Finding:
    """Red, with the smallest change that would pass: fewer tokens, else more GPUs of this kind."""
    have = f"{done.kv_cache_gib:.2f} GiB left for the KV cache"
    need = f"{done.needed_gib:.2f} GiB for one request of {done.max_model_len} tokens"
    longest = _longest(done, ranks, engine, batch)
    ways = [f"--max-model-len {longest} fits"] if longest else []
    wider = range(settings.tensor_parallel_size + 1, 65)
    bare = replace(settings, weights_gib=None)
    for size in (size for size in wider if shape.heads % size == 0):
        if _reckon(shape, board, replace(bare, tensor_parallel_size=size), tables)[0].fits:
            ways.append(f"--tensor-parallel-size {size} fits")
            break
    return Finding(
        "FIT-MEMORY",
        "red",
        done.model,
        have,
        need,
        "; ".join(ways) or "take a larger GPU or a quantised model",
        _SOURCE,
        True,
    )


def _in_flight(engine: EngineMemory, batch: Batch, stages: int) -> int:
    """Tokens of all batches under way: each further stage of a pipeline holds one more, where batches overlap."""
    batches = engine.batches_in_flight + stages - 1 if engine.batches_in_flight > 1 else 1
    return batches * batch.max_num_batched_tokens


def _longest(done: Fit, ranks: list[list[tuple[str, Spec]]], engine: EngineMemory, batch: Batch) -> int:
    """The longest max_model_len for which one request fits; 0: none does."""
    memory = int(done.kv_cache_gib * GIB)
    in_flight = _in_flight(engine, batch, len(ranks))

    def starts(length: int) -> bool:
        return plan(engine.planner, ranks, [memory] * len(ranks), length, in_flight, True).starts

    if memory <= 0 or not starts(1):
        return 0
    low, high = 1, done.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if starts(middle) else (low, middle - 1)
    return low
