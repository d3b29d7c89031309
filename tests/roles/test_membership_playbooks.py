"""The playbooks replace_node.yml and scale.yml over a fleet that is this machine: a gateway, what converges and what
proves are stand-ins; what decides, drains, notes and opens is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpuyard.lab.own_fleet import Run
from gpuyard.provision.protection import machine_urn

PROJECT = Path(__file__).parents[2]
NODES = ["f-chat-0", "f-chat-1", "f-chat-2"]
# The real one's command line, over a file that says how each server stands. It keeps the calls that change something.
GATEWAY = """\
import json, sys
from pathlib import Path
here = Path(__file__).parent
state = json.loads((here / "state.json").read_text())
words = dict(word[2:].partition("=")[::2] for word in sys.argv[2:] if word.startswith("--"))
if sys.argv[1] == "set":
    status = {"drain": "DRAIN", "ready": "UP"}[words["to"]]
    changed, state[words["server"]] = state[words["server"]] != status, status
    (here / "state.json").write_text(json.dumps(state))
    print(json.dumps({"changed": changed}))
else:
    sessions = json.loads((here / "sessions.json").read_text())
    print(json.dumps([
        {"place": "f-gateway-0/model_m", "backend": "model_m", "server": name, "status": status,
         "sessions": sessions if status == "UP" else 0, "closed": status == "DRAIN"}
        for name, status in state.items()]))
"""
# Writes down whom it was played for. The real playbooks narrow their hosts with the same words.
PLAYED = """\
- name: Play {name}
  hosts: "gpu_nodes:gateways:&{{{{ fleet_only | default('all') }}}}"
  gather_facts: false
  tasks:
    - name: Write down who it was
      ansible.builtin.shell: {{cmd: "echo {name} {{{{ inventory_hostname }}}} >> {log}"}}
"""
# A gateway that converges learns of every node of the handover.
LEARN = """\
    - name: Learn who is there
      ansible.builtin.copy: {{content: "{{{{ known | to_json }}}}", dest: "{state}"}}
      when: inventory_hostname in groups['gateways']
"""


class Fleet:
    """A fleet of three nodes and one gateway."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "played"
        self.state(dict.fromkeys(NODES, "UP"))
        self.sessions(1)
        (folder / "gateway_state.py").write_text(GATEWAY)
        self.machine("old")
        self.spec(3)
        self.lay()

    def state(self, servers: dict[str, str]) -> None:
        (self.folder / "state.json").write_text(json.dumps(servers))

    def stands(self) -> dict[str, str]:
        return json.loads((self.folder / "state.json").read_text())

    def sessions(self, number: int) -> None:
        """Requests on each node that is up; a node has ten seats."""
        (self.folder / "sessions.json").write_text(json.dumps(number))

    def machine(self, name: str) -> None:
        (self.folder / "machine-id").write_text(f"{name}\n")

    def spec(self, nodes: int) -> None:
        text = (PROJECT / "fleets/drill.yaml").read_text().replace("name: drill", "name: f")
        (self.folder / "fleets").mkdir(exist_ok=True)
        (self.folder / "fleets/f.yaml").write_text(text.replace("    nodes: 3\n", f"    nodes: {nodes}\n"))

    def lay(self) -> None:
        """Playbooks and a collection in which what needs a node has a stand-in."""
        plays = self.folder / "playbooks"
        (plays / "operate").mkdir(parents=True)
        for name in ("site", "verify"):
            text = PLAYED.format(name=name, log=self.log)
            text += LEARN.format(state=self.folder / "state.json") if name == "site" else ""
            (plays / f"{name}.yml").write_text(text)
        for name in ("parts/bring_in", "tasks/refuse_during_rollout", "replace_node", "scale"):
            text = (PROJECT / f"playbooks/operate/{name}.yml").read_text()
            for there, here in (
                ("/etc/machine-id", "machine-id"),
                ("/var/lib/gpuyard/replaced", "replaced"),
                ("/usr/local/lib/gpuyard", ""),
            ):
                text = text.replace(there, str(self.folder / here).rstrip("/"))
            file = plays / f"operate/{name}.yml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        made = self.folder / "collections/ansible_collections/gpuyard/fleet"
        (made / "roles/vllm_server/tasks").mkdir(parents=True)
        (made / "roles/vllm_server/tasks/verify.yml").write_text("[]\n")
        for part in ("galaxy.yml", "meta", "plugins", "roles/node_gate"):
            (made / part).symlink_to(PROJECT / part)

    def play(self, name: str, *words: str, there: list[str] | None = None, provider: str = "lab") -> Run:
        """Play one of the playbooks; `there`: the GPU nodes of the handover."""
        chat = {"hosts": {node: {} for node in there or NODES}}
        variables = {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
            "node_base_fleet": "f",
            "handover_provider": provider,
            "handover_stack": "f",
            "node_gate_gateways": ["f-gateway-0"],
            "node_gate_backends": ["model_m"],
            "node_gate_seats": {"model_m": 10},
            "node_gate_helpers": str(self.folder),
            "node_gate_notice": str(self.folder / "notice.json"),
            "known": dict.fromkeys(there or NODES, "UP") | {k: v for k, v in self.stands().items() if v != "UP"},
        }
        variables["known"] = {name: status for name, status in variables["known"].items() if name in chat["hosts"]}
        groups = {"gpu_nodes": chat, "pool_chat": chat, "gateways": {"hosts": {"f-gateway-0": {}}}}
        inventory = self.folder / "hosts.json"
        inventory.write_text(json.dumps({"all": {"vars": variables, "children": groups}}))
        self.log.write_text("")
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, *words, f"operate/{name}.yml"],
            cwd=self.folder / "playbooks",
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
                "GPUYARD_PROJECT": str(self.folder),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Run(done.returncode, " ".join((done.stdout + done.stderr).split()), 0)

    def played(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


Line = Callable[..., Run]
REPLACE = ("replace_node", "-e", "node=f-chat-1")
BROUGHT_IN = ["site f-chat-1", "verify f-chat-1", "site f-gateway-0"]


def test_an_exchange_is_one_line_that_is_run_again(fleet: Fleet) -> None:
    check = fleet.play(*REPLACE, "--check")
    assert check.rc == 0, check.output
    assert "f-chat-1 would be out of the gateways" in check.output
    assert fleet.stands()["f-chat-1"] == "UP"
    assert not (fleet.folder / "replaced").exists()

    drained = fleet.play(*REPLACE)
    assert drained.rc == 0, drained.output
    assert "pulumi destroy --stack f --target '**::f-chat-1'" in drained.output
    assert "unprotect" not in drained.output, "the lab protects nothing"
    assert fleet.stands() == {"f-chat-0": "UP", "f-chat-1": "DRAIN", "f-chat-2": "UP"}
    assert fleet.played() == []

    # The old machine still: nothing is brought in, and what somebody opened is drained again.
    fleet.state(dict.fromkeys(NODES, "UP"))
    assert fleet.play(*REPLACE).rc == 0
    assert fleet.stands()["f-chat-1"] == "DRAIN"
    assert fleet.played() == []

    fleet.machine("new")
    brought = fleet.play(*REPLACE)
    assert brought.rc == 0, brought.output
    assert fleet.played() == BROUGHT_IN, "the node alone, and the gateways after its proof"
    assert set(fleet.stands().values()) == {"UP"}

    again = fleet.play(*REPLACE)
    assert again.rc == 0, again.output
    assert "was exchanged; -e replace_node_again=true begins another" in again.output
    assert "changed=0" in again.output
    assert "changed=1" not in again.output
    assert fleet.stands()["f-chat-1"] == "UP"
    assert fleet.play(*REPLACE, "-e", "replace_node_again=true").rc == 0
    assert fleet.stands()["f-chat-1"] == "DRAIN"


def test_a_break_in_the_middle_of_bringing_in_is_gone_on_with(fleet: Fleet) -> None:
    assert fleet.play(*REPLACE).rc == 0
    fleet.machine("new")
    verify = fleet.folder / "playbooks/verify.yml"
    proves = verify.read_text()
    verify.write_text(proves.replace("ansible.builtin.shell: {cmd:", "ansible.builtin.fail: {msg:"))
    broken = fleet.play(*REPLACE)
    assert broken.rc != 0
    assert fleet.played() == BROUGHT_IN[:1]
    assert fleet.stands()["f-chat-1"] == "DRAIN", "nothing is opened that has not proven its work"
    verify.write_text(proves)
    assert fleet.play(*REPLACE).rc == 0
    assert fleet.played() == BROUGHT_IN
    assert set(fleet.stands().values()) == {"UP"}


def test_a_machine_that_is_about_to_be_taken_away_is_brought_in_and_left_closed(fleet: Fleet) -> None:
    assert fleet.play(*REPLACE).rc == 0
    fleet.machine("new")
    (fleet.folder / "notice.json").write_text('{"rule": "NOTICE-SPOT"}\n')
    told = fleet.play(*REPLACE)
    assert told.rc == 0, told.output
    assert "GATE-NOTICE: f-chat-1 has closed itself and stays closed" in told.output
    assert "NOTICE-SPOT" in told.output
    assert fleet.stands()["f-chat-1"] == "DRAIN"


def test_a_machine_whose_note_nobody_can_read_stays_closed(fleet: Fleet) -> None:
    assert fleet.play(*REPLACE).rc == 0
    fleet.machine("new")
    (fleet.folder / "notice.json").mkdir()
    told = fleet.play(*REPLACE)
    assert told.rc != 0
    assert "notice.json" in told.output
    assert fleet.stands()["f-chat-1"] == "DRAIN"


def test_an_exchange_is_refused_before_anything_is_done(fleet: Fleet) -> None:
    fleet.sessions(7)  # 21 requests, and the two others have 20 seats
    loaded = fleet.play(*REPLACE)
    assert loaded.rc != 0
    assert "UPGRADE-CAPACITY: 21 requests for m run or wait now" in loaded.output, loaded.output
    nobody = fleet.play("replace_node", "-e", "node=f-chat-7")
    assert nobody.rc != 0
    assert "LIFE-NODE: f-chat-7 is no GPU node of this fleet" in nobody.output
    unnamed = fleet.play("replace_node")
    assert "LIFE-NODE: no node is no GPU node" in unnamed.output
    part = fleet.play(*REPLACE, "--limit", "f-chat-1,localhost")
    assert "LIFE-LIMIT" in part.output
    assert set(fleet.stands().values()) == {"UP"}
    assert not (fleet.folder / "replaced").exists()
    consented = fleet.play(*REPLACE, "-e", "upgrade_accept_downtime=true", provider="hosts")
    assert consented.rc == 0, consented.output
    assert "its address into fleets/f.hosts.yaml" in consented.output


def test_a_fleet_comes_to_the_number_of_its_spec_in_both_directions(fleet: Fleet) -> None:
    as_it_is = fleet.play("scale")
    assert as_it_is.rc == 0, as_it_is.output
    assert "the fleet is as its spec says" in as_it_is.output
    assert fleet.played() == []

    fleet.spec(1)
    check = fleet.play("scale", "--check")
    assert check.rc == 0, check.output
    assert "goes: f-chat-2" in check.output
    assert "goes: f-chat-1" in check.output
    assert set(fleet.stands().values()) == {"UP"}
    fleet.sessions(4)  # 12 requests: one after the other each node could go, both could not
    refused = fleet.play("scale")
    assert refused.rc != 0
    assert "UPGRADE-CAPACITY: 12 requests" in refused.output, refused.output
    assert set(fleet.stands().values()) == {"UP"}
    fleet.sessions(1)
    fleet.spec(2)
    gone = fleet.play("scale")
    assert gone.rc == 0, gone.output
    assert "gpuyard guard preview.json --drained f-chat-2" in gone.output
    assert fleet.stands() == {"f-chat-0": "UP", "f-chat-1": "UP", "f-chat-2": "DRAIN"}
    assert fleet.played() == []

    # `pulumi up` has taken it away; the gateways alone learn of it.
    told = fleet.play("scale", there=NODES[:2])
    assert told.rc == 0, told.output
    assert fleet.played() == ["site f-gateway-0"]
    assert fleet.stands() == dict.fromkeys(NODES[:2], "UP")

    fleet.spec(3)
    missing = fleet.play("scale", there=NODES[:2])
    assert "to be made: 1 of pool chat" in missing.output
    assert "pulumi up --stack f" in missing.output
    assert fleet.played() == []
    come = fleet.play("scale")
    assert come.rc == 0, come.output
    assert fleet.played() == ["site f-chat-2", "verify f-chat-2", "site f-gateway-0"]
    assert fleet.stands() == dict.fromkeys(NODES, "UP")


def test_on_aws_the_line_comes_first_without_which_pulumi_keeps_a_machine(fleet: Fleet) -> None:
    line = f"pulumi state unprotect --stack f '{machine_urn('f', 'f-chat-1')}'"
    replaced = fleet.play(*REPLACE, provider="aws")
    assert replaced.rc == 0, replaced.output
    assert 0 < replaced.output.find(line) < replaced.output.find("pulumi destroy --stack f"), replaced.output
    fleet.spec(1)
    scaled = fleet.play("scale", "--check", provider="aws")
    urns = " ".join(f"'{machine_urn('f', name)}'" for name in ("f-chat-2", "f-chat-1"))
    line = f"pulumi state unprotect --stack f {urns}"
    assert 0 < scaled.output.find(line) < scaled.output.find("gpuyard guard preview.json"), scaled.output


def test_the_stand_ins_narrow_their_hosts_as_the_playbooks_do() -> None:
    for name in ("site", "verify"):
        for play in yaml.safe_load((PROJECT / f"playbooks/{name}.yml").read_text()):
            assert play["hosts"] == "localhost" or play["hosts"].endswith(":&{{ fleet_only | default('all') }}"), play
