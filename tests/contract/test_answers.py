"""Answers: their fields and the order of them, the framing of streams, and what the common parameters do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.contract.conftest import CONTEXT, MODEL, Engine

pytestmark = pytest.mark.contract

USAGE = ["prompt_tokens", "total_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details"]
STREAM_USAGE = USAGE[:3]


def adds_up(usage: dict[str, Any]) -> bool:
    return usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


# --- whole answers ---------------------------------------------------------------------------------------------------


def test_a_completion_has_these_fields_in_this_order(engine: Engine) -> None:
    told = engine.complete().json
    assert list(told) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage"),
        *("kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    assert re.fullmatch(r"cmpl-[0-9a-f]{16}", told["id"])
    assert (told["object"], told["model"]) == ("text_completion", MODEL)
    assert re.fullmatch(r"vllm-0\.32\.0-[0-9a-f]{8}", told["system_fingerprint"])
    assert list(told["usage"]) == USAGE
    assert adds_up(told["usage"])
    assert told["usage"]["prompt_tokens"] > 0
    (choice,) = told["choices"]
    assert list(choice) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_logprobs"),
        *("prompt_token_ids", "routed_experts"),
    ]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert choice["text"]


def test_a_chat_has_these_fields_in_this_order(engine: Engine) -> None:
    told = engine.chat().json
    assert list(told) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage"),
        *("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{16}", told["id"])
    assert (told["object"], told["model"]) == ("chat.completion", MODEL)
    assert list(told["usage"]) == USAGE
    assert adds_up(told["usage"])
    (choice,) = told["choices"]
    assert list(choice) == [
        *("index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"),
    ]
    message = choice["message"]
    assert list(message) == ["role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"]
    assert message["role"] == "assistant"
    assert message["content"]


def test_without_a_name_the_model_that_is_there_answers(engine: Engine) -> None:
    assert engine.complete(model=...).json["model"] == MODEL
    assert engine.chat(model=...).json["model"] == MODEL


def test_the_same_greedy_question_has_the_same_answer(engine: Engine) -> None:
    assert engine.complete().json["choices"] == engine.complete().json["choices"]
    assert engine.chat().json["choices"] == engine.chat().json["choices"]


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_max_tokens_is_exact(engine: Engine, limit: int) -> None:
    told = engine.complete(max_tokens=limit, ignore_eos=True).json
    assert told["usage"]["completion_tokens"] == limit
    assert told["choices"][0]["finish_reason"] == "length"


def test_a_completion_has_16_tokens_unless_told_otherwise(engine: Engine) -> None:
    assert engine.complete(max_tokens=..., ignore_eos=True).json["usage"]["completion_tokens"] == 16


def test_max_completion_tokens_is_the_newer_name_in_a_chat(engine: Engine) -> None:
    told = engine.chat(max_tokens=..., max_completion_tokens=3, ignore_eos=True).json
    assert told["usage"]["completion_tokens"] == 3


def test_a_chat_ends_by_itself_when_nobody_limits_it(engine: Engine) -> None:
    told = engine.chat(max_tokens=...).json
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["total_tokens"] < CONTEXT


def test_n_answers_are_numbered(engine: Engine) -> None:
    for told in (engine.complete(n=2, temperature=0.8, seed=1).json, engine.chat(n=2, temperature=0.8, seed=1).json):
        assert [choice["index"] for choice in told["choices"]] == [0, 1]
        assert told["usage"]["completion_tokens"] == 8


def test_several_prompts_are_several_choices(engine: Engine) -> None:
    told = engine.complete(prompt=["Hello", "World"]).json
    assert [choice["index"] for choice in told["choices"]] == [0, 1]
    alone = engine.complete(prompt="World").json
    assert told["choices"][1]["text"] == alone["choices"][0]["text"]


def test_tokens_are_a_prompt_too(engine: Engine) -> None:
    tokens = engine.ask("POST", "/tokenize", {"model": MODEL, "prompt": "Hello"}).json["tokens"]
    told = engine.complete(prompt=tokens).json
    assert told["usage"]["prompt_tokens"] == len(tokens)
    assert told["choices"][0]["text"] == engine.complete(prompt="Hello").json["choices"][0]["text"]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    text = engine.complete(max_tokens=32, ignore_eos=True).json["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (choice,) = engine.complete(max_tokens=32, ignore_eos=True, stop=[stop]).json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]
    (kept,) = engine.complete(max_tokens=32, stop=stop, include_stop_str_in_output=True).json["choices"]
    assert kept["text"] == text[: text.index(stop) + len(stop)]


def test_a_stop_token_ends_the_answer(engine: Engine) -> None:
    (first,) = engine.complete(max_tokens=8, return_token_ids=True).json["choices"]
    assert len(first["token_ids"]) == 8
    assert first["prompt_token_ids"]
    at = first["token_ids"].index(first["token_ids"][4])
    (choice,) = engine.complete(max_tokens=8, return_token_ids=True, stop_token_ids=[first["token_ids"][4]]).json[
        "choices"
    ]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", first["token_ids"][4])
    assert choice["token_ids"] == first["token_ids"][: at + 1]


def test_echo_gives_the_prompt_back(engine: Engine) -> None:
    plain = engine.complete().json
    told = engine.complete(echo=True).json
    assert told["choices"][0]["text"] == "Hello" + plain["choices"][0]["text"]
    assert told["usage"] == plain["usage"]
    first, second, *_ = engine.complete(echo=True, stream=True).events
    assert first["choices"][0]["text"].startswith("Hello")
    assert len(first["choices"][0]["prompt_token_ids"]) == plain["usage"]["prompt_tokens"]
    assert second["choices"][0]["prompt_token_ids"] is None


def test_the_parts_of_a_message_are_one_text(engine: Engine) -> None:
    whole = engine.chat(messages=[{"role": "user", "content": "Hi there"}]).json
    parts = engine.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]).json
    assert whole["choices"] == parts["choices"]
    assert whole["usage"] == parts["usage"]


def test_a_field_that_nobody_knows_is_passed_over(engine: Engine) -> None:
    assert engine.complete(no_such_field=1).status == 200
    assert engine.chat(no_such_field=1, user="me").status == 200


def test_the_id_of_a_request_is_its_header(engine: Engine) -> None:
    told = engine.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "mine"})
    assert told.json["id"] == "cmpl-mine"


# --- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_probabilities_of_a_completion(engine: Engine, count: int) -> None:
    (choice,) = engine.complete(logprobs=count).json["choices"]
    told = choice["logprobs"]
    assert list(told) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert {len(values) for values in told.values()} == {4}
    assert "".join(told["tokens"]) == choice["text"]
    lengths = [len(token) for token in told["tokens"]]
    assert told["text_offset"] == [sum(lengths[:place]) for place in range(4)]
    for token, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert value <= 0
        assert len(top) == max(count, 1)
        # Greedy: what was said is what was likeliest.
        assert top[token] == value == max(top.values())


def test_the_probabilities_of_a_chat(engine: Engine) -> None:
    (choice,) = engine.chat(logprobs=True, top_logprobs=2).json["choices"]
    content = choice["logprobs"]["content"]
    assert list(choice["logprobs"]) == ["content"]
    assert len(content) == 4
    for entry in content:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [list(top) for top in entry["top_logprobs"]] == [["token", "logprob", "bytes"]] * 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    (plain,) = engine.chat(logprobs=True).json["choices"]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[]] * 4


# --- streams ---------------------------------------------------------------------------------------------------------
# An event brings one token, or several when the server has fallen behind: what is said here holds for both.


def test_a_streamed_completion_byte_by_byte(engine: Engine) -> None:
    reply = engine.complete(stream=True)
    whole = engine.complete().json
    events = reply.events
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    head = {"id", "object", "created", "model"}
    assert len({tuple(event[name] for name in sorted(head)) for event in events}) == 1
    for event in events[:-1]:
        assert list(event) == ["id", "object", "created", "model", "choices"]
    assert list(events[-1]) == ["id", "object", "created", "model", "choices", "system_fingerprint"]
    fields = ["index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"]
    for event in events:
        (choice,) = event["choices"]
        assert list(choice) == fields
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert b": " not in reply.body.split(b"\n\n")[0].removeprefix(b"data: ").replace(b'" ', b"")


def test_a_streamed_chat_byte_by_byte(engine: Engine) -> None:
    events = engine.chat(stream=True).events
    whole = engine.chat().json
    first, *middle, last = events
    assert list(first) == ["id", "object", "created", "model", "choices", "prompt_token_ids", "prompt_text"]
    assert first["object"] == "chat.completion.chunk"
    (choice,) = first["choices"]
    assert list(choice.items()) == [
        ("index", 0),
        ("delta", {"role": "assistant", "content": ""}),
        ("logprobs", None),
        ("finish_reason", None),
    ]
    for event in middle:
        assert list(event) == ["id", "object", "created", "model", "choices"]
        (choice,) = event["choices"]
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
        assert list(choice["delta"]) == ["content"]
    assert list(last) == ["id", "object", "created", "model", "choices", "system_fingerprint"]
    (choice,) = last["choices"]
    assert list(choice) == ["index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"]
    assert choice["finish_reason"] == "length"
    text = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert text == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_that_shall_count_ends_with_its_usage(engine: Engine, chat: bool) -> None:
    ask = engine.chat if chat else engine.complete
    whole = ask().json["usage"]
    *events, last = ask(stream=True, stream_options={"include_usage": True}).events
    assert last["choices"] == []
    assert list(last["usage"]) == STREAM_USAGE
    assert last["usage"] == {name: whole[name] for name in STREAM_USAGE}
    assert list(last) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    assert not any("usage" in event or "system_fingerprint" in event for event in events)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_can_count_all_the_time(engine: Engine, chat: bool) -> None:
    ask = engine.chat if chat else engine.complete
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = ask(stream=True, stream_options=options).events
    counted = [event["usage"]["completion_tokens"] for event in events]
    assert counted == sorted(set(counted))
    assert (counted[0] == 0, counted[-1]) == (chat, 4)
    assert all(adds_up(event["usage"]) for event in [*events, last])


def test_a_stream_of_several_answers_tells_them_apart(engine: Engine) -> None:
    events = engine.complete(stream=True, n=2, temperature=0.8, seed=1, ignore_eos=True).events
    assert {event["choices"][0]["index"] for event in events} == {0, 1}
    ends = [event for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(event["choices"][0]["index"] for event in ends) == [0, 1]


def test_a_stop_string_never_appears_in_a_stream(engine: Engine) -> None:
    text = engine.complete(max_tokens=32, ignore_eos=True).json["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    events = engine.complete(stream=True, max_tokens=32, ignore_eos=True, stop=[stop]).events
    assert "".join(event["choices"][0]["text"] for event in events) == text[: text.index(stop)]
    assert (events[-1]["choices"][0]["finish_reason"], events[-1]["choices"][0]["stop_reason"]) == ("stop", stop)


def test_a_stream_tells_probabilities_and_tokens_with_each_event(engine: Engine) -> None:
    events = engine.complete(stream=True, logprobs=1, return_token_ids=True).events
    for event in events:
        (choice,) = event["choices"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    assert sum(len(event["choices"][0]["token_ids"]) for event in events) == 4
    assert [place for place, event in enumerate(events) if event["choices"][0]["prompt_token_ids"]] == [0]
    (choice,) = engine.chat(stream=True, logprobs=True, top_logprobs=1).events[1]["choices"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["delta"]["content"]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_and_become_text_again(engine: Engine) -> None:
    told = engine.ask("POST", "/tokenize", {"model": MODEL, "prompt": "Hello world"}).json
    assert list(told) == ["count", "max_model_len", "tokens", "token_strs"]
    assert (told["count"], told["max_model_len"], told["token_strs"]) == (len(told["tokens"]), CONTEXT, None)
    back = engine.ask("POST", "/detokenize", {"model": MODEL, "tokens": told["tokens"]})
    assert back.body == b'{"prompt":"Hello world"}'


def test_the_count_of_a_prompt_is_what_a_request_pays(engine: Engine) -> None:
    """How many that are differs, as docs/lab-engine.md declares: the simulated engine has no vocabulary."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = engine.ask("POST", "/tokenize", {"model": MODEL, "prompt": "Hello"}).json["count"]
    chat = engine.ask("POST", "/tokenize", {"model": MODEL, "messages": messages}).json["count"]
    assert engine.complete().json["usage"]["prompt_tokens"] == text
    assert engine.chat().json["usage"]["prompt_tokens"] == chat


def test_tokens_are_shown_when_asked_for(engine: Engine) -> None:
    told = engine.ask("POST", "/tokenize", {"prompt": "Hello world", "return_token_strs": True}).json
    assert len(told["token_strs"]) == told["count"]
