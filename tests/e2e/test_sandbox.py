"""What a service of the fleet could do if it were taken over, and where a key can be found."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox import hunt, probes

from .conftest import MODEL, PROJECT, STACK, Fleet, playbook, run

pytestmark = pytest.mark.lab

ENGINE = f"vllm@{MODEL}.service"
KEYS = PROJECT / f".gpuyard/secrets/{STACK}"
# What an engine for GPUs has in place of PrivateDevices=: see roles/vllm_server/templates/instance.conf.j2.
CUDA = ["PrivateDevices=no", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw"]


def sent(node: str, script: str, *words: str) -> Any:
    """Run a program of ours on a node, handed over by standard input; what it prints is JSON."""
    done = run("gpuyard", "lab", "ssh", node, "--", *words, timeout=300, stdin=script)
    assert done.rc == 0, done.output
    return json.loads(done.output.splitlines()[-1])


def trial(node: str, *words: str) -> dict[str, Any]:
    there = "/run/gpuyard-probes.py"
    asked = shlex.join(["python3", there, "trial", *words])
    return sent(node, Path(probes.__file__).read_text(), f"cat >{there} && {asked}; code=$?; rm {there}; exit $code")


def beyond() -> list[str]:
    """Two addresses that an engine of lab-chat-0 has no business with, and that answer: a node's, the world's."""
    told = json.loads(run("pulumi", "stack", "output", "handover", "--json", "--stack", STACK).output)
    other = next(node["address"] for node in told["nodes"] if node["name"] == "lab-chat-1")
    outward = told["mirrors"]["nvidia"]["uri"].split("/")[2]
    return [f"--node={other}:22", f"--outward={outward}"]


def table(found: dict[str, Any]) -> str:
    bare = found["bare"]
    pairs = zip(found["sandboxed"]["probes"], bare["probes"], strict=True)
    head = f"exposure {found['sandboxed']['exposure']} in the sandbox, {bare['exposure']} without"
    rows = [f"{s['probe']:<44} {s['result']}: {s['detail']:<42} {b['result']}: {b['detail']}" for s, b in pairs]
    return "\n".join([f"\n{found['unit']} as {found['user']}: {head}", *rows])


@pytest.mark.parametrize(
    ("node", "unit", "directory", "ceiling", "settings"),
    [
        pytest.param("lab-chat-0", ENGINE, "/var/cache/vllm/gpuyard-probe", 1.5, [], id="engine"),
        pytest.param("lab-chat-0", ENGINE, "/var/cache/vllm/gpuyard-probe", 1.5, CUDA, id="engine-for-gpus"),
        pytest.param("lab-gateway-0", "haproxy.service", "/var/lib/gpuyard-probe", 1.2, [], id="gateway"),
    ],
)
def test_twenty_doors_are_shut_to_a_service_and_open_without_its_sandbox(
    fleet: Fleet,
    capsys: pytest.CaptureFixture[str],
    node: str,
    unit: str,
    directory: str,
    ceiling: float,
    settings: list[str],
) -> None:
    assert fleet.up.rc == 0, fleet.up.output
    more = [] if unit == "haproxy.service" else beyond()
    found = trial(node, unit, f"--directory={directory}", *more, *(f"--setting={each}" for each in settings))
    with capsys.disabled():  # also when all is well
        print(table(found))
    sandboxed, bare = found["sandboxed"], found["bare"]
    assert len(sandboxed["probes"]) == len(bare["probes"]) == 20
    assert sandboxed["uid"] == found["account"] != 0
    assert [probe for probe in sandboxed["probes"] if probe["result"] != "denied"] == []
    assert [probe for probe in bare["probes"] if probe["result"] != "open"] == []
    assert max(found["exposure"], sandboxed["exposure"]) <= ceiling
    assert settings or found["exposure"] == sandboxed["exposure"], "the probes ran in another sandbox"


def test_a_trial_leaves_nothing_behind(fleet: Fleet) -> None:
    for node in ("lab-chat-0", "lab-gateway-0"):
        left = "find / -xdev -name '*gpuyard-probe*'; find /run /dev /tmp -name '*gpuyard-probe*'; ip -br address"
        listed = run("gpuyard", "lab", "ssh", node, "--", f"{left}; systemctl list-units --all 'gpuyard-probe*'").output
        assert "gpuyard-probe" not in listed
        assert probes.METADATA not in listed


@pytest.mark.parametrize(
    ("node", "unit", "places"),
    [
        (
            "lab-chat-0",
            ENGINE,
            [f"/etc/vllm/credentials/{MODEL}.key", f"/run/credentials/{ENGINE}/api_key"],
        ),
        ("lab-gateway-0", "haproxy.service", ["/etc/haproxy/secrets.cfg"]),
    ],
)
def test_a_key_is_on_a_node_where_its_service_reads_it_and_nowhere_else(
    fleet: Fleet, node: str, unit: str, places: list[str]
) -> None:
    secrets = {path.name: path.read_text().strip() for path in KEYS.iterdir()}
    assert set(secrets) == {"api_key", "engine_key"}
    script = f"{Path(hunt.__file__).read_text()}\nhunt(json.loads({json.dumps(secrets)!r}))\n"
    found = sent(node, script, "python3", "-")
    assert found["api_key"] == [], "a node has no business with users' keys; digests are enough"
    assert found["engine_key"] == sorted([*places, f"environment of {unit}"])


def test_a_key_is_in_no_output_diff_state_or_bundle(fleet: Fleet) -> None:
    bundle = playbook("operate/collect_info")
    assert bundle.rc == 0, bundle.output
    archives = sorted((PROJECT / ".gpuyard/info").rglob("*.tar.gz"))
    assert {archive.parent.name for archive in archives} >= {"lab-chat-0", "lab-chat-1", "lab-gateway-0"}
    states = [path for path in (PROJECT / ".gpuyard/pulumi").rglob("*") if path.is_file()]
    assert states
    said = {
        "gpuyard lab up": fleet.up.output,
        "site.yml --check --diff on clean nodes": fleet.clean_check.output,
        "site.yml --diff -vvv": playbook("site", "--diff", "-vvv").output,
        "collect_info.yml": bundle.output,
        **{str(archive): run("tar", "-xzOf", str(archive)).output for archive in archives},
        **{str(path): path.read_text(errors="replace") for path in states},
    }
    assert all(said.values())
    for path in KEYS.iterdir():
        secret = path.read_text().strip()
        assert len(secret) >= 32
        assert [place for place, text in said.items() if secret in text] == [], f"{path.name} was told"
