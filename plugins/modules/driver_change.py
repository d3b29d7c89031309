#!/usr/bin/python
"""Whether the driver of a node can be changed, asked before anything is done to the node."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.driver_change import findings
from ansible_collections.gpuyard.fleet.plugins.module_utils.readiness import command_of, readiness

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


def gathered(module: AnsibleModule) -> dict[str, Any]:
    facts = readiness(module, module.params["lock_seconds"], list(module.params["free_mib"]))
    facts["gpu_users"] = lasting(gpu_users, lambda: time.sleep(2))
    if not facts["container"]:
        headers = f"linux-headers-{facts['kernel']}"
        policy = module.run_command(["apt-cache", "policy", headers], environ_update={"LC_ALL": "C"})[1]
        facts["headers"] = Path(f"/lib/modules/{facts['kernel']}/build").exists()
        facts["headers_offered"] = bool(re.search(r"Candidate: (?!\(none\))", policy))
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
