"""The lab's second kind of node: a whole machine in QEMU, with a kernel, disks and a power plug of its own."""

from __future__ import annotations

import io
import re
import shutil
import socket
import tarfile
import tempfile
from pathlib import Path

from gpuyard.lab import mirror, network
from gpuyard.lab.errors import LabError
from gpuyard.lab.host import (
    Process,
    drop_empty_cgroups,
    end,
    end_orphans,
    give_to_owner,
    refuse_a_full_disk,
    run,
    start,
    wait_until,
)
from gpuyard.lab.models import NODE_NAME, Accel, VmState
from gpuyard.lab.nodes import rewrite_known_hosts, ssh_command
from gpuyard.lab.packages import kernel_module, recipes
from gpuyard.lab.place import Place, read_json, write_json

BOOT_SECONDS = 300
"""An emulated processor on a busy machine is slow: the boot itself takes a tenth of it."""
DISKS = ("system", "nvme0", "nvme1")
NVME_GIB = 4
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "dpkg-deb": "dpkg",
}


def up(place: Place, name: str, accel: Accel) -> VmState:
    """Make a node, or boot one whose power was cut on its old disks, or leave a living one alone."""
    _refuse_a_bad_name(name)
    _refuse_what_cannot_work(place)
    with place.lock():
        end_orphans(place)
        place.vms.mkdir(parents=True, exist_ok=True)
        give_to_owner(place.state.parent.parent, place.state.parent, place.state)
        network.make_ssh_key(place)
    with place.lock(_lock(name)):
        if not place.vm(name).is_dir():
            refuse_a_full_disk(place)
            _make_disks(place, name)
        if not (_running(place, name) and _wait_for_login(place, name)):
            _boot(place, name, accel)
    return _state(place, name)


def cut(place: Place, name: str) -> None:
    """Pull the plug: what the machine had not yet brought to its disks is lost."""
    _refuse_unknown(place, name)
    with place.lock(_lock(name)):
        end(place, _lock(name), place.vm(name) / "process.json")


def read_all(place: Place) -> list[VmState]:
    return [_state(place, folder.name) for folder in sorted(place.vms.glob("[!.]*"))]


def down(place: Place, name: str) -> None:
    """Pull the plug, and remove the node's disks and keys."""
    _refuse_a_bad_name(name)
    folder = place.vm(name)
    with place.lock(_lock(name)):
        end(place, _lock(name), folder / "process.json")
        drop_empty_cgroups(place)
        if folder.is_dir():
            if port := _port(place, name):
                rewrite_known_hosts(place, f"[127.0.0.1]:{port}", [])
            # Renamed first: a removal killed half-way must not leave a node with half its disks.
            gone = place.vms / f".{name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
        for rest in (".gone", ".new"):
            shutil.rmtree(place.vms / f".{name}{rest}", ignore_errors=True)
        place.drop_lock(_lock(name))


def login(place: Place, name: str) -> list[str]:
    """The ssh command that leads to a node, with its checked host key; what comes behind it runs there."""
    _refuse_unknown(place, name)
    port = _port(place, name)
    if port is None:
        raise LabError("LAB-VM", f"{name} was never booted", change=f"run `gpuyard lab vm up {name}`")
    return [*ssh_command(place, "127.0.0.1")[:-1], "-p", str(port), "root@127.0.0.1"]


# --- state -----------------------------------------------------------------------------------------------


def _lock(name: str) -> str:
    """Its name for locks and control groups: with a letter that no nspawn node's name may hold."""
    return f"vm.{name}"


def _port(place: Place, name: str) -> int | None:
    found = read_json(place.vm(name) / "port.json")
    return found["port"] if found else None


def _running(place: Place, name: str) -> bool:
    process = Process.recorded(place.vm(name) / "process.json")
    return process is not None and process.alive


def _state(place: Place, name: str) -> VmState:
    return VmState(name=name, port=_port(place, name), running=_running(place, name))


def _base(place: Place) -> Path:
    return place.cache / "lab" / "vm"


def _refuse_what_cannot_work(place: Place) -> None:
    if missing := sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)}):
        names = " ".join(missing)
        raise LabError(
            "LAB-TOOLS", f"not installed: {names}", "machines are made with them", f"apt-get install -y {names}"
        )
    if not (_base(place) / "disk.img").is_file():
        raise LabError(
            "LAB-IMAGE", f"{_base(place)} is missing", "the disks of QEMU nodes start from it", "run `tools/setup vm`"
        )


def _refuse_a_bad_name(name: str) -> None:
    if not re.fullmatch(NODE_NAME, name):
        raise LabError(
            "LAB-NAME",
            f"{name!r} is no name for a node",
            "it becomes a host name and a folder",
            "take small letters, digits and dashes, with a letter at its front",
        )


def _refuse_unknown(place: Place, name: str) -> None:
    _refuse_a_bad_name(name)
    if not place.vm(name).is_dir():
        there = ", ".join(state.name for state in read_all(place)) or "none"
        raise LabError(
            "LAB-VM", f"no QEMU node {name} in {place.lab.stack}", f"there are: {there}", f"`gpuyard lab vm up {name}`"
        )


# --- disks -----------------------------------------------------------------------------------------------


def _make_disks(place: Place, name: str) -> None:
    """The node's own layer on the base image and two empty disks, made aside and put in place in one move."""
    fresh = place.vms / f".{name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    # The very base, not the link to the current one: a layer is good only on the base it was made on.
    base = (_base(place) / "disk.img").resolve()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", fresh / "system.qcow2")
    for disk in DISKS[1:]:
        run("qemu-img", "create", "-q", "-f", "qcow2", fresh / f"{disk}.qcow2", f"{NVME_GIB}G")
    network.make_key(fresh / "host_key", name)
    _make_seed(place, name, fresh)
    fresh.rename(place.vm(name))


def _make_seed(place: Place, name: str, folder: Path) -> None:
    """What makes the copy of a base this node: a tar that it reads from a disk."""
    texts = {
        "etc/hostname": f"{name}\n",
        "etc/hosts": f"127.0.0.1 localhost {name}\n::1 localhost\n",
        "etc/gpuyard-lab": f"{place.id}\n",
        "etc/ssh/sshd_config.d/10-gpuyard-lab.conf": (
            "HostKey /etc/ssh/ssh_host_ed25519_key\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nUseDNS no\n"
        ),
        "etc/ssh/ssh_host_ed25519_key": (folder / "host_key").read_text(),
        "root/.ssh/authorized_keys": (place.ssh / "id_ed25519.pub").read_text(),
    }
    content = {path: text.encode() for path, text in texts.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for version in (versions[0] for versions in recipes.BRANCHES.values()):
            package = kernel_module.dkms(version)
            deb = mirror.build_package(package, Path(scratch) / "root", Path(scratch))
            content[f"var/lib/gpuyard-lab/packages/{deb.name}"] = deb.read_bytes()
    seed = folder / "seed.tar"
    seed.touch(mode=0o600)
    with tarfile.open(seed, "w") as tar:
        for path, data in content.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            entry.mode = 0o600 if path.startswith(("root/", "etc/ssh/ssh_host")) else 0o644
            tar.addfile(entry, io.BytesIO(data))


# --- boot ------------------------------------------------------------------------------------------------


def _boot(place: Place, name: str, accel: Accel) -> None:
    folder = place.vm(name)
    end(place, _lock(name), folder / "process.json")
    if old := _port(place, name):
        rewrite_known_hosts(place, f"[127.0.0.1]:{old}", [])
    port = _free_port()
    write_json(folder / "port.json", {"port": port})
    kind, key, _ = (folder / "host_key.pub").read_text().split()
    rewrite_known_hosts(place, f"[127.0.0.1]:{port}", [f"[127.0.0.1]:{port} {kind} {key}"])
    log = folder / "console.log"
    with log.open("a") as console:
        console.write("\n--- power on ---\n")
    start(place, _lock(name), folder / "process.json", log, _qemu(folder, name, accel, port))
    if not _wait_for_login(place, name):
        raise LabError(
            "LAB-BOOT",
            f"{name} does not answer over SSH at 127.0.0.1:{port} after {BOOT_SECONDS} s",
            "its console ends with\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]),
        )


def _qemu(folder: Path, name: str, accel: Accel, port: int) -> list[str | Path]:
    words: list[str | Path] = ["qemu-system-x86_64", "-name", name, "-nodefaults", "-sandbox", "on"]
    words += ["-machine", "q35", *ACCELERATORS[accel], "-m", "1536"]
    words += ["-display", "none", "-serial", "stdio", "-device", "virtio-rng-pci"]
    # A flush by the guest reaches the host's disk, and a write without one may be lost with the guest: as on hardware.
    # "unsafe" would lose what was flushed too, for the map of the layer is then written back at the end only.
    for disk in DISKS:
        file = f"file={_escaped(folder / f'{disk}.qcow2')}"
        words += ["-drive", f"if=none,id={disk},format=qcow2,cache=writeback,discard=unmap,{file}"]
    seed = _escaped(folder / "seed.tar")
    words += ["-drive", f"if=none,id=seed,format=raw,read-only=on,file={seed}"]
    # A kernel without an initrd finds its root on an NVMe disk, whose driver is no module.
    words += ["-device", "nvme,drive=system,serial=system,bootindex=0"]
    words += ["-device", "virtio-blk-pci,drive=seed,serial=seed"]
    for disk in DISKS[1:]:
        words += ["-device", f"nvme,drive={disk},serial={disk}"]
    # No way out: whatever a guest installs is on its disk already, and nothing of this machine can be reached from it.
    words += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    return [*words, "-device", "virtio-net-pci,netdev=net"]


ACCELERATORS = {
    # The plainest processor, for programs take what one offers, and wide vectors are emulated slowly. Two of them,
    # though a second gains little: for one alone QEMU leaves out the guest's memory barriers, and then a disk does not
    # always hear its doorbell.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "qemu64,-svm", "-smp", "2"),
    "kvm": ("-accel", "kvm", "-cpu", "max", "-smp", "2"),
}


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_for_login(place: Place, name: str) -> bool:
    """Until a login with the checked host key works, the machine ends, or the time is up.

    QEMU answers for a guest that does not listen yet, and hands the connection on late: it is soon tried anew.
    """
    words = login(place, name)
    command = [*words[:-1], "-o", "ConnectTimeout=5", "-o", "BatchMode=yes", words[-1], "true"]

    def answered_or_gone() -> bool:
        return not _running(place, name) or run(*command, check=False).returncode == 0

    return wait_until(answered_or_gone, BOOT_SECONDS, 0.5) and _running(place, name)
