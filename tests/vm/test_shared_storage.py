"""The role `shared_storage` with a real NFS server, the kernel's own client and boots.

Server and client are one machine: in QEMU no machine sees another. In this order: mounted and proven, a server that is
away at boot, one that goes while a file is open.
"""

import re
import time
from collections.abc import Iterator

import pytest

from .conftest import PROJECT, Guest

pytestmark = pytest.mark.qemu
MODELS = "/mnt/models"
SECONDS = 20
"""For one attempt to mount."""
SHARED = {
    "shared_storage_mounts": [{"kind": "nfs", "source": "127.0.0.1:/srv/models", "path": MODELS}],
    "shared_storage_seconds": SECONDS,
}
EXPORTED = "/srv/models 127.0.0.1(rw,sync,no_subtree_check,no_root_squash)"


@pytest.fixture(scope="module")
def machine(node: Guest) -> Iterator[Guest]:
    machine = Guest(node.lab, "t-nfs")
    machine.up()
    machine.said(f"mkdir -p /srv/models && echo weights >/srv/models/config.json && echo '{EXPORTED}' >/etc/exports")
    machine.said("systemctl enable --now nfs-server.service")
    yield machine
    machine.down()


def shared(machine: Guest) -> int:
    """Play the role, and say how much it changed."""
    played = machine.play("shared_storage", **SHARED)
    assert played.returncode == 0, played.stdout
    return int(re.findall(r"changed=(\d+)", played.stdout)[-1])


def mounted(machine: Guest) -> bool:
    return machine.on(f"findmnt --types nfs4 --mountpoint {MODELS}").returncode == 0


def test_a_share_is_mounted_at_the_first_access_and_keeps_what_is_written(machine: Guest) -> None:
    assert machine.having(shared) > 0
    assert not mounted(machine)
    assert machine.said(f"cat {MODELS}/config.json") == "weights"
    options = machine.said(f"findmnt --noheadings --output OPTIONS --types nfs4 --mountpoint {MODELS}").split(",")
    assert {"hard", "nosuid", "nodev"} <= set(options)
    assert shared(machine) == 0
    book = PROJECT / "playbooks/operate/verify_storage.yml"
    proven = machine.playbook(book, "--extra-vars=verify_storage_mib=8", **SHARED)
    assert proven.returncode == 0, proven.stdout
    assert re.search(r"/mnt/models: write_mb_s=\d", proven.stdout), proven.stdout
    assert machine.said("ls -A /srv/models") == "config.json"


def test_a_server_that_is_away_holds_up_no_boot_and_is_found_when_it_is_back(machine: Guest) -> None:
    machine.having(shared)
    machine.said("systemctl disable --now nfs-server.service")
    machine.reboot()
    assert "mnt-models" not in machine.said("systemd-analyze critical-chain")
    assert machine.said("systemctl is-active multi-user.target mnt-models.automount") == "active\nactive"
    assert not mounted(machine)
    began = time.monotonic()
    asked = machine.on(f"cat {MODELS}/config.json")
    assert asked.returncode != 0, "nobody serves it"
    assert time.monotonic() - began < SECONDS + 60, "who reads it waits for one attempt, and not for ever"
    proven = machine.playbook(PROJECT / "playbooks/operate/verify_storage.yml", **SHARED)
    assert proven.returncode != 0
    assert "STORAGE-N" in proven.stdout, proven.stdout
    machine.said("systemctl enable --now nfs-server.service")
    assert machine.said(f"cat {MODELS}/config.json") == "weights", "the next access finds it"


def test_a_server_that_went_while_a_file_is_open_does_not_keep_the_machine_from_going_down(machine: Guest) -> None:
    machine.having(shared)
    machine.said(f"cat {MODELS}/config.json")
    machine.said(f"systemd-run --unit=reader tail --follow {MODELS}/config.json")
    machine.said("systemctl disable --now nfs-server.service")
    machine.reboot()
    machine.said("systemctl enable --now nfs-server.service")
    assert machine.said(f"cat {MODELS}/config.json") == "weights"
