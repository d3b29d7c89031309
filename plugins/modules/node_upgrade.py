#!/usr/bin/python
"""The note of an upgrade on a node: begun, moved on, read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import NoteError, alone, read, write
from ansible_collections.gpuyard.fleet.plugins.module_utils.node_upgrade import (
    KINDS,
    TABLES,
    VERSION,
    advance,
    begin,
    installed,
    note_of,
    refuse_beside,
    refuse_lost,
    way_back,
)

DOCUMENTATION = r"""
module: node_upgrade
short_description: Keep the note of an upgrade of driver, engines or kernel on a node
description:
  - Holds the state of the upgrade, what the node came from and what it goes to, so that any crash can be gone on from.
  - Refuses a note that was changed by hand or is of another node, a step that the table of states does not have, a run
    or an operator that has lost the node to another one, and a change of one kind beside one of another kind.
options:
  kind:
    description: What is changed; each kind has a note of its own.
    type: str
    choices: [driver, engine, kernel]
    required: true
  node:
    description: Name of the node; given with C(target), the note is begun or gone on with.
    type: str
  target:
    description:
      - What to come to. C(version) is for people; of a driver there are C(kernel_modules) and C(packages).
      - Two that are equal are the same.
    type: dict
  previous:
    description: What the node has. Of a driver it is read from the C(pins).
    type: dict
  back:
    description: Begin the way back to what the last change came from; C(target) has been read from this note.
    type: bool
    default: false
  pins:
    description: File with the versions that were installed last.
    type: path
    default: /etc/apt/preferences.d/gpuyard-nvidia-driver.pref
  to:
    description: State to move on to.
    type: str
  run:
    description: Id of the run that holds the fleet's claim.
    type: str
    default: ""
  held:
    description: Refuse an operator who has lost the node, and change nothing. For the moment before an act.
    type: bool
    default: false
  operator:
    description: Who asks; filled in by the action plugin.
    type: dict
  record:
    description: File of the run's record, on the machine that runs the play; each move is written down there.
    type: path
  proof:
    description: What proved this move; for the record.
    type: dict
  reason:
    description: Why, for whoever reads the note.
    type: str
    default: ""
  drained_before:
    description: Whether somebody else had drained the node before; such a node is not opened again.
    type: bool
  xid_since:
    description: Mark in the node's journal, from where on an Xid is of the new driver. Kept until another one is given.
    type: str
    default: ""
  watched:
    description: Whether the node was watched to the end of the soak; kept with C(upgrade-done).
    type: bool
    default: false
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what the note would be.}
  diff_mode: {support: full, description: Shows state before and after.}
"""

EXAMPLES = r"""
- name: Note that the node is being emptied
  gpuyard.fleet.node_upgrade: {kind: driver, to: drain-required}
"""

RETURN = r"""
note:
  description: The note as it is, or would be.
  returned: success
  type: dict
way_back:
  description: What the node would go back to; empty, with C(no_way_back) saying why, where there is none.
  returned: success
  type: dict
no_way_back:
  description: Why there is no way back.
  returned: success
  type: str
"""


def moved(note: Optional[dict[str, Any]], given: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The note after what is asked. Raises NoteError."""
    kind = given["kind"]
    if note is not None and note["state"] not in TABLES[kind]:
        raise NoteError(
            f"UPGRADE-NOTE: {note_of(kind)} is at {note['state']}, which is no state. Use the gpuyard that wrote it"
        )
    if given["target"]:
        refuse_beside(kind, given["node"], {other: found(other) for other in KINDS if other != kind})
        words = {name: given[name] for name in ("kind", "node", "run", "operator", "target", "back")}
        return begin(note, previous=given["previous"] or installed(Path(given["pins"])), **words)
    if not (given["to"] or given["held"]):
        return note
    if note is None:
        raise NoteError(f"UPGRADE-NOTE: no upgrade was begun here. Run playbooks/operate/upgrade_{kind}.yml")
    if given["held"]:
        refuse_lost(note, given["run"], given["operator"])
        return note
    words = {name: given[name] for name in ("run", "operator", "reason", "drained_before", "xid_since", "watched")}
    return advance(note, given["to"], **words)


def found(kind: str) -> Optional[dict[str, Any]]:
    """The note of that kind. Notes that are older than their kinds are of a driver, and older ones name no operator."""
    note = read(Path(note_of(kind)), VERSION)
    return None if note is None else {"kind": "driver", "operator": None, "watched": False, **note}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "kind": {"type": "str", "choices": list(KINDS), "required": True},
            "node": {"type": "str"},
            "target": {"type": "dict"},
            "previous": {"type": "dict"},
            "pins": {"type": "path", "default": "/etc/apt/preferences.d/gpuyard-nvidia-driver.pref"},
            "back": {"type": "bool", "default": False},
            "to": {"type": "str"},
            "run": {"type": "str", "default": ""},
            "held": {"type": "bool", "default": False},
            "operator": {"type": "dict"},
            "record": {"type": "path"},
            "proof": {"type": "dict"},
            "reason": {"type": "str", "default": ""},
            "drained_before": {"type": "bool"},
            "xid_since": {"type": "str", "default": ""},
            "watched": {"type": "bool", "default": False},
        },
        mutually_exclusive=[("target", "to", "held")],
        required_together=[("node", "target")],
        supports_check_mode=True,
    )
    given = module.params
    path = Path(note_of(given["kind"]))
    try:
        with alone(path):
            before = found(given["kind"])
            after = moved(before, given)
            changed = after != before
            if after is not None and changed:
                boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                after = {**after, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "boot": boot}
                if not module.check_mode:
                    write(path, after)
    except NoteError as refused:
        module.fail_json(msg=str(refused))
    states = [note["state"] if note else "none" for note in (before, after)]
    try:
        back = {"way_back": way_back(after), "no_way_back": ""}
    except NoteError as none:
        back = {"way_back": {}, "no_way_back": str(none)}
    module.exit_json(changed=changed, note=after, **back, diff={"before": f"{states[0]}\n", "after": f"{states[1]}\n"})


if __name__ == "__main__":
    main()
