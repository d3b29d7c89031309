"""Says who asks for the claim on a fleet, and writes down in the record of the run what became of it."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from gpuyard.upgrade.record import append


class ActionModule(ActionBase):
    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        words = dict(self._task.args)
        event = words.pop("event", None) or {}
        records = words.pop("records", None)
        operator = own_operator()
        if words["state"] == "claimed":
            words.setdefault("run", new_run(str(words.get("kind", "driver"))))
            told = self.ask({"state": "read"}, task_vars)
            if told.get("failed"):
                return told
            found = (told.get("claim") or {}).get("operator")
            words["gone"] = [found] if found and gone(found) else []
        result = self.ask({**words, "operator": operator}, task_vars)
        if records and not result.get("failed") and result.get("claim"):
            file = Path(records) / result["claim"]["run"] / "record.jsonl"
            result["record"] = str(file)
            if not self._task.check_mode and words["state"] in ("claimed", "released"):
                append(file, {"event": words["state"], **seen(result["claim"]), **event})
        return result

    def ask(self, words: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        return self._execute_module("gpuyard.fleet.rollout", module_args=words, task_vars=task_vars)


def seen(claim: dict[str, Any]) -> dict[str, Any]:
    return {name: claim[name] for name in ("run", "fleet", "kind", "target", "operator", "result")}


def own_operator() -> dict[str, Any]:
    """Who runs this playbook. A plugin runs in a child of ansible-playbook, and that is who holds a claim."""
    pid = os.getppid()
    user = pwd.getpwuid(os.getuid()).pw_name
    return {"name": user, "host": socket.gethostname(), "pid": pid, "started": started(pid)}


def started(pid: int) -> str:
    """When a process began, in ticks since the boot: with it a pid that is used again is another one. "" for none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot}/{stat.rpartition(')')[2].split()[19]}"


def gone(operator: dict[str, Any]) -> bool:
    """Whether an operator is known to be dead. Of one on another machine nothing is known here."""
    return operator["host"] == socket.gethostname() and started(operator["pid"]) != operator["started"]


def new_run(kind: str) -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{kind}-{secrets.token_hex(2)}"
