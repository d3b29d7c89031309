"""vLLM's OpenAI routes as data: what a request may say, how a refusal reads, which fields an answer has, in order."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .tokens import EOS, encode, logprob, number_of, other_than, text_of

Json = dict[str, Any]
INT64 = 2**63
MOST_N = 16384
MOST_LOGPROBS = 20


class RefusedError(Exception):
    """An answer that is an error, with what its body says."""

    def __init__(self, message: str, kind: str = "BadRequestError", param: str | None = None, code: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, message: str, param: str, *value: object) -> RefusedError:
        """A value that cannot be; the message ends with what it was."""
        shown = "".join(f", value={each}" for each in value)
        return cls(f"{message} (parameter={param}{shown})", param=param)


def compact(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --- what a request says ---------------------------------------------------------------------------------------------


def invalid(kind: str, place: str, message: str, given: object, **more: object) -> RefusedError:
    """A field of the wrong kind, worded like the validation of the real server."""
    shown = f"<{type(given).__name__} of {len(given)} items>" if isinstance(given, (list, dict)) else str(given)  # pyright: ignore[reportUnknownArgumentType]
    text = str({"type": kind, "loc": place, "msg": message, "input": shown, **more})
    return RefusedError(f"1 validation error:\n  {text}", "Bad Request", place)


def an_int(value: object, place: str) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            text = "Input should be a valid integer, unable to parse string as an integer"
            raise invalid("int_parsing", place, text, value) from None
    if isinstance(value, float) and not value.is_integer():
        text = "Input should be a valid integer, got a number with a fractional part"
        raise invalid("int_from_float", place, text, value)
    if not isinstance(value, (int, float)):
        raise invalid("int_type", place, "Input should be a valid integer", value)
    return int(value)


def a_float(value: object, place: str) -> float:
    try:
        if isinstance(value, (int, float, str)):
            return float(value)
    except ValueError:
        text = "Input should be a valid number, unable to parse string as a number"
        raise invalid("float_parsing", place, text, value) from None
    raise invalid("float_type", place, "Input should be a valid number", value)


def a_bool(value: object, place: str) -> bool:
    words: dict[object, bool] = {"true": True, "1": True, "yes": True, "on": True, "t": True, "y": True}
    words.update({"false": False, "0": False, "no": False, "off": False, "f": False, "n": False})
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise invalid("bool_parsing", place, "Input should be a valid boolean, unable to interpret input", value)


def a_text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise invalid("string_type", place, "Input should be a valid string", value)
    return value


KINDS: dict[str, Callable[[object, str], Any]] = {
    **dict.fromkeys(("model", "user", "suffix", "request_id", "cache_salt"), a_text),
    **dict.fromkeys(("n", "max_tokens", "max_completion_tokens", "min_tokens", "seed", "top_k", "best_of"), an_int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), a_float),
    "repetition_penalty": a_float,
    **dict.fromkeys(("stream", "echo", "ignore_eos", "include_stop_str_in_output", "return_token_ids"), a_bool),
}


@dataclass
class Ask:
    """One request for text, checked."""

    chat: bool
    prompts: list[list[int]]
    words: str
    echoed: list[int] = field(default_factory=list[int])
    n: int = 1
    most: int = 16
    least: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list[str])
    stop_ids: list[int] = field(default_factory=list[int])
    keep_stop: bool = False
    ignore_eos: bool = False
    stream: bool = False
    usage: bool = False
    usage_always: bool = False
    logprobs: int | None = None
    echo: bool = False
    token_ids: bool = False
    id: str = ""


def body_of(raw: bytes, content_type: str) -> Json:
    """The body as an object. Raises RefusedError."""
    if content_type.split(";")[0].strip().lower() != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise RefusedError(message, "Bad Request")
    if not raw:
        raise invalid("missing", "body", "Field required", None)
    try:
        told: object = json.loads(raw)
    except json.JSONDecodeError as error:
        place = f"body.{error.pos}"
        raise invalid("json_invalid", place, "JSON decode error", {}, ctx={"error": error.msg}) from None
    if not isinstance(told, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", message, told)
    return told  # pyright: ignore[reportUnknownVariableType]


def checked(body: Json) -> Json:
    """The plain fields, each of its kind; what is null is not there."""
    found: Json = {}
    for name, value in body.items():
        if value is not None:
            found[name] = KINDS[name](value, f"body.{name}") if name in KINDS else value
    return found


def ask_of(
    body: Json, *, chat: bool, names: list[str], max_model_len: int, request_id: str | None, tools: bool = False
) -> Ask:
    """What a body asks for. The order of the checks is that of the real server: form, model, prompt, numbers."""
    if body.get("stream_options") and not body.get("stream"):
        raise RefusedError.of("Stream options can only be defined when `stream=True`.", "stream_options")
    logprobs = logprobs_of(body, chat)
    if not chat and body.get("prompt") in (None, ""):
        raise RefusedError.of("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if chat and "messages" not in body:
        raise invalid("missing", "body.messages", "Field required", body)
    told = checked(body)
    words: list[tuple[str, str]] = []
    if chat:
        words = conversation_of(body["messages"], names[0])
    refuse_another_model(told.get("model"), names)
    if not chat and "suffix" in told:
        message = "suffix is only supported for models with FIM completion rendering"
        raise RefusedError(message, param="suffix")
    if chat and told.get("tools") and told.get("tool_choice", "auto") == "auto" and not tools:
        raise RefusedError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
    if chat:
        texts: list[Any] = [as_prompt(words)]
        echoed = encode(next((text for role, text in reversed(words) if role == "user"), ""))
    else:
        texts = prompts_of(told["prompt"])
        echoed = []
    prompts = [encode(text) if isinstance(text, str) else text for text in texts]
    longest = max(map(len, prompts))
    n = told.get("n", 1)
    most = told.get("max_completion_tokens", told.get("max_tokens", None if chat else 16))
    refuse_what_does_not_fit(longest, most, max_model_len)
    ask = Ask(chat, prompts, " ".join(text for text in texts if isinstance(text, str)), echoed)
    ask.n = n
    ask.echo = not chat and told.get("echo", False)
    ask.most = max_model_len - longest if most is None else min(most, max_model_len - longest)
    ask.least = told.get("min_tokens", 0)
    stop = told.get("stop", [])
    ask.stop = [stop] if isinstance(stop, str) else [a_text(each, "body.stop") for each in stop]
    ask.stop_ids = [an_int(each, "body.stop_token_ids") for each in told.get("stop_token_ids", [])]
    ask.keep_stop = told.get("include_stop_str_in_output", False)
    ask.ignore_eos = told.get("ignore_eos", False)
    ask.seed = told.get("seed")
    ask.stream = told.get("stream", False)
    given = told.get("stream_options", {})
    if not isinstance(given, dict):
        raise invalid("dict_type", "body.stream_options", "Input should be a valid dictionary", given)
    options: Json = given  # pyright: ignore[reportUnknownVariableType]
    ask.usage = bool(options.get("include_usage"))
    ask.usage_always = ask.usage and bool(options.get("continuous_usage_stats"))
    ask.logprobs = logprobs
    ask.token_ids = told.get("return_token_ids", False)
    ask.id = ("chatcmpl-" if chat else "cmpl-") + (request_id or told.get("request_id") or new_id())
    refuse_numbers(ask, told)
    return ask


def new_id() -> str:
    return uuid.uuid4().hex[:16]


def logprobs_of(body: Json, chat: bool) -> int | None:
    """How many alternatives are asked for beside each token; None where none are told at all."""
    name = "top_logprobs" if chat else "logprobs"
    value = body.get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise RefusedError.of(f"`{name}` must be an integer.", name, value)
    if value is not None and value < 0 and value != -1:
        raise RefusedError.of(f"`{name}` must be a positive value or -1.", name, value)
    if chat and value and not body.get("logprobs"):
        raise RefusedError.of("when using `top_logprobs`, `logprobs` must be set to true.", name)
    if chat:
        return int(value or 0) if body.get("logprobs") else None
    return None if value is None else int(value)


def conversation_of(messages: object, name: str) -> list[tuple[str, str]]:
    """Role and text of each message."""
    if not isinstance(messages, list):
        raise invalid("list_type", "body.messages", "Input should be a valid list", messages)
    told: list[Any] = messages  # pyright: ignore[reportUnknownVariableType]
    words = [words_of(message, place, name) for place, message in enumerate(told)]
    if not words:
        raise RefusedError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    return words


def as_prompt(words: list[tuple[str, str]]) -> str:
    return "".join(f"<|{role}|>{text}\n" for role, text in words) + "<|assistant|>"


def words_of(message: Any, place: int, name: str) -> tuple[str, str]:
    """Role and text of one message."""
    where = f"body.messages.{place}"
    if not isinstance(message, dict):
        raise invalid("dict_type", where, "Input should be a valid dictionary", message)
    told: Json = message  # pyright: ignore[reportUnknownVariableType]
    if "role" not in told:
        raise invalid("missing", f"{where}.ChatCompletionDeveloperMessageParam.role", "Field required", told)
    content = told.get("content") or ""
    if isinstance(content, list):
        parts: list[Any] = content  # pyright: ignore[reportUnknownVariableType]
        if not all(isinstance(part, dict) for part in parts):
            raise invalid("dict_type", f"{where}.content", "Input should be a valid dictionary", parts)
        if any(part.get("type") != "text" for part in parts):
            raise RefusedError(f"{name} is not a multimodal model")
        content = "\n".join(str(part.get("text", "")) for part in parts)
    return str(told["role"]), str(content)


def prompts_of(prompt: object) -> list[Any]:
    """A prompt is a text, tokens, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        told: list[Any] = prompt  # pyright: ignore[reportUnknownVariableType]
        if all(isinstance(each, int) for each in told):
            return [told]
        if all(isinstance(each, str) for each in told) or all(isinstance(each, list) for each in told):
            return told
    if prompt == []:
        raise RefusedError("You must pass at least one prompt")
    raise invalid("string_type", "body.prompt", "Input should be a valid string", prompt)  # pyright: ignore[reportUnknownArgumentType]


def refuse_another_model(model: str | None, names: list[str]) -> None:
    if model and model not in names:
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(names)}."
        raise RefusedError(message, "NotFoundError", "model", 404)


def refuse_what_does_not_fit(prompt: int, most: int | None, max_model_len: int) -> None:
    if most is not None and most > max_model_len:
        message = f"max_tokens={most} cannot be greater than max_model_len={max_model_len}."
        raise RefusedError.of(f"{message} Please request fewer output tokens.", "max_tokens", most)
    if prompt > max_model_len:
        least = max_model_len + 1
        raise RefusedError.of(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least "
            f"{least} input tokens, which exceeds this limit even without any output tokens. Please reduce the length "
            "of the input prompt.",
            "input_tokens",
            least,
        )


def refuse_numbers(ask: Ask, told: Json) -> None:
    temperature, top_p, top_k = told.get("temperature", 1.0), told.get("top_p", 1.0), told.get("top_k", 0)
    if not 1 <= ask.n <= MOST_N:
        limit = "at least 1" if ask.n < 1 else f"at most {MOST_N}"
        raise RefusedError(f"n must be {limit}, got {ask.n}.")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= told.get(name, 0) <= 2:
            raise RefusedError(f"{name} must be in [-2, 2], got {told[name]}.")
    if not 0 <= temperature <= 2:
        limit = "non-negative" if temperature < 0 else "in [0, 2]"
        raise RefusedError.of(f"temperature must be {limit}, got {temperature}.", "temperature", temperature)
    if not 0 < top_p <= 1:
        raise RefusedError.of(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    if top_k < -1:
        raise RefusedError(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    if ask.most < (0 if ask.echo else 1):
        raise RefusedError.of(f"max_tokens must be at least 1, got {ask.most}.", "max_tokens", ask.most)
    if ask.least > ask.most:
        raise RefusedError(f"min_tokens must be less than or equal to max_tokens={ask.most}, got {ask.least}.")
    if not all(ask.stop):
        raise RefusedError("stop cannot contain an empty string.")
    if temperature == 0 and ask.n > 1:
        raise RefusedError(f"n must be 1 when using greedy sampling, got {ask.n}.")
    if ask.logprobs is not None and ask.logprobs > MOST_LOGPROBS:
        message = f"Requested sample logprobs of {ask.logprobs}, which is greater than max allowed: {MOST_LOGPROBS}"
        raise RefusedError.of(message, "logprobs", ask.logprobs)


# --- one answer as it grows ------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """What one step adds to one choice."""

    index: int
    text: str
    tokens: list[int]
    finish: str | None = None
    stop: int | str | None = None
    first: bool = False


class Choice:
    """The text of one answer: looks for stop strings, and holds back what could become one."""

    def __init__(self, ask: Ask, index: int) -> None:
        self.ask = ask
        self.index = index
        self.text = ""
        self.sent = 0
        self.tokens: list[int] = []
        self.held = max(map(len, ask.stop), default=1) - 1 if not ask.keep_stop else 0

    def take(self, token: int) -> Piece:
        """One token more; the piece says whether it was the last."""
        self.tokens.append(token)
        before = len(self.text)
        self.text += text_of(token)
        piece = Piece(self.index, "", [token], first=len(self.tokens) == 1)
        enough = len(self.tokens) >= self.ask.least
        found = min(
            ((self.text.find(stop, max(before - len(stop) + 1, 0)), stop) for stop in self.ask.stop),
            key=lambda place: place[0] if place[0] >= 0 else len(self.text),
            default=(-1, ""),
        )
        if token == EOS:
            piece.finish = "stop"
        elif token in self.ask.stop_ids and enough:
            piece.finish, piece.stop = "stop", token
        elif found[0] >= 0 and enough:
            piece.finish, piece.stop = "stop", found[1]
            self.text = self.text[: found[0] + (len(found[1]) if self.ask.keep_stop else 0)]
        elif len(self.tokens) >= self.ask.most:
            piece.finish = "length"
        ready = len(self.text) if piece.finish else max(len(self.text) - self.held, self.sent)
        piece.text = self.text[self.sent : ready]
        self.sent = ready
        return piece


# --- what an answer says ---------------------------------------------------------------------------------------------


def usage_of(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def full_usage(prompt: int, completion: int) -> Json:
    return {**usage_of(prompt, completion), "prompt_tokens_details": None, "completion_tokens_details": None}


def alternatives(token: int, count: int, *place: object) -> list[tuple[int, float]]:
    """A token and the next likely ones, each with its log probability."""
    found = [(token, logprob(0, token, *place))]
    rank = 1
    while len(found) < max(count, 1):
        other = other_than(token, rank, *place)
        if other not in (known for known, _ in found):
            found.append((other, logprob(len(found), other, *place)))
        rank += 1
    return found


def completion_logprobs(prompt: list[int], tokens: list[int], count: int, offset: int) -> Json:
    """An echoed prompt is shown before the answer; nothing is known of how likely it was."""
    offsets: list[int] = []
    shown: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token in prompt:
        offsets.append(offset)
        offset += len(text_of(token))
        shown.append(text_of(token))
        values.append(None)
        tops.append(None)
    for place, token in enumerate(tokens):
        ways = alternatives(token, count, place)
        offsets.append(offset)
        offset += len(text_of(token))
        shown.append(text_of(token))
        values.append(ways[0][1])
        tops.append({text_of(way): value for way, value in ways})
    return {"text_offset": offsets, "token_logprobs": values, "tokens": shown, "top_logprobs": tops}


def chat_logprobs(tokens: list[int], count: int) -> Json:
    def one(token: int, value: float) -> Json:
        return {"token": text_of(token), "logprob": value, "bytes": list(text_of(token).encode())}

    content: list[Json] = []
    for place, token in enumerate(tokens):
        ways = alternatives(token, count, place)
        content.append({**one(*ways[0]), "top_logprobs": [one(*way) for way in ways[:count]]})
    return {"content": content}


def full_answer(ask: Ask, model: str, created: int, fingerprint: str, ends: list[tuple[Choice, Piece]]) -> Json:
    """The body of an answer that is not streamed."""
    prompt = sum(map(len, ask.prompts))
    usage = full_usage(prompt, sum(len(choice.tokens) for choice, _ in ends))
    build = chat_choice if ask.chat else completion_choice
    answer: Json = {
        "id": ask.id,
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [build(ask, choice, end) for choice, end in ends],
        "service_tier": None,
        "system_fingerprint": fingerprint,
        "usage": usage,
    }
    if ask.chat:
        ids = ask.prompts[0] if ask.token_ids else None
        answer.update({"prompt_logprobs": None, "prompt_token_ids": ids, "prompt_text": None})
    return {**answer, "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}


def completion_choice(ask: Ask, choice: Choice, end: Piece) -> Json:
    prompt = ask.prompts[choice.index // ask.n]
    before = prompt if ask.echo else []
    said = choice.text if ask.most else ""
    return {
        "index": choice.index,
        "text": "".join(map(text_of, before)) + said,
        "logprobs": None if ask.logprobs is None else completion_logprobs(before, choice.tokens, ask.logprobs, 0),
        "finish_reason": end.finish,
        "stop_reason": end.stop,
        "token_ids": choice.tokens if ask.token_ids else None,
        "prompt_logprobs": [None] * len(prompt) if before and ask.logprobs is not None else None,
        "prompt_token_ids": prompt if ask.token_ids else None,
        "routed_experts": None,
    }


def chat_choice(ask: Ask, choice: Choice, end: Piece) -> Json:
    none = ("refusal", "annotations", "audio", "function_call", "reasoning")
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, **dict.fromkeys(none)},
        "logprobs": None if ask.logprobs is None else chat_logprobs(choice.tokens, ask.logprobs),
        "finish_reason": end.finish,
        "stop_reason": end.stop,
        "token_ids": choice.tokens if ask.token_ids else None,
        "routed_experts": None,
    }


class Chunks:
    """The events of a streamed answer."""

    def __init__(self, ask: Ask, model: str, created: int, fingerprint: str) -> None:
        self.ask = ask
        self.fingerprint = fingerprint
        self.head: Json = {
            "id": ask.id,
            "object": "chat.completion.chunk" if ask.chat else "text_completion",
            "created": created,
            "model": model,
        }
        self.counts: dict[int, int] = {}
        self.offsets: dict[int, int] = {}

    def opening(self) -> list[bytes]:
        """A chat begins with the role of each choice."""
        if not self.ask.chat:
            return []
        events: list[bytes] = []
        for index in range(self.ask.n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            ids = {"prompt_token_ids": self.ask.prompts[0] if self.ask.token_ids else None, "prompt_text": None}
            events.append(self.event([choice], self.usage(index), **ids))
        return events

    def piece(self, piece: Piece) -> bytes:
        ask = self.ask
        self.counts[piece.index] = self.counts.get(piece.index, 0) + len(piece.tokens)
        prompt = ask.prompts[piece.index // ask.n]
        ids = piece.tokens if ask.token_ids else None
        if ask.chat:
            shown = None if ask.logprobs is None else chat_logprobs(piece.tokens, ask.logprobs)
            choice: Json = {"index": piece.index, "delta": {"content": piece.text}, "logprobs": shown}
            choice["finish_reason"] = piece.finish
            if piece.finish:
                choice["stop_reason"] = piece.stop
            choice["token_ids"] = ids
        else:
            before = prompt if ask.echo and piece.first else []
            offset = self.offsets.get(piece.index, 0)
            self.offsets[piece.index] = offset + sum(len(text_of(token)) for token in [*before, *piece.tokens])
            told = None if ask.logprobs is None else completion_logprobs(before, piece.tokens, ask.logprobs, offset)
            choice = {
                "index": piece.index,
                "text": "".join(map(text_of, before)) + piece.text,
                "logprobs": told,
                "finish_reason": piece.finish,
                "stop_reason": piece.stop,
                "prompt_token_ids": prompt if (ask.token_ids or ask.echo) and piece.first else None,
                "token_ids": ids,
            }
        marked = {"system_fingerprint": self.fingerprint} if piece.finish and not ask.usage else {}
        return self.event([choice], {**self.usage(piece.index), **marked})

    def usage(self, index: int) -> Json:
        if not self.ask.usage_always:
            return {}
        usage = usage_of(len(self.ask.prompts[index // self.ask.n]), self.counts.get(index, 0))
        return {"usage": {**usage, "completion_tokens_details": None} if self.ask.chat else usage}

    def closing(self) -> list[bytes]:
        events: list[bytes] = []
        if self.ask.usage:
            usage = usage_of(sum(map(len, self.ask.prompts)), sum(self.counts.values()))
            events.append(self.event([], {"usage": usage, "system_fingerprint": self.fingerprint}))
        return [*events, b"data: [DONE]\n\n"]

    def event(self, choices: list[Json], more: Json, **rest: Any) -> bytes:
        return b"data: " + compact({**self.head, "choices": choices, **more, **rest}) + b"\n\n"


def error_event(refused: RefusedError) -> bytes:
    return b"data: " + compact(refused.body) + b"\n\n"


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenized(body: Json, names: list[str], max_model_len: int) -> Json:
    if "messages" in body:
        text = as_prompt(conversation_of(body["messages"], names[0]))
    elif "prompt" in body:
        text = a_text(body["prompt"], "body.prompt")
    else:
        raise invalid("missing", "body.prompt", "Field required", body)
    refuse_another_model(body.get("model"), names)
    tokens = encode(text)
    shown = list(map(text_of, tokens)) if body.get("return_token_strs") else None
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": shown}


def detokenized(body: Json, names: list[str]) -> Json:
    if "tokens" not in body:
        raise invalid("missing", "body.tokens", "Field required", body)
    tokens = [an_int(token, f"body.tokens.{place}") for place, token in enumerate(body["tokens"])]
    refuse_another_model(body.get("model"), names)
    return {"prompt": "".join(map(text_of, tokens))}


SPACE = number_of(" ")
