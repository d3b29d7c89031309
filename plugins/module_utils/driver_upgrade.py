"""The states of a driver upgrade on one node, in the field's names, and the note that holds them.

The note lives on the node, is written whole or not at all, and says what the node came from, so that whoever continues
after a crash puts back exactly that. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
# As in roles/nvidia_driver/vars: the packages that bring the kernel modules.
FLAVOURS = {
    "open": r"nvidia-(kernel-open-dkms|dkms(-[0-9]+)?-open)",
    "proprietary": r"nvidia-(kernel-dkms|dkms(-[0-9]+)?)",
}
NOTE = "/var/lib/gpuyard/driver-upgrade.json"


class Step(NamedTuple):
    """What is done in a state, and where it leads."""

    does: tuple[str, ...]
    """Entry points of roles, in their order: role/verb."""
    success: str
    failure: str


# A failure at any point has one way home: the driver that was there before. What was not changed yet is left as it is.
STEPS: dict[str, Step] = {
    "upgrade-required": Step((), "drain-required", "upgrade-required"),
    "drain-required": Step(("node_gate/drain",), "driver-install-required", "rollback-required"),
    "driver-install-required": Step(
        (
            "vllm_server/stop",
            "nvidia_driver/unload",
            "nvidia_driver/install",
            "nvidia_driver/load",
            "nvidia_driver/configure",
        ),
        "validation-required",
        "rollback-required",
    ),
    "validation-required": Step(
        ("nvidia_driver/verify", "vllm_server/start", "vllm_server/verify"), "uncordon-required", "rollback-required"
    ),
    "uncordon-required": Step(("node_gate/uncordon",), "upgrade-done", "rollback-required"),
    "rollback-required": Step(
        (
            "vllm_server/stop",
            "nvidia_driver/unload",
            "nvidia_driver/install",
            "nvidia_driver/load",
            "nvidia_driver/configure",
            "nvidia_driver/verify",
            "vllm_server/start",
            "vllm_server/verify",
            "node_gate/uncordon",
        ),
        "rollback-done",
        "rollback-failed",
    ),
    "upgrade-done": Step((), "upgrade-done", "upgrade-done"),
    "rollback-done": Step((), "rollback-done", "rollback-done"),
    "rollback-failed": Step((), "rollback-failed", "rollback-failed"),
}
AT_REST = ("upgrade-done", "rollback-done", "rollback-failed")


class NoteError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


def follows(state: str) -> set[str]:
    """The states that may come after a state; itself, because a step that was interrupted is done again."""
    step = STEPS[state]
    return {state, step.success, step.failure}


def begin(
    note: dict[str, Any] | None, *, node: str, target: dict[str, Any], previous: dict[str, Any]
) -> dict[str, Any]:
    """The note to go on with: the one that is there, where it is of this very change, or a new one.

    A change that came to rest is over, and so is one to another driver that has not begun to touch the node. One that
    has must be brought to its end first: its `previous` is all that says what the node came from.
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
            return {**note, "attempts": note["attempts"] + 1}
        if note["state"] == "rollback-failed" and note["target"] == target:
            raise NoteError(
                f"UPGRADE-QUARANTINE: driver {target['version']} failed on {node}, and so did the way back to "
                f"{note['previous']['version']}. Mend the node, bring it back with site.yml, and remove {NOTE} there"
            )
        if note["state"] == "upgrade-done" and note["target"] == target == previous:
            return note
    state = "upgrade-done" if previous == target else "upgrade-required"
    return {
        "version": VERSION,
        "node": node,
        "state": state,
        "target": target,
        "previous": previous,
        "drained_before": False,
        "touched": False,
        "attempts": 1,
        "reason": "",
    }


def advance(note: dict[str, Any], to: str, reason: str = "", drained_before: bool | None = None) -> dict[str, Any]:
    """The note in another state. Raises NoteError where the table has no such way."""
    if to not in follows(note["state"]):
        raise NoteError(
            f"UPGRADE-STATE: {note['node']} stands at {note['state']}, from where nothing leads to {to}. "
            "Run the playbook again: it begins where the node stands"
        )
    # From here on the way home is more than to open the node again.
    found = {**note, "state": to, "reason": reason, "touched": note["touched"] or to == "driver-install-required"}
    if drained_before is not None and note["state"] == "upgrade-required":
        found["drained_before"] = drained_before
    return found


def read(path: Path) -> dict[str, Any] | None:
    """The note, or None where there is none. Raises NoteError for one that was not written by `write`."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise NoteError(f"UPGRADE-NOTE: {path} is no note ({error}). Look at the node before you remove it") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise NoteError(
            f"UPGRADE-NOTE: {path} has version {version!r}, {VERSION} is known. Use the gpuyard that wrote it"
        )
    if data.pop("checksum", None) != _checksum(data) or data.get("state") not in STEPS:
        raise NoteError(f"UPGRADE-NOTE: {path} was changed by hand. Look at the node before you remove it")
    return data


def write(path: Path, note: dict[str, Any]) -> None:
    """Whole or not at all, and on the disk when this returns."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with half.open("w") as file:
        json.dump({**note, "checksum": _checksum(note)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def _checksum(note: dict[str, Any]) -> str:
    plain = json.dumps({key: value for key, value in note.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
