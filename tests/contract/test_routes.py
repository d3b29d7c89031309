"""Which routes there are, who may ask them, and what the engine says of itself."""

from __future__ import annotations

import re

import pytest

from gpuyard.lab.engine.metrics import families
from tests.contract.conftest import CONTEXT, KEY, MODEL, Engine, completion

pytestmark = pytest.mark.contract

OPEN = ["/health", "/ping", "/version", "/load", "/metrics"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("GET", "/version", 200),
        ("GET", "/load", 200),
        ("GET", "/metrics", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/tokenizer_info", 404),
        ("GET", "/server_info", 404),
        ("POST", "/sleep", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("HEAD", "/health", 405),
        ("OPTIONS", "/v1/models", 405),
        ("GET", "/health/", 307),
        ("GET", "/v1/models/", 307),
    ],
)
def test_what_is_there_answers_and_what_is_not_does_not(engine: Engine, method: str, path: str, status: int) -> None:
    reply = engine.ask(method, path)
    assert reply.status == status
    if status == 404:
        assert reply.json == {"detail": "Not Found"}
    if status == 405:
        assert reply.body == (b"" if method == "HEAD" else b'{"detail":"Method Not Allowed"}')
        assert reply.headers["allow"] in ("GET", "POST")
    if status == 307:
        assert list(reply.headers) == ["date", "server", "content-length", "location", "vary", "connection"]
        assert reply.headers["location"] == f"http://engine{path.rstrip('/')}"


@pytest.mark.parametrize("path", OPEN)
def test_what_tells_no_secret_needs_no_key(engine: Engine, path: str) -> None:
    assert engine.ask("GET", path, key=None).status == 200


@pytest.mark.parametrize(
    ("method", "path", "authorization"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/nothing", None),
        ("POST", "/v1/completions", None),
        ("POST", "/v1/chat/completions", None),
        ("GET", "/v1/models", "Bearer wrong"),
        ("GET", "/v1/models", f"Basic {KEY}"),
        ("GET", "/v1/models", "Bearer"),
        ("GET", "/v1/models", KEY),
    ],
)
def test_below_v1_nothing_is_told_without_the_key(
    engine: Engine, method: str, path: str, authorization: str | None
) -> None:
    headers: dict[str, str | None] = {"Authorization": authorization}
    reply = engine.ask(method, path, completion() if method == "POST" else None, headers=headers)
    assert (reply.status, reply.json) == (401, {"error": "Unauthorized"})
    assert list(reply.headers) == ["date", "server", "content-length", "content-type", "connection"]


def test_the_word_bearer_may_be_written_in_any_case(engine: Engine) -> None:
    assert engine.ask("GET", "/v1/models", headers={"Authorization": f"bearer {KEY}"}).status == 200


def test_the_headers_come_in_one_order(engine: Engine) -> None:
    reply = engine.ask("GET", "/version")
    assert list(reply.headers) == ["date", "server", "content-length", "content-type", "vary", "connection"]
    assert reply.headers["server"] == "uvicorn"
    assert reply.headers["content-type"] == "application/json"
    stream = engine.complete(stream=True)
    assert list(stream.headers) == ["date", "server", "content-type", "vary", "connection", "transfer-encoding"]
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_healthy_is_an_empty_answer(engine: Engine) -> None:
    reply = engine.ask("GET", "/health")
    assert reply.body == b""
    assert "content-type" not in reply.headers


def test_both_say_the_same_version(engine: Engine) -> None:
    assert engine.ask("GET", "/version").body == b'{"version":"0.32.0"}'


def test_load_is_counted_only_where_it_was_asked_for(engine: Engine) -> None:
    assert engine.ask("GET", "/load").body == b'{"server_load":0}'


def test_the_model_is_listed_with_all_its_fields(engine: Engine) -> None:
    told = engine.ask("GET", "/v1/models").json
    assert list(told) == ["object", "data"]
    (card,) = told["data"]
    permission = card["permission"][0]
    assert re.fullmatch(r"modelperm-[0-9a-f]{16}", permission.pop("id"))
    created = permission.pop("created")
    assert abs(card.pop("created") - created) <= 1
    assert list(card.items()) == [
        ("id", MODEL),
        ("object", "model"),
        ("owned_by", "vllm"),
        ("root", "/var/lib/models/model"),
        ("parent", None),
        ("max_model_len", CONTEXT),
        ("permission", [permission]),
    ]
    assert list(permission.items()) == [
        ("object", "model_permission"),
        ("allow_create_engine", False),
        ("allow_sampling", True),
        ("allow_logprobs", True),
        ("allow_search_indices", False),
        ("allow_view", True),
        ("allow_fine_tuning", False),
        ("organization", "*"),
        ("group", None),
        ("is_blocking", False),
    ]


# --- metrics ---------------------------------------------------------------------------------------------------------


def families_of(text: str) -> dict[str, str]:
    return dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE "))  # type: ignore[misc]


def test_metrics_come_as_prometheus_reads_them(engine: Engine) -> None:
    reply = engine.ask("GET", "/metrics")
    assert reply.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    for line in reply.text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \S+ .*|[a-z0-9_:]+(\{[^}]*\})? \S+", line), line


def test_there_are_these_metrics_of_vllm_and_no_others(engine: Engine) -> None:
    """The table is the simulated engine's own, held here to both."""
    found = families_of(engine.ask("GET", "/metrics").text)
    expected = {"vllm:cache_config_info": "gauge"}
    for name, family in families(CONTEXT).items():
        expected[f"vllm:{name}_total" if family.kind == "counter" else f"vllm:{name}"] = family.kind
    assert {
        name: kind for name, kind in found.items() if name.startswith("vllm:") and not name.endswith("_created")
    } == (expected)
    assert {"http_requests_total", "process_resident_memory_bytes", "process_cpu_seconds_total"} <= set(found)


@pytest.mark.parametrize("name", families(CONTEXT))
def test_a_metric_has_the_labels_and_buckets_of_the_real_one(engine: Engine, name: str) -> None:
    family = families(CONTEXT)[name]
    base = {("engine", "0"), ("model_name", MODEL)} if family.engine else {("model_name", MODEL)}
    suffix = {"counter": "_total", "histogram": "_bucket", "gauge": ""}[family.kind]
    text = engine.ask("GET", "/metrics").text
    found = [
        set(re.findall(r'(\w+)="([^"]*)"', labels))
        for labels in re.findall(rf"^vllm:{name}{suffix}\{{([^}}]*)\}} ", text, re.MULTILINE)
    ]
    if family.buckets:
        edges = [*(repr(float(edge)) for edge in family.buckets), "+Inf"]
        assert found == [base | {("le", edge)} for edge in edges]
    elif family.label:
        assert found == [base | {(family.label, value)} for value in family.values]
    else:
        assert found == [base]


def test_metrics_count_what_was_done(engine: Engine) -> None:
    labels = f'{{engine="0",model_name="{MODEL}"}}'
    before = engine.metrics()
    usage = engine.complete(max_tokens=5, ignore_eos=True).json["usage"]
    after = engine.metrics()

    def more(name: str) -> float:
        return after[name] - before[name]

    assert more(f"vllm:generation_tokens_total{labels}") == usage["completion_tokens"] == 5
    assert more(f"vllm:prompt_tokens_total{labels}") == usage["prompt_tokens"]
    ended = f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{MODEL}"}}'
    assert more(ended) == 1
    assert more(f"vllm:time_to_first_token_seconds_count{labels}") == 1
    assert more(f"vllm:inter_token_latency_seconds_count{labels}") == 4
    assert more(f"vllm:e2e_request_latency_seconds_count{labels}") == 1
    asked = '{handler="/v1/completions",method="POST",status="2xx"}'
    assert more(f"http_requests_total{asked}") == 1
    assert after[f"vllm:num_requests_running{labels}"] == 0
    assert after[f"vllm:num_requests_waiting{labels}"] == 0
