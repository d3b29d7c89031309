"""What a model is made of, as far as memory is concerned. Counts are of parameters, sizes are in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mixer = Literal[
    "full", "sliding", "chunked", "cross", "mla", "delta", "kda", "mamba1", "mamba2", "lightning", "conv", "none"
]
"""How a layer mixes tokens. cross: it reads what an encoder made. delta, kda, lightning: kinds of linear attention.
conv: a short convolution alone."""
STATES = ("delta", "kda", "mamba1", "mamba2", "lightning", "conv")
"""Mixers that keep a state for each request in the place of a cache of tokens."""


@dataclass(frozen=True, slots=True)
class Layer:
    mixer: Mixer
    kv_heads: int
    head_dim: int
    window: int | None
    """Tokens of the window or chunk."""
    experts: bool
    """It has a mixture of experts."""
    intermediate: int
    """Width of its dense feed-forward part, which may stand beside the experts; 0: it has none."""
    value_dim: int
    """Size of a head's values, where that is not the size of its keys."""
    beside: Mixer = "none"
    """A state that it keeps beside its attention, as Falcon-H1."""
    kept: bool = True
    """It has a cache of its own, and does not read an earlier layer's."""
    extra: int = 0
    """Parameters of what else it has."""


@dataclass(frozen=True, slots=True)
class Experts:
    count: int
    per_token: int
    intermediate: int
    shared_intermediate: int
    """Width of all shared experts together."""
    latent: int | None = None
    """Width of what the experts see, where it is projected first; the shared ones see all."""


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
    index_heads: int = 0


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
    rank: int = 0
    """Of the low-rank part of Mamba's time step, or of the gates of KDA; 0: of full rank, or none."""


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
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
    kind: str = ""
    """Its model_type."""
    checked: bool = True
    """Models of its kind were counted and came out right."""
    encoder_tokens: int = 0
    """That an encoder makes of a request, for the layers that read them."""
    draft_vocab: int | None = None
    """Words that the head of a draft knows, where these are fewer."""
    source: str = ""
    verified: bool = True

    @property
    def kv_heads(self) -> int:
        return max((layer.kv_heads for layer in self.layers if layer.mixer != "none"), default=1)

    @property
    def attention_free(self) -> bool:
        return all(layer.mixer in (*STATES, "none") for layer in self.layers)

    @property
    def stateful(self) -> bool:
        return any(layer.mixer in STATES or layer.beside in STATES for layer in self.layers)
