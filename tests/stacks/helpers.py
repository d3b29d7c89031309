"""A lab that is a file: it stands where `gpuyard.lab.agent` stands, and remembers what it was asked to do."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef, NetworkState, NodeSpec, NodeState

ADDRESSES = {"gateway": 10, "gpu": 20}


def world_file(project: Path) -> Path:
    return project / "world.json"


@contextmanager
def world(project: Path) -> Iterator[dict[str, Any]]:
    """The whole lab, to look at and to break; what is changed in it is kept."""
    with world_file(project).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = world_file(project)
        found = json.loads(path.read_text()) if path.is_file() else {"network": None, "nodes": {}, "calls": []}
        yield found
        path.write_text(json.dumps(found, indent=1))


def network_up(lab: LabRef, port: int) -> NetworkState:
    with world(lab.project) as found:
        found["calls"].append(f"network_up {port}")
        if port == found.get("busy_port"):
            raise LabError("LAB-PORT", f"port {port} is in use; set another gateway.port, e.g. {port + 10}")
        found["network"] = {"port": port, "healthy": True}
    return _network(lab, found["network"])


def network_read(lab: LabRef) -> NetworkState | None:
    with world(lab.project) as found:
        return None if found["network"] is None else _network(lab, found["network"])


def network_down(lab: LabRef) -> None:
    with world(lab.project) as found:
        found["calls"].append("network_down")
        found["network"] = None


def node_up(lab: LabRef, spec: NodeSpec) -> NodeState:
    with world(lab.project) as found:
        found["calls"].append(f"node_up {spec.name}")
    deadline = time.monotonic() + 120
    while is_held(lab, spec.name) and time.monotonic() < deadline:
        time.sleep(0.1)
    with world(lab.project) as found:
        known = found["nodes"].get(spec.name)
        taken = {node["address"] for node in found["nodes"].values()}
        free = (f"10.77.0.{octet}" for octet in range(ADDRESSES[spec.role], 250))
        address = known["address"] if known else next(address for address in free if address not in taken)
        found["nodes"][spec.name] = {"address": address, "running": True, "spec": spec.model_dump(mode="json")}
    return NodeState(name=spec.name, address=address, running=True, spec=spec)


def is_held(lab: LabRef, name: str) -> bool:
    with world(lab.project) as found:
        return found.get("held") == name


def node_read(lab: LabRef, name: str) -> NodeState | None:
    with world(lab.project) as found:
        node = found["nodes"].get(name)
        return None if node is None else NodeState.model_validate({"name": name, **node})


def node_down(lab: LabRef, name: str) -> None:
    with world(lab.project) as found:
        found["calls"].append(f"node_down {name}")
        found["nodes"].pop(name, None)


def _network(lab: LabRef, state: dict[str, Any]) -> NetworkState:
    return NetworkState.model_validate(
        {
            "subnet": "10.77.0.0/24",
            "bridge": "gy-0",
            "healthy": state["healthy"],
            "ssh": {
                "user": "root",
                "private_key_file": str(lab.project / "ssh/id_ed25519"),
                "known_hosts_file": str(lab.project / "ssh/known_hosts"),
            },
            "mirrors": {
                "nvidia": {
                    "uri": "http://10.77.0.1:8099/nvidia",
                    "key": "-----BEGIN PGP PUBLIC KEY BLOCK-----\nmDM\n-----END PGP PUBLIC KEY BLOCK-----\n",
                    "fingerprint": "A" * 40,
                },
                "models": {"uri": "http://10.77.0.1:8099/models"},
            },
            "forward": {"host_port": state["port"], "node_port": state["port"]},
        }
    )
