"""What is left for the KV cache: the memory that is asked for, less all that is taken before. In GiB on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuyard.catalog import numbers
from gpuyard.catalog.memory import EngineMemory, Forward, MemoryTables, Range
from gpuyard.catalog.rows import Gpu
from gpuyard.plan.memory.shape import Shape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Board:
    """A GPU as far as memory is concerned."""

    name: str
    memory_gib: Range
    """As CUDA reports it to PyTorch: less than the board's, by what driver and ECC keep."""
    nvlink: bool
    display: bool = False
    """A card for a desk, or one that is not known: more of its memory goes beside PyTorch's."""
    hopper: bool = False
    """Compute capability 9 or 10: PyTorch gives cuBLAS a larger workspace there."""

    @property
    def likely_gib(self) -> float:
        return self.memory_gib[1]


def board_of(gpu: Gpu) -> Board:
    """The board of a row of the catalog."""
    # Drivers differ in what they keep for themselves.
    spread = 0.15 if gpu.memory_measured else 0.4
    memory = (gpu.memory_gib - spread, gpu.memory_gib, gpu.memory_gib + spread)
    hopper = numbers(gpu.compute_capability)[0] in (9, 10)
    return Board(gpu.name, memory, gpu.nvlink, gpu.name.startswith("GeForce"), hopper)


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch, which the engine tries before it counts."""

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Term:
    """A share of the memory. Nine of ten starts lie between low and high."""

    low: float
    likely: float
    high: float


def engine_row(tables: MemoryTables, version: str) -> EngineMemory:
    """How this version shares memory out; a version before the first row is taken for it."""
    rows = sorted(tables.engines, key=lambda row: numbers(row.since))
    fitting = [row for row in rows if numbers(row.since) <= _whole(version)]
    return fitting[-1] if fitting else rows[0]


def _whole(version: str) -> tuple[int, ...]:
    """0.27 is 0.27.0."""
    return (*numbers(version), 0, 0, 0)[:3]


def batch_of(engine: EngineMemory, board: Board, seqs: int | None, batched: int | None, max_model_len: int) -> Batch:
    """The batch as told, and where it is not, the version's default on this GPU."""
    large = board.likely_gib >= 70 and "A100" not in board.name
    size = 2 if board.likely_gib >= 160 else int(large)
    if batched is None:
        whole = engine.chunked_above is not None and max_model_len <= engine.chunked_above
        batched = max(max_model_len, 2048) if whole else engine.batched[size]
    return Batch(min(seqs if seqs is not None else engine.seqs[int(large)], max(batched, 1)), batched)


def activation(shape: Shape, engine: EngineMemory, forward: Forward, batch: Batch, board: Board, tensor: int) -> Term:
    """Peak of the trial run: the larger of the forward pass and of the sampler over all sequences."""
    hidden = batch.max_num_batched_tokens * shape.hidden * 2 / GIB
    # Before 0.8 the trial run of a model that sees had as many sequences as images fit into a batch: one or two.
    rows = 1 if shape.multimodal and engine.first_rank_samples else batch.max_num_seqs
    logits = rows * shape.vocab / GIB
    wide = _forward(shape, forward, batch, tensor) / GIB
    experts = any(layer.experts for layer in shape.layers) and engine.keeps_expert_buffers
    # The sampler holds the hidden states of the whole batch, and those that it takes the logits of.
    kept = forward.sampler_hiddens * hidden + rows * shape.hidden * 2 / GIB
    kept += batch.max_num_batched_tokens * _routed(shape, tensor) * 2 / GIB if experts else 0.0
    dense = not shape.stateful and not any(layer.experts for layer in shape.layers)
    sizes = engine.dense_sampler_bytes if dense and engine.dense_sampler_bytes else engine.sampler_bytes
    sampler = [size * logits + kept for size in sizes]
    if engine.first_rank_samples and tensor > 1:
        sampler[0] = 0.0  # the other ranks log what is left on them, and any of these lines may be the one that is read
    encoder = [count * hidden for count in forward.encoder_hiddens] if shape.multimodal else (0.0, 0.0, 0.0)
    low, likely, high = (
        max(wide * spread, held) + forward.blas_gib[board.hopper] + seen
        for spread, held, seen in zip((forward.spread[0], 1.0, forward.spread[1]), sampler, encoder, strict=True)
    )
    return Term(low, likely, high)


def _forward(shape: Shape, forward: Forward, batch: Batch, tensor: int) -> float:
    """Bytes of the widest layer's buffers."""
    widest = 0.0
    for experts, intermediate in {(layer.experts, layer.intermediate) for layer in shape.layers}:
        width = forward.intermediates * intermediate / tensor
        if experts and shape.experts:
            width = max(width, _routed(shape, tensor) + 3 * shape.experts.shared_intermediate / tensor)
        widest = max(widest, width)
    return batch.max_num_batched_tokens * (widest + forward.hiddens * shape.hidden) * 2


def _routed(shape: Shape, tensor: int) -> float:
    """Elements of the buffers of a mixture of experts, for each token: gate and up or the output; and the product."""
    if shape.experts is None:
        return 0.0
    inner = shape.experts.intermediate / tensor
    return shape.experts.per_token * (max(2 * inner, shape.experts.latent or shape.hidden) + inner)


def non_torch(tables: MemoryTables, version: str, tensor: int, board: Board) -> Term:
    """The row for most GPUs, of the newest version that is not newer than this one."""
    rows = [
        row
        for row in tables.non_torch
        if numbers(row.since) <= _whole(version)
        and row.tensor_parallel_size <= tensor
        and row.nvlink in (None, board.nvlink)
    ]
    widest = max(row.tensor_parallel_size > 1 for row in rows)
    rows = [row for row in rows if (row.tensor_parallel_size > 1) == widest]
    row = max(rows, key=lambda row: (numbers(row.since), row.tensor_parallel_size))
    low, likely, high = row.gib
    least = tables.forward[0].display_gib if board.display and tensor == 1 else 0.0
    return Term(low, max(likely, least), max(high, 1.3 * least))


def graphs(shape: Shape, engine: EngineMemory, forward: Forward, eager: bool) -> Term:
    """The estimate that is kept free for CUDA graphs; before it was made, they came out of what was left over."""
    if eager or not engine.counts_graphs:
        return Term(0.0, 0.0, 0.0)
    count = len(shape.layers)
    low, likely, high = (
        base + each * count for base, each in zip(forward.graph_base_gib, forward.graph_gib, strict=True)
    )
    return Term(low, likely, high)


def left_over(asked: Term, taken: tuple[Term, ...]) -> Term:
    """What is left, with the interval that the terms' own add up to: they are taken to err apart from one another."""
    likely = asked.likely - sum(term.likely for term in taken)
    down = math.hypot(asked.likely - asked.low, *(term.high - term.likely for term in taken))
    up = math.hypot(asked.high - asked.likely, *(term.likely - term.low for term in taken))
    return Term(likely - down, likely, likely + up)
