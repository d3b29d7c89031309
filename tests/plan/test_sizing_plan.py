"""Whole plans: one fleet in, the same plan out, and every finding with its smallest change."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.plan.memory.budget import board_of
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.fit import Settings, fit
from gpuyard.plan.names import UnknownError
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.plan import Plan, plan_of, plan_schema_text
from gpuyard.plan.sizing.room import CatalogRooms
from gpuyard.plan.sizing.throughput import Measured
from gpuyard.spec.fleet import Fleet, Vllm
from gpuyard.spec.loader import load_fleet
from tests.plan.conftest import planned_fleet

PROJECT = Path(__file__).parents[2]

LARGE = {"name": "large", "nodes": 3, "gpu": "H100-SXM5-80GB", "gpus_per_node": 8}
LLAMA = {
    "name": "llama",
    "source": "hf:meta-llama/Llama-3.1-70B-Instruct@main",
    "pool": "large",
    "engine": "vllm",
    "port": 8000,
}
LLAMA_8B_ON_CPU = {
    "source": "hf:meta-llama/Llama-3.1-8B-Instruct@main",
    "vllm": Vllm(dtype="bfloat16", max_model_len=32768),
}
FP8 = {"quantization": "fp8", "max_model_len": 16384}


def model(**vllm: Any) -> dict[str, Any]:
    return {**LLAMA, "vllm": {**FP8, **vllm}}


def rules(plan: Plan) -> dict[str, str]:
    return {finding.rule: finding.level for finding in plan.findings}


def change(plan: Plan, rule: str) -> str:
    return next(finding.change for finding in plan.findings if finding.rule == rule)


def test_the_same_fleet_tables_and_day_give_the_same_plan(givens: Givens) -> None:
    fleet = planned_fleet()
    before = fleet.model_dump_json()
    first, second = plan_of(fleet, givens), plan_of(planned_fleet(), givens)
    assert first.model_dump_json() == second.model_dump_json()
    assert fleet.model_dump_json() == before


def test_a_plan_is_what_its_schema_says(givens: Givens) -> None:
    schema = json.loads(plan_schema_text())
    plan = json.loads(plan_of(planned_fleet(), givens).model_dump_json())
    jsonschema.validate(plan, schema)
    del plan["bill"]["usd_per_hour"]["how"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plan, schema)


def figures(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        if {"value", "unit"} <= data.keys():
            yield data
        for item in data.values():
            yield from figures(item)
    elif isinstance(data, list):
        for item in data:
            yield from figures(item)


def test_every_figure_says_how_it_came_about(givens: Givens) -> None:
    told = list(figures(json.loads(plan_of(planned_fleet(), givens).model_dump_json())))
    assert len(told) > 100
    assert [item for item in told if len(item["how"]) < 3] == []
    assert [item for item in told if item["low"] is not None and not item["low"] <= item["value"] <= item["high"]] == []


def test_models_bear_the_whole_bill(givens: Givens) -> None:
    small = {"name": "small", "nodes": 2, "gpu": "L40S", "gpus_per_node": 4}
    tiny = {**LLAMA, "name": "tiny", "source": "hf:meta-llama/Llama-3.1-8B-Instruct@main", "pool": "small"}
    other = {**LLAMA, "name": "other", "port": 8001, "vllm": {**FP8, "tensor_parallel_size": 2}}
    models = [model(tensor_parallel_size=2, data_parallel_size=2), other, {**tiny, "vllm": {"max_model_len": 8192}}]
    plan = plan_of(planned_fleet(pools=[LARGE, small], models=models), givens)
    shares = [item.money.usd_per_hour.value for item in plan.models if item.money]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(plan.bill.usd_per_hour.value)
    assert sum(line.usd_per_hour.value for line in plan.bill.lines) == pytest.approx(plan.bill.usd_per_hour.value)
    assert shares[0] == pytest.approx(2 * shares[1])  # four GPUs of each node against two


def test_a_spare_node_and_idle_hours_are_paid_by_the_tokens_served(givens: Givens) -> None:
    def price(**planning: float) -> float:
        plan = plan_of(planned_fleet(planning={"region": "us-east-1", **planning}), givens)
        money = plan.models[0].money
        assert money
        return money.usd_per_mtok.value

    assert price(utilisation=0.25, spare_nodes=0) == pytest.approx(2 * price(utilisation=0.5, spare_nodes=0))
    assert price(utilisation=0.5, spare_nodes=1) == pytest.approx(1.5 * price(utilisation=0.5, spare_nodes=0))
    assert price(upgrades_per_year=52, minutes_per_upgrade=60) > price(upgrades_per_year=0)


def test_a_published_benchmark_and_a_measurement_are_told_as_what_they_are(givens: Givens) -> None:
    told = plan_of(planned_fleet(), givens).models[0].throughput
    assert told and told.basis == "published" and "MLPerf" in told.tokens_per_second.how
    measured = replace(givens, measured={"llama": Measured(24_000, "bench.json")})
    told = plan_of(planned_fleet(), measured).models[0].throughput
    assert told and (told.basis, told.tokens_per_second.value) == ("measured", 3_000)  # 2 nodes x 4 copies


def test_parallelism_that_is_left_out_is_chosen_and_the_engine_is_not_left_to_its_default(givens: Givens) -> None:
    plan = plan_of(planned_fleet(models=[model()]), givens)
    chosen = plan.models[0]
    assert (chosen.tensor_parallel_size, chosen.tensor_parallel_from) == (2, "chosen")
    assert rules(plan)["SIZE-TENSOR-PARALLEL"] == "red"
    assert change(plan, "SIZE-TENSOR-PARALLEL") == "set models[0].vllm.tensor_parallel_size to 2"
    considered = {item.what: item.rule for item in plan.pools[0].considered}
    assert considered["llama: tensor_parallel_size 1"] == "FIT-MEMORY"
    assert considered["llama: tensor_parallel_size 4"] == "SIZE-LARGER"


def test_other_machines_are_considered_with_a_reason_each(givens: Givens) -> None:
    considered = {item.what: item for item in plan_of(planned_fleet(), givens).pools[0].considered}
    assert considered["p5en.48xlarge: 8 x H200-SXM-141GB"].rule in ("COST-DEARER", "COST-CHEAPER")
    assert considered["p4d.24xlarge: 8 x A100-SXM4-40GB"].usd_per_node_hour
    assert considered["g6e.xlarge: 1 x L40S"].rule == "FIT-MEMORY"
    assert considered["p3dn.24xlarge: 8 x V100-SXM2-32GB"].rule.startswith("COMPAT-")
    assert all(item.why for item in considered.values())
    priced = [item.usd_per_mtok.value for item in considered.values() if item.usd_per_mtok]
    assert priced == sorted(priced) and len(priced) >= 3


def test_memory_is_what_fit_says(givens: Givens) -> None:
    plan = plan_of(planned_fleet(), givens)
    memory = plan.models[0].memory
    assert memory
    row = next(row for row in load_shapes() if row.model == "meta-llama/Llama-3.1-70B-Instruct")
    board = board_of(next(row for row in givens.catalog.gpus if row.name == "H100-SXM5-80GB"))
    flags = Settings(memory.engine, tensor_parallel_size=2, quantization="fp8", max_model_len=16384)
    done = fit(shape_of(row.config, row.model), board, flags, load_memory())
    assert (memory.kv_cache_tokens, memory.max_concurrency) == (done.kv_cache_tokens, done.max_concurrency)
    assert memory.parts[0].gib == done.weights_gib
    assert sum(part.gib for part in memory.parts) == pytest.approx(memory.requested_gib, abs=1e-3)


def test_starts_of_one_s_own_go_before_what_is_reckoned(givens: Givens) -> None:
    assert isinstance(givens.rooms, CatalogRooms)
    before = plan_of(planned_fleet(), givens).models[0].memory
    assert before
    start = {
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "gpu": "H100-SXM5-80GB",
        "tp": "2",
        "vllm_version": before.engine,
        "predicted_kv_gib": "30",
        "reported_kv_gib": "29",
    }
    rooms = replace(givens.rooms, starts=[start], _rooms={})
    after = plan_of(planned_fleet(), replace(givens, rooms=rooms)).models[0].memory
    assert after and after.learned_from == 1 and before.learned_from == 0
    assert after.parts[-1].gib == pytest.approx(before.parts[-1].gib - 1)
    little = replace(givens.rooms, starts=[{**start, "predicted_kv_gib": "34", "reported_kv_gib": "0.1"}], _rooms={})
    assert rules(plan_of(planned_fleet(), replace(givens, rooms=little)))["FIT-MEMORY"] == "red"


def test_a_model_that_no_node_holds_is_told_how_many_would(givens: Givens) -> None:
    huge = {**LLAMA, "source": "hf:deepseek-ai/DeepSeek-V3@main", "vllm": {"max_model_len": 8192}}
    plan = plan_of(planned_fleet(models=[huge]), givens)
    assert rules(plan)["FIT-MEMORY"] == "red"
    told = {item.rule: item for item in plan.pools[0].considered}
    assert told["SIZE-NODES"].what == "llama: tensor_parallel_size 8, pipeline_parallel_size 2"
    narrow = plan_of(planned_fleet(models=[model(tensor_parallel_size=1)]), givens)
    assert "SIZE-NODES" not in {item.rule for item in narrow.pools[0].considered}  # two GPUs of the node hold it


def test_an_engine_that_is_no_longer_looked_after_rules_out_no_machine(givens: Givens) -> None:
    old = planned_fleet(engines=[{"name": "vllm", "distribution": "vllm", "version": "0.11.0"}])
    refused = {item.rule for item in plan_of(old, givens).pools[0].considered}
    assert "COMPAT-ENGINE-ADVISORY" not in refused and "COST-DEARER" in refused


FINDINGS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"models": [model(tensor_parallel_size=1)]}, "FIT-MEMORY", "red", "tensor_parallel_size 2 fits"),
    ({"models": [model(tensor_parallel_size=3)]}, "FIT-TP", "red", "take 4"),
    ({"models": [model(tensor_parallel_size=2)]}, "SIZE-IDLE-GPUS", "amber", "machines with 2 GPUs"),
    (
        {"models": [model(tensor_parallel_size=8), {**model(tensor_parallel_size=2), "name": "b", "port": 8001}]},
        "SIZE-GPUS",
        "red",
        "gpus_per_node to 10",
    ),
    ({"pools": [{**LARGE, "nodes": 1}]}, "SIZE-SPARE", "red", "spare_nodes to 0"),
    ({"pools": [{**LARGE, "nodes": 1}], "planning": {}}, "SIZE-ONE-NODE", "amber", "nodes to 2"),
    ({"pools": [{**LARGE, "machine": {"nvme_gb": 100.0}}]}, "SIZE-CACHE", "red", "larger drives"),
    ({"planning": {"rack": {"watts": 20000.0, "nodes": 2}}}, "POWER-RACK", "red", "rack.nodes to 1"),
    ({"planning": {"region": "eu-west-1"}}, "COST-PRICE", "amber", "on-demand in eu-north-1"),
    ({"planning": {"region": "eu-west-2", "purchase": "spot"}}, "COST-SPOT", "amber", "bought otherwise"),
    ({"planning": {"purchase": "capacity-block"}}, "COST-OLD-PRICE", "amber", "usd_per_hour"),
    ({"planning": {"cold_start_seconds": 5.0}}, "SIZE-COLD-START", "red", "cold_start_seconds"),
    ({"models": [{**model(tensor_parallel_size=4), "peak_tokens_per_second": 1e6}]}, "SIZE-LOAD", "red", "copies"),
    (
        {
            "models": [{**model(tensor_parallel_size=2, data_parallel_size=4), "peak_tokens_per_second": 17e3}],
            "planning": {},
        },
        "SIZE-LOAD-UPGRADE",
        "amber",
        "outside of the peak",
    ),
    ({"models": [model(tensor_parallel_size=4)]}, "COST-THROUGHPUT", "amber", "bench load"),
    (
        {"models": [{**LLAMA, "source": "hf:meta-llama/Llama-3.1-70B@main"}]},
        "FIT-UNKNOWN",
        "amber",
        "did you mean meta-llama/Llama-3.1-70B-Instruct?",
    ),
]


@pytest.mark.parametrize(("changes", "rule", "level", "smallest"), FINDINGS, ids=[row[1] for row in FINDINGS])
def test_each_finding_says_what_would_pass(
    givens: Givens, changes: dict[str, Any], rule: str, level: str, smallest: str
) -> None:
    plan = plan_of(planned_fleet(**changes), givens)
    assert rules(plan).get(rule) == level
    assert smallest in change(plan, rule)
    assert plan.verdict == "red" if level == "red" else plan.verdict in ("amber", "red")


def test_tensor_parallelism_over_pcie_is_told_where_it_costs_much(givens: Givens) -> None:
    pool = {"name": "large", "nodes": 2, "gpu": "L40S", "gpus_per_node": 8}
    plan = plan_of(planned_fleet(pools=[pool], models=[model(tensor_parallel_size=8, max_num_seqs=256)]), givens)
    assert "SIZE-LINK" in rules(plan)
    assert [way.over for way in plan.models[0].traffic][:2] == ["PCIe of L40S", "EFA of g6e.48xlarge"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"pools": [{**LARGE, "gpu": "H100-SXM-80GB"}]}, "PLAN-GPU", "H100-SXM5-80GB"),
    ({"engines": [{"name": "vllm", "distribution": "vllm", "version": "0.11.9"}]}, "PLAN-ENGINE", "0.11."),
    ({"pools": [{**LARGE, "machine": {"instance": "p5.48xlarg"}}]}, "PLAN-INSTANCE", "p5.48xlarge"),
    ({"pools": [{**LARGE, "machine": {"instance": "g6e.48xlarge"}}]}, "PLAN-INSTANCE", "L40S"),
    ({"planning": {"storage": {"tier": "s3-standart"}}}, "PLAN-STORAGE", "s3-standard"),
    ({"planning": {"compare_with": ["openai/gpt-4o-min"]}}, "PLAN-API", "openai/gpt-4o-mini"),
]


@pytest.mark.parametrize(("changes", "rule", "nearest"), REFUSED)
def test_an_unknown_name_is_refused_with_the_nearest(
    givens: Givens, changes: dict[str, Any], rule: str, nearest: str
) -> None:
    with pytest.raises(UnknownError) as refused:
        plan_of(planned_fleet(**changes), givens)
    assert refused.value.rule == rule and nearest in refused.value.change


def test_the_same_machine_costs_what_its_region_and_purchase_say(givens: Givens) -> None:
    def price(**planning: str) -> float | None:
        figure = plan_of(planned_fleet(planning=planning), givens).pools[0].usd_per_node_hour
        return figure and figure.value

    assert price(region="us-east-1") == 55.04
    assert price(region="eu-west-2") == 71.552
    assert price(region="eu-west-2", purchase="spot") == 15.7259
    assert price(region="us-east-2", purchase="capacity-block") == 39.33
    assert price(region="us-east-1", purchase="reserved-3y") is None


def test_own_hosts_cost_what_their_owner_says(givens: Givens) -> None:
    """Ten A100 of 40 GB at 3.50 USD an hour each, and nothing beside them."""
    pool = {
        "name": "large",
        "nodes": 10,
        "gpu": "A100-SXM4-40GB",
        "gpus_per_node": 1,
        "machine": {"usd_per_hour": 3.5},
    }
    tiny = {**LLAMA, "source": "hf:meta-llama/Llama-3.1-8B-Instruct@main", "vllm": {"max_model_len": 8192}}
    planning = {"staff": {"full_time_equivalents": 0.0, "usd_per_year": 0.0}, "compare_with": ["openai/gpt-4o-mini"]}
    plan = plan_of(planned_fleet(provider="hosts", pools=[pool], models=[tiny], planning=planning), givens)
    assert plan.bill.usd_per_hour.value == 35 and plan.bill.usd_per_month.value == 25_550
    money = plan.models[0].money
    assert money and money.break_even[0].mtok_per_month.value == pytest.approx(25_550 / 0.2625)


def test_nothing_in_the_plan_can_ask_a_clock_a_file_the_network_or_the_environment() -> None:
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "datetime",
        "html",
        "json",
        "math",
        "re",
        "typing",
        "pydantic",
    }
    for path in (PROJECT / "src/gpuyard/plan/sizing").glob("*.py"):
        tree = ast.parse(path.read_text())
        named = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {name.partition(".")[0] for name in named} - {"gpuyard"} <= allowed, path.name
        called = {
            node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        assert not called & {"now", "today", "utcnow", "open", "read_text", "write_text", "getenv"}, path.name


def test_what_the_plan_alone_reads_makes_no_lock_stale() -> None:
    bare = planned_fleet(planning=None)
    pools = [{**LARGE, "machine": {"usd_per_hour": 12.5}}]
    stated = planned_fleet(pools=pools, models=[{**model(tensor_parallel_size=2, data_parallel_size=4)}])
    assert bare.digest == stated.digest
    loaded = planned_fleet(
        models=[{**model(tensor_parallel_size=2, data_parallel_size=4), "peak_tokens_per_second": 9.0}]
    )
    assert loaded.digest == bare.digest
    narrower: Fleet = planned_fleet(models=[model(tensor_parallel_size=2, data_parallel_size=2)])
    assert narrower.digest != bare.digest


# --- without a GPU -----------------------------------------------------------------------------------------------


def on_cpu(givens: Givens, **changes: Any) -> Plan:
    spec = load_fleet(PROJECT / "fleets/lab.yaml")
    small = spec.models[0].model_copy(update=changes)
    return plan_of(spec.model_copy(update={"models": (small,)}), givens)


def test_an_engine_without_a_gpu_has_the_cache_that_the_fleet_states(givens: Givens) -> None:
    memory = on_cpu(givens).models[0].memory
    assert memory
    # 2 x 30 layers x 3 heads x 64 values x 4 bytes = 46,080 bytes a token; 182 blocks of 128 tokens go into 1 GiB.
    assert memory.kv_cache_tokens == 182 * 128
    assert {part.name: part.gib for part in memory.parts}["KV cache"] == 1
    twice = on_cpu(givens, env={"VLLM_CPU_KVCACHE_SPACE": "2"}).models[0].memory
    assert twice and twice.kv_cache_tokens == 364 * 128


@pytest.mark.parametrize("env", [{}, {"VLLM_CPU_KVCACHE_SPACE": "0"}, {"VLLM_CPU_KVCACHE_SPACE": "much"}])
def test_a_cache_that_the_fleet_does_not_state_is_not_guessed(givens: Givens, env: dict[str, str]) -> None:
    assert on_cpu(givens, env=env).models[0].memory is None


def test_a_cache_without_room_for_one_request_names_the_space_that_has_it(givens: Givens) -> None:
    large = LLAMA_8B_ON_CPU
    plan = on_cpu(givens, **large, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert plan.verdict == "red"
    # 4 GiB of 32,768 tokens, and the block that this version keeps for itself.
    assert change(plan, "FIT-MEMORY") == "set env.VLLM_CPU_KVCACHE_SPACE to 5, or take a shorter max_model_len"
    assert on_cpu(givens, **large, env={"VLLM_CPU_KVCACHE_SPACE": "5"}).verdict == "green"
    assert on_cpu(givens, **large, env={"VLLM_CPU_KVCACHE_SPACE": "4"}).verdict == "red"
