"""A draft beside the model: its weights and its caches, and what no start can have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuyard.catalog.memory import load_memory
from gpuyard.cli.models import known_shape
from gpuyard.plan.memory.budget import GIB, Board
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.fit import Fit, Settings, fit
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.speculative import Draft, draft_of
from gpuyard.spec.errors import RefusedError

from ..conftest import Command

TABLES = load_memory()
BOARD = Board("a card", (1500.0, 1500.0, 1500.0), nvlink=True)
LLAMA = known_shape("meta-llama/Llama-3.1-8B-Instruct")
DEEPSEEK = known_shape("deepseek-ai/DeepSeek-V3")
HEAD: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "draft_vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def drafted(target: Shape, told: dict[str, Any], own: dict[str, Any] | None = None, tensor: int = 1) -> Draft:
    return draft_of(
        told, target, tensor, lambda name: shape_of(own, name) if own else known_shape(name), lambda _: None
    )


def done_with(target: Shape, draft: Draft | None, **settings: Any) -> Fit:
    return fit(target, BOARD, Settings(draft=draft, max_model_len=2048, **settings), TABLES)


def test_ngram_takes_neither_weights_nor_cache() -> None:
    plain = done_with(LLAMA, None)
    guessed = done_with(LLAMA, drafted(LLAMA, {"method": "ngram", "num_speculative_tokens": 4}))
    assert (guessed.draft_gib, guessed.bytes_per_block) == (0.0, plain.bytes_per_block)
    assert guessed.kv_cache_gib == plain.kv_cache_gib


def test_an_eagle3_head_has_a_layer_that_reads_two_widths_and_a_head_for_frequent_words() -> None:
    draft = drafted(LLAMA, {"method": "eagle3", "model": "head", "num_speculative_tokens": 3}, HEAD)
    plain, guessed = done_with(LLAMA, None), done_with(LLAMA, draft)
    attention = 4096 * (2 * 4096 + 2 * 1024) + 4096 * (4096 + 2 * 1024)  # its layer, and what q, k and v read beside
    own = attention + 3 * 4096 * 14336 + 2 * 4096 + 3 * 4096 * 4096 + 32000 * 4096
    assert guessed.draft_gib == pytest.approx(own * 2 / GIB, abs=1e-4)
    assert guessed.weights_gib == pytest.approx(plain.weights_gib + guessed.draft_gib, abs=2e-4)
    assert guessed.bytes_per_block == plain.bytes_per_block * 33 // 32


def test_an_eagle_head_shares_head_and_embedding() -> None:
    draft = drafted(LLAMA, {"method": "eagle", "model": "head", "num_speculative_tokens": 3}, HEAD)
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert done_with(LLAMA, draft).draft_gib == pytest.approx((layer + 2 * 4096 * 4096) * 2 / GIB, abs=1e-4)


def test_a_draft_of_another_width_has_an_embedding_of_its_own() -> None:
    narrow = {**HEAD, "hidden_size": 2048, "num_attention_heads": 16}
    own, wide = (
        done_with(LLAMA, drafted(LLAMA, {"method": "eagle", "model": "m", "num_speculative_tokens": 3}, config))
        for config in (narrow, HEAD)
    )
    layer = 2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 14336 + 2 * 2048
    assert own.draft_gib == pytest.approx((layer + 2 * 2048 * 2048 + 128256 * 2048) * 2 / GIB, abs=1e-4)
    assert own.draft_gib > wide.draft_gib


def test_a_draft_model_is_there_as_a_whole() -> None:
    target, small = known_shape("Qwen/Qwen3-32B"), "Qwen/Qwen3-0.6B"
    draft = drafted(target, {"method": "draft_model", "model": small, "num_speculative_tokens": 5})
    plain, guessed = done_with(target, None), done_with(target, draft)
    alone = done_with(known_shape(small), None)
    assert guessed.draft_gib == alone.weights_gib
    # 64 layers of 8 heads and 28 of 8: the same pages.
    assert guessed.bytes_per_block == plain.bytes_per_block * (64 + 28) // 64


def test_on_two_ranks_a_draft_is_shared_or_whole() -> None:
    target = known_shape("Qwen/Qwen3-32B")
    told = {"method": "draft_model", "model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 5}
    both, one = (
        done_with(target, drafted(target, told | more, tensor=2), tensor_parallel_size=2)
        for more in ({}, {"draft_tensor_parallel_size": 1})
    )
    assert one.draft_gib == pytest.approx(2 * both.draft_gib, rel=0.01)


def test_a_layer_for_the_next_token_is_as_the_last_and_shares_its_ends() -> None:
    draft = drafted(DEEPSEEK, {"method": "deepseek_mtp"}, tensor=8)
    plain = done_with(DEEPSEEK, None, tensor_parallel_size=8)
    guessed = done_with(DEEPSEEK, draft, tensor_parallel_size=8)
    # 11.3 of the 14 billion parameters that the files have for it are of its 256 experts, in 8 bits, on eight ranks.
    assert 11.3 / 8 < guessed.draft_gib * GIB / 1e9 < 1.75
    assert guessed.bytes_per_block == plain.bytes_per_block * 62 // 61


def test_states_are_kept_for_each_guessed_token() -> None:
    target = known_shape("Qwen/Qwen3-Next-80B-A3B-Instruct")
    few, many = (
        done_with(target, drafted(target, {"method": "mtp", "num_speculative_tokens": count})) for count in (1, 4)
    )
    assert few.max_concurrency > many.max_concurrency


def test_measured_weights_hold_the_draft_s() -> None:
    draft = drafted(LLAMA, {"method": "eagle3", "model": "head", "num_speculative_tokens": 3}, HEAD)
    assert done_with(LLAMA, draft, weights_gib=20.0).weights_gib == 20.0


def test_the_draft_sits_on_the_last_stage() -> None:
    draft = drafted(LLAMA, {"method": "draft_model", "model": "meta-llama/Llama-3.2-1B-Instruct",
                            "num_speculative_tokens": 2})  # fmt: skip
    plain, guessed = (done_with(LLAMA, one, pipeline_parallel_size=2) for one in (None, draft))
    assert guessed.weights_gib == pytest.approx(plain.weights_gib + guessed.draft_gib, rel=0.01)


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ([], "it"),
        ({}, "method"),
        ({"method": "medusa", "model": "m", "num_speculative_tokens": 3}, "method"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": "many"}, "num_speculative_tokens"),
        ({"method": "eagle3", "num_speculative_tokens": 3}, "model"),
        ({"model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 3}, "model"),
        ({"method": "ngram", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 4}, "draft_tensor_parallel"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(told: Any, field: str) -> None:
    with pytest.raises(RefusedError) as refused:
        drafted(LLAMA, told, tensor=2)
    assert refused.value.rule == "FIT-SPECULATIVE"
    assert field in refused.value.found


def test_states_alone_cannot_guess_with_a_layer_of_their_own() -> None:
    states = replace(LLAMA, layers=tuple(replace(layer, mixer="mamba2") for layer in LLAMA.layers))
    with pytest.raises(RefusedError) as refused:
        drafted(states, {"method": "mtp"})
    assert refused.value.rule == "FIT-SPECULATIVE"


def test_the_command_takes_vllm_s_own_words(gpuyard: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HEAD))
    words = ("fit", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "H100-SXM5-80GB")
    told = json.dumps({"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": 3})
    code, output, _ = gpuyard(*words, "--speculative-config", told)
    assert code == 0
    assert "of these the draft's" in output
    for text in ("no json", "[]"):
        code, _, errors = gpuyard(*words, "--speculative-config", text)
        assert (code, errors.partition(":")[0]) == (3, "FIT-SPECULATIVE")
    code, _, errors = gpuyard(*words, "--engine", "sglang", "--speculative-config", told)
    assert (code, errors.partition(":")[0]) == (3, "FIT-SPECULATIVE")
