"""No request reaches a drained server, and none that runs on it is overlooked, whatever HAProxy does meanwhile."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import program
from tests.serving.conftest import PROJECT
from tests.serving.test_gateway import USER_KEY, FakeEngine, Gateway, needs_haproxy, question, within

gateway_state = program("gateway/files/gateway_state.py")

pytestmark = needs_haproxy
HEADERS = {"Authorization": f"Bearer {USER_KEY}", "Content-Type": "application/json"}
BACKENDS = "--backends=model_tiny"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway before two engines, node-0 and node-1."""
    engines = FakeEngine(), FakeEngine()
    running = Gateway(tmp_path, engines[0], ["tiny"], engines[1])
    # A reload on a busy machine takes longer than the two seconds that other tests give a request to come.
    running.variables["gateway_request_seconds"] = 20
    running.render()
    running.start()
    within(20, "both engines to be up", lambda: {running.status(f"node-{number}") for number in range(2)} == {"UP"})
    yield running
    for engine in engines:
        engine.proceed.set()
    running.stop()
    for engine in engines:
        engine.server.shutdown()
        engine.server.server_close()


class Client:
    """One connection of a client, and the request that it sends at some time."""

    def __init__(self, gateway: Gateway) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
        self.connection.connect()
        # A connection that was closed is an error, not a reason to open another.
        self.connection.auto_open = 0

    def begin(self, **more: object) -> http.client.HTTPResponse:
        self.connection.request("POST", "/v1/chat/completions", question(**more), HEADERS)
        return self.connection.getresponse()

    def ask(self) -> int:
        response = self.begin()
        response.read()
        return response.status


def drain(gateway: Gateway, to: str = "drain") -> dict[str, Any]:
    done = gateway.state("set", "--server", "node-0", BACKENDS, "--to", to)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sessions(gateway: Gateway, *words: str) -> int:
    done = gateway.state("servers", *words)
    assert done.returncode == 0, done.stderr
    return next(row["sessions"] for row in json.loads(done.stdout) if row["server"] == "node-0")


def stream_on_node_0(gateway: Gateway) -> http.client.HTTPResponse:
    """A stream that runs until `proceed` is set."""
    for _ in range(2):
        response = Client(gateway).begin(stream=True)
        assert response.readline() == b"data: one\n"
        if gateway.engine.requests:
            return response
    raise AssertionError("two streams, and none is on node-0")


def test_a_stream_of_a_process_from_before_a_reload_keeps_its_server_busy(pair: Gateway) -> None:
    response = stream_on_node_0(pair)
    pair.reload()
    drain(pair)
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=2") == 1
    pair.engine.proceed.set()
    assert b"[DONE]" in response.read()
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=20") == 0


def test_a_connection_that_is_open_before_a_reload_gets_its_answer_and_the_drain_waits_for_it(pair: Gateway) -> None:
    clients = [Client(pair) for _ in range(6)]
    time.sleep(0.2)
    pair.reload()
    drain(pair)
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=1") == 6
    assert {client.ask() for client in clients} == {200}
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=20") == 0


def test_a_request_that_comes_slowly_over_reload_and_drain_gets_its_answer_too(pair: Gateway) -> None:
    body = question()
    slow = [Client(pair).connection for _ in range(4)]
    for connection in slow:
        connection.putrequest("POST", "/v1/chat/completions")
        for name, value in {**HEADERS, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body[:10])
    time.sleep(0.2)
    pair.reload()
    drain(pair)
    assert sessions(pair) == 4
    for connection in slow:
        connection.send(body[10:])
    assert {connection.getresponse().status for connection in slow} == {200}
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=20") == 0


def test_once_drained_a_server_gets_nothing(pair: Gateway) -> None:
    drain(pair)
    pair.reload()
    assert sessions(pair, "--wait-for=idle", "--server=node-0", "--seconds=20") == 0
    assert {Client(pair).ask() for _ in range(20)} == {200}
    assert pair.engine.requests == []


def test_a_drain_holds_whenever_a_reload_comes(pair: Gateway) -> None:
    """The new process may have read the state before the drain was written, and take over after it was set."""
    assert pair.process
    for round_ in range(12):
        reload = threading.Timer(0.01 * round_, os.kill, (pair.process.pid, signal.SIGUSR2))
        reload.start()
        assert drain(pair) == {"changed": True}
        reload.join()
        within(20, "the reload", lambda: len(gateway_state.workers(str(pair.master))) == 1)
        assert pair.drained() == ["node-0"], f"in round {round_}"
        assert drain(pair) == {"changed": False}
        assert drain(pair, "ready") == {"changed": True}
        assert pair.drained() == []


def test_a_connection_that_an_engine_may_be_about_to_close_is_not_used_again(pair: Gateway) -> None:
    """vLLM closes a connection that was silent for five seconds: also in the moment in which the next request comes."""
    pair.engine.reuse = False
    for _ in range(4):
        client = http.client.HTTPConnection("127.0.0.1", pair.port, timeout=20)
        for _ in range(4):
            client.request("POST", "/v1/chat/completions", question(), HEADERS)
            response = client.getresponse()
            assert response.status == 200
            response.read()
    assert len(pair.engine.requests) >= 4


def test_a_process_that_began_on_the_state_of_before_is_set_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload that was on its way: its process is there after the drain was set and saved, and does not know of it."""
    state = "1\n# be_name srv_name srv_addr srv_admin_state srv_port\ntiny node-0 - {} -\n"
    admin = {"11": 0, "12": 0}
    asked: list[str] = []

    def ask(command: str, path: str) -> str:
        asked.append(command)
        if command == "show proc":
            saved = any("set server" in earlier for earlier in asked)
            return "12 worker 0\n11 worker 1\n" if saved else "11 worker 0\n"
        process = command[2:4]
        if "set server" in command:
            admin[process] = gateway_state.DRAINED
        return state.format(admin[process])

    monkeypatch.setattr(gateway_state, "ask", ask)
    (tmp_path / "haproxy.cfg").write_text("backend tiny\n    server node-0 10.0.0.1:8000\n")
    options = argparse.Namespace(
        socket="",
        server="node-0",
        backends=["tiny"],
        to="drain",
        allow_outage=True,
        seats={},
        elsewhere={},
        config=tmp_path / "haproxy.cfg",
        state=tmp_path / "state",
    )
    assert gateway_state.bring(options) is True
    assert admin == {"11": gateway_state.DRAINED, "12": gateway_state.DRAINED}
    assert " 8 " in (tmp_path / "state").read_text()


def test_what_lies_in_the_place_of_a_draft_is_not_written_to(pair: Gateway) -> None:
    victim = pair.folder / "victim"
    victim.write_text("untouched")
    (pair.folder / "server-state.new").symlink_to(victim)
    assert drain(pair) == {"changed": True}
    assert victim.read_text() == "untouched"
    assert "node-0" in (pair.folder / "server-state").read_text()


def test_a_server_that_somebody_has_closed_is_told_as_closed_also_when_its_engine_is_down(pair: Gateway) -> None:
    def told() -> list[tuple[str, str, bool]]:
        rows = json.loads(pair.state("servers").stdout)
        return sorted((row["server"], row["status"].split()[0], row["closed"]) for row in rows)

    assert told() == [("node-0", "UP", False), ("node-1", "UP", False)]
    drain(pair)
    assert told()[0] == ("node-0", "DRAIN", True)
    pair.engine.healthy = False
    within(20, "the engine to be down", lambda: told()[0][1] == "DOWN")
    assert told() == [("node-0", "DOWN", True), ("node-1", "UP", False)]
    drain(pair, "ready")
    assert told()[0] == ("node-0", "DOWN", False)


def test_a_server_that_the_gateway_does_not_know_is_refused(pair: Gateway) -> None:
    done = pair.state("set", "--server", "node-7", BACKENDS, "--to", "drain")
    assert done.returncode == 1
    assert "GATE-UNKNOWN" in done.stderr


def test_a_gateway_that_does_not_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(gateway_state.Stuck, match="GATE-HAPROXY"):
        gateway_state.ask("show proc", str(tmp_path / "master.sock"), seconds=0.3)


def row(server: str, status: str = "UP", sessions: int = 0, backend: str = "tiny") -> dict[str, object]:
    return {"backend": backend, "server": server, "status": status, "sessions": sessions}


@pytest.mark.parametrize(
    ("rows", "seats", "elsewhere", "refusal"),
    [
        ([row("a"), row("b")], {}, {}, ""),
        ([row("a"), row("b", "DRAIN")], {}, {}, "GATE-LAST"),
        ([row("a", "DRAIN"), row("b", "DOWN")], {}, {}, ""),
        ([row("a", sessions=4), row("b", sessions=4)], {"tiny": 8}, {}, ""),
        (
            [row("a", sessions=5), row("b", sessions=4)],
            {"tiny": 8},
            {},
            "GATE-CAPACITY: 9 requests.*1 servers with 8 seats each",
        ),
        ([row("a", sessions=5), row("b", sessions=4), row("c")], {"tiny": 8}, {}, ""),
        ([row("a", sessions=5), row("b", sessions=4, backend="other")], {"tiny": 8}, {}, "GATE-LAST"),
        ([row("a", sessions=4), row("b")], {"tiny": 8}, {"tiny": 4, "other": 9}, ""),
        ([row("a", sessions=4), row("b")], {"tiny": 8}, {"tiny": 5}, "GATE-CAPACITY: 9 requests"),
    ],
)
def test_a_drain_that_the_others_cannot_make_good_is_refused_by_the_gateway(
    rows: list[dict[str, object]], seats: dict[str, int], elsewhere: dict[str, int], refusal: str
) -> None:
    options = argparse.Namespace(server="a", backends=["tiny"], seats=seats, elsewhere=elsewhere)
    if not refusal:
        gateway_state.refuse_to_drain(rows, options)
        return
    with pytest.raises(gateway_state.Stuck, match=refusal):
        gateway_state.refuse_to_drain(rows, options)


def test_seats_are_read_as_the_role_writes_them() -> None:
    assert gateway_state.numbers("model_a=64,model_b=8") == {"model_a": 64, "model_b": 8}
    assert gateway_state.numbers("") == {}


def test_each_gateway_is_told_what_comes_by_the_others(tmp_path: Path) -> None:
    def sees(gateway: str, **sessions: int) -> dict[str, str]:
        rows = [{"backend": backend, "sessions": number} for backend, number in sessions.items()]
        return {"item": gateway, "stdout": json.dumps(rows)}

    told = {
        "item": "g1",
        "node_gate_backends": ["model_a", "model_b"],
        "__node_gate_answers": {"results": [sees("g1", model_a=3), sees("g2", model_a=4, x=7), sees("g3", model_a=1)]},
    }
    (tmp_path / "told.json").write_text(json.dumps(told))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible"),
            *("-i", "localhost,", "localhost", "-c", "local", "-m", "debug", "-a", "msg=<{{ __node_gate_elsewhere }}>"),
            *("-e", f"@{PROJECT}/roles/node_gate/vars/main.yml", "-e", f"@{tmp_path}/told.json"),
        ],
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "<model_a=5,model_b=0>" in done.stdout, done.stdout + done.stderr
