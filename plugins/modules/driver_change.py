#!/usr/bin/python
"""Whether the driver of a node can be changed, asked before anything is done to the node."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import time
from pathlib import Path
from typing import Any, Callable, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.dpkg import QUERY, parse_broken, parse_held
from ansible_collections.gpuyard.fleet.plugins.module_utils.driver_change import findings

DOCUMENTATION = r"""
module: driver_change
short_description: Refuse a node whose driver cannot be changed now
description:
  - Looks at what would stop a change of the driver half-way, and refuses the node with everything that was found, each
    by its rule. Looks only.
options:
  node:
    description: Name of the node, for the messages.
    type: str
    required: true
  target:
    description: The driver to come to, with C(version) and C(packages).
    type: dict
    required: true
  previous:
    description: The driver to go back to, with C(version) and C(packages).
    type: dict
    required: true
  needs:
    description: Oldest driver that each engine of the node runs on.
    type: dict
    default: {}
  users:
    description: Units (shell patterns) that may hold a GPU, because the change stops them.
    type: list
    elements: str
    default: []
  free_mib:
    description: Space in MiB that must be free below each folder.
    type: dict
    default: {}
  lock_seconds:
    description: How long to wait for another package manager before it is named.
    type: int
    default: 300
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Looks only.}
"""

EXAMPLES = r"""
- name: Refuse a node whose driver cannot be changed now
  gpuyard.fleet.driver_change:
    node: lab-chat-0
    target: {version: 580.126.20, packages: {libnvidia-ml1: 580.126.20-1}}
    previous: {version: 580.105.08, packages: {libnvidia-ml1: 580.105.08-1}}
    users: ["vllm@*.service", nvidia-persistenced.service]
"""

RETURN = r"""
facts:
  description: What was found on the node.
  returned: always
  type: dict
"""

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
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def command_of(pid: int, root: Path = Path("/")) -> str:
    try:
        return (root / f"proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process that has ended"


def lock_holder(path: str) -> Optional[int]:
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


def wait_for_locks(seconds: int, paths: tuple[str, ...] = LOCKS) -> Optional[dict[str, Any]]:
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


def gpu_users(root: Path = Path("/")) -> dict[int, dict[str, Any]]:
    """Every process with an open device of a GPU: pid, command, systemd unit."""
    found: dict[int, dict[str, Any]] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            targets = [str(entry.readlink()) for entry in (folder / "fd").iterdir()]
            cgroup = (folder / "cgroup").read_text()
        except OSError:
            continue  # ended meanwhile
        if any(target.startswith("/dev/nvidia") for target in targets):
            pid = int(folder.name)
            units = re.findall(r"/([^/\n]+\.(?:service|scope))", cgroup)
            found[pid] = {"pid": pid, "command": command_of(pid, root), "unit": units[-1] if units else ""}
    return found


def lasting(look: Callable[[], dict[int, dict[str, Any]]], wait: Callable[[], None]) -> list[dict[str, Any]]:
    """Those that two looks see: a probe that asks a GPU for its temperature is gone at the second."""
    before = look()
    if not before:
        return []
    wait()
    return [user for pid, user in sorted(look().items()) if pid in before]


def free_mib(folder: str, root: Path = Path("/")) -> int:
    """Of the file system that the folder is on, or would be."""
    path = root / folder.lstrip("/")
    while not path.exists():
        path = path.parent
    told = os.statvfs(path)
    return told.f_bavail * told.f_frsize >> 20


def secure_boot(root: Path = Path("/")) -> bool:
    """Whether the firmware enforces it; four bytes of attributes stand before the value."""
    try:
        return (root / SECURE_BOOT).read_bytes()[4:5] == b"\x01"
    except OSError:
        return False


def gathered(module: AnsibleModule) -> dict[str, Any]:
    given = module.params
    kernel = os.uname().release
    container = module.run_command(["systemd-detect-virt", "--container", "--quiet"])[0] == 0
    lock = wait_for_locks(given["lock_seconds"])
    # Without a pattern dpkg-query leaves out what is held and not there.
    packages = module.run_command(["dpkg-query", "--show", "--showformat=" + QUERY, "*"], check_rc=True)[1]
    facts: dict[str, Any] = {
        "container": container,
        "kernel": kernel,
        "lock": lock,
        # Who is at work has packages that are not done yet.
        "unfinished": {} if lock else parse_broken(packages),
        "held": sorted(parse_held(packages)),
        "free_mib": {
            folder: free_mib(folder)
            for folder in given["free_mib"]
            if not (container and folder in ("/boot", "/lib/modules"))
        },
        "gpu_users": lasting(gpu_users, lambda: time.sleep(2)),
    }
    if not container:
        policy = module.run_command(["apt-cache", "policy", f"linux-headers-{kernel}"], environ_update={"LC_ALL": "C"})[
            1
        ]
        key = next((key for key in KEYS if Path(key).is_file()), "")
        facts["headers"] = Path(f"/lib/modules/{kernel}/build").exists()
        facts["headers_offered"] = bool(re.search(r"Candidate: (?!\(none\))", policy))
        facts["secure_boot"] = secure_boot()
        facts["key"] = key
        # mokutil's exit status differs between versions; its words do not.
        tested = module.run_command(["sh", "-c", 'mokutil --test-key "$1"', "-", key])[1] if key else ""
        facts["key_enrolled"] = "is already enrolled" in tested
    return facts


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "target": {"type": "dict", "required": True},
            "previous": {"type": "dict", "required": True},
            "needs": {"type": "dict", "default": {}},
            "users": {"type": "list", "elements": "str", "default": []},
            "free_mib": {"type": "dict", "default": {}},
            "lock_seconds": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    facts = gathered(module)
    found = findings(module.params, facts)
    if found:
        module.fail_json(msg=". ".join(found), facts=facts)
    module.exit_json(changed=False, facts=facts)


if __name__ == "__main__":
    main()
