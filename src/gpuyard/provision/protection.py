"""What a fleet has is given up by name alone: all that is made carries the engine's `protect`, and this is the consent.

The engine holds a deletion back only when it comes to that one, after what nothing depends on: a route, the listener.
So all of it is protected, and what an `up` would delete is refused before it begins.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gpuyard.plan.judge import Finding
from gpuyard.provision import Wanted, name_in, resource_name

MACHINE = "aws:ec2/instance:Instance"


def consent(stack: str, urns: Sequence[str]) -> str:
    """The line that gives up just these. It holds until the next `up`, which protects again what it keeps."""
    return shlex.join(["pulumi", "state", "unprotect", "--stack", stack, *urns])


def machine_urn(stack: str, node: str) -> str:
    """What the engine calls the machine of a node, for whoever does not read the state."""
    return f"urn:pulumi:{stack}::gpuyard::gpuyard:aws:Fleet$gpuyard:aws:Part${MACHINE}::{node}"


def given_up(items: Sequence[Wanted], fleet: str, stack: str, deployment: Mapping[str, Any]) -> list[Finding]:
    """What the state has and the list has not, hence what an `up` would delete, as far as nobody consented to it.

    `deployment`: of `pulumi stack export`.
    """
    asked = {resource_name(item, fleet) for item in items}
    rows = [row for row in deployment.get("resources") or () if row.get("protect") and not row.get("delete")]
    gone = [row for row in rows if name_in(row["urn"]) not in asked]
    if not gone:
        return []
    machines = [name_in(row["urn"]) for row in gone if row["type"] == MACHINE]
    drain = [name for name in machines if not name.startswith(f"{fleet}-gateway-")]
    first = f"drain {', '.join(drain)} (playbooks/operate/scale.yml), then " if drain else ""
    line = consent(stack, [row["urn"] for row in gone])
    change = f"ask for it again, or {first}give it up by name: `{line}`"
    have = f"{', '.join(name_in(row['urn']) for row in gone)}, which the spec asks for no longer"
    need = "what is deleted is lost with what is on it, and scarce machines may not be had again"
    return [Finding("AWS-PROTECTED", "red", f"stack {stack}", have, need, change, "docs/aws.md", verified=True)]
