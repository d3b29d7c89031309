"""Properties of a fit that hold whatever the model, and what cannot be is refused with the way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from gpuyard.catalog import load_catalog
from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.plan.memory.budget import Board, board_of, engine_row, non_torch
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.fit import Settings, fit
from gpuyard.spec.errors import RefusedError

TABLES = load_memory()
SHAPES = {row.model: shape_of(row.config, row.model) for row in load_shapes()}
GPUS = {gpu.name: board_of(gpu) for gpu in load_catalog().gpus}
LLAMA, QWEN_NEXT = SHAPES["meta-llama/Llama-3.1-8B-Instruct"], SHAPES["Qwen/Qwen3-Next-80B-A3B-Instruct"]
H100, T4 = GPUS["H100-SXM5-80GB"], GPUS["T4"]
VERSIONS = [row.since for row in TABLES.engines]

# The first two rows know one kind of layer per model, and refuse the others.
NEW = VERSIONS[2:]
boards, versions, shapes = st.sampled_from(sorted(GPUS)), st.sampled_from(NEW), st.sampled_from(sorted(SHAPES))


def larger(board: Board, gib: float) -> Board:
    low, likely, high = board.memory_gib
    return replace(board, memory_gib=(low + gib, likely + gib, high + gib))


@tried(deadline=None)
@given(shapes, boards, versions, st.floats(0.01, 100))
def test_more_memory_never_fits_less(name: str, gpu: str, version: str, gib: float) -> None:
    # The batch is told, because a larger GPU has a larger one by default.
    shape, board = SHAPES[name], GPUS[gpu]
    settings = Settings(engine=version, max_num_seqs=64, max_num_batched_tokens=2048)
    less, more = (fit(shape, one, settings, TABLES) for one in (board, larger(board, gib)))
    assert more.fits >= less.fits
    assert more.num_blocks >= less.num_blocks
    assert more.kv_cache_gib > less.kv_cache_gib


@tried(deadline=None)
@given(shapes, boards, versions, st.integers(1, 512), st.integers(1, 512))
def test_a_larger_batch_never_leaves_more(name: str, gpu: str, version: str, few: int, more: int) -> None:
    left = [
        fit(
            SHAPES[name], GPUS[gpu], Settings(engine=version, max_num_seqs=seqs, max_num_batched_tokens=2048), TABLES
        ).kv_cache_gib
        for seqs in (few, few + more)
    ]
    assert left[0] >= left[1]


@tried(deadline=None)
@given(shapes, boards, versions)
def test_the_interval_holds_the_likely_figure_and_the_budget_adds_up(name: str, gpu: str, version: str) -> None:
    done = fit(SHAPES[name], GPUS[gpu], Settings(engine=version), TABLES)
    assert done.kv_cache_gib_low < done.kv_cache_gib < done.kv_cache_gib_high
    taken = done.weights_gib + done.activation_gib + done.non_torch_gib + done.cudagraph_gib
    assert done.requested_gib - taken == pytest.approx(done.kv_cache_gib, abs=0.001)
    assert done == fit(SHAPES[name], GPUS[gpu], Settings(engine=version), TABLES)


@tried(deadline=None)
@given(shapes, st.sampled_from([1, 2, 4, 8]), versions)
def test_more_ranks_never_hold_more_weights(name: str, tensor: int, version: str) -> None:
    shape = SHAPES[name]
    if shape.heads % (2 * tensor) == 0:
        one, two = (
            fit(shape, H100, Settings(engine=version, tensor_parallel_size=size), TABLES)
            for size in (tensor, 2 * tensor)
        )
        assert two.weights_gib < one.weights_gib


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**20) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "layer_types", "sliding_window", "quantization_config", "text_config",
    "vision_config", "num_experts", "moe_intermediate_size", "kv_lora_rank", "mamba_d_state", "full_attention_interval",
    "linear_num_value_heads", "torch_dtype", "tie_word_embeddings", "mlp_only_layers", "model_type",
    "hybrid_override_pattern",
    "n_shared_experts", "attention_chunk_size", "num_experts_per_tok", "first_k_dense_replace", "decoder_sparse_step",
]  # fmt: skip
CONFIG = next(row.config for row in load_shapes() if row.model == LLAMA.name)


@tried(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_no_config_brings_it_down(changes: dict[str, Any]) -> None:
    try:
        fit(shape_of({**CONFIG, **changes}, "odd"), H100, Settings(), TABLES)
    except RefusedError as refused:
        assert refused.rule.startswith("FIT-")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "many", 1e30, 10**12, True, float("nan")])
def test_a_config_with_a_missing_or_absurd_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RefusedError) as refused:
        shape_of({**CONFIG, field: value}, "odd")
    assert (refused.value.rule, field in refused.value.found) == ("FIT-CONFIG", True)


@pytest.mark.parametrize(
    ("settings", "rule", "change"),
    [
        (Settings(tensor_parallel_size=3), "FIT-TP", "take 4"),
        (Settings(tensor_parallel_size=0), "FIT-TP", "take 1"),
        (Settings(pipeline_parallel_size=33), "FIT-PP", "take 1 to 32"),
        (Settings(max_model_len=131_073), "FIT-CONTEXT", "take 131072"),
        (Settings(gpu_memory_utilization=1.2), "FIT-UTILIZATION", "take e.g. 0.9"),
        (Settings(gpu_memory_utilization=0.0), "FIT-UTILIZATION", "take e.g. 0.9"),
        (Settings(max_num_seqs=0), "FIT-VALUE", "leave it out for the default"),
        (Settings(dtype="bfloat1"), "FIT-DTYPE", "did you mean bfloat16?"),
        (Settings(kv_cache_dtype="fp9"), "FIT-KV-DTYPE", "did you mean fp8?"),
        (Settings(quantization="awk"), "FIT-QUANTIZATION", "did you mean awq? Or give --weights-gib"),
        (Settings(engine="0.5.4"), "FIT-ENGINE", "take 0.6.0 to 0.33.0"),
        (Settings(weights_gib=-1), "FIT-VALUE", "take what the engine printed"),
    ],
)
def test_what_no_start_can_have_is_refused(settings: Settings, rule: str, change: str) -> None:
    with pytest.raises(RefusedError) as refused:
        fit(LLAMA, H100, settings, TABLES)
    assert (refused.value.rule, refused.value.change) == (rule, change)


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-32B", "deepseek-ai/DeepSeek-V3", "google/gemma-3-27b-it"]
)
@pytest.mark.parametrize("gpu", ["L4", "L40S", "H100-SXM5-80GB", "B200-SXM-180GB"])
def test_every_change_that_is_named_would_pass(name: str, gpu: str) -> None:
    done = fit(SHAPES[name], GPUS[gpu], Settings(), TABLES)
    found = [finding for finding in done.findings if finding.rule == "FIT-MEMORY"]
    assert bool(found) is not done.fits
    for finding in found:
        for way in finding.change.split("; "):
            flag, _, rest = way.partition(" ")
            value = rest.partition(" ")[0]
            field = flag.removeprefix("--").replace("-", "_")
            if flag.startswith("--"):
                assert fit(SHAPES[name], GPUS[gpu], Settings(**{field: int(value)}), TABLES).fits, way


def test_measured_weights_win() -> None:
    given_ = fit(LLAMA, H100, Settings(weights_gib=20.0), TABLES)
    assert given_.weights_gib == 20.0
    assert given_.kv_cache_gib < fit(LLAMA, H100, Settings(), TABLES).kv_cache_gib


def test_a_told_cache_is_taken_as_told() -> None:
    """Qwen3-8B with 5,713,920,000 bytes: 38,736 tokens (vllm 0.19.1's log)."""
    done = fit(SHAPES["Qwen/Qwen3-8B"], H100, Settings(engine="0.19.1", kv_cache_memory_bytes=5_713_920_000), TABLES)
    assert done.kv_cache_tokens == 38_736


def test_an_older_version_says_that_it_cannot_plan_a_hybrid_model() -> None:
    with pytest.raises(RefusedError) as refused:
        fit(QWEN_NEXT, H100, Settings(engine="0.6.6"), TABLES)
    assert (refused.value.rule, refused.value.change) == ("FIT-LAYERS", "take a newer vLLM")


def test_the_version_decides_what_is_printed_for_a_hybrid_model() -> None:
    old, new = (
        fit(QWEN_NEXT, H100, Settings(engine=version, tensor_parallel_size=4), TABLES)
        for version in ("0.20.0", "0.21.0")
    )
    assert new.kv_cache_tokens > 2 * old.kv_cache_tokens


def test_key_value_heads_are_not_cut() -> None:
    per_block = [
        fit(LLAMA, H100, Settings(tensor_parallel_size=size), TABLES).bytes_per_block for size in (1, 2, 4, 8, 16)
    ]
    assert per_block == [2097152, 1048576, 524288, 262144, 262144]


@pytest.mark.parametrize(
    ("dtype", "bytes_per_head"),
    [
        ("auto", 256),
        ("fp8", 128),
        ("fp8_e4m3", 128),
        ("int8_per_token_head", 132),
        ("fp8_per_token_head", 132),
        ("nvfp4", 72),
    ],
)
def test_a_quantised_cache_counts_its_scales(dtype: str, bytes_per_head: int) -> None:
    done = fit(LLAMA, H100, Settings(kv_cache_dtype=dtype, max_model_len=4096), TABLES)
    assert done.bytes_per_block == 32 * 16 * 2 * 8 * bytes_per_head


def test_latent_attention_is_whole_on_every_rank() -> None:
    shape = SHAPES["deepseek-ai/DeepSeek-V3"]
    sizes = {fit(shape, H100, Settings(tensor_parallel_size=size), TABLES).bytes_per_block for size in (1, 8, 16)}
    assert sizes == {61 * 16 * 576 * 2}


def test_versions_come_in_order_and_an_unknown_newer_one_is_as_the_last() -> None:
    assert engine_row(TABLES, "0.28").since == "0.28.0"
    assert engine_row(TABLES, "0.24.9").since == "0.21.0"
    assert engine_row(TABLES, "0.99.0") == engine_row(TABLES, "0.33.0")


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 14.99),
        ("Qwen/Qwen3-32B", 61.03),
        ("openai/gpt-oss-20b", 13.47),
        ("openai/gpt-oss-120b", 64.38),
        ("Qwen/Qwen3-0.6B", 1.12),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", 44.76),
    ],
)
def test_weights_from_the_config_alone_come_near_what_was_printed(name: str, gib: float) -> None:
    """llm-d-incubation/llm-d-planner docs/empirical-vllm-memory-results.md @e50305a."""
    assert fit(SHAPES[name], H100, Settings(max_model_len=4096), TABLES).weights_gib == pytest.approx(gib, rel=0.01)


def test_more_is_taken_beside_pytorch_on_a_card_for_a_desk() -> None:
    taken = [non_torch(TABLES, "0.11.0", 1, GPUS[name]).likely for name in ("GeForce-RTX-4090", "L4")]
    assert taken[0] > taken[1] + 0.1


def test_a_version_that_nobody_read_says_so() -> None:
    told = [
        [item.rule for item in fit(LLAMA, H100, Settings(version), TABLES).findings] for version in ("0.32.0", "0.99.0")
    ]
    assert ["FIT-VERSION" in rules for rules in told] == [False, True]
