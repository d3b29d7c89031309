"""Every fault, injected into a real node and mended: seen by ordinary tools while it lasts, and gone without a trace.

GPUYARD_FAULT_ROUNDS and GPUYARD_SEED choose how often and in which order (`make bench-faults`).
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.faults import record, rim
from gpuyard.lab.faults.model import CONTROLLER, Injection
from gpuyard.lab.faults.table import FAULTS
from gpuyard.lab.models import NodeState
from gpuyard.lab.place import read_json
from tools.bench_kill import STATE

from .conftest import Lab, refused
from .test_gpu_node import DRIVER, SOURCES, UPDATE, install, play

pytestmark = pytest.mark.lab
VERSION = "580.126.20"

# Parameters other than the defaults where the test's node needs them, or where they show more.
WORDS: Mapping[str, list[str]] = {
    "xid": ["code=999", "times=3"],
    "partition": ["direction=out"],
    "link-flaps": ["times=2", "down_seconds=0.1"],
    "slow-link": ["delay_ms=300"],
    "apt-lock": ["seconds=600"],
}

# What an operator could tell two nodes apart by, beyond packages and files: what runs, routes, rules, mounts, modules.
NOW = r"""
find /var/lib/gpuyard* /run/gpuyard-lab /lib/modules/gpuyard-lab -type f ! -name '*.lock' ! -path '*/processes/*' 2>/dev/null | sort |
  xargs -r sha256sum
find /var/lib/gpuyard* /usr/local/lib/gpuyard* /run/systemd/system /dev/nvidia* | sort
find /run/systemd/transient -mindepth 1
systemctl list-units --all --plain --no-legend --type=service,socket,mount,timer,swap |
  awk '$3 != "inactive" && $1 !~ /^(user|session|run-user|run-credentials|modprobe|systemd-tmpfiles-clean)/ {print $1, $2, $3, $4}'
ip -4 addr show dev host0 | awk '/inet/ {print $2}'
ip route
nft list ruleset
findmnt -rn -o TARGET,FSTYPE,OPTIONS | grep -Ev '^/run/(user|credentials)' | sed s/,uuid=on// | sort
lsmod
tc qdisc show
df --output=target | sort
ss -Hltn | awk '{print $4}' | sort
dpkg --audit
"""


@dataclass
class Yard:
    """A lab with a node that has everything there is to break, and one beside it."""

    lab: Lab
    node: NodeState
    peer: NodeState

    def state(self) -> list[str]:
        return self.lab.said(self.node, f"({STATE}); ({NOW})").splitlines()

    def settled(self, before: list[str]) -> list[str]:
        """How the node differs from before, after it had a moment for what mending only begins."""
        now: list[str] = []

        def same() -> bool:
            now[:] = self.state()
            return now == before

        host.wait_until(same, 20, 0.5)
        return sorted(set(now) ^ set(before))

    def injection(self, fault: str, seed: int = 0, node: NodeState | None = None) -> Injection:
        words = rim.values_in(WORDS.get(fault, []))
        return FAULTS[fault].chosen((node or self.node).spec, None, seed, words)

    def sees(self, fault: str) -> bool:
        return rim.seen(self.lab.place, self.node.name, self.injection(fault))

    def breaks(self, fault: str, *words: str, seed: int = 0, after: float = 0) -> None:
        agent.fault_break(self.lab.ref, self.node.name, fault, None, seed, list(words or WORDS.get(fault, [])), after)

    def mends(self, fault: str | None) -> list[str]:
        return agent.fault_mend(self.lab.ref, self.node.name, fault)

    def on_this_machine(self) -> dict[str, object]:
        """What the lab has on this machine, beyond its nodes."""
        place = self.lab.place

        def ours(*words: str) -> list[str]:
            said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
            return [line for line in said.splitlines() if place.id in line]

        table = subprocess.check_output(["nft", "-s", "list", "table", "ip", place.table], text=True)
        faults = [
            path for folder in (record.folder(place), place.views) for path in folder.rglob("*") if path.is_file()
        ]
        return {
            "tables": ours("nft", "list", "tables"),
            "table": table,
            "qdiscs": [line.split(" ")[1] for line in ours("tc", "qdisc", "show")],
            "groups": sorted(path.name for path in host.cgroup_of(place, "x").parent.glob("*") if path.is_dir()),
            "files": [path.name for path in faults],
            "mounts": {
                line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if place.id in line
            },
        }


# An engine's unit with the name and the variables of a simulated one; what it does with its control file is its own test.
ENGINE = """
[Service]
Environment=GPUYARD_ENGINE=/opt/vllm/vllm-sim-test
ExecStart=/bin/sh -c 'grep -qs exit_at_start /var/lib/gpuyard-lab/engine.json && exit 1; exec sleep infinity'
DevicePolicy=closed
DeviceAllow=char-* rw
Restart=always
RestartSec=1
"""


@pytest.fixture(scope="module")
def yard(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Yard:
    lab.up()
    node, peer = lab.gpu("t-faults-0"), lab.gateway()
    mirror = agent.network_read(lab.ref)
    assert mirror
    repository = mirror.mirrors.nvidia
    lab.said(node, f"mkdir -p /etc/apt/keyrings && cat > /etc/apt/keyrings/t.asc <<'EOK'\n{repository.key}\nEOK")
    lab.said(
        node,
        f"printf 'Types: deb\\nURIs: {repository.uri}/\\nSuites: /\\nSigned-By: /etc/apt/keyrings/t.asc\\n' > {SOURCES}",
    )
    done = play(lab, node, tmp_path_factory.mktemp("play"))
    assert "failed=0" in done, done
    lab.said(node, f"{UPDATE} && {install(VERSION)} && apt-mark hold {DRIVER}")
    lab.said(
        node,
        "modprobe -a nvidia nvidia_uvm && systemctl enable -q nvidia-fabricmanager && "
        "systemctl restart nvidia-persistenced nvidia-fabricmanager",
    )
    lab.said(node, f"cat > /etc/systemd/system/vllm@.service <<'EOU'\n{ENGINE}\nEOU\nsystemctl daemon-reload")
    lab.said(
        node,
        "mkdir -p /etc/systemd/system/multi-user.target.wants && ln -sf ../vllm@.service "
        "/etc/systemd/system/multi-user.target.wants/vllm@t.service && systemctl start vllm@t.service",
    )
    made = Yard(lab, node, peer)
    # What a boot brings and what hands have begun are to be the same.
    made.breaks("power-cut")
    made.mends("power-cut")
    assert host.wait_until(
        lambda: lab.on(node, "systemctl is-active -q vllm@t nvidia-fabricmanager").returncode == 0, 60
    )
    return made


@pytest.fixture(autouse=True)
def whole(yard: Yard) -> Iterator[None]:
    yield
    yard.mends(None)


ON_NODES = [fault.id for fault in FAULTS.values() if fault.target != CONTROLLER]


def test_each_fault_is_seen_while_it_lasts_and_the_node_is_as_before(yard: Yard) -> None:
    seed = int(os.environ.get("GPUYARD_SEED", random.randrange(10**6)))  # noqa: S311 - dice, not secrets
    dice = random.Random(seed)  # noqa: S311
    print(f"GPUYARD_SEED={seed}")
    before, machine = yard.state(), yard.on_this_machine()
    wrong: list[str] = []
    for round_ in range(int(os.environ.get("GPUYARD_FAULT_ROUNDS", "1"))):
        began = time.monotonic()
        for fault in dice.sample(ON_NODES, len(ON_NODES)):
            if yard.sees(fault):
                wrong.append(f"{fault}: seen before it is broken")
            yard.breaks(fault, seed=dice.randrange(1000))
            if not yard.sees(fault):
                wrong.append(f"{fault}: not seen while it lasts")
            yard.mends(fault)
            if yard.sees(fault):
                wrong.append(f"{fault}: seen after it is mended")
            wrong += [f"{fault}: left {line}" for line in yard.settled(before)]
        print(f"round {round_ + 1}: {len(ON_NODES)} faults in {time.monotonic() - began:.0f} s")
    assert wrong == []
    assert yard.on_this_machine() == machine
