#!/usr/bin/python3
"""Keep what an operator set at run time, and tell how the servers stand.

    gateway_state.py save      write the state file that HAProxy reads when it starts or reloads
    gateway_state.py servers   print the servers of all backends as JSON; with --wait-for, once --server is idle or up,
                               or --seconds are over
    gateway_state.py set       bring --server in all --backends --to drain or ready, and save; prints whether it
                               changed. A drain that would leave a model nobody, or too few --seats, is refused

After a reload the process from before it goes on until its streams have ended. It takes no command any more, so what
runs there is counted with the rest; processes are reached through HAProxy's master.

HAProxy forgets a drained server on reload unless its state was saved before. It also believes the saved address and
port of a server more than its configuration; so what is saved takes both from the configuration on the disk.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

MASTER = "/run/haproxy/master.sock"
CONFIG = Path("/etc/haproxy/haproxy.cfg")
STATE = Path("/var/lib/haproxy/server-state")
# The frontend of the users.
FRONTEND = "api"
# Bits of srv_admin_state that an operator sets at run time: maintenance, drain.
MAINTENANCE, DRAINED = 1, 8


class Stuck(Exception):  # noqa: N818 - told as a refusal, not as an error of the program
    """HAProxy does not do what it is asked; the text is the refusal."""


def ask(command: str, path: str, seconds: float = 10) -> str:
    """One command to a socket of HAProxy. In the moment of a reload its master takes no connection."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(seconds)
                connection.connect(path)
                connection.sendall(f"{command}\n".encode())
                # The master goes on listening until it is told that nothing more comes.
                connection.shutdown(socket.SHUT_WR)
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts).decode()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Stuck(
                    f"GATE-HAPROXY: {path} takes no command: {error}; see `systemctl status haproxy`"
                ) from error
            time.sleep(0.1)


def processes(told: str) -> list[str]:
    """The ids of the worker processes in `show proc`: the present one first, then those that a reload has left."""
    return [words[0] for words in map(str.split, told.splitlines()) if len(words) > 1 and words[1] == "worker"]


def workers(path: str) -> list[str]:
    """Who works now, as the master says; there may be none for a moment."""
    deadline = time.monotonic() + 10
    while not (found := processes(ask("show proc", path))):
        if time.monotonic() >= deadline:
            raise Stuck(f"GATE-HAPROXY: {path} knows of no process that works; see `systemctl status haproxy`")
        time.sleep(0.1)
    return found


def state_of(process: str, path: str) -> str:
    """`show servers state` of a process; nothing when it has just gone."""
    told = ask(f"@!{process} show servers state", path)
    return told if told.startswith("1") else ""


def present_state(path: str) -> str:
    """`show servers state` of the process that works now, whichever that is when it answers."""
    while not (told := state_of(workers(path)[0], path)):
        time.sleep(0.1)
    return told


def configured(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(backend, server) → (address, port) of a configuration."""
    found = {}
    section = ""
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if not line[0].isspace():
            section = words[1] if words[0] == "backend" and len(words) > 1 else ""
        elif section and words[0] == "server" and len(words) > 2:
            address, _, port = words[2].rpartition(":")
            found[section, words[1]] = (address, port)
    return found


def merged(state: str, servers: dict[tuple[str, str], tuple[str, str]]) -> str:
    """The state to save: of servers that are still configured, at the address they are configured with."""
    version, header, *lines = state.strip().splitlines()
    columns = header.lstrip("# ").split()
    kept = [version, header]
    for line in lines:
        values = line.split()
        row = dict(zip(columns, values))  # noqa: B905 - Python 3.9 knows no strict
        place = servers.get((row["be_name"], row["srv_name"]))
        if place is None:
            continue
        values[columns.index("srv_addr")], values[columns.index("srv_port")] = place
        kept.append(" ".join(values))
    return "\n".join(kept) + "\n"


def servers(present: str, left: list[str], gateway: str) -> list[dict[str, object]]:
    """The servers as the present process has them in `show stat`, with the requests that run on them in any process.

    A process that a reload has left behind knows nothing of what was set after it: what it has taken and not yet given
    to a server may go to any, and counts for each.
    """
    rows, *others = [list(csv.DictReader(stat.lstrip("# ").splitlines())) for stat in (present, *left)]
    told = []
    for row in rows:
        if row["svname"] in ("FRONTEND", "BACKEND"):
            continue
        place = (row["pxname"], row["svname"])
        running = sum(on_server(table, place) + undecided(table) for table in others)
        told.append(
            {
                "place": f"{gateway}/{row['pxname']}",
                "backend": row["pxname"],
                "server": row["svname"],
                "status": row["status"],
                "sessions": int(row["scur"] or 0) + running,
            }
        )
    return told


def on_server(table: list[dict[str, str]], place: tuple[str, str]) -> int:
    return sum(int(row["scur"] or 0) for row in table if (row["pxname"], row["svname"]) == place)


def undecided(table: list[dict[str, str]]) -> int:
    """Connections of users of which no server has a request."""
    taken = on_server(table, (FRONTEND, "FRONTEND"))
    given = sum(int(row["scur"] or 0) for row in table if row["svname"] not in ("FRONTEND", "BACKEND"))
    return max(taken - given, 0)


def awaited(rows: list[dict[str, object]], server: str, state: str) -> bool:
    """Whether a server has come to the state that is waited for, in every backend that has it."""
    mine = [row for row in rows if row["server"] == server]
    if state == "idle":
        return all(row["sessions"] == 0 for row in mine)
    return all(str(row["status"]).startswith("UP") for row in mine)


def look(options: argparse.Namespace) -> list[dict[str, object]]:
    """The servers now, or as they stand when the wait is over."""
    deadline = time.monotonic() + options.seconds
    seen = 0
    while True:
        rows = servers(*statistics(options.socket), socket.gethostname())
        seen = seen + 1 if options.wait_for and awaited(rows, options.server, options.wait_for) else 0
        # Twice: a request that a process has just given to a server is counted a moment later.
        if options.wait_for is None or seen == 2 or time.monotonic() >= deadline:
            # Of the answer alone: what is waited for does not ask for it.
            closed = closed_servers(options.socket)
            return [{**row, "closed": (row["backend"], row["server"]) in closed} for row in rows]
        time.sleep(0.5)


def closed_servers(path: str) -> set[tuple[str, str]]:
    """(backend, server) of those that an operator has closed. Their status alone does not say so: closed and not
    running, a server is DOWN."""
    return {place for place, bits in admin_states(present_state(path)).items() if bits}


def statistics(path: str) -> tuple[str, list[str]]:
    """`show stat` of the present process, and of those that a reload has left."""
    while True:
        told = [ask(f"@!{process} show stat", path) for process in workers(path)]
        if told[0].startswith("# pxname"):
            # One that has ended meanwhile has nothing more to tell.
            return told[0], [stat for stat in told[1:] if stat.startswith("# pxname")]
        time.sleep(0.1)


def save(options: argparse.Namespace) -> None:
    """Write the state file, whole or not at all. Called by the holder of the lock."""
    text = merged(present_state(options.socket), configured(options.config.read_text(encoding="utf-8")))
    draft = options.state.with_name(options.state.name + ".new")
    # The folder is HAProxy's, and root writes to it: what lies there under this name is taken away, never written to.
    draft.unlink(missing_ok=True)
    with draft.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    draft.replace(options.state)


@contextmanager
def locked(state: Path, seconds: float = 30):
    """One at a time asks for the state and writes it down, or an older one could be written last."""
    path = state.with_name(state.name + ".lock")
    # Read only is enough for a lock, and the file may be another user's.
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Stuck(
                        f"GATE-LOCK: {path} is held for {seconds:.0f} s; `fuser -v {path}` says by whom"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def admin_states(told: str) -> dict[tuple[str, str], int]:
    """(backend, server) → what an operator has set, out of `show servers state`."""
    _, header, *lines = told.strip().splitlines()
    columns = header.lstrip("# ").split()
    rows = [dict(zip(columns, line.split())) for line in lines]  # noqa: B905 - Python 3.9 knows no strict
    return {(row["be_name"], row["srv_name"]): int(row["srv_admin_state"]) & (MAINTENANCE | DRAINED) for row in rows}


def refuse_to_drain(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Raises Stuck where those that stay could not do the work. Asked under the lock, so that two who drain two nodes
    at the same moment do not both find the other one up."""
    for name in options.backends:
        mine = [row for row in rows if row["backend"] == name]
        up = {row["server"] for row in mine if str(row["status"]).startswith("UP")}
        left = len(up - {options.server})
        requests = sum(int(str(row["sessions"])) for row in mine) + options.elsewhere.get(name, 0)
        if options.server not in up:
            continue
        if not left:
            raise Stuck(
                f"GATE-LAST: {options.server} is the last ready server of {name}; without it the model's users get "
                "errors. Bring another node up first, or consent with -e node_gate_allow_outage=true"
            )
        if requests > left * options.seats.get(name, requests):
            raise Stuck(
                f"GATE-CAPACITY: {requests} requests for {name} run or wait now; without {options.server} there are "
                f"{left} servers with {options.seats[name]} seats each, {left * options.seats[name]} together. Wait "
                "for less load, bring another node up, or consent with -e node_gate_allow_outage=true"
            )


def numbers(text: str) -> dict[str, int]:
    """`model_a=64,model_b=8`: a number of requests for each backend."""
    return {name: int(number) for name, _, number in (one.partition("=") for one in text.split(",") if one)}


def bring(options: argparse.Namespace) -> bool:
    """Bring a server to a state in the present process and in what the next one reads; whether that was a change."""
    deadline = time.monotonic() + 30
    changed = False
    wanted = DRAINED if options.to == "drain" else 0
    while time.monotonic() < deadline:
        present = workers(options.socket)[0]
        if told := state_of(present, options.socket):
            before = admin_states(told)
            if strange := [name for name in options.backends if (name, options.server) not in before]:
                where = ", ".join(strange)
                raise Stuck(f"GATE-UNKNOWN: {where} has no server {options.server}; converge the gateway first")
            if options.to == "drain" and not options.allow_outage and not changed:
                refuse_to_drain(servers(*statistics(options.socket), socket.gethostname()), options)
            changed = changed or any(before[name, options.server] != wanted for name in options.backends)
            for name in options.backends:
                ask(f"@!{present} set server {name}/{options.server} state {options.to}", options.socket)
            save(options)
            # The process of a reload that was on its way has read the state of before, and is the present one now.
            found = workers(options.socket)[0]
            after = admin_states(state_of(found, options.socket) or told)
            if found == present and all(after[name, options.server] == wanted for name in options.backends):
                return changed
        time.sleep(0.1)
    raise Stuck(f"GATE-RELOADS: {options.server} could not be set within 30 s of reloads; run this again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["save", "servers", "set"])
    parser.add_argument("--socket", default=MASTER)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--wait-for", choices=["idle", "up"])
    parser.add_argument("--server")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--backends", type=lambda names: names.split(","), default=[])
    parser.add_argument("--to", choices=["drain", "ready"])
    parser.add_argument("--seats", type=numbers, default={}, help="what each server works on at a time")
    parser.add_argument(
        "--elsewhere", type=numbers, default={}, help="what the other gateways send to the same servers"
    )
    parser.add_argument("--allow-outage", action="store_true")
    options = parser.parse_args()
    try:
        if options.verb == "servers":
            print(json.dumps(look(options)))
            return 0
        with locked(options.state):
            if options.verb == "set":
                print(json.dumps({"changed": bring(options)}))
            else:
                save(options)
    except Stuck as stuck:
        print(stuck, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
