"""`gpuyard plan` as a user meets it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from gpuyard.cli import sizing
from gpuyard.plan.sizing.rules import RULES

from .conftest import Command

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "today", lambda: "2026-11-29")


@pytest.fixture
def prod(tmp_path: Path) -> Path:
    (tmp_path / "fleets").mkdir()
    return Path(shutil.copy(PROJECT / "fleets/prod.yaml", tmp_path / "fleets/prod.yaml"))


def test_the_fleet_of_the_project_is_planned_in_80_columns(gpuyard: Command, prod: Path) -> None:
    code, out, _ = gpuyard("plan", prod)
    assert code == 0
    tables = out.partition("assumed, not stated")[0].splitlines()
    assert tables and max(map(len, tables)) <= 80
    for title in (
        "Nodes",
        "Models",
        "Considered for pool large",
        "Between GPUs",
        "Cold start",
        "Bill",
        "Break-even",
    ):
        assert any(line.startswith(title) for line in tables), title
    assert "fleet prod is amber as planned on 2026-11-29" in out


def test_the_lab_is_planned_and_costs_nothing(gpuyard: Command) -> None:
    code, out, _ = gpuyard("plan", PROJECT / "fleets/lab.yaml", "--json")
    plan = json.loads(out)
    assert (code, plan["verdict"], plan["bill"]["usd_per_hour"]["value"]) == (0, "green", 0)


def test_json_is_what_the_committed_schema_says(gpuyard: Command, prod: Path) -> None:
    schema = json.loads((PROJECT / "schemas/plan.schema.json").read_text())
    _, told, _ = gpuyard("schema", "plan")
    assert json.loads(told) == schema, "run `gpuyard schema plan -o schemas/plan.schema.json`"
    _, out, _ = gpuyard("plan", prod, "--json")
    jsonschema.validate(json.loads(out), schema)


def test_a_page_is_written_where_it_is_asked_for(gpuyard: Command, prod: Path, tmp_path: Path) -> None:
    code, out, _ = gpuyard("plan", prod, "--html", tmp_path / "plan.html")
    assert code == 0 and f"page: {tmp_path / 'plan.html'}" in out
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    code, _, err = gpuyard("plan", prod, "--html", tmp_path / "no/plan.html")
    assert code == 3 and err.startswith("CLI-WRITE")


def test_red_findings_are_exit_code_1(gpuyard: Command, prod: Path) -> None:
    prod.write_text(prod.read_text().replace("tensor_parallel_size: 2, data_parallel_size: 4, quantization: fp8, ", ""))
    code, out, _ = gpuyard("plan", prod)
    assert code == 1 and "set models[0].vllm.tensor_parallel_size to 4" in out


def test_a_measurement_is_read_and_a_wrong_one_refused(gpuyard: Command, prod: Path, tmp_path: Path) -> None:
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"model": "llama-8b", "tokens_per_second": 8000.0}))
    _, out, _ = gpuyard("plan", prod, "--json", "--bench", bench)
    model = json.loads(out)["models"][1]
    # One node of the two serves, with four copies.
    assert (model["throughput"]["basis"], model["throughput"]["tokens_per_second"]["value"]) == ("measured", 2000)
    for text in ("{}", "[1]", "no json", json.dumps({"model": "nobody", "tokens_per_second": 1.0})):
        bench.write_text(text)
        code, _, err = gpuyard("plan", prod, "--bench", bench)
        assert code == 3 and err.startswith("PLAN-BENCH"), text
    bench.write_text(json.dumps({"model": "llama-8b", "tokens_per_second": 0}))
    assert gpuyard("plan", prod, "--bench", bench)[0] == 3
    assert gpuyard("plan", prod, "--bench", tmp_path / "none.json")[0] == 3


def test_starts_of_one_s_own_are_read(gpuyard: Command, prod: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts.csv"
    _, out, _ = gpuyard("plan", prod, "--json")
    memory = json.loads(out)["models"][1]["memory"]
    starts.write_text(
        "model,gpu,tp,vllm_version,predicted_kv_gib,reported_kv_gib,reported_kv_tokens,tier\n"
        f"meta-llama/Llama-3.1-8B-Instruct,L40S,1,{memory['engine']},24,23.5,190000,own\n"
    )
    _, out, _ = gpuyard("plan", prod, "--json", "--learned", starts)
    learned = json.loads(out)["models"][1]["memory"]
    assert learned["learned_from"] == 1
    assert learned["parts"][-1]["gib"] == pytest.approx(memory["parts"][-1]["gib"] - 0.5)
    code, _, err = gpuyard("plan", prod, "--learned", tmp_path / "none.csv")
    assert code == 3 and "FIT-CSV" in err


def test_a_model_is_planned_by_its_own_config(gpuyard: Command, prod: Path, tmp_path: Path) -> None:
    text = prod.read_text()
    assert "meta-llama/Llama-3.1-8B-Instruct" in text
    _, out, _ = gpuyard("plan", prod, "--json")
    known = json.loads(out)["models"][1]["memory"]
    prod.write_text(text.replace("meta-llama/Llama-3.1-8B-Instruct", "our-team/our-model"))
    _, out, _ = gpuyard("plan", prod)
    assert "--config llama-8b=config.json" in " ".join(out.split())
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
              "max_position_embeddings": 131072, "tie_word_embeddings": False}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for word in (path, tmp_path):
        _, out, _ = gpuyard("plan", prod, "--json", "--config", f"llama-8b={word}")
        assert json.loads(out)["models"][1]["memory"]["parts"] == known["parts"]


@pytest.mark.parametrize(
    ("word", "text", "rule"),
    [
        ("llama-8b", "{}", "PLAN-CONFIG"),
        ("nobody={}", "{}", "PLAN-CONFIG"),
        ("llama-8b=no-such-file", "{}", "PLAN-CONFIG"),
        ("llama-8b={}", "no json", "FIT-CONFIG"),
        ("llama-8b={}", '{"hidden_size": 4096}', "FIT-CONFIG"),
        ("llama-8b={}", '{"hidden_size": 1e300, "num_attention_heads": 2}', "FIT-CONFIG"),
    ],
)
def test_a_config_that_says_too_little_is_refused(
    gpuyard: Command, prod: Path, tmp_path: Path, word: str, text: str, rule: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, err = gpuyard("plan", prod, "--config", word.replace("{}", str(tmp_path / "config.json")))
    assert (code, err.partition(":")[0]) == (3, rule)


def test_a_chosen_fleet_is_written_planned_and_checked(gpuyard: Command, prod: Path) -> None:
    spec = prod.with_name("chosen.yaml")
    code, out, _ = gpuyard("plan", prod, "--choose", "--spec", spec, "--json")
    assert code == 0
    _, again, _ = gpuyard("plan", spec, "--json")
    assert json.loads(again)["bill"] == json.loads(out)["bill"]
    assert json.loads(out)["bill"]["usd_per_hour"]["value"] <= 196.7


def test_a_hub_s_model_is_checked_and_the_lock_says_what_it_lacks(gpuyard: Command) -> None:
    code, out, _ = gpuyard("check", PROJECT / "fleets/prod.yaml")
    assert code == 0 and "PLAN-MANIFEST [amber]: models[0].source" in out
    code, _, err = gpuyard("lock", PROJECT / "fleets/prod.yaml")
    assert code == 3 and err.startswith("PLAN-MANIFEST [red]")
    assert not (PROJECT / "fleets/prod.lock.yaml").exists()


def test_every_rule_of_a_plan_is_explained(gpuyard: Command) -> None:
    code = "".join(path.read_text() for path in (PROJECT / "src/gpuyard/plan/sizing").glob("*.py"))
    used = set(re.findall(r'"((?:SIZE|COST|POWER)-[A-Z-]+|FIT-UNKNOWN)"(?!:)', code))
    assert used == set(RULES)
    for rule in RULES:
        assert f"`{rule}`" in (PROJECT / "docs/plan.md").read_text(), rule
    _, out, _ = gpuyard("explain", "size-link")
    assert out.startswith("SIZE-LINK: tensor parallelism loses no more tokens/s")


def test_bad_input_is_refused_by_name(gpuyard: Command, prod: Path) -> None:
    text = prod.read_text()
    for old, new, rule in (
        ("instance: p5.48xlarge", "instance: p5.48xlarg", "PLAN-INSTANCE"),
        ("tier: s3-standard", "tier: s3-standart", "PLAN-STORAGE"),
        ("openai/gpt-4o-mini", "openai/gpt-4o-min", "PLAN-API"),
    ):
        prod.write_text(text.replace(old, new))
        code, out, _ = gpuyard("plan", prod, "--json")
        assert code == 3 and json.loads(out)["refused"]["rule"] == rule
    prod.write_text(text.replace("utilisation: 0.35", "utilisation: 1.2"))
    code, _, err = gpuyard("plan", prod)
    assert code == 1 and "SPEC-VALUE: planning.utilisation" in err
