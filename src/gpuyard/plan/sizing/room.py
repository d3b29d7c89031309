"""What a model's memory means to a plan: does it fit, what fills each GPU, how many requests at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.memory import MemoryTables, ModelShape
from gpuyard.catalog.rows import EngineRelease
from gpuyard.plan import names
from gpuyard.plan.judge import Finding
from gpuyard.plan.memory.budget import board_of
from gpuyard.plan.memory.cases import Row
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.fit import NEWEST, Fit, Settings, fit, quantization_of
from gpuyard.plan.memory.learned import narrowed, row_of
from gpuyard.plan.memory.shape import Shape as Whole
from gpuyard.plan.memory.weights import DTYPE_BYTES, weights_of
from gpuyard.plan.sizing.figures import GIB, number
from gpuyard.plan.sizing.throughput import Shape
from gpuyard.spec.closed import Closed
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Engine, Model

_SOURCE = "docs/fit.md"


class Part(Closed):
    """One part of a GPU's memory, in GiB; low and high are its interval."""

    name: str
    gib: float
    low: float
    high: float


class Memory(Closed):
    """One GPU's memory under one model."""

    gpu: str
    tensor_parallel_size: int
    engine: str
    fits: bool
    total_gib: float
    requested_gib: float
    """What the engine may take of it."""
    parts: tuple[Part, ...]
    kv_cache_tokens: int
    """Of one copy, on all its GPUs together."""
    max_num_seqs: int
    max_concurrency: float
    """Requests of the longest context that the cache holds at once."""
    learned_from: int
    """Starts of one's own that the figures of the cache rest on; 0: none."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory, and what is to be said of it."""

    memory: Memory | None
    """None: the request was refused before anything was reckoned, e.g. heads that do not divide."""
    findings: tuple[Finding, ...]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits

    @property
    def red(self) -> Finding:
        """Why it does not fit."""
        return next(finding for finding in self.findings if finding.level == "red")


class Rooms(Protocol):
    """Who knows of models and of memory."""

    def shape(self, model: Model) -> Shape | None:
        """None where nobody knows the model."""
        ...

    def room(self, model: Model, engine: Engine, gpu: str, size: int, stages: int = 1) -> Room | None:
        """Room of one copy on so many GPUs of each pipeline stage. None where the model or the GPU is not known."""
        ...

    def too_heavy(self, model: Model, gpu: str, size: int) -> Finding | None:
        """Why not even the weights have room, without reckoning the rest; None: they may."""
        ...

    def nearest(self, model: Model) -> str:
        """The known model whose name is closest."""
        ...


@dataclass(slots=True)
class CatalogRooms:
    """By the catalog's shapes and tables. What was asked once is kept: a fleet asks the same many times."""

    catalog: Catalog
    tables: MemoryTables
    shapes: Sequence[ModelShape]
    starts: Sequence[Row] = ()
    """Starts of one's own, as `gpuyard fit --learned` keeps them."""
    _wholes: dict[str, Whole | None] = field(default_factory=dict[str, "Whole | None"])
    _shapes: dict[tuple[str, ...], Shape | None] = field(default_factory=dict[tuple[str, ...], "Shape | None"])
    _rooms: dict[tuple[str, ...], Room | None] = field(default_factory=dict[tuple[str, ...], "Room | None"])

    def shape(self, model: Model) -> Shape | None:
        key = (model.source, str(model.vllm.quantization), str(model.vllm.dtype), str(model.vllm.kv_cache_dtype))
        if key not in self._shapes:
            whole = self._whole(model)
            self._shapes[key] = self._shape(model, whole) if whole else None
        return self._shapes[key]

    def room(self, model: Model, engine: Engine, gpu: str, size: int, stages: int = 1) -> Room | None:
        flags = model.vllm.model_dump_json(exclude={"tensor_parallel_size", "data_parallel_size"})
        key = (model.source, flags, engine.version or "", gpu, f"{size} x {stages}")
        if key not in self._rooms:
            self._rooms[key] = self._room(model, engine, gpu, size, stages)
        return self._rooms[key]

    def too_heavy(self, model: Model, gpu: str, size: int) -> Finding | None:
        shape = self.shape(model)
        board = next((row for row in self.catalog.gpus if row.name == gpu), None)
        if shape is None or board is None or shape.weights_gib / size <= board.memory_gib:
            return None
        have = f"{number(shape.weights_gib)} GiB of weights / {size} on {gpu} with {number(board.memory_gib)} GiB"
        change = "take more GPUs for each copy, larger ones or a quantised model"
        return Finding("FIT-MEMORY", "red", model.name, have, "room for its weights", change, _SOURCE, True)

    def nearest(self, model: Model) -> str:
        return names.nearest(_repository(model), [row.model for row in self.shapes])

    def _whole(self, model: Model) -> Whole | None:
        name = _repository(model)
        if name not in self._wholes:
            row = next((row for row in self.shapes if row.model == name), None)
            self._wholes[name] = (
                replace(shape_of(row.config, row.model), source=row.source, verified=row.verified) if row else None
            )
        return self._wholes[name]

    def _shape(self, model: Model, whole: Whole) -> Shape:
        try:
            row = quantization_of(self.tables, whole, model.vllm.quantization)
        except RefusedError:
            row = None
        dtype = model.vllm.dtype if model.vllm.dtype not in (None, "auto") else whole.dtype
        parameters = weights_of(replace(whole, files=None), 1, 1, None, "bfloat16").whole / 2
        idle = 0.0
        if whole.experts:
            matrices = 3 if whole.gated else 2
            each = matrices * whole.hidden * whole.experts.intermediate
            idle = sum(layer.experts for layer in whole.layers) * each * (whole.experts.count - whole.experts.per_token)
        width = 1 if model.vllm.kv_cache_dtype and model.vllm.kv_cache_dtype.startswith("fp8") else DTYPE_BYTES[dtype]
        return Shape(
            name=whole.name,
            layers=len(whole.layers),
            hidden=whole.hidden,
            parameters=parameters,
            active_parameters=parameters - idle,
            weights_gib=weights_of(whole, 1, 1, row, dtype).whole / GIB,
            kv_bytes_per_token=sum(_kept(whole, index) for index in range(len(whole.layers))) * width,
            eight_bit=row is not None and row.method in ("fp8", "int8"),
            quantization=row.method if row else None,
        )

    def _room(self, model: Model, engine: Engine, gpu: str, size: int, stages: int) -> Room | None:
        whole = self._whole(model)
        board = next((row for row in self.catalog.gpus if row.name == gpu), None)
        if whole is None or board is None:
            return None
        release = release_of(self.catalog, engine)
        settings = Settings(
            engine=release.version if release else engine.version or NEWEST,
            tensor_parallel_size=size,
            pipeline_parallel_size=stages,
            dtype=model.vllm.dtype,
            quantization=model.vllm.quantization,
            kv_cache_dtype=model.vllm.kv_cache_dtype or "auto",
            max_model_len=model.vllm.max_model_len,
            gpu_memory_utilization=model.vllm.gpu_memory_utilization,
            max_num_seqs=model.vllm.max_num_seqs,
            max_num_batched_tokens=model.vllm.max_num_batched_tokens,
            enforce_eager=bool(model.vllm.enforce_eager),
        )
        try:
            done = fit(whole, board_of(board), settings, self.tables)
        except RefusedError as refused:
            told = Finding(
                refused.rule,
                "red",
                model.name,
                _flags(refused.found),
                refused.why,
                _flags(refused.change),
                whole.source,
                whole.verified,
            )
            return Room(None, (told,))
        findings = tuple(replace(item, change=_flags(item.change), have=_flags(item.have)) for item in done.findings)
        if not self.starts:
            return Room(_memory(done, 0), findings)
        own = row_of(done, {}, settings.enforce_eager, settings.kv_cache_dtype)
        learned = narrowed(done, own, self.starts, self.tables)
        if done.fits and not learned.done.fits:
            have = f"{learned.done.kv_cache_gib:.2f} GiB left for the KV cache, by {learned.starts} starts of one's own"
            need = f"{done.needed_gib:.2f} GiB for one request of {done.max_model_len} tokens"
            change = "take a shorter max_model_len or more GPUs for each copy"
            red = Finding("FIT-MEMORY", "red", model.name, have, need, change, _SOURCE, True)
            findings = (red, *findings)
        elif learned.done.fits:
            findings = tuple(item for item in findings if item.level != "red")
        return Room(_memory(learned.done, learned.starts), findings)


def _repository(model: Model) -> str:
    return model.source.partition(":")[2].partition("@")[0]


def release_of(catalog: Catalog, engine: Engine) -> EngineRelease | None:
    """The release of an engine as far as a plan knows it: the one that is named, else the newest that can be locked."""
    rows = [row for row in catalog.engines if row.distribution == engine.distribution]
    if engine.version:
        return next((row for row in rows if row.version == engine.version), None)
    return max((row for row in rows if row.requirements), key=lambda row: numbers(row.version), default=None)


def _memory(done: Fit, starts: int) -> Memory:
    def part(name: str, gib: float) -> Part:
        return Part(name=name, gib=gib, low=gib, high=gib)

    return Memory(
        gpu=done.gpu,
        tensor_parallel_size=done.gpus,
        engine=done.engine,
        fits=done.fits,
        total_gib=done.memory_gib,
        requested_gib=done.requested_gib,
        parts=(
            part("weights", done.weights_gib),
            part("activations", done.activation_gib),
            part("not PyTorch's", done.non_torch_gib),
            part("CUDA graphs", done.cudagraph_gib),
            Part(name="KV cache", gib=done.kv_cache_gib, low=done.kv_cache_gib_low, high=done.kv_cache_gib_high),
        ),
        kv_cache_tokens=done.kv_cache_tokens,
        max_num_seqs=done.max_num_seqs,
        max_concurrency=done.max_concurrency,
        learned_from=starts,
    )


def _kept(whole: Whole, index: int) -> int:
    """Values that a layer keeps of each token, all its heads together."""
    layer = whole.layers[index]
    if layer.mixer == "mla" and whole.latent:
        return whole.latent.kv_rank + whole.latent.rope
    return 2 * layer.kv_heads * layer.head_dim if layer.mixer in ("full", "sliding", "chunked") else 0


def _flags(text: str) -> str:
    """The fleet's words for vLLM's flags: max_model_len for --max-model-len."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found.group(1).replace("-", "_"), text)
