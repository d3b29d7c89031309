"""What a probe says about a node."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HEALTHY = "Healthy"
DEGRADED = "Degraded"
INITIALIZING = "Initializing"
UNHEALTHY = "Unhealthy"

# From best to worst. A node is as well as the worst that was found on it.
STATES = (HEALTHY, DEGRADED, INITIALIZING, UNHEALTHY)


@dataclass(frozen=True)
class Verdict:
    """One check's answer: its state, why, and what was found."""

    check: str
    state: str
    reason: str
    found: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> str:
        return json.dumps({"check": self.check, "state": self.state, "reason": self.reason, "found": dict(self.found)})


def worst(states: Sequence[str]) -> str:
    """The state of the whole. Of nothing nothing is known, which is not health."""
    return max(states, key=STATES.index, default=UNHEALTHY)
