"""Two bare machines, written down by hand and converged by the same playbook: no stack, and no Pulumi on the way."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuyard.lab import agent
from gpuyard.lab.models import LabRef, NodeSpec
from gpuyard.lab.own_fleet import OwnFleet, own_fleet
from gpuyard.plan.lock import LockedRepository, load_lock
from gpuyard.spec.closed import digest_of
from tools.project import PROJECT

pytestmark = pytest.mark.lab

GATEWAY, CHAT = "onprem-gateway-0", "onprem-chat-0"
OWNED = {
    "provider: lab\n": "provider: hosts\n",
    "    nodes: 2\n": "    nodes: 1\n",
    # One that the lab's repository has, too.
    '  branch: "580" # its newest version in the catalog is locked; or name one: `version: 580.126.20`\n': (
        "  version: 580.126.20\n"
    ),
}
"""What makes the lab's fleet one of hosts."""


@pytest.fixture(scope="module")
def own() -> Iterator[OwnFleet]:
    """A project whose fleet is of hosts: bare nodes of the lab, whose addresses are written into its file of hosts."""
    with own_fleet("onprem", PROJECT) as own:
        inventory = own.project / "inventories/onprem/fleet.pulumi.yml"
        inventory.write_text((PROJECT / "inventories/onprem/fleet.pulumi.yml").read_text())
        own.write(PROJECT / "fleets/lab.yaml", OWNED)
        own.done("gpuyard", "lock", "fleets/onprem.yaml")
        lab = LabRef(project=own.project, stack=own.stack)
        network = agent.network_up(lab, own.port)
        gpu = NodeSpec(name=CHAT, role="gpu", pool="chat", gpu="H100-SXM5-80GB", gpu_count=8)
        nodes = [agent.node_up(lab, spec) for spec in (NodeSpec(name=GATEWAY, role="gateway"), gpu)]
        hosts = {
            "version": 1,
            "fleet": "onprem",
            "ssh": network.ssh.model_dump(mode="json"),
            "mirrors": network.mirrors.model_dump(mode="json"),
            "nodes": [
                {"name": node.name, "pool": pool, "address": node.address, "simulated": True}
                for node, pool in zip(nodes, ("gateway", "chat"), strict=True)
            ],
        }
        # JSON is YAML.
        (own.project / "fleets/onprem.hosts.yaml").write_text(json.dumps(hosts, indent=2))
        signed_by(network.mirrors.nvidia.fingerprint, own.project / "fleets/onprem.lock.yaml")
        yield own


def signed_by(fingerprint: str, path: Path) -> None:
    """The lab's packages are signed with a key of its own, and a lock for hosts asks for NVIDIA's."""
    lock = load_lock(path)
    other = lock.model_copy(update={"repositories": {"nvidia": LockedRepository(key_fingerprint=fingerprint)}})
    plain = {key: value for key, value in other.plain().items() if key != "digest"}
    path.write_text(other.to_yaml().replace(lock.digest, digest_of(plain)))


def test_the_hosts_answer_before_anything_is_done_to_them(own: OwnFleet) -> None:
    told = json.loads(own.done("gpuyard", "hosts", "fleets/onprem.yaml", "--json").output)
    assert told["findings"] == []
    assert {node["said"]["distribution"] for node in told["nodes"]} == {"debian-12"}


def test_a_host_whose_key_nobody_knows_and_one_that_is_not_there_are_found(own: OwnFleet) -> None:
    path = own.project / "fleets/onprem.hosts.yaml"
    good = path.read_text()
    hosts = json.loads(good)
    hosts["nodes"][1]["address"] = hosts["nodes"][0]["address"].rsplit(".", 1)[0] + ".250"
    empty = own.project / "known_hosts"
    empty.touch()
    hosts["ssh"]["known_hosts_file"] = str(empty)
    path.write_text(json.dumps(hosts, indent=2))
    try:
        refused = own.run("gpuyard", "hosts", "fleets/onprem.yaml", "--json")
    finally:
        path.write_text(good)
    assert refused.rc == 1
    found = {finding["node"]: finding["rule"] for finding in json.loads(refused.output)["findings"]}
    assert found == {GATEWAY: "HOSTS-KEY", CHAT: "HOSTS-UNREACHABLE"}


def test_bare_hosts_are_converged_by_the_same_playbook_without_pulumi(own: OwnFleet) -> None:
    without = ("env", f"PATH={PROJECT}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    assert own.run(*without, "sh", "-c", "command -v pulumi").rc != 0
    site = (*without, "ansible-playbook", "-i", "inventories/onprem", "playbooks/site.yml")
    first = own.done(*site, timeout=1200)
    assert set(first.changed()) == {GATEWAY, CHAT}
    again = own.done(*site, timeout=1200)
    assert again.changed() == {GATEWAY: 0, CHAT: 0}, again.output
    verified = own.done(*without, "ansible-playbook", "-i", "inventories/onprem", "playbooks/verify.yml")
    assert set(verified.changed()) >= {GATEWAY, CHAT}
    asked = own.on(GATEWAY, f"curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{own.port}/v1/models")
    assert asked.strip() == "401", "the gateway serves, and asks for a key"
    assert list((own.project / ".gpuyard/pulumi").rglob("*.json")) == [], "no stack was made"
