"""What provisioning tells convergence: one closed, versioned document, the stack's output `handover`."""

from __future__ import annotations

import ipaddress
import json
from typing import Annotated, Literal, Self, cast

from pydantic import AfterValidator, Field, ValidationError, model_validator

from gpuyard.spec.closed import Closed, Digest, FleetName, GpuName, NodeName, PoolName
from gpuyard.spec.errors import RefusedError

VERSION = 1


class HandoverError(RefusedError):
    """A handover that must not be used."""


def _ip_address(value: str) -> str:
    ipaddress.ip_address(value)
    return value


Address = Annotated[str, AfterValidator(_ip_address)]
# ssh expands % in these paths and ends them at a quote; neither may come from a folder's name.
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f%\"'\\$]*$")]
Url = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?$")]


class Ssh(Closed):
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
    private_key_file: AbsolutePath
    known_hosts_file: AbsolutePath


class AptMirror(Closed):
    uri: Url
    key: Annotated[str, Field(pattern=r"^-----BEGIN PGP PUBLIC KEY BLOCK-----\n")]
    """The repository's public key, in armour."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9A-F]{40}$")]


class ModelMirror(Closed):
    uri: Url


class Mirrors(Closed):
    nvidia: AptMirror
    models: ModelMirror


class Node(Closed):
    name: NodeName
    role: Literal["gateway", "gpu"]
    pool: PoolName | None
    address: Address
    port: Annotated[int, Field(ge=1, le=65535)]
    gpu: GpuName | None
    gpu_count: Annotated[int, Field(ge=0)]
    simulated: bool

    @model_validator(mode="after")
    def _a_gpu_node_has_a_pool_and_gpus(self) -> Self:
        has = (self.pool is not None, self.gpu is not None, self.gpu_count > 0)
        if has != (self.role == "gpu",) * 3:
            raise ValueError(
                f"{self.role} node {self.name}: pool, gpu and gpu_count belong to gpu nodes, and all three"
            )
        return self


class Handover(Closed):
    version: Literal[1]
    fleet: FleetName
    provider: str
    stack: str
    provision_digest: Digest
    ssh: Ssh
    mirrors: Mirrors
    endpoint: Url
    nodes: tuple[Node, ...]

    @model_validator(mode="after")
    def _nodes_are_told_apart(self) -> Self:
        for what, values in (("name", [n.name for n in self.nodes]), ("address", [n.address for n in self.nodes])):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"two nodes have the {what} {twice[0]}")
        return self


def read_handover(data: object) -> Handover:
    """The handover in a stack's output, as plain data. Raises HandoverError."""
    up = "run `pulumi up` with this version of gpuyard"
    if not isinstance(data, dict):
        found = f"the output is {type(data).__name__}"
        raise HandoverError("HANDOVER-INVALID", found, "a handover is a mapping", up)
    version = cast("dict[str, object]", data).get("version")
    if version != VERSION or isinstance(version, bool):
        found = f"the handover has version {version!r}"
        raise HandoverError("HANDOVER-VERSION", found, f"this gpuyard reads version {VERSION} only", up)
    try:
        return Handover.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "nodes"
        raise HandoverError("HANDOVER-INVALID", f"{place} of the handover", first["msg"], up) from error
