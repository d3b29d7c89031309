#!/usr/bin/python
"""What is to be done on a node for its shared file systems."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.shared_storage import (
    KINDS,
    MOUNTS,
    Mount,
    Node,
    mounted_at,
    mounts_of,
    refusals,
    stale_units,
    units_for,
)

DOCUMENTATION = r"""
module: shared_storage_info
short_description: Decide the units of a node's shared file systems
description:
  - Looks at the node and says which units carry the mounts, which units of earlier mounts are to go, and what keeps the
    mounts from being made. Nothing is changed, and no file system is touched that may not answer.
options:
  mounts:
    description: The shared file systems.
    type: list
    elements: dict
    required: true
    suboptions:
      kind:
        description: Kind of file system.
        type: str
        choices: [nfs, efs, lustre, bind]
        required: true
      source:
        description: What is mounted, as C(mount) takes it.
        type: str
        required: true
      path:
        description: Where it is mounted.
        type: path
        required: true
      read_only:
        description: Whether it is mounted for reading alone.
        type: bool
        default: false
      required:
        description: Whether engines do not start without it.
        type: bool
        default: false
  seconds:
    description: How long one attempt to mount may take.
    type: int
    required: true
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Only reads.}
"""

EXAMPLES = r"""
- name: Decide
  gpuyard.fleet.shared_storage_info:
    mounts: [{kind: nfs, source: "files.example.com:/models", path: /mnt/models}]
    seconds: 30
  register: storage
"""

RETURN = r"""
units:
  description: Text of each unit that carries a mount, by its name.
  returned: success
  type: dict
enabled:
  description: The units that the boot starts, each with whether it is started at once and awaited.
  returned: success
  type: dict
stale:
  description: Units of mounts that nobody asks for any more.
  returned: success
  type: list
  elements: str
packages:
  description: Packages that the mounts need.
  returned: success
  type: list
  elements: str
required:
  description: Paths that engines do not start without.
  returned: success
  type: list
  elements: str
refused:
  description: What keeps the mounts from being made.
  returned: success
  type: list
  elements: str
"""

UNITS = Path("/etc/systemd/system")
HELPERS = (Path("/sbin"), Path("/usr/sbin"))


def look(module: AnsibleModule, mounts: Sequence[Mount]) -> Node:
    mountinfo = Path("/proc/self/mountinfo").read_text()
    fstab = Path("/etc/fstab")
    units = [file for pattern in ("*.mount", "*.automount") for file in UNITS.glob(pattern) if file.is_file()]
    # What is mounted is not listed: it may not answer, and an automount would mount it.
    bare = [Path(mount.path) for mount in mounts if not mounted_at(mount.path, mountinfo)]
    kinds = {mount.kind: KINDS[mount.kind] for mount in mounts}.values()
    missing = [kind.fstype for kind in kinds if kind.network and not can_mount(module, kind.fstype)]
    missing += [kind.helper for kind in kinds if kind.helper and not any((f / kind.helper).exists() for f in HELPERS)]
    return Node(
        mountinfo=mountinfo,
        fstab=fstab.read_text() if fstab.is_file() else "",
        units={file.name: file.read_text(errors="replace") for file in units},
        below={str(path): sorted(child.name for child in path.iterdir()) for path in bare if path.is_dir()},
        folders=[mount.source for mount in mounts if mount.kind == "bind" and Path(mount.source).is_dir()],
        missing=missing,
        autofs=Path("/dev/autofs").exists(),
    )


def can_mount(module: AnsibleModule, fstype: str) -> bool:
    """Whether the running kernel has the file system, or a module of it."""
    if fstype in Path("/proc/filesystems").read_text().split():
        return True
    # A container's kernel is its host's, which has modules that cannot be seen from here.
    if subprocess.run(["systemd-detect-virt", "--quiet", "--container"], check=False).returncode == 0:
        return True
    modprobe = module.get_bin_path("modprobe", opt_dirs=["/sbin", "/usr/sbin"])
    asked = [[modprobe, "--dry-run", "--quiet", name] for name in (f"fs-{fstype}", fstype)] if modprobe else []
    return any(subprocess.run(words, check=False).returncode == 0 for words in asked)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "mounts": MOUNTS,
            "seconds": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    seconds = module.params["seconds"]
    mounts = mounts_of(module.params["mounts"])
    node = look(module, mounts)
    units: dict[str, str] = {}
    enabled: dict[str, bool] = {}
    for mount in mounts:
        texts = units_for(mount, node.autofs, seconds)
        units.update(texts)
        # The last one is the one that the boot starts. A mount over the network is not awaited: its server may be away.
        last = list(texts)[-1]
        enabled[last] = last.endswith(".automount") or not KINDS[mount.kind].network
    module.exit_json(
        changed=False,
        units=units,
        enabled=enabled,
        stale=stale_units(mounts, node, seconds),
        packages=sorted({package for mount in mounts for package in KINDS[mount.kind].packages}),
        required=[mount.path for mount in mounts if mount.required],
        refused=refusals(mounts, node),
    )


if __name__ == "__main__":
    main()
