"""What goes into the lab and what comes out of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A node's name becomes a host name, a folder and a unit name, so it is held to what is safe in all three.
NODE_NAME = r"^[a-z][a-z0-9-]{0,61}[a-z0-9]$"
NodeName = Annotated[str, Field(pattern=NODE_NAME)]
StackName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]

# KVM is asked for, never guessed: where it is there and does not work, it hangs.
Accel = Literal["tcg", "kvm"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabRef(_Value):
    """One lab: the project whose `.gpuyard/labs/<stack>` holds its state."""

    project: Path
    stack: StackName

    @property
    def id(self) -> str:
        """Six hex digits that name the lab's bridge, table and control group.

        Derived, not drawn: a lab whose state was deleted by hand is still found and cleaned up.
        """
        return hashlib.sha256(f"{self.project.resolve()}\0{self.stack}".encode()).hexdigest()[:6]


class NodeSpec(_Value):
    name: NodeName
    role: Literal["gateway", "gpu"]
    pool: str | None = None
    gpu: str | None = None
    gpu_count: int = Field(default=0, ge=0, le=16)


class NodeState(_Value):
    name: str
    address: str
    running: bool
    spec: NodeSpec


class VmState(_Value):
    """A node in QEMU."""

    name: str
    port: int | None
    """Where its SSH is on this machine's loopback, once it was booted."""
    running: bool


class SshAccess(_Value):
    user: str
    private_key_file: Path
    known_hosts_file: Path


class AptMirror(_Value):
    uri: str
    key: str
    fingerprint: str


class ModelMirror(_Value):
    uri: str


class Mirrors(_Value):
    nvidia: AptMirror
    models: ModelMirror


class Forward(_Value):
    """127.0.0.1:host_port on this machine is node_port of the first gateway."""

    host_port: int
    node_port: int


class NetworkState(_Value):
    subnet: str
    bridge: str
    healthy: bool
    ssh: SshAccess
    mirrors: Mirrors
    forward: Forward | None
