"""Connections: how long one is kept, what happens when a client goes away."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest

from tests.contract.conftest import KEY, MODEL, Engine, Reply, completion

pytestmark = pytest.mark.contract

RUNNING = f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}}'
ABORTED = f'vllm:request_success_total{{engine="0",finished_reason="abort",model_name="{MODEL}"}}'


def test_a_connection_is_used_again_and_closed_after_five_idle_seconds(engine: Engine) -> None:
    """A gateway that keeps connections for longer meets closed ones."""
    with socket.create_connection(("127.0.0.1", engine.port), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: engine\r\n\r\n")
            got = b""
            while b'{"version":' not in got:
                got += connection.recv(65536)
            assert Reply.of(got).status == 200
            assert "connection" not in Reply.of(got).headers
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert 4.5 < time.monotonic() - began < 7


def test_a_body_may_come_in_chunks(engine: Engine) -> None:
    body = json.dumps(completion()).encode()
    raw = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
    headers: dict[str, str | None] = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    reply = engine.ask("POST", "/v1/completions", raw=raw, headers=headers)
    assert reply.json["usage"]["completion_tokens"] == 4


def test_who_goes_away_is_not_generated_for_any_longer(engine: Engine) -> None:
    before = engine.metrics()
    body = json.dumps(completion(max_tokens=2000, ignore_eos=True, stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", engine.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        got = b""
        while not re.search(rb"data: ", got):
            got += connection.recv(65536)
        assert engine.metrics()[RUNNING] == 1
    deadline = time.monotonic() + 5
    while engine.metrics()[RUNNING]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # What was given up is counted nowhere.
    assert engine.metrics()[ABORTED] == before[ABORTED]
