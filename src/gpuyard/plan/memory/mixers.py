"""How each layer of a model mixes its tokens, by the words of its kind."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

from gpuyard.plan.memory.reader import Reader, listed
from gpuyard.plan.memory.shape import Latent, Linear, Mixer


class Mixed(NamedTuple):
    mixer: Mixer
    window: int | None = None
    part: Literal["any", "mlp", "experts", "bare"] = "any"
    """What else it has where layers have one part each; any: what its place among the layers says."""
    beside: Mixer = "none"


_PERIODS = {
    "gemma2": 2, "gpt_oss": 2, "cohere2": 4, "olmo3": 4, "exaone4": 4, "gemma3n": 5, "gemma3": 6,
}  # fmt: skip
"""Kinds of which every so many-th layer sees all where the file does not tell, and the others a window."""
_MAMBA1 = ("mamba", "falcon_mamba", "jamba")
_LETTERS: dict[str, Mixed] = {
    "M": Mixed("mamba2", part="bare"), "*": Mixed("full", part="bare"), "-": Mixed("none", part="mlp"),
    "E": Mixed("none", part="experts"),
}  # fmt: skip
_BLOCKS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
"""Words of nemotron_h for its letters."""


def linear_of(reader: Reader) -> tuple[Mixer, Linear] | None:
    """The kind of state that layers without a cache of tokens keep, and its sizes."""
    config, kind = reader.config, str(reader.config.get("model_type", ""))
    value_heads = reader.number("linear_num_value_heads")
    if value_heads:
        wide = config.get("mamba_ssm_dtype", "float32" if kind.startswith("qwen3_5") else "auto") == "float32"
        return "delta", Linear(
            key_heads=reader.number("linear_num_key_heads") or value_heads,
            value_heads=value_heads,
            key_dim=reader.number("linear_key_head_dim") or 128,
            value_dim=reader.number("linear_value_head_dim") or 128,
            convolution=reader.number("linear_conv_kernel_dim") or 4,
            state_bytes=4 if wide else 2,
        )
    told = cast("object", config.get("linear_attn_config"))
    if isinstance(told, dict):
        own = Reader(cast("dict[str, Any]", told), reader.name)
        heads, size = own.needed("num_heads"), own.needed("head_dim")
        rank = 0 if own.config.get("use_full_rank_gate") else size
        return "kda", Linear(heads, heads, size, size, own.number("short_conv_kernel_size") or 4, 4, rank)
    if convolution := reader.number("conv_L_cache"):
        return "conv", Linear(0, reader.needed("hidden_size"), 0, 1, convolution, 2)
    if kind.startswith("minimax") and ("attn_type_list" in config or "linear_attention" in str(config)):
        heads = reader.needed("num_attention_heads")
        size = reader.number("head_dim") or reader.needed("hidden_size") // heads
        return "lightning", Linear(heads, heads, size, size, 1, 2)
    return _mamba(reader, kind)


def _mamba(reader: Reader, kind: str) -> tuple[Mixer, Linear] | None:
    state = reader.number("mamba_d_state") or reader.number("ssm_state_size") or reader.number("state_size")
    if not state:
        return None
    hidden = reader.needed("hidden_size")
    convolution = reader.number("mamba_d_conv") or reader.number("conv_kernel") or 4
    wide = reader.config.get("mamba_ssm_cache_dtype", "float32" if kind == "nemotron_h" else "auto") == "float32"
    expanded = (reader.number("mamba_expand") or reader.number("expand") or 2) * hidden
    if kind in _MAMBA1:
        # A file may tell what it expands to in itself.
        inner = (reader.number("intermediate_size") if kind != "jamba" else None) or expanded
        rank = reader.number("mamba_dt_rank") or reader.number("time_step_rank") or -(-hidden // 16)
        return "mamba1", Linear(0, inner, state, 1, convolution, 4 if wide else 2, rank)
    heads = reader.number("mamba_n_heads") or reader.number("mamba_num_heads") or reader.number("n_mamba_heads")
    heads = heads or reader.number("num_heads") or 128
    width = reader.number("mamba_d_head") or reader.number("mamba_head_dim") or reader.number("mamba_headdim")
    width = width or (reader.number("mamba_d_ssm") or expanded) // heads
    return "mamba2", Linear(reader.number("groups") or 1, heads, state, width, convolution, 4 if wide else 2)


def mixers_of(reader: Reader, count: int, latent: Latent | None, linear: tuple[Mixer, Linear] | None) -> list[Mixed]:
    """One for each layer, from the first on. Raises RefusedError where the file tells of fewer layers than it has."""
    config, kind = reader.config, str(reader.config.get("model_type", ""))
    full: Mixer = "mla" if latent else "full"
    window = reader.number("sliding_window") if config.get("use_sliding_window", True) else None
    chunk = reader.number("attention_chunk_size")
    state: Mixer = linear[0] if linear else "none"
    types = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    if isinstance(pattern := config.get("hybrid_override_pattern"), str):
        return [_LETTERS.get(letter, Mixed("none", part="bare")) for letter in pattern]
    if isinstance(types, list) and types:
        told = [str(item) for item in cast("list[Any]", types)]
        if len(told) < count:
            raise reader.refused("layer_types", f"{len(told)} of {count} layers are told", "tell every layer")
        if kind.startswith("nemotron_h"):
            return [_LETTERS.get(_BLOCKS.get(word, ""), Mixed("none", part="bare")) for word in told]
        return [_worded(word, window, chunk, full, state) for word in told[:count]]
    if where := listed(config.get("attn_layer_indices")):
        return [Mixed(full if index in where else state) for index in range(count)]
    if isinstance(own := config.get("linear_attn_config"), dict):
        # Counted from 1.
        seen = listed(cast("dict[str, Any]", own).get("full_attn_layers"))
        return [Mixed(full if index + 1 in seen else state) for index in range(count)]
    swapped: dict[str, tuple[Mixer, Mixer]] = {
        "attn_type_list": (state, full),
        "hybrid_layer_pattern": (full, "sliding"),
    }
    for word, swaps in swapped.items():
        flags = cast("object", config.get(word))
        if isinstance(flags, list) and len(cast("list[Any]", flags)) >= count:
            return [_seen(swaps[1] if flag else swaps[0], window) for flag in cast("list[Any]", flags)[:count]]
    if kind == "falcon_h1":
        return [Mixed(full, beside=state)] * count
    step = reader.number("full_attention_interval") or reader.number("attn_layer_period")
    if linear and step:
        offset = reader.number("attn_layer_offset")
        at = step - 1 if offset is None else offset
        return [Mixed(full if index % step == at else state) for index in range(count)]
    if linear and reader.number("num_attention_heads") is None:
        return [Mixed(state, part="bare")] * count
    if latent:
        return [Mixed("mla")] * count
    return _windows(reader, kind, count, window, chunk)


def _windows(reader: Reader, kind: str, count: int, window: int | None, chunk: int | None) -> list[Mixed]:
    """Of a model whose layers differ in how far they see, if in anything."""
    lettered = cast("object", reader.config.get("sliding_window_pattern"))
    if isinstance(lettered, str) and lettered and window:
        return [Mixed("sliding", window) if lettered[index % len(lettered)] == "L" else Mixed("full")
                for index in range(count)]  # fmt: skip
    known = next((period for name, period in _PERIODS.items() if kind.startswith(name)), 0)
    period = (reader.number("sliding_window_pattern") if not isinstance(lettered, str) else None) or known
    if window and period > 1:
        return [Mixed("full") if (index + 1) % period == 0 else Mixed("sliding", window) for index in range(count)]
    if kind.startswith("llama4"):
        return [Mixed("full") if (index + 1) % 4 == 0 else Mixed("chunked", chunk or 8192) for index in range(count)]
    if window and window < (reader.number("max_position_embeddings") or 2**40):
        return [Mixed("sliding", window)] * count
    return [Mixed("full")] * count


def _worded(word: str, window: int | None, chunk: int | None, full: Mixer, state: Mixer) -> Mixed:
    if "sliding" in word and window:
        return Mixed("sliding", window)
    if "chunked" in word and chunk:
        return Mixed("chunked", chunk)
    if word == "hybrid":
        return Mixed(full, beside=state)
    if word in ("mlp", "moe", "ffn"):
        return Mixed("none")
    return Mixed(full if "attention" in word and "linear" not in word else state)


def _seen(mixer: Mixer, window: int | None) -> Mixed:
    return Mixed(mixer, window if mixer == "sliding" else None)
