"""The states of a driver upgrade on one node, in the field's names, and the note that holds them.

The note lives on the node, is written whole or not at all, and says what the node came from, so that whoever continues
after a crash puts back exactly that. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import NoteError

VERSION = 2
# As in roles/nvidia_driver/vars: the packages that bring the kernel modules.
FLAVOURS = {
    "open": r"nvidia-(kernel-open-dkms|dkms(-[0-9]+)?-open)",
    "proprietary": r"nvidia-(kernel-dkms|dkms(-[0-9]+)?)",
}
NOTE = "/var/lib/gpuyard/driver-upgrade.json"


class Step(NamedTuple):
    """What is done in a state, and where it leads. Whoever runs the playbook owns every state."""

    does: tuple[str, ...]
    """Entry points of roles, in their order: role/verb."""
    success: str
    failure: str
    deadline: int = 0
    """Seconds after which a node in this state has been left by whoever brought it there; 0: it may rest there."""


# A failure at any point has one way home: the driver that was there before. What was not changed yet is left as it is.
STEPS: dict[str, Step] = {
    "upgrade-required": Step((), "drain-required", "upgrade-required"),
    # Requests may take long to end. The answers of the driver that is there are what the next one is compared with.
    "drain-required": Step(
        ("node_gate/drain", "vllm_server/record"), "driver-install-required", "rollback-required", 4200
    ),
    "driver-install-required": Step(
        (
            "vllm_server/stop",
            "nvidia_driver/unload",
            # Engines that are stopped may make the old driver log an Xid. From here on each one counts.
            "node_health/mark",
            "nvidia_driver/install",
            "nvidia_driver/load",
            "nvidia_driver/configure",
        ),
        "validation-required",
        "rollback-required",
        1800,
    ),
    "validation-required": Step(
        ("nvidia_driver/verify", "vllm_server/start", "vllm_server/verify", "vllm_server/compare"),
        "uncordon-required",
        "rollback-required",
        2400,
    ),
    "uncordon-required": Step(("node_gate/uncordon",), "soak-required", "rollback-required", 300),
    # Under the users' own load: what nothing but that brings out is seen while one node has the driver.
    "soak-required": Step(
        ("nvidia_driver/verify", "vllm_server/verify", "vllm_server/compare"), "upgrade-done", "rollback-required", 7200
    ),
    "rollback-required": Step(
        (
            "vllm_server/stop",
            "nvidia_driver/unload",
            "node_health/mark",
            "nvidia_driver/install",
            "nvidia_driver/load",
            "nvidia_driver/configure",
            "nvidia_driver/verify",
            "vllm_server/start",
            "vllm_server/verify",
            "vllm_server/compare",
            "node_gate/uncordon",
        ),
        "rollback-done",
        "rollback-failed",
        7200,
    ),
    "upgrade-done": Step((), "upgrade-done", "upgrade-done"),
    "rollback-done": Step((), "rollback-done", "rollback-done"),
    "rollback-failed": Step((), "rollback-failed", "rollback-failed"),
}
AT_REST = ("upgrade-done", "rollback-done", "rollback-failed")


def follows(state: str) -> set[str]:
    """The states that may come after a state; itself, because a step that was interrupted is done again."""
    step = STEPS[state]
    return {state, step.success, step.failure}


def begin(
    note: dict[str, Any] | None,
    *,
    node: str,
    run: str,
    target: dict[str, Any],
    previous: dict[str, Any],
    back: bool = False,
) -> dict[str, Any]:
    """The note to go on with: the one that is there, where it is of this very change, or a new one.

    A change that came to rest is over, and so is one to another driver that has not begun to touch the node. One that
    has must be brought to its end first: its `previous` is all that says what the node came from. The run is that which
    holds the fleet's claim; from here on another one moves this note no more. `back` is remembered, so that who goes
    back twice does not come forward again.
    """
    if note is not None:
        if note["node"] != node:
            raise NoteError(
                f"UPGRADE-FOREIGN: the note on {node} is of node {note['node']}. Remove {NOTE} there if it has moved"
            )
        going = note["state"] not in (*AT_REST, "upgrade-required")
        if going and note["target"] != target:
            raise NoteError(
                f"UPGRADE-OTHER: a change to driver {note['target']['version']} stands at {note['state']}, and "
                f"{target['version']} is asked for. End the first one with the lock that it began with"
            )
        if going:
            return {**note, "run": run, "attempts": note["attempts"] + 1}
        if note["state"] == "rollback-failed" and note["target"] == target:
            raise NoteError(
                f"UPGRADE-QUARANTINE: driver {target['version']} failed on {node}, and so did the way back to "
                f"{note['previous']['version']}. Mend the node, bring it back with site.yml, and remove {NOTE} there"
            )
        if note["state"] == "upgrade-done" and note["target"] == target == previous:
            return note
    state = "upgrade-done" if previous == target else "upgrade-required"
    before = None
    if note is not None and not note["back"]:
        before = note["previous"] if note["state"] == "upgrade-done" else note["before"]
    return {
        "version": VERSION,
        "node": node,
        "run": run,
        "state": state,
        "back": back,
        "target": target,
        "previous": previous,
        # What the change before this one came from: the way back for as long as this one has not come.
        "before": before,
        "drained_before": False,
        # Where the node's journal stood when the new driver came: an Xid behind it is of the new driver.
        "xid_since": "",
        "touched": False,
        "attempts": 1,
        "reason": "",
    }


def advance(
    note: dict[str, Any],
    to: str,
    run: str,
    reason: str = "",
    drained_before: bool | None = None,
    xid_since: str = "",
) -> dict[str, Any]:
    """The note in another state. Raises NoteError where the table has no such way, and for a run that lost the node."""
    if note["run"] != run:
        raise NoteError(
            f"UPGRADE-FENCED: {note['node']} is changed by run {note['run']} now, this is {run}. Somebody took over; "
            "agree with them before anything is run again"
        )
    if to not in follows(note["state"]):
        raise NoteError(
            f"UPGRADE-STATE: {note['node']} stands at {note['state']}, from where nothing leads to {to}. "
            "Run the playbook again: it begins where the node stands"
        )
    # From here on the way home is more than to open the node again.
    found = {**note, "state": to, "reason": reason, "touched": note["touched"] or to == "driver-install-required"}
    if drained_before is not None and note["state"] == "upgrade-required":
        found["drained_before"] = drained_before
    if xid_since:
        found["xid_since"] = xid_since
    return found


def way_back(note: dict[str, Any] | None) -> dict[str, Any]:
    """The driver that a node goes back to: what its last change came from. Raises NoteError where there is none."""
    if note is None:
        found = None
    elif note["back"]:
        found = note["target"]
    elif note["state"] == "upgrade-done" and note["previous"] != note["target"]:
        found = note["previous"]
    else:
        found = note["before"]
    if found is None:
        raise NoteError(
            "UPGRADE-NOTHING-BACK: the driver of this node was never changed, so there is none to go back to"
        )
    return found


def pinned(text: str) -> dict[str, str]:
    """Packages and versions of the preferences that the role nvidia_packages writes: what it installed last."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("Package: "):
            name = line[len("Package: ") :]
        elif line.startswith("Pin: version ") and name:
            found[name] = line[len("Pin: version ") :]
    return found


def installed(pins: Path) -> dict[str, Any]:
    """What the node has, as its pins say: version and flavour of the driver, and every package. Raises NoteError."""
    packages = pinned(pins.read_text()) if pins.is_file() else {}
    for name, version in packages.items():
        for flavour, pattern in FLAVOURS.items():
            if re.fullmatch(pattern, name):
                return {"version": re.sub(r"-[^-]*$", "", version), "kernel_modules": flavour, "packages": packages}
    raise NoteError(
        f"UPGRADE-NOTHING: {pins} names no driver, so there is nothing to upgrade. Run playbooks/site.yml first"
    )
