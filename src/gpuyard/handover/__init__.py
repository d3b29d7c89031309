"""What provisioning tells convergence: one closed, versioned document, the stack's output `handover`."""

from __future__ import annotations

import ipaddress
import json
from typing import Annotated, Literal, Self, cast

from pydantic import AfterValidator, Field, ValidationError, model_validator

from gpuyard.spec.aws import Moment
from gpuyard.spec.closed import Closed, Digest, FleetName, GpuName, NodeName, PoolName
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Pool

VERSION = 1


class HandoverError(RefusedError):
    """A handover that must not be used."""


def _ip_address(value: str) -> str:
    ipaddress.ip_address(value)
    return value


Address = Annotated[str, AfterValidator(_ip_address)]
# ssh expands % in these paths and ends them at a quote; neither may come from a folder's name.
# A state is shared, so there a path may begin with the home of whoever runs Ansible.
OperatorPath = Annotated[str, Field(pattern=r"^(~/|/)[^\x00-\x1f\x7f%\"'\\$]*$")]
Url = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?$")]


class Proxy(Closed):
    """What stands between Ansible and machines without an open port."""

    method: Literal["bastion", "ssm"]
    bastion: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}@[A-Za-z0-9.-]{1,253}$")] | None = None
    """user@host, for method bastion."""
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    """Region of the sessions, for method ssm."""

    @model_validator(mode="after")
    def _a_bastion_has_an_address(self) -> Self:
        if (self.method == "bastion") != (self.bastion is not None):
            raise ValueError("the address of a bastion belongs to method bastion, and to it alone")
        return self


class Ssh(Closed):
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
    private_key_file: OperatorPath
    known_hosts_file: OperatorPath
    first_seen: bool = False
    """A host's key is taken for its own the first time it is seen, where nobody can tell it before."""
    proxy: Proxy | None = None


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


class LocalDisks(Closed):
    disks: Annotated[int, Field(ge=1, le=64)]
    gb_each: Annotated[float, Field(gt=0)]
    """10^9 bytes."""


class Fabric(Closed):
    """The fast network between GPU nodes, as one node has it."""

    kind: Literal["efa", "infiniband"]
    ports: Annotated[int, Field(ge=1, le=64)]
    """Cards, or ports, that are part of it."""
    gbps: Annotated[float, Field(gt=0)]
    """Rate of each, in Gbit/s."""
    subnet_manager: bool = False
    """Whether this node runs the subnet manager of InfiniBand."""


class Node(Closed):
    name: NodeName
    role: Literal["gateway", "gpu"]
    pool: PoolName | None
    address: Address
    port: Annotated[int, Field(ge=1, le=65535)]
    gpu: GpuName | None
    gpu_count: Annotated[int, Field(ge=0)]
    simulated: bool
    instance_id: Annotated[str, Field(pattern=r"^i-[0-9a-f]{8,17}$")] | None = None
    """What its provider calls the machine."""
    zone: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")] | None = None
    """Failure domain that it stands in."""
    block_ends: Moment | None = None
    """When the Capacity Block ends that it runs in."""
    nvme: LocalDisks | None = None
    """Local NVMe disks that its type of machine has; left out where nobody knows."""
    fabric: Fabric | None = None
    """The network to the other GPU nodes, where it is not the host's own."""

    @model_validator(mode="after")
    def _a_gpu_node_has_a_pool_and_gpus(self) -> Self:
        has = (self.pool is not None, self.gpu is not None, self.gpu_count > 0)
        if has != (self.role == "gpu",) * 3:
            raise ValueError(
                f"{self.role} node {self.name}: pool, gpu and gpu_count belong to gpu nodes, and all three"
            )
        return self


class SharedStorage(Closed):
    """A file system that all GPU nodes share, as `mount` names it."""

    kind: Literal["lustre", "efs", "nfs", "bind"]
    """efs is NFS with the options that AWS asks for; bind is a folder that each host has already."""
    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:@/_-]{1,255}$")]
    """What is mounted: server:/path, for bind a folder."""
    path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*){1,16}$")]
    """Where nodes have it."""
    read_only: bool = False
    """Whether nodes may read it alone."""
    required: bool = False
    """Whether engines do not start without it; left out, they do not wait for it."""


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
    shared_storage: tuple[SharedStorage, ...] = ()

    @model_validator(mode="after")
    def _nodes_are_told_apart(self) -> Self:
        for what, values in (("name", [n.name for n in self.nodes]), ("address", [n.address for n in self.nodes])):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"two nodes have the {what} {twice[0]}")
        return self


def place_of(pool: Pool | None) -> dict[str, object]:
    """What a node's place in the fleet says of it: a pool's role, name and GPUs; a gateway's, for None."""
    if pool is None:
        return {"role": "gateway", "pool": None, "gpu": None, "gpu_count": 0}
    return {"role": "gpu", "pool": pool.name, "gpu": pool.gpu, "gpu_count": pool.gpus_per_node}


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
