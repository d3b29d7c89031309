"""Every engine restarted under streams: nothing is lost where nodes are drained, and where they are not it shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tools.bench_drain import OUTCOMES, WAYS, Drill, Way

from .conftest import run

pytestmark = pytest.mark.lab

STACK = "drill"
REQUESTS, RATE = 600, 20
DRAINED, UNDRAINED = (
    next(way for way in WAYS if way.drained is drained and way.drain_seconds == 0) for drained in (True, False)
)


@pytest.fixture(scope="module")
def drill() -> Iterator[Drill]:
    up = run("gpuyard", "lab", "up", "--stack", STACK, timeout=900)
    assert up.rc == 0, up.output
    yield Drill(STACK)
    assert run("gpuyard", "lab", "down", "--stack", STACK).rc == 0


def walked(drill: Drill, way: Way, requests: int, *nodes: str) -> dict[str, Any]:
    told = drill.walk(way, requests, RATE, 4, nodes)
    print(f"{way.name}: { ({name: told[name] for name in OUTCOMES}) }, restarts took {told['walk_seconds']} s")
    return told


def test_restarts_of_drained_nodes_lose_nothing_though_engines_cut_at_once_what_runs(drill: Drill) -> None:
    told = walked(drill, DRAINED, REQUESTS)
    lost = [line for line in told["lines"] if line["outcome"] != "complete"]
    assert told["lossless"], lost[:5]
    assert told["requests"] >= REQUESTS
    assert told["seconds"] > told["walk_seconds"], "the load ended before the walk"


def test_a_restart_without_a_drain_loses_requests_and_the_ledger_says_so(drill: Drill) -> None:
    told = walked(drill, UNDRAINED, 0, drill.nodes[0])
    assert not told["lossless"]
    assert told["failed"] + told["truncated"] > 0
