#!/usr/bin/python
"""Use each shared file system of a node, and say whether it is what the fleet asks for."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.shared_storage import (
    MOUNTS,
    Answer,
    Mount,
    judge,
    mounted_at,
    mounts_of,
    slower,
)

DOCUMENTATION = r"""
module: shared_storage_proof
short_description: Use each shared file system of a node
description:
  - Mounts what is mounted at the first access and lists it. Where O(mib) is given and it may be written, a file is
    written, read back, compared and removed.
  - A file system that does not answer holds up nobody longer than O(seconds).
options:
  mounts:
    description: The shared file systems, as C(shared_storage_info) takes them.
    type: list
    elements: dict
    required: true
  seconds:
    description: How long one file system may take for all of it.
    type: int
    required: true
  mib:
    description: Size of the file that is written and read, in MiB. 0 writes nothing.
    type: int
    default: 0
  repeats:
    description: How often it is written and read. The best of all counts, for others use the server too.
    type: int
    default: 1
  before:
    description: By path, C(write_mb_s) and C(read_mb_s) of an earlier run. A rate far below is refused.
    type: dict
    default: {}
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Writes nothing then.}
"""

EXAMPLES = r"""
- name: Write and read a quarter of a GiB on each
  gpuyard.fleet.shared_storage_proof:
    mounts: "{{ shared_storage_mounts }}"
    seconds: 120
    mib: 256
"""

RETURN = r"""
proofs:
  description: What came of each, by its path.
  returned: success
  type: dict
refused:
  description: Why a file system is not what the fleet asks for.
  returned: success
  type: list
  elements: str
"""

BLOCK = 1024 * 1024
MOUNTINFO = Path("/proc/self/mountinfo")


def use(mount: Mount, mib: int, repeats: int) -> Answer:
    """All of it, however long it takes."""
    began = time.monotonic()
    try:
        with os.scandir(mount.path) as entries:
            next(entries, None)
        there = mounted_at(mount.path, MOUNTINFO.read_text())
        same = mount.kind != "bind" or Path(mount.source).samefile(mount.path)
        if not mib or mount.read_only or there is None:
            return Answer(time.monotonic() - began, same=same)
        runs = [written_and_read(Path(mount.path), mib) for _ in range(repeats)]
        kept, write, read = all(run[0] for run in runs), max(run[1] for run in runs), max(run[2] for run in runs)
        return Answer(time.monotonic() - began, same=same, kept=kept, write_mb_s=write, read_mb_s=read)
    except OSError as wrong:
        return Answer(time.monotonic() - began, error=f"{wrong.strerror}: {wrong.filename or mount.path}")


def written_and_read(folder: Path, mib: int) -> tuple[bool, float, float]:
    """Whether all was kept, and how fast it went both ways, in MB/s."""
    name = f".gpuyard-proof-{socket.gethostname()}"
    for left in folder.glob(f"{name}-*"):
        left.unlink()  # of a run that was ended
    file, rest = folder / f"{name}-{os.getpid()}", os.urandom(BLOCK - 8)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        began = time.monotonic()
        for number in range(mib):
            if os.write(descriptor, block(number, rest)) != BLOCK:
                raise OSError(errno.EIO, "a write was cut short", str(file))
        os.fsync(descriptor)
        write = time.monotonic() - began
        # Read from the server, not from this node's memory.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        began = time.monotonic()
        kept = all(os.read(descriptor, BLOCK) == block(number, rest) for number in range(mib))
        read = time.monotonic() - began
    finally:
        os.close(descriptor)
        file.unlink()
    size = mib * BLOCK / 1e6
    return kept, round(size / write, 1), round(size / read, 1)


def block(number: int, rest: bytes) -> bytes:
    """None is like another, so none can be spared."""
    return number.to_bytes(8, "big") + rest


def within(seconds: float, mount: Mount, mib: int, repeats: int = 1) -> Answer:
    """What came of it, or that it did not end: what waits in the kernel for a server can only be left behind."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its file is removed
        try:
            answer = use(mount, mib, repeats)
        except SystemExit:
            os._exit(1)
        except Exception as wrong:
            answer = Answer(0.0, error=f"{type(wrong).__name__}: {wrong}")
        os.write(write_end, json.dumps(asdict(answer)).encode())
        os._exit(0)
    os.close(write_end)
    ready, _, _ = select.select([read_end], [], [], seconds)
    said = os.read(read_end, 65536) if ready else b""
    os.close(read_end)
    if not said:
        os.kill(child, signal.SIGTERM)
    if not ended(child, 5):
        os.kill(child, signal.SIGKILL)
    return Answer(**json.loads(said)) if said else Answer(None)


def ended(child: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "mounts": MOUNTS,
            "seconds": {"type": "int", "required": True},
            "mib": {"type": "int", "default": 0},
            "repeats": {"type": "int", "default": 1},
            "before": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    mounts = mounts_of(module.params["mounts"])
    mib = 0 if module.check_mode else module.params["mib"]
    proofs, refused = {}, []
    for mount in mounts:
        answer = within(module.params["seconds"], mount, mib, module.params["repeats"])
        refused += judge(mount, mounted_at(mount.path, MOUNTINFO.read_text()), answer)
        refused += slower(mount.path, answer, module.params["before"].get(mount.path, {}))
        proofs[mount.path] = asdict(answer)
    module.exit_json(changed=False, proofs=proofs, refused=refused)


if __name__ == "__main__":
    main()
