"""The states of a node whose driver, engines or kernel change, in the field's names, and the note that holds them.

The note lives on the node, is written whole or not at all, and says what the node came from, so that whoever continues
after a crash puts back exactly that. A node has one note for each kind of change, and at most one of them is on its
way. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import NoteError

VERSION = 2
KINDS = ("driver", "engine", "kernel")
# As in roles/nvidia_driver/vars: the packages that bring the kernel modules.
FLAVOURS = {
    "open": r"nvidia-(kernel-open-dkms|dkms(-[0-9]+)?-open)",
    "proprietary": r"nvidia-(kernel-dkms|dkms(-[0-9]+)?)",
}


class Step(NamedTuple):
    """What is done in a state, and where it leads. Whoever runs the playbook owns every state."""

    does: tuple[str, ...]
    """Entry points of roles, in their order: role/verb."""
    success: str
    failure: str
    deadline: int = 0
    """Seconds after which a node in this state has been left by whoever brought it there; 0: it may rest there."""


class Exchange(NamedTuple):
    """What is particular to a kind of change: all else, every kind has in common."""

    state: str
    """The state in which it is exchanged."""
    before: tuple[str, ...]
    """What is done on the empty node while it has all that it had."""
    does: tuple[str, ...]
    proof: tuple[str, ...]
    """What is proven before engines are started, and again under load."""
    undo: tuple[str, ...]
    deadline: int
    keep: tuple[str, ...] = ()
    """What makes the new one stay, once it is proven on the empty node."""
    leave: tuple[str, ...] = ()
    """What lets the old one go, once the new one was watched."""


EXCHANGES: dict[str, Exchange] = {
    "driver": Exchange(
        state="driver-install-required",
        before=(),
        # Engines that are stopped may make the old driver log an Xid. From the mark on each one counts.
        does=(
            *("vllm_server/stop", "nvidia_driver/unload", "node_health/mark"),
            *("nvidia_driver/install", "nvidia_driver/load", "nvidia_driver/configure"),
        ),
        proof=("nvidia_driver/verify",),
        undo=(
            *("vllm_server/stop", "nvidia_driver/unload", "node_health/mark"),
            *("nvidia_driver/install", "nvidia_driver/load", "nvidia_driver/configure", "nvidia_driver/verify"),
        ),
        deadline=1800,
    ),
    # The environments were built beside the old ones before the first node was emptied: what is left to exchange is
    # which of them the units name, and with which settings.
    "engine": Exchange(
        state="service-stop-required",
        before=("vllm_server/keep",),
        does=("vllm_server/stop", "vllm_server/configure"),
        proof=(),
        undo=("vllm_server/stop", "vllm_server/restore"),
        deadline=600,
    ),
    # The kernel lies beside the one that runs, with its modules, before the first node is emptied. It is booted once: a
    # node that does not come up with it comes up with the old one.
    "kernel": Exchange(
        state="reboot-required",
        before=(),
        does=(
            *("vllm_server/stop", "node_health/mark", "node_kernel/restart"),
            *("nvidia_driver/load", "nvidia_driver/configure"),
        ),
        proof=("node_kernel/verify", "nvidia_driver/verify"),
        undo=(
            *("vllm_server/stop", "node_health/mark", "node_kernel/restore"),
            *("nvidia_driver/load", "nvidia_driver/configure", "nvidia_driver/verify"),
        ),
        deadline=3900,
        keep=("node_kernel/confirm",),
        leave=("node_kernel/forget",),
    ),
}
ENGINES_ANSWER = ("vllm_server/start", "vllm_server/verify", "vllm_server/compare")
UNDER_LOAD = ("vllm_server/verify", "vllm_server/compare")


def table(kind: str) -> dict[str, Step]:
    """The states of one kind of change, and where each leads.

    A failure at any point has one way home: what was there before. What was not changed yet is left as it is.
    """
    own = EXCHANGES[kind]
    # Requests may take long to end. The answers of what is there are what the next one is compared with.
    emptied = ("node_gate/drain", "vllm_server/record", *own.before)
    return {
        "upgrade-required": Step((), "drain-required", "upgrade-required"),
        "drain-required": Step(emptied, own.state, "rollback-required", 4200),
        own.state: Step(own.does, "validation-required", "rollback-required", own.deadline),
        "validation-required": Step(
            (*own.proof, *ENGINES_ANSWER, *own.keep), "uncordon-required", "rollback-required", 2400
        ),
        "uncordon-required": Step(("node_gate/uncordon",), "soak-required", "rollback-required", 300),
        # Under the users' own load: what nothing but that brings out is seen while one node has the new one.
        "soak-required": Step((*own.proof, *UNDER_LOAD, *own.leave), "upgrade-done", "rollback-required", 7200),
        "rollback-required": Step(
            (*own.undo, *ENGINES_ANSWER, "node_gate/uncordon"), "rollback-done", "rollback-failed", 7200
        ),
        "upgrade-done": Step((), "upgrade-done", "upgrade-done"),
        "rollback-done": Step((), "rollback-done", "rollback-done"),
        "rollback-failed": Step((), "rollback-failed", "rollback-failed"),
    }


TABLES: dict[str, dict[str, Step]] = {kind: table(kind) for kind in KINDS}
AT_REST = ("upgrade-done", "rollback-done", "rollback-failed")
# Not begun with the node, or at an end that was proven.
SETTLED = ("upgrade-required", "upgrade-done", "rollback-done")


def note_of(kind: str) -> str:
    """Where the note of that kind of change lies on a node."""
    return f"/var/lib/gpuyard/{kind}-upgrade.json"


def follows(kind: str, state: str) -> set[str]:
    """The states that may come after a state; itself, because a step that was interrupted is done again."""
    step = TABLES[kind][state]
    return {state, step.success, step.failure}


def refuse_beside(kind: str, node: str, others: dict[str, dict[str, Any] | None]) -> None:
    """Raises NoteError where a change of another kind is on its way, or has left the node in quarantine."""
    for other, note in others.items():
        if note is not None and note["state"] not in SETTLED:
            raise NoteError(
                f"UPGRADE-OTHER: a change of the {other} of {node} stands at {note['state']}, and its {kind} is to be "
                f"changed. Bring the first one to its end: playbooks/operate/upgrade_{other}.yml"
            )


def begin(
    note: dict[str, Any] | None,
    *,
    kind: str,
    node: str,
    run: str,
    operator: dict[str, Any],
    target: dict[str, Any],
    previous: dict[str, Any],
    back: bool = False,
) -> dict[str, Any]:
    """The note to go on with: the one that is there, where it is of this very change, or a new one.

    A change that came to rest is over, and so is one to another driver that has not begun to touch the node. One that
    has must be brought to its end first: its `previous` is all that says what the node came from. Run and operator
    are those that hold the fleet's claim; from here on another one moves this note no more. `back` is remembered, so
    that who goes back twice does not come forward again.
    """
    if note is not None:
        if note["node"] != node:
            raise NoteError(
                f"UPGRADE-FOREIGN: the note on {node} is of node {note['node']}. Remove {note_of(kind)} there if it "
                "has moved"
            )
        going = note["state"] not in (*AT_REST, "upgrade-required")
        if going and note["target"] != target:
            raise NoteError(
                f"UPGRADE-OTHER: a change to {kind} {note['target']['version']} stands at {note['state']}, and "
                f"{target['version']} is asked for. End the first one with the lock that it began with"
            )
        if going:
            return {**note, "run": run, "operator": operator, "attempts": note["attempts"] + 1}
        if note["state"] == "rollback-failed" and note["target"] == target:
            raise NoteError(
                f"UPGRADE-QUARANTINE: {kind} {target['version']} failed on {node}, and so did the way back to "
                f"{note['previous']['version']}. Mend the node, bring it back with site.yml, and remove "
                f"{note_of(kind)} there"
            )
        if note["state"] == "upgrade-done" and note["target"] == target == previous:
            return note
    state = "upgrade-done" if previous == target else "upgrade-required"
    before = None
    if note is not None and not note["back"]:
        before = note["previous"] if note["state"] == "upgrade-done" else note["before"]
    return {
        "version": VERSION,
        "kind": kind,
        "node": node,
        "run": run,
        # Who takes a run over goes on under its name, so the name alone fences nobody.
        "operator": operator,
        "state": state,
        "back": back,
        "target": target,
        "previous": previous,
        # What the change before this one came from: the way back for as long as this one has not come.
        "before": before,
        "drained_before": False,
        # Whether it was looked at under its users' load to the end of the soak: only such a node was a canary.
        "watched": False,
        # Where the node's journal stood when the new driver came: an Xid behind it is of the new driver.
        "xid_since": "",
        "touched": False,
        "attempts": 1,
        "reason": "",
    }


def refuse_lost(note: dict[str, Any], run: str, operator: dict[str, Any]) -> None:
    """Raises NoteError for an operator who lost the node to another one, be it under the same run."""
    if (note["run"], note["operator"]) != (run, operator):
        now = "{name}@{host} (process {pid})".format(**note["operator"]) if note["operator"] else "another one"
        raise NoteError(
            f"UPGRADE-FENCED: {note['node']} is changed by {now} in run {note['run']} now, and no more by run {run} of "
            f"process {operator['pid']} on {operator['host']}. Somebody took over; agree with them before anything is "
            "run again"
        )


def advance(
    note: dict[str, Any],
    to: str,
    run: str,
    operator: dict[str, Any],
    reason: str = "",
    drained_before: bool | None = None,
    xid_since: str = "",
    watched: bool = False,
) -> dict[str, Any]:
    """The note in another state. Raises NoteError where the table has no such way, and for who lost the node."""
    refuse_lost(note, run, operator)
    if to not in follows(note["kind"], note["state"]):
        raise NoteError(
            f"UPGRADE-STATE: {note['node']} stands at {note['state']}, from where nothing leads to {to}. "
            "Run the playbook again: it begins where the node stands"
        )
    # From here on the way home is more than to open the node again.
    found = {**note, "state": to, "reason": reason, "touched": note["touched"] or to == EXCHANGES[note["kind"]].state}
    if drained_before is not None and note["state"] == "upgrade-required":
        found["drained_before"] = drained_before
    if xid_since:
        found["xid_since"] = xid_since
    if to == "upgrade-done":
        found["watched"] = note["watched"] or watched
    return found


def way_back(note: dict[str, Any] | None) -> dict[str, Any]:
    """What a node goes back to: what its last change came from. Raises NoteError where there is none."""
    if note is None:
        found = None
    elif note["back"]:
        found = note["target"]
    elif note["state"] == "upgrade-done" and note["previous"] != note["target"]:
        found = note["previous"]
    else:
        found = note["before"]
    if found is None:
        raise NoteError("UPGRADE-NOTHING-BACK: this was never changed on this node, so there is nothing to go back to")
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
