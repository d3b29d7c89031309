"""Shapes from config.json files as models publish them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gpuyard.catalog.memory import load_memory
from gpuyard.plan.memory.budget import Board
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.fit import Settings, fit
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.weights import weights_of

BASE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}


def mixers(shape: Shape) -> dict[str, int]:
    return dict(Counter(layer.mixer for layer in shape.layers))


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, {"full": 12}),
        ({"model_type": "mistral", "sliding_window": 4096}, {"sliding": 12}),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, {"full": 12}),
        ({"model_type": "gemma2", "sliding_window": 4096}, {"sliding": 6, "full": 6}),
        ({"model_type": "gemma3_text", "sliding_window": 1024}, {"sliding": 10, "full": 2}),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 6, "sliding_window": 128},
            {"sliding": 6, "full": 6},
        ),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, {"chunked": 9, "full": 3}),
        ({"kv_lora_rank": 512, "q_lora_rank": 1536}, {"mla": 12}),
        (
            {
                "layer_types": ["linear_attention"] * 9 + ["full_attention"] * 3,
                "linear_num_value_heads": 32,
                "linear_num_key_heads": 16,
            },
            {"delta": 9, "full": 3},
        ),
        (
            {"full_attention_interval": 4, "linear_num_value_heads": 32, "linear_num_key_heads": 16},
            {"delta": 9, "full": 3},
        ),
        (
            {"layer_types": ["mamba"] * 11 + ["attention"], "mamba_d_state": 128, "mamba_n_heads": 48},
            {"mamba2": 11, "full": 1},
        ),
        (
            {"hybrid_override_pattern": "M-M-M*-M-M-M", "ssm_state_size": 128, "mamba_num_heads": 64},
            {"mamba2": 6, "none": 5, "full": 1},
        ),
        ({"attn_layer_period": 6, "attn_layer_offset": 3, "mamba_d_state": 16}, {"mamba2": 10, "full": 2}),
    ],
)
def test_how_each_layer_mixes_its_tokens(own: dict[str, Any], found: dict[str, int]) -> None:
    assert mixers(shape_of({**BASE, **own}, "a model")) == found


def test_a_part_of_a_larger_model_has_what_its_class_has_by_default() -> None:
    """As google/gemma-3-4b-it and llava-hf/llava-v1.6-mistral-7b-hf publish theirs."""
    gemma = {
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304},
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    }
    shape = shape_of(gemma, "gemma")
    assert (shape.heads, shape.kv_heads, shape.layers[0].head_dim, shape.vocab) == (8, 4, 256, 262_208)
    assert (shape.tied, shape.multimodal, mixers(shape)) == (True, True, {"sliding": 29, "full": 5})
    llava = {
        "model_type": "llava_next",
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
        "text_config": {"model_type": "mistral", "num_key_value_heads": 8, "vocab_size": 32064},
    }
    assert weights_of(shape_of(llava, "llava"), 1, 1, None, "float16").whole / 2**30 == pytest.approx(14.08, rel=0.01)


@pytest.mark.parametrize(
    ("own", "method", "bits", "group", "kept"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", None, None, ()),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 4, 128, ()),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
            "mxfp4",
            None,
            None,
            ("attention",),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "ignore": ["lm_head"],
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            "compressed-tensors",
            8,
            None,
            (),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
            },
            "nvfp4",
            4,
            16,
            (),
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", None, None, ()),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt", None, None, ()),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4, None, ()),
    ],
)
def test_how_its_files_are_quantised(
    own: dict[str, Any], method: str, bits: int | None, group: int | None, kept: tuple[str, ...]
) -> None:
    shape = shape_of({**BASE, "quantization_config": own}, "a model")
    assert (shape.quantization, shape.bits, shape.group, shape.unquantized) == (method, bits, group, kept)


def test_a_cache_that_the_files_were_calibrated_for_is_taken_unless_another_is_told() -> None:
    own = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8},
           "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}  # fmt: skip
    board, tables = Board("a card", (40.0, 40.0, 40.0), False), load_memory()
    plain, calibrated = shape_of(BASE, "plain"), shape_of({**BASE, "quantization_config": own}, "calibrated")
    sizes = [
        fit(shape, board, Settings(kv_cache_dtype=dtype), tables).bytes_per_block
        for shape, dtype in ((plain, "auto"), (calibrated, "auto"), (calibrated, "bfloat16"))
    ]
    assert sizes[0] == sizes[2] == 2 * sizes[1]


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "linear", "factor": 2}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 8192),
        ({"type": "yarn", "factor": "four"}, 8192),
        ("none", 8192),
    ],
)
def test_the_context_is_as_long_as_its_positions_are_scaled(scaling: object, tokens: int) -> None:
    assert shape_of({**BASE, "rope_scaling": scaling}, "a model").max_model_len == tokens


def test_the_dense_layers_may_be_listed() -> None:
    own = {"num_experts": 8, "moe_intermediate_size": 512, "mlp_layer_types": ["dense"] + ["sparse"] * 11}
    assert [layer.experts for layer in shape_of({**BASE, **own}, "a model").layers] == [False] + [True] * 11


def test_stages_of_a_pipeline_share_the_layers_and_the_ends() -> None:
    shape = shape_of(BASE, "a model")
    whole = weights_of(shape, 1, 1, None, "bfloat16").whole
    stages = weights_of(shape, 1, 3, None, "bfloat16").per_rank
    assert sum(stages) == whole
    assert stages[1] < stages[0] == pytest.approx(stages[2], rel=1e-3)


def test_a_mixture_of_experts_knows_its_dense_layers() -> None:
    own = {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    }
    shape = shape_of({**BASE, **own}, "a model")
    assert [layer.experts for layer in shape.layers] == [False] + [True] * 11
    assert shape.experts
    assert shape.experts.shared_intermediate == 1024


# Parameters in billions, as their makers state them, of kinds whose config.json has words of its own.
WORDS: dict[str, tuple[float, dict[str, Any]]] = {
    "phi3": (3.84, {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 200_064, "tie_word_embeddings": True}),
    "phi": (2.78, {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10_240, "num_attention_heads": 32,
                   "num_hidden_layers": 32, "vocab_size": 51_200}),
    "starcoder2": (15.96, {"model_type": "starcoder2", "hidden_size": 6144, "intermediate_size": 24_576,
                           "num_attention_heads": 48, "num_key_value_heads": 4, "num_hidden_layers": 40,
                           "vocab_size": 49_152, "tie_word_embeddings": False}),
    "jamba: experts in every second layer, the second one first": (51.57, {
        "model_type": "jamba", "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "num_experts": 16, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4,
        "mamba_d_state": 16, "mamba_expand": 2, "vocab_size": 65_536}),
    "dbrx: words in parts of parts": (131.6, {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32_768,
        "vocab_size": 100_352, "attn_config": {"kv_n_heads": 8},
        "ffn_config": {"ffn_hidden_size": 10_752, "moe_num_experts": 16, "moe_top_k": 4}}),
    "chatglm": (9.4, {"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13_696, "num_layers": 40,
                      "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2,
                      "kv_channels": 128, "padded_vocab_size": 151_552, "seq_length": 131_072}),
    "states alone": (2.7, {"model_type": "mamba2", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 128,
                           "num_heads": 80, "head_dim": 64, "n_groups": 1, "expand": 2, "vocab_size": 50_288,
                           "tie_word_embeddings": True}),
    "Mistral's own format, with a tower": (12.68, {
        "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 14_336, "n_heads": 32, "n_kv_heads": 8,
        "vocab_size": 131_072, "vision_encoder": {"hidden_size": 1024, "intermediate_size": 4096,
                                                  "num_hidden_layers": 24}}),
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_the_words_of_each_kind_come_to_the_parameters_that_its_makers_state(words: str) -> None:
    stated, config = WORDS[words]
    shape = shape_of(config, words)
    assert weights_of(shape, 1, 1, None, "bfloat16").whole / 2e9 == pytest.approx(stated, rel=0.012)
    assert shape.multimodal is ("tower" in words)


def test_towers_are_sharded_but_for_the_one_of_mistrals_own_format() -> None:
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "spatial_merge_size": 2}
    text = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 1024}
    bare, sees, own = (
        shape_of({**text, **more}, "m") for more in ({}, {"vision_config": tower}, {"vision_encoder": tower})
    )

    def more(shape: Shape, tensor: int) -> int:
        return (
            weights_of(shape, tensor, 1, None, "bfloat16").per_rank[0]
            - weights_of(bare, tensor, 1, None, "bfloat16").per_rank[0]
        )

    assert more(sees, 2) == pytest.approx(more(sees, 1) / 2)
    assert more(own, 2) == more(own, 1) == more(sees, 1)
