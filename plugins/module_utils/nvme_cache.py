#!/usr/bin/python3
"""Local NVMe disks as one fast, empty-able file system: which disks, and what is to be done with them.

Disks are told by what they are (model, serial number), never by a name, which may be another after the next boot. What
they hold decides: blank ones are made a RAID0 with XFS, those that are one already are kept, and one that holds
anything else is refused unless its serial number is named. Cloud providers empty such disks when a machine is stopped;
so a unit runs this at each boot, before the mount, and makes again what was emptied.

As a program: `nvme_cache.py look|ensure --model PATTERN …` prints one JSON line and ends with 0; refused, it names the
rule and ends with 1. Runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARRAY = "gpuyard-nvme"
"""Name of the array, and label of the file system on it (XFS takes 12 characters)."""
DEVICE = f"/dev/md/{ARRAY}"
COLUMNS = "NAME,PATH,TYPE,SIZE,MODEL,SERIAL,RO,FSTYPE,PTTYPE,MOUNTPOINTS"
EDGE = 1024 * 1024
"""How many bytes at a disk's front are read to see whether it is blank where no signature is known."""


class NvmeError(Exception):
    """Refused. `rule` is its id, the text says what was found and what to do."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


@dataclass(frozen=True)
class Disk:
    """One disk of a wanted model."""

    path: str
    serial: str
    model: str
    size: int
    mounted: tuple[str, ...] = ()
    """Where it, or anything on it, is mounted; [SWAP] for swap."""
    holds: tuple[str, ...] = ()
    """What was found on it: signatures, partitions, data without either. Empty for a blank disk."""
    array: str = ""
    """UUID of our own array, if the disk is a member of one."""
    members: int = 0
    """How many disks that array was made of."""


@dataclass(frozen=True)
class Plan:
    """`none`: no such disk; `keep`: the array is whole; `make`: wipe what is named, make it anew of all disks."""

    action: str
    disks: tuple[Disk, ...]
    why: str
    wipe: tuple[Disk, ...] = field(default=())


# --- decide ------------------------------------------------------------------------------------------------------


def wanted(listed: Sequence[dict[str, Any]], models: Sequence[str]) -> list[dict[str, Any]]:
    """Of what `lsblk --json` lists, the disks whose model is one of the patterns; never one that carries the system."""
    found = []
    for device in listed:
        if device.get("type") != "disk" or device.get("ro") or not device.get("size"):
            continue
        if any(fnmatch.fnmatchcase(model_of(device), pattern) for pattern in models) and not carries_the_system(device):
            found.append(device)
    return found


def model_of(device: dict[str, Any]) -> str:
    """As `lsblk` lists it, without the blanks that firmware fills it up with."""
    return " ".join(str(device.get("model") or "").split())


def carries_the_system(device: dict[str, Any]) -> bool:
    system = ("/", "/boot", "/boot/efi", "/usr", "/var", "[SWAP]")
    return any(place in system for place in mounts(device))


def mounts(device: dict[str, Any]) -> list[str]:
    """Where a device and all that lies on it are mounted."""
    places = [place for place in device.get("mountpoints") or [] if place]
    for child in device.get("children") or []:
        places += mounts(child)
    return places


def decide(disks: Sequence[Disk], expected: int, consent: Sequence[str]) -> Plan:
    """What is to be done. `expected` is how many disks there must be, 0 for as many as there are."""
    told = tuple(sorted(disks, key=lambda disk: disk.serial))
    unknown = sorted(set(consent) - {disk.serial for disk in told})
    if unknown:
        raise NvmeError(
            "NVME-CONSENT",
            f"consent is given for {', '.join(unknown)}, and no local disk has that serial number; there are "
            f"{named(told) or 'none'}. Take it out",
        )
    if expected and len(told) != expected:
        raise NvmeError(
            "NVME-DISK-COUNT",
            f"{len(told)} local NVMe disks are there ({named(told) or 'none'}) and {expected} must be. Look for the "
            f"others with `lsblk` and `dmesg`, or set nvme_cache_disks to {len(told)}",
        )
    if not told:
        return Plan("none", (), "no disk of a wanted model")
    ours = [disk for disk in told if disk.array]
    foreign = [disk for disk in told if not disk.array and disk.holds]
    refused = [disk for disk in foreign if disk.serial not in consent]
    if refused:
        raise NvmeError(
            "NVME-DISK-USED",
            "; ".join(f"{disk.path} (serial {disk.serial}) holds {', '.join(disk.holds)}" for disk in refused)
            + ". Making a cache of it would lose that. Take the disk out of nvme_cache_models, or give consent for it: "
            f"nvme_cache_allow_data_loss: [{', '.join(disk.serial for disk in refused)}]",
        )
    busy = [disk for disk in foreign if disk.mounted]
    if busy:
        raise NvmeError(
            "NVME-DISK-MOUNTED",
            "; ".join(f"{disk.path} is mounted at {', '.join(disk.mounted)}" for disk in busy)
            + ". Unmount it first; consent alone does not pull a file system from under its users",
        )
    arrays = sorted({disk.array for disk in ours})
    if len(arrays) == 1 and len(ours) == ours[0].members and not set(consent) & {disk.serial for disk in told}:
        spare = len(told) - len(ours)
        why = f"the array of {len(ours)} is whole" + (f"; {spare} more are not in it" if spare else "")
        return Plan("keep", tuple(ours), why)
    lost = [disk for disk in ours if disk.serial not in consent]
    if lost and (len(arrays) > 1 or len(told) < lost[0].members):
        # No other disk is in the place of the one that is missing, and it may come back with its part of the data.
        raise NvmeError(
            "NVME-ARRAY-PART",
            f"{named(lost)} are part of an array of {lost[0].members} whose other disks are not there. Bring them "
            f"back, or give the rest up: nvme_cache_allow_data_loss: [{', '.join(disk.serial for disk in lost)}]",
        )
    if any(disk.mounted for disk in ours):
        raise NvmeError("NVME-DISK-MOUNTED", f"the broken array on {named(ours)} is still mounted. Unmount it first")
    why = "blank disks"
    if ours:
        why = f"{len(ours)} of {ours[0].members} disks are left of the array, so it cannot be read any more"
    elif foreign:
        why = "with consent to lose what is on " + named(foreign)
    return Plan("make", told, why, (*ours, *foreign))


def named(disks: Sequence[Disk]) -> str:
    return ", ".join(f"{disk.path} ({disk.serial})" for disk in disks)


# --- the rim -----------------------------------------------------------------------------------------------------


def run(*words: str, check: bool = True) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NvmeError("NVME-TOOLS", f"there is no {words[0]} on this node. Run the role's `install`") from None
    if check and done.returncode:
        said = " ".join(done.stderr.split()) or f"it ended with {done.returncode}"
        raise NvmeError("NVME-TOOL", f"`{' '.join(words)}`: {said}. Look at `dmesg`")
    return done.stdout


def look(models: Sequence[str]) -> list[Disk]:
    """The disks of this machine, and what each holds."""
    if run("systemd-detect-virt", "--container", check=False).strip() not in ("", "none"):
        return []  # it sees its host's disks and has none of its own
    listed = json.loads(run("lsblk", "--json", "--bytes", "--output", COLUMNS))["blockdevices"]
    return [looked_at(device) for device in wanted(listed, models)]


def looked_at(device: dict[str, Any]) -> Disk:
    path = str(device["path"])
    signatures = run("wipefs", "--noheadings", "--output", "TYPE", path).split()
    holds = list(dict.fromkeys(signatures))
    array, members = "", 0
    if "linux_raid_member" in holds:
        told = run("mdadm", "--examine", "--export", path, check=False)
        facts = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
        # The name has the host's in front of it where one was given.
        if facts.get("MD_NAME", "").split(":")[-1] == ARRAY:
            array, members = facts.get("MD_UUID", ""), int(facts.get("MD_DEVICES", "0"))
    partitions = [child for child in device.get("children") or [] if child.get("type") == "part"]
    if partitions:
        holds.append(f"{len(partitions)} partitions")
    if not holds:
        with Path(path).open("rb") as disk:
            if disk.read(EDGE).strip(b"\0"):
                holds.append("data without a known signature")
    return Disk(
        path=path,
        serial=str(device.get("serial") or "").strip(),
        model=model_of(device),
        size=int(device["size"]),
        mounted=tuple(mounts(device)),
        holds=tuple(holds),
        array=array,
        members=members,
    )


def settle() -> None:
    run("udevadm", "settle", "--timeout=30", check=False)


def stop_arrays(disks: Sequence[Disk]) -> None:
    """A member is busy until its array is stopped, also where the array never came to be whole."""
    for disk in disks:
        for holder in run("lsblk", "--noheadings", "--list", "--output", "PATH,TYPE", disk.path).splitlines():
            path, kind = holder.split()
            if kind.startswith(("raid", "md", "linear")):
                run("mdadm", "--stop", path)


def carry_out(plan: Plan) -> bool:
    """Make it so; whether anything was changed. Killed anywhere, the next run goes on."""
    paths = [disk.path for disk in plan.disks]
    changed = plan.action == "make"
    if changed:
        stop_arrays(plan.wipe)
        for disk in plan.wipe:
            run("wipefs", "--all", "--force", disk.path)
        create = ["mdadm", "--create", DEVICE, "--run", "--force", "--metadata=1.2", "--level=0", "--homehost=any"]
        run(*create, f"--name={ARRAY}", f"--raid-devices={len(paths)}", *paths)
    elif not device_of(paths):
        run("mdadm", "--assemble", "--run", DEVICE, *paths)
    settle()
    device = device_of(paths)
    if device is None:
        raise NvmeError("NVME-TOOL", f"the array of {', '.join(paths)} did not come up. Look at `dmesg`")
    # Also where a run was killed between the array and its file system. A new array lies on disks that may hold the
    # remains of an older one's file system at the same place.
    if changed or "xfs" not in run("wipefs", "--noheadings", "--output", "TYPE", device).split():
        run("mkfs.xfs", "-q", "-f", "-L", ARRAY, device)
        settle()
        changed = True
    return changed


def device_of(paths: Sequence[str]) -> str | None:
    """The array that is active on these disks."""
    words = ("lsblk", "--noheadings", "--list", "--output", "PATH,TYPE", *paths)
    found = {line.split()[0] for line in run(*words).splitlines() if line.split()[1].startswith("raid")}
    return found.pop() if len(found) == 1 else None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="nvme_cache.py", description="Local NVMe disks as one file system.")
    parser.add_argument("verb", choices=["look", "ensure"])
    parser.add_argument("--model", action="append", required=True, help="pattern of a disk's model")
    parser.add_argument("--disks", type=int, default=0, help="how many there must be")
    parser.add_argument("--wait", type=float, default=0, help="seconds that disks may take to appear")
    parser.add_argument("--allow-data-loss", action="append", default=[], metavar="SERIAL")
    told = parser.parse_args(arguments)
    deadline = time.monotonic() + told.wait
    try:
        disks = look(told.model)
        while len(disks) < told.disks and time.monotonic() < deadline:
            time.sleep(1)
            disks = look(told.model)
        plan = decide(disks, told.disks, told.allow_data_loss)
        changed = carry_out(plan) if told.verb == "ensure" and plan.action != "none" else False
    except NvmeError as refused:
        print(refused, file=sys.stderr)
        return 1
    answer = {"action": plan.action, "why": plan.why, "changed": changed}
    answer["disks"] = [{"path": d.path, "serial": d.serial, "model": d.model, "size": d.size} for d in plan.disks]
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
