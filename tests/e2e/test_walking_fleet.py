"""The whole way, on real systemd machines: up, again, broken, healed."""

import http.client
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.catalog import load_catalog
from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.lab.place import read_json
from gpuyard.plan.sizing.room import CatalogRooms
from gpuyard.spec.loader import load_fleet
from tools.bench_kill import killed_when

from .conftest import MODEL, PROJECT, STACK, Fleet, on, playbook, run

pytestmark = pytest.mark.lab

NODES = ["lab-chat-0", "lab-chat-1", "lab-gateway-0"]
UNIT = f"vllm@{MODEL}.service"


def ask(question: str = "What is the capital of France?") -> str:
    """The model's answer, asked through the gateway as a user would."""
    key = (PROJECT / f".gpuyard/secrets/{STACK}/api_key").read_text().strip()
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=120)
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200, text
    return json.loads(text)["choices"][0]["message"]["content"]


def within(seconds: float, what: str, condition: Callable[[], bool]) -> float:
    """Wait for a condition; the seconds it took. Past the deadline the test fails and says for what it waited."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(2)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


def servers_up() -> dict[str, str]:
    """The gateway's own word on each engine: UP, DOWN, DRAIN …"""
    rows = on("lab-gateway-0", "echo 'show stat' | socat - /run/haproxy/admin.sock").lstrip("# ").splitlines()
    names = rows[0].split(",")
    stats = [dict(zip(names, row.split(","), strict=False)) for row in rows[1:] if row]
    return {s["svname"]: s["status"] for s in stats if s["svname"].startswith("lab-chat")}


def all_up() -> bool:
    return set(servers_up().values()) == {"UP"}


def test_the_fleet_comes_up_after_both_interruptions_and_answers(fleet: Fleet) -> None:
    assert fleet.up.rc == 0, fleet.up.output
    assert fleet.interrupted["pulumi up"], "pulumi up ended before it could be killed"
    assert fleet.interrupted["site.yml"], "site.yml ended before it could be killed"
    assert "Paris" in fleet.up.output
    assert "Paris" in ask()


def test_check_and_diff_pass_on_clean_nodes(fleet: Fleet) -> None:
    assert fleet.clean_check.rc == 0, fleet.clean_check.output
    assert all(changed > 0 for changed in fleet.clean_check.changed().values()), "a clean node with nothing to do?"


def test_a_second_up_changes_nothing(fleet: Fleet) -> None:
    again = run("gpuyard", "lab", "up", timeout=1200)
    assert again.rc == 0, again.output
    changed = again.changed()
    assert sorted(changed) == NODES
    assert set(changed.values()) == {0}, again.output
    assert "unchanged" in again.output
    for word in ("created", "updated", "deleted", "replaced"):
        assert f" {word}" not in again.output.split("PLAY [", 1)[0], f"pulumi {word} something: {again.output}"


def test_check_and_diff_pass_on_converged_nodes(fleet: Fleet) -> None:
    check = playbook("site", "--check", "--diff")
    assert check.rc == 0, check.output
    assert set(check.changed().values()) == {0}, check.output


def test_verify_is_green_and_its_verdict_is_written_per_node(fleet: Fleet) -> None:
    verify = playbook("verify")
    assert verify.rc == 0, verify.output
    for node in NODES:
        verdict = json.loads((PROJECT / f".gpuyard/verify/{node}.json").read_text())
        assert verdict["state"] == "Healthy", verdict


def test_loaded_installed_and_locked_driver_are_one(fleet: Fleet) -> None:
    locked = "580.126.20"
    for node in NODES[:2]:
        assert locked in on(node, "cat /proc/driver/nvidia/version")
        assert on(node, "nvidia-smi --query-gpu=driver_version --format=csv,noheader").split() == [locked] * 8
        assert on(node, "dpkg-query -W -f '${Version}' libnvidia-ml1") == f"{locked}-1"
        assert "nvidia-driver-cuda" in on(node, "apt-mark showhold")


def test_an_engine_prints_the_cache_that_was_planned(fleet: Fleet) -> None:
    spec = load_fleet(PROJECT / "fleets/lab.yaml")
    rooms = CatalogRooms(load_catalog(), load_memory(), load_shapes())
    room = rooms.room_on_cpu(spec.models[0], spec.engines[0])
    assert room and room.memory
    for node in NODES[:2]:
        # Each start says it; one that was killed before it came so far does not.
        said = re.findall(r"KV cache size: ([\d,]+) tokens", on(node, f"journalctl -u {UNIT} --output=cat"))
        assert said, f"{node}: no start told its cache"
        assert {int(tokens.replace(",", "")) for tokens in said} == {room.memory.kv_cache_tokens}


def test_an_engine_talks_to_the_gateway_only(fleet: Fleet) -> None:
    address = on("lab-chat-0", "hostname -I").split()[0]
    port = "curl -s -m 5 -o /dev/null -w '%{http_code}' http://" + address + ":8000/health || true"
    assert on("lab-gateway-0", port) == "200"
    assert on("lab-chat-1", port) == "000"


def test_a_drained_node_gets_no_request_and_the_last_one_is_not_drained(fleet: Fleet) -> None:
    drained = playbook("operate/drain_node", "--limit", "lab-chat-0")
    assert drained.rc == 0, drained.output
    try:
        assert servers_up()["lab-chat-0"].startswith("DRAIN")
        on("lab-gateway-0", "systemctl reload haproxy")
        assert servers_up()["lab-chat-0"].startswith("DRAIN"), "the reload opened a drained node"
        assert "Paris" in ask()
        refused = playbook("operate/drain_node", "--limit", "lab-chat-1")
        assert refused.rc != 0
        assert "GATE-LAST" in refused.output
        assert "Paris" in ask()
    finally:
        back = playbook("operate/undrain_node", "--limit", "lab-chat-0")
    assert back.rc == 0, back.output
    within(60, "the node to be back in rotation", all_up)


def test_a_playbook_that_takes_nodes_out_wants_to_be_told_which(fleet: Fleet) -> None:
    for name in ("operate/drain_node", "operate/remove_node"):
        refused = playbook(name)
        assert refused.rc != 0
        assert "--limit" in refused.output


def test_verify_is_red_for_a_stopped_engine_and_says_which_node(fleet: Fleet) -> None:
    on("lab-chat-1", f"systemctl stop {UNIT}")
    try:
        verify = playbook("verify")
        assert verify.rc != 0
        assert json.loads((PROJECT / ".gpuyard/verify/lab-chat-1.json").read_text())["state"] == "Unhealthy"
        assert json.loads((PROJECT / ".gpuyard/verify/lab-chat-0.json").read_text())["state"] == "Healthy"
        assert "lab-chat-1" in verify.output.rsplit("PLAY RECAP", 1)[0]
    finally:
        on("lab-chat-1", f"systemctl start {UNIT}", timeout=400)


def test_a_killed_engine_and_a_killed_gateway_come_back_by_systemd_alone(fleet: Fleet) -> None:
    within(300, "all engines to be in rotation", all_up)
    on("lab-chat-0", f"kill -9 $(systemctl show {UNIT} -p MainPID --value)")
    on("lab-gateway-0", "kill -9 $(systemctl show haproxy -p MainPID --value)")
    gateway = within(60, "HAProxy to be back", lambda: "haproxy" in on("lab-gateway-0", "pgrep -a haproxy || true"))
    engine = within(400, "the engine to be back in rotation", all_up)
    print(f"gateway back after {gateway:.0f} s, engine in rotation after {engine:.0f} s")
    assert "Paris" in ask()


def test_a_node_killed_by_hand_is_seen_and_healed_by_the_next_up(fleet: Fleet) -> None:
    record = PROJECT / f".gpuyard/labs/{STACK}/nodes/lab-chat-1/process.json"
    pid = json.loads(record.read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    within(20, "the node to be gone", lambda: not Path(f"/proc/{pid}").exists())

    preview = run("pulumi", "preview", "--stack", STACK, "--diff")
    assert "lab-chat-1" in preview.output, "the preview does not see the dead node"
    refresh = run("pulumi", "refresh", "--stack", STACK, "--yes", "--skip-preview", "--diff")
    assert refresh.rc == 0, refresh.output
    assert "running" in refresh.output, refresh.output

    def booting() -> bool:
        return (read_json(record) or {}).get("pid", pid) != pid

    assert killed_when(booting, "pulumi", "up", "--stack", STACK, "--yes", "--skip-preview"), "it ended too early"
    healed = run("gpuyard", "lab", "up", timeout=1500)
    assert healed.rc == 0, healed.output
    within(60, "both engines in rotation", all_up)
    assert "Paris" in ask()


def test_down_leaves_nothing_behind(fleet: Fleet) -> None:
    if os.environ.get("GPUYARD_KEEP_LAB"):
        pytest.skip("GPUYARD_KEEP_LAB keeps the lab for a look")
    state = str(PROJECT / f".gpuyard/labs/{STACK}")
    identity = json.loads(Path(state, "lab.json").read_text())["id"]
    assert identity in run("nft", "list", "tables").output, "the lab is not up: its going would prove nothing"
    assert run("gpuyard", "lab", "down").rc == 0
    assert identity not in run("nft", "list", "tables").output
    assert identity not in run("ip", "-br", "link").output
    assert state not in Path("/proc/mounts").read_text()
    assert state not in run("ps", "-eo", "args").output
    assert not Path(state).exists()
