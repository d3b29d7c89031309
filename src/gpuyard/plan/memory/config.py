"""From a model's config.json to its shape. What it leaves out has its kind's default; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from gpuyard.plan.memory.mixers import Mixed, linear_of, mixers_of
from gpuyard.plan.memory.quantized import cache_dtype, quantization
from gpuyard.plan.memory.reader import Reader, listed, whole
from gpuyard.plan.memory.shape import Experts, Latent, Layer, Linear, Mixer, Shape
from gpuyard.plan.memory.towers import towers_of

_UNGATED = (
    "opt", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "bloom", "falcon", "phi", "starcoder2", "mpt",
    "nemotron", "nemotron_h", "persimmon", "arcee", "apertus", "whisper", "bert", "roberta", "xlm-roberta",
)  # fmt: skip
"""Kinds whose feed-forward part has two matrices: no gate."""
_TIED = (
    "gemma", "opt", "gpt2", "gpt_bigcode", "bloom", "falcon", "cohere", "minicpm3", "mpt", "starcoder2", "mamba",
    "smollm3", "ernie4_5", "lfm2", "whisper", "zamba",
)  # fmt: skip
"""Beginnings of kinds whose input embedding is their output head unless they say otherwise."""
_UNTIED = ("mamba2",)
CHECKED = frozenset((
    "apertus", "arcee", "aya_vision", "bamba", "bloom", "chatglm", "cohere", "cohere2", "dbrx", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granitemoe", "granitemoehybrid", "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "internvl_chat",
    "jamba", "kimi_k2", "kimi_k25", "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4", "llava", "llava_next",
    "longcat_flash", "mamba", "mamba2", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl",
    "mistral", "mistral3", "mixtral", "mpt", "nemotron", "nemotron-nas", "nemotron_h", "olmo2", "olmo3",
    "olmoe", "opt", "paligemma", "phi", "phi3", "phimoe", "qwen2", "qwen2_5_omni", "qwen2_5_vl", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl",
    "qwen3_vl_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "voxtral", "whisper",
))  # fmt: skip
"""Kinds whose parameters come out right: those of tests/plan/memory/configs.json and of the catalog."""
_LEARNED_PLACES = ("opt", "gpt2", "gpt_bigcode", "whisper")
"""Kinds that learn an embedding for each position."""


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
    "cohere2": {"sliding_window": 4096},
}  # fmt: skip


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config.json tells. Raises RefusedError: FIT-CONFIG names the field and what would pass."""
    text = _text(config)
    reader = Reader(text, name)
    latent, linear, experts = _latent(reader), linear_of(reader), _experts(reader, config)
    hidden = reader.needed("hidden_size")
    # A model of states alone has heads of states and no others.
    heads = reader.number("num_attention_heads") or (linear[1].value_heads if linear else 0)
    heads = heads or reader.needed("num_attention_heads")
    if linear and reader.number("num_attention_heads") is None:
        heads = min(heads, hidden)
    vocab = reader.needed("vocab_size")
    if hidden < heads:
        raise reader.refused("hidden_size", f"{hidden} is less than its {heads} attention heads", "set it as trained")
    layers = _layers(reader, heads, latent, linear, experts)
    method, bits, group, unquantized = quantization(config, text)
    seen, kept, sees = towers_of(config, text, hidden)
    kind = str(text.get("model_type", ""))
    encoder = _encoder(reader) if kind == "whisper" else 0
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocab=vocab,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", _ties(text)))),
        max_model_len=_longest(reader),
        dtype=_dtype(config, text),
        gated=not (kind in _UNGATED or text.get("hidden_act") in ("relu2", "xielu")),
        attention_gate=bool(text.get("attn_output_gate", "qwen3_next" in kind)),
        experts=experts,
        latent=latent,
        linear=linear[1] if linear else None,
        quantization=method,
        bits=bits,
        group=group,
        unquantized=unquantized,
        cache_dtype=cache_dtype(config, text),
        whole_params=kept,
        extra_params=seen + encoder + _embeddings(reader, kind, hidden, vocab),
        multimodal=sees or kind == "whisper",
        kind=str(config.get("model_type", "")),
        checked=str(config.get("model_type", "")) in CHECKED,
        encoder_tokens=reader.number("max_source_positions") or 0,
        draft_vocab=reader.number("draft_vocab_size"),
        source="its config.json",
    )


def _layers(
    reader: Reader,
    heads: int,
    latent: Latent | None,
    linear: tuple[Mixer, Linear] | None,
    experts: Experts | None,
) -> tuple[Layer, ...]:
    text, hidden = reader.config, reader.needed("hidden_size")
    kind = str(text.get("model_type", ""))
    kv_heads = reader.number("num_key_value_heads") or (1 if text.get("multi_query") else heads)
    head_dim = reader.number("head_dim") or hidden // heads
    if kv_heads > heads or heads % kv_heads:
        raise reader.refused(
            "num_key_value_heads", f"{kv_heads} do not divide the {heads} attention heads", f"e.g. {heads}"
        )
    if isinstance(blocks := cast("object", text.get("block_configs")), list):
        return tuple(_block(reader, item, heads, head_dim) for item in cast("list[object]", blocks))
    told = text.get("layers_block_type")
    count = len(cast("list[Any]", told)) if isinstance(told, list) else reader.needed("num_hidden_layers")
    mixed = mixers_of(reader, count, latent, linear)
    count = len(mixed)
    wide = reader.number("global_head_dim"), reader.number("num_global_key_value_heads")
    narrow = reader.number("swa_head_dim"), reader.number("swa_num_key_value_heads"), reader.number("swa_v_head_dim")
    value = None if latent else reader.number("v_head_dim")
    widths, sparse = _widths(reader, count, experts), _sparse(reader, count)
    both = bool(text.get("enable_moe_block"))  # gemma4: a dense part beside the experts
    first_shared = count - (reader.number("num_kv_shared_layers") or 0)
    per_layer = (reader.number("hidden_size_per_layer_input") or 0) * 2 * hidden
    per_layer += (reader.number("laurel_rank") or 0) * 2 * hidden

    def layer(index: int, one: Mixed) -> Layer:
        size, own = head_dim, kv_heads
        if one.mixer == "full":
            size, own = wide[0] or size, wide[1] or own
        elif one.mixer == "sliding":
            size, own = narrow[0] or size, narrow[1] or own
        mixture = bool(experts) and one.part in ("any", "experts") and (one.part == "experts" or sparse[index])
        bare = one.part in ("bare", "experts") or (mixture and not both)
        values = (narrow[2] if one.mixer == "sliding" else None) or value or size
        return Layer(
            mixer=one.mixer,
            kv_heads=own,
            head_dim=size,
            window=one.window,
            experts=mixture,
            intermediate=0 if bare else widths[index],
            value_dim=values,
            beside=one.beside,
            kept=index < first_shared,
            extra=per_layer,
        )

    made = tuple(layer(index, one) for index, one in enumerate(mixed))
    if kind == "whisper":
        # Each layer of the decoder attends to itself, then to what the encoder made.
        return tuple(
            part
            for item in made
            for part in (replace(item, intermediate=0), replace(item, mixer=cast("Mixer", "cross")))
        )
    if kind.startswith("longcat"):
        # Each layer has two attentions and two dense parts; the experts stand beside the first.
        return tuple(
            part
            for item, width in zip(made, widths, strict=True)
            for part in (replace(item, intermediate=width), replace(item, intermediate=width, experts=False))
        )
    return made


def _widths(reader: Reader, count: int, experts: Experts | None) -> list[int]:
    """Of the dense feed-forward part of each layer."""
    text = reader.config
    if reader.number("num_attention_heads") is None:
        return [0] * count
    widths = cast("object", text.get("intermediate_size"))
    told = cast("list[Any]", widths) if isinstance(widths, list) else []
    if len(told) == count and all(map(whole, told)):
        return [int(width) for width in told]
    wanted = experts.intermediate if experts else 4 * reader.needed("hidden_size")
    width = reader.number("dense_intermediate_size") or reader.number("intermediate_size_mlp")
    width = width or reader.number("intermediate_size") or wanted
    if text.get("block_auto_adjust_ff_dim"):
        step = reader.number("block_multiple_of") or 256
        width = -(-int(2 * width / 3 * float(text.get("block_ffn_dim_multiplier") or 1)) // step) * step
    return [width] * count


def _sparse(reader: Reader, count: int) -> list[bool]:
    """Which layers have experts, where the model has any."""
    text = reader.config
    flags = cast("object", text.get("moe_layer_freq"))
    if isinstance(flags, list) and len(cast("list[Any]", flags)) >= count:
        return [bool(flag) for flag in cast("list[Any]", flags)[:count]]
    first, step = reader.number("dense_layers") or 0, reader.number("expert_step") or 1
    offset = reader.number("expert_layer_offset")
    at = step - 1 if offset is None else offset
    dense = listed(text.get("mlp_only_layers"))
    told = cast("object", text.get("mlp_layer_types"))
    if isinstance(told, list):
        dense += [index for index, kind in enumerate(cast("list[Any]", told)) if kind == "dense"]
    return [index >= first and index not in dense and index % step == at % step for index in range(count)]


def _block(reader: Reader, told: object, heads: int, head_dim: int) -> Layer:
    """A layer of a model whose layers were cut down one by one (Nemotron-NAS, DeciLM)."""
    if not isinstance(told, Mapping):
        raise reader.refused("block_configs", "a block is no object", "take the model's own config.json")
    block, hidden, extra = cast("Mapping[str, Any]", told), reader.needed("hidden_size"), 0

    def part(key: str) -> tuple[Mapping[str, Any], bool]:
        nonlocal extra
        value = cast("object", block.get(key))
        own = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else cast("Mapping[str, Any]", {})
        if own.get("replace_with_linear"):
            extra += hidden * hidden
        return own, not (own.get("no_op") or own.get("replace_with_linear"))

    attention, attends = part("attention")
    forward, feeds = part("ffn")
    shared = attention.get("n_heads_in_group") or 1
    if not whole(shared) or heads % int(shared):
        raise reader.refused("n_heads_in_group", f"{shared!r} does not divide the {heads} heads", "e.g. 8")
    width = forward.get("intermediate_size")
    if not whole(width):
        multiple = forward.get("ffn_mult") or 0
        if not isinstance(multiple, int | float) or not 0 <= multiple < 1000:
            raise reader.refused("ffn_mult", f"{multiple!r} is no multiple of the width", "e.g. 5.25")
        width = -(-int(2 * multiple * hidden / 3) // 256) * 256
    return Layer(
        mixer="full" if attends else "none",
        kv_heads=heads // int(shared),
        head_dim=head_dim,
        window=None,
        experts=False,
        intermediate=int(cast("int", width)) if feeds else 0,
        value_dim=head_dim,
        extra=extra,
    )


def _encoder(reader: Reader) -> int:
    """Parameters of the encoder that whisper's decoder reads."""
    width, layers = reader.needed("hidden_size"), reader.number("encoder_layers") or 0
    inner = reader.number("encoder_ffn_dim") or 4 * width
    heard = 3 * ((reader.number("num_mel_bins") or 80) + width) + (reader.number("max_source_positions") or 0)
    return layers * (4 * width * width + 2 * width * inner) + heard * width


def _embeddings(reader: Reader, kind: str, hidden: int, vocab: int) -> int:
    """Parameters of further embeddings: each layer's own, as of gemma3n, with their projection; learned positions."""
    each = (reader.number("hidden_size_per_layer_input") or 0) * (reader.number("num_hidden_layers") or 0)
    more = each * ((reader.number("vocab_size_per_layer_input") or vocab) + hidden)
    # gemma3n keeps further streams of hidden states, with a projection there and back for each.
    more += 2 * max((reader.number("altup_num_inputs") or 1) - 1, 0) * hidden * hidden
    places = reader.number("max_position_embeddings") or 0 if kind in _LEARNED_PLACES else 0
    return more + places * hidden


def _longest(reader: Reader) -> int:
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
            return int(original * factor) if whole(original) and original else told
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


def _ties(text: Mapping[str, Any]) -> bool:
    """Families that tie unless they say otherwise."""
    kind = str(text.get("model_type", ""))
    return kind.startswith(_TIED) and kind not in _UNTIED


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    told = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "bfloat16")
    # vLLM serves a float32 model in 16 bits unless it is told otherwise.
    return "float16" if told == "float32" else told.removeprefix("torch.")


def _latent(reader: Reader) -> Latent | None:
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
        index_heads=reader.number("index_n_heads") or 0,
    )


def _experts(reader: Reader, config: Mapping[str, Any]) -> Experts | None:
    count = reader.number("experts")
    if not count or count == 1:
        return None
    intermediate = reader.number("expert_width") or reader.number("intermediate_size") or 0
    if str(config.get("model_type", "")).startswith("llama4"):
        intermediate = reader.number("intermediate_size") or intermediate
    if not intermediate:
        raise reader.refused("moe_intermediate_size", "it is not there", "add the width of one expert")
    shared = reader.number("shared_width")
    if shared is None:
        shared = (reader.number("shared_experts") or 0) * intermediate
    if str(reader.config.get("model_type", "")).startswith("llama4"):
        shared = intermediate
    return Experts(
        count, min(reader.number("experts_per_token") or 2, count), intermediate, shared, reader.number("latent_width")
    )
