#!/usr/bin/python
"""The note of a driver upgrade on a node: begun, moved on, read."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.driver_upgrade import (
    NOTE,
    NoteError,
    advance,
    begin,
    installed,
    read,
    write,
)

DOCUMENTATION = r"""
module: driver_upgrade
short_description: Keep the note of a driver upgrade on a node
description:
  - Holds the state of the upgrade, what the node came from and what it goes to, so that any crash can be gone on from.
  - Refuses a note that was changed by hand or is of another node, and a step that the table of states does not have.
options:
  node:
    description: Name of the node; given with C(target), the note is begun or gone on with.
    type: str
  target:
    description: The driver to come to, with C(version), C(kernel_modules) and C(packages).
    type: dict
  pins:
    description: File with the versions that were installed last.
    type: path
    default: /etc/apt/preferences.d/gpuyard-nvidia-driver.pref
  to:
    description: State to move on to.
    type: str
  reason:
    description: Why, for whoever reads the note.
    type: str
    default: ""
  drained_before:
    description: Whether somebody else had drained the node before; such a node is not opened again.
    type: bool
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what the note would be.}
  diff_mode: {support: full, description: Shows state before and after.}
"""

EXAMPLES = r"""
- name: Note that the node is being emptied
  gpuyard.fleet.driver_upgrade: {to: drain-required}
"""

RETURN = r"""
note:
  description: The note as it is, or would be.
  returned: success
  type: dict
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str"},
            "target": {"type": "dict"},
            "pins": {"type": "path", "default": "/etc/apt/preferences.d/gpuyard-nvidia-driver.pref"},
            "to": {"type": "str"},
            "reason": {"type": "str", "default": ""},
            "drained_before": {"type": "bool"},
        },
        mutually_exclusive=[("target", "to")],
        required_together=[("node", "target")],
        supports_check_mode=True,
    )
    given = module.params
    path = Path(NOTE)
    try:
        before = read(path)
        if given["target"]:
            after = begin(before, node=given["node"], target=given["target"], previous=installed(Path(given["pins"])))
        elif given["to"]:
            if before is None:
                raise NoteError("UPGRADE-NOTE: no upgrade was begun here. Run playbooks/operate/upgrade_driver.yml")
            after = advance(before, given["to"], given["reason"], given["drained_before"])
        else:
            after = before
    except NoteError as refused:
        module.fail_json(msg=str(refused))
    changed = after != before
    if changed and not module.check_mode:
        write(path, after)
    states = [note["state"] if note else "none" for note in (before, after)]
    module.exit_json(changed=changed, note=after, diff={"before": f"{states[0]}\n", "after": f"{states[1]}\n"})


if __name__ == "__main__":
    main()
