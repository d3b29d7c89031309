"""Run the checks asked for and print one JSON verdict: exit status 0 only when the node is healthy.

The one argument is a JSON list of checks: `[{"check": "check_gpu_count", "expected": 8}]`. What else an entry holds are
the arguments of the probe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a folder: the package lies two folders up, on a node as in a clone.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from gpuyard.health import driver_version, fabric_manager, gpu_count, model_ready, service_active
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict, worst

PROBES: Mapping[str, Callable[..., Verdict]] = {
    module.CHECK: module.probe for module in (driver_version, fabric_manager, gpu_count, model_ready, service_active)
}


def run(request: Mapping[str, Any]) -> Verdict:
    """One check. A probe that fails is a node nobody can vouch for, and the others are still run."""
    arguments = dict(request)
    check = str(arguments.pop("check", "none"))
    probe = PROBES.get(check)
    if probe is None:
        return Verdict(check, UNHEALTHY, f"there is no such check; known: {', '.join(sorted(PROBES))}")
    try:
        return probe(**arguments)
    except Exception as wrong:
        return Verdict(check, UNHEALTHY, f"the probe itself failed: {type(wrong).__name__}: {wrong}")


def main(arguments: list[str]) -> int:
    verdicts = [run(request) for request in json.loads(arguments[0])]
    state = worst([verdict.state for verdict in verdicts])
    checks = [json.loads(verdict.as_json()) for verdict in verdicts]
    print(json.dumps({"state": state, "checks": checks}))
    return 0 if state == HEALTHY else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
