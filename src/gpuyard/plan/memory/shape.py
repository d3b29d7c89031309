"""What a model is made of, as far as memory is concerned. Counts are of parameters, sizes are in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mixer = Literal["full", "sliding", "chunked", "mla", "delta", "mamba2", "none"]
"""How a layer mixes tokens; delta: gated delta net and kin (linear attention)."""


@dataclass(frozen=True, slots=True)
class Layer:
    mixer: Mixer
    kv_heads: int
    head_dim: int
    window: int | None
    """Tokens of the window or chunk."""
    experts: bool
    """Its feed-forward part is a mixture of experts."""


@dataclass(frozen=True, slots=True)
class Experts:
    count: int
    per_token: int
    intermediate: int
    shared_intermediate: int
    """Width of all shared experts together."""


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention."""

    q_rank: int | None
    kv_rank: int
    rope: int
    nope: int
    value: int
    index_head_dim: int
    """Of the indexer of sparse attention, which keeps keys of its own; 0: none."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The state of a layer without a cache of tokens."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: int
    """Tokens that the convolution before it looks at."""
    state_bytes: int
    """Bytes of one value of the recurrent state."""


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    tied: bool
    """Input embedding and output head are one."""
    max_model_len: int
    dtype: str
    gated: bool
    """The feed-forward part has a gate: three matrices instead of two."""
    attention_gate: bool
    """The query projection also makes a gate of the output."""
    experts: Experts | None
    latent: Latent | None
    linear: Linear | None
    quantization: str | None
    """The method that its files are quantised with, as vLLM names it."""
    bits: int | None
    """Of a weight, where the file tells."""
    group: int | None
    """Weights that share one scale."""
    unquantized: tuple[str, ...]
    """Parts that stay in dtype: attention, experts, mlp, shared."""
    cache_dtype: str | None
    """What its files say that the cache is kept in, for --kv-cache-dtype auto; None: the model's dtype."""
    extra_params: int
    """Of vision and audio towers and other parts that are sharded and not quantised."""
    whole_params: int
    """Of a tower that is kept whole on every rank."""
    multimodal: bool
    files: tuple[int, int] | None = None
    """Of its files: values in 16 or 32 bits, which are served in dtype, and bytes of all others; None: not at hand."""
    source: str = ""
    verified: bool = True

    @property
    def kv_heads(self) -> int:
        return max((layer.kv_heads for layer in self.layers), default=1)

    @property
    def attention_free(self) -> bool:
        return all(layer.mixer in ("delta", "mamba2", "none") for layer in self.layers)
