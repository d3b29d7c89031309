#!/usr/bin/python
"""Run engines as systemd units, each on the settings that the node holds."""

from __future__ import annotations

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.engine_inputs import changed

DOCUMENTATION = r"""
module: engine_units
short_description: Run engines as systemd units
description:
  - Enables and starts C(vllm@<instance>.service); restarts those whose files are not the ones they were started from.
  - Returns when every engine has answered; the unit itself waits for that. All of them start side by side.
  - When one does not come up, the end of its journal is in the message.
options:
  instances:
    description: Names of the engines that this node runs.
    type: list
    elements: str
    required: true
  timeout:
    description: Seconds after which a start is given up.
    type: int
    required: true
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what would be started or restarted.}
"""

EXAMPLES = r"""
- name: Run the engines
  gpuyard.fleet.engine_units:
    instances: [smollm2-135m-instruct]
    timeout: 960
"""

RETURN = r"""
started:
  description: Engines that did not run and were started.
  returned: success
  type: list
  elements: str
restarted:
  description: Engines that were restarted, each with the files that had changed.
  returned: success
  type: dict
seconds:
  description: How long it took until all of them answered.
  returned: success
  type: float
"""


class Systemd:
    """The few words spoken to systemd."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module

    def show(self, unit: str) -> dict[str, str]:
        names = "LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload"
        _, out, _ = self.module.run_command(["systemctl", "show", unit, "--property", names], check_rc=True)
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def do(self, *words: str) -> None:
        self.module.run_command(["systemctl", *words], check_rc=True)

    def run(self, verb: str, units: list[str], timeout: int) -> str:
        """Start or restart; returns what systemctl said when one of them failed."""
        code, out, err = self.module.run_command(["timeout", str(timeout), "systemctl", verb, *units])
        return "" if code == 0 else (f"no answer within {timeout} s" if code == 124 else (err or out).strip())

    def journal(self, unit: str, since: float) -> str:
        _, out, _ = self.module.run_command(
            ["journalctl", "--no-pager", "--output=cat", f"--unit={unit}", f"--since=@{int(since)}", "--lines=30"]
        )
        return out.strip()


def plan(instances: list[str], states: dict[str, dict[str, str]], differing: dict[str, list[str]]) -> tuple[list, dict]:
    """Who has to be started, and who restarted and why."""
    start, restart = [], {}
    for name in instances:
        state = states[name]
        if state["ActiveState"] not in ("active", "activating", "reloading") or state["SubState"] == "auto-restart":
            start.append(name)
        elif state["NeedDaemonReload"] == "yes" or differing[name]:
            restart[name] = differing[name] or ["the unit, as systemd has read it"]
        elif state["ActiveState"] == "activating":
            start.append(name)  # on its way since an earlier run: wait with it
    return start, restart


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "str", "required": True},
            "timeout": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    systemd = Systemd(module)
    instances = module.params["instances"]
    units = {name: f"vllm@{name}.service" for name in instances}
    states = {name: systemd.show(unit) for name, unit in units.items()}
    differing = {name: changed(name) for name in instances}
    start, restart = plan(instances, states, differing)
    enable = [name for name in instances if states[name]["UnitFileState"] != "enabled"]
    result = {
        "changed": bool(start or restart or enable),
        "started": start,
        "restarted": restart,
        "seconds": 0.0,
    }
    if module.check_mode:
        module.exit_json(**result)

    # Only when needed: a reload rewrites the device rules of every running unit.
    if any(state["NeedDaemonReload"] == "yes" or state["LoadState"] == "not-found" for state in states.values()):
        systemd.do("daemon-reload")
    if enable:
        systemd.do("enable", *[units[name] for name in enable])
    failed = [name for name in start if states[name]["ActiveState"] == "failed"]
    if failed:
        # Converging is a wish to try again, also where the unit has used up its own tries.
        systemd.do("reset-failed", *[units[name] for name in failed])
    began = time.time()
    for verb, names in (("restart", list(restart)), ("start", start)):
        if not names:
            continue
        said = systemd.run(verb, [units[name] for name in names], module.params["timeout"])
        down = [name for name in names if said and systemd.show(units[name])["ActiveState"] != "active"]
        if down:
            ends = "\n".join(f"--- {units[name]}\n{systemd.journal(units[name], began)}" for name in down)
            module.fail_json(
                msg=f"SERVE-START: {', '.join(units[name] for name in down)} did not come up: {said}\n{ends}",
                units=[units[name] for name in down],
            )
    result["seconds"] = round(time.time() - began, 1)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
