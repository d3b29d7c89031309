"""The inventory plugin through the real `ansible-inventory`: what it answers, and how it refuses."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from typing import Any

import pytest

from gpuyard.plan.lock import load_lock
from gpuyard.spec.closed import digest_of
from tests.inventory.conftest import REPOSITORY, Project


def test_the_graph_has_every_node_in_its_groups(project: Project):
    told = project.answers("--list")
    assert told["gateways"]["hosts"] == ["lab-gateway-0"]
    assert told["gpu_nodes"]["hosts"] == told["pool_chat"]["hosts"] == ["lab-chat-0", "lab-chat-1"]
    assert len(told["simulated"]["hosts"]) == 3
    gpu = told["_meta"]["hostvars"]["lab-chat-0"]
    assert gpu["ansible_host"] == "10.77.0.11"
    assert "StrictHostKeyChecking=yes" in gpu["ansible_ssh_common_args"]
    assert gpu["vllm_server_models"][0]["name"] == "smollm2-135m-instruct"
    assert gpu["nvidia_driver_packages"]
    assert "gateway_port" not in gpu


def test_a_newer_lock_is_answered_without_the_stack_being_touched(project: Project):
    path = project.folder / "fleets/lab.lock.yaml"
    lock = load_lock(path)
    newer = lock.model_copy(update={"gateway": lock.gateway.model_copy(update={"max_body_mib": 16})})
    plain = {key: value for key, value in newer.plain().items() if key != "digest"}
    path.write_text(newer.to_yaml().replace(lock.digest, digest_of(plain)))
    assert project.answers("--host", "lab-gateway-0")["gateway_max_body_mib"] == 16


def test_a_text_with_braces_stays_a_text(project: Project):
    evil = "{{ lookup('ansible.builtin.pipe', 'touch touched') }}"
    project.hand_over(
        lambda told: told["mirrors"]["nvidia"].update(key=f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n{evil}\n")
    )
    shown = project.run(
        *("ansible", "-i", "inventories/lab", "lab-chat-0", "-c", "local"),
        *("-m", "ansible.builtin.debug", "-a", "var=nvidia_driver_repository.key"),
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert evil in shown.stdout
    assert not list(project.folder.rglob("touched"))


def test_constructed_groups_are_added(project: Project):
    source = {"source": "state_file", "state_file": "../../state.json"}
    project.settings(**source, keyed_groups=[{"key": "nvidia_driver_branch", "prefix": "driver"}])
    assert project.answers("--list")["driver_580"]["hosts"] == ["lab-chat-0", "lab-chat-1"]


def test_secrets_are_drawn_once_and_readable_by_their_owner_alone(project: Project):
    def key(host: str, variable: str) -> str:
        shown = project.run(
            *("ansible", "-i", "inventories/lab", host, "-c", "local", "--one-line"),
            *("-m", "ansible.builtin.debug", "-a", f"var={variable}"),
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr
        return json.loads(shown.stdout.partition("=> ")[2])[variable]

    drawn = key("lab-chat-0", "vllm_server_api_key")
    assert len(drawn) >= 32
    assert drawn.isalnum()
    assert key("lab-gateway-0", "gateway_engine_key") == drawn
    assert drawn not in key("lab-gateway-0", "gateway_api_keys")
    secrets = project.folder / ".gpuyard/secrets/lab"
    assert (secrets / "engine_key").read_text().strip() == drawn
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}


def another_version(told: dict[str, Any]) -> None:
    told["version"] = 2


def no_nodes(told: dict[str, Any]) -> None:
    told["nodes"] = []


def another_fleet(told: dict[str, Any]) -> None:
    told["fleet"] = "molecule"


def another_stack(told: dict[str, Any]) -> None:
    told["stack"] = "prod"


def a_field_too_many(told: dict[str, Any]) -> None:
    told["password"] = "x"


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (another_version, "HANDOVER-VERSION"),
        (a_field_too_many, "HANDOVER-INVALID"),
        (no_nodes, "INV-EMPTY"),
        (another_fleet, "LOCK-MISSING"),
        (another_stack, "INV-STACK"),
    ],
)
def test_a_handover_that_cannot_be_used_is_refused_with_its_cause(
    project: Project, spoil: Callable[[dict[str, Any]], None], rule: str
):
    project.hand_over(spoil)
    assert project.refuses().startswith(f"{rule}: ")


def test_the_lock_of_another_fleet_is_refused(project: Project):
    shutil.copy(REPOSITORY / "fleets/molecule.lock.yaml", project.folder / "fleets/lab.lock.yaml")
    assert project.refuses().startswith("INV-FLEET: the stack is of fleet lab, the lock of fleet molecule")


def test_a_lock_that_was_edited_is_refused(project: Project):
    lock = project.folder / "fleets/lab.lock.yaml"
    lock.write_text(lock.read_text().replace("max_body_mib: 8", "max_body_mib: 64"))
    assert project.refuses().startswith("LOCK-EDITED: ")


def test_a_missing_lock_is_refused(project: Project):
    (project.folder / "fleets/lab.lock.yaml").unlink()
    assert project.refuses().startswith("LOCK-MISSING: ")


def test_a_stack_without_the_output_is_refused(project: Project):
    project.export({})
    assert project.refuses().startswith("INV-OUTPUT: stack lab has no output handover; bring it up first")


def test_a_file_that_is_no_exported_state_is_refused(project: Project):
    (project.folder / "state.json").write_text("[]")
    assert project.refuses().startswith("INV-STATE: ")
    (project.folder / "state.json").unlink()
    assert project.refuses().startswith("INV-STATE: no state file")


def test_an_inventory_outside_a_project_is_refused(project: Project):
    (project.folder / "Pulumi.yaml").unlink()
    assert project.refuses().startswith("INV-PROJECT: ")


def test_a_machine_without_the_command_is_told_so(project: Project):
    project.settings()
    project.environment["PATH"] = "/usr/bin:/bin"
    assert project.refuses().startswith("INV-CLI: there is no pulumi on PATH")


def test_a_play_does_not_run_green_without_its_inventory(project: Project):
    project.export({})
    play = project.folder / "play.yml"
    play.write_text("- hosts: all\n  gather_facts: false\n  tasks: []\n")
    done = project.run("ansible-playbook", "-i", "inventories/lab", "play.yml")
    assert done.returncode != 0
    assert "INV-OUTPUT" in done.stderr


def test_the_documentation_of_the_plugin_can_be_read(project: Project):
    told = project.run("ansible-doc", "-t", "inventory", "--json", "gpuyard.fleet.pulumi")
    assert told.returncode == 0, told.stderr
    options = json.loads(told.stdout)["gpuyard.fleet.pulumi"]["doc"]["options"]
    assert {"stack", "project_dir", "lock", "source", "state_file", "output", "keyed_groups"} <= set(options)


@pytest.mark.engine
def test_a_missing_stack_is_told_from_an_empty_one_and_from_a_missing_backend(project: Project):
    project.with_a_backend()
    assert project.refuses().startswith("INV-STACK: pulumi cannot read stack lab: no stack named 'lab' found")
    project.pulumi("stack", "init", "lab")
    assert project.refuses().startswith("INV-OUTPUT: ")
    project.environment["PULUMI_BACKEND_URL"] = "file:///nonexistent/backend"
    assert project.refuses().startswith("INV-STACK: pulumi cannot read stack lab: unable to open bucket")


@pytest.mark.engine
def test_the_command_and_the_exported_state_answer_alike(project: Project):
    from_file = project.answers("--list")
    project.with_a_backend()
    project.pulumi("stack", "init", "lab")
    project.pulumi("stack", "import", "--file", "state.json", "--stack", "lab")
    assert project.answers("--list") == from_file


# --- hosts you own -------------------------------------------------------------------------------------------------


@pytest.fixture
def owned(project: Project) -> Project:
    for name in ("onprem.yaml", "onprem.hosts.yaml", "onprem.lock.yaml"):
        shutil.copy(REPOSITORY / "fleets" / name, project.folder / "fleets" / name)
    project.settings(stack=None, source="hosts", fleet="onprem")
    return project


def test_a_file_of_hosts_takes_the_place_of_a_stack(owned: Project):
    told = owned.answers("--list")
    assert told["gateways"]["hosts"] == ["onprem-gateway-0"]
    assert told["pool_chat"]["hosts"] == ["onprem-chat-0", "onprem-chat-1"]
    gpu = told["_meta"]["hostvars"]["onprem-chat-1"]
    assert gpu["ansible_host"] == "192.0.2.21"
    assert gpu["nvidia_driver_gpu_count"] == 4
    assert gpu["vllm_server_gateway_addresses"] == ["192.0.2.10"]


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("onprem.hosts.yaml", "192.0.2.21", "192.0.2.20", "HOSTS-DUPLICATE"),
        ("onprem.yaml", "max_model_len: 2048", "max_model_len: 1024", "LOCK-STALE"),
    ],
)
def test_no_inventory_comes_of_a_wrong_file_or_a_stale_lock(owned: Project, file: str, old: str, new: str, rule: str):
    path = owned.folder / "fleets" / file
    path.write_text(path.read_text().replace(old, new))
    assert rule in owned.refuses()


def test_a_source_without_its_name_is_refused(owned: Project):
    owned.settings(stack=None, source="hosts")
    assert owned.refuses().startswith("INV-HOSTS")
    owned.settings(stack=None)
    assert owned.refuses().startswith("INV-STACK")
