"""Models and memory for plans: shapes from public configurations, and memory as plain arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from gpuyard.catalog import load_catalog, load_instances, load_market
from gpuyard.plan.sizing.figures import GIB
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.room import Memory, Part, Room
from gpuyard.plan.sizing.throughput import Shape
from gpuyard.spec.fleet import Engine, Fleet, Model

SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": (32, 4096, 8.03e9),
    "meta-llama/Llama-3.1-70B-Instruct": (80, 8192, 70.6e9),
}
BOARDS = {"H100-SXM5-80GB": 79.6, "A100-SXM4-40GB": 40.0, "A100-SXM4-80GB": 80.0, "L40S": 45.0, "H200-SXM-141GB": 140.0}
OVERHEAD = 4.0


@dataclass
class PlainRooms:
    """Weights shared out evenly, a fixed share for the rest, and keys and values in 16 bit."""

    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def shape(self, model: Model) -> Shape | None:
        name = model.source.removeprefix("hf:").partition("@")[0]
        if name not in SHAPES:
            return None
        layers, hidden, parameters = SHAPES[name]
        eight = model.vllm.quantization == "fp8"
        gib = parameters * (1 if eight else 2) / GIB
        return Shape(
            name, layers, hidden, parameters, parameters, gib, layers * 2 * 8 * 128 * 2, eight, model.vllm.quantization
        )

    def room(self, model: Model, engine: Engine, gpu: str, size: int) -> Room | None:  # noqa: ARG002
        shape = self.shape(model)
        if shape is None or gpu not in BOARDS:
            return None
        self.asked.append((model.name, gpu, size))
        requested = BOARDS[gpu] * (model.vllm.gpu_memory_utilization or 0.9)
        weights = shape.weights_gib / size
        cache = requested - weights - OVERHEAD
        tokens = int(max(cache, 0) * size * GIB / shape.kv_bytes_per_token)
        longest = model.vllm.max_model_len or 8192
        parts = [("weights", weights), ("activations and the rest", OVERHEAD), ("KV cache", max(cache, 0.0))]
        memory = Memory(
            gpu=gpu,
            tensor_parallel_size=size,
            fits=tokens >= longest,
            total_gib=BOARDS[gpu],
            requested_gib=requested,
            parts=tuple(Part(name=name, gib=gib, low=gib, high=gib) for name, gib in parts),
            kv_cache_tokens=tokens,
            max_concurrency=tokens / longest,
        )
        why = f"{weights:.1f} GiB of weights on a GPU of {BOARDS[gpu]} GiB leave {tokens} tokens"
        return Room(memory, "FIT-KV-CACHE", why, "more GPUs, or a shorter max_model_len")


@pytest.fixture
def rooms() -> PlainRooms:
    return PlainRooms()


@pytest.fixture
def givens(rooms: PlainRooms) -> Givens:
    return Givens(load_catalog(), load_market(), load_instances(), rooms, "2026-11-29")


def planned_fleet(**changes: Any) -> Fleet:
    """Three machines of eight H100 with a 70B model, two of which serve; `changes` replace whole parts."""
    data: dict[str, Any] = {
        "version": 1,
        "name": "prod",
        "provider": "aws",
        "distribution": "ubuntu-24.04",
        "pools": [{"name": "large", "nodes": 3, "gpu": "H100-SXM5-80GB", "gpus_per_node": 8}],
        "engines": [{"name": "vllm", "distribution": "vllm"}],
        "models": [
            {
                "name": "llama",
                "source": "hf:meta-llama/Llama-3.1-70B-Instruct@main",
                "pool": "large",
                "engine": "vllm",
                "port": 8000,
                "vllm": {
                    "tensor_parallel_size": 2,
                    "data_parallel_size": 4,
                    "quantization": "fp8",
                    "max_model_len": 16384,
                },
            }
        ],
        "gateway": {"port": 8080, "nodes": 2},
        "planning": {
            "region": "us-east-1",
            "utilisation": 0.35,
            "spare_nodes": 1,
            "cold_start_seconds": 600.0,
            "staff": {"full_time_equivalents": 0.5, "usd_per_year": 180000.0},
        },
        **changes,
    }
    return Fleet.model_validate_json(json.dumps(data))
