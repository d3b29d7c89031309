"""The handover of a fleet on AWS, from what was decided and what was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpuyard.catalog import load_instances
from gpuyard.handover import Handover, place_of
from gpuyard.provision.apart import close_pools_apart
from gpuyard.provision.cards import efa_cards
from gpuyard.spec.fleet import Fleet, Pool


@dataclass(frozen=True, slots=True)
class Made:
    """What AWS told of what it made."""

    endpoint: str
    """Name of the load balancer."""
    nodes: Mapping[str, Mapping[str, str]]
    """`id`, `address`, `zone` and `type` of each machine by its node's name."""
    lustre: Mapping[str, str] | None = None
    """`dns_name` and `mount_name`."""
    efs: Mapping[str, str] | None = None
    """`dns_name`."""


def handover_of(fleet: Fleet, stack: str, digest: str, key: str, fingerprint: str | None, made: Made) -> Handover:
    """What convergence has to know. `digest`: of the list that was made; `key`: of the packages' repository.

    Raises RefusedError where nodes that have to stand together do not.
    """
    aws = fleet.aws
    assert aws is not None  # noqa: S101 - AWS-SETTINGS
    for finding in close_pools_apart(fleet, stack, {name: node["zone"] for name, node in made.nodes.items()}):
        raise finding.refusal()
    nodes: list[dict[str, object]] = []
    for number in range(fleet.gateway.nodes):
        nodes.append({"name": f"{fleet.name}-gateway-{number}", **place_of(None)})
    for pool in fleet.pools:
        place = {**place_of(pool), "fabric": fabric_of(pool), "block_ends": pool.aws and pool.aws.block_ends}
        nodes += [{"name": f"{fleet.name}-{pool.name}-{number}", **place} for number in range(pool.nodes)]
    for node in nodes:
        told = made.nodes[str(node["name"])]
        node |= {"address": told["address"], "port": 22, "simulated": False}
        node |= {"instance_id": told["id"], "zone": told["zone"]}
        if node["role"] == "gpu":
            # Of the machine that is there: it stays as it was made, also where the spec asks for another type by now.
            node["nvme"] = nvme_of(told.get("type"))
    storage = [("lustre", f"{files['dns_name']}@tcp:/{files['mount_name']}") for files in (made.lustre,) if files]
    storage += [("efs", f"{files['dns_name']}:/") for files in (made.efs,) if files]
    return Handover.model_validate(
        {
            "version": 1,
            "fleet": fleet.name,
            "provider": fleet.provider,
            "stack": stack,
            "provision_digest": digest,
            "ssh": {
                "user": aws.image.user,
                "private_key_file": aws.access.private_key_file,
                "known_hosts_file": f"~/.ssh/known_hosts.{fleet.name}",
                "first_seen": True,
                "proxy": {"method": aws.access.method, "bastion": aws.access.bastion, "region": aws.region}
                if aws.access.method != "ssh"
                else None,
            },
            "mirrors": {
                "nvidia": {"uri": aws.nvidia_repository.uri, "key": key, "fingerprint": fingerprint},
                "models": {"uri": f"https://{aws.bucket}.s3.{aws.region}.amazonaws.com/models"},
            },
            "endpoint": f"http://{made.endpoint}:{fleet.gateway.port}",
            "nodes": tuple(nodes),
            "shared_storage": tuple(
                {"kind": kind, "source": source, "path": f"/mnt/{kind}"} for kind, source in storage
            ),
        },
        strict=True,
    )


def nvme_of(instance: str | None) -> dict[str, float] | None:
    """The local NVMe disks of a type of machine. None: the catalog does not know, or it has none."""
    row = next((row for row in load_instances() if row.provider == "aws" and row.instance == instance), None)
    return {"disks": row.nvme["drives"], "gb_each": row.nvme["gb_each"]} if row and row.nvme else None


def fabric_of(pool: Pool) -> dict[str, object] | None:
    """The EFA that each node of the pool has."""
    named = pool.machine and pool.machine.instance
    instance = next((row for row in load_instances() if row.provider == "aws" and row.instance == named), None)
    cards = efa_cards(pool, instance) if instance else 0
    if not cards or instance is None or not instance.efa or not instance.network_gbps:
        return None
    return {"kind": "efa", "ports": cards, "gbps": float(instance.network_gbps / instance.efa)}
