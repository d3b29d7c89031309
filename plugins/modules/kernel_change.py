#!/usr/bin/python
"""Whether the kernel of a node can be changed, asked before anything is done to the node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.kernel_change import (
    FORGETS,
    PROGRAMS,
    dkms_modules,
    entries,
    findings,
)
from ansible_collections.gpuyard.fleet.plugins.module_utils.readiness import readiness

DOCUMENTATION = r"""
module: kernel_change
short_description: Refuse a node whose kernel cannot be changed now
description:
  - Looks at what would stop a change of the kernel half-way, or would leave a node that does not come up where it is,
    and refuses the node with everything that was found, each by its rule. Looks only.
options:
  node:
    description: Name of the node, for the messages.
    type: str
    required: true
  release:
    description: The kernel to come to, as C(uname -r) says it.
    type: str
    required: true
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
- name: Refuse a node whose kernel cannot be changed now
  gpuyard.fleet.kernel_change: {node: prod-chat-0, release: 6.1.0-57-amd64}
"""

RETURN = r"""
facts:
  description: What was found on the node.
  returned: always
  type: dict
"""

GRUB = Path("/boot/grub")


def gathered(module: AnsibleModule) -> dict[str, Any]:
    facts = readiness(module, module.params["lock_seconds"], list(module.params["free_mib"]))
    config = (GRUB / "grub.cfg").read_text() if (GRUB / "grub.cfg").is_file() else ""
    missing = [name for name in PROGRAMS if not module.get_bin_path(name, opt_dirs=["/usr/sbin", "/sbin"])]
    driver = Path("/sys/module/nvidia/version")
    built = dkms_modules(module.run_command(["dkms", "status"])[1], os.uname().release) if dkms(module) else {}

    def probed(target: str) -> list[str]:
        return [] if missing else module.run_command(["grub-probe", f"--target={target}", str(GRUB)])[1].split()

    return {
        **facts,
        "programs_missing": missing,
        "configured": bool(config),
        "forgets": FORGETS in config,
        "entries": sorted(entries(config)),
        "layers": probed("abstraction"),
        "file_systems": probed("fs"),
        "driver": driver.read_text().strip() if driver.is_file() else "",
        "driver_by_dkms": any(name.startswith("nvidia") and state == "installed" for (name, _), state in built.items()),
    }


def dkms(module: AnsibleModule) -> bool:
    return bool(module.get_bin_path("dkms", opt_dirs=["/usr/sbin", "/sbin"]))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "release": {"type": "str", "required": True},
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
