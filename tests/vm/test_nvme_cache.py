"""The role `nvme_cache` on a machine with two NVMe disks of its own, beside the one that carries the system.

In this order: made, kept through a power cut, made again where the disks came back empty, refused where one holds
something.
"""

import re
import subprocess
from collections.abc import Iterator

import pytest

from gpuyard.lab.vms import DISKS, NVME_GIB

from .conftest import Guest

pytestmark = pytest.mark.qemu
MODELS = "/var/lib/models"
MOUNT = "var-lib-models.mount"
QEMU = {"nvme_cache_models": ["QEMU NVMe Ctrl"]}
SYSTEM_DISK = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_system"
USED = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_nvme1"


@pytest.fixture(scope="module")
def machine(node: Guest) -> Iterator[Guest]:
    machine = Guest(node.lab, "t-nvme")
    machine.up()
    yield machine
    machine.down()


def cached(machine: Guest) -> str:
    played = machine.play("nvme_cache", **QEMU)
    assert played.returncode == 0, played.stdout
    return played.stdout


def changed(output: str) -> int:
    return int(re.findall(r"changed=(\d+)", output)[-1])


def mounted(machine: Guest) -> str:
    return machine.said(f"findmnt --noheadings --output FSTYPE,LABEL --mountpoint {MODELS}")


def emptied(machine: Guest) -> None:
    """Stopped and started, as a cloud does it: the disks come back, and nothing is on them."""
    machine.cut()
    for disk in DISKS[1:]:
        file = machine.place.vm(machine.name) / f"{disk}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", file, f"{NVME_GIB}G"], check=True)
    machine.up()


def test_two_blank_disks_are_made_one_file_system_and_the_systems_disk_is_left_alone(machine: Guest) -> None:
    root = machine.said("findmnt --noheadings --output SOURCE /")
    assert changed(machine.having(cached)) > 0
    assert mounted(machine).split() == ["xfs", "gpuyard-nvme"]
    assert machine.said("cat /sys/block/md127/md/level /sys/block/md127/md/raid_disks").split() == ["raid0", "2"]
    # RAID0: as large as both.
    assert int(machine.said(f"findmnt --noheadings --bytes --output SIZE --mountpoint {MODELS}")) > 7 * 2**30
    assert machine.said("findmnt --noheadings --output SOURCE /") == root
    assert changed(cached(machine)) == 0, "a second run changes nothing"
    # As an engine's unit has it that the role knows by its name alone.
    machine.said(
        "printf '[Service]\\nExecStart=/bin/true\\n' >/etc/systemd/system/vllm@.service; systemctl daemon-reload"
    )
    assert MODELS in machine.said("systemctl show --property=RequiresMountsFor vllm@any.service")


def test_what_was_written_and_synced_is_there_after_a_power_cut(machine: Guest) -> None:
    machine.having(cached)
    machine.said(f"echo a-model >{MODELS}/kept && sync {MODELS}/kept")
    machine.cut()
    machine.up()
    assert machine.said("systemctl is-system-running") == "running"
    assert mounted(machine).split() == ["xfs", "gpuyard-nvme"]
    assert machine.said(f"cat {MODELS}/kept") == "a-model"


def test_disks_that_come_back_empty_are_made_a_file_system_again_at_boot(machine: Guest) -> None:
    machine.having(cached)
    emptied(machine)
    assert machine.said("systemctl is-system-running") == "running"
    assert mounted(machine).split() == ["xfs", "gpuyard-nvme"]
    assert machine.said(f"ls -A {MODELS}") == ""
    assert "blank disks" in machine.said("journalctl --boot --unit gpuyard-nvme-cache --output cat")
    assert changed(cached(machine)) == 0, "what the boot made is what a converge makes"


def test_a_disk_that_holds_something_is_refused_at_boot_and_by_a_converge_and_nothing_is_lost(machine: Guest) -> None:
    machine.having(cached)
    machine.said(f"systemctl stop {MOUNT} gpuyard-nvme-cache && mdadm --stop /dev/md127")
    machine.said(f"wipefs --quiet --all {USED} && mkfs.ext4 -q {USED} && mount {USED} /mnt")
    machine.said("echo somebodys >/mnt/thesis && umount /mnt && sync")
    machine.cut()
    machine.up()
    # It boots, and whoever needs the models is told why not.
    assert machine.said(f"systemctl is-failed gpuyard-nvme-cache; systemctl is-active {MOUNT} || true").split() == [
        "failed",
        "inactive",
    ]
    assert "NVME-DISK-USED" in machine.said("journalctl --boot --unit gpuyard-nvme-cache --output cat")
    refused = machine.play("nvme_cache", **QEMU)
    assert refused.returncode != 0
    told = " ".join(refused.stdout.split())
    assert "NVME-DISK-USED" in told
    assert "nvme_cache_allow_data_loss: [nvme1]" in told
    assert machine.said(f"mount -o ro {USED} /mnt && cat /mnt/thesis && umount /mnt") == "somebodys"


def test_consent_names_the_disk_and_then_it_is_taken(machine: Guest) -> None:
    holds = machine.said(f"wipefs --noheadings --output TYPE {USED}")
    assert holds == "ext4", "what the test before left"
    other = machine.play("nvme_cache", **QEMU, nvme_cache_allow_data_loss=["nvme0"])
    assert other.returncode != 0, "consent for another disk"
    given = machine.play("nvme_cache", **QEMU, nvme_cache_allow_data_loss=["nvme1"])
    assert given.returncode == 0, given.stdout
    assert mounted(machine).split() == ["xfs", "gpuyard-nvme"]
    assert "system" in machine.said(f"lsblk --noheadings --nodeps --output SERIAL {SYSTEM_DISK}")
