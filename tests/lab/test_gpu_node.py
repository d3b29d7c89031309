"""A node with simulated GPUs: packages from the signed repository, modules, reboot, by the tools a role uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.models import NodeState

from .conftest import PROJECT, Lab

pytestmark = pytest.mark.lab
PLAY = """
- hosts: all
  gather_facts: false
  roles: [gpuyard.fleet.lab_gpu]
"""
SOURCES = "/etc/apt/sources.list.d/t.sources"
DRIVER = "nvidia-driver-cuda libnvidia-ml1 nvidia-kernel-open-dkms nvidia-persistenced nvidia-fabricmanager"


def play(lab: Lab, node: NodeState, folder: Path, *words: str, model: str = "H100-SXM5-80GB", count: int = 8) -> str:
    words_of_ssh = agent.login(lab.ref, node)
    options = words_of_ssh[1:-1]
    inventory = {
        "all": {
            "hosts": {
                node.name: {
                    "ansible_host": node.address,
                    "ansible_user": "root",
                    "ansible_ssh_common_args": " ".join(options),
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "lab_gpu_model": model,
                    "lab_gpu_count": count,
                }
            }
        }
    }
    (folder / "hosts.json").write_text(json.dumps(inventory))
    (folder / "play.yml").write_text(PLAY)
    program = Path(sys.executable).with_name("ansible-playbook")
    # Into a file: a connection that ansible keeps open would hold a pipe open, and the play would seem to run on.
    with (folder / "said").open("w+") as said:
        subprocess.run(
            [program, "-i", folder / "hosts.json", folder / "play.yml", *words],
            cwd=PROJECT,
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=300,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
        )
        said.seek(0)
        return said.read()


def install(version: str, *more: str) -> str:
    names = " ".join(f"{name}={version}-1" for name in DRIVER.split())
    return f"DEBIAN_FRONTEND=noninteractive apt-get install -y {' '.join(more)} {names}"


@pytest.fixture(scope="module")
def clean(lab: Lab) -> NodeState:
    lab.up()
    node = lab.gpu()
    mirror = agent.network_read(lab.ref)
    assert mirror
    key = mirror.mirrors.nvidia.key
    lab.said(node, f"mkdir -p /etc/apt/keyrings && cat > /etc/apt/keyrings/t.asc <<'EOK'\n{key}\nEOK")
    lab.said(
        node,
        f"printf 'Types: deb\\nURIs: {mirror.mirrors.nvidia.uri}/\\nSuites: /\\n"
        f"Signed-By: /etc/apt/keyrings/t.asc\\n' > {SOURCES}",
    )
    return node


UPDATE = f"apt-get update --error-on=any -o Dir::Etc::sourcelist={SOURCES} -o Dir::Etc::sourceparts=-"


@pytest.fixture(scope="module")
def node(lab: Lab, clean: NodeState, tmp_path_factory: pytest.TempPathFactory) -> NodeState:
    """With hardware plugged in by the role: checked first, then done, then done again."""
    folder = tmp_path_factory.mktemp("play")
    checked = play(lab, clean, folder, "--check", "--diff")
    assert "failed=0" in checked, checked
    assert "unreachable=0" in checked, checked
    done = play(lab, clean, folder)
    assert "failed=0" in done, done
    again = play(lab, clean, folder)
    assert "changed=0" in again, again
    assert "failed=0" in again, again
    lab.said(clean, UPDATE)
    return clean


def test_a_board_that_cannot_be_simulated_is_refused(lab: Lab, clean: NodeState, tmp_path: Path) -> None:
    said = play(lab, clean, tmp_path, model="TPU")
    assert "LAB-GPU: TPU cannot be simulated" in said
    assert "changed=0" in said


def test_the_hardware_is_on_the_bus_before_any_driver(lab: Lab, node: NodeState) -> None:
    classes = lab.said(node, "cat /var/lib/gpuyard-lab/pci/*/class").split()
    assert (classes.count("0x030200"), classes.count("0x068000")) == (8, 4)


def test_a_repository_with_a_wrong_key_is_refused(lab: Lab, node: NodeState) -> None:
    lab.said(
        node,
        "cp /etc/apt/keyrings/t.asc /root/good.asc; cp /usr/share/keyrings/debian-archive-keyring.gpg "
        "/etc/apt/keyrings/t.gpg; sed -i s/t.asc/t.gpg/ " + SOURCES,
    )
    try:
        done = lab.on(node, UPDATE)
        assert done.returncode == 100
        assert "NO_PUBKEY" in done.stdout + done.stderr
    finally:
        lab.said(node, f"sed -i s/t.gpg/t.asc/ {SOURCES}")
    lab.said(node, UPDATE)


def test_a_driver_is_installed_loaded_held_by_its_daemons_replaced_and_there_after_a_reboot(
    lab: Lab, node: NodeState
) -> None:
    lab.said(node, install("580.105.08"))
    assert lab.on(node, "nvidia-smi").returncode == 9, "installed is not loaded"
    lab.said(node, "modprobe -a nvidia nvidia-uvm && systemctl restart nvidia-persistenced nvidia-fabricmanager")
    assert lab.said(node, "nvidia-smi --query-gpu=driver_version --format=csv,noheader | sort -u") == "580.105.08"
    assert lab.said(node, "nvidia-smi --query-gpu=persistence_mode --format=csv,noheader | sort -u") == "Enabled"

    lab.said(node, "modprobe -r nvidia-uvm; true")
    assert "is in use" in lab.on(node, "rmmod nvidia").stderr
    lab.said(node, "apt-mark hold nvidia-driver-cuda")
    assert lab.on(node, install("580.126.20")).returncode == 100, "a hold holds"
    lab.said(node, install("580.126.20", "--allow-change-held-packages"))
    assert lab.on(node, "nvidia-smi").returncode == 18, "the old module is still loaded"
    assert lab.on(node, "systemctl is-active nvidia-persistenced").returncode != 0, "its daemon refuses the old module"

    lab.said(node, "systemctl stop nvidia-persistenced nvidia-fabricmanager && rmmod nvidia && modprobe -a nvidia")
    assert "580.126.20" in lab.said(node, "cat /proc/driver/nvidia/version")

    lab.on(node, "systemctl reboot")
    loaded = (
        "nvidia-smi --query-gpu=driver_version --format=csv,noheader | sort -u; systemctl is-active nvidia-persistenced"
    )
    assert host.wait_until(lambda: lab.on(node, loaded).stdout.split() == ["580.126.20", "active"], 60, 0.5)


def test_a_downgrade_needs_consent(lab: Lab, node: NodeState) -> None:
    lab.said(node, install("580.126.20"))
    assert lab.on(node, install("580.105.08")).returncode == 100
    lab.said(node, install("580.105.08", "--allow-downgrades", "--allow-change-held-packages"))
    assert lab.said(node, "modinfo -F version nvidia") == "580.105.08"
