"""From what Ansible knows of the nodes to the plan of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.gpuyard.fleet.plugins.module_utils.node_upgrade import SETTLED

from gpuyard.spec.errors import RefusedError
from gpuyard.upgrade.waves import Fleet, Model, Node, Policy, refuse_overload, told, waves

DOCUMENTATION = r"""
name: upgrade_plan
short_description: The waves of a rollout, from how the nodes stand
description:
  - Who changes together and after whom, as C(serial) and the order of hosts; refused where the policy or the load of
    now do not allow it.
options:
  _input:
    description: Inventory names of the nodes.
    type: list
    elements: str
    required: true
  hostvars:
    description: >-
      Ansible's C(hostvars), in which C(upgrade_begun), C(node_gate_servers_seen), C(node_gate_backends) and
      C(vllm_server_models) are looked up.
    type: dict
    required: true
  fleet_nodes:
    description: How many GPU nodes the fleet has; the rollout may be of fewer.
    type: int
    required: true
  policy:
    description: C(canary), C(max_unavailable) and C(accept_downtime).
    type: dict
    required: true
"""


def upgrade_plan(
    names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], fleet_nodes: int, policy: Mapping[str, Any]
) -> dict[str, Any]:
    asked = Policy(
        canary=int(policy["canary"]),
        max_unavailable=str(policy["max_unavailable"]),
        accept_downtime=boolean(policy["accept_downtime"]),
    )
    nodes = [node_of(name, hostvars[name]) for name in names]
    up = {row["server"] for name in names for row in hostvars[name]["node_gate_servers_seen"] if is_up(row)}
    fleet = Fleet(int(fleet_nodes), serving_of(names, hostvars), away=int(fleet_nodes) - len(up.union(names)))
    moves = {name: moved(hostvars[name]["upgrade_begun"]["note"]) for name in names}
    try:
        found = waves(nodes, fleet, asked)
        refuse_overload(found, nodes, fleet, models_of(names, hostvars), asked)
    except RefusedError as refused:
        raise AnsibleFilterError(str(refused)) from refused
    order = [name for wave in found for name in wave.nodes]
    return {
        # With nothing to do the play is walked all the same, and changes nothing.
        "order": order or list(names),
        "serial": [len(wave.nodes) for wave in found] or [len(names)],
        "canaries": [name for wave in found for name in wave.watched],
        "waves": [{"name": wave.name, "nodes": list(wave.nodes)} for wave in found],
        "text": told(found, moves) if found else "Every node is done; there is nothing to change.",
    }


def node_of(name: str, found: Mapping[str, Any]) -> Node:
    return Node(
        name=name,
        # Every model of a pool is served by all of its nodes: the backends name the pool.
        pool=pool_of(found),
        state=found["upgrade_begun"]["note"]["state"],
        serves=any(is_up(row) for row in seen(name, found)),
        domain=str(found.get("failure_domain", "")),
        stays_out=bool(found["upgrade_begun"]["note"]["drained_before"]),
        watched=bool(found["upgrade_begun"]["note"]["watched"]),
    )


def is_up(row: Mapping[str, Any]) -> bool:
    return row["status"].startswith("UP")


def seen(name: str, found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in found["node_gate_servers_seen"] if row["server"] == name]


def pool_of(found: Mapping[str, Any]) -> str:
    return ",".join(sorted(found["node_gate_backends"]))


def serving_of(names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Servers that any gateway finds up, by pool; the gateways know those too that the rollout leaves alone."""
    return {
        pool_of(hostvars[name]): len({row["server"] for row in hostvars[name]["node_gate_servers_seen"] if is_up(row)})
        for name in names
    }


def models_of(names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[Model]:
    models: dict[str, Model] = {}
    for name in names:
        found = hostvars[name]
        for backend, seats in (found.get("node_gate_seats") or {}).items():
            requests = sum(int(row["sessions"]) for row in found["node_gate_servers_seen"] if row["backend"] == backend)
            models[backend] = Model(backend.removeprefix("model_"), pool_of(found), requests, int(seats))
    return list(models.values())


def moved(note: Mapping[str, Any]) -> tuple[str, str]:
    return note["previous"]["version"], note["target"]["version"]


def not_settled(notes: Sequence[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
    """The notes of changes that are on their way, or that left the node in quarantine."""
    return [note for note in notes if note and note["state"] not in SETTLED]


def rollback_to(name: str, names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a node goes back to, among those that go back with it; empty where nothing is known.

    A rollout that was halted has brought some nodes to its target and left others where they were. Those stay: what
    they came from by the rollout before is not what the ones beside them come back to.
    """
    told = {one: hostvars[one]["rollback_note"] for one in names}
    notes = [answer["note"] for answer in told.values() if answer["note"]]
    # Whoever is on the way back has turned its note round.
    going = [note["previous"] if note["back"] else note["target"] for note in notes if went(note)]
    mine = told[name]["note"]
    if mine and not went(mine) and mine["target"] in going:
        return mine["previous"]
    return told[name]["way_back"]


def went(note: Mapping[str, Any]) -> bool:
    return bool(note["back"]) or note["state"] not in ("upgrade-required", "rollback-done")


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"upgrade_plan": upgrade_plan, "rollback_to": rollback_to, "not_settled": not_settled}
