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


def compact(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --- what a request says ---------------------------------------------------------------------------------------------


def invalid(kind: str, place: str, message: str, given: object, param: str | None = None) -> RefusedError:
    """A field of the wrong kind, worded like the validation of the real server."""
    shown = f"<{type(given).__name__} of {len(given)} items>" if isinstance(given, (list, dict)) else given  # pyright: ignore[reportUnknownArgumentType]
    text = str({"type": kind, "loc": place, "msg": message, "input": shown})
    return RefusedError(f"1 validation error:\n  {text}", "Bad Request", param or place)


def wrong(message: str, param: str | None, body: object) -> RefusedError:
    """A value that contradicts another one."""
    shown = f"Value error, {message}"
    return invalid("value_error", "body", shown, body, param)


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
        raise RefusedError(message.split("\n  ")[1], "Bad Request", None)
    if not raw:
        raise invalid("missing", "body", "Field required", None)
    try:
        told: object = json.loads(raw)
    except ValueError as error:
        place = getattr(error, "pos", 0)
        raise RefusedError(
            "1 validation error:\n  "
            + str({"type": "json_invalid", "loc": f"body.{place}", "msg": "JSON decode error", "input": {}}),
            "Bad Request",
            f"body.{place}",
        ) from None
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


def ask_of(body: Json, *, chat: bool, names: list[str], max_model_len: int, request_id: str | None) -> Ask:
    """What a body asks for. The order of the checks is that of the real server: form, model, prompt, numbers."""
    if body.get("stream_options") and not body.get("stream"):
        raise wrong("Stream options can only be defined when `stream=True`.", "stream_options", body)
    logprobs = logprobs_of(body, chat)
    if not chat and body.get("prompt") in (None, ""):
        raise wrong("Either prompt or prompt_embeds must be provided and non-empty.", "prompt", body)
    if chat and "messages" not in body:
        raise invalid("missing", "body.messages", "Field required", body)
    told = checked(body)
    words: list[tuple[str, str]] = []
    if chat:
        words = [words_of(message, place) for place, message in enumerate(messages_of(told["messages"]))]
    refuse_another_model(told.get("model"), names)
    if chat:
        texts: list[Any] = ["".join(f"<|{role}|>{text}\n" for role, text in words) + "<|assistant|>"]
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
    ask.most = max_model_len - longest if most is None else most
    ask.least = told.get("min_tokens", 0)
    stop = told.get("stop", [])
    ask.stop = [stop] if isinstance(stop, str) else list(stop)
    ask.stop_ids = told.get("stop_token_ids", [])
    ask.keep_stop = told.get("include_stop_str_in_output", False)
    ask.ignore_eos = told.get("ignore_eos", False)
    ask.seed = told.get("seed")
    ask.stream = told.get("stream", False)
    options = told.get("stream_options", {})
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
        raise wrong(f"`{name}` must be an integer.", name, body)
    if value is not None and value < 0 and value != -1:
        raise wrong(f"`{name}` must be a positive value or -1.", name, body)
    if chat and value and not body.get("logprobs"):
        raise wrong("when using `top_logprobs`, `logprobs` must be set to true.", name, body)
    if chat:
        return int(value or 0) if body.get("logprobs") else None
    return None if value is None else int(value)


def messages_of(messages: object) -> list[Any]:
    if not isinstance(messages, list):
        raise invalid("list_type", "body.messages", "Input should be a valid list", messages)
    return messages  # pyright: ignore[reportUnknownVariableType]


def words_of(message: Any, place: int) -> tuple[str, str]:
    """Role and text of one message."""
    where = f"body.messages.{place}"
    if not isinstance(message, dict):
        raise invalid("dict_type", where, "Input should be a valid dictionary", message)
    told: Json = message  # pyright: ignore[reportUnknownVariableType]
    if "role" not in told:
        raise invalid("missing", f"{where}.role", "Field required", told)
    content = told.get("content") or ""
    if isinstance(content, list):
        parts: list[Json] = content  # pyright: ignore[reportUnknownVariableType]
        if other := [part.get("type") for part in parts if part.get("type") != "text"]:
            kind = str(other[0]).split("_")[0]
            raise RefusedError(f"At most 0 {kind}(s) may be provided in one prompt.")
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
        raise RefusedError("Please provide at least one prompt")
    raise invalid("string_type", "body.prompt", "Input should be a valid string", prompt)  # pyright: ignore[reportUnknownArgumentType]


def refuse_another_model(model: str | None, names: list[str]) -> None:
    if model and model not in names:
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(names)}."
        raise RefusedError(message, "NotFoundError", "model", 404)


def refuse_what_does_not_fit(prompt: int, most: int | None, max_model_len: int) -> None:
    if prompt + (most or 1) > max_model_len:
        raise RefusedError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {most or 1} output "
            f"tokens and your prompt contains {prompt} input tokens, for a total of {prompt + (most or 1)} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )


def refuse_numbers(ask: Ask, told: Json) -> None:
    def refuse(message: str, param: str | None = None) -> None:
        raise RefusedError(message, param=param)

    if not 1 <= ask.n <= MOST_N:
        refuse(f"n must be at least 1, got {ask.n}." if ask.n < 1 else f"n must be at most {MOST_N}, got {ask.n}.")
    temperature, top_p, top_k = told.get("temperature", 1.0), told.get("top_p", 1.0), told.get("top_k", 0)
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= told.get(name, 0) <= 2:
            refuse(f"{name} must be in [-2, 2], got {told[name]}.")
    if temperature < 0:
        refuse(f"temperature must be non-negative, got {temperature}.", "temperature")
    if temperature > 2:
        refuse(f"temperature must be in [0, 2], got {temperature}.", "temperature")
    if not 0 < top_p <= 1:
        refuse(f"top_p must be in (0, 1], got {top_p}.", "top_p")
    if top_k < -1:
        refuse(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    if ask.most < 1 and not ask.echo:
        refuse(f"max_tokens must be at least 1, got {ask.most}.", "max_tokens")
    if ask.least > ask.most:
        refuse(f"min_tokens must be less than or equal to max_tokens={ask.most}, got {ask.least}.")
    if not all(ask.stop):
        refuse("stop cannot contain an empty string.")
    if temperature == 0 and ask.n > 1:
        refuse(f"n must be 1 when using greedy sampling, got {ask.n}.")
    if ask.logprobs is not None and ask.logprobs > MOST_LOGPROBS:
        refuse(
            f"Requested sample logprobs of {ask.logprobs}, which is greater than max allowed: {MOST_LOGPROBS}",
            "logprobs",
        )


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

    def cut(self, reason: str) -> Piece:
        """The end that comes from outside."""
        piece = Piece(self.index, self.text[self.sent :], [], reason, first=not self.tokens)
        self.sent = len(self.text)
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


def completion_logprobs(tokens: list[int], count: int, offset: int) -> Json:
    offsets: list[int] = []
    shown: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
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
    shown = [*prompt, *choice.tokens] if ask.echo else choice.tokens
    return {
        "index": choice.index,
        "text": "".join(map(text_of, prompt)) + choice.text if ask.echo else choice.text,
        "logprobs": None if ask.logprobs is None else completion_logprobs(shown, ask.logprobs, 0),
        "finish_reason": end.finish,
        "stop_reason": end.stop,
        "token_ids": choice.tokens if ask.token_ids else None,
        "prompt_logprobs": None,
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
            echoed = ask.echo and piece.first
            tokens = [*prompt, *piece.tokens] if echoed else piece.tokens
            offset = self.offsets.get(piece.index, 0)
            self.offsets[piece.index] = offset + sum(len(text_of(token)) for token in tokens)
            choice = {
                "index": piece.index,
                "text": "".join(map(text_of, prompt)) + piece.text if echoed else piece.text,
                "logprobs": None if ask.logprobs is None else completion_logprobs(tokens, ask.logprobs, offset),
                "finish_reason": piece.finish,
                "stop_reason": piece.stop,
                "prompt_token_ids": prompt if ask.token_ids and piece.first else None,
                "token_ids": ids,
            }
        marked = {"system_fingerprint": self.fingerprint} if piece.finish and not ask.usage else {}
        return self.event([choice], {**self.usage(piece.index), **marked})

    def usage(self, index: int) -> Json:
        if not self.ask.usage_always:
            return {}
        return {"usage": usage_of(len(self.ask.prompts[index // self.ask.n]), self.counts.get(index, 0))}

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
        words = [words_of(message, place) for place, message in enumerate(messages_of(body["messages"]))]
        text = "".join(f"<|{role}|>{content}\n" for role, content in words) + "<|assistant|>"
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
    try:
        return {"prompt": "".join(map(text_of, tokens))}
    except (ValueError, OverflowError) as error:
        raise RefusedError(str(error)) from error


SPACE = number_of(" ")
