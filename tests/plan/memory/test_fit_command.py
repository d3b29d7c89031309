"""`gpuyard fit` and `gpuyard gpus --fits` as a user calls them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from gpuyard.catalog.memory import load_memory
from gpuyard.cli.models import known_shape
from gpuyard.plan.memory.budget import Board
from gpuyard.plan.memory.fit import Settings, fit

from ..conftest import Command

STARTS = Path(__file__).parent / "starts.csv"
LLAMA = ("--model", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "H100-SXM5-80GB")
KEYS = {
    "fits", "weights_gib", "activation_gib", "non_torch_gib", "cudagraph_gib", "kv_cache_gib", "kv_cache_gib_low",
    "kv_cache_gib_high", "kv_cache_tokens", "num_blocks", "max_concurrency", "findings",
}  # fmt: skip


def test_what_fits_exits_0_and_tells_every_share(gpuyard: Command) -> None:
    code, output, errors = gpuyard("fit", *LLAMA, "--engine", "vllm==0.11.0", "--max-model-len", 16000)
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1] == "fits"
    told = json.loads(gpuyard("fit", *LLAMA, "--json")[1])
    assert set(told) >= KEYS
    assert told["fits"] is True


def test_what_does_not_fit_exits_1_with_the_smallest_change(gpuyard: Command) -> None:
    code, output, _ = gpuyard("fit", "--model", "meta-llama/Llama-3.3-70B-Instruct", "--gpu", "H100-SXM5-80GB")
    assert (code, output.splitlines()[-1]) == (1, "does not fit")
    assert "--tensor-parallel-size 4 fits" in output


def test_a_gpu_that_the_engine_does_not_run_on_is_a_finding(gpuyard: Command) -> None:
    code, output, _ = gpuyard("fit", "--model", "Qwen/Qwen3-0.6B", "--gpu", "P100-PCIE-16GB")
    assert code == 1
    assert "COMPAT-ENGINE-GPU [red]" in output


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--model", "meta-lama/Llama-3.1-8B-Instruct", "--gpu", "T4"), "FIT-MODEL"),
        (("--model", "Qwen/Qwen3-8B", "--gpu", "H100-SXM6-80GB"), "PLAN-GPU"),
        ((*LLAMA, "--tp", "5"), "FIT-TP"),
        ((*LLAMA, "--max-model-len", "1000000"), "FIT-CONTEXT"),
        ((*LLAMA, "--gpu-memory-utilization", "0"), "FIT-UTILIZATION"),
        ((*LLAMA, "--gpu-memory-utilization", "1.2"), "FIT-UTILIZATION"),
        ((*LLAMA, "--engine", "ollama==1"), "FIT-ENGINE"),
        (("--cases", "no.csv"), "FIT-CSV"),
        (("--model", "no/config.json", "--gpu", "T4"), "FIT-CONFIG"),
    ],
)
def test_a_refusal_exits_3_on_one_line_with_its_rule(gpuyard: Command, words: tuple[str, ...], rule: str) -> None:
    code, output, errors = gpuyard("fit", *words)
    assert (code, output, errors.partition(":")[0], len(errors.splitlines())) == (3, "", rule, 1)
    code, output, _ = gpuyard("fit", *words, "--json")
    assert (code, json.loads(output)["refused"]["rule"]) == (3, rule)


def test_neither_model_nor_cases_is_wrong_usage(gpuyard: Command) -> None:
    assert gpuyard("fit")[0] == 2


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "{}", '{"hidden_size": 8}'])
def test_a_config_that_is_none_is_refused(gpuyard: Command, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, errors = gpuyard("fit", "--model", tmp_path / "config.json", "--gpu", "T4")
    assert (code, errors.partition(":")[0]) == (3, "FIT-CONFIG")


def directory(path: Path, header: bytes) -> Path:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_the_sizes_in_safetensors_headers_win_over_the_config(gpuyard: Command, tmp_path: Path) -> None:
    tensors = {"a": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]},
               "b": {"dtype": "F8_E4M3", "shape": [2**20], "data_offsets": [2**22, 2**22 + 2**20]}}  # fmt: skip
    model = directory(tmp_path, json.dumps({"__metadata__": {}, **tensors}).encode())
    told = json.loads(gpuyard("fit", "--model", model, "--gpu", "T4", "--json")[1])
    # 2^20 values that are served in 2 bytes, and 2^20 in one.
    assert told["weights_gib"] == pytest.approx(3 * 2**20 / 2**30, abs=1e-4)


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "data_offsets": [0]}}'])
def test_a_broken_safetensors_file_is_refused(gpuyard: Command, tmp_path: Path, header: bytes) -> None:
    code, _, errors = gpuyard("fit", "--model", directory(tmp_path, header), "--gpu", "T4")
    assert (code, errors.partition(":")[0]) == (3, "FIT-FILES")


def test_cases_are_told_with_their_errors(gpuyard: Command, tmp_path: Path) -> None:
    told = json.loads(gpuyard("fit", "--cases", STARTS, "--json")[1])
    assert set(told) == {"cases", "errors", "summary"}
    assert set(told["cases"][0]) >= {
        "model", "gpu", "tier", "predicted_weights_gib", "predicted_kv_gib", "predicted_kv_gib_low",
        "predicted_kv_gib_high", "predicted_kv_tokens", "reason",
    }  # fmt: skip
    (tmp_path / "cases.csv").write_text("model,gpu\nQwen/Qwen3-8B,T4\n")
    assert set(json.loads(gpuyard("fit", "--cases", tmp_path / "cases.csv", "--json")[1])) == {"cases"}
    code, output, _ = gpuyard("fit", "--cases", STARTS)
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80


def test_gpus_that_a_model_fits_on(gpuyard: Command) -> None:
    told = json.loads(gpuyard("gpus", "--fits", "meta-llama/Llama-3.3-70B-Instruct", "--json")[1])
    count = {row["gpu"]: row["gpus"] for row in told["gpus"]}
    assert count["H100-SXM5-80GB"] == 4
    assert count["B300-SXM-288GB"] == 1
    assert "T4" not in count
    small = json.loads(gpuyard("gpus", "--fits", "Qwen/Qwen3-0.6B", "--json")[1])["gpus"]
    assert {"T4", "P100-PCIE-16GB"} & {row["gpu"] for row in small} == {"T4"}
    code, output, _ = gpuyard("gpus", "--fits", "Qwen/Qwen3-8B")
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize(("engine", "factor"), [("sglang", 1.25), ("tensorrt-llm", 1.35)])
def test_other_engines_have_documented_bounds(gpuyard: Command, engine: str, factor: float) -> None:
    """A model of 20 GB needs about 25 GB in vLLM and 27 GB in TensorRT-LLM."""
    code, output, _ = gpuyard("fit", *LLAMA, "--engine", engine, "--weights-gib", 20, "--json")
    told = json.loads(output)
    assert (code, told["engine"]) == (0, engine)
    assert told["kv_cache_gib_low"] < told["kv_cache_gib"] < told["kv_cache_gib_high"]
    assert f"is {20 * factor:.1f} GiB" in told["findings"][0]["have"]


def test_a_model_of_20_gb_starts_on_25_gb_with_a_short_context() -> None:
    shape, tables = known_shape("meta-llama/Llama-3.1-8B-Instruct"), load_memory()
    settings = Settings(weights_gib=20e9 / 2**30, max_model_len=8192)
    for gigabytes, fits in ((23, False), (25, True)):
        memory = gigabytes * 1e9 / 2**30
        assert fit(shape, Board("a card", (memory, memory, memory), False), settings, tables).fits is fits


@pytest.mark.parametrize(("method", "gib", "gpus"), [("full", "120", 2), ("lora", "16", 1)])
def test_training_is_refused_with_a_bound(gpuyard: Command, method: str, gib: str, gpus: int) -> None:
    code, _, errors = gpuyard("fit", *LLAMA, "--fine-tuning", method)
    assert (code, errors.partition(":")[0]) == (3, "FIT-TRAINING")
    assert f"at least {gib} GiB" in errors
    assert f"{gpus} x H100-SXM5-80GB" in errors
