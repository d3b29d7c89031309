"""The pure parts: what is asked, how events are read, how an answer is judged, how it is counted."""

from __future__ import annotations

import io
import json
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard.bench.answers import Answer, Outcome, StreamedAnswer, judge, whole_answer
from gpuyard.bench.ledger import Entry, Ledger, TwiceError
from gpuyard.bench.measures import percentile, report
from gpuyard.bench.schedule import Kind, mix_of, prompts, requests
from gpuyard.bench.sse import EventReader, FramingError

MIX = {Kind.SHORT: 1.0, Kind.LONG: 1.0, Kind.STREAMED: 2.0}


def planned(seed: int, rate: float | None = None) -> list[Any]:
    return list(islice(requests(seed, MIX, prompts(seed, 4, 16, 64), rate), 400))


def test_a_seed_is_a_schedule() -> None:
    assert planned(1, 10) == planned(1, 10)
    assert planned(1, 10) != planned(2, 10)


def test_the_mix_is_kept_and_every_prompt_is_another() -> None:
    kinds = [request.kind for request in planned(1)]
    assert 160 < kinds.count(Kind.STREAMED) < 240
    assert len({request.prompt.text for request in planned(1)}) == 8
    assert {request.prompt.max_tokens for request in planned(1) if request.kind is Kind.SHORT} == {16}


def test_a_rate_spreads_requests_and_no_rate_does_not() -> None:
    assert {request.due for request in planned(1)} == {0}
    dues = [request.due for request in planned(1, rate=20)]
    assert dues == sorted(dues)
    assert 15 < dues[-1] < 25


@pytest.mark.parametrize("text", ["", "fast", "short=x", "short=-1", "short=1,short=2", "short=0,long=0", "short=inf"])
def test_a_mix_that_makes_no_sense_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        mix_of(text)


EVENTS = b': hello\n\ndata: {"a": "\xc3\xa9"}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_events_are_the_same_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(EVENTS)]
    reader = EventReader()
    found = [event for a, b in pairwise(edges) for event in reader.feed(EVENTS[a:b])]
    assert found == ['{"a": "é"}', "one\ntwo", "[DONE]"]
    assert not reader.pending


@pytest.mark.parametrize("half", [b"data: x", b"data: x\n", b"dat"])
def test_half_an_event_is_pending(half: bytes) -> None:
    reader = EventReader()
    assert list(reader.feed(half)) == []
    assert reader.pending


def test_a_line_that_is_no_field_is_an_error() -> None:
    with pytest.raises(FramingError):
        list(EventReader().feed(b"HTTP/1.1 200 OK\r\n"))


REFERENCE = Answer("The harbor lies in the north.", "stop", 8, ["a"])


def judged(content: str, **more: Any) -> Outcome:
    return judge(Answer(**{"content": content, "finish": "stop", "tokens": 8, "ids": ["b"], **more}), REFERENCE)[0]


def test_only_the_whole_answer_is_complete() -> None:
    assert judged(REFERENCE.content) is Outcome.COMPLETE
    assert judged(REFERENCE.content, tokens=None) is Outcome.COMPLETE
    assert judged(REFERENCE.content, tokens=9) is Outcome.WRONG
    assert judged(REFERENCE.content, finish="abort") is Outcome.TRUNCATED
    assert judged("", finish="abort") is Outcome.FAILED


@given(st.integers(1, 28))
def test_a_beginning_is_truncated_whatever_it_says_of_itself(size: int) -> None:
    assert judged(REFERENCE.content[:size]) is Outcome.TRUNCATED
    assert judged(REFERENCE.content[:size], lost="reset") is Outcome.TRUNCATED


@given(st.integers(0, 28), st.integers(1, 29))
def test_a_piece_that_came_twice_is_duplicated(start: int, size: int) -> None:
    text, end = REFERENCE.content, min(start + size, len(REFERENCE.content))
    assert judged(text[:end] + text[start:end] + text[end:]) is Outcome.DUPLICATED


@given(st.integers(0, 28))
def test_a_changed_character_is_wrong(place: int) -> None:
    text = REFERENCE.content
    assert judged(text[:place] + "#" + text[place + 1 :]) is Outcome.WRONG
    assert judged(text[:place] + "#" + text[place + 1 :], lost="reset") is Outcome.WRONG


@given(st.integers(0, 28))
def test_a_character_that_is_missing_is_wrong(place: int) -> None:
    # The last one missing is a beginning; of two equal ones in a row it cannot be said which.
    text = REFERENCE.content
    expected = Outcome.TRUNCATED if place == len(text) - 1 else Outcome.WRONG
    assert judged(text[:place] + text[place + 1 :]) is expected


def test_without_a_reference_any_content_will_do_and_its_form_still_counts() -> None:
    assert judge(Answer("Anything", "stop", 3), None)[0] is Outcome.COMPLETE
    assert judge(Answer("Anything", "stop", 3, lost="reset"), None)[0] is Outcome.TRUNCATED


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"\xff"]
)
def test_a_body_that_is_no_completion_is_wrong(body: bytes) -> None:
    assert judge(whole_answer(body), REFERENCE)[0] is Outcome.WRONG


@pytest.mark.parametrize("event", [b"data: {}\n\n", b"data: 7\n\n", b"data: nonsense\n\n", b"data: null\n\n"])
def test_an_event_that_is_no_chunk_is_wrong(event: bytes) -> None:
    stream = StreamedAnswer()
    stream.feed(event + b"data: [DONE]\n\n")
    assert judge(stream.end(), REFERENCE)[0] is Outcome.WRONG


def entry(number: int, outcome: Outcome = Outcome.COMPLETE, seconds: float = 1) -> Entry:
    return Entry(number, "long-0", "streamed", "", seconds, 0.5, 9, "", 10, "stop", f"c{number}", outcome, "")


def test_a_request_ends_once() -> None:
    ledger = Ledger(None)
    ledger.begin(1)
    with pytest.raises(TwiceError):
        ledger.begin(1)
    ledger.end(entry(1))
    for number in (1, 2):
        with pytest.raises(TwiceError):
            ledger.end(entry(number))
    with pytest.raises(TwiceError):
        ledger.begin(1)


def test_a_line_is_written_when_its_request_ends() -> None:
    file = io.StringIO()
    ledger = Ledger(file)
    ledger.begin(7)
    assert file.getvalue() == ""
    ledger.end(entry(7, Outcome.FAILED))
    assert json.loads(file.getvalue())["outcome"] == "failed"


@pytest.mark.parametrize(
    ("ended", "begun", "planned", "lossless"),
    [
        ([Outcome.COMPLETE] * 3, 0, 3, True),
        ([Outcome.COMPLETE] * 3, 0, None, True),
        ([], 0, None, False),
        ([Outcome.COMPLETE] * 3, 1, None, False),
        ([Outcome.COMPLETE] * 3, 0, 4, False),
        *[([Outcome.COMPLETE] * 2 + [bad], 0, 3, False) for bad in Outcome if bad is not Outcome.COMPLETE],
    ],
)
def test_lossless_means_that_all_ended_complete(
    ended: list[Outcome], begun: int, planned: int | None, lossless: bool
) -> None:
    ledger = Ledger(None)
    for number, outcome in enumerate(ended):
        ledger.begin(number)
        ledger.end(entry(number, outcome))
    for number in range(begun):
        ledger.begin(100 + number)
    assert report(ledger, [], 1, planned)["lossless"] is lossless


def test_times_are_those_of_complete_answers() -> None:
    ledger = Ledger(None)
    for number, outcome in enumerate([Outcome.COMPLETE, Outcome.TRUNCATED]):
        ledger.begin(number)
        ledger.end(entry(number, outcome, seconds=1 + 8 * number))
    told = report(ledger, [0.01], 2, None)
    assert told["latency_seconds"] == {"p50": 1, "p90": 1, "p99": 1}
    assert (told["tokens"], told["tokens_per_second"], told["requests_per_second"]) == (10, 5, 0.5)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 99) == 3
