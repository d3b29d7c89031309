"""What a model's memory means to a plan: does it fit, what fills each GPU, how many requests at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.memory import MemoryTables, ModelShape
from gpuyard.catalog.rows import EngineRelease
from gpuyard.plan import names
from gpuyard.plan.judge import Finding
from gpuyard.plan.memory.budget import Board, board_of
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
CPU = "CPU"
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_CPU_BLOCK, _CPU_SEQS, _CPU_BATCHED = 128, 128, 2048
"""Defaults of vLLM's server on a CPU: vllm/platforms/cpu.py and vllm/engine/arg_utils.py of 0.31.0 and 0.32.0."""


class Part(Closed):
    """One part of a GPU's memory, in GiB; low and high are its interval."""

    name: str
    gib: float
    low: float
    high: float


class Memory(Closed):
    """One GPU's memory under one model; without a GPU the machine's."""

    gpu: str
    """Without one: CPU."""
    tensor_parallel_size: int
    engine: str
    fits: bool
    total_gib: float
    """Without a GPU: what the parts add up to."""
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

    def room_on_cpu(self, model: Model, engine: Engine) -> Room | None:
        """Room of a copy without a GPU. None where nobody knows the model, or the fleet does not state its cache."""
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
    told: Mapping[str, Whole] = field(default_factory=dict[str, "Whole"])
    """Shapes from a config.json, by the name that the fleet gives the model; they win over the catalog's."""
    _wholes: dict[str, Whole | None] = field(default_factory=dict[str, "Whole | None"])
    _shapes: dict[tuple[str, ...], Shape | None] = field(default_factory=dict[tuple[str, ...], "Shape | None"])
    _rooms: dict[tuple[str, ...], Room | None] = field(default_factory=dict[tuple[str, ...], "Room | None"])

    def shape(self, model: Model) -> Shape | None:
        key = (
            model.name,
            model.source,
            str(model.vllm.quantization),
            str(model.vllm.dtype),
            str(model.vllm.kv_cache_dtype),
        )
        if key not in self._shapes:
            whole = self._whole(model)
            self._shapes[key] = self._shape(model, whole) if whole else None
        return self._shapes[key]

    def room(self, model: Model, engine: Engine, gpu: str, size: int, stages: int = 1) -> Room | None:
        flags = model.vllm.model_dump_json(exclude={"tensor_parallel_size", "data_parallel_size"})
        key = (model.name, model.source, flags, engine.version or "", gpu, f"{size} x {stages}")
        if key not in self._rooms:
            self._rooms[key] = self._room(model, engine, gpu, size, stages)
        return self._rooms[key]

    def room_on_cpu(self, model: Model, engine: Engine) -> Room | None:
        whole, told = self._whole(model), model.env.get(CPU_CACHE, "")
        # vLLM keeps recurrent states and latent caches otherwise on a CPU, which was not read.
        if whole is None or any(layer.mixer not in ("full", "sliding", "chunked") for layer in whole.layers):
            return None
        if not told.isdecimal() or not int(told):
            return None
        settings = replace(
            self._settings(model, engine, 1, 1),
            enforce_eager=True,
            block_size=_CPU_BLOCK,
            max_num_seqs=model.vllm.max_num_seqs or _CPU_SEQS,
            max_num_batched_tokens=model.vllm.max_num_batched_tokens or _CPU_BATCHED,
            kv_cache_memory_bytes=int(told) * GIB,
        )
        try:
            done = fit(whole, Board(CPU, (0.0, 0.0, 0.0), nvlink=False), settings, self.tables)
        except RefusedError as refused:
            return _refused(model, whole, refused)
        if done.fits:
            return Room(_machine(done), done.findings)
        have, need = f"{told} GiB for the KV cache", f"{done.needed_gib:.2f} GiB for one request"
        change = f"set env.{CPU_CACHE} to {math.ceil(done.needed_gib)}, or take a shorter max_model_len"
        red = Finding(
            "FIT-MEMORY", "red", model.name, have, f"{need} of {done.max_model_len} tokens", change, _SOURCE, True
        )
        return Room(_machine(done), (red,))

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
        if model.name in self.told:
            return self.told[model.name]
        name = _repository(model)
        if name not in self._wholes:
            row = next((row for row in self.shapes if name == row.model or name in row.also), None)
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
            each = matrices * (whole.experts.latent or whole.hidden) * whole.experts.intermediate
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

    def _settings(self, model: Model, engine: Engine, size: int, stages: int) -> Settings:
        release = release_of(self.catalog, engine)
        return Settings(
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

    def _room(self, model: Model, engine: Engine, gpu: str, size: int, stages: int) -> Room | None:
        whole = self._whole(model)
        board = next((row for row in self.catalog.gpus if row.name == gpu), None)
        if whole is None or board is None:
            return None
        settings = self._settings(model, engine, size, stages)
        try:
            done = fit(whole, board_of(board), settings, self.tables)
        except RefusedError as refused:
            return _refused(model, whole, refused)
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
    return re.split("@|==", model.source.partition(":")[2])[0]


def release_of(catalog: Catalog, engine: Engine) -> EngineRelease | None:
    """The release of an engine as far as a plan knows it: the one that is named, else the newest that can be locked."""
    rows = [row for row in catalog.engines if row.distribution == engine.distribution]
    if engine.version:
        return next((row for row in rows if row.version == engine.version), None)
    return max((row for row in rows if row.requirements), key=lambda row: numbers(row.version), default=None)


def _refused(model: Model, whole: Whole, refused: RefusedError) -> Room:
    have, change = _flags(refused.found), _flags(refused.change)
    told = Finding(refused.rule, "red", model.name, have, refused.why, change, whole.source, whole.verified)
    return Room(None, (told,))


def _exact(name: str, gib: float) -> Part:
    return Part(name=name, gib=gib, low=gib, high=gib)


def _machine(done: Fit) -> Memory:
    """Of an engine on a CPU: what it takes beside these two was not measured."""
    whole = round(done.weights_gib + done.kv_cache_gib, 4)
    parts = (_exact("weights", done.weights_gib), _exact("KV cache", done.kv_cache_gib))
    return _memory(done, 0).model_copy(update={"total_gib": whole, "requested_gib": whole, "parts": parts})


def _memory(done: Fit, starts: int) -> Memory:
    return Memory(
        gpu=done.gpu,
        tensor_parallel_size=done.gpus,
        engine=done.engine,
        fits=done.fits,
        total_gib=done.memory_gib,
        requested_gib=done.requested_gib,
        parts=(
            _exact("weights", done.weights_gib),
            _exact("activations", done.activation_gib),
            _exact("not PyTorch's", done.non_torch_gib),
            _exact("CUDA graphs", done.cudagraph_gib),
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
    own = layer.kept and layer.mixer in ("full", "sliding", "chunked")
    return layer.kv_heads * (layer.head_dim + layer.value_dim) if own else 0


def _flags(text: str) -> str:
    """The fleet's words for vLLM's flags: max_model_len for --max-model-len."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found.group(1).replace("-", "_"), text)
