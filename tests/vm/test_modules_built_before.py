"""With a real DKMS and a real compiler: all is compiled before a driver is exchanged, and nothing while it is.

What is compiled tells the node itself: each run of make, with its seconds of processor time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROJECT, SECONDS, Guest
from .test_real_kernel import INSTALL, NEW, OLD, PACKAGE

pytestmark = pytest.mark.qemu
SETS = "/var/lib/gpuyard/packages"
BROKEN = "595.45.04"
MADE = "/var/log/made"
# In the place of the real one: apt gives its scripts a PATH without /usr/local.
MAKE = f"""\
#!/bin/bash
TIMEFORMAT='%U %S'
{{ time /usr/bin/make.real "$@" 2>&3; }} 3>&2 2>/run/make.$$
code=$?
echo "$(tail -n 1 /run/make.$$) $*" >>{MADE}
exit $code
"""


def kept(guest: Guest) -> None:
    """Both drivers' packages on the node as the verb `fetch` leaves them, the old one's installed from there."""
    guest.said(
        f"mv /usr/bin/make{{,.real}} && : >{MADE} && cat >/usr/bin/make <<'END'\n{MAKE}END\nchmod 755 /usr/bin/make"
    )
    for version in (OLD, NEW):
        guest.said(
            f"mkdir -p {SETS}/{version} && cd {SETS}/{version} && "
            f"cp /var/lib/gpuyard-lab/packages/*_{version}-*.deb . && sha256sum *.deb >SHA256SUMS"
        )
    guest.said(f"{INSTALL} --allow-downgrades {SETS}/{OLD}/*.deb")
    assert seconds_compiled(guest) > 0, "the counter counts"


def seconds_compiled(guest: Guest) -> float:
    """Of processor time since it was asked last."""
    lines = guest.said(f"cat {MADE}; : >{MADE}").splitlines()
    return sum(float(user) + float(system) for user, system, *_ in (line.split() for line in lines))


@pytest.fixture
def played(guest: Guest, tmp_path: Path) -> Any:
    """Have Ansible do tasks on the node, and say what came of the last one."""
    place = guest.place
    host = {
        "ansible_host": "127.0.0.1",
        "ansible_port": guest.state.port,
        "ansible_user": "root",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(place.ssh / "id_ed25519"),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={place.ssh / 'known_hosts'} -o LogLevel=ERROR",
        "nvidia_driver_repository": {"uri": "http://nowhere.invalid", "key": "none", "fingerprint": "none"},
    }
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"all": {"hosts": {guest.name: host}}}))

    def play(*tasks: dict[str, Any]) -> dict[str, Any]:
        book = tmp_path / "play.json"
        book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": list(tasks)}]))
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "--inventory", inventory, book],
            cwd=PROJECT,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
            # An emulated machine takes its time to let somebody in.
            | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "LC_ALL": "C.UTF-8", "ANSIBLE_TIMEOUT": "120"},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        told = json.loads(done.stdout[done.stdout.index("{") :])
        return told["plays"][-1]["tasks"][-1]["hosts"][guest.name]

    return play


def build(version: str) -> dict[str, Any]:
    return {
        "ansible.builtin.include_role": {"name": "gpuyard.fleet.nvidia_driver", "tasks_from": "build"},
        "vars": {"nvidia_driver_version": version, "nvidia_driver_packages": {PACKAGE: f"{version}-1"}},
    }


def exchange(version: str) -> dict[str, Any]:
    """As the role's verb `install` does it: from the kept files, without a download."""
    words = {"packages": {PACKAGE: f"{version}-1"}, "kept": f"{SETS}/{version}", "allow_downgrade": True}
    return {"gpuyard.fleet.apt_locked": words}


def test_modules_are_compiled_before_the_exchange_and_nothing_is_during_it_nor_on_the_way_back(
    guest: Guest, played: Any
) -> None:
    guest.having(kept)
    guest.said("modprobe nvidia")
    before = guest.said("dkms status; ls -R /lib/modules/*/updates /usr/src")
    there, back = played(build(NEW)), played(build(OLD))
    assert (there.get("built"), there.get("taken")) == ([guest.kernel], []), there
    assert (back.get("built"), back.get("taken")) == ([], [guest.kernel]), f"the way back is taken as it is: {back}"
    assert seconds_compiled(guest) > 1
    assert (guest.said("dkms status; ls -R /lib/modules/*/updates /usr/src"), guest.driver) == (before, OLD)
    again = [played(build(version)) for version in (NEW, OLD)]
    assert [one["changed"] for one in again] == [False, False]
    guest.said("modprobe --remove nvidia")
    for version in (NEW, OLD):
        assert played(exchange(version))["changed"]
        assert seconds_compiled(guest) == 0
        guest.said("modprobe nvidia")
        assert guest.driver == version
        assert guest.said("dkms status") == f"nvidia/{version}, {guest.kernel}, x86_64: installed"
        guest.said("modprobe --remove nvidia")


def test_a_module_that_was_changed_on_the_disk_is_not_taken_and_is_built_anew(guest: Guest, played: Any) -> None:
    guest.having(kept)
    played(build(NEW))
    guest.said(f"truncate --size -1 {SETS}/{NEW}/modules/tree/nvidia/{NEW}/{guest.kernel}/x86_64/module/nvidia.ko")
    seconds_compiled(guest)
    played(exchange(NEW))
    assert seconds_compiled(guest) > 1, "DKMS was left to compile it"
    guest.said("modprobe nvidia && modprobe --remove nvidia")
    assert played(build(NEW))["taken"] == [guest.kernel]
    played(exchange(OLD))


def test_a_build_that_was_killed_is_begun_anew_and_leaves_nothing(guest: Guest, played: Any) -> None:
    guest.having(kept)
    guest.said(f"rm -rf {SETS}/{NEW}/modules /etc/dkms/nvidia-{NEW}.conf")
    with_limit = {**build(NEW), "vars": {**build(NEW)["vars"], "nvidia_driver_build_seconds": 5}}
    late = played(with_limit)
    assert "DRIVER-BUILD" in late["msg"]
    assert "it took longer than 5 s" in late["msg"]
    assert guest.said(f"ls -A {SETS}/{NEW}/modules; ls /etc/dkms | grep {NEW} || true") == ""
    assert played(build(NEW))["built"] == [guest.kernel]


def test_a_driver_that_does_not_build_for_this_kernel_is_refused_with_the_compilers_words(
    guest: Guest, played: Any
) -> None:
    guest.having(kept)
    guest.said(
        f"mkdir -p {SETS}/{BROKEN} && cd {SETS}/{BROKEN} && dpkg-deb -R ../{NEW}/*.deb new && "
        f"mv new/usr/src/nvidia-{NEW} new/usr/src/nvidia-{BROKEN} && sed -i 's/{NEW}/{BROKEN}/g' "
        "new/DEBIAN/* new/usr/src/*/dkms.conf && echo '#error no vm_flags_set here' >>new/usr/src/*/nvidia.c && "
        f"dpkg-deb -Zgzip -b new {PACKAGE}_{BROKEN}-1_amd64.deb && rm -r new"
    )
    before = guest.said("dkms status")
    refused = played(build(BROKEN))
    assert f"DRIVER-BUILD: the modules of driver {BROKEN}" in refused["msg"]
    assert "#error no vm_flags_set here" in refused["msg"]
    assert guest.said("dkms status") == before
    assert guest.said(f"ls -A {SETS}/{BROKEN}/modules; ls /etc/dkms | grep {BROKEN} || true") == ""
    guest.down()  # the counter is in the way of nobody else
