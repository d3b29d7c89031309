"""What `make bench-upgrade` makes of what it saw: times, bytes, figures, and the verdict."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gpuyard.lab.own_fleet import LOST, Run
from tools.bench_upgrade import Sample, Walk, compiled, fetched, figures, spans, table_of, verdict


def sample(at: float, a: str, b: str) -> Sample:
    return Sample(at, {"a": a, "b": b}, 0)


def walk(kind: str, seconds: float, out: float, **lost: int) -> Walk:
    told: dict[str, Any] = {"requests": 1000, **dict.fromkeys(LOST, 0), **lost, "lossless": not lost}
    outages = {"a": out, "b": out + 1, "c": out + 2}
    return Walk(
        kind,
        Run(0, "", seconds),
        told,
        retries=2,
        outages=outages,
        downloaded=7,
        compiled=0.0 if kind != "naive" else 435.0,
        wall=seconds - 5,
    )


def test_a_node_is_out_from_when_it_is_not_up_until_it_is_again() -> None:
    seen = [
        sample(10, "UP", "UP"),
        sample(11, "DRAIN", "UP 2/3"),
        sample(12, "DRAIN", "UP"),
        sample(13, "UP", "DOWN"),
        sample(14, "UP", "DOWN 1/2"),
        sample(15, "DRAIN", "UP"),
        sample(16, "UP", "UP"),
    ]
    assert spans(seen) == {"a": [(11, 13), (15, 16)], "b": [(13, 15)]}


def test_a_node_that_does_not_come_back_is_out_until_the_end() -> None:
    assert spans([sample(1, "UP", "MAINT"), sample(4, "UP", "MAINT")]) == {"a": [], "b": [(1, 4)]}


@pytest.mark.parametrize(("begin", "end", "total"), [(-5.0, -1.0, 0), (-5.0, 0.0, 30), (0.9, 5.0, 30), (1.0, 5.0, 0)])
def test_packages_count_that_a_node_fetched_while_it_was_out(begin: float, end: float, total: int) -> None:
    """The log rounds down: 0.9 s after the second it names, the request may still have been to come."""
    moment = 1_790_000_000
    when = time.strftime("%d/%b/%Y %H:%M:%S", time.localtime(moment))
    log = "".join(
        f'{address} - - [{when}] "GET {path} HTTP/1.1" 200 -\n'
        for address, path in [
            ("10.77.0.20", "/apt/./x_1_amd64.deb"),
            ("10.77.0.20", "/apt/InRelease"),
            ("10.77.0.21", "/apt/./y_1_amd64.deb"),
            ("10.77.0.1", "/health"),
        ]
    )
    addresses = {"a": "10.77.0.20", "b": "10.77.0.21", "gateway": "10.77.0.10"}
    out = {"a": [(moment + begin, moment + end)], "b": []}
    assert fetched(log, addresses, {"x_1_amd64.deb": 30, "y_1_amd64.deb": 500}, out) == total


def test_ours_and_the_naive_play_are_counted_apart() -> None:
    walks = [walk("upgrade", 66, 10), walk("rollback", 99, 20), walk("naive", 30, 4, failed=8, truncated=1)]
    told = figures(walks, 3)
    assert list(told)[:3] == ["upgrades", "rollbacks", "requests"]
    assert (told["upgrades"], told["rollbacks"], told["naive"], told["seed"]) == (1, 1, 1, 3)
    assert (told["requests"], told["failed"], told["truncated"], told["retries"]) == (2000, 0, 0, 4)
    assert (told["seconds"], told["out_seconds"], told["out_bytes"]) == (82.5, 16, 14)
    assert told["overhead"] == pytest.approx((66 / 33 + 99 / 63) / 2, abs=0.01)
    assert (told["naive_failed"], told["naive_truncated"], told["naive_seconds"]) == (8, 1, 30)
    assert (told["out_compiled"], told["naive_out_compiled"]) == (0, 435)
    assert told["out_of_naive"] == pytest.approx(told["out_seconds"] / told["naive_out_seconds"], abs=0.001)
    assert told["wall"] == pytest.approx((61 / 33 + 94 / 63) / 2, abs=0.01)
    assert table_of(walks).row_count == 6


def test_a_loss_of_ours_and_a_naive_play_without_one_speak_against_it() -> None:
    kept, lost, naive = walk("upgrade", 60, 10), walk("rollback", 60, 10, duplicated=1), walk("naive", 30, 4, failed=1)
    assert verdict([kept, naive]) == []
    assert verdict([kept, lost, naive]) == ["LOST: requests were lost in rollback 2"]
    (empty,) = verdict([kept, walk("naive", 30, 4)])
    assert empty.startswith("EMPTY")


def test_only_what_is_compiled_while_the_node_is_out_counts() -> None:
    log = "".join(f'{{"from": {begin}, "until": {begin + 10}, "seconds": 4.5}}\n' for begin in (0, 95, 110, 121))
    assert compiled(log, [(100, 120)]) == 9
    assert compiled("", [(100, 120)]) == 0
