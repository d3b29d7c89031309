#!/usr/bin/python3
"""Close this node at the gateways before its provider takes it away.

    node_notice.py watch            ask the metadata service again and again, and answer the gateways' agent checks
    node_notice.py look [--json]    ask once and tell; 1 where something is announced, 2 where not all could be read
    node_notice.py release          forget why the node was closed; 1 where that still stands or could not be read

HAProxy asks each node of such a fleet whether it goes on. `up` changes nothing there; `drain` does what an operator's
drain does, and nothing here ever takes it back. So a node closes itself, and somebody else opens it. What cannot be
read is no notice. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import http.client
import json
import os
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Optional

VERSION = 1
SETTINGS = Path("/etc/gpuyard/notice.json")
NOTE = Path("/var/lib/gpuyard/notice.json")
SPOT, MAINTENANCE, REBALANCE = (
    "spot/instance-action",
    "events/maintenance/scheduled",
    "events/recommendations/rebalance",
)
# From this long before its end on, EC2 terminates what runs in a Capacity Block (EC2 User Guide, "Capacity Blocks").
BLOCK_TAIL_SECONDS = 1800
# What is left of the time when the last stream should have ended.
MARGIN_SECONDS = 10
# A gateway asks every two seconds; before that a node that has closed may get another request.
HEARD_SECONDS = 5
MOST_BYTES = 65536


class Settings(NamedTuple):
    imds: str
    """Address of the metadata service."""
    port: int
    """Where the gateways ask."""
    lead: float
    """Seconds that requests get to end before something that is known ahead."""
    every: float
    """Seconds between two looks."""
    patience: float
    """Seconds that one look may take."""
    block_ends: str
    """End of the Capacity Block that this node runs in; empty without one."""
    engine_ports: list[int]


class Unread(Exception):  # noqa: N818 - told, not raised to anybody
    """The metadata service did not say what it was asked; the text is why."""


class Notice(NamedTuple):
    rule: str
    what: str
    at: Optional[float]
    """When the node goes, in seconds since 1970; None: there is no telling."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}" + ("" if self.at is None else f" at {shown(self.at)}")


class Seen(NamedTuple):
    notices: list[Notice]
    unread: list[str]


def closes_at(notice: Notice, lead: float) -> Optional[float]:
    """When a node closes for a notice: at once for what comes in two minutes, `lead` before what is known ahead, never
    for a mere likelihood."""
    if notice.rule == "NOTICE-SPOT":
        return 0.0
    return None if notice.at is None else notice.at - lead


def decide(notices: Iterable[Notice], now: float, lead: float) -> Optional[Notice]:
    """The notice that the node is to be closed for now: of several the one that takes it away first."""
    times = [(closes_at(notice, lead), notice) for notice in notices]
    due = [notice for at, notice in times if at is not None and at <= now]
    return min(due, key=lambda notice: notice.at or 0.0, default=None)


def notices_of(path: str, text: str) -> list[Notice]:
    """What an answer of the metadata service announces. Raises Unread where it is none of the documented ones."""
    try:
        told = json.loads(text)
        if path == SPOT:
            return [Notice("NOTICE-SPOT", f"AWS will {told['action']} this spot instance", moment(told["time"]))]
        if path == REBALANCE:
            moment(told["noticeTime"])
            return [Notice("NOTICE-REBALANCE", "AWS says that this spot instance is likely to be interrupted", None)]
        return [
            Notice(
                "NOTICE-MAINTENANCE",
                f"AWS has scheduled {event['Code']} ({event['EventId']})",
                moment(event["NotBefore"]),
            )
            for event in told
            if event["State"] == "active"
        ]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Unread(f"{path} says {text[:200]!r}, which is no notice ({type(error).__name__})") from error


def block_notice(ends: str) -> list[Notice]:
    if not ends:
        return []
    return [Notice("NOTICE-BLOCK", f"its Capacity Block ends at {ends}", moment(ends) - BLOCK_TAIL_SECONDS)]


def moment(text: str) -> float:
    """`2026-12-07T11:30:00Z`, or `21 Jan 2026 09:00:43 GMT` as maintenance is told, in seconds since 1970."""
    if text.endswith("Z"):
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
    words = email.utils.parsedate_tz(text)
    if words is None:
        raise ValueError(text)
    return float(email.utils.mktime_tz(words))


def shown(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def asked(method: str, imds: str, path: str, headers: dict[str, str], until: float) -> tuple[int, str]:
    """One request, over at `until` on the monotonic clock, however slowly the other side speaks."""
    address = urllib.parse.urlsplit(imds)
    left = until - time.monotonic()
    if left <= 0:
        raise Unread(f"{path} was not asked for, the time was up")
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=left)
    # It finds a connection to break off, or one that is still being made, which the socket's own timeout ends.
    cut = threading.Timer(left, broken_off, [connection])
    cut.daemon = True
    cut.start()
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read(MOST_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unread(f"{path} was not answered: {type(error).__name__} {error}".rstrip()) from error
    finally:
        cut.cancel()
        connection.close()
    if time.monotonic() >= until:
        raise Unread(f"{path} was not answered within the time")
    return answer.status, body


def broken_off(connection: http.client.HTTPConnection) -> None:
    # A timeout of the socket is one for each piece of an answer, and there may be any number of pieces.
    with contextlib.suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)


def seen(settings: Settings) -> Seen:
    """What is announced now. The end of a block is known without anybody's answer."""
    notices: list[Notice] = []
    unread: list[str] = []
    until = time.monotonic() + settings.patience
    try:
        notices += block_notice(settings.block_ends)
    except ValueError:
        # What else is announced is heard all the same.
        unread.append(f"the end of the Capacity Block is {settings.block_ends!r}, which is no time")
    try:
        lasts = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        status, token = asked("PUT", settings.imds, "/latest/api/token", lasts, until)
        if status != http.client.OK:
            raise Unread(f"a token was refused with {status}")
    except Unread as error:
        return Seen(notices, [*unread, str(error)])
    for path in (SPOT, MAINTENANCE, REBALANCE):
        try:
            named = {"X-aws-ec2-metadata-token": token.strip()}
            status, text = asked("GET", settings.imds, f"/latest/meta-data/{path}", named, until)
            if status == http.client.NOT_FOUND:
                continue
            if status != http.client.OK:
                raise Unread(f"{path} was answered with {status}")
            notices += notices_of(path, text)
        except Unread as error:
            unread.append(str(error))
    return Seen(notices, unread)


def read_note() -> Optional[dict[str, Any]]:
    """Why the node is closed. A note that cannot be read is one all the same."""
    try:
        text = NOTE.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"rule": "NOTICE-NOTE", "why": f"{NOTE} cannot be read: {error.strerror}"}
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {"rule": "NOTICE-NOTE", "why": f"{NOTE} is no note"}


def write_note(notice: Notice, now: float) -> None:
    """Written whole or not at all, and on the disk before a gateway hears of it."""
    note = {
        "version": VERSION,
        "closed_by": "gpuyard-notice.service",
        "closed_at": shown(now),
        "rule": notice.rule,
        "why": notice.what,
        "goes_at": None if notice.at is None else shown(notice.at),
    }
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    half = NOTE.with_name(NOTE.name + ".new")
    with half.open("w", encoding="utf-8") as file:
        file.write(json.dumps(note, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    half.replace(NOTE)
    folder = os.open(NOTE.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def connections(ports: Iterable[int], tables: Iterable[str]) -> int:
    """Connections that the engines' ports have, out of /proc/net/tcp and tcp6."""
    wanted, established = {f"{port:04X}" for port in ports}, "01"
    rows = (line.split() for table in tables for line in table.splitlines()[1:])
    return sum(row[1].rsplit(":", 1)[1] in wanted and row[3] == established for row in rows)


def running(ports: Iterable[int]) -> int:
    tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    return connections(ports, tables)


class Agent(socketserver.TCPServer):
    """Tells whoever connects whether this node goes on, and reads nothing."""

    allow_reuse_address = True
    request_queue_size = 64
    closing = False
    """Set where the note could not be written."""

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as the library calls it
        # Looked at for each one: what was released must not close the node again.
        request.sendall(b"drain\n" if self.closing or NOTE.exists() else b"up\n")


def answer_of(port: int) -> Optional[str]:
    """What the service on this node tells the gateways; None where nothing answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            return connection.recv(64).decode(errors="replace").strip() or None
    except OSError:
        return None


def told_to_systemd(word: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto(word.encode(), f"\0{path[1:]}" if path.startswith("@") else path)


class Watch:
    """One round after the other; says what has changed since the one before."""

    def __init__(self, settings: Settings, agent: Agent) -> None:
        self.settings = settings
        self.agent = agent
        self.said: list[str] = []
        self.closed: Optional[tuple[float, Optional[float]]] = None
        """Since when, and until when its requests may run; None once that was told, and after a restart."""

    def round(self) -> None:
        found = seen(self.settings)
        now = time.time()
        lines = [f"<4>{notice}" for notice in found.notices] + [f"<4>NOTICE-UNREAD: {why}" for why in found.unread]
        for line in lines:
            if line not in self.said:
                print(line, flush=True)
        self.said = lines
        notice = decide(found.notices, now, self.settings.lead)
        if notice and not NOTE.exists():
            self.close(notice, now)
        elif not notice:
            self.agent.closing = False
        if self.closed:
            self.told_of_requests(*self.closed, now=now)

    def close(self, notice: Notice, now: float) -> None:
        first = not self.agent.closing
        try:
            write_note(notice, now)
        except OSError as error:
            # Its time runs out all the same.
            if first:
                print(f"<3>NOTICE-NOTE: {NOTE} could not be written: {error}", flush=True)
        self.agent.closing = not NOTE.exists()
        if first:
            self.closed = (now, None if notice.at is None else notice.at - MARGIN_SECONDS)
            print(f"<4>closed at the gateways for {notice}", flush=True)

    def told_of_requests(self, since: float, until: Optional[float], now: float) -> None:
        left = running(self.settings.engine_ports)
        if now - since >= HEARD_SECONDS and left == 0:
            print(f"<5>no request runs any more, {now - since:.0f} s after it was closed", flush=True)
        elif until is not None and now >= until:
            print(f"<4>NOTICE-BUSY: {left} connections to its engines are open at the end of the time", flush=True)
        else:
            return
        self.closed = None


def watch(settings: Settings) -> int:
    with Agent(("", settings.port), socketserver.BaseRequestHandler) as agent:
        answers = threading.Thread(target=agent.serve_forever, daemon=True)
        answers.start()
        told_to_systemd("READY=1")
        rounds = Watch(settings, agent)
        while answers.is_alive():
            began = time.monotonic()
            rounds.round()
            told_to_systemd("WATCHDOG=1")
            time.sleep(max(0.0, settings.every - (time.monotonic() - began)))
    return 1


def look(settings: Settings, as_json: bool) -> int:
    found = seen(settings)
    closes = {notice: closes_at(notice, settings.lead) for notice in found.notices}
    told: dict[str, Any] = {
        "version": VERSION,
        "answer": answer_of(settings.port),
        "note": read_note(),
        "notices": [
            {
                "rule": notice.rule,
                "what": notice.what,
                "goes_at": None if notice.at is None else shown(notice.at),
                "closes_at": None if at is None else "at once" if at == 0 else shown(at),
            }
            for notice, at in closes.items()
        ],
        "unread": found.unread,
    }
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        for notice, at in closes.items():
            then = (
                "it is not closed for it" if at is None else "closes " + ("at once" if at == 0 else f"at {shown(at)}")
            )
            print(f"{notice}; {then}")
        for why in found.unread:
            print(f"NOTICE-UNREAD: {why}")
        if told["note"]:
            print(f"closed: {told['note'].get('rule')}: {told['note'].get('why')}")
    return 2 if found.unread else 1 if found.notices else 0


def release(settings: Settings) -> int:
    note = read_note()
    if note is None:
        print("the node has not closed itself")
        return 0
    found = seen(settings)
    stands = decide(found.notices, time.time(), settings.lead)
    if stands:
        print(
            f"{stands}, so the gateways would close it again. Exchange the machine with "
            "playbooks/operate/replace_node.yml, or wait until AWS announces it no more"
        )
        return 1
    if found.unread:
        print(
            f"whether {note.get('rule')} still stands is not known: {'; '.join(found.unread)}. Let the metadata "
            f"service answer; to open the node all the same: rm {NOTE}"
        )
        return 1
    NOTE.unlink()
    print(f"forgotten: {note.get('rule')}: {note.get('why')}")
    return 0


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("watch")
    verbs.add_parser("look").add_argument("--json", action="store_true")
    verbs.add_parser("release")
    given = parser.parse_args(words)
    settings = Settings(**json.loads(SETTINGS.read_text(encoding="utf-8")))
    if given.verb == "watch":
        return watch(settings)
    return look(settings, given.json) if given.verb == "look" else release(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
