"""What plans of the tests are made from: the catalog as it is, on one day."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuyard.catalog import load_catalog, load_instances
from gpuyard.catalog.market import load_market
from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.cli import main
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.room import CatalogRooms
from gpuyard.spec.fleet import Fleet

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gpuyard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command: its exit code, standard output and standard error."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpuyard", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr()
        return int(exit_.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def givens() -> Givens:
    catalog = load_catalog()
    rooms = CatalogRooms(catalog, load_memory(), load_shapes())
    return Givens(catalog, load_market(), load_instances(), rooms, "2026-11-29")


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
