#!/usr/bin/python
"""What a node has of AWS's Elastic Fabric Adapter."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.efa import (
    Facts,
    bad_sets,
    installed_version,
    upstream_kernel,
)
from ansible_collections.gpuyard.fleet.plugins.module_utils.fabric import Expected, judge_efa, read_fi_info
from ansible_collections.gpuyard.fleet.plugins.module_utils.pci import find, read

DOCUMENTATION = r"""
module: efa_info
short_description: Say what a node has of AWS's Elastic Fabric Adapter
description:
  - Devices on the bus, the installer that was run, known bad sets of versions, and what libfabric finds.
options:
  installer:
    description: Version of the installer that the node is to have.
    type: str
    required: true
  devices:
    description: How many EFA devices the node must have.
    type: int
    required: true
  kernel_modules:
    description: Flavour of the NVIDIA kernel modules.
    type: str
    choices: [open, proprietary]
    required: true
  nccl:
    description: NCCL of each engine.
    type: list
    elements: str
    default: []
  cuda:
    description: CUDA of each engine.
    type: list
    elements: str
    default: []
  pci_root:
    description: Folder with one entry per PCI device, as the kernel lists them.
    type: path
    default: /sys/bus/pci/devices
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Only reads.}
"""

EXAMPLES = r"""
- name: Look
  gpuyard.fleet.efa_info: {installer: 1.50.0, devices: 32, kernel_modules: open}
  register: efa
"""

RETURN = r"""
addresses:
  description: PCI addresses of the EFA devices.
  returned: success
  type: list
  elements: str
installed:
  description: Version of the installer that was run, or nothing.
  returned: success
  type: str
bad:
  description: Known bad sets that the node would have, each with C(id), C(why), C(change) and C(source).
  returned: success
  type: list
  elements: dict
findings:
  description: What speaks against the devices that libfabric finds, and against the loaded module.
  returned: success
  type: list
  elements: str
"""

ROOT = Path("/opt/amazon")
# Amazon's own devices: EFA is told from ENA by the number of the device alone.
VENDOR, DEVICE = "0x1d0f", "0xefa"


def addresses(root: Path) -> list[str]:
    return find(root, VENDOR, DEVICE, of="device")


def asked(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def findings(devices: int) -> list[str]:
    endpoints = read_fi_info(asked(str(ROOT / "efa/bin/fi_info"), "-p", "efa", "-t", "FI_EP_RDM"))
    found = judge_efa(endpoints, Expected("efa", ports=devices))
    loaded, file = read(Path("/sys/module/efa/version")), asked("modinfo", "--field", "version", "efa").strip()
    if loaded and file and loaded != file:
        found.append(f"EFA-LOADED: module efa {loaded} is loaded and {file} is installed. Drain the node and reboot it")
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "installer": {"type": "str", "required": True},
            "devices": {"type": "int", "required": True},
            "kernel_modules": {"type": "str", "choices": ["open", "proprietary"], "required": True},
            "nccl": {"type": "list", "elements": "str", "default": []},
            "cuda": {"type": "list", "elements": "str", "default": []},
            "pci_root": {"type": "path", "default": "/sys/bus/pci/devices"},
        },
        supports_check_mode=True,
    )
    params, kernel = module.params, os.uname()
    facts = Facts(
        params["installer"],
        upstream_kernel(kernel.release, kernel.version),
        params["kernel_modules"],
        params["nccl"],
        params["cuda"],
    )
    module.exit_json(
        changed=False,
        addresses=addresses(Path(params["pci_root"])),
        installed=installed_version(read(ROOT / "efa_installed_packages")),
        bad=[asdict(bad) for bad in bad_sets(facts)],
        findings=findings(params["devices"]),
    )


if __name__ == "__main__":
    main()
