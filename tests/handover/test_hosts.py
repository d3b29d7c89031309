"""Hosts written down by hand: what the file may say, the handover that it makes, and what hosts say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.handover import Handover
from gpuyard.handover.hosts import hosts_path, load_hosts
from gpuyard.handover.reach import Answer, judge
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import Finding, SpecError, load_fleet

PROJECT = Path(__file__).parents[2]
SPEC = PROJECT / "fleets/onprem.yaml"
GOOD = hosts_path(SPEC).read_text()

Told = Callable[[str], tuple[Finding, ...]]


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return load_fleet(SPEC)


@pytest.fixture
def findings(tmp_path: Path, fleet: Fleet) -> Told:
    def told(text: str) -> tuple[Finding, ...]:
        path = tmp_path / "onprem.hosts.yaml"
        path.write_text(text)
        try:
            load_hosts(path, fleet)
        except SpecError as refused:
            return refused.findings
        return ()

    return told


def swapped(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_the_committed_hosts_fit_their_fleet_and_get_the_gpus_that_the_spec_says(fleet: Fleet) -> None:
    handover = load_hosts(hosts_path(SPEC), fleet)
    assert [(node.name, node.role, node.gpu, node.gpu_count) for node in handover.nodes] == [
        ("onprem-gateway-0", "gateway", None, 0),
        ("onprem-chat-0", "gpu", "L40S", 4),
        ("onprem-chat-1", "gpu", "L40S", 4),
    ]
    assert handover.endpoint == "http://192.0.2.10:8080"
    assert handover.ssh.private_key_file == str(Path.home() / ".ssh/id_ed25519")


CHAT_1 = "{name: onprem-chat-1, pool: chat, address: 192.0.2.21}"
CASES = {
    "another fleet": ("fleet: onprem", "fleet: offprem", "HOSTS-FLEET", "fleet", "onprem, as the spec"),
    "a name twice": (
        "name: onprem-chat-1",
        "name: onprem-chat-0",
        "HOSTS-DUPLICATE",
        "nodes[2].name",
        "nodes[1] has it",
    ),
    "an address twice": ("192.0.2.21", "192.0.2.20", "HOSTS-DUPLICATE", "nodes[2].address", "nodes[1] has it"),
    "an address twice, written otherwise": (
        "192.0.2.21",
        '"::ffff:192.0.2.20"',
        "HOSTS-DUPLICATE",
        "nodes[2].address",
        "nodes[1] has it",
    ),
    "an unknown pool": (
        CHAT_1,
        CHAT_1.replace("pool: chat", "pool: chatt"),
        "HOSTS-POOL",
        "nodes[2].pool",
        "did you mean 'chat'?",
    ),
    "a host too few": (f"  - {CHAT_1}\n", "", "HOSTS-COUNT", "nodes", "name 1 more, or set nodes of pool chat to 1"),
    "a host too many": (
        CHAT_1,
        CHAT_1 + "\n  - {name: more, pool: chat, address: 192.0.2.22}",
        "HOSTS-COUNT",
        "nodes",
        "take 1 out, or set nodes of pool chat to 3",
    ),
    "a name for an address": ("192.0.2.21", "chat-1.example.com", "HOSTS-ADDRESS", "nodes[2].address", "an IP address"),
    "a loopback address": ("192.0.2.21", "127.0.0.1", "HOSTS-ADDRESS", "nodes[2].address", "the other nodes reach"),
    "a link-local address": ("192.0.2.21", "169.254.3.4", "HOSTS-ADDRESS", "nodes[2].address", "the other nodes reach"),
    "no port": ("192.0.2.21}", "192.0.2.21, port: 70000}", "SPEC-VALUE", "nodes[2].port", "from 1 to 65535"),
    "an unknown key": (
        "192.0.2.21}",
        "192.0.2.21, prt: 22}",
        "SPEC-UNKNOWN-KEY",
        "nodes[2].prt",
        "name, pool, address",
    ),
    "a server for a bind": (
        "fleet: onprem",
        "fleet: onprem\nshared_storage: [{kind: bind, source: 'files:/models', path: /mnt/models}]",
        "HOSTS-STORAGE",
        "shared_storage[0].source",
        "a folder of the hosts",
    ),
    "a folder for a server": (
        "fleet: onprem",
        "fleet: onprem\nshared_storage: [{kind: nfs, source: /models, path: /mnt/models}]",
        "HOSTS-STORAGE",
        "shared_storage[0].source",
        "server:/path",
    ),
    "a mount in a mount": (
        "fleet: onprem",
        "fleet: onprem\nshared_storage:\n- {kind: nfs, source: 'f:/a', path: /mnt/a}\n"
        "- {kind: nfs, source: 'f:/b', path: /mnt/a/b}",
        "HOSTS-STORAGE",
        "shared_storage[1].path",
        "beside /mnt/a of shared_storage[0]",
    ),
    "a mount at no path": (
        "fleet: onprem",
        "fleet: onprem\nshared_storage: [{kind: nfs, source: 'f:/a', path: mnt/../etc}]",
        "SPEC-VALUE",
        "shared_storage[0].path",
        "matches",
    ),
    "a key that the shell would read": ("~/.ssh/id_ed25519", "$KEY", "SPEC-VALUE", "ssh.private_key_file", "matches"),
}


@pytest.mark.parametrize(("old", "new", "rule", "field", "allowed"), CASES.values(), ids=CASES)
def test_bad_input_is_named_with_its_place_and_its_way_out(
    findings: Told, old: str, new: str, rule: str, field: str, allowed: str
) -> None:
    told = {finding.rule: finding for finding in findings(swapped(old, new))}
    assert told[rule].field == field
    assert allowed in told[rule].allowed
    assert told[rule].line > 1


def test_the_first_node_of_a_pool_runs_the_subnet_manager_where_the_spec_asks_for_one(tmp_path: Path) -> None:
    spec = tmp_path / "onprem.yaml"
    infiniband = "    gpus_per_node: 4\n    infiniband: {ports: 8, gbps: 400, subnet_manager: true}\n"
    spec.write_text(SPEC.read_text().replace("    gpus_per_node: 4\n", infiniband))
    path = tmp_path / "onprem.hosts.yaml"
    path.write_text(GOOD)
    owned = load_fleet(spec)
    nodes = load_hosts(path, owned).nodes
    assert [node.fabric and (node.fabric.kind, node.fabric.ports, node.fabric.subnet_manager) for node in nodes] == [
        None,
        ("infiniband", 8, True),
        ("infiniband", 8, False),
    ]
    assert owned.digest == load_fleet(SPEC).digest, "the handover tells nodes of it, the lock need not be renewed"


def test_storage_that_hosts_share_is_handed_over(tmp_path: Path, fleet: Fleet) -> None:
    path = tmp_path / "onprem.hosts.yaml"
    storage = "{kind: nfs, source: 'files.example.com:/models', path: /mnt/models, read_only: true}"
    path.write_text(f"{GOOD}shared_storage: [{storage}]\n")
    (told,) = load_hosts(path, fleet).shared_storage
    assert (told.kind, told.path, told.read_only, told.required) == ("nfs", "/mnt/models", True, False)


def test_all_mistakes_are_told_at_once(findings: Told) -> None:
    text = swapped("fleet: onprem", "fleet: x").replace("192.0.2.21", "192.0.2.20").replace("192.0.2.10", "::1")
    assert [finding.rule for finding in findings(text)] == ["HOSTS-FLEET", "HOSTS-ADDRESS", "HOSTS-DUPLICATE"]


def test_a_fleet_with_a_stack_takes_no_file_of_hosts(fleet: Fleet) -> None:
    with pytest.raises(RefusedError, match="HOSTS-PROVIDER"):
        load_hosts(hosts_path(SPEC), fleet.model_copy(update={"provider": "lab"}))


# --- what hosts say ------------------------------------------------------------------------------------------------


def said(machine: str, **changes: str) -> Answer:
    facts = {"distribution": "debian-12", "machine": machine, "architecture": "x86_64", "python": "3.11"}
    facts |= {"root": "yes", "gpus": "4", **changes}
    return Answer(0, "".join(f"{key}={value}\n" for key, value in facts.items()), "")


@pytest.fixture
def rules(fleet: Fleet) -> Callable[[Answer], dict[str, str]]:
    handover: Handover = load_hosts(hosts_path(SPEC), fleet)

    def judged(answer: Answer) -> dict[str, str]:
        """What is found of the last host if it answers so and the others as they should."""
        answers = {node.name: said(node.name) for node in handover.nodes} | {"onprem-chat-1": answer}
        found = judge(handover, fleet, answers)
        assert {finding.node for finding in found} <= {"onprem-chat-1"}
        return {finding.rule: finding.change for finding in found}

    return judged


def test_hosts_that_are_as_the_spec_says_are_not_found_fault_with(rules: Callable[[Answer], dict[str, str]]) -> None:
    assert rules(said("its own")) == {}


ANSWERS = {
    "nobody there": (
        Answer(255, "", "ssh: connect to host 192.0.2.21 port 22: No route to host\n"),
        "HOSTS-UNREACHABLE",
    ),
    "no answer": (Answer(124, "", "no answer within 30 s"), "HOSTS-UNREACHABLE"),
    "an unknown key": (Answer(255, "", "No ED25519 host key is known\nHost key verification failed.\n"), "HOSTS-KEY"),
    "another key": (
        Answer(255, "", "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\n"),
        "HOSTS-KEY-CHANGED",
    ),
    "not let in": (Answer(255, "", "root@192.0.2.21: Permission denied (publickey).\n"), "HOSTS-LOGIN"),
    "a shell that is none": (Answer(1, "", "This account is currently not available.\n"), "HOSTS-SHELL"),
    "one machine at two addresses": (said("onprem-chat-0"), "HOSTS-SAME-MACHINE"),
    "another distribution": (said("m", distribution="rocky-9.4"), "HOSTS-DISTRIBUTION"),
    "another architecture": (said("m", architecture="aarch64"), "HOSTS-ARCHITECTURE"),
    "an old Python": (said("m", python="3.8"), "HOSTS-PYTHON"),
    "no Python": (said("m", python=""), "HOSTS-PYTHON"),
    "no way to become root": (said("m", root="no"), "HOSTS-ROOT"),
    "a GPU off the bus": (said("m", gpus="3"), "HOSTS-GPUS"),
}


@pytest.mark.parametrize(("answer", "rule"), ANSWERS.values(), ids=ANSWERS)
def test_what_keeps_a_host_from_being_converged_is_told_with_its_way_out(
    rules: Callable[[Answer], dict[str, str]], answer: Answer, rule: str
) -> None:
    found = rules(answer)
    assert list(found) == [rule]
    assert len(found[rule]) > 10
