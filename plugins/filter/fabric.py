"""From what the nodes of a run logged to what is to be thought of the network between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.fabric import (
    Expected,
    Hop,
    NcclLog,
    Run,
    judge_bandwidth,
    judge_run,
    slower,
)

DOCUMENTATION = r"""
name: fabric_findings
short_description: What speaks against an all-reduce over the GPUs of one or more nodes
description:
  - Whether each connection took the way that the fleet has, at which bandwidth, and whether the sums were right.
options:
  _input:
    description: Inventory names of the nodes that took part, in the order of their ranks.
    type: list
    elements: str
    required: true
  hostvars:
    description: Ansible's C(hostvars), in which C(nvidia_driver_gpu_count) and O(registered) are looked up.
    type: dict
    required: true
  registered:
    description: Name under which each node has what C(nccl_all_reduce) gave.
    type: str
    required: true
  expected:
    description: What the fleet has, as the inventory's C(verify_fabric_expected).
    type: dict
    required: true
  before:
    description: Bus bandwidth of the first run between the same nodes, in GB/s; 0 if there was none.
    type: float
    default: 0
"""

Hostvars = Mapping[str, Mapping[str, Any]]


def fabric_findings(
    nodes: Sequence[str], hostvars: Hostvars, registered: str, expected: Mapping[str, Any], before: float = 0
) -> list[str]:
    run = run_of(nodes, hostvars, registered)
    found = judge_run(run, Expected(**expected))
    return found if run.error else [*found, *slower(" and ".join(nodes), run.busbw_gb_s, float(before))]


def fabric_busbw(nodes: Sequence[str], hostvars: Hostvars, registered: str) -> float:
    return run_of(nodes, hostvars, registered).busbw_gb_s


def port_findings(written: Mapping[str, Any], node: str, peer: str, expected: Mapping[str, Any]) -> list[str]:
    """What C(infiniband_bandwidth) gave on a node, against what is the least of a port of its rate."""
    if "gbps" not in written:
        return [f"FABRIC-PERFTEST: {node}: {written.get('msg', 'nothing was said')}"]
    of = Expected(**expected)
    return [
        finding
        for port, gbps in written["gbps"].items()
        for finding in judge_bandwidth(f"{node} and {peer} by {port}", gbps, of)
    ]


def run_of(nodes: Sequence[str], hostvars: Hostvars, registered: str) -> Run:
    """All nodes' parts of one run, as one."""
    gpus: dict[int, str] = {}
    parts, errors = [], []
    for node in nodes:
        part = hostvars[node].get(registered) or {"msg": "not reached"}
        gpus |= {len(gpus) + number: node for number in range(int(hostvars[node]["nvidia_driver_gpu_count"]))}
        if "log" in part:
            parts.append(part)
        # A node that was refused, or not reached, has a message instead.
        if error := part.get("error", "" if "log" in part else part.get("msg", "nothing was said")):
            errors.append(f"{node}: {error}")
    rates = [float(rate) for part in parts for rate in part["busbw_gb_s"].values()]
    kept = all(part["kept"] for part in parts)
    return Run(gpus, merged([part["log"] for part in parts]), max(rates, default=0), kept, "; ".join(errors))


def merged(logs: Sequence[Mapping[str, Any]]) -> NcclLog:
    def once(name: str) -> tuple[Any, ...]:
        found = [tuple(item) if isinstance(item, list) else item for log in logs for item in log[name]]
        return tuple(dict.fromkeys(found))

    hops = tuple(dict.fromkeys(Hop(**hop) for log in logs for hop in log["hops"]))
    version = next((log["version"] for log in logs if log["version"]), "")
    ranks = max((log["ranks"] for log in logs), default=0)
    return NcclLog(version, ranks, hops, once("networks"), once("providers"), once("reasons"))


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"fabric_findings": fabric_findings, "fabric_busbw": fabric_busbw, "port_findings": port_findings}
