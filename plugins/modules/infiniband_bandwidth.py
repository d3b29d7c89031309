#!/usr/bin/python
"""Bandwidth of each port of a node to the same port of another, both ways at once."""

from __future__ import annotations

import subprocess
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.fabric import read_bandwidth

DOCUMENTATION = r"""
module: infiniband_bandwidth
short_description: Measure each port of a node to the same port of another
description:
  - Waits on each port for one neighbour, and writes to another over each with C(ib_write_bw) of perftest, one port
    after the other, from and to the memory of the host. All nodes have to be started within O(seconds).
options:
  adapters:
    description: The ports, each with C(adapter) and C(number).
    type: list
    elements: dict
    required: true
  peer:
    description: Address of the node that is written to.
    type: str
    required: true
  port:
    description: First TCP port on which neighbours find each other; each port of an adapter takes one more.
    type: int
    required: true
  seconds:
    description: How long all of it may take.
    type: int
    default: 300
author: [gpuyard]
attributes:
  check_mode: {support: none, description: It would only be said that ports are kept busy.}
"""

EXAMPLES = r"""
- name: Measure
  gpuyard.fleet.infiniband_bandwidth:
    adapters: [{adapter: mlx5_0, number: 1}]
    peer: 10.0.0.12
    port: 29700
"""

RETURN = r"""
gbps:
  description: By adapter and port, average bandwidth in Gbit/s, or nothing.
  returned: success
  type: dict
"""


def words(port: dict, tcp: int) -> list:
    return [
        *("ib_write_bw", "--ib-dev", port["adapter"], "--ib-port", str(port["number"])),
        *("--port", str(tcp), "--report_gbits", "-F", "--size", "65536", "--iters", "5000"),
    ]


def measured(adapters: list, peer: str, first: int, seconds: int) -> dict:
    """The neighbour that writes to us, and the one that we write to, may come later than we: both are waited for."""
    deadline = time.monotonic() + seconds
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    servers = [subprocess.Popen(words(port, first + number), **quiet) for number, port in enumerate(adapters)]
    found = {}
    try:
        for number, port in enumerate(adapters):
            gbps = None
            while gbps is None and time.monotonic() < deadline:
                done = subprocess.run(
                    [*words(port, first + number), peer],
                    capture_output=True,
                    text=True,
                    timeout=max(1, deadline - time.monotonic()),
                    check=False,
                )
                gbps = read_bandwidth(done.stdout)
                if gbps is None:
                    time.sleep(1)
            found[f"{port['adapter']}/{port['number']}"] = gbps
        for server in servers:
            server.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # what was measured until then stands, and what was not has no figure
    finally:
        for server in servers:
            if server.poll() is None:
                server.kill()
                server.wait()
    return {f"{port['adapter']}/{port['number']}": None for port in adapters} | found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "adapters": {"type": "list", "elements": "dict", "required": True},
            "peer": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
            "seconds": {"type": "int", "default": 300},
        },
    )
    params = module.params
    if module.get_bin_path("ib_write_bw") is None:
        module.fail_json(msg="FABRIC-PERFTEST: there is no ib_write_bw on this node. Converge it")
    gbps = measured(params["adapters"], params["peer"], params["port"], params["seconds"])
    module.exit_json(changed=False, gbps=gbps)


if __name__ == "__main__":
    main()
