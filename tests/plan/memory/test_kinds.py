"""Models that the catalog does not know, by their config.json alone: what they weigh, and what their layers keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.plan.memory.budget import Board
from gpuyard.plan.memory.config import CHECKED, shape_of
from gpuyard.plan.memory.fit import Settings, fit
from gpuyard.plan.memory.layers import CacheSettings, ranks_of
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.weights import weights_of
from gpuyard.spec.errors import RefusedError

ROWS: dict[str, dict[str, Any]] = {
    row["model"]: row for row in json.loads((Path(__file__).parent / "configs.json").read_text())
}
KNOWN = {row.model for row in load_shapes()}
BOARD = Board("a card", (2000.0, 2000.0, 2000.0), nvlink=True)


def shape_named(name: str) -> Shape:
    return shape_of(ROWS[name]["config"], name)


def parameters(shape: Shape) -> float:
    """Of its files: without the vocabulary's padding and what vLLM keeps twice of latent attention."""
    held = weights_of(shape, 1, 1, None, "bfloat16").whole / 2
    held -= (-shape.vocab % 64) * shape.hidden * (1 if shape.tied else 2)
    if shape.latent:
        twice = shape.latent.kv_rank * shape.heads * (shape.latent.nope + shape.latent.value)
        held -= twice * sum(layer.mixer == "mla" for layer in shape.layers)
    return held


@pytest.mark.parametrize("name", ROWS)
def test_a_config_alone_tells_the_parameters(name: str) -> None:
    shape = shape_named(name)
    assert parameters(shape) == pytest.approx(ROWS[name]["parameters"], rel=0.004)
    assert shape.checked


def test_enough_models_that_the_catalog_does_not_know_were_counted() -> None:
    assert len(set(ROWS) - KNOWN) >= 75
    kinds = {row["config"]["model_type"] for row in ROWS.values()} | {row.config["model_type"] for row in load_shapes()}
    assert kinds == CHECKED


def test_a_kind_that_nobody_counted_says_so_and_has_a_wider_interval() -> None:
    config = {**ROWS["zai-org/GLM-4-9B-0414"]["config"]}
    known, other = (fit(shape_of({**config, "model_type": kind}, "m"), BOARD, Settings(), load_memory())
                    for kind in ("glm4", "brand_new"))  # fmt: skip
    rules = [[finding.rule for finding in done.findings] for done in (known, other)]
    assert ["FIT-KIND" in told for told in rules] == [False, True]
    assert other.kv_cache_gib == known.kv_cache_gib
    assert other.kv_cache_gib_low < known.kv_cache_gib_low
    measured = fit(
        shape_of({**config, "model_type": "brand_new"}, "m"), BOARD, Settings(weights_gib=17.5), load_memory()
    )
    assert "FIT-KIND" not in [finding.rule for finding in measured.findings]


# Bytes that all layers keep of a token, and of a request as a state, on one GPU in 16 bits.
KEPT: dict[str, tuple[int, int]] = {
    # 20 of 35 layers have a cache of their own: 2 heads of 256, keys and values.
    "google/gemma-3n-E4B-it": (20 * 2 * 2 * 256 * 2, 0),
    # 49 of 80 layers attend, with 8 heads of 128.
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": (49 * 2 * 8 * 128 * 2, 0),
    # 7 layers with a latent of 576; 20 with three convolutions over 3 tokens and 32 states of 128 x 128 in 4 bytes.
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": (7 * 576 * 2, 20 * (3 * 3 * 32 * 128 * 2 + 32 * 128 * 128 * 4)),
    # Each layer has both: 2 heads of 128, and a Mamba2 of 24 heads with states of 256.
    "tiiuae/Falcon-H1-7B-Instruct": (44 * 2 * 2 * 128 * 2, 44 * (3 * (3072 + 2 * 256) * 2 + 24 * 128 * 256 * 2)),
    # Mamba1: the convolution over 8192, and 16 states for each of them.
    "ai21labs/AI21-Jamba-1.5-Mini": (4 * 2 * 8 * 128 * 2, 28 * (3 * 8192 * 2 + 8192 * 16 * 2)),
    "state-spaces/mamba-2.8b-hf": (0, 64 * (3 * 5120 * 2 + 5120 * 16 * 2)),
    # Six layers attend; ten convolve over two tokens.
    "LiquidAI/LFM2-1.2B": (6 * 2 * 8 * 64 * 2, 10 * 2 * 2048 * 2),
    # 10 of 80 layers attend; the others keep 64 states of 128 x 128.
    "MiniMaxAI/MiniMax-Text-01-hf": (10 * 2 * 8 * 128 * 2, 70 * 64 * 128 * 128 * 2),
    # Keys of 192 and values of 128; 4 heads where all is seen, 8 in a window.
    "XiaomiMiMo/MiMo-V2-Flash": (9 * 4 * 320 * 2 + 39 * 8 * 320 * 2, 0),
    # Two attentions in each of 28 layers.
    "meituan-longcat/LongCat-Flash-Chat": (56 * 576 * 2, 0),
    # 32 layers that attend to themselves, and to what was heard.
    "openai/whisper-large-v3": (64 * 2 * 20 * 64 * 2, 0),
    # 8 attend, 40 keep states in 4 bytes: 128 heads of 64, states of 128, 8 groups.
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": (
        8 * 2 * 2 * 128 * 2, 40 * (3 * (128 * 64 + 2 * 8 * 128) * 2 + 128 * 64 * 128 * 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_the_layers_of_each_kind_keep(name: str) -> None:
    settings = CacheSettings(1, 1, 16, "auto", "bfloat16", 1)
    (rank,) = ranks_of(shape_named(name), settings)
    tokens = sum(spec.unit_bytes for _, spec in rank if spec.kind != "mamba")
    states = sum(spec.unit_bytes for _, spec in rank if spec.kind == "mamba")
    assert (tokens, states) == KEPT[name]


def test_what_was_heard_takes_as_many_blocks_as_the_encoder_makes_tokens() -> None:
    done = fit(shape_named("openai/whisper-large-v3"), BOARD, Settings(engine="0.31.0"), load_memory())
    # 448 tokens in 28 blocks, 1500 in 94; the two kinds of layers take turns in one pool.
    assert done.fits
    assert done.max_concurrency == pytest.approx(done.num_blocks / (28 + 94), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block_configs": ["x"]}, "block_configs"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 7}, "ffn": {"ffn_mult": 1}}]}, "n_heads_in_group"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": "much"}}]}, "ffn_mult"),
    ],
)
def test_a_block_that_cannot_be_is_refused(change: dict[str, Any], field: str) -> None:
    config = {**ROWS["nvidia/Llama-3_3-Nemotron-Super-49B-v1"]["config"], **change}
    with pytest.raises(RefusedError) as refused:
        shape_of(config, "a model")
    assert refused.value.rule == "FIT-CONFIG"
    assert field in refused.value.found
