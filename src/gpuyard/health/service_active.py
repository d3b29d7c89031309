"""A unit of systemd runs, and will run again after a reboot."""

from __future__ import annotations

from collections.abc import Mapping

from gpuyard.health import tools
from gpuyard.health.verdict import HEALTHY, INITIALIZING, UNHEALTHY, Verdict

CHECK = "check_service_active"
PROPERTIES = ("LoadState", "ActiveState", "SubState", "UnitFileState", "Result", "NRestarts")


def probe(unit: str) -> Verdict:
    answer = tools.ask("systemctl", "show", "--property=" + ",".join(PROPERTIES), unit)
    if not answer.ok:
        return Verdict(CHECK, UNHEALTHY, f"systemctl says nothing of {unit}: {answer.text[:300]}")
    return judge(unit, dict(line.split("=", 1) for line in answer.text.splitlines() if "=" in line))


def judge(unit: str, shown: Mapping[str, str]) -> Verdict:
    found = {"unit": unit, **shown}
    if shown.get("LoadState") != "loaded":
        return Verdict(CHECK, UNHEALTHY, f"{unit} is not there ({shown.get('LoadState', 'unknown')})", found)
    state = f"{shown.get('ActiveState')} ({shown.get('SubState')})"
    if shown.get("ActiveState") in ("activating", "reloading"):
        return Verdict(CHECK, INITIALIZING, f"{unit} is {state}", found)
    if shown.get("ActiveState") != "active":
        return Verdict(CHECK, UNHEALTHY, f"{unit} is {state}, result {shown.get('Result')}", found)
    if shown.get("UnitFileState") not in ("enabled", "enabled-runtime", "static", "generated", "indirect"):
        reason = f"{unit} runs, but is {shown.get('UnitFileState')}: it would be gone after a reboot"
        return Verdict(CHECK, UNHEALTHY, reason, found)
    return Verdict(CHECK, HEALTHY, f"{unit} is {state}", found)
