"""From a model's config.json to its shape. What it leaves out has its kind's default; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from gpuyard.plan.memory.shape import Experts, Latent, Layer, Linear, Mixer, Shape
from gpuyard.spec.errors import RefusedError

_ABSURD = 2**53  # no whole number beyond this is exact in JSON
_MOST = {"hidden_size": 131_072, "num_hidden_layers": 1_000, "vocab_size": 4_000_000, "num_attention_heads": 4_096}
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": (
        "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num",
    ),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "d_ff"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length",
    ),
    "experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts",
    ),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_width": ("shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size"),
    "dense_layers": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "expert_step": ("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period"),
}  # fmt: skip
_UNGATED = (
    "opt", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "bloom", "falcon", "phi", "starcoder2", "mpt",
    "nemotron", "nemotron_h", "persimmon", "bert", "roberta", "xlm-roberta",
)  # fmt: skip
"""Kinds whose feed-forward part has two matrices: no gate."""
_LINEAR = ("linear_attention", "mamba", "mamba2", "gated_delta_net", "kda", "linear", "recurrent", "gdn")


# A config.json leaves out what its class in transformers has by default. Those that published ones rely on.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                    "max_position_embeddings": 131_072, "sliding_window": 4096},
    "llama": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32_000, "max_position_embeddings": 2048},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 131_072},
    "phi3": {"vocab_size": 32_064},
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
    "gemma": {"head_dim": 256},
}  # fmt: skip


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config.json tells. Raises RefusedError: FIT-CONFIG names the field and what would pass."""
    text = _text(config)
    reader = _Reader(text, name)
    latent, linear, experts = _latent(reader), _linear(reader), _experts(reader, config)
    hidden, count = reader.needed("hidden_size"), reader.needed("num_hidden_layers")
    # A model of states alone has heads of states and no others.
    heads = reader.number("num_attention_heads") or (linear.value_heads if linear else 0)
    heads = heads or reader.needed("num_attention_heads")
    vocab = reader.needed("vocab_size")
    if hidden < heads:
        raise reader.refused("hidden_size", f"{hidden} is less than its {heads} attention heads", "set it as trained")
    kv_heads = reader.number("num_key_value_heads") or (1 if text.get("multi_query") else heads)
    head_dim = reader.number("head_dim") or hidden // heads
    if kv_heads > heads or heads % kv_heads:
        raise reader.refused(
            "num_key_value_heads", f"{kv_heads} do not divide the {heads} attention heads", f"e.g. {heads}"
        )
    mixers = _mixers(reader, count, latent, linear)
    wide = reader.number("global_head_dim"), reader.number("num_global_key_value_heads")
    dense_first, step = reader.number("dense_layers") or 0, reader.number("expert_step") or 1
    offset = reader.number("expert_layer_offset")
    sparse = step - 1 if offset is None else offset
    listed = cast("object", text.get("mlp_only_layers"))
    dense = [item for item in cast("list[Any]", listed) if _whole(item)] if isinstance(listed, list) else []
    told = cast("object", text.get("mlp_layer_types"))
    if isinstance(told, list):
        dense += [index for index, kind in enumerate(cast("list[Any]", told)) if kind == "dense"]
    layers = tuple(
        Layer(
            mixer=mixer,
            kv_heads=wide[1] or kv_heads if mixer == "full" else kv_heads,
            head_dim=wide[0] or head_dim if mixer == "full" else head_dim,
            window=window,
            experts=bool(experts) and index >= dense_first and index not in dense and index % step == sparse % step,
        )
        for index, (mixer, window) in enumerate(mixers)
    )
    method, bits, group, unquantized = _quantization(config, text)
    towers = {
        key: _tower(cast("Mapping[str, Any]", text[key]), hidden)
        for key in ("vision_config", "audio_config", "vision_encoder")
        if isinstance(text.get(key), Mapping)
    }
    # Mistral's own format keeps its tower whole on every rank.
    whole = towers.get("vision_encoder", 0)
    each = (reader.number("hidden_size_per_layer_input") or 0) * count
    bare = reader.number("num_attention_heads") is None
    wanted = experts.intermediate if experts else 0 if bare else 4 * hidden
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=reader.number("intermediate_size_mlp") or reader.number("intermediate_size") or wanted,
        vocab=vocab,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", _ties(config)))),
        max_model_len=_longest(reader),
        dtype=_dtype(config, text),
        gated=text.get("model_type") not in _UNGATED,
        attention_gate=bool(text.get("attn_output_gate", "qwen3_next" in str(text.get("model_type", "")))),
        experts=experts,
        latent=latent,
        linear=linear,
        quantization=method,
        bits=bits,
        group=group,
        unquantized=unquantized,
        cache_dtype=_cache_dtype(config, text),
        whole_params=whole,
        # Beside the towers: embeddings of each layer's own, as of gemma3n.
        extra_params=sum(towers.values()) - whole + each * (reader.number("vocab_size_per_layer_input") or vocab),
        multimodal=bool(towers),
        source="its config.json",
    )


def _whole(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < _ABSURD and value == int(value)


class _Reader:
    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def number(self, key: str) -> int | None:
        """A whole number above nothing, by any of its names; None where it is not told."""
        for alias in _ALIASES.get(key, (key,)):
            value = self.config.get(alias)
            if isinstance(value, list) and value and all(map(_whole, cast("list[Any]", value))):
                value = max(cast("list[int]", value))  # told layer by layer: the widest
            if value is None or isinstance(value, (list, dict)):
                continue
            if not _whole(value):
                raise self.refused(alias, f"{value!r} is no whole number above 0", "set it as the model was trained")
            if int(value) > _MOST.get(key, _ABSURD):
                raise self.refused(alias, f"{value} is more than any model has", f"at most {_MOST[key]}")
            return int(value) or None
        return None

    def needed(self, key: str) -> int:
        value = self.number(key)
        if value is None:
            names = " or ".join(_ALIASES.get(key, (key,)))
            raise self.refused(key, "it is not there, or 0", f"add {names}")
        return value

    def refused(self, field: str, why: str, change: str) -> RefusedError:
        return RefusedError("FIT-CONFIG", f"{self.name}: {field}", why, change)


def _longest(reader: _Reader) -> int:
    """Tokens of context, with the scaling of positions that vLLM multiplies by."""
    told = reader.number("max_position_embeddings") or 2048
    scaling = cast("object", reader.config.get("rope_scaling") or reader.config.get("rope_parameters"))
    if not isinstance(scaling, Mapping):
        return told
    own = cast("Mapping[str, Any]", scaling)
    factor, original = own.get("factor"), own.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not 1 <= factor <= 1024:
        return told
    match str(own.get("rope_type") or own.get("type")):
        case "yarn":
            return int(original * factor) if _whole(original) and original else told
        case "linear" | "dynamic":
            return int(told * factor)
        case _:
            return told


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that speaks of the language model."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            inner = cast("Mapping[str, Any]", config[key])
            # Only a part of a larger model is as short as to rely on its class: elsewhere a missing field is a mistake.
            own = _DEFAULTS.get(str(inner.get("model_type")), {})
            return {**own, **config, **inner}
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping):
        return _text(cast("Mapping[str, Any]", thinker))
    parts = [config[key] for key in ("attn_config", "ffn_config") if isinstance(config.get(key), Mapping)]
    return {key: value for part in [*parts, config] for key, value in part.items()}


def _ties(config: Mapping[str, Any]) -> bool:
    """Families that tie unless they say otherwise."""
    return str(config.get("model_type", "")).startswith(("gemma", "opt", "gpt2", "bloom", "falcon", "cohere"))


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    told = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "bfloat16")
    # vLLM serves a float32 model in 16 bits unless it is told otherwise.
    return "float16" if told == "float32" else told.removeprefix("torch.")


def _latent(reader: _Reader) -> Latent | None:
    rank = reader.number("kv_lora_rank")
    if rank is None:
        return None
    return Latent(
        q_rank=reader.number("q_lora_rank"),
        kv_rank=rank,
        rope=reader.number("qk_rope_head_dim") or 64,
        nope=reader.number("qk_nope_head_dim") or 128,
        value=reader.number("v_head_dim") or 128,
        index_head_dim=reader.number("index_head_dim") or 0,
    )


def _state_dtype(reader: _Reader) -> str:
    """Of the recurrent state, where a family has its own whatever the file tells."""
    return "float32" if str(reader.config.get("model_type", "")).startswith("qwen3_5") else "auto"


def _linear(reader: _Reader) -> Linear | None:
    value_heads = reader.number("linear_num_value_heads")
    if value_heads:
        return Linear(
            key_heads=reader.number("linear_num_key_heads") or value_heads,
            value_heads=value_heads,
            key_dim=reader.number("linear_key_head_dim") or 128,
            value_dim=reader.number("linear_value_head_dim") or 128,
            convolution=reader.number("linear_conv_kernel_dim") or 4,
            state_bytes=4 if reader.config.get("mamba_ssm_dtype", _state_dtype(reader)) == "float32" else 2,
        )
    state = reader.number("mamba_d_state") or reader.number("ssm_state_size") or reader.number("state_size")
    if not state:
        return None
    hidden = reader.needed("hidden_size")
    heads = reader.number("mamba_n_heads") or reader.number("mamba_num_heads") or reader.number("num_heads") or 128
    width = reader.number("mamba_d_head") or reader.number("mamba_head_dim")
    width = width or (reader.number("mamba_expand") or reader.number("expand") or 2) * hidden // heads
    return Linear(
        key_heads=reader.number("mamba_n_groups") or reader.number("n_groups") or 1,
        value_heads=heads,
        key_dim=state,
        value_dim=width,
        convolution=reader.number("mamba_d_conv") or reader.number("conv_kernel") or 4,
        state_bytes=4 if reader.config.get("mamba_ssm_cache_dtype", "") == "float32" else 2,
    )


def _experts(reader: _Reader, config: Mapping[str, Any]) -> Experts | None:
    count = reader.number("experts")
    if not count or count == 1:
        return None
    intermediate = reader.number("moe_intermediate_size") or reader.number("intermediate_size") or 0
    if str(config.get("model_type", "")).startswith("llama4"):
        intermediate = reader.number("intermediate_size") or intermediate
    if not intermediate:
        raise reader.refused("moe_intermediate_size", "it is not there", "add the width of one expert")
    shared = reader.number("shared_width")
    if shared is None:
        shared = (reader.number("shared_experts") or 0) * intermediate
    if str(reader.config.get("model_type", "")).startswith("llama4"):
        shared = intermediate
    return Experts(count, min(reader.number("experts_per_token") or 2, count), intermediate, shared)


def _mixers(
    reader: _Reader, count: int, latent: Latent | None, linear: Linear | None
) -> list[tuple[Mixer, int | None]]:
    config = reader.config
    window = reader.number("sliding_window") if config.get("use_sliding_window", True) else None
    chunk = reader.number("attention_chunk_size")
    types = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        letters: dict[str, Mixer] = {"M": "mamba2", "*": "full"}
        return [(letters.get(letter, "none"), None) for letter in pattern]
    if isinstance(types, list) and types:
        told = cast("list[Any]", types)
        if len(told) < count:
            raise reader.refused("layer_types", f"{len(told)} of {count} layers are told", "tell every layer")
        return [_mixer(str(kind), window, chunk, latent, linear) for kind in told[:count]]
    step = reader.number("full_attention_interval") or reader.number("attn_layer_period")
    if linear and step:
        offset = reader.number("attn_layer_offset")
        at = step - 1 if offset is None else offset
        state: Mixer = "delta" if "linear_num_value_heads" in config else "mamba2"
        return [("full" if index % step == at else state, None) for index in range(count)]
    if linear and reader.number("num_attention_heads") is None:
        return [("mamba2", None)] * count
    if latent:
        return [("mla", None)] * count
    kind = str(config.get("model_type", ""))
    period = reader.number("sliding_window_pattern") or (6 if kind.startswith("gemma3") else 0)
    if window and kind.startswith(("gemma2", "gpt_oss")):
        return [("sliding" if index % 2 == 0 else "full", window if index % 2 == 0 else None) for index in range(count)]
    if window and period > 1:
        return [("full", None) if (index + 1) % period == 0 else ("sliding", window) for index in range(count)]
    if kind.startswith("llama4"):
        return [("full", None) if (index + 1) % 4 == 0 else ("chunked", chunk or 8192) for index in range(count)]
    if window and window < (reader.number("max_position_embeddings") or 2**40):
        return [("sliding", window)] * count
    return [("full", None)] * count


def _mixer(
    kind: str, window: int | None, chunk: int | None, latent: Latent | None, linear: Linear | None
) -> tuple[Mixer, int | None]:
    if "sliding" in kind and window:
        return "sliding", window
    if "chunked" in kind and chunk:
        return "chunked", chunk
    if kind in _LINEAR:
        return ("delta" if linear and linear.key_heads > 8 else "mamba2") if linear else "none", None
    if kind in ("mlp", "moe", "ffn"):
        return "none", None
    return ("mla" if latent else "full"), None


def _quantization(
    config: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[str | None, int | None, int | None, tuple[str, ...]]:
    told = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(told, Mapping):
        return None, None, None, ()
    quantization = cast("Mapping[str, Any]", told)
    method = str(quantization.get("quant_method") or quantization.get("quant_algo") or "unknown").lower()
    layout = f"{quantization.get('quant_algo')} {quantization.get('format')}".lower()
    if method.startswith(("modelopt", "compressed-tensors")) and "fp4" in layout:
        method = "mxfp4" if "mxfp4" in layout else "nvfp4"
    bits, group = quantization.get("bits") or quantization.get("w_bit"), quantization.get("group_size")
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        first = next(iter(cast("Mapping[str, Any]", groups).values()))
        weights = first.get("weights") if isinstance(first, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(weights, Mapping):
            bits = weights.get("num_bits") or bits  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            group = weights.get("group_size") or group  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        bits = 4 if quantization.get("load_in_4bit") else 8
    listed = cast("object", quantization.get("ignore") or quantization.get("modules_to_not_convert"))
    left = [str(item) for item in cast("list[Any]", listed)] if isinstance(listed, list) else []
    parts = {"self_attn": "attention", "linear_attn": "attention", "experts": "experts", "mlp": "mlp"}
    kept = {part for word, part in parts.items() for item in left if word in item and "shared" not in item}
    kept |= {"shared" for item in left if "shared_expert" in item}
    # Names of single layers, as compressed-tensors lists them, say nothing of the kind as a whole.
    kept -= {"mlp", "experts"} if any("gate" in item or "router" in item for item in left) else set()
    if str(config.get("model_type", "")).startswith("gpt_oss"):
        kept |= {"attention"}
    whole = int(group) if isinstance(group, int) and group > 0 else None  # pyright: ignore[reportUnknownArgumentType]
    return method, int(bits) if isinstance(bits, int) else None, whole, tuple(sorted(kept))


def _cache_dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """What the files say the cache was calibrated for: vLLM takes it where it is not told another."""
    told = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(told, Mapping):
        return None
    quantization = cast("Mapping[str, Any]", told)
    scheme = cast("object", quantization.get("kv_cache_scheme"))
    bits = cast("Mapping[str, Any]", scheme).get("num_bits") if isinstance(scheme, Mapping) else None
    return "fp8" if bits == 8 or str(quantization.get("kv_cache_quant_algo", "")).upper() == "FP8" else None


def _tower(tower: Mapping[str, Any], hidden: int) -> int:
    """Parameters of a vision or audio tower with its projector."""

    def number(*names: str) -> int:
        values = [tower.get(name) for name in names]
        return next((int(value) for value in values if _whole(value) and value), 0)

    width, depth = (
        number("hidden_size", "vt_hidden_size", "embed_dim", "d_model", "width"),
        number("num_hidden_layers", "vt_num_hidden_layers", "depth", "encoder_layers"),
    )
    depth += number("num_global_layers")
    inner = number("intermediate_size", "vt_intermediate_size", "encoder_ffn_dim") or 4 * width
    matrices = 3 if str(tower.get("hidden_act", "")) in ("silu", "swiglu") else 2
    out = number("out_hidden_size", "output_dim") or hidden
    # What joins so many patches into one token; a model may have further ones for what it takes out half-way.
    merged = width * (number("spatial_merge_size") or 2) ** 2
    joint = (merged if number("spatial_merge_size") else width * 2) ** 2 + merged * out
    halfway = tower.get("deepstack_visual_indexes")
    joints = 1 + (len(cast("list[Any]", halfway)) if isinstance(halfway, list) else 0)
    return depth * (4 * width * width + matrices * width * inner) + joints * joint
