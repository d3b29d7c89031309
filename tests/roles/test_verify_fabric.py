"""The playbook verify_fabric.yml over two nodes that are this machine, whose engine's Python logs what NCCL would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture
def play(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "bin/nvidia-smi": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
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
        },
        "children": {"gpu_nodes": nodes, "pool_chat": nodes},
    }
    (tmp_path / "hosts.json").write_text(json.dumps({"all": inventory}))

    def play(network: str) -> subprocess.CompletedProcess[str]:
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
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return play


def test_a_fall_back_to_tcp_ends_the_play_with_a_failure_and_the_fast_way_does_not(
    play: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = play("Socket/0")
    assert done.returncode == 2, done.stdout + done.stderr
    verdict = json.loads((tmp_path / ".gpuyard/fabric/a.json").read_text())
    assert verdict["reason"] == (
        "FABRIC-FALLBACK: 1 of 1 connections between nodes go via NET/Socket, not over infiniband. "
        "NCCL says: NET/Plugin: Could not find: libnccl-net.so"
    )
    assert not list((tmp_path / ".gpuyard/fabric/rates").glob("*")), "no later run is held against a bad one"
    done = play("IB/0/GDRDMA")
    assert done.returncode == 0, done.stdout
    (rates,) = (tmp_path / ".gpuyard/fabric/rates").iterdir()
    assert json.loads(rates.read_text()) == {"nodes": ["a", "b"], "busbw_gb_s": 480.0}
    assert {json.loads((tmp_path / f".gpuyard/fabric/{node}.json").read_text())["state"] for node in "ab"} == {
        "Healthy"
    }
