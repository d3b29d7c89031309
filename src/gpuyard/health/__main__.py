"""Run the checks asked for and print one JSON verdict: exit status 0 only when the node is healthy.

The first argument is a JSON list of checks: `[{"check": "check_gpu_count", "expected": 8}]`. What else an entry holds
are the arguments of the probe. The second, which may be left out, is the seconds that one check may take.

With the one argument `mark` print this moment instead, for the argument `since` of a later `check_xid`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a folder: the package lies two folders up, on a node as in a clone.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from gpuyard.health import (
    clocks_event_reasons,
    driver_version,
    ecc_errors,
    fabric_manager,
    gpu_count,
    gpu_recovery_action,
    gpu_temperature,
    model_ready,
    nvlink,
    pcie_link,
    remapped_rows,
    service_active,
    xid,
)
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict, worst

PROBES: Mapping[str, Callable[..., Verdict]] = {
    module.CHECK: module.probe
    for module in (
        clocks_event_reasons,
        driver_version,
        ecc_errors,
        fabric_manager,
        gpu_count,
        gpu_recovery_action,
        gpu_temperature,
        model_ready,
        nvlink,
        pcie_link,
        remapped_rows,
        service_active,
        xid,
    )
}

# Longer than what a probe itself waits for: two answers of an engine, or a nvidia-smi that hangs after others answered.
DEADLINE_SECONDS = 150


class OverdueError(Exception):
    """Not a TimeoutError, which a probe takes for the answer of what it asked."""


@contextlib.contextmanager
def within(seconds: int) -> Generator[None]:
    def over(*_: object) -> None:
        raise OverdueError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(request: Mapping[str, Any], seconds: int = DEADLINE_SECONDS) -> Verdict:
    """One check. A probe that fails or hangs is a node nobody can vouch for, and the others are still run."""
    arguments = dict(request)
    check = str(arguments.pop("check", "none"))
    probe = PROBES.get(check)
    if probe is None:
        return Verdict(check, UNHEALTHY, f"there is no such check; known: {', '.join(sorted(PROBES))}")
    try:
        with within(seconds):
            return probe(**arguments)
    except OverdueError:
        return Verdict(check, UNHEALTHY, f"the probe gave no answer in {seconds} s")
    except Exception as wrong:
        return Verdict(check, UNHEALTHY, f"the probe itself failed: {type(wrong).__name__}: {wrong}")


def main(arguments: list[str]) -> int:
    if arguments == ["mark"]:
        try:
            print(xid.mark())
        except xid.JournalError as wrong:
            sys.exit(f"there is no mark: {wrong}")
        return 0
    seconds = int(arguments[1]) if len(arguments) > 1 else DEADLINE_SECONDS
    verdicts = [run(request, seconds) for request in json.loads(arguments[0])]
    state = worst([verdict.state for verdict in verdicts])
    checks = [json.loads(verdict.as_json()) for verdict in verdicts]
    print(json.dumps({"state": state, "checks": checks}))
    return 0 if state == HEALTHY else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
