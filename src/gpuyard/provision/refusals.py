"""What AWS would refuse, or would make wrongly, told before anything is asked of an account."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

from gpuyard.catalog import load_distributions, load_instances, load_lustre_clients, load_network_cards, numbers
from gpuyard.catalog.rows import Instance, LustreClient, NetworkCards, OperatingSystem
from gpuyard.plan.judge import Finding
from gpuyard.provision.placement import zones_of
from gpuyard.provision.storage import lustre_addresses
from gpuyard.spec.aws import Aws, Lustre
from gpuyard.spec.fleet import Fleet, Pool

_EC2 = "Amazon EC2 User Guide"
_RESERVED = 5  # AWS keeps the first four addresses and the last one of every subnet
_ENDPOINTS = 2
_STORAGE = "storage.yaml"
_CLIENTS = "lustre_clients.yaml"
# Least size of a Lustre file system with EFA in TiB by its throughput; from memory.
_EFA_TIB = {125: 38.4, 250: 19.2, 500: 9.6, 1000: 4.8}


@dataclass(frozen=True, slots=True)
class Machines:
    """What the catalog knows of EC2's machines, and of what they can run."""

    instances: Sequence[Instance]
    cards: Sequence[NetworkCards]
    lustre_clients: Sequence[LustreClient]
    distributions: Sequence[OperatingSystem]

    @classmethod
    def known(cls) -> Self:
        """Those of the tables that come with gpuyard."""
        return cls(load_instances(), load_network_cards(), load_lustre_clients(), load_distributions())

    def instance(self, name: str | None) -> Instance | None:
        return next((row for row in self.instances if row.provider == "aws" and row.instance == name), None)

    def network_cards(self, name: str) -> NetworkCards | None:
        """None: it has one card, or the catalog does not know how many."""
        return next((row for row in self.cards if row.provider == "aws" and row.instance == name), None)


def refusals(fleet: Fleet, machines: Machines) -> list[Finding]:
    """Every reason why this fleet cannot be made as it is asked for; nothing for other providers.

    A fleet that says nothing of AWS can be planned and locked: that finding is amber, and stops what makes machines.
    """
    if fleet.provider != "aws":
        return []
    if fleet.aws is None:
        change = "say there where it stands: region, zones, image, network; `gpuyard plan` needs none of it"
        need, source = "what stands around the machines", "docs/aws.md"
        return [Finding("AWS-SETTINGS", "amber", "aws", "no settings", need, change, source, verified=True)]
    found: list[Finding] = []
    for index, pool in enumerate(fleet.pools):
        found += _of_pool(pool, f"pools[{index}]", fleet.aws, machines)
        found += _of_files(pool, f"pools[{index}]", fleet)
    found += _of_gateways(fleet, fleet.aws)
    found += _of_network(fleet, fleet.aws)
    if fleet.aws.lustre:
        found += _of_lustre(fleet, fleet.aws.lustre)
        found += _of_lustre_client(fleet, fleet.aws.lustre, machines)
    return found


def architecture_of(instance: str) -> str:
    """By AWS's naming of types: a g after the generation is Graviton, and GB stands for Grace Blackwell."""
    family = instance.partition(".")[0]
    return "arm64" if re.match(r"^[a-z]+[0-9]+[a-z]*g[a-z]*$", family) or "-gb" in family else "x86_64"


def _of_pool(pool: Pool, where: str, aws: Aws, machines: Machines) -> Iterator[Finding]:
    place = f"{where}.machine.instance"
    name = pool.machine.instance if pool.machine else None
    able = [row for row in machines.instances if (row.provider, row.gpu, row.gpus) == _wanted(pool)]
    fitting = ", ".join(row.instance for row in able) or "none that the catalog knows"
    row = machines.instance(name)
    if name is None or row is None:
        have = f"{name}, which the catalog does not know" if name else "no type of machine"
        yield _red("AWS-INSTANCE", place, have, "a type of EC2", f"name one of {fitting}", "instances.yaml")
        return
    if row not in able:
        have = f"{name}, with {row.gpus} x {row.gpu}"
        need = f"{pool.gpus_per_node} x {pool.gpu}, as the pool says"
        yield _red("AWS-INSTANCE", place, have, need, f"name one of {fitting}", "instances.yaml")
    if architecture_of(name) != aws.image.architecture:
        have, need = f"{name}, of {architecture_of(name)}", f"a machine of {aws.image.architecture}, as aws.image is"
        yield _red("AWS-ARCHITECTURE", place, have, need, "take an image of that architecture", _EC2)
    yield from _of_cards(pool, where, row, able, machines)


def _wanted(pool: Pool) -> tuple[str, str, int]:
    return "aws", pool.gpu, pool.gpus_per_node


def _of_cards(pool: Pool, where: str, row: Instance, able: Sequence[Instance], machines: Machines) -> Iterator[Finding]:
    asked = pool.aws.network_cards if pool.aws else None
    if pool.efa is None:
        if asked is not None:
            have, change = f"{asked} cards and no efa", "add `efa: {}`, or leave network_cards out"
            yield _red("AWS-CARDS", f"{where}.aws.network_cards", have, "EFA on them", change, _EC2)
        return
    if not row.efa:
        others = ", ".join(other.instance for other in able if other.efa)
        change = f"take {others}, or leave efa out" if others else "leave efa out"
        yield _red(
            "AWS-EFA", f"{where}.efa", f"{row.instance}, which has no EFA", "a type with EFA", change, row.source
        )
        return
    if asked is not None and asked > row.efa:
        have = f"{asked} cards with EFA"
        need = f"at most {row.efa}: that many has {row.instance}"
        yield _red("AWS-CARDS", f"{where}.aws.network_cards", have, need, f"set it to {row.efa}", row.source)
    if row.efa > 1 and machines.network_cards(row.instance) is None:
        have = f"{row.instance}, whose {row.efa} EFA interfaces the catalog cannot place"
        change = "add a row with its source to network_cards.yaml, or leave efa out"
        yield _red("AWS-CARDS-UNKNOWN", f"{where}.efa", have, "its cards in the catalog", change, "network_cards.yaml")


def _of_files(pool: Pool, where: str, fleet: Fleet) -> Iterator[Finding]:
    lustre = fleet.aws.lustre if fleet.aws else None
    if lustre is None:
        return
    zones = zones_of(pool, fleet)
    place = "aws.lustre.zone"
    if lustre.zone not in zones:
        have, need = lustre.zone, f"a zone of pool {pool.name}: {', '.join(zones)}"
        change = f"set it to {zones[0]}, or give the pool zone {lustre.zone}"
        yield _red("AWS-FILES-ZONE", place, have, need, change, _STORAGE)
    elif lustre.efa and pool.efa and zones != (lustre.zone,):
        have = f"{', '.join(zones)}, and EFA stays inside a zone"
        need = f"zone {lustre.zone} alone, where the file system stands"
        change = f"set {where}.aws.zones to [{lustre.zone}], or aws.lustre.efa to false"
        yield _red("AWS-FILES-ZONE", f"{where}.aws.zones", have, need, change, _STORAGE)


def _of_gateways(fleet: Fleet, aws: Aws) -> Iterator[Finding]:
    if architecture_of(aws.gateway_instance) != aws.image.architecture:
        have = f"{aws.gateway_instance}, of {architecture_of(aws.gateway_instance)}"
        need = f"a machine of {aws.image.architecture}, as aws.image is"
        yield _red("AWS-ARCHITECTURE", "aws.gateway_instance", have, need, "take another type or image", _EC2)
    if fleet.gateway.nodes > 1 and len(aws.zones) == 1:
        have, need = f"{fleet.gateway.nodes} gateways in {aws.zones[0]}", "two zones, or the zone takes all of them"
        yield _red("AWS-GATEWAY-ZONES", "aws.zones", have, need, "name a second zone, or one gateway", "docs/aws.md")


def _of_network(fleet: Fleet, aws: Aws) -> Iterator[Finding]:
    if aws.network.cidr is None:
        return
    try:
        whole = ipaddress.ip_network(aws.network.cidr)
    except ValueError as error:
        change = "write the first address of the network and its length, e.g. 10.60.0.0/16"
        yield _red("AWS-CIDR", "aws.network.cidr", f"{aws.network.cidr}: {error}", "a network", change, _EC2)
        return
    bits, most = aws.network.subnet_bits, 2 * len(aws.zones)
    if not 16 <= whole.prefixlen <= 28 or bits < whole.prefixlen or 2 ** (bits - whole.prefixlen) < most:
        have = f"{whole}, cut into subnets of /{bits}"
        need = f"{most} subnets, a private and a public one in each zone, in a VPC of /16 to /28"
        change = f"set subnet_bits to {min(28, whole.prefixlen + (most - 1).bit_length())}, or a wider cidr"
        yield _red("AWS-SUBNETS", "aws.network.subnet_bits", have, need, change, _EC2)
        return
    room = 2 ** (32 - bits) - _RESERVED
    for zone in aws.zones:
        if (taken := addresses_in(zone, fleet, aws)) > room:
            have, need = f"{room} addresses in a private subnet of {zone}", f"{taken}, if all of its nodes stand there"
            change = f"set it to {32 - (taken + _RESERVED - 1).bit_length()} or less"
            yield _red("AWS-SUBNET-SMALL", "aws.network.subnet_bits", have, need, change, _EC2)
            return


def addresses_in(zone: str, fleet: Fleet, aws: Aws) -> int:
    """Most addresses that a zone's private subnet gives out: EFA-only interfaces take none."""
    nodes = sum(pool.nodes for pool in fleet.pools if zone in zones_of(pool, fleet))
    gateways = ceil(fleet.gateway.nodes / min(2, len(aws.zones))) if zone in aws.zones[:2] else 0
    lustre = lustre_addresses(aws.lustre.tib) if aws.lustre and aws.lustre.zone == zone else 0
    return nodes + gateways + lustre + int(aws.efs) + (_ENDPOINTS if aws.access.method == "ssm" else 0)


def _of_lustre(fleet: Fleet, lustre: Lustre) -> Iterator[Finding]:
    if lustre.efa and not any(pool.efa for pool in fleet.pools):
        have, change = "EFA, and no pool with it", "set it to false, or give a pool `efa: {}`"
        yield _red("AWS-LUSTRE-EFA", "aws.lustre.efa", have, "a pool that reads it over EFA", change, _STORAGE)
    steps = lustre.tib / 2.4
    if lustre.tib != 1.2 and abs(steps - round(steps)) > 1e-6:
        change = f"set it to {round(ceil(steps) * 2.4, 1)}"
        yield _red(
            "AWS-LUSTRE-SIZE", "aws.lustre.tib", f"{lustre.tib} TiB", "1.2 or a multiple of 2.4", change, _STORAGE
        )
    if lustre.efa and lustre.tib < _EFA_TIB[lustre.mb_s_per_tib]:
        have = f"{lustre.tib} TiB with EFA at {lustre.mb_s_per_tib} MB/s for each TiB"
        need = f"{_EFA_TIB[lustre.mb_s_per_tib]} TiB or more"
        yield _red(
            "AWS-LUSTRE-SIZE",
            "aws.lustre.tib",
            have,
            need,
            "make it larger, or set efa to false",
            _STORAGE,
            known=False,
        )


def _of_lustre_client(fleet: Fleet, lustre: Lustre, machines: Machines) -> Iterator[Finding]:
    clients = {row.distribution: row for row in machines.lustre_clients if row.provider == "aws"}
    systems = {row.distribution: row for row in machines.distributions}
    client, system = clients.get(fleet.distribution), systems.get(fleet.distribution)
    if system is None:
        return  # PLAN-DISTRIBUTION says so
    if client is None:
        alike = [
            name
            for name, row in clients.items()
            if systems[name].family == system.family and (row.efa_kernel_from or not lustre.efa)
        ]
        change = (
            f"take {' or '.join(alike)}, with an image (aws.image) and the driver's repository "
            "(aws.nvidia_repository) for it; or leave aws.lustre out: `efs: true` needs no client of its own"
        )
        have = f"{fleet.distribution}, for which AWS publishes no Lustre client"
        yield _red("AWS-LUSTRE-CLIENT", "distribution", have, "one that can mount aws.lustre", change, _CLIENTS)
        return
    series, first = fleet.kernel_series or system.kernels[0], client.efa_kernel_from
    if lustre.efa and (first is None or numbers(series) < numbers(first)):
        have = f"EFA, and kernel {series} of {fleet.distribution}"
        need = f"kernel {first} or newer" if first else "a distribution whose client reaches it over EFA"
        change = f'set kernel to "{first}", or aws.lustre.efa to false' if first else "set it to false"
        yield _red("AWS-LUSTRE-CLIENT", "aws.lustre.efa", have, need, change, _CLIENTS, known=client.verified)


def _red(rule: str, what: str, have: str, need: str, change: str, source: str, known: bool = True) -> Finding:
    return Finding(rule, "red", what, have, need, change, source, verified=known)
