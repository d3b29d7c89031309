"""`gpuyard bench load` against a server that misbehaves: every loss is seen, and called what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gpuyard.cli import app

from .conftest import CONTENT, KEY, Engine

OUTCOMES = ["complete", "failed", "truncated", "duplicated", "wrong"]
# Two references for the one prompt come first.
REFERENCES = 2
BAD = REFERENCES + 3


def load(engine: Engine, *options: str, mix: str = "streamed=1", requests: int = 8) -> Result:
    words = ["bench", "load", engine.url, "--prompts", "1", "--mix", mix, "--requests", str(requests), *options]
    return CliRunner().invoke(app, words)


def told(result: Result) -> dict[str, Any]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout)


def test_a_good_server_loses_nothing(engine: Engine, tmp_path: Path) -> None:
    result = load(engine, "--json", "--ledger", str(tmp_path / "ledger"), mix="short=1,long=1,streamed=2", requests=60)
    report = told(result)
    assert result.exit_code == 0
    assert [report[outcome] for outcome in OUTCOMES] == [60, 0, 0, 0, 0]
    assert report["lossless"] is True
    assert report["tokens"] == 60 * len(CONTENT)
    assert 0 < report["ttft_seconds"]["p50"] <= report["ttft_seconds"]["p99"] <= report["latency_seconds"]["p99"]
    lines = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(60))
    assert {line["kind"] for line in lines} == {"short", "long", "streamed"}
    assert len({line["sha256"] for line in lines}) == 1
    assert {line["outcome"] for line in lines} == {"complete"}


FAULTS = {
    "refused": ("failed", "HTTP 503"),
    "silent close": ("failed", "Disconnected"),
    "reset before the answer": ("failed", "rror"),
    "reset in the middle": ("truncated", "rror"),
    "cut in the middle": ("truncated", "rror"),
    "silence": ("truncated", "Timeout"),
    "an error in the middle": ("truncated", "engine dead"),
    "given up": ("truncated", "abort"),
    "no end": ("truncated", "finish_reason is None"),
    "not done": ("truncated", "[DONE]"),
    "not ended as HTTP ends": ("truncated", "rror"),
    "a piece twice": ("duplicated", "characters twice"),
    "all of it twice": ("duplicated", "120 characters twice"),
    "done twice": ("duplicated", "after [DONE]"),
    "a byte after the end": ("duplicated", "after [DONE]"),
    "half an event after the end": ("duplicated", "after [DONE]"),
    "goes on as another": ("duplicated", "two answers in one"),
    "an answer of another request": ("duplicated", "had answered"),
    "a piece lost": ("wrong", "other content from character 6"),
    "a wrong byte": ("wrong", "other content from character 6"),
    "another end": ("wrong", "stop"),
    "no event": ("wrong", "no field"),
    "no UTF-8": ("wrong", "UTF-8"),
}


@pytest.mark.parametrize(("fault", "outcome", "why"), [(fault, *seen) for fault, seen in FAULTS.items()])
def test_one_bad_stream_among_good_ones_is_seen(
    engine: Engine, tmp_path: Path, fault: str, outcome: str, why: str
) -> None:
    engine.fault = lambda number: fault if number == BAD else ""
    result = load(engine, "--json", "--patience", "1", "--ledger", str(tmp_path / "ledger"), "--concurrency", "1")
    report = told(result)
    assert result.exit_code == 1
    assert report["lossless"] is False
    lines = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    bad = [line for line in lines if line["outcome"] != "complete"]
    assert [(line["id"], line["outcome"]) for line in bad] == [(BAD - REFERENCES, outcome)], bad
    assert why in bad[0]["why"]
    assert why in result.stderr
    assert {report[name] for name in OUTCOMES[1:]} == {0, 1}
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("refused", "failed"), ("silent close", "failed"), ("a wrong byte", "wrong"), ("shorter than said", "truncated")],
)
def test_one_bad_answer_in_one_piece_is_seen(engine: Engine, fault: str, outcome: str) -> None:
    engine.fault = lambda number: fault if number == BAD else ""
    report = told(load(engine, "--json", mix="long=1"))
    assert {name: report[name] for name in OUTCOMES if report[name]} == {"complete": 7, outcome: 1}


def test_a_request_is_never_sent_twice(engine: Engine) -> None:
    engine.fault = lambda number: "silent close" if number % 3 == 0 and number >= REFERENCES else ""
    report = told(load(engine, "--json", requests=30))
    assert len(engine.bodies) == REFERENCES + 30
    assert report["complete"] + report["failed"] == 30


def test_an_address_that_answers_differently_each_time_is_refused_without_consent(engine: Engine) -> None:
    engine.fault = lambda number: "a wrong byte" if number % 2 else ""
    refused = load(engine)
    assert refused.exit_code == 3
    assert "BENCH-REFERENCE" in refused.stderr
    assert "--any-content" in refused.stderr
    assert load(engine, "--any-content").exit_code == 0


def test_an_address_that_gives_all_completions_one_id_is_not_accused_of_it(engine: Engine) -> None:
    engine.fault = lambda _: "an answer of another request"
    assert load(engine).exit_code == 0


def test_the_key_comes_from_a_file_or_the_environment(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    load(engine)
    assert engine.keys == {None}
    (tmp_path / "key").write_text(f"{KEY}\n")
    engine.keys.clear()
    result = load(engine, "--key-file", str(tmp_path / "key"), "--ledger", str(tmp_path / "ledger"))
    assert engine.keys == {f"Bearer {KEY}"}
    assert KEY not in result.output + (tmp_path / "ledger").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine.keys.clear()
    load(engine)
    assert engine.keys == {f"Bearer {KEY}"}


def test_a_rate_and_a_duration_bound_the_load(engine: Engine) -> None:
    words = ["bench", "load", engine.url, "--mix", "short=1", "--rate", "50", "--duration", "1", "--json"]
    report = told(CliRunner().invoke(app, words))
    assert 25 <= report["requests"] <= 80
    assert 0.9 <= report["seconds"] < 5


def test_two_hundred_streams_at_a_time(engine: Engine) -> None:
    report = told(load(engine, "--json", "--concurrency", "200", requests=600))
    assert report["complete"] == 600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://127.0.0.1:1"], "BENCH-REACH"),
        (["http://127.0.0.1:1", "--key-file", "/nowhere/key"], "BENCH-KEY"),
        (["http://127.0.0.1:1", "--ledger", "/nowhere/ledger"], "BENCH-LEDGER"),
    ],
)
def test_what_cannot_be_done_is_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "load", *words])
    assert result.exit_code == 3
    assert said in result.stderr
    again = CliRunner().invoke(app, ["bench", "load", *words, "--json"])
    assert json.loads(again.stdout)["refused"]["rule"] == said


@pytest.mark.parametrize(
    "words",
    [["ftp://x"], ["127.0.0.1:80"], ["http://me@x"], ["http://x", "--mix", "fast=1"], ["http://x", "--mix", "short=0"]],
)
def test_what_makes_no_sense_is_wrong_usage(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", "load", *words]).exit_code == 2
