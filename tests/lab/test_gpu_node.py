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


def name_repository(lab: Lab, node: NodeState) -> None:
    """Have the node know and trust the lab's repository of the driver, of which it has read nothing yet."""
    mirror = agent.network_read(lab.ref)
    assert mirror
    key = mirror.mirrors.nvidia.key
    lab.said(node, f"mkdir -p /etc/apt/keyrings && cat > /etc/apt/keyrings/t.asc <<'EOK'\n{key}\nEOK")
    lab.said(
        node,
        f"printf 'Types: deb\\nURIs: {mirror.mirrors.nvidia.uri}/\\nSuites: /\\n"
        f"Signed-By: /etc/apt/keyrings/t.asc\\n' > {SOURCES}",
    )


@pytest.fixture(scope="module")
def clean(lab: Lab) -> NodeState:
    lab.up()
    node = lab.gpu()
    name_repository(lab, node)
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


ENGINE = """
[Service]
Type=exec
ExecStart=/bin/sh -c 'while :; do :; done'
User=nobody
NoNewPrivileges=yes
CapabilityBoundingSet=
PrivateUsers=yes
PrivateDevices=yes
ProtectProc=invisible
RestrictNamespaces=yes
SystemCallFilter=@system-service
KillMode=mixed
Restart=always
"""
HOLDERS = (
    "for p in /proc/[0-9]*; do ls -l $p/fd 2>/dev/null | grep -q 'dev/nvidia0$' && grep ^0:: $p/cgroup; done; true"
)
APPS = "nvidia-smi --query-compute-apps=pid --format=csv,noheader -i 0"


def test_an_engine_holds_the_gpus_from_its_own_control_group_for_as_long_as_it_serves(
    lab: Lab, node: NodeState
) -> None:
    lab.said(node, install("580.126.20", "--allow-downgrades", "--allow-change-held-packages"))
    lab.said(
        node,
        "systemctl stop nvidia-persistenced; rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia; modprobe -a nvidia-uvm",
    )
    lab.said(node, f"cat > /etc/systemd/system/vllm@.service <<'EOU'{ENGINE}EOU\nsystemctl daemon-reload")
    lab.said(node, "systemctl start vllm@t")
    try:
        main = "systemctl show --property MainPID --value vllm@t"
        assert host.wait_until(lambda: lab.said(node, APPS) == lab.said(node, main), 20, 0.5), lab.said(node, APPS)
        assert lab.said(node, HOLDERS) == "0::/system.slice/system-vllm.slice/vllm@t.service"
        assert "nvidia_uvm is in use" in lab.on(node, "rmmod nvidia_uvm").stderr
        assert lab.on(node, "modprobe -r nvidia").returncode == 1
        busy = "nvidia-smi --query-gpu=utilization.gpu,temperature.gpu --format=csv,noheader,nounits -i 0"

        def load() -> list[int]:
            return [int(word) for word in lab.said(node, busy).split(", ")]

        assert host.wait_until(lambda: load()[0] > 0 and load()[1] > 30, 20, 0.5), "its computing is the GPU's load"

        killed = lab.said(node, main)
        lab.said(node, f"kill -9 {killed}")
        assert host.wait_until(lambda: lab.said(node, APPS) not in ("", killed), 20, 0.5), "a new one holds it"
        assert len(lab.said(node, HOLDERS).splitlines()) == 1, "and nothing is left of the old one"
    finally:
        lab.said(node, "systemctl stop vllm@t")
    assert lab.said(node, APPS) == ""
    lab.said(node, "rmmod nvidia_uvm nvidia && modprobe -a nvidia nvidia-uvm")


def test_a_fault_is_seen_through_the_real_tools_and_gone_when_it_is_mended(lab: Lab, node: NodeState) -> None:
    state = "sha256sum /run/gpuyard-lab/gpus.state"
    apply = "/usr/local/lib/gpuyard-lab/simulated_gpu.py apply"
    lab.said(node, apply)
    before = lab.said(node, state)
    fault = "/var/lib/gpuyard-lab/faults.d/t.json"
    patch = {"gpus": {"3": {"lost": True}, "5": {"temperature_c": 91, "clocks_event_reasons": 64}}}
    lab.said(node, f"mkdir -p {Path(fault).parent}; echo '{json.dumps({'patch': patch})}' > {fault}; {apply}")
    try:
        query = "nvidia-smi --query-gpu=temperature.gpu --format=csv,noheader -i "
        assert lab.said(node, f"{query} 5") == "91"
        broken = lab.on(node, "nvidia-smi")
        assert (broken.returncode, "GPU is lost" in broken.stdout) == (15, True)
    finally:
        lab.said(node, f"rm {fault}; {apply}")
    assert lab.said(node, state) == before
    assert lab.said(node, "nvidia-smi -L | wc -l") == "8"


def test_a_downgrade_needs_consent(lab: Lab, node: NodeState) -> None:
    lab.said(node, install("580.126.20"))
    assert lab.on(node, install("580.105.08")).returncode == 100
    lab.said(node, install("580.105.08", "--allow-downgrades", "--allow-change-held-packages"))
    assert lab.said(node, "modinfo -F version nvidia") == "580.105.08"
