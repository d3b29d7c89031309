"""Machines and parallelism chosen for a load: they fit, carry it, and nothing that was considered costs less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuyard.plan.sizing.chosen import chosen
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.plan import plan_of
from gpuyard.spec.errors import RefusedError
from tests.plan.conftest import planned_fleet

POOL = {"name": "large", "nodes": 2, "gpu": "L40S", "gpus_per_node": 4}
QWEN = {"name": "qwen", "source": "hf:Qwen/Qwen3-32B@main", "pool": "large", "engine": "vllm", "port": 8000}
PLANNING = {"region": "us-east-1", "spare_nodes": 0}


def wished(peak: float, source: str = "hf:Qwen/Qwen3-32B@main", **pool: Any) -> Any:
    model = {**QWEN, "source": source, "vllm": {"max_model_len": 8192}, "peak_tokens_per_second": peak}
    return planned_fleet(pools=[{**POOL, **pool}], models=[model], planning=PLANNING)


def test_what_is_chosen_is_planned_without_a_red_finding_and_carries_the_peak(givens: Givens) -> None:
    fleet = chosen(wished(4000.0), givens)
    plan = plan_of(fleet, givens)
    assert [finding for finding in plan.findings if finding.level == "red"] == []
    model = plan.models[0]
    assert model.memory and model.memory.fits and model.money
    assert model.money.tokens_per_second_capacity.value >= 4000
    assert fleet.pools[0].machine and fleet.pools[0].machine.instance == plan.pools[0].instance
    assert model.gpus_per_node == fleet.pools[0].gpus_per_node  # alone on its nodes a model fills them


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    peak=st.floats(10, 50_000),
    source=st.sampled_from(
        ["hf:Qwen/Qwen3-32B@main", "hf:meta-llama/Llama-3.1-8B-Instruct@main", "hf:Qwen/Qwen3-30B-A3B@main"]
    ),
)
def test_no_kind_of_machine_of_one_copy_carries_the_load_for_less(givens: Givens, peak: float, source: str) -> None:
    fleet = chosen(wished(peak, source), givens)
    plan = plan_of(fleet, givens)
    bill = next(line.usd_per_hour.value for line in plan.bill.lines if line.what == "pool large")
    for other in plan.pools[0].considered:
        # One node of a kind that could take it: where that alone costs more, no number of them is cheaper.
        if other.usd_per_mtok and other.usd_per_node_hour:
            rate = other.usd_per_node_hour.value / other.usd_per_mtok.value * 1e6 / 3600
            nodes = -(-peak // (rate * 0.9997))
            assert bill <= nodes * other.usd_per_node_hour.value * 1.001, other.what


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(peak=st.floats(100, 20_000), factor=st.floats(1.01, 5))
def test_more_load_never_costs_less(givens: Givens, peak: float, factor: float) -> None:
    low, high = (plan_of(chosen(wished(load), givens), givens) for load in (peak, peak * factor))
    assert low.bill.usd_per_hour.value <= high.bill.usd_per_hour.value + 1e-9


def test_it_stays_with_the_hosts_whose_price_their_owner_states(givens: Givens) -> None:
    fleet = chosen(wished(4000.0, gpu="H100-SXM5-80GB", gpus_per_node=8, machine={"usd_per_hour": 20.0}), givens)
    assert (fleet.pools[0].gpu, fleet.pools[0].gpus_per_node) == ("H100-SXM5-80GB", 8)
    # One GPU holds the model with room for a few requests; two hold many more of them than twice as many copies.
    assert fleet.models[0].vllm.tensor_parallel_size == 2 and fleet.models[0].vllm.data_parallel_size == 4


def test_models_that_share_a_pool_stay_together(givens: Givens) -> None:
    small = {**QWEN, "name": "small", "source": "hf:meta-llama/Llama-3.1-8B-Instruct@main", "port": 8001}
    both = [{**item, "vllm": {"max_model_len": 8192}, "peak_tokens_per_second": 500.0} for item in (QWEN, small)]
    plan = plan_of(chosen(planned_fleet(pools=[POOL], models=both, planning=PLANNING), givens), givens)
    assert [item.memory is not None and item.memory.fits for item in plan.models] == [True, True]
    assert plan.pools[0].gpus_used <= plan.pools[0].gpus_per_node


def test_where_nothing_fits_it_is_refused(givens: Givens) -> None:
    machines = [row for row in givens.instances if row.gpu in ("T4", "L4")]
    with pytest.raises(RefusedError) as refused:
        chosen(wished(100.0, "hf:deepseek-ai/DeepSeek-V3@main"), replace(givens, instances=machines))
    assert refused.value.rule == "PLAN-NOTHING-FITS" and "qwen" in refused.value.found


def test_a_chosen_fleet_chooses_itself(givens: Givens) -> None:
    fleet = chosen(wished(4000.0), givens)
    assert chosen(fleet, givens) == fleet
