"""vLLM's own planning of the KV cache, asked from outside. Runs in a Python that has torch, with vLLM on its path.

Reads one case a line from standard input, writes one answer a line: see `answer`. The functions are vLLM's; the
configuration that they read is a stand-in, because a real one wants a model and a device.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import re
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

# What older versions import on the way to the planner and this Python need not have.
_NOT_NEEDED = ("diskcache", "gguf", "blake3", "outlines_core", "lark", "xgrammar", "llguidance", "lmformatenforcer")


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, *_):
        if name.partition(".")[0] in _NOT_NEEDED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_StandIns())

import torch  # noqa: E402
from vllm.v1 import kv_cache_interface as interface  # noqa: E402
from vllm.v1.core import kv_cache_utils as planner  # noqa: E402

_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


class _Printed(logging.Handler):
    """The tokens of the lines that the planner logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.tokens: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"KV cache size: ([\d,]+) tokens", record.getMessage()):
            self.tokens.append(int(found[1].replace(",", "")))


def spec_of(told: dict) -> object:
    size = told["block_size"]
    if told["kind"] == "mamba":
        shapes = tuple(tuple(shape) for shape in told["shapes"])
        dtypes = tuple(_DTYPES[width] for width in told["dtypes"])
        return interface.MambaSpec(block_size=size, shapes=shapes, dtypes=dtypes, page_size_padded=told["padded"])
    heads = {"num_kv_heads": told["kv_heads"], "head_size": told["head_size"], "dtype": _DTYPES[told["dtype"]]}
    if "use_mla" in interface.AttentionSpec.__dataclass_fields__:
        heads["use_mla"] = told["kind"] == "mla"
    match told["kind"]:
        case "full":
            return interface.FullAttentionSpec(block_size=size, **heads)
        case "mla":
            return interface.MLAAttentionSpec(block_size=size, **heads)
        case "sliding":
            # Local attention has no context parallelism; newer versions want that said.
            local = {"dcp_sharded": False} if "dcp_sharded" in interface.AttentionSpec.__dataclass_fields__ else {}
            return interface.SlidingWindowSpec(block_size=size, sliding_window=told["window"], **heads, **local)
        case _:
            return interface.ChunkedLocalAttentionSpec(block_size=size, attention_chunk_size=told["window"], **heads)


def config_of(case: dict) -> SimpleNamespace:
    layout = next(iter(getattr(planner, "KVCacheLayout", ())), None)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=case["max_model_len"], original_max_model_len=case["max_model_len"], use_mla=False
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=len(case["ranks"]),
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=case["batched"], disable_hybrid_kv_cache_manager=False, max_num_seqs=16
        ),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            mamba_cache_mode="none",
            prefix_cache_retention_interval=None,
            enable_prefix_caching=False,
            mamba_block_size=None,
            get_resolved_kv_cache_layout=lambda: layout,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=case["batched"],
        device_config=SimpleNamespace(device_type="cuda"),
    )


def answer(case: dict, printed: _Printed) -> dict:
    """Blocks, tokens and concurrency; `refused` where the engine would not start, `unplanned` where it cannot plan."""
    printed.tokens.clear()
    config = config_of(case)
    ranks = [{name: spec_of(spec) for name, spec in rank} for rank in case["ranks"]]
    try:
        made = planner.get_kv_cache_configs(config, ranks, list(case["available"]))
    except ValueError as error:
        told = str(error)
        return {"refused": True} if "KV cache is needed" in told or "cache blocks" in told else {"unplanned": told}
    except ZeroDivisionError:
        return {"refused": True}  # 0.12 divides by the blocks of a rank that has none
    except (NotImplementedError, AssertionError) as error:
        return {"unplanned": repr(error)}
    if hasattr(planner, "get_kv_cache_capacity"):
        tokens = planner.get_kv_cache_capacity(config, planner.generate_scheduler_kv_cache_config(made))[0]
    else:
        tokens = min(printed.tokens)
    concurrency = planner.get_max_concurrency_for_kv_cache_config(config, made[0])
    return {
        "blocks": made[0].num_blocks,
        "tokens": tokens,
        "concurrency": concurrency,
        "groups": len(made[0].kv_cache_groups),
    }


def main() -> None:
    printed = _Printed()
    # Its own `info_once` keeps a line it has seen to itself, so every line is taken from the plain one.
    planner.logger.info_once = lambda message, *words, **_: planner.logger.info(message, *words)
    planner.logger.addHandler(printed)
    planner.logger.setLevel(logging.INFO)
    planner.logger.propagate = False
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), printed)), flush=True)


if __name__ == "__main__":
    main()
