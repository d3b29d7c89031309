"""The lab's one door, and the one place where root's rights are asked for.

As root the calls run in this process; else each is one `sudo -n <python> -B -m gpuyard.lab` that takes it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from gpuyard.lab import vms
from gpuyard.lab.errors import LabError
from gpuyard.lab.models import (
    Accel,
    AptMirror,
    Forward,
    LabRef,
    Mirrors,
    ModelMirror,
    NetworkState,
    NodeSpec,
    NodeState,
    SshAccess,
    VmState,
)
from gpuyard.lab.nodes import ssh_command
from gpuyard.lab.operations import CALLS, plain
from gpuyard.lab.place import Place, default_cache

__all__ = [
    "Accel",
    "AptMirror",
    "Forward",
    "LabError",
    "LabRef",
    "Mirrors",
    "ModelMirror",
    "NetworkState",
    "NodeSpec",
    "NodeState",
    "SshAccess",
    "VmState",
    "fault_break",
    "fault_mend",
    "faults_read",
    "lab_down",
    "login",
    "network_down",
    "network_read",
    "network_up",
    "node_down",
    "node_read",
    "node_up",
    "nodes_read",
    "vm_cut",
    "vm_down",
    "vm_login",
    "vm_up",
    "vms_read",
]


def network_up(lab: LabRef, port: int) -> NetworkState:
    """Make or mend the lab's network: bridge, firewall, forwarded port, keys, artefact server."""
    return NetworkState.model_validate(_call("network_up", lab, port=port))


def network_read(lab: LabRef) -> NetworkState | None:
    answer = _call("network_read", lab)
    return None if answer is None else NetworkState.model_validate(answer)


def network_down(lab: LabRef) -> None:
    _call("network_down", lab)


def node_up(lab: LabRef, spec: NodeSpec) -> NodeState:
    """Make a node, or boot it again on its old disk; a running one is left alone."""
    return NodeState.model_validate(_call("node_up", lab, spec=spec.model_dump(mode="json")))


def node_read(lab: LabRef, name: str) -> NodeState | None:
    answer = _call("node_read", lab, name=name)
    return None if answer is None else NodeState.model_validate(answer)


def nodes_read(lab: LabRef) -> list[NodeState]:
    """Every node of the lab, whoever asked for it."""
    return [NodeState.model_validate(answer) for answer in _call("nodes_read", lab)]


def login(lab: LabRef, node: NodeState) -> list[str]:
    """The ssh command that leads to a node, with its checked host key; what comes behind it runs there."""
    return ssh_command(Place(lab, default_cache()), node.address)


def node_down(lab: LabRef, name: str) -> None:
    _call("node_down", lab, name=name)


def vm_up(lab: LabRef, name: str, accel: Accel = "tcg") -> VmState:
    """Make a QEMU node, or boot one on its old disks; a running one is left alone."""
    return VmState.model_validate(_call("vm_up", lab, name=name, accel=accel))


def vm_cut(lab: LabRef, name: str) -> None:
    """Cut the power of a QEMU node: what it had not written to its disks is lost."""
    _call("vm_cut", lab, name=name)


def vms_read(lab: LabRef) -> list[VmState]:
    return [VmState.model_validate(answer) for answer in _call("vms_read", lab)]


def vm_login(lab: LabRef, name: str) -> list[str]:
    return vms.login(Place(lab, default_cache()), name)


def vm_down(lab: LabRef, name: str) -> None:
    """Remove a QEMU node with its disks."""
    _call("vm_down", lab, name=name)


def lab_down(lab: LabRef) -> None:
    """Remove everything of the lab, whoever made it and whether or not anybody remembers."""
    _call("lab_down", lab)


def fault_break(
    lab: LabRef, node: str, fault: str, gpu: int | None, seed: int, words: list[str], after: float
) -> dict[str, Any]:
    """Break a node on purpose, now or so many seconds later; the answer says what was chosen."""
    return _call("fault_break", lab, node=node, fault=fault, gpu=gpu, seed=seed, words=words, after=after)


def fault_mend(lab: LabRef, node: str, fault: str | None) -> list[str]:
    """Mend one fault of a node, or all; the answer names what was mended."""
    return _call("fault_mend", lab, node=node, fault=fault)


def faults_read(lab: LabRef) -> list[dict[str, Any]]:
    return _call("faults_read", lab)


def _call(call: str, lab: LabRef, **arguments: Any) -> Any:
    if sys.platform != "linux":
        raise LabError(
            "LAB-OS", f"this is {sys.platform}", "nodes of the lab are Linux machines", "use a Linux machine"
        )
    if os.geteuid() == 0:
        return plain(CALLS[call](Place(lab, default_cache()), **arguments))
    return _call_as_root(
        {"call": call, "lab": lab.model_dump(mode="json"), "cache": str(default_cache()), "arguments": arguments}
    )


def _call_as_root(request: dict[str, Any]) -> Any:
    # -B: root's compiled files in a user's checkout could not be removed by the user.
    command = ["sudo", "-n", sys.executable, "-B", "-m", "gpuyard.lab"]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        said = done.stderr.strip()
    except FileNotFoundError:
        done, said = None, "sudo is not installed"
    if done is None or not done.stdout:
        user = os.environ.get("USER") or str(os.getuid())
        rule = f"{user} ALL=(root) NOPASSWD: {sys.executable} -B -m gpuyard.lab"
        raise LabError(
            "LAB-ROOT",
            f"{user} is not root and may not become it without a password ({said or 'no answer'})",
            "nodes of the lab are machines of their own",
            f"run as root, or allow it once: echo '{rule}' | sudo tee /etc/sudoers.d/gpuyard-lab",
        )
    answer = json.loads(done.stdout)
    if error := answer.get("error"):
        raise LabError(**error)
    return answer["result"]
