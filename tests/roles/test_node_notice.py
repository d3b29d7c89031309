"""When a node closes itself: the decision alone, and the program before a stand-in for EC2's metadata service."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.imds import MAINTENANCE, REBALANCE, SPOT, Imds

PROJECT = Path(__file__).parents[2]


program = programs.program("node_notice/files/node_notice.py")

NOW = 1_800_000_000.0
LEAD = 180.0


def notice(rule: str, at: float | None) -> Any:
    return program.Notice(f"NOTICE-{rule}", rule.lower(), at)


@pytest.mark.parametrize(
    ("notices", "closes_for"),
    [
        ([], None),
        ([("SPOT", NOW + 120)], "NOTICE-SPOT"),
        ([("SPOT", NOW + 3600)], "NOTICE-SPOT"),
        ([("SPOT", NOW - 5)], "NOTICE-SPOT"),
        ([("REBALANCE", None)], None),
        ([("MAINTENANCE", NOW + LEAD + 1)], None),
        ([("MAINTENANCE", NOW + LEAD)], "NOTICE-MAINTENANCE"),
        ([("MAINTENANCE", NOW - 3600)], "NOTICE-MAINTENANCE"),
        ([("BLOCK", NOW + LEAD + 1)], None),
        ([("BLOCK", NOW + LEAD - 1)], "NOTICE-BLOCK"),
        ([("BLOCK", NOW + 90), ("SPOT", NOW + 120), ("MAINTENANCE", NOW + 100)], "NOTICE-BLOCK"),
        ([("REBALANCE", None), ("MAINTENANCE", NOW + 9999), ("SPOT", NOW + 120)], "NOTICE-SPOT"),
    ],
)
def test_a_node_closes_for_what_is_certain_and_near(
    notices: list[tuple[str, float | None]], closes_for: str | None
) -> None:
    found = program.decide([notice(*one) for one in notices], NOW, LEAD)
    assert (found and found.rule) == closes_for


def event(**more: str) -> dict[str, str]:
    """As the EC2 User Guide shows one."""
    return {
        "NotBefore": "21 Jan 2026 09:00:43 GMT",
        "Code": "system-reboot",
        "Description": "scheduled reboot",
        "EventId": "instance-event-0d59937288b749b32",
        "NotAfter": "21 Jan 2026 09:17:23 GMT",
        "State": "active",
        **more,
    }


@pytest.mark.parametrize(
    ("path", "told", "notices"),
    [
        (
            SPOT,
            {"action": "terminate", "time": "2026-01-21T09:00:43Z"},
            ["NOTICE-SPOT: AWS will terminate this spot instance at 2026-01-21T09:00:43Z"],
        ),
        (
            REBALANCE,
            {"noticeTime": "2026-01-21T09:00:43Z"},
            ["NOTICE-REBALANCE: AWS says that this spot instance is likely to be interrupted"],
        ),
        (MAINTENANCE, [], []),
        (
            MAINTENANCE,
            [event(State="completed"), event()],
            [
                "NOTICE-MAINTENANCE: AWS has scheduled system-reboot (instance-event-0d59937288b749b32) "
                "at 2026-01-21T09:00:43Z"
            ],
        ),
        (MAINTENANCE, [event(State="canceled")], []),
    ],
)
def test_what_aws_says_is_read_as_it_is_documented(path: str, told: object, notices: list[str]) -> None:
    assert [str(one) for one in program.notices_of(path, json.dumps(told))] == notices


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (SPOT, ""),
        (SPOT, "<html>"),
        (SPOT, "[]"),
        (SPOT, "null"),
        (SPOT, '{"action": "terminate"}'),
        (SPOT, '{"action": "terminate", "time": "soon"}'),
        (SPOT, '{"action": "terminate", "time": 7}'),
        (REBALANCE, '{"noticeTime": null}'),
        (MAINTENANCE, "{}" * 2),
        (MAINTENANCE, "7"),
        (MAINTENANCE, json.dumps([event(NotBefore="soon")])),
        (MAINTENANCE, json.dumps([{"State": "active"}])),
        (MAINTENANCE, "[" * 60000),
    ],
)
def test_what_is_no_notice_is_unread_and_never_one(path: str, text: str) -> None:
    with pytest.raises(program.Unread, match=path):
        program.notices_of(path, text)


def test_a_capacity_block_takes_its_machines_half_an_hour_before_its_end() -> None:
    [found] = program.block_notice("2026-12-07T11:30:00Z")
    assert str(found) == "NOTICE-BLOCK: its Capacity Block ends at 2026-12-07T11:30:00Z at 2026-12-07T11:00:00Z"
    assert program.decide([found], program.moment("2026-12-07T10:56:59Z"), LEAD) is None
    assert program.decide([found], program.moment("2026-12-07T10:57:00Z"), LEAD) == found
    assert program.block_notice("") == []


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0A00000A:1F40 0B00000A:D431 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0A00000A:0016 0B00000A:D432 01 00000000:00000000 00:00000000 00000000     0        0 3 1
   3: 0A00000A:1F41 0B00000A:D433 06 00000000:00000000 00:00000000 00000000     0        0 4 1
"""


def test_requests_that_run_are_the_open_connections_of_the_engines_ports() -> None:
    assert program.connections([8000, 8001], [TCP, TCP]) == 2
    assert program.connections([8001], [TCP]) == 0


# Before a stand-in.


class Node:
    """A node with its files in a folder, the program's settings, and a stand-in to ask."""

    def __init__(self, folder: Path) -> None:
        (folder / "imds").mkdir()
        self.imds = Imds(folder / "imds")
        self.note = folder / "gpuyard/notice.json"
        self.settings = program.Settings(self.imds.uri, 0, LEAD, 0.05, 0.4, "", [1])
        self.agent = program.Agent(("127.0.0.1", 0), program.socketserver.BaseRequestHandler)
        self.port = self.agent.server_address[1]
        threading.Thread(target=self.agent.serve_forever, args=(0.02,), daemon=True).start()
        self.watch = program.Watch(self.settings, self.agent)

    def answer(self) -> str | None:
        return program.answer_of(self.port)

    def seen(self, **settings: Any) -> Any:
        return program.seen(self.settings._replace(**settings))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    made = Node(tmp_path)
    monkeypatch.setattr(program, "NOTE", made.note)
    yield made
    made.imds.stop()
    made.agent.shutdown()
    made.agent.server_close()


def in_seconds(seconds: float) -> str:
    return program.shown(time.time() + seconds)


def spot(seconds: float = 120) -> str:
    return json.dumps({"action": "terminate", "time": in_seconds(seconds)})


def maintenance(seconds: float) -> str:
    at = time.strftime("%d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))
    return json.dumps([event(NotBefore=at)])


def test_without_a_notice_nothing_changes(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.imds.says(MAINTENANCE, "[]")
    for _ in range(2):
        node.watch.round()
    assert node.answer() == "up"
    assert not node.note.exists()
    assert capsys.readouterr().out == ""
    assert node.imds.asked[:4] == [
        "/latest/api/token",
        *(f"/latest/meta-data/{path}" for path in (SPOT, MAINTENANCE, REBALANCE)),
    ]


def test_a_spot_notice_closes_the_node_and_says_who_did_and_why(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.imds.says(SPOT, spot())
    began = time.time()
    node.watch.round()
    assert node.answer() == "drain"
    note = json.loads(node.note.read_text())
    assert 118 < program.moment(note["goes_at"]) - began <= 121
    assert -1 < program.moment(note["closed_at"]) - began < 5
    assert {**note, "goes_at": "", "closed_at": ""} == {
        "version": 1,
        "closed_by": "gpuyard-notice.service",
        "closed_at": "",
        "rule": "NOTICE-SPOT",
        "why": "AWS will terminate this spot instance",
        "goes_at": "",
    }
    written = node.note.read_bytes()
    node.watch.round()
    assert node.note.read_bytes() == written
    told = capsys.readouterr().out
    assert told.count("NOTICE-SPOT: AWS will terminate") == 2, "as announced, and as the reason; and once each"


def test_a_node_stays_closed_when_the_notice_is_gone_and_over_a_restart(node: Node) -> None:
    node.imds.says(SPOT, spot())
    node.watch.round()
    node.imds.says(SPOT, None)
    program.Watch(node.settings, node.agent).round()
    assert node.answer() == "drain"


@pytest.mark.parametrize(("seconds", "answer"), [(LEAD + 60, "up"), (LEAD - 60, "drain")])
def test_scheduled_maintenance_closes_within_the_lead_alone(node: Node, seconds: float, answer: str) -> None:
    node.imds.says(MAINTENANCE, maintenance(seconds))
    node.watch.round()
    assert node.answer() == answer


def test_a_likelihood_is_told_and_closes_nothing(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.imds.says(REBALANCE, json.dumps({"noticeTime": in_seconds(0)}))
    node.watch.round()
    assert node.answer() == "up"
    assert capsys.readouterr().out.startswith("<4>NOTICE-REBALANCE: ")


def test_a_token_that_is_refused_is_told_once_and_closes_nothing(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.imds.says(SPOT, spot())
    node.imds.says("refused", "")
    node.watch.round()
    node.watch.round()
    assert node.answer() == "up"
    assert capsys.readouterr().out == "<4>NOTICE-UNREAD: a token was refused with 403\n"
    assert set(node.imds.asked) == {"/latest/api/token"}


def test_one_answer_that_is_broken_hides_no_other(node: Node) -> None:
    node.imds.says(SPOT, "{")
    node.imds.says(MAINTENANCE, maintenance(60))
    found = node.seen()
    assert [one.rule for one in found.notices] == ["NOTICE-MAINTENANCE"]
    assert [why.split()[0] for why in found.unread] == [SPOT]


def test_a_service_that_never_ends_its_answer_is_not_waited_for(node: Node) -> None:
    node.imds.says("slow", "")
    began = time.monotonic()
    found = node.seen()
    assert time.monotonic() - began < 2
    assert found.notices == []
    assert "/latest/api/token was not answered" in found.unread[0]


def test_the_end_of_a_block_is_known_where_nobody_answers(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = node.seen(imds=f"http://127.0.0.1:{taken.getsockname()[1]}", block_ends="2026-12-07T11:30:00Z")
    assert [one.rule for one in found.notices] == ["NOTICE-BLOCK"]
    assert "ConnectionRefusedError" in found.unread[0]


def test_an_end_of_a_block_that_is_no_time_hides_no_other_notice(node: Node) -> None:
    node.imds.says(SPOT, spot())
    found = node.seen(block_ends="2026-02-30T11:30:00Z")
    assert [one.rule for one in found.notices] == ["NOTICE-SPOT"]
    assert found.unread == ["the end of the Capacity Block is '2026-02-30T11:30:00Z', which is no time"]


def test_a_node_whose_disk_takes_no_note_closes_all_the_same(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.note.parent.write_text("not a folder")
    node.imds.says(SPOT, spot())
    node.watch.round()
    node.watch.round()
    assert node.answer() == "drain"
    assert capsys.readouterr().out.count("<3>NOTICE-NOTE: ") == 1
    node.note.parent.unlink()
    node.watch.round()
    assert json.loads(node.note.read_text())["rule"] == "NOTICE-SPOT"


def test_it_is_told_when_the_last_request_has_ended_and_when_none_did_in_time(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_now = [2]
    monkeypatch.setattr(program, "running", lambda _: open_now[0])
    closed_at = time.time()
    open_now[0] = 0
    node.watch.closed = (closed_at, closed_at + 110)
    node.watch.round()
    assert capsys.readouterr().out == "", "a gateway may not have heard yet"
    open_now[0] = 2
    closed_at = time.time() - 60
    node.watch.closed = (closed_at, closed_at + 110)
    node.watch.round()
    assert capsys.readouterr().out == ""
    open_now[0] = 0
    node.watch.round()
    node.watch.round()
    assert capsys.readouterr().out == "<5>no request runs any more, 60 s after it was closed\n"
    open_now[0] = 2
    node.watch.closed = (closed_at, closed_at + 50)
    node.watch.round()
    node.watch.round()
    assert capsys.readouterr().out.splitlines() == [
        "<4>NOTICE-BUSY: 2 connections to its engines are open at the end of the time"
    ]


def test_a_note_is_let_go_of_when_it_stands_no_more(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def released(**settings: Any) -> tuple[int, str]:
        rc = program.release(node.settings._replace(**settings))
        return rc, capsys.readouterr().out

    assert released() == (0, "the node has not closed itself\n")
    node.imds.says(SPOT, spot())
    node.watch.round()
    capsys.readouterr()
    rc, said = released()
    assert rc == 1
    assert said.startswith("NOTICE-SPOT: AWS will terminate this spot instance at ")
    assert "replace_node.yml" in said
    node.imds.says(SPOT, None)
    node.imds.says("refused", "")
    rc, said = released()
    assert rc == 1
    assert f"rm {node.note}" in said
    assert node.answer() == "drain"
    node.imds.says("refused", None)
    assert released() == (0, "forgotten: NOTICE-SPOT: AWS will terminate this spot instance\n")
    assert node.answer() == "up", "asked before the next round"


def test_a_note_that_cannot_be_read_closes_too(node: Node) -> None:
    node.note.parent.mkdir()
    node.note.write_text("{")
    assert program.read_note()["rule"] == "NOTICE-NOTE"
    assert node.answer() == "drain"


def test_a_look_says_what_would_be_done_and_when(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    settings = node.settings._replace(port=node.port)

    def look(**more: Any) -> tuple[int, dict[str, Any]]:
        rc = program.look(settings._replace(**more), as_json=True)
        return rc, json.loads(capsys.readouterr().out)

    assert look() == (0, {"version": 1, "answer": "up", "note": None, "notices": [], "unread": []})
    node.imds.says(REBALANCE, json.dumps({"noticeTime": in_seconds(0)}))
    node.imds.says(SPOT, spot())
    rc, told = look(block_ends="2099-12-07T11:30:00Z")
    assert rc == 1
    assert [(one["rule"], one["closes_at"]) for one in told["notices"]] == [
        ("NOTICE-BLOCK", "2099-12-07T10:57:00Z"),
        ("NOTICE-SPOT", "at once"),
        ("NOTICE-REBALANCE", None),
    ]
    assert not node.note.exists(), "a look changes nothing"
    assert program.look(settings, as_json=False) == 1
    assert "; closes at once" in capsys.readouterr().out
    node.imds.says("refused", "")
    rc, told = look(port=9)
    assert (rc, told["answer"], len(told["unread"])) == (2, None, 1)


def test_the_stand_in_gives_nothing_without_its_token(node: Node) -> None:
    node.imds.says(SPOT, spot())
    connection = http.client.HTTPConnection(node.imds.uri.removeprefix("http://"), timeout=5)
    connection.request("GET", f"/latest/meta-data/{SPOT}")
    assert connection.getresponse().status == 401


def test_a_node_that_never_closes_itself_has_nothing_to_forget(tmp_path: Path) -> None:
    """undrain_node.yml asks each node, also one in the lab and one that is somebody's own."""
    role = {"name": "gpuyard.fleet.node_notice", "tasks_from": "release"}
    play = {
        "name": "Forget",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [{"name": "Forget", "ansible.builtin.include_role": role}],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "--inventory=localhost,",
            f"--extra-vars=__node_notice_program={tmp_path}/nothing",
            f"--extra-vars=ansible_python_interpreter={sys.executable}",
            tmp_path / "play.yml",
        ],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout
