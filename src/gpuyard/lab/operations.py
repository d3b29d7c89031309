"""The calls of the lab's agent, as they run with root's rights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gpuyard.lab import network, nodes, vms
from gpuyard.lab.models import NetworkState, NodeSpec, NodeState, VmState
from gpuyard.lab.place import Place


def _network_up(place: Place, port: int) -> NetworkState:
    return network.up(place, port)


def _node_up(place: Place, spec: NodeSpec | dict[str, Any]) -> NodeState:
    return nodes.up(place, NodeSpec.model_validate(spec))


Answer = NetworkState | NodeState | VmState | list[NodeState] | list[VmState] | None
CALLS: Mapping[str, Callable[..., Answer]] = MappingProxyType(
    {
        "network_up": _network_up,
        "network_read": network.read,
        "network_down": network.down,
        "node_up": _node_up,
        "node_read": nodes.read,
        "nodes_read": nodes.read_all,
        "node_down": nodes.down,
        "vm_up": vms.up,
        "vm_cut": vms.cut,
        "vms_read": vms.read_all,
        "vm_down": vms.down,
        "lab_down": nodes.all_down,
    }
)


def plain(answer: Answer) -> Any:
    """An answer as what JSON can carry."""
    if isinstance(answer, list):
        return [one.model_dump(mode="json") for one in answer]
    return None if answer is None else answer.model_dump(mode="json")
