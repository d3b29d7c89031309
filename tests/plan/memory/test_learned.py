"""Starts of one's own narrow the interval."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog
from gpuyard.catalog.memory import load_memory
from gpuyard.cli import main
from gpuyard.cli.models import known_shape
from gpuyard.plan.memory.budget import board_of
from gpuyard.plan.memory.fit import Fit, Settings, fit
from gpuyard.plan.memory.learned import narrowed, read_log, row_of
from gpuyard.spec.errors import RefusedError

TABLES = load_memory()
H100 = board_of(next(gpu for gpu in load_catalog().gpus if gpu.name == "H100-SXM5-80GB"))
LOG = """
INFO 10-23 [gpu_model_runner.py:2653] Model loading took 14.9889 GiB and 3.07 seconds
INFO 10-23 [gpu_worker.py:298] Available KV cache memory: 51.38 GiB
INFO 10-23 [kv_cache_utils.py:1087] GPU KV cache size: 420,864 tokens
(Worker_TP1) INFO 10-23 [gpu_worker.py:298] Available KV cache memory: 51.41 GiB
"""
CPU_LOG = """
INFO 11-29 [cpu_worker.py:230] Explicitly set (1.0/23.45) GiB for KV cache on device
INFO 11-29 [kv_cache_utils.py:1087] GPU KV cache size: 23,296 tokens
"""
OLD_LOG = "model weights take 14.96GiB; the rest of the memory reserved for KV Cache is 11.12GiB."


def start(name: str, **settings: object) -> Fit:
    return fit(known_shape(name), H100, Settings(engine="0.11.0", **settings), TABLES)  # type: ignore[arg-type]


def test_the_engines_own_figures_are_read_back_of_the_rank_that_decides() -> None:
    told = {"reported_kv_gib": "51.38", "reported_kv_tokens": "420864", "reported_weights_gib": "14.9889"}
    assert read_log(LOG) == told
    assert read_log(OLD_LOG) == {"reported_kv_gib": "11.12", "reported_weights_gib": "14.96"}
    assert read_log(CPU_LOG) == {"reported_kv_gib": "1", "reported_kv_tokens": "23296"}
    with pytest.raises(RefusedError) as refused:
        read_log("nothing of that kind")
    assert refused.value.rule == "FIT-LOG"


def test_the_same_start_is_repeated_within_hundredths() -> None:
    done = start("meta-llama/Llama-3.1-8B-Instruct", max_model_len=16000)
    row = row_of(done, {"reported_kv_gib": "50"}, False, "auto")
    found = narrowed(done, row_of(done, {}, False, "auto"), [row, row], TABLES)
    assert (found.starts, found.same, found.done.kv_cache_gib) == (2, 2, 50.0)
    assert found.done.kv_cache_gib_high - found.done.kv_cache_gib_low == pytest.approx(0.06)
    assert found.done.num_blocks == 50 * 2**30 // done.bytes_per_block


def test_starts_of_other_models_shift_and_narrow_it() -> None:
    done, other = start("Qwen/Qwen3-0.6B"), start("meta-llama/Llama-3.1-8B-Instruct")
    row = row_of(other, {"reported_kv_gib": f"{other.kv_cache_gib + 0.2:.2f}"}, False, "auto")
    found = narrowed(done, row_of(done, {}, False, "auto"), [row] * 5, TABLES)
    assert (found.starts, found.same) == (5, 0)
    assert found.done.kv_cache_gib == pytest.approx(done.kv_cache_gib + 0.2, abs=0.01)
    before = done.kv_cache_gib_high - done.kv_cache_gib_low
    assert found.done.kv_cache_gib_high - found.done.kv_cache_gib_low < before / 2


@pytest.mark.parametrize(
    "change", [{"gpu": "T4"}, {"tp": "2"}, {"vllm_version": "0.32.0"}, {"vllm_version": "new"}, {"reported_kv_gib": ""}]
)
def test_starts_that_say_nothing_of_it_change_nothing(change: dict[str, str]) -> None:
    done = start("Qwen/Qwen3-0.6B")
    row = {**row_of(done, {"reported_kv_gib": "50"}, False, "auto"), **change}
    assert narrowed(done, row_of(done, {}, False, "auto"), [row], TABLES).done == done


def test_a_log_is_kept_and_narrows_the_next_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gpuyard(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gpuyard", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), capsys.readouterr().out

    run: Callable[..., tuple[int, str]] = gpuyard
    kept, log = tmp_path / "own.csv", tmp_path / "log"
    log.write_text(LOG)
    what = ("--model", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "H100-SXM5-80GB", "--engine", "vllm==0.11.0")
    words = ("fit", *what, "--max-model-len", 16000, "--json", "--learned", kept)
    assert run(*words)[0] == 3
    code, output = run(*words, "--log", log)
    assert (code, json.loads(output)["findings"][0]["rule"]) == (0, "FIT-COMPARED")
    told = json.loads(run(*words)[1])
    assert told["findings"][0]["rule"] == "FIT-LEARNED"
    assert (told["kv_cache_gib_low"], told["kv_cache_gib_high"]) == (51.35, 51.41)
    assert len(json.loads(run("fit", "--cases", kept, "--json")[1])["errors"]) == 2
