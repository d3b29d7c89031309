"""What a node says of itself, as one JSON line. Sent over SSH to the node's own Python (3.9 and later)."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

HAPROXY = "/run/haproxy/admin.sock"


def loaded_driver() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", line)
    return found.group(1) if found else None


def engine_units() -> dict[str, str]:
    """State of each vLLM unit, by model."""
    listed = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "vllm@*.service"]
    lines = subprocess.run(listed, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
    words = [line.split() for line in lines]
    return {word[0][len("vllm@") : -len(".service")]: word[2] for word in words}


def gateway_servers() -> dict[str, str]:
    """What the gateway thinks of each node behind it, the worst where a node serves several models."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(5)
            channel.connect(HAPROXY)
            channel.sendall(b"show stat\n")
            text = b"".join(iter(lambda: channel.recv(65536), b"")).decode()
    except OSError:
        return {}
    servers: dict[str, str] = {}
    for row in csv.DictReader(text.lstrip("# ").splitlines()):
        name, state = row["svname"], row["status"]
        if row["pxname"].startswith("model_") and name != "BACKEND" and servers.get(name, "UP").startswith("UP"):
            servers[name] = state
    return servers


def main() -> None:
    said: dict[str, Any] = {"driver": loaded_driver(), "engines": engine_units(), "servers": gateway_servers()}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
