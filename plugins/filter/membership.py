"""From what Ansible knows of the nodes to who comes, who goes, and whether those that stay can do without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.gpuyard.fleet.plugins.filter.upgrade import is_up, models_of, pool_of, seen, serving_of

from gpuyard.handover.inventory import pool_group
from gpuyard.provision.protection import consent, machine_urn
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet
from gpuyard.upgrade.membership import Pool, moves, replace_step
from gpuyard.upgrade.waves import NOT_BEGUN, Fleet, Node, Policy, refuse_leaving

DOCUMENTATION = r"""
name: fleet_moves
short_description: Who comes into a fleet and who leaves it
description:
  - The spec's number of nodes held against the machines of the handover and the servers of the gateways.
  - C(nodes_may_leave), C(replace_step) and C(consent_lines) are beside it, for playbooks that take machines out.
options:
  _input:
    description: File of the fleet's spec.
    type: path
    required: true
  groups:
    description: Ansible's C(groups), in which the pools are looked up.
    type: dict
    required: true
  served:
    description: What C(gateway_state.py servers) said on each gateway, by its name.
    type: dict
    required: true
"""


def fleet_moves(spec: str, groups: Mapping[str, Sequence[str]], served: Mapping[str, str]) -> dict[str, Any]:
    try:
        fleet = load_fleet(Path(spec))
    except RefusedError as refused:
        raise AnsibleFilterError(str(refused)) from refused
    pools = [Pool(pool.name, pool.nodes, tuple(groups.get(pool_group(pool.name), ()))) for pool in fleet.pools]
    found = moves(
        pools, {gateway: {str(row["server"]) for row in json.loads(told)} for gateway, told in served.items()}
    )
    return {
        "coming": list(found.coming),
        "going": list(found.going),
        "missing": dict(found.missing),
        "forgotten": list(found.forgotten),
        "lines": found.lines,
    }


def nodes_may_leave(
    names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], fleet_nodes: int, accept_downtime: Any
) -> bool:
    """True where those that stay can carry the load of now, which C(node_gate_servers_seen) tells; else refused."""
    nodes = [
        Node(
            name=name,
            pool=pool_of(hostvars[name]),
            state=NOT_BEGUN[0],
            serves=any(is_up(row) for row in seen(name, hostvars[name])),
        )
        for name in names
    ]
    fleet = Fleet(int(fleet_nodes), serving_of(names, hostvars))
    policy = Policy(accept_downtime=boolean(accept_downtime))
    try:
        refuse_leaving(nodes, fleet, models_of(names, hostvars), policy)
    except RefusedError as refused:
        raise AnsibleFilterError(str(refused)) from refused
    return True


def consent_lines(names: Sequence[str], provider: str, stack: str) -> list[str]:
    """What is typed before Pulumi takes the machines of these nodes away; nothing where nothing holds it back."""
    if provider != "aws" or not names:
        return []
    return [consent(stack, [machine_urn(stack, name) for name in names])]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "consent_lines": consent_lines,
            "fleet_moves": fleet_moves,
            "nodes_may_leave": nodes_may_leave,
            "replace_step": replace_step,
        }
