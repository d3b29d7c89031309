"""What is refused: with which status, in which form, in which words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.conftest import CONTEXT, MODEL, Engine, completion, conversation

pytestmark = pytest.mark.contract

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

# Values that cannot be, each with the field that is named for it and what is said.
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (
        "c",
        {"prompt": ...},
        "prompt",
        "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
    ),
    (
        "c",
        {"prompt": ""},
        "prompt",
        "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
    ),
    ("c", {"prompt": []}, None, "You must pass at least one prompt"),
    ("c", {"suffix": "x"}, "suffix", "suffix is only supported for models with FIM completion rendering"),
    ("c", {"n": 2}, None, "n must be 1 when using greedy sampling, got 2."),
    ("c", {"n": 0}, None, "n must be at least 1, got 0."),
    ("h", {"n": 0}, None, "n must be at least 1, got 0."),
    (
        "c",
        {"max_tokens": 0},
        "max_tokens",
        "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
    ),
    (
        "h",
        {"max_tokens": -1},
        "max_tokens",
        "max_tokens must be at least 1, got -1. (parameter=max_tokens, value=-1)",
    ),
    (
        "c",
        {"max_tokens": 5000},
        "max_tokens",
        f"max_tokens=5000 cannot be greater than max_model_len={CONTEXT}. Please request fewer output tokens. "
        "(parameter=max_tokens, value=5000)",
    ),
    (
        "c",
        {"prompt": "word " * 9000},
        "input_tokens",
        f"This model's maximum context length is {CONTEXT} tokens. However, your prompt contains at least "
        f"{CONTEXT + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
        f"length of the input prompt. (parameter=input_tokens, value={CONTEXT + 1})",
    ),
    (
        "c",
        {"temperature": -1},
        "temperature",
        "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
    ),
    (
        "h",
        {"temperature": 3},
        "temperature",
        "temperature must be in [0, 2], got 3.0. (parameter=temperature, value=3.0)",
    ),
    ("c", {"top_p": 2}, "top_p", "top_p must be in (0, 1], got 2.0. (parameter=top_p, value=2.0)"),
    ("c", {"top_k": -5}, None, "top_k must be 0 (disable), or at least 1, got -5."),
    ("c", {"presence_penalty": 9}, None, "presence_penalty must be in [-2, 2], got 9.0."),
    (
        "c",
        {"logprobs": -5},
        "logprobs",
        "`logprobs` must be a positive value or -1. (parameter=logprobs, value=-5)",
    ),
    (
        "c",
        {"logprobs": 100},
        "logprobs",
        "Requested sample logprobs of 100, which is greater than max allowed: 20 (parameter=logprobs, value=100)",
    ),
    (
        "h",
        {"top_logprobs": 2},
        "top_logprobs",
        "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)",
    ),
    ("c", {"stop": [""]}, None, "stop cannot contain an empty string."),
    ("c", {"min_tokens": 8}, None, "min_tokens must be less than or equal to max_tokens=4, got 8."),
    (
        "c",
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "Stream options can only be defined when `stream=True`. (parameter=stream_options)",
    ),
    ("h", {"messages": []}, None, "Cannot apply chat template to an empty conversation. Provide at least one message."),
    ("h", {"messages": [{"role": "user", "content": [IMAGE]}]}, None, f"{MODEL} is not a multimodal model"),
    (
        "h",
        {"tools": [FUNCTION]},
        None,
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
    ),
]


@pytest.mark.parametrize(("route", "change", "param", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_value_that_cannot_be(
    engine: Engine, route: str, change: dict[str, Any], param: str | None, message: str
) -> None:
    reply = engine.chat(**change) if route == "h" else engine.complete(**change)
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    assert (reply.status, reply.json) == (400, {"error": error})
    assert list(reply.json["error"]) == ["message", "type", "param", "code"]


# Fields of the wrong kind: where, and what kind of mistake.
INVALID: list[tuple[str, dict[str, Any], str, str]] = [
    ("c", {"max_tokens": "x"}, "body.max_tokens", "int_parsing"),
    ("c", {"max_tokens": 1.5}, "body.max_tokens", "int_from_float"),
    ("c", {"temperature": "hot"}, "body.temperature", "float_parsing"),
    ("c", {"stream": "maybe"}, "body.stream", "bool_parsing"),
    ("c", {"prompt": 5}, "body.prompt", "string_type"),
    ("h", {"seed": "x"}, "body.seed", "int_parsing"),
    ("h", {"messages": ...}, "body.messages", "missing"),
    ("h", {"messages": "x"}, "body.messages", "list_type"),
    (
        "h",
        {"messages": [{"content": "x"}]},
        "body.messages.0.ChatCompletionDeveloperMessageParam.role",
        "missing",
    ),
]


@pytest.mark.parametrize(("route", "change", "param", "mistake"), INVALID, ids=lambda value: str(value)[:40])
def test_a_field_of_the_wrong_kind(
    engine: Engine, route: str, change: dict[str, Any], param: str, mistake: str
) -> None:
    """How many mistakes are counted is not part of it: the real server tries each form a field may have."""
    reply = engine.chat(**change) if route == "h" else engine.complete(**change)
    error = reply.json["error"]
    assert (reply.status, error["type"], error["param"], error["code"]) == (400, "Bad Request", param, 400)
    assert " validation error" in error["message"].splitlines()[0]
    assert f"{{'type': '{mistake}', 'loc': '{param}', 'msg': '" in error["message"]


@pytest.mark.parametrize(
    ("raw", "param", "message"),
    [
        (
            b'{"model": ',
            "body.10",
            "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.10', 'msg': 'JSON decode error', "
            "'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}",
        ),
        (
            b"",
            "body",
            "1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg': 'Field required', 'input': 'None'}",
        ),
        (
            b"[1]",
            "body",
            "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid "
            "dictionary or object to extract fields from', 'input': '<list of 1 items>'}",
        ),
        (
            b'"x"',
            "body",
            "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid "
            "dictionary or object to extract fields from', 'input': 'x'}",
        ),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_no_object(engine: Engine, path: str, raw: bytes, param: str, message: str) -> None:
    reply = engine.ask("POST", path, raw=raw)
    error = {"message": message, "type": "Bad Request", "param": param, "code": 400}
    assert (reply.status, reply.json) == (400, {"error": error})


@pytest.mark.parametrize("content_type", ["text/plain", None])
def test_only_json_is_taken(engine: Engine, content_type: str | None) -> None:
    reply = engine.ask("POST", COMPLETIONS, completion(), headers={"Content-Type": content_type})
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    error = {"message": message, "type": "Bad Request", "param": None, "code": 400}
    assert (reply.status, reply.json) == (400, {"error": error})


def test_json_may_name_its_character_set(engine: Engine) -> None:
    headers: dict[str, str | None] = {"Content-Type": "application/json; charset=utf-8"}
    assert engine.ask("POST", COMPLETIONS, completion(), headers=headers).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, completion(model="gpt-5")),
        (COMPLETIONS, completion(model="gpt-5", stream=True)),
        (CHAT, conversation(model="gpt-5")),
        ("/tokenize", {"model": "gpt-5", "prompt": "Hello"}),
        ("/detokenize", {"model": "gpt-5", "tokens": [1]}),
    ],
)
def test_a_model_that_is_not_there(engine: Engine, path: str, body: dict[str, object]) -> None:
    reply = engine.ask("POST", path, body)
    message = f"The model `gpt-5` does not exist. Valid aliases: {MODEL}."
    error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
    assert (reply.status, reply.json) == (404, {"error": error})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": MODEL}, "body.prompt"),
        ("/detokenize", {"model": MODEL}, "body.tokens"),
        ("/detokenize", {"model": MODEL, "tokens": ["x"]}, "body.tokens.0"),
    ],
)
def test_what_cannot_be_made_tokens(engine: Engine, path: str, body: dict[str, object], param: str) -> None:
    reply = engine.ask("POST", path, body)
    assert (reply.status, reply.json["error"]["type"], reply.json["error"]["param"]) == (400, "Bad Request", param)


def test_a_token_that_nobody_knows_is_no_text(engine: Engine) -> None:
    assert engine.ask("POST", "/detokenize", {"model": MODEL, "tokens": [99999999]}).body == b'{"prompt":""}'


def test_what_is_no_http_is_told_so(engine: Engine) -> None:
    reply = engine.ask("NO METHOD", "/health")
    assert (reply.status, reply.body) == (400, b"Invalid HTTP request received.")
