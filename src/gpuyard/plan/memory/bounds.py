"""Bounds where nothing is reckoned: other engines as they are documented, and training, which is refused."""

from __future__ import annotations

import math

from gpuyard.catalog.memory import MemoryTables, OtherEngine
from gpuyard.plan.judge import Finding
from gpuyard.plan.memory.budget import GIB, Board, Term
from gpuyard.plan.memory.fit import Fit, Settings, checked, quantization_of
from gpuyard.plan.memory.kv import plan
from gpuyard.plan.memory.layers import CacheSettings, ranks_of
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.weights import weights_of
from gpuyard.spec.errors import RefusedError

# Weights and gradients in 2 bytes each, and AdamW's master weights and two moments in 4 each.
_TRAINED_BYTES = 16
_ADAPTER_SHARE = 0.01  # of the parameters, in a low-rank adapter


def bound(shape: Shape, board: Board, settings: Settings, other: OtherEngine, tables: MemoryTables) -> Fit:
    """What is left for the KV cache in another engine, between documented bounds. Raises RefusedError as `fit` does."""
    checked(shape, settings)
    quantization = quantization_of(tables, shape, settings.quantization)
    dtype = settings.dtype if settings.dtype and settings.dtype != "auto" else shape.dtype
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    length = settings.max_model_len or shape.max_model_len
    sizes = weights_of(shape, tensor, pipeline, quantization, dtype).per_rank
    if settings.draft:
        why = f"it is vLLM's: what a draft takes in {other.engine} is not known"
        raise RefusedError("FIT-SPECULATIVE", "--speculative-config", why, "leave it out for the bounds without it")
    weights = settings.weights_gib or max(sizes) / GIB
    low, likely, high = board.memory_gib
    told = settings.gpu_memory_utilization
    shares = (told, told, told) if told else other.fraction

    def left(memory: float, share: float, taken: float) -> float:
        return share * (memory - weights - taken) if other.of_free else share * memory - weights - taken

    least, middle, most = other.taken_gib
    kv = Term(left(low, shares[0], most), left(likely, shares[1], middle), left(high, shares[2], least))
    cache = CacheSettings(tensor, pipeline, other.block_size, settings.kv_cache_dtype, dtype, 1)
    ranks = ranks_of(shape, cache)
    # Layers with a window are taken to keep every token, which no engine exceeds.
    blocks = plan("one-group", ranks, [int(kv.likely * GIB)] * pipeline, length, length, tokens_by_concurrency=False)
    have = (
        f"{other.memory_per_weights:g} x its weights is {other.memory_per_weights * weights:.1f} GiB by rule of thumb"
    )
    finding = Finding(
        "FIT-BOUND", "amber", other.engine, have, "a start of it", "measure one", other.source, other.verified
    )
    return Fit(
        model=shape.name,
        gpu=board.name,
        gpus=tensor * pipeline,
        engine=other.engine,
        fits=blocks.starts and kv.likely > 0,
        surely=kv.low * GIB >= blocks.needed_bytes and kv.low > 0,
        memory_gib=likely,
        requested_gib=round(shares[1] * likely, 4),
        weights_gib=round(weights, 4),
        draft_gib=0.0,
        activation_gib=middle,
        non_torch_gib=0.0,
        cudagraph_gib=0.0,
        kv_cache_gib=round(kv.likely, 4),
        kv_cache_gib_low=round(kv.low, 4),
        kv_cache_gib_high=round(kv.high, 4),
        kv_cache_tokens=blocks.tokens,
        num_blocks=blocks.num_blocks,
        block_size=other.block_size,
        bytes_per_block=blocks.bytes_per_block,
        max_concurrency=round(blocks.max_concurrency, 4),
        needed_gib=round(blocks.needed_bytes / GIB, 4),
        max_model_len=length,
        max_num_seqs=settings.max_num_seqs or 0,
        max_num_batched_tokens=settings.max_num_batched_tokens or 0,
        gpu_memory_utilization=shares[1],
        findings=(finding,),
    )


def refuse_training(shape: Shape, board: Board, method: str) -> RefusedError:
    """Training is not planned here; what it takes at the least is told. `method`: full or lora."""
    parameters = weights_of(shape, 1, 1, None, "bfloat16").whole / 2
    trained = parameters if method == "full" else parameters * _ADAPTER_SHARE
    least = (trained * _TRAINED_BYTES + (0 if method == "full" else parameters * 2)) / GIB
    gpus = math.ceil(least / board.likely_gib)
    what = (
        "weights, gradients and AdamW's states"
        if method == "full"
        else "weights, and an adapter of 1 % with its states"
    )
    why = f"{what} take at least {least:.0f} GiB, and activations come on top: {gpus} x {board.name} or more"
    return RefusedError(
        "FIT-TRAINING", f"{method} fine-tuning of {shape.name}", why, "plan it with a training framework"
    )
