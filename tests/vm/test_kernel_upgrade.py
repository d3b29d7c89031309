"""`upgrade_kernel.yml` on a machine with a kernel, a boot loader and a DKMS of its own.

Real: the playbook with its states, roles and note, apt with a signed archive, DKMS, GRUB, every boot. Stand-ins: the
gateway, which writes down what it was told and on which kernel, the driver (a stub) and its service; no engine runs.

In this order: a kernel whose module does not build, one that comes up and is kept, one that panics, one that nobody
reaches, and one that comes to its end, or goes back, although the power goes.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpuyard.lab import agent, host, mirror

from .conftest import PROJECT, Guest
from .test_real_kernel import DEB as DRIVER
from .test_real_kernel import INSTALL, KERNELS, OLD, PACKAGE

pytestmark = pytest.mark.qemu
BOOK = PROJECT / "playbooks/operate/upgrade_kernel.yml"
SECONDS = 2400
"""For one playbook, with the reboots in it."""
REPOSITORY = "/srv/kernels"
GATE_LOG = "/srv/gate.log"
GATEWAY = f"""\
import json, os, pathlib, sys
state = pathlib.Path("/srv/gate.state")
status = state.read_text() if state.is_file() else "UP"
if sys.argv[1] == "set":
    asked = "UP" if "--to=ready" in sys.argv else "DRAIN"
    with open("{GATE_LOG}", "a") as log:
        print(asked, os.uname().release, file=log)
    state.write_text(asked)
    os.sync()
    print(json.dumps({{"changed": asked != status}}))
else:
    row = {{"gateway": "g", "backend": "model_m", "server": "t-kernel", "place": ["g", "model_m"]}}
    print(json.dumps([{{**row, "status": status, "sessions": 0, "closed": status != "UP"}}]))
"""
SETTINGS = """\
GRUB_TIMEOUT=0
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_LINUX_PARTUUID=false
GRUB_CMDLINE_LINUX="rw console=ttyS0 net.ifnames=0 loglevel=4 mitigations=off tsc=reliable"
"""
# What is wrong with a kernel, and with no other.
PANIC = """\
[Unit]
ConditionKernelVersion={release}
DefaultDependencies=no
After=systemd-remount-fs.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c "echo c >/proc/sysrq-trigger"
[Install]
WantedBy=sysinit.target
"""
UNREACHED = """\
[Unit]
ConditionKernelVersion={release}
After=systemd-networkd.service
[Service]
ExecStart=/bin/sh -c "while ip link set eth0 down; do sleep 1; done"
[Install]
WantedBy=multi-user.target
"""
SERVICE = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n[Install]\nWantedBy=multi-user.target\n"
SHOWN = "dpkg-query --show --showformat '${db:Status-Want} ${db:Status-Status}' "


@pytest.fixture(scope="module")
def machine(node: Guest) -> Iterator[Guest]:
    machine = Guest(node.lab, "t-kernel")
    machine.up()
    ready(machine)
    yield machine
    machine.down()


def ready(guest: Guest) -> None:
    """A driver that is loaded, GRUB as Debian's installer leaves it, and an archive that is signed."""
    write(guest, "/etc/systemd/journald.conf.d/kept.conf", "[Journal]\nStorage=persistent\n")
    write(guest, "/srv/gate/gateway_state.py", GATEWAY)
    write(guest, "/etc/systemd/system/nvidia-persistenced.service", SERVICE)
    write(guest, "/etc/default/grub", SETTINGS)
    probes(guest)
    guest.said(f"mkdir -p /var/lib/gpuyard && {INSTALL} {DRIVER.format(OLD)} && systemctl daemon-reload")
    guest.said("mkdir -p /boot/grub && grub-install /dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_system && update-grub")
    archive(guest)
    guest.reboot()
    assert guest.driver == OLD


def write(guest: Guest, path: str, text: str) -> None:
    told(guest, f"mkdir -p {Path(path).parent} && cat >{path}", text.encode())


def told(guest: Guest, command: str, data: bytes) -> None:
    subprocess.run([*agent.vm_login(guest.lab, guest.name), command], input=data, check=True, timeout=120)


def probes(guest: Guest) -> None:
    words = ["tar", "--create", "--directory", PROJECT / "src/gpuyard", "--exclude=__pycache__", "health"]
    packed = subprocess.run(words, capture_output=True, check=True).stdout
    told(guest, "mkdir -p /usr/local/lib/gpuyard && tar --extract --directory /usr/local/lib/gpuyard", packed)


def archive(guest: Guest) -> None:
    """The kernels that lie there as packages, as an archive that apt reads."""
    place = guest.place
    mirror.make_key(place)
    guest.said(f"mkdir -p {REPOSITORY} && ln -f {KERNELS}/*/*.deb {REPOSITORY}")
    stanzas = guest.said(
        f"cd {REPOSITORY} && for deb in *.deb; do dpkg-deb --field $deb; echo Filename: ./$deb; "
        "echo Size: $(stat --format %s $deb); echo SHA256: $(sha256sum <$deb | cut -d' ' -f1); echo; done"
    )
    folder = place.state / "kernels"
    folder.mkdir()
    mirror.sign(folder, stanzas + "\n\n", place.state / "apt-key/secret.asc", "kernels")
    for name in ("Packages", "Packages.gz", "InRelease"):
        told(guest, f"cat >{REPOSITORY}/{name}", (folder / name).read_bytes())
    write(guest, "/etc/apt/keyrings/kernels.asc", (place.state / "apt-key/public.asc").read_text())
    line = f"deb [signed-by=/etc/apt/keyrings/kernels.asc] file:{REPOSITORY} ./\n"
    write(guest, "/etc/apt/sources.list", line)
    guest.said("rm -f /etc/apt/sources.list.d/* && apt-get update --error-on=any")


def upgraded(guest: Guest, release: str, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    """What an operator runs, for a fleet whose lock names this kernel."""
    version = guest.said(f"dpkg-deb --field {KERNELS}/{release}/linux-image-*.deb Version")
    checks = [{"check": "check_xid", "since": "{{ nvidia_driver_xid_since }}"}]
    asked = {"canary": 1, "soak_seconds": 1, "soak_every": 1, "accept_downtime": True, "confirm": False}
    given = {"node_health_checks": checks, **{f"upgrade_{name}": value for name, value in asked.items()}}
    return guest.playbook(
        BOOK,
        f"--extra-vars={json.dumps(given)}",
        *words,
        seconds=SECONDS,
        **{
            "node_base_fleet": "t",
            "node_kernel_release": release,
            "node_kernel_packages": {f"linux-{part}-{release}": version for part in ("image", "headers")},
            "node_kernel_allow_reboot": True,
            "node_kernel_reboot_seconds": 1200,
            "node_kernel_free_mib_below": {"/": 256},
            "node_gate_gateways": [guest.name],
            "node_gate_backends": ["model_m"],
            "node_gate_helpers": "/srv/gate",
            "nvidia_driver_version": OLD,
            "nvidia_driver_packages": {PACKAGE: f"{OLD}-1"},
            "nvidia_driver_repository": {"uri": "http://nowhere.invalid", "key": "none", "fingerprint": "none"},
            "vllm_server_models": [],
            "vllm_server_engines": [],
            "vllm_server_gateway_addresses": [],
            "vllm_server_api_key": "none",
            **more,
        },
    )


def note(guest: Guest) -> dict[str, Any]:
    return json.loads(guest.said("cat /var/lib/gpuyard/kernel-upgrade.json"))


def gate(guest: Guest) -> list[str]:
    """What the gateway was told since this was asked last, with the kernel on which."""
    return guest.said(f"cat {GATE_LOG}; : >{GATE_LOG}").splitlines()


def boots(guest: Guest) -> dict[str, str]:
    """Kernels by GRUB's variables that name one."""
    listed = guest.said("grub-editenv /boot/grub/grubenv list")
    return dict(re.findall(r"^(\w+)=.*gnulinux-(.+)-advanced-.*$", listed, re.MULTILINE))


def as_before(guest: Guest) -> str:
    packages = "dpkg-query --show 'linux-image-*' 'linux-headers-*'; apt-mark showhold; dkms status"
    return guest.said(f"{packages}; ls /boot /lib/modules /etc/dkms; uname -r; cat /boot/grub/grub.cfg")


def test_a_module_that_does_not_build_for_the_kernel_is_refused_and_the_node_is_as_it_was(machine: Guest) -> None:
    release, source = machine.kernels[0], f"/usr/src/nvidia-{OLD}/nvidia.c"
    before = as_before(machine)
    machine.said(f"cp {source} /srv/nvidia.c && echo '#error no vm_flags_set here' >>{source} && : >{GATE_LOG}")
    refused = upgraded(machine, release)
    machine.said(f"cp /srv/nvidia.c {source}")
    assert refused.returncode != 0
    assert f"KERNEL-MODULE: module nvidia {OLD} is to be built for kernel {release}" in refused.stdout
    assert "#error no vm_flags_set here" in refused.stdout
    assert note(machine)["state"] == "upgrade-required"
    assert gate(machine) == [], "it was never taken out of service"
    assert as_before(machine) == before


def test_a_kernel_is_built_for_installed_and_booted_and_kept_when_it_is_proven(machine: Guest) -> None:
    before, release, was = machine.kernel, machine.kernels[0], as_before(machine)
    machine.said(f": >{GATE_LOG}")
    looked = upgraded(machine, release, "--check")
    assert looked.returncode == 0, looked.stdout
    assert as_before(machine) == was, "a check run changes nothing"
    done = upgraded(machine, release)
    assert done.returncode == 0, done.stdout
    assert (machine.kernel, machine.driver) == (release, OLD)
    assert gate(machine) == [f"DRAIN {before}", f"UP {release}"]
    assert (note(machine)["state"], note(machine)["previous"]["version"]) == ("upgrade-done", before)
    assert boots(machine) == {"saved_entry": release}
    assert machine.said(f"{SHOWN} linux-image-{before}") == "install installed", "kept, and free to go"
    assert machine.said(f"{SHOWN} linux-image-{release}") == "hold installed"
    assert machine.said("ls /etc/dkms /var/lib/gpuyard | grep --extended-regexp 'no-autoinstall|trial' || true") == ""
    machine.reboot()
    assert machine.kernel == release
    again = upgraded(machine, release)
    assert again.returncode == 0, again.stdout
    assert "changed=0" in again.stdout
    assert gate(machine) == []


@pytest.mark.parametrize(("wrong", "seconds"), [(PANIC, 900), (UNREACHED, 60)], ids=["panics", "is-not-reached"])
def test_a_kernel_that_does_not_come_up_gives_way_to_the_old_one_by_itself(
    machine: Guest, wrong: str, seconds: int
) -> None:
    before, release = machine.kernel, machine.kernels[1]
    machine.said(f"rm -f /etc/systemd/system/*.wants/wrong.service; : >{GATE_LOG}")
    write(machine, "/etc/systemd/system/wrong.service", wrong.format(release=release))
    machine.said("systemctl daemon-reload && systemctl enable wrong")
    done = upgraded(machine, release, node_kernel_trial_seconds=seconds)
    assert done.returncode != 0
    assert f"KERNEL-FELL-BACK: {machine.name} was to boot kernel {release} and runs {before}" in done.stdout
    assert "UPGRADE-ROLLED-BACK" in done.stdout
    assert (machine.kernel, machine.driver) == (before, OLD)
    assert (note(machine)["state"], note(machine)["touched"]) == ("rollback-done", True)
    assert gate(machine) == [f"DRAIN {before}", f"DRAIN {before}", f"UP {before}"]
    assert boots(machine) == {"saved_entry": before}
    machine.reboot()
    assert machine.kernel == before


@pytest.mark.parametrize(
    ("state", "end"),
    [
        # A kernel that was on trial when the power went is one that fell over, as far as anybody can tell.
        ("validation-required", "rollback-done"),
        ("drain-required", "upgrade-done"),
    ],
)
def test_where_the_power_goes_in_an_upgrade_the_same_command_ends_it(machine: Guest, state: str, end: str) -> None:
    before, release = machine.kernel, machine.kernels[1]
    machine.said(f"rm -f /etc/systemd/system/*.wants/wrong.service; systemctl daemon-reload; : >{GATE_LOG}")
    with ThreadPoolExecutor(1) as operator:
        broken_off = operator.submit(upgraded, machine, release)
        assert host.wait_until(lambda: broken_off.done() or now_at(machine, state), SECONDS, 0.5)
        assert not broken_off.done(), broken_off.result().stdout
        machine.cut()
        assert broken_off.result().returncode != 0
    machine.up()
    assert gate(machine)[-1:] in ([], [f"DRAIN {before}"]), "it is not given requests before it is proven"
    done = upgraded(machine, release)
    assert note(machine)["state"] == end, done.stdout
    assert (done.returncode == 0) == (end == "upgrade-done")
    kernel = release if end == "upgrade-done" else before
    assert (machine.kernel, machine.driver) == (kernel, OLD)
    assert gate(machine)[-1] == f"UP {kernel}"
    assert boots(machine) == {"saved_entry": kernel}
    assert machine.said("dpkg --audit; ls /etc/dkms | grep no-autoinstall || true") == ""


def now_at(guest: Guest, state: str) -> bool:
    """Whether an upgrade is in a state. A machine that is just booting says nothing."""
    try:
        told = guest.on("cat /var/lib/gpuyard/kernel-upgrade.json", 30)
    except subprocess.TimeoutExpired:
        return False
    return told.returncode == 0 and json.loads(told.stdout)["state"] == state
