#!/usr/bin/python3
"""Say what on this node has moved away from the driver that gpuyard last brought it to.

    node_drift.py look [--json] [--locked VERSION]    look and print; 1 where something has drifted; changes nothing
    node_drift.py guard                               look, keep the result, and refuse a reboot that loses the driver
    node_drift.py allow-reboot                        let the next reboot through, whatever it loses

What is locked is what the role nvidia_packages pinned. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

VERSION = 1
PINS = Path("/etc/apt/preferences.d/gpuyard-nvidia-driver.pref")
DPKG = Path("/var/lib/dpkg/status")
RESULT = Path("/var/lib/gpuyard/drift.json")
NOTICE = Path("/var/lib/gpuyard/notice.json")  # as in roles/node_notice
LOADED = Path("/proc/driver/nvidia/version")
GRUB = Path("/boot/grub")
UNITS = Path("/run/systemd/system")
# What a restart starts. A power-off and a halt are not in the way: they lose nothing that is not lost already.
RESTARTS = ("reboot.target", "kexec.target")
ALLOW = "/usr/local/lib/gpuyard/node_drift.py allow-reboot"
# As in roles/nvidia_driver/vars: the packages that bring the kernel modules.
FLAVOURS = {
    "open": r"nvidia-(kernel-open-dkms|dkms(-[0-9]+)?-open)",
    "proprietary": r"nvidia-(kernel-dkms|dkms(-[0-9]+)?)",
}
FABRIC = r"nvidia-fabric-?manager(-[0-9]+)?"
PLAYBOOKS = "ansible-playbook -i INVENTORY playbooks"
DRIVER = f"{PLAYBOOKS}/site.yml --tags nvidia_driver"
# The installed driver is what a restart loads; an upgrade begins from the pins and would find nothing to do.
RESTART = f"{PLAYBOOKS}/operate/drain_node.yml --limit NODE, then reboot it"
# A look takes less than a second; apt calls dpkg again and again.
LOOKS, BETWEEN_SECONDS = 30, 2


class Package(NamedTuple):
    want: str
    """What dpkg is to do with it: install, hold."""
    status: str
    """How far it is: installed, half-configured."""
    version: str


class Facts(NamedTuple):
    """What a look found. Versions are the driver's, without epoch and revision; None: there is none."""

    asked: Optional[str]
    """The version of the fleet's lock, where who asks knows it."""
    pins: Mapping[str, str]
    packages: Mapping[str, Package]
    loaded: Optional[str]
    loaded_flavour: Optional[str]
    kernel: str
    """The kernel that boots next."""
    module: Optional[str]
    """Version of the module that this kernel would load."""
    headers: bool
    """Whether a module can be built for it; so it is in a container, whose kernel is the host's."""
    fabric_manager: str
    """State of its service."""
    upgrades: bool
    """Whether unattended-upgrades runs by itself."""
    left_out: Iterable[str]
    """Expressions of the packages that it leaves alone."""
    notice: Optional[str] = None
    """The note with which this node has closed itself at the gateways."""


class Finding(NamedTuple):
    rule: str
    found: str
    why: str
    change: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}: {self.why}; {self.change}"


def judge(facts: Facts) -> list[Finding]:
    """Everything that has drifted."""
    rules = (lock, hold, installed, loaded, fabric, unattended, reboot, headers, closed)
    return [finding for rule in rules for finding in rule(facts)]


def lock(facts: Facts) -> Iterable[Finding]:
    locked = pinned_driver(facts)
    if facts.asked and locked and facts.asked != locked:
        yield Finding(
            "DRIFT-LOCK",
            f"the node was brought to driver {locked}, the fleet's lock says {facts.asked}",
            "the lock has moved since",
            f"{PLAYBOOKS}/operate/upgrade_driver.yml",
        )


def hold(facts: Facts) -> Iterable[Finding]:
    if pinned_driver(facts) is None:
        yield Finding(
            "DRIFT-HOLD",
            f"{PINS} pins no driver",
            "the next upgrade of packages may bring any version, under running engines",
            DRIVER,
        )
    lifted = sorted(name for name in facts.pins if name in facts.packages and facts.packages[name].want != "hold")
    if lifted:
        yield Finding(
            "DRIFT-HOLD",
            f"the hold on {', '.join(lifted)} was lifted",
            "the next upgrade of packages may exchange a part of the driver under running engines",
            f"apt-mark hold {' '.join(lifted)}",
        )


def installed(facts: Facts) -> Iterable[Finding]:
    why = "the parts of a driver work in one version alone"
    missing = sorted(set(facts.pins) - set(facts.packages))
    there = {name: facts.packages[name] for name in sorted(facts.pins) if name in facts.packages}
    other = [name for name, package in there.items() if package.version != facts.pins[name]]
    half = [name for name, package in there.items() if package.status != "installed"]
    if missing:
        yield Finding("DRIFT-INSTALLED", f"{', '.join(missing)} is not installed", why, DRIVER)
    if other:
        words = [f"{name} is {there[name].version} and locked is {facts.pins[name]}" for name in other]
        yield Finding("DRIFT-INSTALLED", ", ".join(words), why, f"{DRIVER} -e nvidia_driver_allow_downgrade=true")
    if half:
        words = [f"{name} is {there[name].status}" for name in half]
        yield Finding("DRIFT-INSTALLED", ", ".join(words), why, "dpkg --configure --pending")


def loaded(facts: Facts) -> Iterable[Finding]:
    expected, flavour = expected_driver(facts), pinned_flavour(facts)
    if expected and facts.loaded is None:
        found = f"no driver is loaded, {expected} is locked"
        yield Finding("DRIFT-LOADED", found, "no engine starts", DRIVER)
    elif expected and facts.loaded != expected:
        yield Finding(
            "DRIFT-LOADED",
            f"driver {facts.loaded} is loaded, {expected} is locked",
            "programs that start from now on fail where module and libraries differ",
            RESTART,
        )
    elif flavour and facts.loaded_flavour not in (None, flavour):
        yield Finding(
            "DRIFT-LOADED",
            f"{facts.loaded_flavour} kernel modules are loaded, {flavour} ones are locked",
            "what was proven was the other flavour",
            RESTART,
        )


def fabric(facts: Facts) -> Iterable[Finding]:
    there = {name: package for name, package in facts.packages.items() if re.fullmatch(FABRIC, name)}
    for name, package in sorted(there.items()):
        driver = facts.loaded or expected_driver(facts)
        if driver and upstream(package.version) != driver:
            yield Finding(
                "DRIFT-FABRIC",
                f"{name} is {upstream(package.version)}, the driver is {driver}",
                "it starts with a driver of its own version alone, and without it no CUDA program starts",
                DRIVER,
            )
        elif facts.fabric_manager != "active":
            yield Finding(
                "DRIFT-FABRIC",
                f"nvidia-fabricmanager.service is {facts.fabric_manager}",
                "without it no CUDA program starts",
                "systemctl restart nvidia-fabricmanager.service",
            )


def unattended(facts: Facts) -> Iterable[Finding]:
    # A new kernel is a reboot without a driver where nothing builds its module.
    exposed = sorted(name for name in {*facts.pins, "linux-image-amd64"} if not left_out(name, facts.left_out))
    if facts.upgrades and exposed:
        yield Finding(
            "DRIFT-UNATTENDED",
            f"unattended-upgrades runs and may change {', '.join(exposed)}",
            "a driver or a kernel that changes by itself breaks the engines on it",
            f"{PLAYBOOKS}/site.yml --tags node_base",
        )


def reboot(facts: Facts) -> Iterable[Finding]:
    expected = expected_driver(facts)
    if expected and facts.module != expected:
        has = f"has the module of driver {facts.module}" if facts.module else "has no module of the driver"
        build = f"dkms autoinstall -k {facts.kernel}"
        yield Finding(
            "DRIFT-REBOOT",
            f"kernel {facts.kernel} boots next and {has}, {expected} is locked",
            "the node would come back without the driver that its engines need",
            build if facts.headers else f"apt-get install linux-headers-{facts.kernel} && {build}",
        )


def headers(facts: Facts) -> Iterable[Finding]:
    if expected_driver(facts) and not facts.headers:
        yield Finding(
            "DRIFT-HEADERS",
            f"kernel {facts.kernel} boots next and its headers are not installed",
            "no other driver can be built for it",
            f"apt-get install linux-headers-{facts.kernel}",
        )


def closed(facts: Facts) -> Iterable[Finding]:
    if facts.notice is not None:
        try:
            note = json.loads(facts.notice)
            found = f"{note['closed_by']} has closed it at {note['closed_at']}: {note['rule']}: {note['why']}"
        except (ValueError, LookupError, TypeError):
            found = f"it has closed itself, and {NOTICE} does not say why"
        yield Finding(
            "DRIFT-NOTICE",
            found,
            "it gets no requests, and nothing opens it by itself",
            f"{PLAYBOOKS}/operate/replace_node.yml -e node=NODE, or undrain_node.yml --limit NODE once it is over",
        )


def pinned_flavour(facts: Facts) -> Optional[str]:
    for name in facts.pins:
        for flavour, pattern in FLAVOURS.items():
            if re.fullmatch(pattern, name):
                return flavour
    return None


def pinned_driver(facts: Facts) -> Optional[str]:
    for name, version in facts.pins.items():
        if any(re.fullmatch(pattern, name) for pattern in FLAVOURS.values()):
            return upstream(version)
    return None


def expected_driver(facts: Facts) -> Optional[str]:
    """The driver this node is to have: as pinned; where the pins are gone, as installed."""
    packages = {name: package.version for name, package in facts.packages.items()}
    return pinned_driver(facts) or pinned_driver(facts._replace(pins=packages))


def upstream(version: str) -> str:
    """A Debian version without epoch and revision."""
    return version.rsplit("-", 1)[0].split(":", 1)[-1]


def left_out(name: str, expressions: Iterable[str]) -> bool:
    """Whether unattended-upgrades leaves a package alone: it matches from the beginning of the name."""
    for expression in expressions:
        try:
            if re.match(expression, name):
                return True
        except re.error:
            continue
    return False


def chosen_kernel(menu: str, environment: str) -> Optional[str]:
    """The kernel that GRUB was told to boot, for once or from now on; None where its menu's first entry boots."""
    values = dict(line.split("=", 1) for line in environment.splitlines() if "=" in line)
    entry = values.get("next_entry") or ('set default="${saved_entry}"' in menu and values.get("saved_entry")) or ""
    match = re.search(r"gnulinux-([^>]+)-advanced-[^>]*$", entry)
    return match.group(1) if match else None


def next_kernel(images: Iterable[str], running: str, chosen: Optional[str] = None) -> str:
    """The chosen kernel, else the newest that has an image, which GRUB boots then; the running one without any."""
    images = list(images)
    if chosen in images:
        return chosen

    def age(release: str) -> list:
        words = re.findall(r"\d+|[a-z]+", release)
        return [(int(word), "") if word.isdigit() else (-1, word) for word in words]

    return max((image for image in images if re.match(r"\d", image)), key=age, default=running)


def pins_of(text: str) -> dict[str, str]:
    """Packages and versions of the preferences that the role nvidia_packages writes."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.startswith("Package: "):
            name = line[len("Package: ") :]
        elif line.startswith("Pin: version ") and name:
            found[name] = line[len("Pin: version ") :]
    return found


def packages_of(text: str) -> dict[str, Package]:
    """What dpkg-query says, in the format of `gather`; without what is not there."""
    rows = (line.split("\t") for line in text.splitlines() if line.count("\t") == 3)
    return {
        name: Package(want, status, version)
        for name, want, status, version in rows
        if status not in ("not-installed", "config-files")
    }


def loaded_of(text: Optional[str]) -> tuple[Optional[str], Optional[str]]:
    """Version and flavour of the loaded module, from the file it keeps in /proc; only the open one says what it is."""
    if text is None:
        return None, None
    match = re.search(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)(?:\s|$)", text)
    return (match.group(1) if match else "unreadable"), "open" if "Open Kernel Module" in text else "proprietary"


def upgrades_of(settings: str, timer: str, package: Optional[Package]) -> tuple[bool, list[str]]:
    """Whether unattended-upgrades runs by itself, and what it leaves out; from apt-config and systemctl."""
    values = re.findall(r'^(\S+) "(.*)";$', settings, re.MULTILINE)
    every = dict(values).get("APT::Periodic::Unattended-Upgrade", "0")
    runs = package is not None and timer == "enabled" and every not in ("", "0")
    return runs, [value for key, value in values if key == "Unattended-Upgrade::Package-Blacklist::"]


def ask(*words: str) -> str:
    """What a tool says; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # dpkg-query ends with 1 where one of many patterns fits nothing, and systemctl has its answers as exit codes.
    return done.stdout.strip()


def read(path: Path) -> Optional[str]:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def gather(asked: Optional[str]) -> Facts:
    pins = pins_of(read(PINS) or "")
    shape = "--showformat=${Package}\\t${db:Status-Want}\\t${db:Status-Status}\\t${Version}\\n"
    packages = packages_of(ask("dpkg-query", "--show", shape, "*nvidia*", "unattended-upgrades", *sorted(pins)))
    version, flavour = loaded_of(read(LOADED))
    running = os.uname().release
    images = [path.name[len("vmlinuz-") :] for path in Path("/boot").glob("vmlinuz-*")]
    chosen = chosen_kernel(read(GRUB / "grub.cfg") or "", read(GRUB / "grubenv") or "")
    kernel = next_kernel(images, running, chosen)
    container = bool(ask("systemd-detect-virt", "--container").replace("none", ""))
    upgrades, left = upgrades_of(
        ask("apt-config", "dump"),
        ask("systemctl", "is-enabled", "apt-daily-upgrade.timer"),
        packages.get("unattended-upgrades"),
    )
    return Facts(
        asked=asked,
        pins=pins,
        packages=packages,
        loaded=version,
        loaded_flavour=flavour,
        kernel=kernel,
        module=ask("modinfo", *([] if kernel == running else ["-k", kernel]), "--field=version", "nvidia") or None,
        headers=container or Path("/lib/modules", kernel, "build").exists(),
        fabric_manager=ask("systemctl", "is-active", "nvidia-fabricmanager.service") or "unknown",
        upgrades=upgrades,
        left_out=left,
        notice=read(NOTICE),
    )


def look(asked: Optional[str] = None) -> dict[str, Any]:
    facts = gather(asked)
    return {
        "version": VERSION,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "loaded": facts.loaded,
        "locked": pinned_driver(facts),
        "next_kernel": facts.kernel,
        "next_module": facts.module,
        "findings": [finding._asdict() for finding in judge(facts)],
    }


def written() -> list[int]:
    """When that was last written which the path unit watches, and does not while a look is taken."""
    return [path.stat().st_mtime_ns for path in (DPKG, PINS.parent) if path.exists()]


def settled() -> dict[str, Any]:
    """A look during which no package changed; the last one, where they change for longer than a minute."""
    for _ in range(LOOKS):
        before = written()
        result = look()
        if written() == before:
            break
        time.sleep(BETWEEN_SECONDS)
    return result


def replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".new")
    half.write_text(text)
    half.replace(path)


def refusal(reason: str) -> str:
    """A part of a unit that nobody may start by hand. Below /run, so that it is gone with the boot that it refuses."""
    return (
        "# Written by gpuyard-drift.service. To reboot all the same:\n"
        f"#   {ALLOW} && systemctl reboot\n"
        "[Unit]\n"
        f"Description=Restart, refused by gpuyard ({reason.replace('%', '%%')})\n"
        "RefuseManualStart=yes\n"
    )


def guard(reason: Optional[str]) -> bool:
    """Refuse restarts for a reason, or let them through without one. Says whether that is a change."""
    changed = False
    for unit in RESTARTS:
        path = UNITS / f"{unit}.d" / "gpuyard-drift.conf"
        wanted = None if reason is None else refusal(reason)
        if read(path) == wanted:
            continue
        changed = True
        if wanted is None:
            path.unlink()
        else:
            replace(path, wanted)
    if changed:
        subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=90)
    return changed


def told(findings: Iterable[Mapping[str, str]], mark: str = "") -> None:
    for finding in findings:
        print(f"{mark}{Finding(**finding)}", flush=True)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    looking = verbs.add_parser("look")
    looking.add_argument("--json", action="store_true")
    looking.add_argument("--locked")
    verbs.add_parser("guard")
    verbs.add_parser("allow-reboot")
    given = parser.parse_args(words)
    if given.verb == "allow-reboot":
        print("restarts are allowed until the next look" if guard(None) else "no restart was refused")
        return 0
    if given.verb == "guard":
        result = settled()
        replace(RESULT, json.dumps(result, indent=2) + "\n")
        losing = [str(Finding(**finding)) for finding in result["findings"] if finding["rule"] == "DRIFT-REBOOT"]
        guard(losing[0] if losing else None)
        told(result["findings"], "<4>")  # the journal's mark of a warning
        return 0
    result = look(given.locked)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        told(result["findings"])
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
