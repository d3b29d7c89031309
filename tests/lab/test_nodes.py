"""Real nodes: booted, killed in every way, healed, and gone without a trace."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.models import NodeState
from gpuyard.lab.place import REGISTRY, read_json

from .conftest import Lab, refused

pytestmark = pytest.mark.lab
# The name of the node's own package mirror is known: an answer of a resolver beyond this machine.
WAY_OUT = (
    "mirror=$(sed -n 's|^deb https*://\\([^/ ]*\\).*|\\1|p' /etc/apt/sources.list | head -n1); "
    '[ -n "$mirror" ] && getent hosts "$mirror"'
)


@pytest.fixture
def gateway(lab: Lab) -> NodeState:
    lab.up()
    return lab.gateway()


def pid_of(lab: Lab, record: str) -> int:
    found = read_json(lab.place.state / record)
    assert found
    return found["pid"]


def nspawn_of(lab: Lab, node: str) -> int:
    shell = pid_of(lab, f"nodes/{node}/process.json")
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    return next(int(pid) for pid in children if "systemd-nspawn" in Path(f"/proc/{pid}/cmdline").read_text())


def network(lab: Lab) -> agent.NetworkState:
    state = agent.network_read(lab.ref)
    assert state
    return state


def node(lab: Lab, name: str) -> NodeState:
    state = agent.node_read(lab.ref, name)
    assert state
    return state


def test_a_node_is_a_whole_systemd_machine_with_a_name_and_a_way_out(lab: Lab, gateway: NodeState) -> None:
    assert lab.said(gateway, "systemctl is-system-running --wait") == "running"
    assert lab.said(gateway, "hostname") == "t-gateway-0"
    assert lab.said(gateway, "stat -f -c %T /sys/fs/cgroup") == "cgroup2fs"
    assert lab.said(gateway, WAY_OUT)


def test_a_host_key_that_is_not_the_nodes_is_refused(lab: Lab, gateway: NodeState, tmp_path: Path) -> None:
    known = lab.place.ssh / "known_hosts"
    before = known.read_text()
    other = re.sub(r"AAAA\S+", (lab.place.ssh / "id_ed25519.pub").read_text().split()[1], before)
    assert other != before
    known.write_text(other)
    try:
        done = lab.on(gateway, "true")
        assert done.returncode == 255
        assert "Host key verification failed" in done.stderr
    finally:
        known.write_text(before)
    assert lab.on(gateway, "true").returncode == 0


def test_sandboxes_of_units_are_enforced_in_a_node(lab: Lab, gateway: NodeState) -> None:
    """The two options that make them so are easily lost, and nothing else would notice."""
    unit = "systemd-run --quiet --wait --pipe --collect"
    assert lab.on(gateway, f"{unit} -p DevicePolicy=strict head -c1 /dev/full").returncode != 0
    assert lab.on(gateway, f"{unit} head -c1 /dev/full").returncode == 0
    own = network(lab).mirrors.models.uri.replace("/models", "/health")
    assert lab.on(gateway, f"{unit} curl -fsS --max-time 5 {own}").returncode == 0
    assert lab.on(gateway, f"{unit} -p IPAddressDeny=any curl -fsS --max-time 2 {own}").returncode != 0


def test_up_on_a_running_node_does_nothing(lab: Lab, gateway: NodeState) -> None:
    before = pid_of(lab, "nodes/t-gateway-0/process.json")
    assert lab.gateway() == gateway
    assert pid_of(lab, "nodes/t-gateway-0/process.json") == before


def test_a_node_whose_nspawn_was_killed_is_seen_dead_and_boots_again_on_its_disk(lab: Lab, gateway: NodeState) -> None:
    lab.said(gateway, "echo kept > /root/kept; sync")
    os.kill(nspawn_of(lab, gateway.name), signal.SIGKILL)
    assert host.wait_until(lambda: not node(lab, gateway.name).running, 10)
    again = lab.gateway()
    assert again.address == gateway.address
    assert lab.said(again, "cat /root/kept") == "kept"


def test_a_node_whose_keeper_was_killed_dies_with_it_and_heals(lab: Lab, gateway: NodeState) -> None:
    nspawn = nspawn_of(lab, gateway.name)
    os.kill(pid_of(lab, "nodes/t-gateway-0/process.json"), signal.SIGKILL)
    assert host.wait_until(lambda: host.proc_stat(nspawn) is None, 10)
    assert not node(lab, gateway.name).running
    assert lab.said(lab.gateway(), "hostname") == gateway.name


def test_a_node_that_reboots_comes_back_by_itself(lab: Lab, gateway: NodeState) -> None:
    before = lab.said(gateway, "cat /proc/sys/kernel/random/boot_id")
    lab.on(gateway, "systemctl reboot")

    def back() -> bool:
        done = lab.on(gateway, "cat /proc/sys/kernel/random/boot_id")
        return done.returncode == 0 and done.stdout.strip() != before

    assert host.wait_until(back, 30, 0.5)
    assert node(lab, gateway.name).running


def test_a_node_that_was_powered_off_from_within_is_seen_dead_and_heals(lab: Lab, gateway: NodeState) -> None:
    lab.on(gateway, "systemctl poweroff")
    assert host.wait_until(lambda: not node(lab, gateway.name).running, 30)
    assert lab.said(lab.gateway(), "hostname") == gateway.name


def test_a_killed_artefact_server_is_seen_and_started_again(lab: Lab, gateway: NodeState) -> None:
    os.kill(pid_of(lab, "server.json"), signal.SIGKILL)
    assert host.wait_until(lambda: not network(lab).healthy, 10)
    assert lab.up().healthy
    assert lab.on(gateway, f"curl -fsS {network(lab).mirrors.nvidia.uri}/InRelease").returncode == 0


@pytest.mark.parametrize(
    "broken",
    [
        ["nft", "delete", "table", "ip", "{table}"],
        ["ip", "link", "delete", "{bridge}"],
        ["ip", "link", "set", "{bridge}", "down"],
    ],
    ids=["no firewall", "no bridge", "bridge down"],
)
def test_a_network_that_was_broken_by_hand_is_seen_and_mended_under_running_nodes(
    lab: Lab, gateway: NodeState, broken: list[str]
) -> None:
    subprocess.run([word.format(table=lab.place.table, bridge=lab.place.bridge) for word in broken], check=True)
    assert not network(lab).healthy
    assert lab.up().healthy
    assert lab.said(gateway, WAY_OUT)


def test_the_port_of_this_machine_leads_to_the_gateway(lab: Lab, gateway: NodeState) -> None:
    lab.said(
        gateway,
        "mkdir -p /srv/t && echo reached > /srv/t/x && systemctl reset-failed; systemctl stop t-web 2>/dev/null; "
        f"systemd-run --quiet --unit=t-web python3 -m http.server --directory /srv/t {lab.port}",
    )
    url = f"http://127.0.0.1:{lab.port}/x"

    def answer() -> str:
        return subprocess.run(["curl", "-fsS", "--max-time", "3", url], capture_output=True, text=True).stdout

    assert host.wait_until(lambda: answer() == "reached\n", 15, 0.3)


# What a node would have to do to get at the loopback of the machine it runs on.
REACH = """
a=$(ip -4 -o addr show host0 | awk '{print $4}' | cut -d/ -f1)
for f in all host0; do echo 1 > /proc/sys/net/ipv4/conf/$f/route_localnet; done
ip addr del 127.0.0.1/8 dev lo
ip route add 127.0.0.1 via ${a%.*}.1 dev host0 src $a
curl -sS -o /dev/null --max-time 3 http://127.0.0.1:PORT/
reached=$?
ip route del 127.0.0.1
ip addr add 127.0.0.1/8 dev lo
exit $reached
"""


def test_a_node_cannot_reach_what_listens_on_this_machines_loopback(lab: Lab, gateway: NodeState) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout
            found = re.search(r"port (\d+)", server.stdout.readline())
            assert found
            assert lab.on(gateway, REACH.replace("PORT", found[1])).returncode == 28, "dropped, so the time is up"
            subprocess.run(["nft", "flush", "chain", "ip", lab.place.table, "guard"], check=True)
            assert lab.on(gateway, REACH.replace("PORT", found[1])).returncode == 0, "it is the guard that keeps it out"
        finally:
            server.kill()
    assert not network(lab).healthy
    assert lab.up().healthy


def test_a_port_in_use_is_refused_with_the_process_and_another_port(new_lab: Callable[[str], Lab], lab: Lab) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
            "print(s.getsockname()[1], flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout
            port = int(holder.stdout.readline())
            with refused("LAB-PORT") as caught:
                agent.network_up(lab.ref, port)
            assert f"pid={holder.pid}" in str(caught.value)
            assert "gateway.port" in str(caught.value)
        finally:
            holder.kill()
    assert lab.up().healthy


def test_two_labs_stand_side_by_side_and_one_goes_without_the_other(
    lab: Lab, gateway: NodeState, new_lab: Callable[[str], Lab]
) -> None:
    second = new_lab("second")
    other = second.gateway()
    assert network(second).subnet != network(lab).subnet
    assert other.address != gateway.address
    assert second.said(other, "hostname") == lab.said(gateway, "hostname"), "the same name in two labs"
    with refused("LAB-PORT"):
        agent.network_up(second.ref, lab.port)
    agent.lab_down(second.ref)
    assert network(lab).healthy
    assert lab.said(gateway, WAY_OUT)


def test_what_a_deleted_clone_left_running_is_cleared_away_by_the_next_lab(
    lab: Lab, new_lab: Callable[[str], Lab]
) -> None:
    deleted = new_lab("deleted")
    deleted.gateway()
    table, bridge = deleted.place.table, deleted.place.bridge

    def there() -> list[bool]:
        asked = (["nft", "list", "table", "ip", table], ["ip", "link", "show", bridge])
        return [subprocess.run(words, capture_output=True, check=False).returncode == 0 for words in asked]

    shutil.rmtree(deleted.place.state)
    assert there() == [True, True], "nothing was left to clear away"
    lab.up()
    assert there() == [False, False]
    assert network(lab).healthy


@pytest.mark.parametrize("seed", range(3))
def test_a_starter_killed_at_any_moment_leaves_what_the_next_one_mends(lab: Lab, seed: int) -> None:
    lab.up()
    name = f"t-killed-{seed}"
    call = (
        "import sys; from pathlib import Path; from gpuyard.lab import agent; "
        "agent.node_up(agent.LabRef(project=Path(sys.argv[1]), stack=sys.argv[2]), "
        "agent.NodeSpec(name=sys.argv[3], role='gateway'))"
    )
    starter = subprocess.Popen([sys.executable, "-c", call, str(lab.ref.project), lab.ref.stack, name])
    moment = random.Random(seed).uniform(0.3, 2.0)  # noqa: S311 - dice, not secrets
    time.sleep(moment)
    starter.kill()
    starter.wait()
    assert lab.said(lab.gateway(name), "hostname") == name
    agent.node_down(lab.ref, name)
    assert agent.node_read(lab.ref, name) is None


def test_a_removed_node_leaves_no_disk_address_or_key(lab: Lab) -> None:
    lab.up()
    made = lab.gateway("t-removed")
    assert made.address in (lab.place.ssh / "known_hosts").read_text()
    agent.node_down(lab.ref, "t-removed")
    assert not list(lab.place.nodes.glob("*t-removed*"))
    assert "t-removed" not in (lab.place.state / "addresses.json").read_text()
    assert made.address not in (lab.place.ssh / "known_hosts").read_text()
    agent.node_down(lab.ref, "t-removed")  # again, of what is not there


def test_a_user_who_may_become_root_gets_a_lab_whose_key_is_theirs(
    new_lab: Callable[[str], Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sudo is played by a script, for not every machine has one; all behind it is the real way through the door."""
    (tmp_path / "sudo").write_text('#!/bin/sh\nshift\nSUDO_UID=12345 SUDO_GID=12345 exec "$@"\n')
    (tmp_path / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    users = new_lab("users")
    made = users.gateway()
    assert made.running
    assert node(users, made.name) == made
    for name in ("", "id_ed25519", "known_hosts"):
        assert (users.place.ssh / name).stat().st_uid == 12345, name
    assert (users.place.ssh / "id_ed25519").stat().st_mode & 0o077 == 0
    agent.lab_down(users.ref)
    assert not users.place.state.exists()


class Traces:
    """All of this machine that a lab touches, but for the labs that other tests have."""

    def __init__(self) -> None:
        self.mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
        links: list[dict[str, Any]] = json.loads(subprocess.check_output(["ip", "-json", "link"]))
        self.links = {link["ifname"] for link in links}
        self.tables = set(subprocess.check_output(["nft", "list", "tables"], text=True).splitlines())
        self.groups = {str(path) for path in (host.cgroup2() or Path("/")).glob("gpuyard/*")}
        self.labs = set((read_json(REGISTRY / "labs.json") or {}).keys())

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return id(self)


def processes_of(lab: Lab) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace")
        except OSError:
            continue
        if str(lab.place.state) in words:
            yield words


def down_part_by_part(lab: Lab) -> None:
    for state in agent.nodes_read(lab.ref):
        agent.node_down(lab.ref, state.name)
    agent.network_down(lab.ref)


def lose_state_and_down(lab: Lab) -> None:
    shutil.rmtree(lab.place.state)
    agent.lab_down(lab.ref)


@pytest.mark.parametrize(
    "down",
    [lambda lab: agent.lab_down(lab.ref), down_part_by_part, lose_state_and_down],
    ids=["at once", "part by part", "after its folder was deleted"],
)
def test_a_lab_that_is_down_leaves_no_mount_process_bridge_or_rule(
    lab: Lab, new_lab: Callable[[str], Lab], down: Callable[[Lab], None]
) -> None:
    lab.up()
    before = Traces()
    third = new_lab("third")
    third.gateway()
    third.gpu()
    assert Traces() != before
    assert Traces().mounts == before.mounts, "a node's mounts are its own from the start"
    down(third)
    assert Traces() == before, (vars(Traces()), vars(before))
    assert list(processes_of(third)) == []
    agent.lab_down(third.ref)  # again, of what is not there
    assert not third.place.state.exists()
    assert not list(third.place.state.parent.glob(".third*"))
