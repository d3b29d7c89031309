"""Plan a fleet of 1,000 nodes and 50 models with other machines considered, and print time and memory.

    python tools/bench_plan.py [--runs 5]

The whole command is measured, from its start to the written page, as a user sees it. The last line has the figures as
name=value. Exit code 1 if it takes more than 2 s or 300 MB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

MOST_SECONDS, MOST_MB = 2.0, 300.0

KINDS = (
    ("H100-SXM5-80GB", 8),
    ("H200-SXM-141GB", 8),
    ("A100-SXM4-80GB", 8),
    ("L40S", 8),
    ("L40S", 4),
    ("A10G", 4),
    ("B200-SXM-180GB", 8),
)
SOURCES = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "google/gemma-3-12b-it",
    "google/gemma-3-27b-it",
    "microsoft/phi-4",
    "openai/gpt-oss-20b",
    "meta-llama/Llama-3.3-70B-Instruct",
)
POOLS, NODES, MODELS = 20, 50, 50


def large() -> str:
    """20 pools of 50 nodes on seven kinds of machines; 50 models of 13 shapes and 10 lengths, parallelism left open."""
    lines = ["version: 1", "name: large", "provider: aws", "distribution: ubuntu-24.04", "pools:"]
    for pool in range(POOLS):
        gpu, gpus = KINDS[pool % len(KINDS)]
        lines.append(f"  - {{name: pool-{pool}, nodes: {NODES}, gpu: {gpu}, gpus_per_node: {gpus}}}")
    lines += ["engines:", "  - {name: vllm, distribution: vllm}", "models:"]
    for model in range(MODELS):
        source, length = SOURCES[model % len(SOURCES)], 2048 + 512 * (model % 10)
        lines.append(
            f'  - {{name: model-{model}, source: "hf:{source}@main", pool: pool-{model % POOLS}, '
            f"engine: vllm, port: {8000 + model}, vllm: {{max_model_len: {length}}}, peak_tokens_per_second: 1000}}"
        )
    return "\n".join([*lines, "gateway: {port: 8080, nodes: 2}", "planning: {region: us-east-1}", ""])


def measured(fleet: Path, page: Path) -> tuple[float, float, float]:
    """Seconds, most megabytes resident (10^6 bytes) and CPU seconds of one `gpuyard plan` with its page."""
    began = time.perf_counter()
    child = os.posix_spawn(
        str(Path(sys.executable).with_name("gpuyard")),
        ["gpuyard", "plan", str(fleet), "--json", "--html", str(page)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: something is red, which is no failure of the plan
        raise SystemExit(f"gpuyard plan {fleet} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6, usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        fleet, page = Path(folder) / "large.yaml", Path(folder) / "large.html"
        fleet.write_text(large())
        measured(fleet, page)  # the first run compiles what Python then finds compiled
        found = [measured(fleet, page) for _ in range(runs)]
        size = page.stat().st_size
    seconds, megabytes = [run[0] for run in found], max(run[1] for run in found)
    median = statistics.median(seconds)
    kept = median <= MOST_SECONDS and megabytes <= MOST_MB
    figures = {
        "nodes": POOLS * NODES,
        "models": MODELS,
        "runs": runs,
        "plan_seconds": f"{median:.2f}",
        "plan_seconds_max": f"{max(seconds):.2f}",
        "plan_cpu_seconds": f"{statistics.median(run[2] for run in found):.2f}",
        "plan_mb": f"{megabytes:.0f}",
        "page_bytes": size,
        "limit_seconds": MOST_SECONDS,
        "limit_mb": f"{MOST_MB:.0f}",
        "kept": int(kept),
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
