"""Start tiny models with random weights under the locked vLLM on the CPU, with a told cache: does it print our tokens?

    python tools/bench_fit_starts.py [--engine 0.32.0]

Each model is a config.json and nothing else. Takes half a minute and 2 GB of memory a model. The last line has the
figures; exit code 1 if a model that started prints other tokens than ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpuyard.catalog.memory import load_memory
from gpuyard.plan.memory.budget import engine_row
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.kv import plan
from gpuyard.plan.memory.layers import CacheSettings, ranks_of
from tools.bench_fit import python_of

CACHE_BYTES, LENGTH, BATCHED, BLOCK = 300_000_001, 2048, 512, 128
SECONDS = 1200  # on a machine that others use too

BASE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 1024,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "dtype": "bfloat16",
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": LLAMA,
    "gqa": {**LLAMA, "num_key_value_heads": 2},
    "sliding": {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256,
                "num_key_value_heads": 2},
    "sliding-and-full": {**BASE, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
                         "num_key_value_heads": 2, "sliding_window": 256, "hidden_activation": "gelu_pytorch_tanh",
                         "query_pre_attn_scalar": 64, "layer_types": (["sliding_attention"] * 5 + ["full_attention"])},
    "mla": {**BASE, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 512,
            "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.0, "scoring_func": "softmax", "moe_layer_freq": 1},
    "hybrid": {**BASE, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 8,
               "num_key_value_heads": 2, "full_attention_interval": 4, "linear_num_value_heads": 16,
               "linear_num_key_heads": 16, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
               "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
               "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1, "norm_topk_prob": True,
               "partial_rotary_factor": 0.25},
}  # fmt: skip

START = """
import sys
from vllm import LLM
if __name__ == "__main__":
    LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=int(sys.argv[2]), max_num_batched_tokens=int(sys.argv[3]), max_num_seqs=8,
        block_size=int(sys.argv[4]),
        kv_cache_memory_bytes=int(sys.argv[5]), enable_prefix_caching=False)
"""


def printed(python: Path, model: Path) -> tuple[int | None, str]:
    """Tokens that vLLM prints, and its last words where it does not start."""
    words = [str(python), "-c", START, str(model), *map(str, (LENGTH, BATCHED, BLOCK, CACHE_BYTES))]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return None, f"did not start in {SECONDS} s"
    text = done.stdout + done.stderr
    found = re.search(r"KV cache size: ([\d,]+) tokens", text)
    failed = [line for line in text.splitlines() if "Error" in line]
    return (int(found[1].replace(",", "")), "") if found else (None, failed[-1][-160:] if failed else "no word")


def reckoned(version: str, config: dict[str, Any]) -> int:
    """Our tokens, with what the CPU does otherwise: one batch at a time, and recurrent states in 4 bytes."""
    engine = engine_row(load_memory(), version)
    shape = shape_of({**config, "mamba_ssm_dtype": "float32"}, "tiny")
    states = 1  # without prefix caching
    grows = engine.planner == "padded-null"
    ranks = ranks_of(shape, CacheSettings(1, 1, BLOCK, "auto", "bfloat16", states, grows_by_block=grows))
    return plan(engine.planner, ranks, [CACHE_BYTES], LENGTH, BATCHED, engine.tokens_by_concurrency).tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="0.32.0")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    python, _ = python_of(options.engine)
    started = wrong = 0
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
            tokens, why = printed(python, Path(folder))
        own = reckoned(options.engine, MODELS[name])
        started += tokens is not None
        wrong += tokens is not None and tokens != own
        print(f"{name:<18} printed {tokens if tokens is not None else '-'}, ours {own} {why}", flush=True)
    print(f"engine={options.engine} started={started} of={len(options.models)} mismatches={wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
