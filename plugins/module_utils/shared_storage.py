"""Shared file systems on a node: how each kind is mounted and why, which units carry it, what is refused.

Pure: what a node is like is handed in. A mount is carried by a unit of systemd; one that comes over the network also by
an automount unit, so that nothing waits for it but who reads it. Runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "# Ansible managed: gpuyard.fleet.shared_storage"
"""First line of every unit of ours: what has it may be removed when it is asked for no more."""


@dataclass(frozen=True)
class Option:
    """One option of mount(8), or one setting of a unit (then `section` says where it stands)."""

    text: str
    why: str
    source: str
    section: str = "Options"
    shown: str | None = None
    """How the kernel shows it once it is mounted; None: as it is written, "": not at all, or as the server has it."""


@dataclass(frozen=True)
class Kind:
    """How one kind of file system is mounted."""

    fstype: str
    network: bool
    options: tuple[Option, ...]
    packages: tuple[str, ...] = ()
    """Debian packages that bring its program of mount(8)."""
    helper: str = ""
    """That program, where it has one."""


NFS5, MOUNT8, LUSTRE8 = "nfs(5), nfs-utils 2.6", "mount(8), util-linux 2.38", "mount.lustre(8), Lustre 2.15"
EFS = "Amazon EFS User Guide, Mount settings used by EFS mount helper, read 2026-11-29"
FSX = "FSx for Lustre User Guide, Mounting from an Amazon EC2 instance, read 2026-11-29"
UNITS = "systemd.mount(5) and systemd.unit(5), systemd 252"

NO_DEVICES = Option("nodev", "models and logs need no device files, and others write there too", MOUNT8)
NO_SETUID = Option("nosuid", "no program of another machine gets more rights here than who starts it", MOUNT8)
HARD = Option(
    "hard", "who reads waits for a server that is away; soft gives him errors, and may lose what was written", NFS5
)
NO_RETRY = Option(
    "retry=0", "mount.nfs tries once: the next access tries again, and until then nobody hangs", NFS5, shown=""
)
NO_ATIME = Option("noatime", "reading a model is no reason to write", MOUNT8)

KINDS = {
    "nfs": Kind("nfs", True, (HARD, NO_RETRY, NO_DEVICES, NO_SETUID), ("nfs-common",), "mount.nfs"),
    "efs": Kind(
        "nfs4",
        True,
        (
            Option("nfsvers=4.1", "what EFS is mounted with on Linux", EFS, shown="vers=4.1"),
            Option("rsize=1048576", "the largest read, for throughput", EFS, shown=""),
            Option("wsize=1048576", "the largest write, for throughput", EFS, shown=""),
            HARD,
            Option("timeo=600", "a minute before a request is sent again: sooner slows a busy file system down", EFS),
            Option("retrans=2", "how often before the client recovers the connection", EFS),
            Option(
                "noresvport", "a new port for a new connection, so that a mount outlives a change of the network", EFS
            ),
            NO_RETRY,
            NO_DEVICES,
            NO_SETUID,
        ),
        ("nfs-common",),
        "mount.nfs4",
    ),
    "lustre": Kind(
        "lustre",
        True,
        (
            Option(
                "flock",
                "locks hold between nodes; without it they are refused, and libraries fail",
                f"{FSX}; {LUSTRE8}",
            ),
            NO_ATIME,
            NO_DEVICES,
            NO_SETUID,
        ),
        helper="mount.lustre",
    ),
    "bind": Kind(
        "none",
        False,
        (Option("bind", "a folder of this node at another place", MOUNT8, shown=""), NO_ATIME, NO_DEVICES, NO_SETUID),
    ),
}

SETTINGS = (
    Option("DefaultDependencies=no", "no target of the boot waits for it, as with nofail in fstab", UNITS, "Unit"),
    Option("Conflicts=umount.target", "unmounted when the machine goes down", UNITS, "Unit"),
    Option("Before=umount.target", "and that is waited for", UNITS, "Unit"),
)
NETWORK_SETTINGS = (
    Option("Wants=network-online.target", "it needs the network, as with _netdev in fstab", UNITS, "Unit"),
    Option(
        "After=network-online.target remote-fs-pre.target",
        "mounted after the network is there, and unmounted before it goes",
        UNITS,
        "Unit",
    ),
    Option(
        "StartLimitIntervalSec=0",
        "a server that was away for an hour is tried again; after five tries the automount would be given up for good",
        "systemd.unit(5), StartLimitIntervalSec; systemd/systemd#16811",
        "Unit",
    ),
    Option("ForceUnmount=yes", "a server that is away does not hold up a shutdown", UNITS, "Mount"),
)


@dataclass(frozen=True)
class Mount:
    """One shared file system as the fleet asks for it."""

    kind: str
    source: str
    """As mount(8) takes it: server:/path, or for bind a folder of the node."""
    path: str
    read_only: bool = False
    required: bool = False
    """Whether engines do not start without it."""


@dataclass(frozen=True)
class Node:
    """What a node is like, as far as mounts go."""

    mountinfo: str = ""
    """/proc/self/mountinfo."""
    fstab: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    """Text of each mount and automount unit in /etc/systemd/system, by its name."""
    below: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What lies at each wanted path where nothing is mounted."""
    folders: Sequence[str] = ()
    """Which of the sources of bind mounts are folders."""
    missing: Sequence[str] = ()
    """File system types that the kernel cannot mount, and programs of mount(8) that are not there."""
    autofs: bool = True
    """Whether the kernel lets systemd mount at the first access; a container's does not."""


MOUNTS = {
    "type": "list",
    "elements": "dict",
    "required": True,
    "options": {
        "kind": {"type": "str", "choices": list(KINDS), "required": True},
        "source": {"type": "str", "required": True},
        "path": {"type": "path", "required": True},
        "read_only": {"type": "bool", "default": False},
        "required": {"type": "bool", "default": False},
    },
}
"""What a module takes as its C(mounts)."""


def mounts_of(given: Sequence[Mapping[str, Any]]) -> list[Mount]:
    """Of C(mounts) as they were given to a module."""
    return [Mount(**{**mount, "path": mount["path"].rstrip("/")}) for mount in given]


# --- decide ------------------------------------------------------------------------------------------------------


def unit_of(path: str, suffix: str = "mount") -> str:
    """Name of the unit for a path, as `systemd-escape --path` gives it."""
    plain = string.ascii_letters + string.digits + ":_."
    parts = []
    for number, byte in enumerate("/".join(filter(None, path.split("/"))).encode()):
        char = chr(byte)
        kept = char in plain and not (char == "." and number == 0)
        parts.append("-" if char == "/" else char if kept else f"\\x{byte:02x}")
    return f"{''.join(parts) or '-'}.{suffix}"


def options_of(mount: Mount) -> tuple[Option, ...]:
    """Every option of mount(8) for it, each with its reason."""
    asked = Option("ro", "asked for", "the fleet") if mount.read_only else Option("rw", "asked for", "the fleet")
    return (*KINDS[mount.kind].options, asked)


def settings_of(mount: Mount, seconds: int) -> tuple[Option, ...]:
    """Every setting of its mount unit beside what, where and how, each with its reason."""
    limit = Option(f"TimeoutSec={seconds}", "whoever waits for it learns by then that it does not come", UNITS, "Mount")
    return (*SETTINGS, *(NETWORK_SETTINGS if KINDS[mount.kind].network else ()), limit)


def units_for(mount: Mount, autofs: bool, seconds: int) -> dict[str, str]:
    """Text of each unit by its name. Without autofs the mount itself is started with the machine, awaited by none."""
    kind = KINDS[mount.kind]
    lazily = kind.network and autofs
    settings, options = settings_of(mount, seconds), options_of(mount)

    def section(name: str) -> list[str]:
        return [line for setting in settings if setting.section == name for line in (f"# {setting.why}", setting.text)]

    lines = [MARK, "[Unit]", f"Description=Shared storage at {mount.path}", *section("Unit"), "", "[Mount]"]
    lines += [f"What={mount.source}", f"Where={mount.path}", f"Type={kind.fstype}"]
    lines += [f"# {option.text}: {option.why}" for option in options]
    lines += [f"Options={','.join(option.text for option in options)}", *section("Mount")]
    wanted = ["", "[Install]", "WantedBy=multi-user.target"]
    texts = {unit_of(mount.path): "\n".join([*lines, *([] if lazily else wanted), ""])}
    if lazily:
        # No order after the network here: the mount has it, and an automount that had it too could wait for itself.
        lines = [MARK, "[Unit]", f"Description=Shared storage at {mount.path}, mounted at the first access"]
        lines += ["", "[Automount]", f"Where={mount.path}", *wanted, ""]
        texts[unit_of(mount.path, "automount")] = "\n".join(lines)
    return texts


def stale_units(mounts: Sequence[Mount], node: Node, seconds: int) -> list[str]:
    """Units of ours that nobody asks for any more; automounts first, for they would mount again."""
    wanted = {name for mount in mounts for name in units_for(mount, node.autofs, seconds)}
    return sorted(name for name, text in node.units.items() if text.startswith(MARK) and name not in wanted)


# --- refuse ------------------------------------------------------------------------------------------------------


def refusals(mounts: Sequence[Mount], node: Node) -> list[str]:
    """Everything that keeps the mounts from being made, each with its rule and the smallest change."""
    found: list[str] = []
    for number, mount in enumerate(mounts):
        found += _of_each_other(mount, mounts[:number])
        others = [name for name in (unit_of(mount.path), unit_of(mount.path, "automount")) if name in node.units]
        foreign = [name for name in others if not node.units[name].startswith(MARK)]
        there = mounted_at(mount.path, node.mountinfo)
        if foreign:
            text = f"{foreign[0]} is another's unit for {mount.path}. Take another path, or remove that unit"
            found.append(f"STORAGE-UNIT: {text}")
        elif line := in_fstab(mount.path, node.fstab):
            text = (
                f"/etc/fstab has `{line}` for {mount.path}, and a mount has one owner. Remove the line, or this mount"
            )
            found.append(f"STORAGE-FSTAB: {text}")
        elif there and not others:
            text = (
                f"{there.fstype} of {there.source} is mounted at {mount.path} already. Unmount it, or take another path"
            )
            found.append(f"STORAGE-MOUNTED: {text}")
        elif not there and node.below.get(mount.path):
            names = ", ".join(node.below[mount.path][:3])
            text = f"{mount.path} is not empty ({names}), and the mount would hide that. Move it, or take another path"
            found.append(f"STORAGE-PATH: {text}")
        found += _of_what_is_missing(mount, node)
    return found


def _of_each_other(mount: Mount, before: Sequence[Mount]) -> list[str]:
    for other in before:
        if f"{mount.path}/".startswith(f"{other.path}/") or f"{other.path}/".startswith(f"{mount.path}/"):
            text = f"{mount.path} and {other.path} lie in one another. Put them side by side"
            return [f"STORAGE-NESTED: {text}"]
    return []


def _of_what_is_missing(mount: Mount, node: Node) -> list[str]:
    kind = KINDS[mount.kind]
    if mount.kind == "bind" and mount.source not in node.folders:
        text = (
            f"{mount.source}, which is to be seen at {mount.path}, is no folder of this node. Make it, or name another"
        )
        return [f"STORAGE-SOURCE: {text}"]
    if kind.fstype in node.missing:
        text = (
            f"the running kernel cannot mount {kind.fstype} ({mount.source}). Install the client that is built for it, "
            "or start a kernel that has one; a client's modules are for one kernel alone, so they belong into the image"
        )
        return [f"STORAGE-CLIENT: {text}"]
    if kind.helper in node.missing and not kind.packages:
        text = f"there is no {kind.helper} for {mount.source}. Install the client's programs; no distribution has them"
        return [f"STORAGE-CLIENT: {text}"]
    return []


# --- read what a node says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mounted:
    """What is mounted at a path, topmost."""

    fstype: str
    source: str
    options: tuple[str, ...]


def mounted_at(path: str, mountinfo: str) -> Mounted | None:
    """What is on top at a path, or None. An automount that nobody has used yet is of type autofs."""
    found = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(" "), after.split(" ")
        if len(words) > 5 and len(rest) > 2 and _unescaped(words[4]) == path:
            options = tuple(dict.fromkeys([*words[5].split(","), *rest[2].split(",")]))
            found = Mounted(rest[0], _unescaped(rest[1]), options)
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), text)


def in_fstab(path: str, fstab: str) -> str:
    """The line of fstab(5) for a path, or nothing."""
    for line in fstab.splitlines():
        words = line.split()
        if len(words) > 1 and not line.lstrip().startswith("#") and _unescaped(words[1]).rstrip("/") == path:
            return " ".join(words)
    return ""


# --- judge what was mounted --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came of using a mount."""

    seconds: float | None
    """How long it took; None where it did not end in time."""
    error: str = ""
    """In the kernel's words."""
    same: bool = True
    """Of a bind mount: whether its folder is seen at its path."""
    kept: bool = True
    """Whether what was written was read back."""
    write_mb_s: float | None = None
    read_mb_s: float | None = None


def judge(mount: Mount, there: Mounted | None, answer: Answer) -> list[str]:
    """Why a mount is not what the fleet asks for; nothing where it is."""
    unit, place = unit_of(mount.path), f"{mount.path} ({mount.source})"
    again = f"Empty the node, then `systemctl restart '{unit}'`"
    if answer.seconds is None:
        # Also of one that is mounted: a hard mount waits for its server as long as it takes.
        return [f"STORAGE-NO-ANSWER: {place} did not answer in time. See whether its server is up and can be reached"]
    if there is None or there.fstype == "autofs":
        said = f" ({answer.error})" if answer.error else ""
        return [f"STORAGE-NOT-MOUNTED: {place} is not mounted{said}. `journalctl -u '{unit}'` says why"]
    if answer.error:
        return [f"STORAGE-ERROR: {place}: {answer.error}. See whether its server lets this node do that"]
    if not _is_it(mount, there) or not answer.same:
        return [f"STORAGE-OTHER: at {mount.path} is {there.fstype} of {there.source}, not {mount.source}. {again}"]
    found = []
    shown = [option.text if option.shown is None else option.shown for option in options_of(mount)]
    if lacking := [option for option in shown if option and option not in there.options]:
        found.append(f"STORAGE-OPTIONS: {place} is mounted without {', '.join(lacking)}. {again}")
    if not answer.kept:
        found.append(
            f"STORAGE-LOST: what was written to {place} was not what was read. Take it out of service, and look there"
        )
    return found


LEAST_SHARE = 0.5
"""Of the rate that was once measured, what is still no fault. Chosen here on 2026-11-29: others use the server too, and
rates differ by tens of percent from run to run; a mount that fell back to a slower way loses more. Verified nowhere."""


def slower(path: str, answer: Answer, before: Mapping[str, float]) -> list[str]:
    """Rates, in MB/s, that are far below those of `before`: `write_mb_s` and `read_mb_s` of the same mount."""
    now = {"write_mb_s": answer.write_mb_s, "read_mb_s": answer.read_mb_s}
    found = []
    for name, rate in now.items():
        if rate is not None and rate < before.get(name, 0) * LEAST_SHARE:
            found.append(
                f"STORAGE-SLOW: {path} has {name} {rate:g}, and had {before[name]:g}. Look whether others use it now, "
                "and which way it is reached; if it is to stay so, measure anew: -e verify_storage_anew=true"
            )
    return found


def _is_it(mount: Mount, there: Mounted) -> bool:
    if mount.kind == "bind":
        return True  # the kernel shows the file system that the folder is on
    if mount.kind == "lustre":
        # The kernel shows addresses where names were given.
        return there.fstype == "lustre" and there.source.rpartition(":")[2] == mount.source.rpartition(":")[2]
    return there.fstype in ("nfs", "nfs4") and there.source.rstrip("/") == mount.source.rstrip("/")
