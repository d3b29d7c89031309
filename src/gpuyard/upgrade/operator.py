"""Who runs a rollout, told so exactly that two are never taken for one, and none for dead who lives."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def own_operator() -> dict[str, Any]:
    """Who runs this playbook. A plugin runs in a child of ansible-playbook, and that is who holds a claim."""
    pid = os.getppid()
    return {
        "name": pwd.getpwuid(os.getuid()).pw_name,
        "host": socket.gethostname(),
        "pid": pid,
        "started": started(pid),
        # Two controllers may have one host name, and two containers one kernel: a pid is one's own in its namespace.
        "machine": MACHINE_ID.read_text().strip() if MACHINE_ID.is_file() else "",
        "pids": str(Path("/proc/self/ns/pid").readlink()),
    }


def started(pid: int) -> str:
    """When a process began, in ticks since the boot: with it a pid that is used again is another one. "" for none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = BOOT_ID.read_text().strip()
    except OSError:
        return ""
    return f"{boot}/{stat.rpartition(')')[2].split()[19]}"


def gone(owner: Mapping[str, Any], own: Mapping[str, Any], now: str) -> bool:
    """Whether an operator is known to be dead by one who is `own`; `now` is what `started` says of its pid here.

    Of one on another machine, or in another container, nothing is known here. Under the same boot the namespace of
    pids says where somebody is; after another boot the machine's id has to, and some containers have none.
    """
    if any(owner.get(name) != own[name] for name in ("host", "machine", "pids")):
        return False
    same_boot = str(owner["started"]).partition("/")[0] == str(own["started"]).partition("/")[0]
    return bool((same_boot or own["machine"]) and now != owner["started"])
