#!/usr/bin/python
"""The modules that DKMS has for the running kernel, built for another one before that is booted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.dkms import LATE, TREE, RefusedError, aside, last_words
from ansible_collections.gpuyard.fleet.plugins.module_utils.kernel_change import dkms_modules

DOCUMENTATION = r"""
module: kernel_modules
short_description: Build the modules of DKMS for a kernel that is not running yet
description:
  - Whatever DKMS has installed for the running kernel is built and installed for the other one, at the lowest priority
    and each within a deadline; its headers have to be there. All are built before the first is installed.
  - Refuses where one does not build, or where the other kernel would load another driver than the running one.
options:
  node:
    description: Name of the node, for the messages.
    type: str
    default: this node
  release:
    description: The kernel, as C(uname -r) says it.
    type: str
    required: true
  seconds:
    description: How long the build of one module may take.
    type: int
    default: 3600
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what would be built.}
"""

EXAMPLES = r"""
- name: Build the modules for the new kernel
  gpuyard.fleet.kernel_modules: {release: 6.1.0-57-amd64}
"""

RETURN = r"""
built:
  description: Modules that were, or would be, built, as name/version.
  returned: success
  type: list
  elements: str
"""


class Dkms:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.node = module.params["node"]
        self.release = module.params["release"]

    def run(self, verb: str, name: str, version: str) -> tuple[int, str]:
        limit = self.module.params["seconds"]
        words = [*aside(limit), "dkms", verb, "-m", name, "-v", version, "-k", self.release]
        code, out, err = self.module.run_command(words, environ_update={"LC_ALL": "C"})
        if code in LATE:
            return code, f"it took longer than {limit} s"
        log = Path(TREE) / name / version / "build" / "make.log"
        built = verb == "build" and log.is_file()
        return code, last_words(log.read_text(errors="replace") if built else out + err)

    def states(self, kernel: str) -> dict[tuple[str, str], str]:
        return dkms_modules(self.module.run_command(["dkms", "status"], check_rc=True)[1], kernel)

    def do(self, verb: str, name: str, version: str) -> None:
        code, why = self.run(verb, name, version)
        if code != 0:
            raise RefusedError(
                f"KERNEL-MODULE: module {name} {version} is to be built for kernel {self.release} on {self.node}, "
                f"before it is emptied, and is not: {why}. Lock a kernel that it builds for, or a driver that "
                "builds for this one"
            )

    def ready(self) -> dict[str, Any]:
        running = {key for key, state in self.states(os.uname().release).items() if state == "installed"}
        there = self.states(self.release)
        wanted = sorted(key for key in running if there.get(key) != "installed")
        missing = [key for key in wanted if there.get(key) != "built"]
        if not self.module.check_mode:
            for key in missing:
                self.do("build", *key)
            for key in wanted:
                self.do("install", *key)
            self.refuse_another_driver()
        return {"changed": bool(wanted), "built": ["/".join(key) for key in missing]}

    def refuse_another_driver(self) -> None:
        loaded = Path("/sys/module/nvidia/version")
        have = loaded.read_text().strip() if loaded.is_file() else ""
        found = self.module.run_command(["modinfo", "-k", self.release, "--field=version", "nvidia"])[1].strip()
        if have and found != have:
            raise RefusedError(
                f"KERNEL-MODULE: kernel {self.release} on {self.node} would load driver {found or 'none'}, and {have} "
                "is loaded. Bring the node to the driver of the lock first: playbooks/operate/upgrade_driver.yml"
            )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "default": "this node"},
            "release": {"type": "str", "required": True},
            "seconds": {"type": "int", "default": 3600},
        },
        supports_check_mode=True,
    )
    try:
        result = Dkms(module).ready()
    except RefusedError as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
