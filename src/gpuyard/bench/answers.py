"""An answer as it came, and whether it is the whole one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpuyard.bench.sse import EventReader, FramingError

DONE = "[DONE]"
# How a model ends. What an engine says when it gives up (`abort`, `error`) is no end.
ENDS = ("stop", "length", "tool_calls", "content_filter")


class Outcome(StrEnum):
    COMPLETE = "complete"
    FAILED = "failed"
    """Nothing of an answer: refused, no connection, an error in its place."""
    TRUNCATED = "truncated"
    """A part of the answer, and then no more of it."""
    DUPLICATED = "duplicated"
    """Something of it, or all of it, came twice."""
    WRONG = "wrong"
    """Not what the same question was answered before, or not in the form of the API."""


@dataclass(slots=True)
class Answer:
    """What came. `error` and what follows say what went wrong; empty, it did not."""

    content: str = ""
    finish: str | None = None
    tokens: int | None = None
    ids: list[str] = field(default_factory=list[str])
    """Ids of the completion in the order they were seen; more than one is two answers in one."""
    part: bool = False
    """Some bytes of an answer came that can only be read when it is whole."""
    error: str = ""
    """There is no answer, or an error came in its place."""
    lost: str = ""
    """The connection ended, or fell silent, before the answer did."""
    malformed: str = ""
    """It is not in the form of the API."""
    repeated: str = ""
    """Something came after the end."""


class StreamedAnswer:
    """Reads a stream of chat completion chunks."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.done = False
        self._events = EventReader()

    def feed(self, piece: bytes) -> int:
        """Take a piece of the body; the number of events in it that carried content."""
        carried = 0
        if self.done:
            self.answer.repeated = self.answer.repeated or f"{piece[:60]!r} after {DONE}"
        if self.done or self.answer.malformed:
            return 0
        try:
            for payload in self._events.feed(piece):
                carried += self._event(payload)
        except (FramingError, ValueError, LookupError, TypeError, AttributeError) as error:
            self.answer.malformed = str(error) or type(error).__name__
        return carried

    def end(self) -> Answer:
        """The body has ended, as far as HTTP can tell."""
        if not self.done:
            self.answer.lost = self.answer.lost or f"the stream ended without {DONE}"
        return self.answer

    def _event(self, payload: str) -> bool:
        if payload == DONE:
            self.done = True
            if self._events.pending:
                self.answer.repeated = self.answer.repeated or f"bytes after {DONE}"
            return False
        if self.done:
            return False
        chunk = json.loads(payload)
        if "error" in chunk:
            self.answer.error = self.answer.error or f"an error within the stream: {payload[:200]}"
            return False
        note_id(self.answer, chunk)
        note_usage(self.answer, chunk)
        text = ""
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            if text and self.answer.finish:
                self.answer.repeated = self.answer.repeated or f"{text[:60]!r} after finish_reason"
            self.answer.content += text
            if choice.get("finish_reason"):
                if self.answer.finish:
                    self.answer.repeated = self.answer.repeated or "finish_reason twice"
                self.answer.finish = choice["finish_reason"]
        return bool(text)


def whole_answer(body: bytes) -> Answer:
    """An answer that came in one piece."""
    answer = Answer()
    try:
        told = json.loads(body)
        if "error" in told:
            answer.error = f"an error: {body[:200].decode(errors='replace')}"
            return answer
        note_id(answer, told)
        note_usage(answer, told)
        choice = told["choices"][0]
        answer.content = choice["message"]["content"] or ""
        answer.finish = choice["finish_reason"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        answer.malformed = f"no chat completion: {error!r}"
    return answer


def note_id(answer: Answer, told: dict[str, Any]) -> None:
    if (name := told.get("id")) and name not in answer.ids:
        answer.ids.append(name)


def note_usage(answer: Answer, told: dict[str, Any]) -> None:
    if usage := told.get("usage"):
        answer.tokens = usage["completion_tokens"]


def judge(answer: Answer, reference: Answer | None) -> tuple[Outcome, str]:
    """How a request ended, and why it is not complete. Without a reference the content may be any."""
    broken_off = Outcome.TRUNCATED if answer.content or answer.part else Outcome.FAILED
    if answer.error:
        return broken_off, answer.error
    if answer.malformed:
        return Outcome.WRONG, answer.malformed
    if len(answer.ids) > 1:
        return Outcome.DUPLICATED, f"two answers in one: {' and '.join(answer.ids)}"
    if answer.repeated:
        return Outcome.DUPLICATED, answer.repeated
    if reference is not None and not reference.content.startswith(answer.content):
        return differing(answer.content, reference.content)
    if answer.lost:
        return broken_off, answer.lost
    if answer.finish not in ENDS:
        return broken_off, f"finish_reason is {answer.finish}"
    if reference is None:
        return Outcome.COMPLETE, ""
    if answer.content != reference.content:
        return Outcome.TRUNCATED, f"{len(answer.content)} of {len(reference.content)} characters, and said to be all"
    ends = [(one.finish, one.tokens if answer.tokens and reference.tokens else None) for one in (answer, reference)]
    if ends[0] != ends[1]:
        return Outcome.WRONG, "the same content ends otherwise: {} with {} tokens, before {} with {}".format(
            *ends[0], *ends[1]
        )
    return Outcome.COMPLETE, ""


def differing(content: str, reference: str) -> tuple[Outcome, str]:
    """Whether a content that is no beginning of the reference is one with a piece of it twice, or another."""
    at = next((i for i, (a, b) in enumerate(zip(content, reference, strict=False)) if a != b), len(reference))
    # Also where the stream was cut later on: what comes after the second time goes on as the reference does.
    for size in range(1, at + 1):
        if content[at - size : at] == content[at : at + size] and reference.startswith(
            content[:at] + content[at + size :]
        ):
            return Outcome.DUPLICATED, f"{size} characters twice at character {at}"
    return (
        Outcome.WRONG,
        f"other content from character {at} on: {content[at : at + 40]!r}, not {reference[at : at + 40]!r}",
    )
