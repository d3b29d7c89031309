"""The network between GPUs: what tools say of it, which way was really taken, and what is to be thought of that.

NCCL never fails for want of a fast way: without a plugin, a device or a module it takes the next slower one, says so in
a log that nobody reads, and answers rightly. So a way counts only where the log of a run names it, and whatever is not
the way that the fleet has is a finding. Pure; runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# --- NCCL's log --------------------------------------------------------------------------------------------------

# `host:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0(8)/GDRDMA`. Older versions write a GPU's
# address for its number, and no second number of the channel.
_HOP = re.compile(r"NCCL INFO Channel \d+(?:/\d+)? ?: (\d+)\[\w+\] -> (\d+)\[\w+\] (?:\[(?:send|receive)\] )?via (.+)")
_PLACE = re.compile(r"(?:rank|\[Rank) (\d+)\b.*? n[rR]anks (\d+)\b")
_PROVIDER = re.compile(r"NET/OFI Selected [Pp]rovider is ([^\s,]+?)(?:, fabric is (\S+))? \(found (\d+) nics\)")
_NETWORK = re.compile(r"NCCL INFO Using network (.+)")
_VERSION = re.compile(r"NCCL version (\d[\d.]*)")
_WARNING = re.compile(r"NCCL WARN (.+)")
# What NCCL says, as mere information, when it gives a faster way up.
_GIVEN_UP = re.compile(
    r"NCCL INFO (NET/Plugin: (?:Could not find|Failed to|.*(?:cannot open|not found)).*|NET/IB ?: No device found.*"
    r"|Failed to initialize NET plugin.*|NET/(?:IB|OFI|Socket) ?: GPU Direct RDMA Disabled.*|NCCL_NET_GDR_LEVEL.*|"
    r"NCCL_(?:IB|P2P|SHM)_DISABLE set by environment to 1.*)"
)


@dataclass(frozen=True)
class Hop:
    """One connection between two ranks, as NCCL set it up."""

    sender: int
    receiver: int
    way: str
    """P2P, SHM, or NET and the name of its plugin, e.g. NET/IB, NET/Libfabric, NET/Socket."""
    gpu_direct: bool
    """Over a network: whether the card reads and writes the GPU's memory itself."""
    said: str
    """In NCCL's words."""


@dataclass(frozen=True)
class NcclLog:
    """What NCCL's log says of the ways that it took."""

    version: str = ""
    ranks: int = 0
    hops: tuple[Hop, ...] = ()
    networks: tuple[str, ...] = ()
    """Of each process that said it, which network it uses."""
    providers: tuple[tuple[str, str, int], ...] = ()
    """Of libfabric: provider, fabric, and how many cards it found."""
    reasons: tuple[str, ...] = ()
    """Warnings, and what it says when it gives a faster way up."""


def read_nccl(text: str) -> NcclLog:
    """A log with NCCL_DEBUG=INFO, of one process or of many."""
    hops, networks, providers, reasons = [], [], [], []
    version, ranks = "", 0
    for line in text.splitlines():
        if found := _HOP.search(line):
            hops.append(_hop(int(found[1]), int(found[2]), found[3].strip()))
        elif found := _PROVIDER.search(line):
            providers.append((found[1], found[2] or "", int(found[3])))
        elif found := _NETWORK.search(line):
            networks.append(found[1].strip())
        elif found := _WARNING.search(line) or _GIVEN_UP.search(line):
            reasons.append(found[1].strip())
        if found := _VERSION.search(line):
            version = version or found[1]
        if found := _PLACE.search(line):
            ranks = max(ranks, int(found[2]))
    return NcclLog(
        version,
        ranks,
        tuple(hops),
        tuple(dict.fromkeys(networks)),
        tuple(dict.fromkeys(providers)),
        tuple(dict.fromkeys(reasons)),
    )


def _hop(sender: int, receiver: int, said: str) -> Hop:
    parts = said.split("/")
    if parts[0] == "NET" and len(parts) > 1:
        return Hop(sender, receiver, f"NET/{parts[1]}", "GDRDMA" in parts, said)
    way = "SHM" if "shared memory" in said else parts[0]
    return Hop(sender, receiver, way, False, said)


# --- fi_info and ibstat ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """One entry of `fi_info`."""

    provider: str
    fabric: str
    domain: str
    kind: str


def read_fi_info(text: str) -> list[Endpoint]:
    """What `fi_info` lists; nothing where it has no provider."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        key, colon, value = line.strip().partition(": ")
        if colon and key == "provider":
            found.append({})
        if colon and found:
            found[-1].setdefault(key, value.strip())
    return [Endpoint(e["provider"], e.get("fabric", ""), e.get("domain", ""), e.get("type", "")) for e in found]


@dataclass(frozen=True)
class Port:
    """One port of a host channel adapter, as `ibstat` tells it."""

    adapter: str
    number: int
    state: str
    physical: str
    gbps: int
    link_layer: str
    sm_lid: int
    """Where the subnet manager is; 0: the port knows of none."""


def read_ibstat(text: str) -> list[Port]:
    """Every port of every adapter that `ibstat` lists."""
    found: list[dict[str, str]] = []
    adapter = ""
    for line in text.splitlines():
        words = line.strip()
        if named := re.fullmatch(r"CA '(.+)'", words):
            adapter = named[1]
        elif numbered := re.fullmatch(r"Port (\d+):", words):
            found.append({"adapter": adapter, "number": numbered[1]})
        elif found and found[-1]["adapter"] == adapter:
            key, _, value = words.partition(":")
            found[-1][key] = value.strip()
    return [
        Port(
            port["adapter"],
            int(port["number"]),
            port.get("State", ""),
            port.get("Physical state", ""),
            int(re.match(r"\d*", port.get("Rate", ""))[0] or 0),  # type: ignore[index]
            port.get("Link layer", ""),
            int(port.get("SM lid", "0"), 0),
        )
        for port in found
    ]


def read_bandwidth(text: str) -> float | None:
    """Average of the last row that perftest prints with `--report_gbits`, in Gbit/s; None if there is none."""
    rows = re.findall(r"^\s*\d+\s+\d+\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s*$", text, re.MULTILINE)
    return float(rows[-1]) if rows else None


# --- judge -------------------------------------------------------------------------------------------------------

PLUGINS = {"efa": ("NET/Libfabric", "NET/AWS Libfabric", "NET/OFI"), "infiniband": ("NET/IB",)}
"""By which plugins NCCL reaches a fabric; of InfiniBand also those of HPC-X, whose names begin so (NET/IBext_v8)."""


@dataclass(frozen=True)
class Expected:
    """Which way a fleet's nodes have."""

    fabric: str | None = None
    """efa or infiniband; None: nothing but the host's network."""
    ports: int = 0
    """Cards of a node that are part of it."""
    gbps: float = 0
    """Rate of each."""
    gpu_direct: bool = False
    """Whether its cards reach the memory of GPUs."""
    nvlink: bool = False
    """Whether the GPUs of a node are joined by NVLink."""
    busbw_gb_s: float = 0
    """Least bus bandwidth of an all-reduce inside a node; 0: none is known."""
    source: str = ""
    """Of that."""


@dataclass(frozen=True)
class Run:
    """One all-reduce over several GPUs."""

    gpus: Mapping[int, str]
    """Which node each rank is on."""
    log: NcclLog
    busbw_gb_s: float = 0
    """The best that was measured, as nccl-tests reckons it."""
    kept: bool = True
    """Whether the sums were right."""
    error: str = ""


def judge_run(run: Run, expected: Expected) -> list[str]:
    """What speaks against a run, each with its rule; nothing where it took the way that the fleet has."""
    if run.error:
        return [f"FABRIC-RUN: the all-reduce did not end: {run.error}{_because(run.log)}"]
    nodes = set(run.gpus.values())
    away: list[Hop] = []
    home: list[Hop] = []
    for hop in run.log.hops:
        (home if run.gpus.get(hop.sender) == run.gpus.get(hop.receiver) else away).append(hop)
    if (len(nodes) > 1 and not away) or (len(run.gpus) > 1 and not run.log.hops):
        between = "between the nodes" if len(nodes) > 1 else "between the GPUs"
        return [f"FABRIC-UNSEEN: the log names no way {between}. Set nothing that turns NCCL_DEBUG off"]
    found = [*_between_nodes(away, run.log, expected), *_inside_a_node(home, expected)]
    if not run.kept:
        found.append(
            "FABRIC-WRONG: the sums were not right. Take the nodes out of service, and run it on pairs of them"
        )
    if len(nodes) == 1 and run.busbw_gb_s < expected.busbw_gb_s:
        found.append(
            f"FABRIC-SLOW: {run.busbw_gb_s:g} GB/s inside a node, and {expected.busbw_gb_s:g} is the least "
            f"({expected.source}). See `nvidia-smi nvlink --status`, and whether something else runs on the GPUs"
        )
    return found


def _between_nodes(hops: Sequence[Hop], log: NcclLog, expected: Expected) -> Iterable[str]:
    if not hops or expected.fabric is None:
        return
    plugins = PLUGINS[expected.fabric]
    astray = [hop for hop in hops if not hop.way.startswith(plugins)]
    if astray:
        yield (
            f"FABRIC-FALLBACK: {_counted(astray, hops)} between nodes go {_ways(astray)}, not over {expected.fabric}"
            f"{_because(log)}"
        )
    others = [provider for provider, _, _ in log.providers if provider != "efa"]
    if expected.fabric == "efa" and others:
        yield f"FABRIC-PROVIDER: libfabric chose {', '.join(others)}, not efa. `fi_info -p efa` says what it sees"
    staged = [hop for hop in hops if hop not in astray and not hop.gpu_direct]
    if expected.gpu_direct and staged:
        yield (
            f"FABRIC-STAGED: {_counted(staged, hops)} between nodes go through the memory of the host ({_ways(staged)} "
            f"without GDRDMA){_because(log)}"
        )
    few = [count for provider, _, count in log.providers if provider == "efa" and count < expected.ports]
    if expected.fabric == "efa" and few:
        yield f"FABRIC-CARDS: libfabric found {min(few)} cards and the node has {expected.ports}: see `fi_info -p efa`"


def _inside_a_node(hops: Sequence[Hop], expected: Expected) -> Iterable[str]:
    slow = [hop for hop in hops if hop.way == "SHM" or hop.way.startswith("NET/")]
    if expected.nvlink and slow:
        yield (
            f"FABRIC-NO-NVLINK: {_counted(slow, hops)} inside a node go {_ways(slow)}, through the memory of the host, "
            "and the GPUs have NVLink. See `nvidia-smi topo -m`, and nvidia-fabricmanager where there is an NVSwitch"
        )


def _ways(hops: Sequence[Hop]) -> str:
    return ", ".join(sorted({f"via {hop.way}" for hop in hops}))


def _counted(some: Sequence[Hop], of: Sequence[Hop]) -> str:
    return f"{len(some)} of {len(of)} connections"


def _because(log: NcclLog) -> str:
    """NCCL's own words, which are the only ones that name a cause."""
    return f". NCCL says: {'; '.join(log.reasons[:4])}" if log.reasons else ""


def judge_efa(endpoints: Sequence[Endpoint], expected: Expected) -> list[str]:
    """What `fi_info -p efa -t FI_EP_RDM` shows against what the node has."""
    domains = {e.domain for e in endpoints if e.provider == "efa" and e.kind == "FI_EP_RDM"}
    if len(domains) >= expected.ports:
        return []
    if not domains:
        return [
            "EFA-NONE: libfabric finds no EFA device. See `lsmod | grep efa`, `lspci -d 1d0f:`, and that the security "
            "group lets its members talk to each other"
        ]
    names = ", ".join(sorted(domains))
    return [f"EFA-CARDS: libfabric finds {len(domains)} EFA devices ({names}), and the node has {expected.ports}"]


def judge_infiniband(ports: Sequence[Port], expected: Expected) -> list[str]:
    """What `ibstat` shows against what the spec says."""
    there = [port for port in ports if port.link_layer == "InfiniBand"]
    well = [p for p in there if p.state == "Active" and p.physical == "LinkUp" and p.gbps >= expected.gbps]
    if len(well) >= expected.ports:
        return []
    found = [f"INFINIBAND-PORTS: {len(well)} of {expected.ports} ports are up with {expected.gbps:g} Gbit/s"]
    for port in there:
        name = f"{port.adapter} port {port.number}"
        if port.physical != "LinkUp":
            found.append(f"{name} has no link ({port.physical}): its cable, or the switch's port")
        elif port.state != "Active":
            manager = f"the subnet manager at lid {port.sm_lid}" if port.sm_lid else "no subnet manager"
            found.append(f"{name} is {port.state}, with {manager}")
        elif port.gbps < expected.gbps:
            found.append(f"{name} has {port.gbps} Gbit/s: its cable, or the switch's port")
    if not there:
        others = ", ".join(sorted({port.link_layer for port in ports}))
        found.append(f"there are {others} ports alone" if others else "there is no adapter; see `lspci -d 15b3:`")
    return ["; ".join(found)]


AZURE = "Azure/azurehpc-health-checks conf/*.conf @0e0a1ac (2026-05-01)"
PORT_LEAST = {100: 78, 200: 180, 400: 360}
"""By the rate of a port the least bandwidth that Azure accepts of its machines, in Gbit/s; of 800 none is known."""


def judge_bandwidth(between: str, gbps: float | None, expected: Expected) -> list[str]:
    """Of one port to another, by ib_write_bw, in Gbit/s; None where it gave no figure."""
    if gbps is None:
        return [f"FABRIC-PERFTEST: ib_write_bw between {between} gave no figure. Start it by hand on both"]
    least = PORT_LEAST.get(int(expected.gbps), 0)
    if gbps < least:
        return [f"FABRIC-SLOW: {gbps:g} Gbit/s between {between}, and {least} is the least ({AZURE})"]
    return []


def way_to_gpus(peer_memory: bool, kernel_modules: str, kernel: str) -> str:
    """How an adapter reaches the memory of GPUs: peermem, dma-buf, or nothing where it does not.

    `peer_memory`: the kernel's RDMA core has the interface of NVIDIA's DOCA and OFED, which upstream kernels lack.
    Sources: NVIDIA, GPUDirect RDMA (DMA-BUF from Linux 5.12 on, open kernel modules); NCCL looks for the same symbol.
    """
    if peer_memory:
        return "peermem"
    numbers = tuple(int(part) for part in re.findall(r"\d+", kernel)[:2])
    return "dma-buf" if kernel_modules == "open" and numbers >= (5, 12) else ""


LEAST_SHARE = 0.8
"""Of the bus bandwidth once measured between the same nodes, what is still no fault. Chosen here on 2026-11-29, for
collectives on an idle fabric repeat within a few percent; verified nowhere."""


def slower(between: str, busbw_gb_s: float, before: float) -> list[str]:
    """Bus bandwidth, in GB/s, against that of the first run between the same nodes; 0: there was none."""
    if busbw_gb_s >= before * LEAST_SHARE:
        return []
    return [
        f"FABRIC-SLOWER: {busbw_gb_s:g} GB/s between {between}, and it had {before:g}. If it is to stay so, measure "
        "anew: -e verify_fabric_anew=true"
    ]
