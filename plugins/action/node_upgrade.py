"""Moves the note on the node, and writes each move into the record of the run, with what proved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from gpuyard.upgrade.operator import own_operator
from gpuyard.upgrade.record import append


class ActionModule(ActionBase):
    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        words = dict(self._task.args)
        record = words.pop("record", "")
        proof = words.pop("proof", None)
        words["operator"] = own_operator()
        result = self._execute_module("gpuyard.fleet.node_upgrade", module_args=words, task_vars=task_vars)
        note = result.get("note")
        if record and result.get("changed") and not self._task.check_mode:
            told = {name: note[name] for name in ("node", "state", "attempts", "reason")}
            versions = {name: note[name]["version"] for name in ("previous", "target")}
            append(Path(record), {"event": "state", **told, **versions, **({"proof": proof} if proof else {})})
        return result
