"""The calls of the lab's agent, as they run with root's rights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from gpuyard.lab import network, nodes, vms
from gpuyard.lab.faults import rim
from gpuyard.lab.models import NetworkState, NodeSpec, NodeState, VmState
from gpuyard.lab.place import Place


def _network_up(place: Place, port: int) -> NetworkState:
    return network.up(place, port)


def _node_up(place: Place, spec: NodeSpec | dict[str, Any]) -> NodeState:
    return nodes.up(place, NodeSpec.model_validate(spec))


def _node_down(place: Place, name: str) -> None:
    nodes.down(place, name)
    rim.forget(place, name)


Answer = (
    NetworkState
    | NodeState
    | VmState
    | list[NodeState]
    | list[VmState]
    | list[dict[str, Any]]
    | list[str]
    | dict[str, Any]
    | str
    | None
)
CALLS: Mapping[str, Callable[..., Answer]] = MappingProxyType(
    {
        "network_up": _network_up,
        "network_read": network.read,
        "network_down": network.down,
        "node_up": _node_up,
        "node_read": nodes.read,
        "nodes_read": nodes.read_all,
        "vm_up": vms.up,
        "vm_cut": vms.cut,
        "vms_read": vms.read_all,
        "vm_down": vms.down,
        "node_down": _node_down,
        "lab_down": nodes.all_down,
        "fault_break": rim.break_,
        "fault_mend": rim.mend,
        "faults_read": rim.read,
    }
)


def plain(answer: Answer) -> Any:
    """An answer as what JSON can carry."""
    if isinstance(answer, list):
        return [plain(one) for one in answer]
    return answer.model_dump(mode="json") if isinstance(answer, BaseModel) else answer
