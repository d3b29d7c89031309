"""The playbook verify_fabric.yml over two nodes that are this machine, whose engine's Python logs what NCCL would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Play = Callable[[str, float], subprocess.CompletedProcess[str]]
PROJECT = Path(__file__).parents[2]
PYTHON = """\
#!/bin/sh
cat >"$(dirname "$NCCL_DEBUG_FILE")/nccl.a.$RANK" <<LOG
a:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
LOG
[ "$WORLD_SIZE" = 2 ] || cat >>"$(dirname "$NCCL_DEBUG_FILE")/nccl.a.$RANK" <<LOG
a:1:2 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so
a:1:2 [0] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/$NETWORK
LOG
echo '{"kept": true, "busbw": {"64": 300.5, "1024": 480.0}}'
"""
IBSTAT = """\
#!/bin/sh
for adapter in mlx5_0 mlx5_1; do
  printf "CA '%s'\\n\\tPort 1:\\n\\t\\tState: Active\\n\\t\\tPhysical state: LinkUp\\n" $adapter
  printf '\\t\\tRate: 400\\n\\t\\tSM lid: 1\\n\\t\\tLink layer: InfiniBand\\n'
done
"""
# Without an address it is the one that waits.
IB_WRITE_BW = """\
#!/bin/sh
case "$*" in *127.0.0.1) echo " 65536 5000 392.5 $GBPS 0.7" ;; esac
"""


@pytest.fixture
def play(tmp_path: Path) -> Play:
    (tmp_path / "bin").mkdir()
    programs = {
        "python": PYTHON,
        "bin/nvidia-smi": "#!/bin/sh\n",
        "bin/ibstat": IBSTAT,
        "bin/ib_write_bw": IB_WRITE_BW,
        "bin/su": "#!/bin/sh\necho unlimited\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pci/0000:1a:00.0").mkdir(parents=True)
    (tmp_path / "pci/0000:1a:00.0/vendor").write_text("0x15b3\n")
    (tmp_path / "pci/0000:1a:00.0/class").write_text("0x020700\n")
    expected = {"fabric": "infiniband", "ports": 2, "gbps": 400, "gpu_direct": True, "nvlink": True, "busbw_gb_s": 460}
    nodes = {"hosts": {"a": {}, "b": {}}}
    inventory = {
        "vars": {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_host": "127.0.0.1",
            "ansible_python_interpreter": sys.executable,
            "nvidia_driver_gpu_count": 2,
            "verify_fabric_expected": {**expected, "source": "Azure"},
            "infiniband_ports": 2,
            "infiniband_gbps": 400,
            "infiniband_kernel_modules": "open",
            "infiniband_pci_root": str(tmp_path / "pci"),
        },
        "children": {"gpu_nodes": nodes, "pool_chat": nodes, "infiniband_nodes": nodes},
    }
    (tmp_path / "hosts.json").write_text(json.dumps({"all": inventory}))

    def play(network: str, gbps: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path / "hosts.json"),
                *("-e", f"verify_fabric_python={tmp_path / 'python'}"),
                "playbooks/operate/verify_fabric.yml",
            ],
            cwd=PROJECT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
                "GPUYARD_PROJECT": str(tmp_path),
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "NETWORK": network,
                "GBPS": str(gbps),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return play


def verdict(tmp_path: Path, node: str) -> dict[str, str]:
    """What was said, by what was asked."""
    told = json.loads((tmp_path / f".gpuyard/fabric/{node}.json").read_text())
    return {entry["role"]: entry["reason"] for entry in told["roles"]}


def test_a_fall_back_to_tcp_and_a_slow_port_end_the_play_with_a_failure_and_the_fast_way_does_not(
    play: Play, tmp_path: Path
) -> None:
    done = play("Socket/0", 359)
    assert done.returncode == 2, done.stdout + done.stderr
    told = verdict(tmp_path, "a")
    assert told["the way between a, b"] == (
        "FABRIC-FALLBACK: 1 of 1 connections between nodes go via NET/Socket, not over infiniband. "
        "NCCL says: NET/Plugin: Could not find: libnccl-net.so"
    )
    assert told["each port to b"].startswith(
        "FABRIC-SLOW: 359 Gbit/s between a and b by mlx5_0/1, and 360 is the least"
    )
    assert verdict(tmp_path, "b")["each port to a"].startswith("FABRIC-SLOW: 359 Gbit/s between b and a by mlx5_0/1")
    assert not list((tmp_path / ".gpuyard/fabric/rates").glob("*")), "no later run is held against a bad one"

    done = play("IB/0/GDRDMA", 392.4)
    assert done.returncode == 0, done.stdout
    assert verdict(tmp_path, "a") == {
        "gpuyard.fleet.infiniband": "proven",
        "the way inside the node": "480.0 GB/s",
        "the way between a, b": "480.0 GB/s",
        "each port to b": '{"mlx5_0/1": 392.4, "mlx5_1/1": 392.4}',
    }
    (rates,) = (tmp_path / ".gpuyard/fabric/rates").iterdir()
    assert json.loads(rates.read_text()) == {"nodes": ["a", "b"], "busbw_gb_s": 480.0}
