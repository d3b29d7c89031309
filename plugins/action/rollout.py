"""Says who asks for the claim on a fleet, and writes down in the record of the run what became of it."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from gpuyard.upgrade.operator import gone, own_operator, started
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
            words["gone"] = [found] if found and gone(found, operator, started(found["pid"])) else []
        result = self.ask({**words, "operator": operator}, task_vars)
        if records and not result.get("failed") and result.get("claim"):
            file = Path(records) / result["claim"]["run"] / "record.jsonl"
            result["record"] = str(file)
            ends = words["state"] == "released" and result["claim"]["result"]
            if not self._task.check_mode and (words["state"] == "claimed" or ends):
                append(file, {"event": words["state"], **seen(result["claim"]), **event})
        return result

    def ask(self, words: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        return self._execute_module("gpuyard.fleet.rollout", module_args=words, task_vars=task_vars)


def seen(claim: dict[str, Any]) -> dict[str, Any]:
    return {name: claim[name] for name in ("run", "fleet", "kind", "target", "operator", "result")}


def new_run(kind: str) -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{kind}-{secrets.token_hex(2)}"
