"""The lab's network: a bridge of its own, a way out for the nodes, one forwarded port, keys and the artefact server."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gpuyard.lab import artefacts, mirror
from gpuyard.lab.errors import LabError
from gpuyard.lab.host import (
    PATIENCE_SECONDS,
    Process,
    drop_empty_cgroups,
    empty_all_cgroups,
    end,
    end_orphans,
    give_to_owner,
    make_folder,
    refuse_what_cannot_work,
    run,
    start,
    wait_until,
)
from gpuyard.lab.models import Forward, LabRef, Mirrors, ModelMirror, NetworkState, SshAccess
from gpuyard.lab.place import FORMAT, Place, free_subnet, read_json, registry, write_atomically, write_json

ARTEFACT_PORT = 8099
_SERVER = "artefacts"
_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def up(place: Place, port: int) -> NetworkState:
    """Make or mend the network. Asking again changes nothing that is whole."""
    refuse_what_cannot_work(place)
    with place.lock():
        end_orphans(place)
        _refuse_a_port_in_use(port)
        subnet = _claim_subnet(place, port)
        give_to_owner(place.state.parent.parent, place.state.parent, place.state)
        make_ssh_key(place)
        _make_bridge(place, subnet)
        write_table(place)
        mirror.build(place)
        for gone in place.nodes.glob(".*.gone"):  # of a removal that was killed
            shutil.rmtree(gone, ignore_errors=True)
        _serve(place, subnet)
        state = _read(place)
    if state is None or not state.healthy:
        raise LabError("LAB-NETWORK", f"the network of {place.state}", f"broken: {', '.join(_complaints(place))}")
    return state


def read(place: Place) -> NetworkState | None:
    return _read(place)


def down(place: Place) -> None:
    """Remove the network and everything the nodes took from it."""
    with place.lock():
        end(place, _SERVER, place.state / "server.json")
        drop_empty_cgroups(place)
        _remove_tables(place)
        _remove_links(place)
        with registry() as labs:
            labs.pop(place.id, None)
            _restore_forwarding(labs)
        for name in ("lab.json", "server.log"):
            (place.state / name).unlink(missing_ok=True)


def subnet_of(place: Place) -> str:
    found = read_json(place.state / "lab.json")
    if found is None:
        raise LabError("LAB-NETWORK", f"no network at {place.state}", "a node is plugged into it", "run `pulumi up`")
    return found["subnet"]


def gateway_address(place: Place) -> str:
    """Where 127.0.0.1:<port> leads: the first gateway, or where it will be."""
    taken: dict[str, str] = read_json(place.state / "addresses.json") or {}
    first = ipaddress.IPv4Network(subnet_of(place)).network_address
    gateways = [address for address in taken.values() if 10 <= int(address.rsplit(".", 1)[1]) < 20]
    return min(gateways, key=ipaddress.IPv4Address, default=str(first + 10))


def host_address(subnet: str) -> str:
    return str(ipaddress.IPv4Network(subnet).network_address + 1)


def nft_table(place_table: str, bridge: str, subnet: str, gateway: str, port: int) -> str:
    """The lab's whole firewall, loaded as one transaction in place of what was there."""
    return f"""\
table ip {place_table}
delete table ip {place_table}
table ip {place_table} {{
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{bridge}" ip daddr 127.0.0.0/8 drop comment "route_localnet serves us, not the nodes"
    }}
    chain forward_port {{
        type nat hook output priority -100; policy accept;
        ip daddr 127.0.0.1 tcp dport {port} dnat to {gateway}:{port}
    }}
    chain way_out {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
        ip saddr 127.0.0.0/8 oifname "{bridge}" masquerade
    }}
}}
"""


# --- subnet ----------------------------------------------------------------------------------------------


def _claim_subnet(place: Place, port: int) -> str:
    """This lab's subnet in the machine's list of labs: the one it had, else a free one."""
    recorded = (read_json(place.state / "lab.json") or {}).get("subnet")
    with registry() as labs:
        _clear_away_what_lost_its_folder(labs, place)
        others = {lab["subnet"]: lab for key, lab in labs.items() if key not in {place.id, _HOST}}
        if recorded in others:
            raise LabError(
                "LAB-SUBNET",
                f"{recorded} belongs to {place.state}",
                f"meanwhile {others[recorded]['state']} took it",
                "remove one of the two with `gpuyard lab down`",
            )
        for lab in others.values():
            if lab["port"] == port:
                raise LabError(
                    "LAB-PORT",
                    f"127.0.0.1:{port} leads to the lab {lab['state']}",
                    "a port leads to one gateway",
                    f"set another `gateway.port` in the fleet file, e.g. {port + 10}",
                )
        mine: str = recorded or labs.get(place.id, {}).get("subnet") or free_subnet(others, _routed(place.bridge))
        labs[place.id] = {"subnet": mine, "port": port, "state": str(place.state)}
        labs.setdefault(_HOST, {"ip_forward": _IP_FORWARD.read_text().strip()})
        # Inside the claim: a lab in the list without this file counts as one whose folder was deleted.
        # The nodes of an older lab stay what they are, so its format does too.
        kind = FORMAT if recorded is None else (read_json(place.state / "lab.json") or {}).get("format", 1)
        write_json(place.state / "lab.json", {"id": place.id, "subnet": mine, "port": port, "format": kind})
    _IP_FORWARD.write_text("1\n")
    return mine


def _clear_away_what_lost_its_folder(labs: dict[str, Any], place: Place) -> None:
    """A clone deleted with its lab up left a table that catches its port, and nobody who could take it down."""
    for key in [key for key in labs if key not in {place.id, _HOST}]:
        state = Path(labs[key]["state"])
        if not (state / "lab.json").is_file():
            gone = Place(LabRef(project=state.parents[2], stack=state.name), place.cache)
            empty_all_cgroups(gone)
            _remove_tables(gone)
            _remove_links(gone)
            del labs[key]


_HOST = "host"  # the registry's one entry that is no lab: what the machine's settings were before the first


def _restore_forwarding(labs: dict[str, Any]) -> None:
    if set(labs) == {_HOST}:
        _IP_FORWARD.write_text(labs.pop(_HOST)["ip_forward"] + "\n")


def _routed(but: str) -> list[ipaddress.IPv4Network]:
    found: list[ipaddress.IPv4Network] = []
    for route in json.loads(run("ip", "-json", "-4", "route", "show", "table", "all").stdout or "[]"):
        if route.get("dev") != but and route["dst"] != "default":
            found.append(ipaddress.IPv4Network(route["dst"], strict=False))
    return [network for network in found if network.prefixlen > 8]  # a route that wide is no claim to our addresses


# --- port ------------------------------------------------------------------------------------------------


def _refuse_a_port_in_use(port: int) -> None:
    for line in run("ss", "-Hltnp", "sport", "=", f":{port}").stdout.splitlines():
        _, _, _, local, _, *process = line.split()
        address = local.rsplit(":", 1)[0]
        if address in {"127.0.0.1", "0.0.0.0", "*"}:  # noqa: S104 - what ss prints, nothing is bound
            who = process[0].removeprefix("users:") if process else "a process of another user"
            raise LabError(
                "LAB-PORT",
                f"port {port} of this machine is in use",
                f"{who} listens on {local} and would no longer be reached",
                f"stop it, or set another `gateway.port` in the fleet file, e.g. {port + 10}",
            )


# --- keys ------------------------------------------------------------------------------------------------


def make_ssh_key(place: Place) -> None:
    place.ssh.mkdir(mode=0o700, exist_ok=True)
    key = place.ssh / "id_ed25519"
    if not (key.is_file() and key.with_suffix(".pub").is_file()):
        make_key(key, f"gpuyard-{place.lab.stack}")
    known = place.ssh / "known_hosts"
    if not known.is_file():
        write_atomically(known, "")
    give_to_owner(place.ssh, key, key.with_suffix(".pub"), known)


def make_key(path: Path, comment: str) -> None:
    """A new key pair at `path`, there wholly or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    for old in (fresh, fresh.with_suffix(".new.pub"), Path(f"{fresh}.pub")):
        old.unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", fresh)
    Path(f"{fresh}.pub").replace(f"{path}.pub")
    fresh.replace(path)


# --- bridge and table ------------------------------------------------------------------------------------


def _make_bridge(place: Place, subnet: str) -> None:
    if not _link(place.bridge):
        run("ip", "link", "add", place.bridge, "type", "bridge")
    address = f"{host_address(subnet)}/24"
    run("ip", "address", "replace", address, "dev", place.bridge)
    run("ip", "link", "set", place.bridge, "up")
    Path(f"/proc/sys/net/ipv4/conf/{place.bridge}/route_localnet").write_text("1\n")
    for port in _node_ports(place):
        # A bridge that was deleted under running nodes: their cables are still there, loose.
        run("ip", "link", "set", port, "master", place.bridge, "up")


def _remove_tables(place: Place) -> None:
    for family in ("ip", "bridge"):  # the second holds a partition, while there is one
        run("nft", "delete", "table", family, place.table, check=False)


def _remove_links(place: Place) -> None:
    """The bridge, and the cables to it: the kernel takes its time with those of a node that has just ended."""
    for link in json.loads(run("ip", "-json", "link", "show").stdout):
        if link["ifname"] == place.bridge or link["ifname"].startswith(f"vb-{place.id}-"):
            run("ip", "link", "delete", link["ifname"], check=False)


def _link(name: str) -> dict[str, Any] | None:
    done = run("ip", "-json", "address", "show", "dev", name, check=False)
    return None if done.returncode else (json.loads(done.stdout) or [None])[0]


def _node_ports(place: Place) -> list[str]:
    taken: dict[str, str] = read_json(place.state / "addresses.json") or {}
    return [port for address in taken.values() if _link(port := f"vb-{place.machine(address)}")]


def write_table(place: Place) -> None:
    found = read_json(place.state / "lab.json")
    if found:
        text = nft_table(place.table, place.bridge, found["subnet"], gateway_address(place), found["port"])
        run("nft", "-f", "-", stdin=text)


# --- artefact server -------------------------------------------------------------------------------------


def _serve(place: Place, subnet: str) -> None:
    record = place.state / "server.json"
    if _answers(place, subnet):
        return
    end(place, _SERVER, record)
    make_folder(place.models)
    address = f"{host_address(subnet)}:{ARTEFACT_PORT}"
    log = place.state / "server.log"
    who, roots = _artefacts(place)
    command = [sys.executable, "-B", "-m", "gpuyard.lab.artefacts", address, who, str(place.views), *roots]
    start(place, _SERVER, record, log, command)
    if not wait_until(lambda: _answers(place, subnet), PATIENCE_SECONDS, 0.1):
        raise LabError("LAB-ARTEFACTS", f"the artefact server does not answer on {address}", change=f"see {log}")


def _artefacts(place: Place) -> tuple[str, list[str]]:
    """What is served, and a name for it by which a server of another lab, cache or version is not taken for ours."""
    roots = [f"nvidia={place.apt}", f"models={place.models}"]
    code = Path(artefacts.__file__).read_text()
    return hashlib.sha256("\0".join([place.id, code, str(place.views), *roots]).encode()).hexdigest()[:16], roots


def _answers(place: Place, subnet: str) -> bool:
    process = Process.recorded(place.state / "server.json")
    if process is None or not process.alive:
        return False
    try:
        url = f"http://{host_address(subnet)}:{ARTEFACT_PORT}/health"
        with urllib.request.urlopen(url, timeout=3) as answer:
            return answer.read().decode() == _artefacts(place)[0]
    except (urllib.error.URLError, OSError):
        return False


# --- state -----------------------------------------------------------------------------------------------


def _read(place: Place) -> NetworkState | None:
    found = read_json(place.state / "lab.json")
    if found is None:
        return None
    subnet, port = found["subnet"], found["port"]
    uri = f"http://{host_address(subnet)}:{ARTEFACT_PORT}"
    return NetworkState(
        subnet=subnet,
        bridge=place.bridge,
        healthy=not _complaints(place),
        ssh=SshAccess(
            user="root", private_key_file=place.ssh / "id_ed25519", known_hosts_file=place.ssh / "known_hosts"
        ),
        mirrors=Mirrors(nvidia=mirror.access(place, f"{uri}/nvidia"), models=ModelMirror(uri=f"{uri}/models")),
        forward=Forward(host_port=port, node_port=port),
    )


def _complaints(place: Place) -> list[str]:
    """What is broken in a network that should be up."""
    subnet = subnet_of(place)
    link = _link(place.bridge)
    wrong: list[str] = []
    addresses = {info["local"] for info in link["addr_info"]} if link else set[str]()
    if not (link and host_address(subnet) in addresses and "UP" in link["flags"]):
        wrong.append(f"bridge {place.bridge}")
    if link and any((_link(port) or {}).get("master") != place.bridge for port in _node_ports(place)):
        wrong.append("cables of nodes")
    table = run("nft", "list", "table", "ip", place.table, check=False).stdout
    rules = (f"dnat to {gateway_address(place)}", "ip daddr 127.0.0.0/8 drop", f"ip saddr {subnet}")
    if not all(rule in table for rule in rules) or table.count("masquerade") != 2:
        wrong.append(f"table {place.table}")
    if not _answers(place, subnet):
        wrong.append("artefact server")
    if not mirror.whole(place):
        wrong.append("apt repository")
    return wrong
