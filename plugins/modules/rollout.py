#!/usr/bin/python
"""The claim on a fleet: taken, held, paused, given back, read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import NoteError, alone, read, write
from ansible_collections.gpuyard.fleet.plugins.module_utils.rollout import (
    CLAIM,
    VERSION,
    Clock,
    claimed,
    heard,
    held,
    paused,
    released,
)

DOCUMENTATION = r"""
module: rollout
short_description: Keep two operators from changing a fleet at once
description:
  - Holds on the first gateway who changes the fleet, so that exactly one does, from whatever machine.
  - Runs on the gateway; an action plugin of the same name says who asks, and writes the record of the run.
options:
  state:
    description:
      - C(claimed) takes the claim, or goes on with one whose owner is gone; C(heard) says that its owner lives;
        C(held) that it begins a node, and is refused when it is to stop; C(paused) has it stop before its next node;
        C(released) says that a node has come to its end, or without one gives the claim back; C(read) reads.
    type: str
    choices: [claimed, heard, held, paused, released, read]
    required: true
  fleet:
    description: Name of the fleet.
    type: str
  kind:
    description: What is changed.
    type: str
    choices: [driver, engine, kernel]
    default: driver
  target:
    description: The version to come to.
    type: str
  run:
    description: Id of the run; of C(claimed) the one to begin.
    type: str
    default: ""
  node:
    description: The node that C(held) begins, or that C(released) ends.
    type: str
    default: ""
  take_over:
    description: Consent to take the claim from one whose owner may still be there.
    type: bool
    default: false
  resume:
    description: Let a paused run go on.
    type: bool
    default: false
  result:
    description: How it ended, where it is given back.
    type: str
    default: done
  records:
    description: Folder of the records, on the machine that runs the play. Without it nothing is recorded.
    type: path
  event:
    description: What else to write into the record.
    type: dict
    default: {}
  operator:
    description: Who asks; filled in by the action plugin.
    type: dict
  gone:
    description: Operators that the asking machine knows to be dead; filled in by the action plugin.
    type: list
    elements: dict
    default: []
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what the claim would be.}
  diff_mode: {support: none, description: The claim is no configuration.}
"""

EXAMPLES = r"""
- name: See that this run still holds the fleet
  gpuyard.fleet.rollout: {state: held, run: "{{ upgrade_run.id }}"}
  delegate_to: "{{ node_gate_gateways | first }}"
"""

RETURN = r"""
claim:
  description: The claim as it is, or would be; none where nobody ever changed the fleet.
  returned: success
  type: dict
new:
  description: Whether the claim is of a run that began now, and not of one that goes on.
  returned: success
  type: bool
record:
  description: File of the run's record, where one is kept.
  returned: when records are kept
  type: str
"""

BOOT = Path("/proc/sys/kernel/random/boot_id")


def found(path: Path) -> Optional[dict[str, Any]]:
    """The claim. An older gpuyard did not say which nodes are under way."""
    claim = read(path, VERSION)
    return None if claim is None else {"halting": False, "nodes": [], **claim}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["claimed", "heard", "held", "paused", "released", "read"],
                "required": True,
            },
            "fleet": {"type": "str"},
            "kind": {"type": "str", "choices": ["driver", "engine", "kernel"], "default": "driver"},
            "target": {"type": "str"},
            "run": {"type": "str", "default": ""},
            "node": {"type": "str", "default": ""},
            "take_over": {"type": "bool", "default": False},
            "resume": {"type": "bool", "default": False},
            "result": {"type": "str", "default": "done"},
            "records": {"type": "path"},
            "event": {"type": "dict", "default": {}},
            "operator": {"type": "dict"},
            "gone": {"type": "list", "elements": "dict", "default": []},
        },
        required_if=[
            ("state", "claimed", ["fleet", "target", "run", "operator"]),
            ("state", "heard", ["run", "operator"]),
            ("state", "held", ["run", "operator", "node"]),
            ("state", "released", ["run", "operator"]),
        ],
        supports_check_mode=True,
    )
    given = module.params
    path = Path(CLAIM)
    who = {"run": given["run"], "operator": given["operator"]}
    clock = Clock(BOOT.read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME))
    try:
        with alone(path):
            before = after = found(path)
            if given["state"] == "claimed":
                wish = {name: given[name] for name in ("fleet", "run", "kind", "target", "operator")}
                wish["begun"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                gone = before is not None and before["operator"] in given["gone"]
                after = claimed(
                    before, wish=wish, clock=clock, gone=gone, take_over=given["take_over"], resume=given["resume"]
                )
            elif given["state"] == "heard":
                after = heard(before, clock=clock, **who)
            elif given["state"] == "held":
                after = held(before, clock=clock, node=given["node"], **who)
            elif given["state"] == "paused":
                after = paused(before, given["run"])
            elif given["state"] == "released":
                after = released(before, result=given["result"], node=given["node"], **who)
            if after is not None and after != before and not module.check_mode:
                write(path, after)
    except NoteError as refused:
        module.fail_json(msg=str(refused))
    # That the owner was heard of is no change of the fleet.
    module.exit_json(changed=False, claim=after, new=after is not None and (before or {}).get("run") != after["run"])


if __name__ == "__main__":
    main()
