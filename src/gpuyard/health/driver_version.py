"""The locked driver is the one installed, the one on disk, the one loaded and the one that answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpuyard.health import tools
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict

CHECK = "check_driver_version"
LOADED = Path("/proc/driver/nvidia/version")

# "… x86_64 Kernel Module  550.1 …" is the proprietary module, "… Open Kernel Module for x86_64  550.1 …" the open one.
KERNEL_MODULE = re.compile(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)(?:\s|$)")


def probe(locked: str, kernel_modules: str, package: str) -> Verdict:
    loaded = tools.read(LOADED)
    found = {
        "package": _package(package),
        "file": _file(),
        "loaded": loaded_version(loaded),
        "userland": _userland(),
    }
    return judge(locked, kernel_modules, found, loaded_modules(loaded))


def judge(locked: str, kernel_modules: str, found: Mapping[str, str], modules: str) -> Verdict:
    differing = {place: version for place, version in found.items() if version != locked}
    evidence = {"locked": locked, **found, "kernel_modules": modules}
    if not differing and modules != kernel_modules:
        reason = f"driver {locked} is loaded with {modules} kernel modules, {kernel_modules} ones are locked"
        return Verdict(CHECK, UNHEALTHY, reason, evidence)
    if not differing:
        return Verdict(CHECK, HEALTHY, f"driver {locked} is locked, installed, loaded and answers", evidence)
    words = ", ".join(f"{place}: {version}" for place, version in differing.items())
    return Verdict(CHECK, UNHEALTHY, f"driver {locked} is locked, but {words}", evidence)


def loaded_version(text: str | None) -> str:
    """The version of the loaded module, from the file it keeps in /proc."""
    if text is None:
        return "none"
    match = KERNEL_MODULE.search(text)
    return match.group(1) if match else "unreadable"


def loaded_modules(text: str | None) -> str:
    """The flavour of the loaded modules; only the open one says what it is."""
    if text is None:
        return "no"
    return "open" if "Open Kernel Module" in text else "proprietary"


def upstream(version: str) -> str:
    """A Debian version without epoch and revision."""
    return version.rsplit("-", 1)[0].split(":", 1)[-1]


def _package(name: str) -> str:
    answer = tools.ask("dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", name)
    status, _, version = answer.text.partition(" ")
    if not answer.ok or status in ("not-installed", "config-files"):
        return "none"
    return upstream(version) if status == "installed" else f"{upstream(version)} ({status})"


def _file() -> str:
    answer = tools.ask("modinfo", "--field=version", "nvidia")
    return answer.text if answer.ok else "none"


def _userland() -> str:
    answer = tools.ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not answer.ok:
        return answer.text.splitlines()[0] if answer.text else "no answer"
    return " and ".join(sorted({line.strip() for line in answer.text.splitlines()})) or "no GPU"
