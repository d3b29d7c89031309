"""A node that is about to be taken away closes itself: the real program, the real gateway, a stand-in for EC2."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.imds import MAINTENANCE, REBALANCE, SPOT, Imds
from tests.programs import program
from tests.serving.test_drain import Client, drain, stream_on_node_0
from tests.serving.test_gateway import FakeEngine, Gateway, free_port, needs_haproxy, within

node_notice = program("node_notice/files/node_notice.py")

pytestmark = needs_haproxy


class Agent(node_notice.Agent):
    """Counts who asks."""

    asked = 0

    def finish_request(self, request: Any, client_address: Any) -> None:
        super().finish_request(request, client_address)
        self.asked += 1


class Noticed:
    """A gateway before node-0, which asks a stand-in for EC2, and node-1, whose program does not answer."""

    def __init__(self, folder: Path) -> None:
        self.engines = FakeEngine(), FakeEngine()
        self.gateway = Gateway(folder, self.engines[0], ["tiny"], self.engines[1])
        (folder / "imds").mkdir()
        self.imds = Imds(folder / "imds")
        self.note = node_notice.NOTE
        self.agent = Agent(("127.0.0.1", 0), node_notice.socketserver.BaseRequestHandler)
        threading.Thread(target=self.agent.serve_forever, args=(0.02,), daemon=True).start()
        settings = node_notice.Settings(self.imds.uri, 0, 180, 0.2, 0.1, "", [self.engines[0].port])
        self.watch = node_notice.Watch(settings, self.agent)
        self.over = threading.Event()
        self.rounds = threading.Thread(target=self.go)
        self.rounds.start()
        ports = [self.agent.server_address[1], free_port()]
        for server, port in zip(self.gateway.variables["gateway_models"][0]["servers"], ports, strict=True):
            server["notice_port"] = port
        self.gateway.variables["gateway_request_seconds"] = 20
        self.gateway.render()
        self.gateway.start()
        within(20, "both engines to be up", lambda: {self.status(0), self.status(1)} == {"UP"})

    def go(self) -> None:
        while not self.over.wait(0.2):
            self.watch.round()

    def status(self, number: int) -> str:
        return self.gateway.status(f"node-{number}")

    def closed(self) -> list[str]:
        rows = json.loads(self.gateway.state("servers").stdout)
        return [row["server"] for row in rows if row["closed"]]

    def ask_round(self) -> None:
        """Until the gateway has asked twice more: it has then heard what was said before."""
        asked = self.agent.asked
        within(20, "the gateway to ask", lambda: self.agent.asked >= asked + 2)

    def announce(self, path: str = SPOT) -> float:
        at = node_notice.shown(time.time() + 120)
        told = {SPOT: {"action": "terminate", "time": at}, REBALANCE: {"noticeTime": at}}
        self.imds.says(path, json.dumps(told[path]))
        return time.monotonic()

    def stop(self) -> None:
        self.over.set()
        self.rounds.join(5)
        self.agent.shutdown()
        self.agent.server_close()
        self.imds.stop()
        for engine in self.engines:
            engine.proceed.set()
        self.gateway.stop()
        for engine in self.engines:
            engine.server.shutdown()
            engine.server.server_close()


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Noticed]:
    monkeypatch.setattr(node_notice, "NOTE", tmp_path / "gpuyard/notice.json")
    made = Noticed(tmp_path)
    yield made
    made.stop()


def test_a_spot_notice_lets_a_stream_end_and_sends_the_node_nothing_new(fleet: Noticed) -> None:
    response = stream_on_node_0(fleet.gateway)
    began = fleet.announce()
    within(10, "node-0 to be closed", lambda: fleet.closed() == ["node-0"])
    assert time.monotonic() - began < 8, "of the two minutes"
    taken = len(fleet.gateway.engine.requests)
    assert {Client(fleet.gateway).ask() for _ in range(10)} == {200}
    assert len(fleet.gateway.engine.requests) == taken
    fleet.gateway.engine.proceed.set()
    assert b"[DONE]" in response.read()
    assert json.loads(fleet.note.read_text())["rule"] == "NOTICE-SPOT"


def test_without_a_notice_neither_an_answer_nor_its_absence_changes_a_server(fleet: Noticed) -> None:
    fleet.imds.says(MAINTENANCE, "[]")
    fleet.announce(REBALANCE)
    fleet.ask_round()
    assert fleet.closed() == []
    fleet.imds.stop()
    fleet.ask_round()
    assert fleet.closed() == []
    assert {fleet.status(0), fleet.status(1)} == {"UP"}


def test_what_an_operator_has_closed_is_not_opened_by_a_node_that_goes_on(fleet: Noticed) -> None:
    drain(fleet.gateway)
    fleet.ask_round()
    assert fleet.closed() == ["node-0"]
    drain(fleet.gateway, "ready")
    fleet.ask_round()
    assert fleet.closed() == []


def test_a_node_that_closed_itself_counts_as_closed_by_somebody_also_over_a_reload_and_a_crash(fleet: Noticed) -> None:
    fleet.announce()
    within(10, "node-0 to be closed", lambda: fleet.closed() == ["node-0"])
    fleet.gateway.reload()
    assert fleet.closed() == ["node-0"]
    # Nothing was saved since, as after a crash: the node says it again.
    (fleet.gateway.folder / "server-state").unlink()
    fleet.gateway.stop()
    fleet.gateway.run()
    within(10, "node-0 to be closed again", lambda: fleet.closed() == ["node-0"])


def test_who_opens_it_while_the_notice_stands_is_contradicted_and_afterwards_is_not(fleet: Noticed) -> None:
    fleet.announce()
    within(10, "node-0 to be closed", lambda: fleet.closed() == ["node-0"])
    drain(fleet.gateway, "ready")
    within(10, "node-0 to be closed again", lambda: fleet.closed() == ["node-0"])
    fleet.imds.says(SPOT, None)
    # Whoever asks by hand waits for the answers: the rounds' short patience is missed on a busy machine.
    assert node_notice.release(fleet.watch.settings._replace(patience=20)) == 0
    drain(fleet.gateway, "ready")
    fleet.ask_round()
    assert fleet.closed() == []
    assert fleet.status(0) == "UP"
