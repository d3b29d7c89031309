#!/usr/bin/python
"""What a node has of InfiniBand."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.efa import upstream_kernel
from ansible_collections.gpuyard.fleet.plugins.module_utils.fabric import (
    Expected,
    judge_infiniband,
    read_ibstat,
    way_to_gpus,
)

DOCUMENTATION = r"""
module: infiniband_info
short_description: Say what a node has of InfiniBand
description: Its ports as C(ibstat) tells them, held against what is expected, and how they reach the memory of GPUs.
options:
  ports:
    description: How many ports must be up.
    type: int
    required: true
  gbps:
    description: Rate of each, in Gbit/s.
    type: float
    required: true
  kernel_modules:
    description: Flavour of the NVIDIA kernel modules.
    type: str
    choices: [open, proprietary]
    required: true
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Only reads.}
"""

EXAMPLES = r"""
- name: Look
  gpuyard.fleet.infiniband_info: {ports: 8, gbps: 400, kernel_modules: open}
  register: infiniband
"""

RETURN = r"""
way:
  description: How adapters reach the memory of GPUs, C(peermem) or C(dma-buf), or nothing.
  returned: success
  type: str
up:
  description: The ports that are up, each with C(adapter) and C(number).
  returned: success
  type: list
  elements: dict
findings:
  description: What speaks against the ports.
  returned: success
  type: list
  elements: str
"""

SYMBOL = "ib_register_peer_memory_client"


def has_symbol(kallsyms: Path) -> bool:
    try:
        with kallsyms.open(errors="replace") as lines:
            return any(SYMBOL in line for line in lines)
    except OSError:
        return False


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "ports": {"type": "int", "required": True},
            "gbps": {"type": "float", "required": True},
            "kernel_modules": {"type": "str", "choices": ["open", "proprietary"], "required": True},
        },
        supports_check_mode=True,
    )
    params, kernel = module.params, os.uname()
    expected = Expected("infiniband", ports=params["ports"], gbps=params["gbps"])
    ibstat = module.get_bin_path("ibstat", opt_dirs=["/usr/local/sbin", "/usr/sbin"])
    ports, findings = [], ["INFINIBAND-TOOLS: there is no ibstat on this node. Converge it"]
    if ibstat:
        try:
            done = subprocess.run([ibstat], capture_output=True, text=True, timeout=60, check=False)
            ports = read_ibstat(done.stdout)
            findings = judge_infiniband(ports, expected)
        except subprocess.TimeoutExpired:
            findings = ["INFINIBAND-PORTS: ibstat did not answer in 60 s. Look at `dmesg`"]
    module.exit_json(
        changed=False,
        way=way_to_gpus(
            has_symbol(Path("/proc/kallsyms")),
            params["kernel_modules"],
            upstream_kernel(kernel.release, kernel.version),
        ),
        up=[asdict(port) for port in ports if port.link_layer == "InfiniBand" and port.state == "Active"],
        findings=findings,
    )


if __name__ == "__main__":
    main()
