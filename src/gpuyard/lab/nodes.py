"""The lab's nodes: full systemd machines, each an overlay on the cached base system, booted by systemd-nspawn."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from gpuyard.lab import network
from gpuyard.lab.errors import LabError
from gpuyard.lab.host import (
    Process,
    empty_all_cgroups,
    end,
    give_to_owner,
    make_folder,
    refuse_a_full_disk,
    refuse_what_cannot_work,
    run,
    start,
    wait_until,
)
from gpuyard.lab.models import NodeSpec, NodeState
from gpuyard.lab.place import Place, free_address, read_json, write_atomically, write_json

BOOT_SECONDS = 120
_STUB_RESOLVERS = ("127.0.0.53", "127.0.0.54")

# The kernel's log of a node. The kernel below is not the node's own, so nothing of it reaches the node; but its journal
# daemon is given a /dev/kmsg: a pipe that PID 1 holds open from both ends, so that nobody who opens it waits. For all
# others in the node /dev/kmsg takes everything and says nothing.
_KERNEL_LOG = {
    "gpuyard-lab-kmsg.socket": (
        "[Unit]\nDescription=Kernel log of a gpuyard lab node\nDefaultDependencies=no\n\n"
        "[Socket]\nListenFIFO=/run/gpuyard-lab/kmsg\nSocketMode=0600\n"
    ),
    "gpuyard-lab-kmsg.service": (
        "[Unit]\nDescription=Kernel log of a gpuyard lab node\nDefaultDependencies=no\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nStandardOutput=null\nStandardError=null\n"
        "ExecStart=/bin/sh -c '[ -e /dev/kmsg ] || mknod -m 600 /dev/kmsg c 1 3'\n"
    ),
    "systemd-journald.service.d/gpuyard-lab.conf": (
        "[Unit]\nRequires=gpuyard-lab-kmsg.socket gpuyard-lab-kmsg.service\n"
        "After=gpuyard-lab-kmsg.socket gpuyard-lab-kmsg.service\n\n"
        "[Service]\nBindPaths=/run/gpuyard-lab/kmsg:/dev/kmsg\n"
    ),
}

# Runs in a mount namespace of its own: what it mounts ends with the node, however the node ends.
# nspawn inside an older hierarchy would boot a node whose units have no cgroup2, so it is given one.
# nspawn ends with 133 when the node reboots and leaves it to us to start it again. A trapped signal ends `wait` early,
# so it is asked until the node's process is gone. Whoever kills this shell kills the node with it.
_BOOT = """
set -eu
if [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -R /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
fi
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
cd "$1"; shift
mount -t overlay overlay -o lowerdir=base,upperdir=upper,workdir=work merged
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
trap 'kill -TERM "$node"' TERM
while :; do
    setpriv --pdeathsig KILL systemd-nspawn "$@" &
    node=$!
    code=0
    while kill -0 "$node" 2>/dev/null; do
        wait "$node" && code=0 || code=$?
    done
    [ "$code" = 133 ] || exit "$code"
done
"""


def up(place: Place, spec: NodeSpec) -> NodeState:
    """Make a node, or boot a dead one on its old disk, or leave a living one alone."""
    refuse_what_cannot_work(place)
    with place.lock():
        address = _address(place, spec)
        if spec.role == "gateway":
            network.write_table(place)
    with place.lock(spec.name):
        if not _disk(place, spec.name).is_dir():
            refuse_a_full_disk(place)
            _make_disk(place, spec, address)
        elif read_json(place.node(spec.name) / "node.json") != spec.model_dump(mode="json"):
            write_json(place.node(spec.name) / "node.json", spec.model_dump(mode="json"))
        _write_known_host(place, spec.name, address)
        if not (_running(place, spec.name) and _wait_for_login(place, spec.name, address)):
            _boot(place, spec, address)
    return NodeState(name=spec.name, address=address, running=True, spec=spec)


def read(place: Place, name: str) -> NodeState | None:
    found = read_json(place.node(name) / "node.json")
    address = _addresses(place).get(name)
    if found is None or address is None:
        return None
    spec = NodeSpec.model_validate(found)
    return NodeState(name=name, address=address, running=_running(place, name), spec=spec)


def read_all(place: Place) -> list[NodeState]:
    found = [read(place, folder.name) for folder in sorted(place.nodes.glob("[!.]*"))]
    return [state for state in found if state is not None]


def down(place: Place, name: str) -> None:
    """Switch the node off and remove its disk, its address and its key."""
    with place.lock(name):
        end(place, name, place.node(name) / "process.json")
        if place.node(name).is_dir():
            # Renamed first: a removal killed half-way must not leave a node with half a disk.
            gone = place.nodes / f".{name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            place.node(name).rename(gone)
            shutil.rmtree(gone)
        place.drop_lock(name)
    with place.lock():
        addresses = _addresses(place)
        address = addresses.pop(name, None)
        if address:
            write_json(place.state / "addresses.json", addresses)
            _forget_known_host(place, address)
        if read_json(place.state / "lab.json"):
            network.write_table(place)


def all_down(place: Place) -> None:
    """Everything of the lab, found by its state and by its names, so that also an orphan ends."""
    for folder in sorted(place.nodes.glob("[!.]*")):
        down(place, folder.name)
    network.down(place)
    empty_all_cgroups(place)
    with place.lock():
        if place.state.is_dir():
            shutil.rmtree(place.state)
        for lock in place.state.parent.glob(f".{place.lab.stack}.*.lock"):
            lock.unlink(missing_ok=True)
        place.drop_lock()


# --- state -----------------------------------------------------------------------------------------------


def _addresses(place: Place) -> dict[str, str]:
    return read_json(place.state / "addresses.json") or {}


def _address(place: Place, spec: NodeSpec) -> str:
    subnet = network.subnet_of(place)
    addresses = _addresses(place)
    address = free_address(subnet, addresses, spec.name, spec.role)
    if addresses.get(spec.name) != address:
        write_json(place.state / "addresses.json", {**addresses, spec.name: address})
    return address


def _disk(place: Place, name: str) -> Path:
    return place.node(name) / "upper"


def _running(place: Place, name: str) -> bool:
    process = Process.recorded(place.node(name) / "process.json")
    return process is not None and process.alive


# --- disk ------------------------------------------------------------------------------------------------


def _make_disk(place: Place, spec: NodeSpec, address: str) -> None:
    """The node's own layer with its identity in it, made aside and put in place in one move."""
    fresh = place.nodes / f".{spec.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    for folder in ("upper", "work", "merged"):
        (fresh / folder).mkdir(parents=True)
    # The very base, not the link to the current one: an overlay is good only on the base it was made on.
    (fresh / "base").symlink_to(place.base_root.resolve())
    upper = fresh / "upper"
    for path, text in _identity(place, spec, address).items():
        write_atomically(upper / path, text)
    _enable(upper, "multi-user.target", "systemd-networkd.service")
    _enable(upper, "network-online.target", "systemd-networkd-wait-online.service")
    (upper / "root").chmod(0o700)
    (upper / "root/.ssh").chmod(0o700)
    network.make_key(upper / "etc/ssh/ssh_host_ed25519_key", spec.name)
    write_json(fresh / "node.json", spec.model_dump(mode="json"))
    shutil.rmtree(place.node(spec.name), ignore_errors=True)
    fresh.rename(place.node(spec.name))


def _identity(place: Place, spec: NodeSpec, address: str) -> dict[str, str]:
    gateway = network.host_address(network.subnet_of(place))
    return {
        "etc/hostname": f"{spec.name}\n",
        "etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{address} {spec.name}\n",
        "etc/gpuyard-lab": f"{place.id}\n",  # the mark without which no role simulates hardware
        "etc/machine-id": "",  # empty: systemd draws one at the first boot, and no two nodes share it
        "etc/systemd/network/10-host0.network": (
            f"[Match]\nName=host0\n\n[Network]\nAddress={address}/24\nGateway={gateway}\n"
            "LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
        ),
        "etc/ssh/sshd_config.d/10-gpuyard-lab.conf": (
            "HostKey /etc/ssh/ssh_host_ed25519_key\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nUseDNS no\n"
        ),
        "root/.ssh/authorized_keys": (place.ssh / "id_ed25519.pub").read_text(),
        **{f"etc/systemd/system/{name}": text for name, text in _KERNEL_LOG.items()},
    }


def _enable(upper: Path, target: str, unit: str) -> None:
    link = upper / "etc/systemd/system" / f"{target}.wants" / unit
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"/lib/systemd/system/{unit}")


def _resolvers() -> str:
    """The host's resolvers as a node can reach them: a stub on the host's loopback is none."""
    text = Path("/etc/resolv.conf").read_text()
    behind_the_stub = Path("/run/systemd/resolve/resolv.conf")
    if any(stub in text for stub in _STUB_RESOLVERS) and behind_the_stub.is_file():
        return behind_the_stub.read_text()
    return text


# --- checked host keys -----------------------------------------------------------------------------------


def _write_known_host(place: Place, name: str, address: str) -> None:
    key = (_disk(place, name) / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
    rewrite_known_hosts(place, address, [f"{address} {key[0]} {key[1]}"])


def _forget_known_host(place: Place, address: str) -> None:
    rewrite_known_hosts(place, address, [])


def rewrite_known_hosts(place: Place, address: str, add: list[str]) -> None:
    known = place.ssh / "known_hosts"
    with place.lock("known_hosts"):
        before = known.read_text().splitlines() if known.is_file() else []
        after = sorted([line for line in before if line.split()[0] != address] + add)
        if after != before:
            write_atomically(known, "".join(f"{line}\n" for line in after))
            give_to_owner(known)


# --- boot ------------------------------------------------------------------------------------------------


def _boot(place: Place, spec: NodeSpec, address: str) -> None:
    folder = place.node(spec.name)
    base = folder / "base"
    if not (base / "usr").is_dir():
        raise LabError(
            "LAB-ROOTFS",
            f"{base.readlink()} is gone",
            f"the disk of {spec.name} is a layer on it",
            "remove the lab with `gpuyard lab down` and bring it up again",
        )
    end(place, spec.name, folder / "process.json")
    write_atomically(folder / "upper/etc/resolv.conf", _resolvers())
    machine = place.machine(address)
    run("ip", "link", "delete", f"vb-{machine}", check=False)  # of a node that was killed a moment ago
    options = [
        "--quiet",
        f"--directory={folder / 'merged'}",
        f"--machine={machine}",
        f"--hostname={spec.name}",
        "--register=no",
        "--keep-unit",
        "--console=read-only",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        f"--network-bridge={place.bridge}",
        # Without these two, DeviceAllow= and IPAddressDeny= of a unit in the node are silently not enforced.
        "--system-call-filter=bpf",
        "--capability=all",
    ]
    if spec.role == "gpu":
        engines = place.cache / "engines"
        make_folder(engines)
        options.append(f"--bind-ro={str(engines).replace('\\', '\\\\').replace(':', '\\:')}:/opt/vllm")
    alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOT, "gpuyard-lab"]
    record, log = folder / "process.json", folder / "console.log"
    start(place, spec.name, record, log, [*alone, folder, *options, "--boot"])
    if not _wait_for_login(place, spec.name, address):
        raise LabError(
            "LAB-BOOT",
            f"{spec.name} does not answer over SSH at {address} after {BOOT_SECONDS} s",
            "its console ends with\n"
            + "\n".join((folder / "console.log").read_text(errors="replace").splitlines()[-15:]),
        )


def ssh_command(place: Place, address: str) -> list[str]:
    """SSH to a node with the lab's key and nothing of the user's own configuration; its host key is checked."""
    return [
        "ssh",
        "-F",
        "none",
        "-i",
        str(place.ssh / "id_ed25519"),
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        f"UserKnownHostsFile={place.ssh / 'known_hosts'}",
        "-o",
        "GlobalKnownHostsFile=none",
        "-o",
        "StrictHostKeyChecking=yes",
        "-o",
        "LogLevel=ERROR",
        f"root@{address}",
    ]


def _wait_for_login(place: Place, name: str, address: str) -> bool:
    """Until a login with the checked host key works, the node's process ends, or the time is up."""
    login = [*ssh_command(place, address)[:-1], "-o", "ConnectTimeout=5", "-o", "BatchMode=yes", f"root@{address}"]

    def answered_or_gone() -> bool:
        if not _running(place, name):
            return True
        return _speaks_ssh(address) and run(*login, "true", check=False).returncode == 0

    return wait_until(answered_or_gone, BOOT_SECONDS, 0.1) and _running(place, name)


def _speaks_ssh(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
