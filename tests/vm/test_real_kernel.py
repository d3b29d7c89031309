"""What only a kernel and a power plug of one's own can show.

In this order, for boots and builds are dear: the first kernel, then a newer one after a reboot, then one without its
headers after a power cut in the middle of an upgrade of the driver. Each says what it needs done to the node before it,
which mostly was: what a failed test leaves is thrown away.
"""

import os
import signal
import socket
from dataclasses import dataclass

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.place import read_json

from .conftest import Guest

pytestmark = pytest.mark.qemu
PACKAGE = "nvidia-kernel-open-dkms"
OLD, NEW = "580.126.20", "590.48.01"
DEB = f"/var/lib/gpuyard-lab/packages/{PACKAGE}_{{}}-1_amd64.deb"
KERNELS = "/var/lib/gpuyard-lab/kernels"
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet"


def test_a_node_in_qemu_is_a_whole_machine_without_a_way_out(guest: Guest) -> None:
    assert guest.said("systemctl is-system-running --wait") == "running"
    assert guest.said("hostname") == guest.name
    assert "qemu" in guest.said("systemd-detect-virt")
    with socket.create_server(("127.0.0.1", 0)) as mine:
        # This machine as QEMU's own network has it; its loopback would be reached from there.
        there = f"/dev/tcp/10.0.2.2/{mine.getsockname()[1]}"
        assert guest.on(f"timeout 10 bash -c '<{there}'").returncode != 0


def driver(guest: Guest) -> None:
    guest.said(f"{INSTALL} {DEB.format(OLD)}")


def loaded(guest: Guest) -> None:
    guest.having(driver)
    guest.said("modprobe nvidia")


def test_dkms_builds_the_driver_for_the_running_kernel_and_modprobe_loads_it(guest: Guest) -> None:
    guest.having(driver)
    assert guest.said("dkms status") == f"nvidia/{OLD}, {guest.kernel}, x86_64: installed"
    assert guest.on("cat /proc/driver/nvidia/version").returncode != 0, "installed is not loaded"
    guest.having(loaded)
    assert guest.driver == guest.said("modinfo --field version nvidia") == OLD
    assert f"Open Kernel Module for x86_64  {OLD}  Release Build" in guest.said("cat /proc/driver/nvidia/version")
    assert guest.said("stat --format '%F %Hr:%Lr' /dev/nvidia0 /dev/nvidiactl").splitlines() == [
        "character special file 195:0",
        "character special file 195:255",
    ]


def test_the_module_is_not_unloaded_while_its_device_is_open(guest: Guest) -> None:
    guest.having(loaded)
    guest.said("systemd-run --quiet --unit=engine sh -c 'exec sleep infinity </dev/nvidia0'")
    assert host.wait_until(lambda: guest.said("cat /sys/module/nvidia/refcnt") != "0", 60, 0.5)
    refused = guest.on("modprobe --remove nvidia")
    assert refused.returncode != 0
    assert "Module nvidia is in use" in refused.stderr
    assert guest.driver == OLD
    guest.said("systemctl stop engine && modprobe --remove nvidia")
    assert guest.on("ls -d /dev/nvidia* /proc/driver/nvidia").stdout == ""
    guest.said("modprobe nvidia")


def raid(guest: Guest) -> None:
    disks = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_nvme{0,1}"
    guest.said(
        f"bash -ec 'mdadm --create /dev/md/models --run --level=0 --raid-devices=2 {disks} "
        "&& mkfs.xfs -q /dev/md/models && mkdir -p /srv/models && mdadm --detail --scan >>/etc/mdadm/mdadm.conf "
        "&& echo /dev/md/models /srv/models xfs nofail 0 0 >>/etc/fstab && mount /srv/models'"
    )


def test_two_nvme_disks_carry_a_raid_with_xfs(guest: Guest) -> None:
    guest.having(raid)
    assert guest.said("findmnt --noheadings --output FSTYPE /srv/models") == "xfs"
    assert guest.said("cat /sys/block/md127/md/level") == "raid0"


def test_a_new_kernel_gets_its_module_from_dkms_and_has_it_after_the_reboot(guest: Guest) -> None:
    guest.having(loaded)
    guest.having(raid)
    before, release = guest.kernel, guest.kernels[0]
    guest.said(f"{INSTALL} {KERNELS}/{release}/*.deb")
    assert (guest.kernel, guest.driver) == (before, OLD), "what runs stays until the reboot"
    guest.reboot()
    assert guest.kernel == release != before
    assert f"nvidia/{OLD}, {release}, x86_64: installed" in guest.said("dkms status").splitlines()
    assert guest.driver == OLD
    assert guest.said("findmnt --noheadings --output FSTYPE /srv/models") == "xfs"


@dataclass(frozen=True)
class Cut:
    """What was there when the power went."""

    kernel: str
    lost: str


def cut(guest: Guest) -> Cut:
    """An upgrade of the driver whose postinst was at work when the power went; the next boot is into another kernel."""
    guest.having(loaded)
    guest.having(raid)
    release = guest.kernels[1]
    # That kernel came long before, as it were: what is in the file system's journal alone is not there for GRUB.
    guest.said(f"{INSTALL} {KERNELS}/{release}/linux-image-*.deb && sync")
    with guest.at_work(f"dpkg --install {DEB.format(NEW)}", f"Building initial module for {guest.kernel}") as upgrade:
        lost = guest.said("cd /srv/models && echo kept >kept && sync kept && echo lost >lost && cat lost")
        assert upgrade.poll() is None, "the upgrade ended before the power went"
        guest.cut()
    assert not guest.state.running
    guest.up()
    return Cut(release, lost)


def mended(guest: Guest) -> None:
    guest.having(cut)
    guest.said("dpkg --configure --pending")


def test_a_power_cut_loses_what_was_written_and_not_synced(guest: Guest) -> None:
    assert guest.having(cut).lost == "lost"
    assert guest.said("cat /srv/models/kept") == "kept"
    assert "lost" not in guest.on("cat /srv/models/lost").stdout


def test_a_power_cut_in_a_postinst_leaves_a_half_configured_package_and_dpkg_mends_it(guest: Guest) -> None:
    guest.having(cut)
    state = f"dpkg-query --show --showformat '${{db:Status-Abbrev}} ${{Version}}' {PACKAGE}"
    assert guest.said(state) == f"iF  {NEW}-1"
    audit = guest.said("dpkg --audit")
    assert "only half configured" in audit
    assert PACKAGE in audit
    checked = guest.on("apt-get check")
    assert checked.returncode == 100
    assert "dpkg was interrupted" in checked.stderr
    guest.having(mended)
    assert guest.said(state) == f"ii  {NEW}-1"
    assert guest.said("dpkg --audit") == ""


def test_a_kernel_without_its_headers_has_no_driver_until_they_come(guest: Guest) -> None:
    """Nothing failed: kernel and driver are installed and configured, and there is no module."""
    release = guest.having(cut).kernel
    guest.having(mended)
    assert guest.kernel == release
    refused = guest.on("modprobe nvidia")
    assert refused.returncode != 0
    assert f"Module nvidia not found in directory /lib/modules/{release}" in refused.stderr
    built = f"nvidia/{NEW}, {release}, x86_64: installed"
    assert built not in guest.said("dkms status").splitlines()
    assert guest.said("systemctl is-active systemd-modules-load") == "active", "systemd tells now"
    guest.said(f"{INSTALL} {KERNELS}/{release}/linux-headers-*.deb")
    assert built in guest.said("dkms status").splitlines()
    guest.said("systemctl restart systemd-modules-load")
    assert guest.driver == NEW


def test_a_machine_whose_process_was_killed_is_seen_and_up_changes_nothing_of_one_that_runs(guest: Guest) -> None:
    record = guest.place.vm(guest.name) / "process.json"
    before = read_json(record)
    assert before
    assert guest.up() == guest.state
    assert read_json(record) == before
    os.kill(before["pid"], signal.SIGKILL)
    assert host.wait_until(lambda: not guest.state.running, 10)


def test_what_is_down_leaves_nothing(node: Guest) -> None:
    if not agent.vms_read(node.lab):
        node.up()
    node.down()
    assert agent.vms_read(node.lab) == []
    assert list(node.place.vms.iterdir()) == []
    assert not host.cgroup_of(node.place, f"vm.{node.name}").exists()
    assert "[127.0.0.1]" not in (node.place.ssh / "known_hosts").read_text()
    node.down()  # again, of what is not there
