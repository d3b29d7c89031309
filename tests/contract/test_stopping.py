"""SIGTERM with requests in flight: what ends well, what is refused, what is left hanging.

These come last: they end the engine that the others asked. That an engine leaves requests hanging which did not end in
time is no wish of ours but what vLLM 0.32 does: it kills the part that generates and waits for the clients to go. The
unit's TimeoutStopSec= and the gateway's own deadlines are what ends that. On a busy machine its server may notice the
death of that part first, and then tells the clients: an error, never an answer that looks whole.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.contract.conftest import DRAIN_SECONDS, KEY, MODEL, Engine, Reply, completion

pytestmark = pytest.mark.contract

SHORT, LONG = 40, 2000


class Flight:
    """A request in flight; what came of it, and when."""

    def __init__(self, engine: Engine, **more: object) -> None:
        self.got = b""
        self.closed = False
        body = json.dumps(completion(prompt="Once upon a time", ignore_eos=True, **more)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection = socket.create_connection(("127.0.0.1", engine.port), timeout=120)
        self.connection.sendall(head.encode() + body)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    @property
    def events(self) -> list[bytes]:
        return [line for line in self.got.split(b"\n") if line.startswith(b"data: ")]

    def read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.connection.recv(65536):
                self.got += data
            self.closed = True

    def give_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.connection.close()


@dataclass
class Stop:
    """What was seen while an engine was stopped."""

    during: dict[str, Reply] = field(default_factory=dict[str, Reply])
    refused_after: float = 0
    flights: dict[str, Flight] = field(default_factory=dict[str, Flight])
    got: dict[str, bytes] = field(default_factory=dict[str, bytes])
    closed: dict[str, bool] = field(default_factory=dict[str, bool])
    alive_while_clients_wait: bool = False
    exit_code: int = -1


def stopped(engine: Engine, *, look: bool) -> Stop:
    """Four requests in flight, SIGTERM, a look at what still answers, and an end."""
    stop = Stop()
    stop.flights = {
        "short stream": Flight(engine, max_tokens=SHORT, stream=True, stream_options={"include_usage": True}),
        "short": Flight(engine, max_tokens=SHORT),
        "long stream": Flight(engine, max_tokens=LONG, stream=True),
        "long": Flight(engine, max_tokens=LONG),
    }
    deadline = time.monotonic() + 60
    # What is to end in time has little left: how fast a busy machine makes tokens is not what is looked at.
    begun = SHORT - 10 if look else 0
    while not (stop.flights["long stream"].events and len(stop.flights["short stream"].events) >= begun):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    engine.terminate()
    if look:
        time.sleep(0.7)
        for path in ("/health", "/v1/models", "/metrics"):
            stop.during[path] = engine.ask("GET", path)
        stop.during["completion"] = engine.complete()
        stop.during["stream"] = engine.complete(stream=True)
        stop.during["chat"] = engine.chat()
        stop.during["tokenize"] = engine.ask("POST", "/tokenize", {"model": MODEL, "prompt": "Hello"})
    while time.monotonic() < began + 60:
        try:
            socket.create_connection(("127.0.0.1", engine.port), timeout=5).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.1)
    stop.refused_after = time.monotonic() - began
    time.sleep(1.5)
    stop.alive_while_clients_wait = engine.shell.poll() is None
    for name, flight in stop.flights.items():
        stop.got[name], stop.closed[name] = flight.got, flight.closed
        flight.give_up()
    stop.exit_code = engine.shell.wait(30)
    return stop


def cut_short(stop: Stop, name: str) -> bool:
    """Whether a request has no end that could be taken for one: left hanging, or told of the failure."""
    got = stop.got[name]
    ended = b'"finish_reason":"' in got or b'"usage":{' in got
    return not ended and (not stop.closed[name] or b"InternalServerError" in got)


def waits_for_its_clients(stop: Stop) -> bool:
    """Whether the engine is there as long as a client hangs."""
    return stop.alive_while_clients_wait or all(stop.closed.values())


@pytest.fixture(scope="session")
def drained(engine: Engine) -> Stop:
    return stopped(engine, look=True)


@pytest.fixture(scope="session")
def aborted(starter: Callable[[int], Engine]) -> Stop:
    return stopped(starter(0), look=False)


# --- with time to end ------------------------------------------------------------------------------------------------


def test_what_ends_in_time_ends_well(drained: Stop) -> None:
    *events, usage = Reply.of(drained.got["short stream"]).events
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == SHORT
    whole = Reply.of(drained.got["short"]).json
    assert (whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (SHORT, "length")


@pytest.mark.parametrize("what", ["completion", "stream", "chat", "tokenize"])
def test_what_comes_too_late_is_refused(drained: Stop, what: str) -> None:
    reply = drained.during[what]
    message = "cannot schedule new futures after shutdown"
    error = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
    assert (reply.status, reply.json) == (500, {"error": error})


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_an_engine_that_takes_nothing_more_still_says_that_it_is_well(drained: Stop, path: str) -> None:
    """So who wants to know has to ask for a token."""
    assert drained.during[path].status == 200


def test_the_door_is_shut_when_the_time_is_over(drained: Stop) -> None:
    assert DRAIN_SECONDS - 0.5 < drained.refused_after < DRAIN_SECONDS + 5


@pytest.mark.parametrize("name", ["long stream", "long"])
def test_what_does_not_end_in_time_is_left_hanging_or_told(drained: Stop, name: str) -> None:
    assert cut_short(drained, name), drained.got[name][-500:]
    assert waits_for_its_clients(drained)


def test_it_ends_with_success_when_the_clients_have_gone(drained: Stop) -> None:
    assert drained.exit_code == 0


# --- without ---------------------------------------------------------------------------------------------------------


def test_without_time_the_door_is_shut_at_once(aborted: Stop) -> None:
    assert aborted.refused_after < 5


@pytest.mark.parametrize("name", ["short stream", "short", "long stream", "long"])
def test_without_time_all_is_left_hanging_or_told(aborted: Stop, name: str) -> None:
    assert cut_short(aborted, name), aborted.got[name][-500:]


def test_without_time_it_ends_with_success_when_the_clients_have_gone(aborted: Stop) -> None:
    assert waits_for_its_clients(aborted)
    assert aborted.exit_code == 0
