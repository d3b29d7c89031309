"""Bytes of a model's weights on each rank, after sharding and quantisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gpuyard.catalog.memory import Quantization
from gpuyard.plan.memory.shape import STATES, Latent, Layer, Linear, Mixer, Shape

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "auto": 2, "float": 4, "float32": 4}
_VOCAB_ROUNDING = 64  # vLLM pads the vocabulary to this many rows for each rank


@dataclass(frozen=True, slots=True)
class Weights:
    per_rank: tuple[int, ...]
    """Bytes for each pipeline stage, the first first; ranks of one stage hold the same."""
    whole: int
    """Bytes of the model without any sharding, as its files hold it."""


def weights_of(shape: Shape, tensor: int, pipeline: int, quantization: Quantization | None, dtype: str) -> Weights:
    """The heaviest rank is what counts where one rank decides for all; files' own sum, where known, scales the rest."""
    per_rank = tuple(_stage(shape, stage, tensor, pipeline, quantization, dtype) for stage in range(pipeline))
    whole = _stage(shape, 0, 1, 1, quantization, dtype)
    # Files in another precision than the one they are served in say nothing of the bytes in memory.
    if shape.files and (quantization is None) == (shape.quantization is None):
        held = shape.files[0] * DTYPE_BYTES.get(dtype, 2) + shape.files[1]
        return Weights(tuple(int(size * held / whole) for size in per_rank), held)
    return Weights(per_rank, whole)


def stage_layers(count: int, stage: int, pipeline: int) -> range:
    """Layers of a pipeline stage. What remains goes one each to the later stages, but not to the last."""
    base, rest = divmod(count, pipeline)
    sizes = [base] * pipeline
    for extra in range(rest):
        sizes[pipeline - 2 - extra % max(pipeline - 1, 1)] += 1
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


def _stage(shape: Shape, stage: int, tensor: int, pipeline: int, quantization: Quantization | None, dtype: str) -> int:
    bare = DTYPE_BYTES.get(dtype, 2)
    # Most layers are alike, and a plan asks this of many models on many boards.
    alike = Counter(shape.layers[index] for index in stage_layers(len(shape.layers), stage, pipeline))
    total = sum(count * layer_bytes(shape, layer, tensor, quantization, dtype) for layer, count in alike.items())
    vocab = vocab_rows(shape.vocab, tensor)
    first, last = stage == 0, stage == pipeline - 1
    total += (first + (last and (not shape.tied or not first))) * vocab * shape.hidden * bare
    total += last * shape.hidden * bare + first * (shape.extra_params / tensor + shape.whole_params) * bare
    return int(total)


def vocab_rows(words: int, tensor: int) -> int:
    """Rows that each rank has of an embedding or of a head, padded."""
    return -(-words // (_VOCAB_ROUNDING * tensor)) * _VOCAB_ROUNDING


def layer_bytes(shape: Shape, layer: Layer, tensor: int, quantization: Quantization | None, dtype: str) -> float:
    """Of one layer on each rank."""
    bare, packed = DTYPE_BYTES.get(dtype, 2), _bytes_of(shape, quantization)
    kept = shape.unquantized if quantization and quantization.method == shape.quantization else ()

    def size(part: str) -> float:
        plain = part == "plain" or quantization is None or part in kept or part not in quantization.parts
        return bare if plain else packed

    return sum(params * size(part) for part, params in _layer(shape, layer, tensor, quantization).items())


def _bytes_of(shape: Shape, quantization: Quantization | None) -> float:
    if quantization is None:
        return 2.0
    bits = shape.bits if shape.bits and quantization.method == shape.quantization else quantization.bits
    group = shape.group if shape.group and quantization.method == shape.quantization else quantization.group
    return bits / 8 + (quantization.bytes_per_group / group if group else 0.0)


def _layer(shape: Shape, layer: Layer, tensor: int, quantization: Quantization | None) -> Mapping[str, float]:
    """Parameters by part; `plain` is what is never quantised."""
    hidden = shape.hidden
    parts: dict[str, float] = {"plain": 2.0 * hidden + layer.extra, "attention": 0.0}
    if layer.mixer == "mla" and shape.latent:
        parts["attention"] += _latent(shape, shape.latent, tensor)
        # vLLM keeps the up-projection a second time, in dtype, for decoding.
        parts["plain"] += shape.latent.kv_rank * shape.heads / tensor * (shape.latent.nope + shape.latent.value)
    for mixer in (layer.mixer, layer.beside):
        if mixer in STATES and shape.linear:
            parts["attention"] += _linear(hidden, shape.linear, mixer) / tensor
    if layer.mixer in ("full", "sliding", "chunked", "cross"):
        own = max(1.0, layer.kv_heads / tensor) * (layer.head_dim + layer.value_dim)
        queries = shape.heads / tensor * ((1 + shape.attention_gate) * layer.head_dim + layer.value_dim)
        parts["attention"] += hidden * (queries + own)
    matrices = 3 if shape.gated else 2
    parts["mlp"] = matrices * hidden * layer.intermediate / tensor
    if layer.experts and shape.experts:
        experts = shape.experts
        width = experts.intermediate / tensor
        if quantization and quantization.expert_rounding:
            width = -(-width // quantization.expert_rounding) * quantization.expert_rounding
        parts["experts"] = matrices * (experts.latent or hidden) * experts.count * width
        parts["shared"] = matrices * hidden * experts.shared_intermediate / tensor
        parts["plain"] += hidden * experts.count + 2 * hidden * (experts.latent or 0)
    return parts


def _latent(shape: Shape, latent: Latent, tensor: int) -> float:
    hidden, own = shape.hidden, shape.heads / tensor
    queries = own * (latent.nope + latent.rope)
    q = hidden * latent.q_rank + latent.q_rank * queries if latent.q_rank else hidden * queries
    # The down-projections are whole on every rank.
    down = hidden * (latent.kv_rank + latent.rope)
    up = latent.kv_rank * own * (latent.nope + latent.value)
    index = latent.index_heads * ((latent.q_rank or hidden) * latent.index_head_dim + hidden)
    return q + down + up + own * latent.value * hidden + index + hidden * latent.index_head_dim


def _linear(hidden: int, linear: Linear, mixer: Mixer) -> float:
    """Projections into a state and out of it, with what is convolved before."""
    keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
    out = values * hidden
    match mixer:
        case "mamba1":
            steps = linear.rank * 2 * values + values * (2 * linear.key_dim + linear.convolution)
            return 2 * hidden * values + steps + values * linear.key_dim + out
        case "mamba2":
            convolved = (2 * keys + values) * linear.convolution
            return hidden * (2 * keys + 2 * values + linear.value_heads) + convolved + out
        case "kda":
            gates = 2 * linear.rank * (hidden + values) if linear.rank else 2 * hidden * values
            convolved = (2 * keys + values) * linear.convolution
            return hidden * (2 * keys + values + linear.value_heads) + gates + convolved + out
        case "lightning":
            return hidden * (2 * keys + 2 * values) + out
        case "conv":
            return 3 * hidden * values + values * linear.convolution + out
        case _:
            convolved = (2 * keys + values) * linear.convolution
            return hidden * (2 * keys + 2 * values + 2 * linear.value_heads) + convolved + out
