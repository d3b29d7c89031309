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
