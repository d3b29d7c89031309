"""What is known of memory: how vLLM shares it out by version, bytes of quantised weights, shapes of models."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from gpuyard.catalog import _read  # pyright: ignore[reportPrivateUsage]
from gpuyard.catalog.rows import Row
from gpuyard.spec.closed import Closed, Dotted

Range = tuple[float, float, float]
"""Low, likely, high: nine of ten starts lie between low and high."""


class EngineMemory(Row):
    """How vLLM shares memory out, from this version on, until a later row."""

    since: Dotted
    utilization: float
    """Default of --gpu-memory-utilization."""
    planner: Literal[
        "one-group", "groups", "groups-1.25", "groups-first", "stages-first", "groups-1.5", "padded", "padded-null"
    ]
    tokens_by_concurrency: bool
    """It prints max_concurrency x max_model_len; before: blocks of one group x its block size."""
    states_per_request: int
    """Blocks that a request holds of a layer of Mamba or a gated delta net: 2 with prefix caching."""
    batches_in_flight: int
    """Batches whose blocks outside of a window are not freed yet."""
    first_rank_samples: bool
    """Only the first rank of a tensor-parallel group samples, so that only it has the sampler's peak."""
    chunked_above: int | None
    """Prefill is chunked above this max_model_len only, else a batch has max_model_len tokens; None: always."""
    seqs: tuple[int, int]
    """Default of --max-num-seqs: below 70 GiB and on an A100; above."""
    batched: tuple[int, int, int]
    """Default of --max-num-batched-tokens of the server: as above, and from 160 GiB on."""
    sampler_bytes: Range
    """Bytes for each logit (max_num_seqs x vocabulary) at the peak of the sampler."""
    dense_sampler_bytes: Range | None
    """The same of a model without experts and without recurrent states, where it runs otherwise than the others."""
    keeps_expert_buffers: bool
    """Buffers of a mixture of experts stay while the sampler runs."""
    counts_graphs: bool
    """An estimate of the memory of CUDA graphs is kept free."""


class NonTorch(Row):
    """Memory that is not PyTorch's: NCCL, custom all-reduce, workspaces of libraries. GiB on each GPU."""

    since: Dotted
    tensor_parallel_size: int
    """For this size and above."""
    nvlink: bool | None
    """None: with and without."""
    gib: Range


class Quantization(Row):
    """Bytes of weights that are quantised."""

    method: str
    names: tuple[str, ...]
    """What --quantization, quant_method and people call it."""
    bits: float
    group: int | None
    """Weights that share a scale, where the file does not tell."""
    bytes_per_group: float
    """Of the scale and the zero point."""
    parts: tuple[Literal["attention", "mlp", "experts", "shared"], ...]
    expert_rounding: int | None
    """The width of an expert on a rank is rounded up to this."""


class Forward(Row):
    """Peak of a forward pass and what goes with it. Elements for each token of a batch."""

    intermediates: float
    """Buffers as wide as the feed-forward part."""
    hiddens: float
    """Buffers as wide as the model."""
    sampler_hiddens: float
    """Buffers as wide as the model that are still held while the sampler runs."""
    blas_gib: tuple[float, float]
    """Workspace that PyTorch gives cuBLAS: in general, and on compute capability 9 and 10."""
    spread: tuple[float, float]
    """Low and high as shares of what is likely."""
    encoder_hiddens: Range
    """Buffers as wide as the model that one that sees or hears adds."""
    graph_gib: Range
    """Estimate of CUDA graphs: for each layer."""
    graph_base_gib: Range
    display_gib: float
    """The least that is likely beside PyTorch's memory on a card for a desk, alone."""
    weights_spread: tuple[float, float]
    """Low and high of weights that come from the config alone, as shares."""


class OtherEngine(Row):
    """Bounds for an engine whose planning is not reckoned, as documented."""

    engine: Literal["sglang", "tensorrt-llm"]
    fraction: Range
    of_free: bool
    """The fraction is of what is free once weights and buffers are there; else of the whole, with the weights in it."""
    taken_gib: Range
    """Buffers and libraries."""
    block_size: int
    memory_per_weights: float
    """Rule of thumb: memory that a model needs, by its weights."""


class ModelShape(Row):
    """A model whose config.json is known."""

    model: str
    config: dict[str, Any]
    also: tuple[str, ...] = ()
    """Other repositories and packages with this very model, as a fleet's `source` names them."""


class MemoryTables(Closed):
    engines: tuple[EngineMemory, ...]
    non_torch: tuple[NonTorch, ...]
    quantizations: tuple[Quantization, ...]
    forward: tuple[Forward, ...]
    others: tuple[OtherEngine, ...]

    def tables(self) -> dict[str, tuple[Row, ...]]:
        return {f"memory.{name}": getattr(self, name) for name in MemoryTables.model_fields}


@cache
def load_memory() -> MemoryTables:
    """The tables that `fit` reckons with."""
    return TypeAdapter(MemoryTables).validate_json(json.dumps(_read("memory")))


@cache
def load_shapes() -> tuple[ModelShape, ...]:
    """Models whose shape is known without their files."""
    return TypeAdapter(tuple[ModelShape, ...]).validate_json(json.dumps(_read("model_shapes")))
