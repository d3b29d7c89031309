"""Who exists, as Ansible groups and variables: a pure answer from the handover and the current lock.

The variables are those of the roles. Every text in them is a value, never a template.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from gpuyard.catalog import load_catalog
from gpuyard.catalog.market import load_market
from gpuyard.handover import VERSION, Handover, HandoverError, Node, Ssh
from gpuyard.plan.lock import Lock, LockedModel, LockedPool
from gpuyard.spec.aws import NOTICE_PORT
from gpuyard.spec.errors import RefusedError

LAB_PCI_ROOT = "/var/lib/gpuyard-lab/pci"
MODELS_SHARE = 0.9
"""Of local disks, what models may take: our choice, the rest is for the file system and what an engine compiles."""


class InventoryError(RefusedError):
    """Handover and lock make no inventory together."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Hosts by group and variables by host."""

    groups: dict[str, list[str]]
    hostvars: dict[str, dict[str, object]]


def build(handover: Handover, lock: Lock) -> Inventory:
    """Groups and variables of every node. Raises InventoryError or HandoverError."""
    _refuse_what_does_not_fit(handover, lock)
    groups: dict[str, list[str]] = {"gpu_nodes": [], "gateways": []}
    for pool in lock.pools:
        groups[pool_group(pool)] = []
    groups |= {"simulated": [], "efa_nodes": [], "infiniband_nodes": [], "node_notice_nodes": []}
    hostvars: dict[str, dict[str, object]] = {}
    for node in handover.nodes:
        groups["gpu_nodes" if node.role == "gpu" else "gateways"].append(node.name)
        if node.pool is not None:
            groups[pool_group(node.pool)].append(node.name)
        if node.simulated:
            groups["simulated"].append(node.name)
        if node.fabric is not None:
            groups[f"{node.fabric.kind}_nodes"].append(node.name)
        if node.role == "gpu" and _is_told(handover):
            groups["node_notice_nodes"].append(node.name)
        own = _gpu_vars(node, handover, lock) if node.role == "gpu" else _gateway_vars(handover, lock)
        hostvars[node.name] = {**_node_vars(node, handover), **own}
    return Inventory(groups, hostvars)


def pool_group(pool: str) -> str:
    """Ansible wants group names without dashes."""
    return f"pool_{pool.replace('-', '_')}"


def backend(model: str) -> str:
    """HAProxy's name for the nodes that serve a model."""
    return f"model_{model}"


def _refuse_what_does_not_fit(handover: Handover, lock: Lock) -> None:
    if handover.version != VERSION:
        found = f"the handover has version {handover.version!r}"
        raise HandoverError("HANDOVER-VERSION", found, f"version {VERSION} is known", "run `pulumi up` again")
    if handover.fleet != lock.fleet:
        found = f"the stack is of fleet {handover.fleet}, the lock of fleet {lock.fleet}"
        raise InventoryError(
            "INV-FLEET", found, "nodes would get another fleet's software", "name the fleet's own lock"
        )
    for name, locked in lock.repositories.items():
        mirror = handover.mirrors.nvidia if name == "nvidia" else None
        if mirror and locked.key_fingerprint not in (None, mirror.fingerprint):
            found = f"the handover's repository {name} is signed with key {mirror.fingerprint}"
            why = f"the lock asks for {locked.key_fingerprint}"
            raise InventoryError("INV-KEY", found, why, "point the handover at the repository that was locked")
    for role in ("gpu", "gateway"):
        if not any(node.role == role for node in handover.nodes):
            found = f"fleet {handover.fleet} has no {role} node"
            raise InventoryError("INV-EMPTY", found, "there is nothing to converge", f"run `pulumi up -s {lock.fleet}`")
    for node in handover.nodes:
        if node.pool is None:
            continue
        pool = lock.pools.get(node.pool)
        if pool is None:
            found = f"node {node.name} is of pool {node.pool}"
            known = ", ".join(lock.pools)
            raise InventoryError("INV-POOL", found, f"the lock knows {known}", "run `pulumi up` or lock again")
        if (pool.efa is not None) != (node.fabric is not None and node.fabric.kind == "efa"):
            found = (
                f"pool {node.pool} is locked {'with' if pool.efa else 'without'} EFA, and node {node.name} is not so"
            )
            raise InventoryError(
                "INV-EFA", found, "its network would not be what it is for", "run `pulumi up` or lock again"
            )
        if node.gpu != pool.gpu:
            found = f"node {node.name} has {node.gpu} GPUs"
            why = f"the lock chose software for {pool.gpu}"
            raise InventoryError("INV-GPU", found, why, "run `pulumi up` or lock again")
    for model in lock.models:
        if not any(node.pool == model.pool for node in handover.nodes):
            found = f"model {model.name} is served by pool {model.pool}"
            why = "the stack has no node of that pool"
            raise InventoryError("INV-POOL-EMPTY", found, why, f"run `pulumi up -s {lock.fleet}`")


def _is_told(handover: Handover) -> bool:
    """Whether the fleet's machines are told before their provider takes them away."""
    return handover.provider == "aws"


def _node_vars(node: Node, handover: Handover) -> dict[str, object]:
    return {
        "ansible_host": node.address,
        "ansible_port": node.port,
        "ansible_user": handover.ssh.user,
        "ansible_ssh_private_key_file": handover.ssh.private_key_file,
        "ansible_ssh_common_args": ssh_args(handover.ssh, node),
        "ansible_python_interpreter": "/usr/bin/python3",
        # What a playbook names where it says how a machine is made.
        "handover_provider": handover.provider,
        "handover_stack": handover.stack,
        "node_base_fleet": handover.fleet,
        "node_base_hosts": [{"name": other.name, "address": other.address} for other in handover.nodes],
    }


def ssh_args(ssh: Ssh, node: Node) -> str:
    """Options of ssh for a node, quoted as for a shell: whose key it must have, and what stands between."""
    # ssh splits the option's value at spaces unless it is quoted for ssh, inside the quotes for Ansible.
    path = f'"{ssh.known_hosts_file}"' if " " in ssh.known_hosts_file else ssh.known_hosts_file
    strict = "accept-new" if ssh.first_seen else "yes"
    checked = f"-o {shlex.quote(f'UserKnownHostsFile={path}')} -o StrictHostKeyChecking={strict} -o IdentitiesOnly=yes"
    words = [checked]
    if node.instance_id:
        # An address may be another machine's tomorrow: the key is kept under the machine's own name.
        words.append(f"-o HostKeyAlias={node.instance_id}")
    if ssh.proxy and ssh.proxy.method == "bastion":
        # ProxyJump would take neither the fleet's known hosts nor its key to the bastion, but those of whoever runs it.
        key = shlex.quote(ssh.private_key_file)
        jump = f"ssh -i {key} {checked} -W '[%h]:%p' {ssh.proxy.bastion}"
        words.append(f"-o {shlex.quote(f'ProxyCommand={jump}')}")
    elif ssh.proxy:
        session = (
            f"aws ssm start-session --region {ssh.proxy.region} --target {node.instance_id} "
            "--document-name AWS-StartSSHSession --parameters portNumber=%p"
        )
        words.append(f"-o {shlex.quote(f'ProxyCommand={session}')}")
    return " ".join(words)


def _gpu_vars(node: Node, handover: Handover, lock: Lock) -> dict[str, object]:
    pool = lock.pools[node.pool or ""]
    driver, kernel = pool.nvidia_driver, pool.kernel_release
    models = [model for model in lock.models if model.pool == node.pool]
    engines = sorted({model.engine for model in models})
    repository: dict[str, object] = handover.mirrors.nvidia.model_dump(mode="json")
    gateways = [other for other in handover.nodes if other.role == "gateway"]
    found: dict[str, object] = {
        "nvidia_driver_gpu_count": pool.gpus_per_node,  # what the lock expects, so that a GPU off the bus is missed
        "nvidia_driver_branch": driver.branch,
        "nvidia_driver_version": driver.version,
        "nvidia_driver_kernel_modules": driver.kernel_modules,
        "nvidia_driver_packages": dict(driver.packages),
        "nvidia_driver_fabric_manager_packages": dict(driver.fabric_manager_packages),
        "nvidia_driver_repository": repository,
        "nvidia_driver_engine_needs": _engine_needs(engines, lock),
        "node_kernel_release": kernel.version if kernel else "",
        "node_kernel_packages": dict(kernel.packages) if kernel else {},
        "cuda_toolkit_packages": dict(pool.cuda_toolkit.packages) if pool.cuda_toolkit else {},
        "cuda_toolkit_repository": dict(repository),
        "model_store_models": [
            {
                "name": model.name,
                "manifest_sha256": model.manifest_sha256,
                "uri": handover.mirrors.models.uri,
            }
            for model in models
        ],
        "vllm_server_engines": [
            {
                "name": name,
                "environment": lock.engines[name].environment,
                "requirements": lock.engines[name].requirements,
                "requirements_sha256": lock.engines[name].requirements_sha256,
            }
            for name in engines
        ],
        "vllm_server_models": [_served(model, lock) for model in models],
        "shared_storage_mounts": [storage.model_dump(mode="json") for storage in handover.shared_storage],
        "vllm_server_gateway_addresses": [gateway.address for gateway in gateways],
        "node_gate_gateways": [gateway.name for gateway in gateways],
        "node_gate_backends": [backend(model.name) for model in models],
        "node_gate_seats": {
            backend(model.name): model.vllm.max_num_seqs for model in models if model.vllm.max_num_seqs is not None
        },
        # Of two models on a node the longest request counts; a minute is for what waits in the gateway's own queue.
        "node_gate_drain_seconds": max((model.drain_seconds for model in models), default=60) + 60,
    }
    parts = [{"nccl": lock.engines[name].nccl, "cuda": lock.engines[name].cuda} for name in engines]
    if node.zone:
        found["failure_domain"] = node.zone  # what an upgrade's batch is kept within
    if node.nvme:
        found["nvme_cache_disks"] = node.nvme.disks  # a disk that fell off the bus would be missed by nobody
        found["model_store_budget_gib"] = int(node.nvme.disks * node.nvme.gb_each * 1e9 / 2**30 * MODELS_SHARE)
    if _is_told(handover):
        found |= {
            "node_notice_gateway_addresses": [gateway.address for gateway in gateways],
            "node_notice_engine_ports": sorted({model.port for model in models}),
            "node_notice_port": NOTICE_PORT,
            "node_notice_lead_seconds": found["node_gate_drain_seconds"],
            "node_notice_block_ends": node.block_ends or "",
        }
    if shared := _shared_models(handover):
        found["model_store_shared"] = shared
    found |= _fabric_vars(node, pool, [{key: value for key, value in part.items() if value} for part in parts])
    if node.simulated:
        found["nvidia_driver_pci_root"] = LAB_PCI_ROOT
        found["lab_gpu_model"] = node.gpu
        found["lab_gpu_count"] = node.gpu_count
    return found


def _shared_models(handover: Handover) -> str | None:
    """The folder of models on the file system that was made for the fleet, the faster one where there are two."""
    paths = {storage.kind: storage.path for storage in handover.shared_storage}
    return next((f"{paths[kind]}/models" for kind in ("lustre", "efs") if kind in paths), None)


def _fabric_vars(node: Node, pool: LockedPool, engines: list[dict[str, str]]) -> dict[str, object]:
    """What the roles of the fabric are told, and what playbooks/operate/verify_fabric.yml expects of it."""
    gpu = next(row for row in load_catalog().gpus if row.name == node.gpu)
    link = next((row for row in load_market().links if (row.gpu, row.gpus) == (node.gpu, node.gpu_count)), None)
    fabric = node.fabric
    expected = {
        "fabric": fabric.kind if fabric else None,
        "ports": fabric.ports if fabric else 0,
        "gbps": fabric.gbps if fabric else 0,
        # EFA reaches the memory of the GPUs of P4d, P4de, P5 and P6, which are the types with NVSwitches.
        "gpu_direct": fabric is not None and (fabric.kind == "infiniband" or gpu.nvswitch),
        # A bridge joins two boards; on more, some go another way.
        "nvlink": gpu.nvswitch or (gpu.nvlink and node.gpu_count == 2),
        "busbw_gb_s": link.allreduce_busbw_gb_s if link else 0,
        "source": link.source if link else "",
    }
    found: dict[str, object] = {"verify_fabric_expected": expected}
    if fabric and fabric.kind == "infiniband":
        found |= {
            "infiniband_ports": fabric.ports,
            "infiniband_gbps": fabric.gbps,
            "infiniband_subnet_manager": fabric.subnet_manager,
            "infiniband_kernel_modules": pool.nvidia_driver.kernel_modules,
        }
    if fabric and pool.efa:
        row = next((row for row in load_catalog().efa if row.installer == pool.efa.installer), None)
        found |= {
            "efa_installer": pool.efa.installer,
            "efa_installer_sha256": (row and row.sha256) or "",
            "efa_devices": fabric.ports,
            "efa_kernel_modules": pool.nvidia_driver.kernel_modules,
            "efa_engines": engines,
        }
    return found


def _engine_needs(engines: list[str], lock: Lock) -> dict[str, str]:
    """The oldest driver that each engine's CUDA runs on; an engine without CUDA needs none."""
    rows = {(row.distribution, row.version): row.driver_min for row in load_catalog().engines}
    found: dict[str, str] = {}
    for name in engines:
        engine = lock.engines[name]
        if least := rows.get((engine.distribution, engine.version)):
            found[f"{engine.distribution} {engine.version}"] = least
    return found


def _served(model: LockedModel, lock: Lock) -> dict[str, object]:
    return {
        "name": model.name,
        "environment": lock.engines[model.engine].environment,
        "port": model.port,
        "vllm": model.vllm.model_dump(mode="json", exclude_none=True),
        "env": dict(model.env),
        "drain_seconds": model.drain_seconds,
        "path": f"/var/lib/models/{model.name}/{model.manifest_sha256[:12]}",
    }


def _gateway_vars(handover: Handover, lock: Lock) -> dict[str, object]:
    asked = {"notice_port": NOTICE_PORT} if _is_told(handover) else {}
    return {
        # Ansible calls a node unreachable whose gateway does not answer, and such a node's play ends where it stands. A
        # gateway that reboots is waited for: 0, 1, 3, 7, 15 and 30 s, and 10 s for each try. What it is asked for by
        # the upgrade may be said twice.
        "ansible_ssh_retries": 6,
        "gateway_port": lock.gateway.port,
        "gateway_max_body_mib": lock.gateway.max_body_mib,
        "gateway_models": [
            {
                "name": model.name,
                "backend": backend(model.name),
                "servers": [
                    {"name": node.name, "address": node.address, "port": model.port, **asked}
                    for node in handover.nodes
                    if node.pool == model.pool
                ],
            }
            for model in lock.models
        ],
    }
