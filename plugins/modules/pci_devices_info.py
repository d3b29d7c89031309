#!/usr/bin/python
"""What stands on the PCI bus, by vendor and class."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.pci import find

DOCUMENTATION = r"""
module: pci_devices_info
short_description: List the PCI devices of one vendor and class
description: Reads the kernel's own listing, so it answers before any driver is there and needs no tool on the node.
options:
  root:
    description: Folder with one entry per device, as the kernel lists them.
    type: path
    default: /sys/bus/pci/devices
  vendor:
    description: Vendor, as the kernel writes it, such as C(0x10de).
    type: str
    required: true
  class_code:
    description: Beginning of the class, as the kernel writes it; C(0x0302) matches every programming interface of it.
    type: str
    required: true
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Only reads.}
"""

EXAMPLES = r"""
- name: Look for NVSwitches
  gpuyard.fleet.pci_devices_info: {vendor: "0x10de", class_code: "0x068000"}
  register: nvswitches
"""

RETURN = r"""
addresses:
  description: PCI addresses of the devices found, sorted.
  returned: success
  type: list
  elements: str
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/sys/bus/pci/devices"},
            "vendor": {"type": "str", "required": True},
            "class_code": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    module.exit_json(
        changed=False, addresses=find(Path(params["root"]), params["vendor"].lower(), params["class_code"].lower())
    )


if __name__ == "__main__":
    main()
