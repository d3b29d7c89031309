"""From a model's layers to what each keeps in the KV cache on one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuyard.plan.memory.kv import Spec
from gpuyard.plan.memory.shape import STATES, Layer, Linear, Mixer, Shape
from gpuyard.plan.memory.speculative import Draft, draft_layers
from gpuyard.plan.memory.weights import DTYPE_BYTES, stage_layers

KV_DTYPES = (
    "auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla", "fp8_per_token_head", "int8",
    "int8_per_token_head", "nvfp4",
)  # fmt: skip
"""Of --kv-cache-dtype, as far as their bytes are known."""
_LATENT_TOKENS = 128  # of latent attention
_KERNEL_TOKENS = 16  # blocks of attention are a multiple of this where they grow to the page of a state


@dataclass(frozen=True, slots=True)
class CacheSettings:
    tensor: int
    pipeline: int
    block_size: int
    dtype: str
    """Of the cache; auto: the model's."""
    model_dtype: str
    states_per_request: int
    draft: Draft | None = None
    grows_by_block: bool = False
    """Where blocks grow to the page of a state, they grow by block_size, not by what the kernels want."""


def ranks_of(shape: Shape, settings: CacheSettings) -> list[list[tuple[str, Spec]]]:
    """The layers with a cache of each pipeline stage, by name."""
    known = {layer: _specs(shape, layer, settings) for layer in set(shape.layers)}
    kept = [(index, spec) for index, layer in enumerate(shape.layers) for spec in known[layer]]
    own, drafting = draft_layers(settings.draft, shape) if settings.draft else (shape, ())
    ranks_draft = replace(settings, tensor=settings.draft.tensor) if settings.draft else settings
    # The draft's caches come after the last stage's.
    kept += [(len(shape.layers), spec) for layer in drafting for spec in _specs(own, layer, ranks_draft)]
    specs = [spec for _, spec in kept]
    states = [spec for spec in specs if spec.kind == "mamba"]
    tokens = [spec for spec in specs if spec.kind != "mamba"]
    if states and tokens:
        # One pool serves both, so blocks of tokens grow until they hold a state, and states are padded to their page.
        state, token = max(spec.unit_bytes for spec in states), max(spec.unit_bytes for spec in tokens)
        step = _LATENT_TOKENS if shape.latent else _KERNEL_TOKENS
        step = max(step, settings.block_size) if settings.grows_by_block else step
        size = max(_up(_up(state, token), step) * step, settings.block_size)
        specs = [
            replace(spec, block_size=size, padded=size * token if spec.kind == "mamba" else None) for spec in specs
        ]
    named = [
        (index, f"layers.{index}.{count}", spec)
        for count, ((index, _), spec) in enumerate(zip(kept, specs, strict=True))
    ]
    ranks: list[list[tuple[str, Spec]]] = []
    for stage in range(settings.pipeline):
        within = stage_layers(len(shape.layers), stage, settings.pipeline)
        last = stage == settings.pipeline - 1
        mine = {*within, len(shape.layers)} if last else {*within}
        ranks.append([(name, spec) for index, name, spec in named if index in mine])
    return ranks


def token_bytes(layer: Layer, settings: CacheSettings) -> int:
    """Bytes that a layer of attention keeps for one token on one rank. K and V both count; heads are never cut."""
    heads = max(1, layer.kv_heads // settings.tensor)
    dtype, size = settings.dtype, layer.head_dim + layer.value_dim
    if dtype.startswith("nvfp4"):
        return heads * (size // 2 + size // 16)
    extra = 2 * heads * 4 if dtype.endswith("per_token_head") else 0
    return heads * size * _bytes(settings) + extra


def _bytes(settings: CacheSettings) -> int:
    if settings.dtype.startswith(("fp8", "int8")):
        return 1
    return DTYPE_BYTES.get(settings.model_dtype if settings.dtype == "auto" else settings.dtype, 2)


def _specs(shape: Shape, layer: Layer, settings: CacheSettings) -> list[Spec]:
    """What a layer keeps: nothing, a cache, a state, or both."""
    mixers = (layer.mixer, layer.beside) if layer.kept else (layer.beside,)
    return [spec for mixer in mixers if (spec := _spec(shape, layer, mixer, settings))]


def _spec(shape: Shape, layer: Layer, mixer: Mixer, settings: CacheSettings) -> Spec | None:
    size = settings.block_size
    if mixer == "none":
        return None
    if mixer == "mla":
        if shape.latent is None:
            return None
        width = shape.latent.kv_rank + shape.latent.rope
        # The scaled format keeps the rotary part in 16 bits, and four scales.
        own = 656 if settings.dtype == "fp8_ds_mla" else width * _bytes(settings)
        index = shape.latent.index_head_dim
        # The indexer keeps a key in 8 bits and a scale in 4 bytes for 128 values.
        return Spec("mla", size, own + (index + _up(index, 128) * 4 if index else 0))
    if mixer in STATES:
        if shape.linear is None:
            return None
        states = settings.states_per_request + (settings.draft.tokens if settings.draft else 0)
        return Spec("mamba", size, _state(mixer, shape.linear, settings.tensor), states=states)
    heads = max(1, layer.kv_heads // settings.tensor)
    if mixer == "cross":
        return Spec("cross", size, token_bytes(layer, settings), shape.encoder_tokens, layout=(heads, layer.head_dim))
    kind = "sliding" if mixer == "sliding" else "chunked" if mixer == "chunked" else "full"
    return Spec(kind, size, token_bytes(layer, settings), layer.window, layout=(heads, layer.head_dim))


def _state(mixer: Mixer, linear: Linear, tensor: int) -> int:
    keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
    if mixer == "mamba2" and linear.key_heads % tensor:
        # Where ranks do not divide the groups, each has one of its own.
        keys = tensor * linear.key_dim
    convolution = (linear.convolution - 1) * (2 * keys + values) // tensor * 2
    return convolution + values * linear.key_dim // tensor * linear.state_bytes


def _up(number: int, step: int) -> int:
    return -(-number // step)
