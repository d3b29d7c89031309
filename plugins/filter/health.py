"""From what was recorded on each node to one verdict per node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpuyard.health.verdict import HEALTHY, UNHEALTHY, worst

DOCUMENTATION = r"""
name: node_verdicts
short_description: One verdict per node, from what C(node_health) recorded there
description:
  - A node of which nothing was recorded was not reached, or fell out of the run; it counts as unhealthy.
options:
  _input:
    description: Inventory names of the nodes that were to be looked at.
    type: list
    elements: str
    required: true
  hostvars:
    description: Ansible's C(hostvars), in which C(node_health_recorded) is looked up.
    type: dict
    required: true
"""


def node_verdicts(nodes: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [verdict(node, hostvars[node].get("node_health_recorded") or []) for node in nodes]


def verdict(node: str, recorded: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    state = worst([entry["state"] for entry in recorded])
    if not recorded:
        reason = "not reached, or lost before it said anything"
    elif state == HEALTHY:
        reason = "every role proved its work"
    else:
        reason = "; ".join(str(entry["reason"]) for entry in recorded if entry["state"] != HEALTHY)
    return {"node": node, "state": state, "reason": reason, "roles": [dict(entry) for entry in recorded]}


def not_healthy(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(verdict["node"]) for verdict in verdicts if verdict.get("state", UNHEALTHY) != HEALTHY]


def failure_reason(result: Mapping[str, Any], task: str) -> str:
    """Why a task failed, in its own words; of a loop, the words of each item that failed.

    Of a program the words are what it wrote to stderr: that it ended with an error says nothing.
    """
    failed = [item for item in result.get("results") or [] if item.get("failed") or item.get("unreachable")]
    reasons = [str(item.get("stderr") or item.get("msg") or "failed").strip() for item in failed or [result]]
    return f"{task}: {'; '.join(reasons)}"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"node_verdicts": node_verdicts, "not_healthy": not_healthy, "failure_reason": failure_reason}
