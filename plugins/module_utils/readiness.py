"""Whether a node may be changed at all: what its package manager, its disks and its firmware say, asked and judged.

Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.dpkg import QUERY, parse_broken, parse_held

# apt takes them in this order; who holds one of them keeps a transaction waiting.
LOCKS = (
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
)
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid

# Where Debian's and Ubuntu's DKMS keep the key that they sign modules with.
KEYS = ("/var/lib/dkms/mok.pub", "/var/lib/shim-signed/mok/MOK.der")
# Where packages and the roles that bring them write, and of a machine its modules and boot loader too.
WRITTEN = ("/etc", "/usr", "/var")
WRITTEN_ON_A_MACHINE = (*WRITTEN, "/boot", "/lib/modules")
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


# --- judged: each with its rule, what is asked, what is there, and the smallest change that passes ---


def unfinished(what: str, node: str, facts: Mapping[str, Any]) -> list[str]:
    if not facts["unfinished"]:
        return []
    names = ", ".join(f"{name} ({status})" for name, status in sorted(facts["unfinished"].items()))
    return [
        f"APT-DPKG-BROKEN: {what} is asked for on {node}, where dpkg is not done with {names}. End it there with "
        "`dpkg --configure -a`; `dpkg --audit` says more"
    ]


def locked(node: str, facts: Mapping[str, Any]) -> list[str]:
    if not facts["lock"]:
        return []
    lock = facts["lock"]
    return [
        f"APT-LOCKED: the packages of {node} are to be changed, and {lock['command']} (pid {lock['pid']}) holds "
        f"{lock['path']} for {lock['waited']} s and more. Wait until it has ended, or end it, then run this again"
    ]


def unwritable(what: str, node: str, facts: Mapping[str, Any]) -> list[str]:
    if not facts["read_only"]:
        return []
    folders = ", ".join(facts["read_only"])
    return [
        f"APT-READ-ONLY: {what} is asked for on {node}, and the file system of {folders} is mounted read-only there. "
        "`journalctl --dmesg` says whether a disk failed: mend that first; else `mount -o remount,rw` it"
    ]


def too_full(kind: str, asked: Mapping[str, Any], facts: Mapping[str, Any], variable: str) -> list[str]:
    """`kind`: driver or kernel; `variable`: the one that asks for less."""
    # In a container the kernel and its modules are the host's, and are not measured.
    return [
        f"{kind.upper()}-DISK: {least} MiB are asked for below {folder} of {asked['node']} before its {kind} is "
        f"changed, and {facts['free_mib'][folder]} MiB are free. Free some, or ask for less where you know better "
        f"({variable})"
        for folder, least in sorted(asked["free_mib"].items())
        if folder in facts["free_mib"] and facts["free_mib"][folder] < least
    ]


def unsigned(kind: str, node: str, facts: Mapping[str, Any]) -> list[str]:
    if not facts["secure_boot"] or facts["key_enrolled"]:
        return []
    return [
        f"{kind.upper()}-SECURE-BOOT: {node} has Secure Boot on and would refuse modules that are built there: the key "
        f"of DKMS ({facts['key'] or 'none is there'}) is not enrolled. Enrol it (`mokutil --import`, then a reboot "
        "with somebody at the console), or turn Secure Boot off"
    ]


# --- asked ---


def command_of(pid: int, root: Path = Path("/")) -> str:
    try:
        return (root / f"proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process that has ended"


def lock_holder(path: str) -> int | None:
    """Pid of the process that holds a lock as dpkg takes it; only asks, and takes nothing."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else pid
    finally:
        os.close(handle)


def wait_for_locks(seconds: int, paths: tuple[str, ...] = LOCKS) -> dict[str, Any] | None:
    """Who still holds a lock of the package manager after so many seconds, or None."""
    until = time.monotonic() + seconds
    while True:
        held = [(path, pid) for path in paths for pid in [lock_holder(path)] if pid is not None]
        if not held:
            return None
        if time.monotonic() >= until:
            path, pid = held[0]
            return {"path": path, "pid": pid, "command": command_of(pid), "waited": seconds}
        time.sleep(0.5)


def file_system(folder: str, root: Path = Path("/")) -> os.statvfs_result:
    """What the folder is on, or would be."""
    path = root / folder.lstrip("/")
    while not path.exists():
        path = path.parent
    return os.statvfs(path)


def free_mib(folder: str, root: Path = Path("/")) -> int:
    told = file_system(folder, root)
    return told.f_bavail * told.f_frsize >> 20


def read_only(folders: Sequence[str], root: Path = Path("/")) -> list[str]:
    """Of the folders, those on a file system that is mounted read-only."""
    return [folder for folder in folders if file_system(folder, root).f_flag & os.ST_RDONLY]


def secure_boot(root: Path = Path("/")) -> bool:
    """Whether the firmware enforces it; four bytes of attributes stand before the value."""
    try:
        return (root / SECURE_BOOT).read_bytes()[4:5] == b"\x01"
    except OSError:
        return False


def readiness(module: Any, lock_seconds: int, folders: Sequence[str]) -> dict[str, Any]:
    """What an AnsibleModule finds: container, kernel, lock, unfinished, held, read_only, free_mib, and of a machine
    secure_boot, key and key_enrolled."""
    container = module.run_command(["systemd-detect-virt", "--container", "--quiet"])[0] == 0
    lock = wait_for_locks(lock_seconds)
    # Without a pattern dpkg-query leaves out what is held and not there.
    packages = module.run_command(["dpkg-query", "--show", "--showformat=" + QUERY, "*"], check_rc=True)[1]
    facts: dict[str, Any] = {
        "container": container,
        "kernel": os.uname().release,
        "lock": lock,
        # Who is at work has packages that are not done yet.
        "unfinished": {} if lock else parse_broken(packages),
        "held": sorted(parse_held(packages)),
        "read_only": read_only(WRITTEN if container else WRITTEN_ON_A_MACHINE),
        "free_mib": {
            folder: free_mib(folder) for folder in folders if not (container and folder in ("/boot", "/lib/modules"))
        },
    }
    if not container:
        key = next((key for key in KEYS if Path(key).is_file()), "")
        facts["secure_boot"] = secure_boot()
        facts["key"] = key
        # mokutil's exit status differs between versions; its words do not.
        tested = module.run_command(["sh", "-c", 'mokutil --test-key "$1"', "-", key])[1] if key else ""
        facts["key_enrolled"] = "is already enrolled" in tested
    return facts
