#!/usr/bin/python3
"""Keep what an operator set at run time, and tell how the servers stand.

    gateway_state.py save      write the state file that HAProxy reads when it starts or reloads
    gateway_state.py servers   print the servers of all backends as JSON; with --wait-for, once --server is idle or up,
                               or --seconds are over

HAProxy forgets a drained server on reload unless its state was saved before. It also believes the saved address and
port of a server more than its configuration; so what is saved takes both from the configuration on the disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import sys
import time
from pathlib import Path

SOCKET = "/run/haproxy/admin.sock"
CONFIG = Path("/etc/haproxy/haproxy.cfg")
STATE = Path("/var/lib/haproxy/server-state")


def ask(command: str, path: str) -> str:
    """One command to HAProxy's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(f"{command}\n".encode())
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


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


def servers(stat: str, gateway: str) -> list[dict[str, object]]:
    """The servers of `show stat`: where each stands, its status, and the requests that run on it."""
    return [
        {
            "place": f"{gateway}/{row['pxname']}",
            "backend": row["pxname"],
            "server": row["svname"],
            "status": row["status"],
            "sessions": int(row["scur"] or 0),
        }
        for row in csv.DictReader(stat.lstrip("# ").splitlines())
        if row["svname"] not in ("FRONTEND", "BACKEND")
    ]


def awaited(rows: list[dict[str, object]], server: str, state: str) -> bool:
    """Whether a server has come to the state that is waited for, in every backend that has it."""
    mine = [row for row in rows if row["server"] == server]
    if state == "idle":
        return all(row["sessions"] == 0 for row in mine)
    return all(str(row["status"]).startswith("UP") for row in mine)


def look(options: argparse.Namespace) -> list[dict[str, object]]:
    """The servers now, or as they stand when the wait is over."""
    deadline = time.monotonic() + options.seconds
    while True:
        rows = servers(ask("show stat", options.socket), socket.gethostname())
        if options.wait_for is None or awaited(rows, options.server, options.wait_for) or time.monotonic() >= deadline:
            return rows
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["save", "servers"])
    parser.add_argument("--socket", default=SOCKET)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--wait-for", choices=["idle", "up"])
    parser.add_argument("--server")
    parser.add_argument("--seconds", type=float, default=0)
    options = parser.parse_args()
    if options.verb == "servers":
        print(json.dumps(look(options)))
        return 0
    text = merged(ask("show servers state", options.socket), configured(options.config.read_text(encoding="utf-8")))
    draft = options.state.with_name(options.state.name + ".new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.chmod(0o644)
    draft.replace(options.state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
