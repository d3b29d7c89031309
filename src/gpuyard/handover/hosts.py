"""Hosts you own: a file written by hand in place of a stack, held to the fleet's spec and made the same handover."""

from __future__ import annotations

import difflib
import ipaddress
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from gpuyard.handover import Handover, Mirrors, OperatorPath, SharedStorage, Url, place_of
from gpuyard.spec.closed import Closed, FleetName, NodeName, PoolName, digest_of
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_as
from gpuyard.spec.rules import Broken

GATEWAY = "gateway"
"""What a gateway has for its pool: the one name that no pool may have."""


class HostsSsh(Closed):
    """How the hosts are reached."""

    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
    """Who logs in; root, or one who may `sudo` without a password."""
    private_key_file: OperatorPath
    """The key, on the machine that Ansible runs on; `~` is the home of who runs it."""
    known_hosts_file: OperatorPath
    """The hosts' own keys, by address. A host whose key is not in it is not talked to."""


class Host(Closed):
    """One machine."""

    name: NodeName
    """What the fleet calls it."""
    pool: PoolName
    """Pool of the fleet that it belongs to, or gateway."""
    address: str
    """Its IP address: engines let nobody in but the addresses of gateways."""
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    """Port of its SSH."""
    simulated: bool = False
    """A node of the lab, whose GPUs are simulated."""


class Hosts(Closed):
    """The machines of a fleet whose provider is hosts."""

    version: Literal[1]
    """Version of this format."""
    fleet: FleetName
    """Name of the fleet."""
    ssh: HostsSsh
    mirrors: Mirrors
    """Where packages and models come from, as the hosts see it."""
    endpoint: Url | None = None
    """What clients call; left out, the first gateway's address and the gateway's port."""
    nodes: Annotated[tuple[Host, ...], Field(min_length=1, max_length=1024)]
    """Every machine."""
    shared_storage: Annotated[tuple[SharedStorage, ...], Field(max_length=16)] = ()
    """File systems that all GPU nodes mount."""


def hosts_path(fleet_file: Path) -> Path:
    """`fleets/onprem.hosts.yaml` for `fleets/onprem.yaml`."""
    return fleet_file.with_name(f"{fleet_file.stem}.hosts.yaml")


def load_hosts(path: Path, fleet: Fleet) -> Handover:
    """The handover that the file makes with the fleet's spec. Raises SpecError with every finding, or RefusedError."""
    if fleet.provider != "hosts":
        found = f"fleet {fleet.name} has provider {fleet.provider}"
        why = "its machines are handed over by its stack, not by a file"
        raise RefusedError("HOSTS-PROVIDER", found, why, "set provider to hosts")
    return handover_of(load_as(Hosts, path, lambda data: broken_rules(data, fleet)), fleet)


def handover_of(hosts: Hosts, fleet: Fleet) -> Handover:
    """What convergence has to know. A host has the GPUs that the spec says of its pool."""
    pools = {pool.name: pool for pool in fleet.pools}
    nodes: list[dict[str, Any]] = []
    managed: set[str] = set()
    for host in hosts.nodes:
        its = host.model_dump(include={"name", "address", "port", "simulated"})
        pool = pools.get(host.pool)
        nodes.append({**its, **place_of(pool)})
        if pool and pool.infiniband:
            fabric = {"kind": "infiniband", "ports": pool.infiniband.ports, "gbps": float(pool.infiniband.gbps)}
            # One is enough, and two that do not know of each other are trouble.
            fabric["subnet_manager"] = pool.infiniband.subnet_manager and pool.name not in managed
            managed.add(pool.name)
            nodes[-1]["fabric"] = fabric
    ssh = hosts.ssh
    first = next(node["address"] for node in nodes if node["role"] == "gateway")
    host_part = f"[{first}]" if ":" in first else first
    storage = [item.model_dump(mode="json") for item in hosts.shared_storage]
    used = {"provider": fleet.provider, "port": fleet.gateway.port, "nodes": nodes, "shared_storage": storage}
    return Handover.model_validate(
        {
            "version": 1,
            "fleet": fleet.name,
            "provider": fleet.provider,
            "stack": fleet.name,
            "provision_digest": digest_of(used),
            "ssh": {
                "user": ssh.user,
                "private_key_file": str(Path(ssh.private_key_file).expanduser()),
                "known_hosts_file": str(Path(ssh.known_hosts_file).expanduser()),
            },
            "mirrors": hosts.mirrors,
            "endpoint": hosts.endpoint or f"http://{host_part}:{fleet.gateway.port}",
            "nodes": tuple(nodes),
            "shared_storage": hosts.shared_storage,
        }
    )


def broken_rules(data: object, fleet: Fleet) -> list[Broken]:
    """Every rule that the file breaks, in its order. What is of the wrong kind is left to the model."""
    root = cast("dict[str, object]", data) if isinstance(data, dict) else {}
    nodes = cast("list[object]", root.get("nodes") if isinstance(root.get("nodes"), list) else [])
    hosts = [(index, cast("dict[str, object]", node)) for index, node in enumerate(nodes) if isinstance(node, dict)]
    return [
        *_it_is_of_this_fleet(root, fleet),
        *_pools_are_known(hosts, fleet),
        *_addresses_can_be_reached_by_others(hosts),
        *_none_is_there_twice(hosts),
        *_there_are_as_many_as_the_spec_says(hosts, fleet),
        *_storage_can_be_mounted(root),
    ]


Indexed = list[tuple[int, dict[str, object]]]


def _it_is_of_this_fleet(root: dict[str, object], fleet: Fleet) -> Iterator[Broken]:
    name = root.get("fleet")
    if isinstance(name, str) and name != fleet.name:
        yield Broken("HOSTS-FLEET", ("fleet",), repr(name), f"{fleet.name}, as the spec beside this file says")


def _pools_are_known(hosts: Indexed, fleet: Fleet) -> Iterator[Broken]:
    known = [*(pool.name for pool in fleet.pools), GATEWAY]
    for index, host in hosts:
        pool = host.get("pool")
        if isinstance(pool, str) and pool not in known:
            close = difflib.get_close_matches(pool, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield Broken("HOSTS-POOL", ("nodes", index, "pool"), repr(pool), f"one of {', '.join(known)}{hint}")


def _addresses_can_be_reached_by_others(hosts: Indexed) -> Iterator[Broken]:
    for index, host in hosts:
        address = host.get("address")
        if not isinstance(address, str):
            continue
        ip = _ip(address)
        path = ("nodes", index, "address")
        if ip is None:
            allowed = "an IP address; a name may lead elsewhere tomorrow, and engines let gateways in by address"
            yield Broken("HOSTS-ADDRESS", path, repr(address), allowed)
        elif ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_link_local:
            kind = next(k for k in ("loopback", "unspecified", "multicast", "link_local") if getattr(ip, f"is_{k}"))
            told = f"{address} ({kind.replace('_', '-')})"
            yield Broken("HOSTS-ADDRESS", path, told, "an address by which the other nodes reach this one")


def _none_is_there_twice(hosts: Indexed) -> Iterator[Broken]:
    for field in ("name", "address"):
        seen: dict[object, int] = {}
        for index, host in hosts:
            value = host.get(field)
            if not isinstance(value, str):
                continue
            # One address may be written in two ways.
            told = _ip(value) or value if field == "address" else value
            if told in seen:
                allowed = f"{field} of its own; nodes[{seen[told]}] has it already"
                yield Broken("HOSTS-DUPLICATE", ("nodes", index, field), repr(value), f"a {allowed}")
            seen.setdefault(told, index)


def _there_are_as_many_as_the_spec_says(hosts: Indexed, fleet: Fleet) -> Iterator[Broken]:
    there = Counter(pool for _, host in hosts if isinstance(pool := host.get("pool"), str))
    wanted = {GATEWAY: fleet.gateway.nodes, **{pool.name: pool.nodes for pool in fleet.pools}}
    for pool, number in wanted.items():
        if there[pool] != number:
            of = "the gateway" if pool == GATEWAY else f"pool {pool}"
            missing = number - there[pool]
            change = f"name {missing} more" if missing > 0 else f"take {-missing} out"
            allowed = f"{number}, as the spec says; {change}, or set nodes of {of} to {there[pool] or 1} there"
            yield Broken("HOSTS-COUNT", ("nodes",), f"{there[pool]} of {of}", allowed)


def _storage_can_be_mounted(root: dict[str, object]) -> Iterator[Broken]:
    found = root.get("shared_storage")
    seen: dict[int, str] = {}
    for index, item in enumerate(cast("list[object]", found) if isinstance(found, list) else []):
        told = cast("dict[str, object]", item) if isinstance(item, dict) else {}
        kind, source, path = told.get("kind"), told.get("source"), told.get("path")
        if isinstance(source, str) and isinstance(kind, str) and source.startswith("/") != (kind == "bind"):
            allowed = "a folder of the hosts, e.g. /data/models" if kind == "bind" else "server:/path"
            yield Broken("HOSTS-STORAGE", ("shared_storage", index, "source"), repr(source), allowed)
        if not isinstance(path, str):
            continue
        for other, place in seen.items():
            if f"{path}/".startswith(f"{place}/") or f"{place}/".startswith(f"{path}/"):
                allowed = f"a path beside {place} of shared_storage[{other}]; one would hide the other"
                yield Broken("HOSTS-STORAGE", ("shared_storage", index, "path"), repr(path), allowed)
        seen[index] = path


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
